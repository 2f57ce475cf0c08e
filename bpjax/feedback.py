"""Feedback weights that stand in for forward weights: how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

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


class Drawer(NamedTuple):
  """How the feedback of a unit is drawn.

  Attributes:
    draw: `(key, info, params) -> feedback`, a rule's `init_unit`.
    info: the unit.
    params: shapes and dtypes of its parameters, of one slice.
    lengths: of the loops that hand out a slice a turn: each slice gets feedback of
      its own.
  """
  draw: Callable[[base.Key, base.UnitInfo, base.Tree], base.Tree]
  info: base.UnitInfo
  params: base.Tree
  lengths: tuple[int, ...] = ()

  def slices(self, key: base.Key) -> base.Tree:
    """What is drawn for every slice."""
    one = lambda key: self.draw(key, self.info, self.params)
    for _ in self.lengths:
      one = jax.vmap(one)
    return one(jax.random.split(key, self.lengths) if self.lengths else key)

  def draws_as(self, other: Drawer, read: Mapping[str, Any]) -> bool:
    """Whether it does what another does that has read these fields of its info."""
    return (
        self.draw is other.draw and self.lengths == other.lengths
        and self.params == other.params
        and all(getattr(self.info, name) == v for name, v in read.items()))


class _Recorded(base.UnitInfo):
  """Remembers in `read` which fields were read, with their values."""

  def __getattribute__(self, name):
    value = super().__getattribute__(name)
    if name in _FIELDS:
      super().__getattribute__('__dict__').setdefault('read', {})[name] = value
    return value


_FIELDS = {field.name for field in dataclasses.fields(base.UnitInfo)}


def drawn_together(
    key: base.Key, drawers: Mapping[str, Drawer]) -> dict[str, base.Tree]:
  """Draws the feedback of many units; what is drawn alike is traced once.

  A drawer is traced with an info that remembers what was read of it: one that
  would read the same values is the same program. Of the others those with equal
  programs are compiled once.

  Args:
    key: a random key.
    drawers: unit -> how its feedback is drawn.

  Returns:
    Unit -> what it draws.
  """
  if not drawers:
    return {}
  programs, known = {}, []
  for i, (name, drawer) in enumerate(drawers.items()):
    same = next((
        program for other, read, program in known
        if drawer.draws_as(other, read)), None)
    if same is None:
      recorded = object.__new__(_Recorded)
      vars(recorded).update(vars(drawer.info), read={})
      # By its method, hashed by identity: a hash of the tuple reads every field.
      closed, out = jax.make_jaxpr(
          drawer._replace(info=recorded).slices, return_shape=True)(key)
      same = (str(closed.jaxpr), jax.tree.structure(out),
              *([] if not closed.consts else [name]))
      if not closed.consts:
        known.append((drawer, vars(recorded)['read'], same))
    programs.setdefault(same, (drawer, []))[1].append((i, name))

  def draw_all(key):
    # One after the other: XLA compiles a loop's body once.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        jnp.arange(len(drawers)))
    return [jax.lax.map(drawer.slices, keys[jnp.array([i for i, _ in members])])
            for drawer, members in programs.values()]

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
