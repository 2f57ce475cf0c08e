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


def feedback_shape(info: base.UnitInfo) -> tuple[int, ...]:
  """The shape of a unit's feedback, `[n_out, *features of its input]`."""
  n_out, features, _ = _layout(info)
  return (n_out, *features)


def _layout(info):
  """n_out, the feature shape, and how positions are handled.

  'whole': one projection of the whole error to the whole input; 'broadcast':
  the whole error to every position; 'each': position by position.
  """
  shape = jax.eval_shape(
      lambda x: examples.first(x, _place(info)),
      info.inputs[read_input(info)]).shape
  error = info.net_output.shape[1:]
  feature_axes = info.feature_axes if info.positionwise else 1
  positions = shape[1:len(shape) - feature_axes]
  features = shape[len(shape) - feature_axes:]
  if positions and positions == error[:-1]:
    return error[-1], features, 'each'
  if positions and info.positionwise:
    return math.prod(error), features, 'broadcast'
  return math.prod(error), shape[1:], 'whole'


def project(
    info: base.UnitInfo, error: base.Array, weights: base.Tree, x: base.Array
) -> base.Array:
  """The message to a unit's input `x` that its projection makes of an error.

  Args:
    info: the unit.
    error: in the shape of the model's output.
    weights: B of the unit, of shape `feedback_shape(info)` (or sparse).
    x: the unit's input; only its shape and dtype matter.

  Returns:
    An array in the shape of `x`.
  """
  _, features, mode = _layout(info)
  if mode == 'each':
    message = _times(error, weights)
  else:
    message = _times(error.reshape(error.shape[0], -1), weights)
  if mode == 'broadcast':
    whole = jax.eval_shape(lambda x: examples.first(x, _place(info)), x).shape
    positions = whole[1:len(whole) - len(features)]
    message = message.reshape(
        message.shape[0], *(1,) * len(positions), *features)
    message = message / math.sqrt(math.prod(positions))
    message = jnp.broadcast_to(message, whole)
  return examples.back(message.astype(x.dtype), x.shape, _place(info))


def messages(
    unit: base.BoundUnit, error: base.Array, weights: base.Tree
) -> tuple[base.Array | None, ...]:
  """The messages of a unit that projects an error: to one input, if to any."""
  read = read_input(unit.info)
  return tuple(
      project(unit.info, error, weights, x)
      if i == read and sends(unit.info) else None
      for i, x in enumerate(unit.inputs))


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
