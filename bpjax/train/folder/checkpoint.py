"""Checkpoints of a run; the only file that knows orbax."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import hashlib
import os
import re
import sys
from typing import Any

from absl import logging
from bpjax import paths
from bpjax.train import hosts as hosts_lib
from bpjax.train.folder import workdir
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_DIGEST = 'digest'
_ITEM = 'default'  # Orbax's name for what a checkpoint holds.
_DAMAGE = (
    AttributeError, EOFError, FileNotFoundError, IndexError, IsADirectoryError,
    KeyError, NotADirectoryError, TypeError, ValueError)


class Checkpoints:
  """The checkpoints in one directory, newest last.

  A checkpoint is written in the background under another name and renamed when
  it is whole, so a killed process leaves none that is half written. Each holds
  a digest of its arrays, its step, its run and the records before it: orbax
  itself reads some damaged files without complaint (a flipped bit in a data
  file gives other numbers).

  Example:
    >>> with Checkpoints('run/checkpoints', keep=2, warn=print) as checkpoints:
    ...   checkpoints.save(100, state)
  """

  def __init__(
      self, directory: str, keep: int, warn: Callable[[str], None],
      identity: str = '', hosts: hosts_lib.Hosts = hosts_lib.Hosts()):
    """Reads and writes nothing yet.

    Args:
      directory: where the checkpoints lie, one folder per step.
      keep: how many of the newest to keep.
      warn: called with one sentence for every checkpoint that cannot be used.
      identity: tells this run's checkpoints from another's; '': not compared.
      hosts: the processes of the run. All of them save and restore at the same
        steps; process 0 alone names and sets aside what cannot be used.
    """
    self._directory = os.path.abspath(directory)
    self._keep, self._warn = keep, warn
    self._identity, self._hosts = identity, hosts
    self._manager = None

  def __enter__(self) -> Checkpoints:
    _silence_late_complaints()
    return self

  def __exit__(self, kind, error, traceback):
    manager, wrong = self._manager, None
    # What could not be written is raised again by `close`.
    for finish in () if manager is None else (
        manager.wait_until_finished, manager.close):
      try:
        with self._writing():
          finish()
      except workdir.DiskError as first:
        wrong = wrong or first
    if wrong is not None and error is None:
      raise wrong

  def save(self, step: int, state: Any, records: str = '') -> None:
    """Starts to save a state; its arrays may be donated afterwards.

    Args:
      step: of the state.
      state: the state.
      records: a hash of what was recorded before it.

    Raises:
      DiskError: if this one, or the one before, cannot be written.
    """
    flat = _flat(state)
    flat[_DIGEST] = np.append(
        _digest(flat),
        np.uint32([step, *_words(self._identity), *_words(records)]))
    with self._writing():
      if self._manager is None:
        self._manager = ocp.CheckpointManager(
            self._directory, options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True,
                lightweight_initialize=True))
      self._manager.save(step, args=ocp.args.StandardSave(flat))

  def restore(
      self, like: Any, records: Callable[[int], str] = lambda step: ''
  ) -> tuple[int, Any] | None:
    """The newest checkpoint that can be used.

    Newer ones are named in a warning and set aside, since the run is going to
    write them again, and so is whatever else has a checkpoint's name.

    Args:
      like: the state as ShapeDtypeStructs that carry shardings.
      records: step -> the hash that its checkpoint was saved with; '': not
        compared.

    Returns:
      The step and the state, or None where there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints, but none that can be used. Then
        nothing is changed.
      DiskError: if they cannot be read for another reason than damage.
    """
    return self._newest(like, records)

  def peek(self, like: Any) -> tuple[int, Any] | None:
    """As `restore`, and changes nothing: for who reads the run of another."""
    problem = ''
    for step in self._steps()[0]:
      problem, state = self._read(step, like, '')
      if not problem:
        return step, state
    if problem:
      raise ValueError(
          f'no checkpoint in {self._directory} can be used; the oldest '
          f'{problem}.')
    return None

  def holds(self, step: int) -> bool:
    """Whether there is a checkpoint of that step."""
    return os.path.isdir(self._path(step))

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      DiskError: if it cannot be written.
    """
    if self._manager is not None:
      with self._writing():
        self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    # The first two are tensorstore's, for a disk that is full.
    except (ValueError, RuntimeError, OSError) as error:
      raise workdir.disk_error(
          f'a checkpoint in {self._directory} cannot be written',
          _os_error(error)[1]) from error

  def _newest(self, like, records):
    steps, strange = self._hosts.first(self._steps)
    unusable = {}
    for step in steps:
      text, state = self._read(step, like, records(step))
      # Of no use to any process if it is not to one.
      text = next(filter(None, self._hosts.share(text)), '')
      if not text:
        self._set_aside(unusable | strange)
        return step, state
      unusable[self._path(step)] = text
    for path, text in unusable.items():
      self._warn(f'checkpoint {path} {text} and is not used')
    if steps:
      raise ValueError(
          f'`workdir` has {len(steps)} checkpoints and none that this program '
          f'can use; move {self._directory} elsewhere to train from the start.')
    self._set_aside(strange)
    return None

  def _set_aside(self, problems):
    if self._hosts.index:
      return
    for path, text in problems.items():
      workdir.set_aside(path, text, self._warn, 'checkpoint ')

  def _steps(self):
    """Steps with a folder, newest first; and path -> problem of other things.
    """
    steps, strange = [], {}
    if os.path.islink(self._directory):
      raise ValueError(
          f'{self._directory} is a symbolic link, which is not followed; put '
          'the folder itself there, or choose another `workdir`.')
    with workdir.disk(f'{self._directory} cannot be made or read'):
      os.makedirs(self._directory, exist_ok=True)
      names = os.listdir(self._directory)
    for name in names:
      path = os.path.join(self._directory, name)
      if not re.fullmatch(r'[0-9]+(\..*tmp.*)?', name):
        continue
      if os.path.islink(path) or not os.path.isdir(path):
        strange[path] = 'is no folder'
      elif name.isdigit():
        if (os.path.isdir(os.path.join(path, _ITEM))
            and name == str(int(name))):
          steps.append(int(name))
        else:
          strange[path] = 'is empty or none of a run'
    return sorted(steps, reverse=True), strange

  def _path(self, step):
    return os.path.join(self._directory, str(step))

  def _read(self, step, like, records):
    flat = _flat(like)
    mesh = next(iter(flat.values())).sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = flat | {_DIGEST: jax.ShapeDtypeStruct(
        (len(flat) + 5,), jnp.uint32, sharding=everywhere)}
    self._check_readable(step)
    try:
      with ocp.StandardCheckpointer() as reader:
        found = reader.restore(os.path.join(self._path(step), _ITEM), wanted)
    except Exception as error:
      # What a damaged file raises is orbax's and tensorstore's own affair.
      # Whatever else there is, such as too little memory, says nothing of it.
      if type(error) is not Exception and not isinstance(error, _DAMAGE):
        raise
      number, text = _os_error(error)
      if number not in (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise workdir.disk_error(
            f'{self._path(step)} cannot be read', text) from error
      return f'is damaged ({type(error).__name__} while it was read)', None
    digest = np.asarray(found.pop(_DIGEST))
    bits, (its_step, *words) = digest[:len(flat)], digest[len(flat):].tolist()
    if not np.array_equal(bits, _digest(found)):
      return 'is damaged (its numbers are not those that were saved)', None
    if self._identity and words[:2] != _words(self._identity):
      return 'is of a run with another config', None
    if its_step != step:
      return f'is of step {its_step}', None
    if records and words[2:] != _words(records):
      return 'counts on other lines of metrics.jsonl than there are', None
    leaves = [found[name] for name in flat]
    return '', jax.tree.unflatten(jax.tree.structure(like), leaves)

  def _check_readable(self, step):
    """Raises DiskError for a file that is there and may not be read."""
    for folder, _, files in os.walk(self._path(step)):
      for name in files:
        path = os.path.join(folder, name)
        with workdir.disk(f'{path} cannot be read'):
          os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def _silence_late_complaints():
  """Keeps orbax from printing what it raises as well.

  Reads and writes that end after one that failed, which nobody awaits, would
  each print "Event loop is closed" with a traceback, at any later time.
  """
  before = sys.unraisablehook
  if getattr(before, 'silences', False):
    return

  def hook(unraisable):
    if 'Event loop is closed' not in str(unraisable.exc_value):
      before(unraisable)

  setattr(hook, 'silences', True)
  sys.unraisablehook = hook
  logging.get_absl_logger().addFilter(
      lambda record: 'orbax' not in record.pathname)


def _os_error(error):
  """The number and the text of an OSError, also where tensorstore tells it."""
  if isinstance(error, OSError):
    return error.errno or 0, error.strerror or str(error)
  found = re.search(r"os_error_code='(\d+)'", str(error))
  if found:
    return int(found[1]), os.strerror(int(found[1]))
  return 0, ' '.join(str(error).split())[:200] or type(error).__name__


def _words(text):
  """Two words of 32 bits of a text's hash."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return np.frombuffer(digest, '<u4').tolist()


def _flat(state):
  """Leaf name -> leaf: no state class, None or empty dict reaches orbax."""
  names = [name.replace('/', '.') for name in paths.leaf_names(state)]
  return dict(zip(names, jax.tree.leaves(state), strict=True))


@jax.jit
def _digest(flat):
  """For each leaf the sum of its bits, read as unsigned integers; [leaves]."""
  return jnp.stack([_bits(x) for _, x in sorted(flat.items())])


def _bits(x):
  if x.dtype != jnp.bool_:
    width = x.dtype.itemsize * 8
    x = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{width}'))
  # The position is mixed in, so that numbers that changed places are noticed.
  place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
  return jnp.sum(x.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
