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
from bpjax.networks import examples
import jax
import jax.numpy as jnp


def feedback_shape(
    info: base.UnitInfo, error: Any = None) -> tuple[int, ...]:
  """The shape of a unit's feedback, `[n_out, *features of its input]`.

  Args:
    info: the unit.
    error: shape of the error that is projected; default that of the output.
  """
  shape = _first_shape(info.inputs[read_input(info)], _place(info))
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
      error, weights, x, _place(info),
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
  message = _times(error, weights)
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


def _place(info):
  """Where the examples lie in the input that is read."""
  given = info.given_examples
  return given[read_input(info)] if given else None


def _times(error, weights):
  """e B^T, over the last axis of the error."""
  if not isinstance(weights, Mapping):
    return jnp.tensordot(error, weights.astype(error.dtype), 1)
  return sum(
      error[..., entries] * values.astype(error.dtype)
      for entries, values in zip(weights['entries'], weights['values']))


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


def whole(weights: base.Tree, n_out: int) -> base.Array:
  """B with its zeros, [n_out, ...]."""
  if not isinstance(weights, Mapping):
    return weights
  entries, values = weights['entries'], weights['values']
  one_hot = jax.nn.one_hot(entries, n_out, axis=1, dtype=values.dtype)
  return jnp.sum(one_hot * values[:, None], axis=0)


def read_input(info: base.UnitInfo) -> int | None:
  """Which input the projection goes to: the first of floats, or None."""
  return next(
      (i for i, s in enumerate(info.inputs)
       if jnp.issubdtype(s.dtype, jnp.inexact)), None)


def sends(info: base.UnitInfo) -> bool:
  """Whether a projection at the unit is of use: something learns below it."""
  return info.sends and read_input(info) is not None
