"""Batches for the devices: whole sets that lie there already, or streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from bpjax.train import data as data_lib
from bpjax.train.loop import devices
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np


class Feed(Protocol):
  """The training batches of a run, a function of seed and step alone.

  Attributes:
    steps_per_epoch: number of whole batches of an epoch.
    streams: whether batches come one at a time from the host.
    fixed_batch: rows of the split that alignment is measured on throughout the
      run: a NamedTuple of arrays `[batch, ...]`.
  """
  steps_per_epoch: int
  streams: bool
  fixed_batch: Any

  def fetch(
      self, epoch: int, first: int, count: int
  ) -> tuple[Mapping[str, Any], np.int32]:
    """Data for `Learner.steps`, and where in it batch `first` lies."""


def make(split: Any, batch_size: int, seed: int, mesh: Mesh) -> Feed:
  """The feed of a training split.

  Raises:
    ValueError: if the split has not a single whole batch.
  """
  if batch_size > length(split):
    raise ValueError(
        f'`batch_size` must be at most the {length(split)} training examples, '
        f'got {batch_size}; choose a smaller one.')
  kind = _Streamed if isinstance(split, data_lib.Stream) else _Arrays
  return kind(split, batch_size, seed, mesh)


def length(split: Any) -> int:
  """The number of examples of a split."""
  return len(split) if isinstance(split, data_lib.Stream) else len(split.labels)


def eval_batch_size(wanted: int, mesh: Mesh) -> int:
  """The next multiple of the devices along `data`; what is too much is masked.
  """
  parts = mesh.shape['data']
  return -(-wanted // parts) * parts


def eval_batches(
    split: Any, wanted: int, mesh: Mesh) -> Iterator[tuple[Any, jax.Array]]:
  """The rows of a whole split and their mask, all batches of one shape.

  The last batch is filled up with zeros, which the mask `[batch]` leaves out.
  """
  size = eval_batch_size(wanted, mesh)
  place = devices.Rows(mesh, size)
  own = np.arange(size) if place.own is None else place.own
  starts = range(0, length(split), size)
  if isinstance(split, data_lib.Stream):
    batches = split.batches(size, train=False, part=place.own)
    batches = map(split.rows, batches)
  elif place.own is None:
    batches = (_take(split, slice(i, i + size)) for i in starts)
  else:
    batches = (
        _take(split, np.minimum(i + own, length(split) - 1)) for i in starts)
  for i, rows in zip(starts, batches):
    mask = i + own < length(split)
    rows = jax.tree.map(lambda x: _fill(x, len(own)), rows)
    yield place.put((rows, mask))


def _take(rows, index):
  return jax.tree.map(lambda x: x[index], rows)


def _fill(x, size):
  return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])


class _Arrays:
  """A set that lies on every device; a batch is a row of the epoch's order."""

  streams = False

  def __init__(self, split, batch_size, seed, mesh):
    self.steps_per_epoch = len(split.labels) // batch_size
    self._shape = (self.steps_per_epoch, batch_size)
    self._seed, self._mesh = seed, mesh
    self._size = len(split.labels)
    self._rows = self._put(split)
    self._epoch, self._order = None, None
    self.fixed_batch = self._put(_take(split, self._indices(0)[0]), 'data')

  def fetch(self, epoch, first, count):
    del count  # The whole epoch lies there.
    if epoch != self._epoch:
      self._epoch, self._order = epoch, self._put(self._indices(epoch))
    return {'rows': self._rows, 'order': self._order}, np.int32(first)

  def _indices(self, epoch):
    order = data_lib.epoch_order(self._size, seed=self._seed, epoch=epoch)
    return order[:np.prod(self._shape)].reshape(self._shape)

  def _put(self, x, *axes):
    return devices.put(x, NamedSharding(self._mesh, PartitionSpec(*axes)))


class _Streamed:
  """A set that is read as it is needed, one batch a step."""

  streams = True

  def __init__(self, split, batch_size, seed, mesh):
    self.steps_per_epoch = len(split) // batch_size
    self._split, self._batch_size, self._seed = split, batch_size, seed
    self._place = devices.Rows(mesh, batch_size)
    self._next, self._batches = None, None
    self.fixed_batch = self._place.put(self._rows(0, 0))

  def fetch(self, epoch, first, count):
    del count  # Always 1.
    rows = self._place.put(self._rows(epoch, first), stacked=True)
    return {'rows': rows}, np.int32(0)

  def _rows(self, epoch, first):
    """The rows of a batch that this process provides."""
    if (epoch, first) != self._next:
      self._batches = self._split.batches(
          self._batch_size, seed=self._seed, epoch=epoch, start=first,
          part=self._place.own)
    self._next = (epoch, first + 1)
    return self._split.rows(next(self._batches))
