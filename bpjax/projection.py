"""Projections of an error, or of anything like it, straight to a unit's input.

What rules of direct feedback share: the layout of the matrix, which is kept at
the unit that reads the layer to be taught, and the product with it, whole or
sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax.networks import examples
import jax
import jax.numpy as jnp

STRUCTURES = ('dense', 'pyramid', 'channel', 'low_rank')  # Of B.


def feedback_shape(
    info: base.UnitInfo, error: Any = None) -> tuple[int, ...]:
  """The shape of a unit's feedback, `[n_out, *features of its input]`.

  Args:
    info: the unit.
    error: shape of the error that is projected; default that of the output.
  """
  read = read_input(info)
  if read is None:
    raise ValueError(
        f'unit `{info.name}` sends no message, so that it has no projection; ask '
        '`projection.sends(info)` first.')
  shape = _first_shape(info.inputs[read], info.place(read))
  error = (error or info.net_output).shape
  n_out, features, _ = layout(
      error, shape, info.feature_axes if info.positionwise else 0)
  return (math.prod(n_out), *features)


def layout(
    error: tuple[int, ...], shape: tuple[int, ...], feature_axes: int
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
  """How an error is projected to an array.

  Args:
    error: the error's shape, batch axis included.
    shape: the array's, with its examples first.
    feature_axes: how many of its last axes are features, where the unit treats
      the positions before them alike; else 0.

  Returns:
    The axes of the error that are summed over; those that the projection makes;
    and how: 'whole' (one projection of the whole error to the whole array),
    'broadcast' (the whole error to every position) or 'each' (position by
    position).
  """
  axes = feature_axes or 1
  positions, features = shape[1:len(shape) - axes], shape[len(shape) - axes:]
  if positions and positions == error[1:-1]:
    return error[-1:], features, 'each'
  if positions and feature_axes:
    return error[1:], features, 'broadcast'
  return error[1:], shape[1:], 'whole'


def project(
    info: base.UnitInfo, error: base.Array, weights: base.Tree, x: base.Array,
    mask: base.Array | None = None) -> base.Array:
  """The message to a unit's input `x` that its projection makes of an error.

  Args:
    info: the unit.
    error: in the shape of the model's output, or of another unit's.
    weights: B of the unit, of shape `feedback_shape(info)` (or sparse).
    x: the unit's input; only its shape and dtype matter.
    mask: bool `[batch, positions]`, or None; see `spread`.

  Returns:
    An array in the shape of `x`.
  """
  return spread(
      error, weights, x, info.place(read_input(info)),
      info.feature_axes if info.positionwise else 0, mask)


def spread(
    error: base.Array, weights: base.Tree, x: base.Array,
    place: examples.Place | None, feature_axes: int,
    mask: base.Array | None = None) -> base.Array:
  """Projects an error to the shape of `x`, see `layout`.

  One that is shared by positions is divided by the root of their number. A
  position that the mask hides gets nothing, and is none of that number.
  """
  shape = _first_shape(x, place)
  _, features, how = layout(error.shape, shape, feature_axes)
  if how != 'each':
    error = error.reshape(error.shape[0], -1)
  wanted = getattr(weights, 'shape', error.shape[-1:])[0]
  if error.shape[-1] != wanted:
    raise ValueError(
        f'what is projected must be {wanted} numbers an example, as the matrix '
        f'takes them, got {error.shape[-1]}; labels have to be one-hot.')
  message = _times(error, weights, features)
  if how == 'broadcast':
    positions = shape[1:len(shape) - len(features)]
    ones = (1,) * (len(positions) + len(features))
    count = jnp.full(shape[0], math.prod(positions), message.dtype)
    if mask is not None and mask.shape[1:] == positions:
      count = jnp.maximum(jnp.sum(mask, axis=1, dtype=message.dtype), 1)
    message = message.reshape(shape[0], *ones[len(features):], *features)
    message = message / jnp.sqrt(count).reshape(-1, *ones)
    message = jnp.broadcast_to(message, shape)
  message = examples.back(message.astype(x.dtype), x.shape, place)
  return examples.only_real(message, mask, place)


def messages(
    unit: base.BoundUnit, error: base.Array, weights: base.Tree,
    mask: base.Array | None = None) -> tuple[base.Array | None, ...]:
  """The messages of a unit that projects an error: to one input, if to any."""
  read = read_input(unit.info)
  return tuple(
      project(unit.info, error, weights, x, mask)
      if i == read and sends(unit.info) else None
      for i, x in enumerate(unit.inputs))


def _first_shape(x, place):
  """The shape of an array with its examples first."""
  return jax.eval_shape(lambda x: examples.first(x, place), x).shape


def dtype(params: base.Tree, info: base.UnitInfo) -> Any:
  """That of the unit's parameters; of what it passes on for a boundary."""
  leaves = jax.tree.leaves(params) or [info.out]
  return leaves[0].dtype


def _times(error, weights, features):
  """e B^T, over the last axis of the error, from B in any structure."""
  if not isinstance(weights, Mapping):
    return jnp.tensordot(error, weights.astype(error.dtype), 1)
  weights = {name: w if name == 'entries' else w.astype(error.dtype)
             for name, w in weights.items()}
  if 'entries' in weights:
    return sum(error[..., entries] * values for entries, values in zip(
        weights['entries'], weights['values']))
  if 'left' in weights:
    return jnp.tensordot(
        jnp.tensordot(error, weights['left'], 1), weights['right'], 1)
  *positions, channels = features
  top = jnp.tensordot(error, weights['top'], 1).reshape(
      -1, *(1,) * len(positions), channels)
  if len(weights) == 1:
    return jnp.broadcast_to(top, (len(top), *features))
  for stage in range(len(weights) - 1):
    top = _doubled(top, weights[f'stage_{stage}'])
    left = len(weights) - 2 - stage
    top = top[:, *(slice(-(-size // 2**left)) for size in positions)]
  return top


def _doubled(x, kernel):
  """A transposed convolution of width and stride 2, in all spatial axes.

  Args:
    x: [batch, *positions, channels].
    kernel: [channels, 2, ..., 2, channels].
  """
  n = x.ndim - 2
  y = jnp.tensordot(x, kernel, 1)  # [batch, *positions, 2, ..., 2, channels].
  for axis in range(1, n + 1):  # One merge at a time, for explicit sharding.
    y = jnp.moveaxis(y, n + 1, axis + 1)
    y = y.reshape(*y.shape[:axis], 2 * y.shape[axis], *y.shape[axis + 2:])
  return y


def structured(
    key: base.Key, info: base.UnitInfo, shape: tuple[int, ...], structure: str,
    rank: int, std: float, dtype: Any) -> base.Tree:
  """Draws B of a unit as 'dense', 'pyramid', 'channel' or 'low_rank'.

  Every entry of the matrix that it stands for has mean 0 and standard deviation
  `std`. A unit whose input has no positions gets 'dense' in place of 'pyramid'
  and 'channel'.

  Args:
    key: of the unit.
    info: the unit.
    shape: of the matrix, from `feedback_shape`.
    structure: the name.
    rank: of 'low_rank'.
    std: of the entries of B.
    dtype: of the feedback.

  Returns:
    [n_out, *input]; `{'left': [n_out, rank], 'right': [rank, *input]}`;
    `{'top': [n_out, channels]}`, with a `'stage_i'` [channels, 2, ..., 2,
    channels] for each doubling of a pyramid.

  Raises:
    ValueError: for a rank above the entries of the error.
  """
  n_out, *features = shape
  if structure == 'low_rank':
    if rank > n_out:
      raise ValueError(
          f'`rank` must be at most the {n_out} entries of the error, got {rank}; '
          "'dense' has full rank.")
    left, right = jax.random.split(key)
    return {
        'left': std * feedback_lib.normal(left, (n_out, rank), dtype),
        'right': feedback_lib.normal(
            right, (rank, *features), dtype) / math.sqrt(rank)}
  if structure == 'dense' or not _has_positions(info):
    return std * feedback_lib.normal(key, (n_out, *features), dtype)
  *positions, channels = features
  stages = 0
  if structure == 'pyramid':
    stages = math.ceil(math.log2(max(positions)))
  top, *keys = jax.random.split(key, 1 + stages)
  kernel = (channels, *(2,) * len(positions), channels)
  return {'top': std * feedback_lib.normal(top, (n_out, channels), dtype)} | {
      f'stage_{i}': feedback_lib.normal(k, kernel, dtype) / math.sqrt(channels)
      for i, k in enumerate(keys)}


def _has_positions(info):
  """Whether one projection goes to all positions of a map of channels."""
  read = read_input(info)
  _, features, mode = layout(
      info.net_output.shape, _first_shape(info.inputs[read], info.place(read)),
      info.feature_axes if info.positionwise else 0)
  spatial = info.kind == base.BOUNDARY or 'conv' in info.operation
  return mode == 'whole' and spatial and len(features) > 1


def distinct(
    key: base.Key, count: int, n_out: int, shape: tuple[int, ...]) -> base.Array:
  """`count` different whole numbers below `n_out` for each neuron.

  Floyd's sampling: never more than the result in memory.
  """
  dtype = jnp.int16 if n_out < 2**15 else jnp.int32
  drawn = []
  for last in range(n_out - count, n_out):
    key, own = jax.random.split(key)
    new = jax.random.randint(own, shape, 0, last + 1, dtype)
    taken = sum((new == old for old in drawn), jnp.zeros(shape, bool))
    drawn.append(jnp.where(taken, jnp.array(last, dtype), new))
  return jnp.stack(drawn)


def whole(shape: tuple[int, ...], weights: base.Tree) -> base.Array:
  """The matrix B in any structure, of its `feedback_shape`."""
  n_out, *features = shape
  if not isinstance(weights, Mapping):
    return weights
  values = next(w for n, w in weights.items() if n != 'entries')
  return _times(jnp.eye(n_out, dtype=values.dtype), weights, features)


def read_input(info: base.UnitInfo) -> int | None:
  """Which input the projection goes to: the first of floats, or None."""
  return next(
      (i for i, s in enumerate(info.inputs)
       if jnp.issubdtype(s.dtype, jnp.inexact)), None)


def sends(info: base.UnitInfo) -> bool:
  """Whether a projection at the unit is of use: something learns below it."""
  return info.sends and read_input(info) is not None
