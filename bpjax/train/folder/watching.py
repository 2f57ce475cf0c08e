"""Shows a run to other programs while it trains: TensorBoard, W&B, Aim.

What they hold is a copy of metrics.jsonl, which alone counts. Whenever a run
begins or goes on, the copy is made to agree with it: TensorBoard's event file is
written anew from the lines that are kept, Weights & Biases gets the steps that it
lacks, and Aim has every step written over. So a run that was killed leaves no
point twice and none out. A copy that fails is one warning, and never ends a run or
changes what it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import time
from typing import Any, Protocol
import uuid

from bpjax.train import fields as fields_lib

Line = Mapping[str, Any]

DEFAULT = ('tensorboard',)  # Left out, with a warning, where it is missing.
_OURS = '.bpjax'  # How event files end that may be written anew.
_WITHOUT_TAG = ('step', 'split', 'unit')


class Watcher(Protocol):
  """Who is shown the lines of the metrics. May raise; it is not asked again."""

  def begin(self, lines: Sequence[Line]) -> None:
    """Makes what is shown agree with all lines so far."""

  def add(self, lines: Sequence[Line]) -> None:
    """Shows lines that were written to the metrics."""

  def close(self) -> None:
    """Nothing follows."""


class Missing(ValueError):
  """A package that a watcher needs is not installed."""


def names() -> list[str]:
  """What may be asked for.

  Example:
    >>> names()
    ['tensorboard', 'wandb', 'aim']
  """
  return list(_WATCHERS)


def check(watch: Sequence[str]) -> None:
  """Raises a ValueError for a name that is not known; imports nothing.

  Example:
    >>> check(['tensorboard'])
  """
  if isinstance(watch, str) or not all(isinstance(n, str) for n in watch):
    raise ValueError(
        f'`watch` must be a list of names, got {fields_lib.shown(watch)}; '
        f'known: {", ".join(names())}.')
  for name in watch:
    if name not in _WATCHERS:
      raise ValueError(
          f'`watch` must name some of {", ".join(names())}, or be empty, got '
          f'{fields_lib.shown(name)}'
          f'{fields_lib.nearest(name, names()) or "."}')
  if len(set(watch)) < len(watch):
    raise ValueError(
        f'`watch` must have each name once, got {", ".join(watch)}.')


def require(watch: Sequence[str]) -> None:
  """Raises a ValueError for what `check` refuses, and for a missing package.

  Those of `DEFAULT` may be missing. Imports nothing.

  Example:
    >>> require(['tensorboard'])
  """
  check(watch)
  for name in watch:
    if name not in DEFAULT:
      make(name, '', {})


def make(name: str, folder: str, config: Mapping[str, Any]) -> Watcher:
  """The watcher of a name; writes nothing yet.

  Args:
    name: one of `names()`.
    folder: the run's folder.
    config: the run's config, as in its config.json.

  Raises:
    Missing: with one sentence, where its package is not installed.
  """
  return _WATCHERS[name](folder, config)


def scalars(line: Line) -> dict[str, float]:
  """The numbers of a line of the metrics, by tag.

  What is not defined has none.

  Example:
    >>> scalars({'step': 22, 'epoch': 1, 'split': 'test', 'loss': .5})
    {'test/epoch': 1, 'test/loss': 0.5}
    >>> scalars({'step': 0, 'epoch': 0, 'split': 'alignment', 'unit': 'Dense_0',
    ...          'teaching': .9, 'weight': None})
    {'alignment_teaching/Dense_0': 0.9}
  """
  unit, split = line.get('unit'), line['split']
  skipped = _WITHOUT_TAG if unit is None else (*_WITHOUT_TAG, 'epoch')
  return {
      f'{split}/{name}' if unit is None else f'{split}_{name}/{unit}': value
      for name, value in line.items() if name not in skipped
      and isinstance(value, (int, float)) and math.isfinite(value)}


class TensorBoard:
  """An event file in the folder `tensorboard`, written without TensorFlow.

  Every line is on its way to the disk before `add` returns: there is no thread
  whose failure nobody would hear of.
  """

  def __init__(self, folder: str, config: Mapping[str, Any]):
    _require('tensorboardX', 'TensorBoard')
    self._folder, self._config = os.path.join(folder, 'tensorboard'), config
    self._writer = None

  def begin(self, lines: Sequence[Line]) -> None:
    event_file_writer, summary = (
        _module('event_file_writer'), _module('summary'))
    log = _module('proto.event_pb2').SessionLog
    self._forget()
    if os.path.islink(self._folder):
      raise OSError(f'{self._folder} is a symbolic link')
    os.makedirs(self._folder, exist_ok=True)
    for name in os.listdir(self._folder):
      if name.startswith('events.') and name.endswith(_OURS):
        os.unlink(os.path.join(self._folder, name))
    self._writer = event_file_writer.EventsWriter(
        os.path.join(self._folder, 'events'), f'.{os.getpid()}{_OURS}')
    # A TensorBoard that is looking on drops what it has read of the old file.
    self._write(session_log=log(status=log.START), step=0)
    self._write(summary=summary.text('config', _markdown(self._config)), step=0)
    self.add(lines)

  def add(self, lines: Sequence[Line]) -> None:
    summary = _module('proto.summary_pb2').Summary
    for line in lines:
      found = [summary.Value(tag=tag, simple_value=value)
               for tag, value in scalars(line).items()]
      if found:
        self._write(summary=summary(value=found), step=line['step'])
    self._writer.flush()

  def close(self) -> None:
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.close()

  def _forget(self):
    with contextlib.suppress(OSError):
      self.close()

  def _write(self, **event):
    self._writer.write_event(_module('proto.event_pb2').Event(
        wall_time=time.time(), **event))


class WeightsAndBiases:
  """A run of Weights & Biases, which the same folder goes on with.

  Steps that it has are not sent again: a run that goes on computes them to the
  same last bit.
  """

  def __init__(self, folder: str, config: Mapping[str, Any]):
    _require('wandb', 'Weights & Biases')
    self._folder, self._config = folder, config
    self._run, self._held = None, 0  # Steps below are there.

  def begin(self, lines: Sequence[Line]) -> None:
    self.close()
    self._run = importlib.import_module('wandb').init(
        project=os.environ.get('WANDB_PROJECT', 'bpjax'),
        name=os.path.basename(self._folder), dir=self._folder,
        config=dict(self._config), id=self._identity(), resume='allow')
    self._held = self._run.step if getattr(self._run, 'resumed', False) else 0
    self.add(lines)

  def add(self, lines: Sequence[Line]) -> None:
    for step, numbers in _by_step(lines).items():
      if step >= self._held:
        self._run.log(numbers, step=step)

  def close(self) -> None:
    run, self._run = self._run, None
    if run is not None:
      run.finish()

  def _identity(self):
    path = os.path.join(self._folder, 'wandb-run.txt')
    identity = _read_identity(path)
    if not identity:
      identity = uuid.uuid4().hex[:12]
      _write_identity(path, identity)
    return identity


class Aim:
  """A run of Aim, in the repository AIM_REPO or in the run's own folder.

  Aim keeps one value for a name and a step, so that what is sent again changes
  nothing.
  """

  def __init__(self, folder: str, config: Mapping[str, Any]):
    _require('aim', 'Aim')
    self._folder, self._config, self._run = folder, config, None

  def begin(self, lines: Sequence[Line]) -> None:
    self.close()
    path = os.path.join(self._folder, 'aim-run.txt')
    identity = _read_identity(path)
    make = functools.partial(
        importlib.import_module('aim').Run, experiment='bpjax',
        repo=os.environ.get('AIM_REPO', self._folder),
        system_tracking_interval=None, capture_terminal_logs=False)
    try:
      self._run = make(run_hash=identity or None)
    except Exception as error:
      if type(error).__name__ != 'MissingRunError':
        raise
      self._run = make()  # Somebody has deleted it there.
    if self._run.hash != identity:
      _write_identity(path, self._run.hash)
    self._run.name = os.path.basename(self._folder)
    self._run['config'] = {
        k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v)
        for k, v in self._config.items()}
    self.add(lines)

  def add(self, lines: Sequence[Line]) -> None:
    for step, numbers in _by_step(lines).items():
      for name, value in numbers.items():
        self._run.track(value, name=name, step=step)

  def close(self) -> None:
    run, self._run = self._run, None
    if run is not None:
      run.close()


_WATCHERS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases, 'aim': Aim}


def _read_identity(path):
  """The run's name over there, kept in the folder; '' if there is none."""
  try:
    with open(path, encoding='utf-8') as file:
      return file.read().strip()
  except FileNotFoundError:
    return ''


def _write_identity(path, identity):
  flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, 'O_NOFOLLOW', 0)
  with open(os.open(path, flags, 0o666), 'w', encoding='utf-8') as file:
    file.write(f'{identity}\n')


def _require(package, program):
  """Raises Missing; imports nothing yet, which would take time."""
  if importlib.util.find_spec(package) is None:
    raise Missing(
        f'`watch` of {program} needs the package {package}, which is not '
        f'installed; `pip install {package}`, or leave it out of --watch.')


def _module(name):
  """A part of tensorboardX, imported when it is first used."""
  return importlib.import_module(f'tensorboardX.{name}')


def _by_step(lines: Iterable[Line]) -> dict[int, dict[str, float]]:
  steps = {}
  for line in lines:
    steps.setdefault(line['step'], {}).update(scalars(line))
  return steps


def _markdown(config):
  """A config as TensorBoard shows texts."""
  rows = (f'| {k} | `{json.dumps(v)}` |' for k, v in config.items())
  return '\n'.join(['| field | value |', '| --- | --- |', *rows])
