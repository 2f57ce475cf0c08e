"""The folder that a run leaves: config, metrics, summary and log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import datetime
import fcntl
import json
import math
import os
import sys
from typing import Any

from experiments import config as config_lib
import rich.console


class Workdir:
  """One run's folder. Used as a context manager.

  Files: `config.json`, `metrics.jsonl` (one object a line), `summary.json`
  (once the run is finished), `log.txt`, of texts `tokenizer.json`, and the folder
  `checkpoints`.
  """

  def __init__(self, path: str):
    """Makes the folder, and holds it against other processes.

    Raises:
      ValueError: if nothing can be written there, or another process runs in
        it.
    """
    self.path = os.path.abspath(path)
    self.console = rich.console.Console(stderr=True, highlight=False)
    try:
      os.makedirs(self.path, exist_ok=True)
      self._log = open(self._file('log.txt'), 'a', encoding='utf-8')
    except OSError as error:
      raise _not_writable(path, error) from error
    try:
      # Record locks go with the process, however it ends, and children do not
      # inherit them.
      fcntl.lockf(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._log.close()
      raise ValueError(
          f'`workdir` {path!r} is in use by another process; wait for it, or '
          'choose another folder.') from error

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, *error):
    self._log.close()

  @property
  def checkpoints(self) -> str:
    """The folder of the checkpoints."""
    return self._file('checkpoints')

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises ValueError if the folder holds a run with another config."""
    held = _read_json(self._file('config.json'))
    if held is None:
      for file in ('checkpoints', 'metrics.jsonl', 'config.json'):
        if os.path.exists(self._file(file)):
          raise ValueError(
              f'`workdir` {self.path!r} holds {file} without a readable '
              'config.json, so nobody can tell which run it is; choose another '
              'folder.')
      return
    # A field that is newer than the run was at its default.
    held = config_lib.to_json(config_lib.default()) | held
    difference = config_lib.difference(held, config)
    if difference:
      raise ValueError(
          f'`workdir` {self.path!r} holds a run with another config: '
          f'{difference}; choose another folder, or the same config.')

  def claim(self, config: Mapping[str, Any]) -> None:
    """Makes this the folder of a run with a config that `check` allowed.

    Raises:
      ValueError: if the folder cannot be written to.
    """
    if os.path.exists(self._file('config.json')):
      return
    try:
      self._write('config.json', _pretty(config))
    except OSError as error:
      raise _not_writable(self.path, error) from error

  def keep(self, name: str, text: str) -> None:
    """Keeps a text that a run has to find again when it goes on.

    Raises:
      ValueError: if the folder holds another one.
    """
    try:
      with open(self._file(name), encoding='utf-8') as file:
        held = file.read()
    except FileNotFoundError:
      self._write(name, text)
      return
    if held != text:
      raise ValueError(
          f'`workdir` {self.path!r} holds another {name} than this run makes, '
          'so its data are others; choose another folder.')

  def summary(self) -> dict[str, Any] | None:
    """The summary of a run that is finished, else None."""
    return _read_json(self._file('summary.json'))

  def finish(self, summary: Mapping[str, Any]) -> None:
    """Writes the summary, which says that the run is finished."""
    self._write('summary.json', _pretty(_without_nan(summary)))

  def record(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines to the metrics, on the disk before it returns.

    A checkpoint that is saved afterwards can then count on them.
    """
    text = ''.join(f'{json.dumps(_without_nan(line))}\n' for line in lines)
    with open(self._file('metrics.jsonl'), 'a', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of the metrics that are whole."""
    try:
      with open(self._file('metrics.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file if line.endswith('\n')]
    except FileNotFoundError:
      return []

  def cut_metrics(self, step: int) -> None:
    """Removes the lines after `step`, which the run is going to write again."""
    kept = [line for line in self.metrics() if line['step'] <= step]
    self._write('metrics.jsonl', ''.join(f'{json.dumps(k)}\n' for k in kept))

  def log(self, message: str) -> None:
    """Writes one line to the log and to stderr."""
    now = datetime.datetime.now().strftime('%Y-%m-%d %H:%M:%S')
    self._log.write(f'{now} {message}\n')
    self._log.flush()
    if self.console.is_terminal:
      self.console.print(message, markup=False, soft_wrap=True)
    else:
      print(message, file=sys.stderr, flush=True)

  def _file(self, name):
    return os.path.join(self.path, name)

  def _write(self, name, text):
    """Replaces a file as a whole: a reader sees the old one or the new one."""
    temporary = self._file(f'.{name}.tmp')
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, self._file(name))


def _not_writable(path, error):
  return ValueError(
      f'`workdir` {path!r} cannot be written to ({error.strerror}); choose a '
      'folder that you may write to.')


def _pretty(value):
  return json.dumps(value, indent=2) + '\n'


def _read_json(path):
  try:
    with open(path, encoding='utf-8') as file:
      value = json.load(file)
  except (FileNotFoundError, ValueError):
    return None
  return value if isinstance(value, dict) else None


def _without_nan(value):
  """JSON has no NaN: what is not defined is null."""
  if isinstance(value, Mapping):
    return {name: _without_nan(v) for name, v in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
