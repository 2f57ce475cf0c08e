"""Checkpoints of a run; the only file that knows orbax."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import shutil
import sys
from typing import Any

from bpjax import paths
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

_DIGEST = 'digest'


class Checkpoints:
  """The checkpoints in one directory, newest last.

  A checkpoint is written in the background under another name and renamed when
  it is whole, so a killed process leaves none that is half written. Each holds
  a digest of its arrays: orbax itself reads some damaged files without
  complaint (a flipped bit in a data file gives other numbers).

  Example:
    >>> with Checkpoints('run/checkpoints', keep=2, warn=print) as checkpoints:
    ...   checkpoints.save(100, state)
  """

  def __init__(
      self, directory: str, keep: int, warn: Callable[[str], None]):
    """Opens the directory, which need not exist.

    Args:
      directory: where the checkpoints lie, one folder per step.
      keep: how many of the newest to keep.
      warn: called with one sentence for every checkpoint that is damaged.
    """
    self._directory = os.path.abspath(directory)
    self._warn = warn
    self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *error):
    self.close()

  def save(self, step: int, state: Any) -> None:
    """Starts to save a state; its arrays may be donated afterwards."""
    self._manager.save(
        step, args=ocp.args.StandardSave(_with_digest(_flat(state))))

  def restore(self, like: Any) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole.

    Newer ones, which are damaged, are named in a warning and removed, since the
    run is going to write them again.

    Args:
      like: the state as ShapeDtypeStructs that carry shardings.

    Returns:
      The step and the state, or None where there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints, but none that can be used.
    """
    with _without_late_complaints():
      return self._newest(like)

  def wait(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of the directory."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _newest(self, like):
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
      folder = os.path.join(self._directory, str(step))
      problem, state = self._read(step, like)
      if not problem:
        for other in damaged:
          shutil.rmtree(other)
        self._manager.reload()
        return step, state
      self._warn(f'checkpoint {folder} is damaged ({problem}) and not used.')
      damaged.append(folder)
    if steps:
      raise ValueError(
          f'`workdir` has {len(steps)} checkpoints and none that this program '
          f'can use; remove {self._directory} to train from the start.')
    return None

  def _read(self, step, like):
    flat = _flat(like)
    mesh = next(iter(flat.values())).sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = flat | {_DIGEST: jax.ShapeDtypeStruct(
        (len(flat),), jnp.uint32, sharding=everywhere)}
    try:
      found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except Exception as error:  # pylint: disable=broad-exception-caught
      # What a damaged file raises is orbax's and tensorstore's own affair:
      # ValueError, JSONDecodeError, UnicodeDecodeError and bare Exception
      # were all seen.
      return f'{type(error).__name__} while it was read', None
    digest = found.pop(_DIGEST)
    if not np.array_equal(digest, _digest(found)):
      return 'its numbers are not those that were saved', None
    leaves = [found[name] for name in flat]
    return '', jax.tree.unflatten(jax.tree.structure(like), leaves)


@contextlib.contextmanager
def _without_late_complaints():
  """Silences reads that end after the one that failed, and that nobody awaits.

  Each would print "Event loop is closed" with a traceback.
  """
  before = sys.unraisablehook

  def hook(unraisable):
    if 'Event loop is closed' not in str(unraisable.exc_value):
      before(unraisable)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = before


def _flat(state):
  """Leaf name -> leaf: no state class, None or empty dict reaches orbax."""
  names = [name.replace('/', '.') for name in paths.leaf_names(state)]
  return dict(zip(names, jax.tree.leaves(state), strict=True))


def _with_digest(flat):
  return flat | {_DIGEST: _digest(flat)}


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
