"""Feedback weights that stand in for forward weights: how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

from bpjax import base
from bpjax import drawing
import jax
import jax.numpy as jnp


def stands_for(params: base.Tree) -> base.Tree:
  """The parameters that a message depends on: all but the biases.

  Example:
    >>> sorted(stands_for({'kernel': 1., 'bias': 2.}))
    ['kernel']
  """
  kept = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      value = stands_for(value)
    if name != 'bias' and not (isinstance(value, Mapping) and not value):
      kept[name] = value
  return kept


def draw(
    key: base.Key, info: base.UnitInfo, params: base.Tree, scale: float
) -> base.Tree | None:
  """Random weights of the shapes of a unit's own, for a unit that sends.

  Entries are normal with standard deviation `scale / sqrt(fan-in)`, that of
  Flax's default initialiser for the weights that they stand for.

  Args:
    key: the unit's key.
    info: the unit.
    params: the unit's parameters (only shapes and dtypes matter).
    scale: the factor on the standard deviation.

  Returns:
    `{'kernel': ...}` in the shape of the unit's kernel, or None for a unit that
    reads the data alone or integers: nothing below it waits for a message.
  """
  if not info.sends:
    return None
  weights = stands_for(params)
  leaves, structure = jax.tree.flatten(weights)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [
      scale / math.sqrt(fan_in(info, leaf.shape))
      * normal(k, leaf.shape, leaf.dtype)
      for k, leaf in zip(keys, leaves)])


def normal(key: base.Key, shape: tuple[int, ...], dtype: Any) -> base.Array:
  """As `jax.random.normal`; what many units draw so is compiled once for all.

  See `bpjax.drawing.drawn_together`. A flat array compiles in a third of the time.
  """
  return drawing.bpjax_normals(
      key, math.prod(shape), jnp.dtype(dtype).name).reshape(shape)


def fan_in(info: base.UnitInfo, shape: tuple[int, ...]) -> int:
  """How many inputs each output of a kernel of this shape sums over."""
  if info.summed_axes is not None:
    return math.prod(shape[axis] for axis in info.summed_axes)
  if info.positionwise:
    return math.prod(shape[:info.feature_axes])
  return math.prod(shape[:-1])


def cosine(a: base.Tree, b: base.Tree) -> base.Array:
  """The cosine between two trees, each flattened to a vector; NaN for a zero."""
  norms = norm(a) * norm(b)
  return jnp.where(
      norms > 0, _dot(a, b) / jnp.where(norms > 0, norms, 1), jnp.nan)


def norm(tree: base.Tree) -> base.Array:
  """The Euclidean norm of a tree, flattened to a vector."""
  return jnp.sqrt(_dot(tree, tree))


def _dot(a, b):
  return sum(
      jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


class NoFeedback:
  """What a rule without feedback says of it."""

  def trainable(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools for the feedback: empty, as the feedback is."""
    return jax.tree.map(lambda _: False, feedback)

  def mirrored(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools for the feedback: empty, as the feedback is."""
    return jax.tree.map(lambda _: False, feedback)

  def weight_targets(self, units, params, feedback):
    """None: there is no feedback to align with."""
    del units, params, feedback
    return {}
