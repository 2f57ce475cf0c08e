"""Feedback weights that stand in for forward weights: how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import math
from typing import Any

from bpjax import base
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
  """As `jax.random.normal`: the same numbers, compiled in a third of the time."""
  return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def fan_in(info: base.UnitInfo, shape: tuple[int, ...]) -> int:
  """How many inputs each output of a kernel of this shape sums over."""
  if info.summed_axes is not None:
    return math.prod(shape[axis] for axis in info.summed_axes)
  if info.positionwise:
    return math.prod(shape[:info.feature_axes])
  return math.prod(shape[:-1])


def drawn_together(
    key: base.Key, drawers: Mapping[str, tuple[Any, base.Tree, tuple[int, ...]]]
) -> dict[str, base.Tree]:
  """Draws the feedback of many units; what is drawn alike is compiled once.

  Args:
    key: a random key.
    drawers: unit -> `draw(key, shapes)`, the shapes, and the lengths of the loops
      that hand out a slice a turn: each slice gets feedback of its own.

  Returns:
    Unit -> what it draws.
  """
  if not drawers:
    return {}
  programs = {}
  for i, (name, (draw, shapes, lengths)) in enumerate(drawers.items()):
    one = functools.partial(_slices, draw, shapes, lengths)
    closed, out = jax.make_jaxpr(one, return_shape=True)(key)
    same = (str(closed.jaxpr), jax.tree.structure(out),
            *([] if not closed.consts else [name]))
    programs.setdefault(same, (one, []))[1].append((i, name))

  def draw_all(key):
    # One after the other: XLA compiles a loop's body once.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        jnp.arange(len(drawers)))
    return [jax.lax.map(one, keys[jnp.array([i for i, _ in members])])
            for one, members in programs.values()]

  drawn = {}
  stacks = jax.jit(draw_all)(key)
  for together, (_, members) in zip(stacks, programs.values()):
    for i, (_, name) in enumerate(members):
      drawn[name] = jax.tree.map(lambda a: _row(a, i), together)  # pylint: disable=cell-var-from-loop
  return drawn


@jax.jit
def _row(stack, i):
  """One of several; compiled once a shape, and not once a row."""
  return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def _slices(draw, shapes, lengths, key):
  """What is drawn for every slice that loops hand out."""
  one = lambda key: draw(key, shapes)
  for _ in lengths:
    one = jax.vmap(one)
  return one(jax.random.split(key, lengths) if lengths else key)


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
