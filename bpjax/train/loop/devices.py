"""All devices: the mesh that a config asks for, and what lies where on it.

            model
        d0  d1  d2  d3        mesh = {'data': 2, 'model': 4}: the batch is split
  data  d4  d5  d6  d7        over the rows, parameters over the columns where
                              `sharding` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

from bpjax import paths
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jax.sharding import Sharding
import numpy as np


def make_mesh(axes: Mapping[str, int], batch_size: int) -> Mesh:
  """The mesh over all devices, `data` first, with the batch checked against it.

  Args:
    axes: number of devices along each axis; one of them may be -1, for all
      devices that are left.
    batch_size: must be divisible by the devices along `data`.

  Returns:
    A mesh with Auto axes.

  Raises:
    ValueError: if the axes do not fit the devices, or the batch the axes.

  Example:
    >>> mesh = make_mesh({'data': -1}, batch_size=128)
  """
  count = jax.device_count()
  axes = dict(sorted(axes.items(), key=lambda axis: axis[0] != 'data'))
  if 'data' not in axes:
    raise ValueError(
        f"`mesh` must have an axis 'data', got {axes}; add it, with -1 for all "
        'devices that are left.')
  free = [name for name, size in axes.items() if size == -1]
  known = math.prod(size for size in axes.values() if size != -1)
  sizes_fit = known >= 1 and all(s == -1 or s >= 1 for s in axes.values())
  if len(free) == 1 and sizes_fit and count % known == 0:
    axes[free[0]] = count // known
  elif free or not sizes_fit or known != count:
    raise ValueError(
        f'`mesh` must use all {count} devices, got {axes}; give at most one '
        'axis -1, and sizes that multiply to the number of devices.')
  if batch_size % axes['data']:
    raise ValueError(
        f"`batch_size` must be divisible by the {axes['data']} devices of the "
        f"mesh axis 'data', got {batch_size}; choose a multiple of "
        f"{axes['data']}.")
  return jax.make_mesh(
      tuple(axes.values()), tuple(axes),
      axis_types=(AxisType.Auto,) * len(axes))


def shardings(
    mesh: Mesh, rules: Sequence[tuple[str, Sequence[Any]]], learned: Any,
    tree: Any) -> Any:
  """Where every leaf of a train state lies.

  Args:
    mesh: the mesh.
    rules: pairs (path pattern, partition spec); the first match wins. In place
      of a spec, a name of `PRESETS`. Without any, everything is replicated.
    learned: shapes of `{'params': ..., 'feedback': ...}`.
    tree: shapes of the train state. A leaf whose path ends like that of a
      learned leaf of the same shape, as an optimiser's moments do, lies where
      that one lies; the others are replicated.

  Returns:
    A tree of NamedSharding in the structure of `tree`.

  Raises:
    ValueError: for a learned leaf that no pattern matches, or that its spec
      does not fit.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  if not rules:
    return jax.tree.map(lambda _: replicated, tree)
  leaves = zip(paths.leaf_names(learned), jax.tree.leaves(learned), strict=True)
  placed = {
      (path, leaf.shape): _place(mesh, rules, path, leaf.shape)
      for path, leaf in leaves}

  def find(path, leaf):
    parts = path.split('/')
    ends = ('/'.join(parts[i:]) for i in range(len(parts)))
    return next(
        (placed[key] for end in ends if (key := (end, leaf.shape)) in placed),
        replicated)

  return paths.map_with_name(find, tree)


def _fsdp(mesh, shape):
  """The largest axis that `data` divides; the first of equal ones."""
  parts = mesh.shape['data']
  sizes = [size if size % parts == 0 else 0 for size in shape]
  largest = max(sizes, default=0)
  if parts == 1 or not largest:
    return ()
  at = sizes.index(largest)
  return (*[None] * at, 'data')


def _tensor(mesh, shape):
  """The last axis of what is no vector: columns of kernels and feedback."""
  parts = mesh.shape.get('model')
  if parts is None:
    raise ValueError(
        "`sharding` 'tensor' needs an axis 'model', which `mesh` does not have; "
        f'its axes are {", ".join(mesh.axis_names)}; set `mesh.model`.')
  if len(shape) < 2 or shape[-1] % parts:
    return ()
  return (*[None] * (len(shape) - 1), 'model')


# What stands for a spec: `(mesh, shape) -> spec`. What cannot be split is whole
# on every device.
PRESETS = {'fsdp': _fsdp, 'tensor': _tensor}


def put(tree: Any, places: Any) -> Any:
  """Lays arrays on the devices; of several processes each its own part.

  Args:
    tree: arrays that every process has as a whole.
    places: a sharding, or a tree of them in the structure of `tree`.

  Returns:
    A tree of arrays, which are global where there are several processes.

  Example:
    >>> mesh = make_mesh({'data': -1}, batch_size=128)
    >>> place = NamedSharding(mesh, PartitionSpec('data'))
    >>> put(np.ones((128, 3)), place).sharding == place
    True
  """
  if isinstance(places, Sharding):
    places = jax.tree.map(lambda _: places, tree)
  if all(p.is_fully_addressable for p in jax.tree.leaves(places)):
    return jax.device_put(tree, places)

  def one(x, place):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, place)  # It is global already.
    x = np.asarray(x)
    return jax.make_array_from_callback(
        x.shape, place, lambda index: np.asarray(x[index]))

  return jax.tree.map(one, tree, places)


class Rows:
  """How the rows of a batch lie on the devices, and which are this process's.

  Attributes:
    own: positions in the batch that this process has to provide, `[n]`; None
      where it is alone and provides all.

  Example:
    >>> rows = Rows(make_mesh({'data': -1}, batch_size=128), 128)
    >>> images = np.ones((128, 8, 8, 1))
    >>> own = images if rows.own is None else images[rows.own]
    >>> rows.put(own).shape
    (128, 8, 8, 1)
  """

  def __init__(self, mesh: Mesh, size: int):
    """Of batches of `size` rows, which are split over the axis `data`."""
    self._place = NamedSharding(mesh, PartitionSpec('data'))
    self._stacked = NamedSharding(mesh, PartitionSpec(None, 'data'))
    self._size, self.own = size, None
    if not self._place.is_fully_addressable:
      slices = self._place.addressable_devices_indices_map((size,)).values()
      self.own = np.unique(
          np.concatenate([np.arange(size)[s] for s in slices]))

  def put(self, rows: Any, stacked: bool = False) -> Any:
    """A batch on the devices.

    Args:
      rows: a tree of arrays, of the rows `own` alone.
      stacked: whether to add a first axis of size 1.
    """
    if self.own is None:
      if not stacked:
        return jax.device_put(rows, self._place)
      rows = jax.tree.map(lambda x: np.asarray(x)[None], rows)
      return jax.device_put(rows, self._stacked)

    def one(x):
      x = np.asarray(x)
      shape = (self._size, *x.shape[1:])

      def part(index):
        wanted = np.arange(self._size)[index[1] if stacked else index[0]]
        found = x[np.searchsorted(self.own, wanted)]
        return found[None] if stacked else found

      return jax.make_array_from_callback(
          (1, *shape) if stacked else shape,
          self._stacked if stacked else self._place, part)

    return jax.tree.map(one, rows)


def _place(mesh, rules, path, shape):
  bare = path.partition('/')[2]
  for pattern, spec in rules:
    if paths.matches(pattern, bare) or paths.matches(pattern, path):
      break
  else:
    raise ValueError(
        f'`sharding` must cover every parameter, and no pattern matches '
        f"`{path}`; add a pair for it, such as ('*', ()) at the end.")
  if isinstance(spec, str):
    spec = PRESETS[spec](mesh, shape)
  spec = [tuple(s) if isinstance(s, (list, tuple)) else s for s in spec]
  names = [s if isinstance(s, tuple) else (s,) if s else () for s in spec]
  unknown = sorted({n for entry in names for n in entry} - {*mesh.axis_names})
  if unknown:
    raise ValueError(
        f'`sharding` of `{path}` names the axis {unknown[0]!r}, which `mesh` '
        f'does not have; its axes are {", ".join(mesh.axis_names)}.')
  parts = [math.prod(mesh.shape[n] for n in entry) for entry in names]
  if len(parts) > len(shape) or any(s % p for s, p in zip(shape, parts)):
    raise ValueError(
        f'`sharding` of `{path}` must fit its shape {shape}, got {spec} for '
        f'the mesh {dict(mesh.shape)}; give at most one entry per axis, and '
        'split an axis only into equal parts.')
  return NamedSharding(mesh, PartitionSpec(*spec))
