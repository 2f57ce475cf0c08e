"""Losses with a place: which change of which loss a perturbation is answered by.

A loss for each patch and channel group of a block has the value of the block's
loss, and a derivative with respect to its own patch and group alone. So its
change is the block's error times the change of the output, summed there: no
copy of the loss is made.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import math
from typing import Any

from bpjax import base
from bpjax.networks import reach as reach_lib
import jax
import jax.numpy as jnp

OUTPUT = '/'  # In names of losses that are of the output: no block has such one.


class Judge:
  """What counts as a change for the perturbation engine, block by block.

  What is measured is `{'blocks': {block: array}, 'output': the model's}`. A
  subclass has `measure`, `settle` (which sets `errors`, one for each array that
  is measured), `of_output` and, for blocks, `blocks` and `of_block`.
  """

  def __init__(
      self, placement: str = 'block', groups: int = 1, grouped: bool = False):
    self._placement, self._groups = placement, groups
    self._has_groups = grouped
    self.errors = None

  def of_output(self, measured: Any) -> base.Array:
    """The losses of the model's output, [batch, ...]."""
    raise NotImplementedError

  def measure(self, output: Any) -> Any:
    """What is differentiated, from what the network puts out."""
    raise NotImplementedError

  def settle(self, measured: Any) -> tuple[base.Array, Any]:
    """The losses of the output, and the error of what is measured."""
    raise NotImplementedError

  def held(self, net: Any, measured: Any) -> Any:
    """The network that differences are taken of."""
    del measured
    return net

  def blocks(self) -> dict[str, Callable[[tuple[int, ...]], reach_lib.Axes]]:
    """Block -> `shape -> axes`: of its output, those that losses lie on."""
    return {}

  def seeds(self, output: Any, differences: bool) -> list[reach_lib.Reached]:
    """For each array of the model's output, its loss and that loss's axes.

    Args:
      output: shapes and dtypes of the model's output.
      differences: whether changes are differences of losses, in which examples
        may meet; not the errors of an output times its change.

    Returns:
      A list as `reach.follow` takes it.
    """
    if differences:
      axes, = reach_lib.reach(
          lambda output: _rows(self.of_output({'output': output})), output,
          values=True)
      return [{} if a is None else {OUTPUT: a} for a in axes]
    return [
        {f'{OUTPUT}{i}': reach_lib.identity(leaf.shape)[:1]}
        if _is_float(leaf) else {}
        for i, leaf in enumerate(jax.tree.leaves(output))]

  def flat(self, features: base.Array) -> base.Array:
    """A block's output with its groups side by side, [batch, ..., channels]."""
    return features.reshape(flat_shape(features, self._has_groups).shape)

  def locate(self, change: Any) -> dict[str, base.Array]:
    """The change of every loss, from the derivative of what is measured.

    Args:
      change: a tangent of what `measure` returned.

    Returns:
      Loss -> `[batch]` and the axes of its losses.
    """
    result = {
        n: self._product(e, change['blocks'][n])
        for n, e in self.errors['blocks'].items()}
    for i, (e, c) in enumerate(zip(
        jax.tree.leaves(self.errors['output']),
        jax.tree.leaves(change['output']))):
      if _is_float(e):
        result[f'{OUTPUT}{i}'] = _rows(e * c.astype(e.dtype))
    return result

  def afresh(self, measured: Any, change: Any) -> dict[str, base.Array]:
    """As `locate`, with errors that are computed from `measured` once more."""
    own = copy.copy(self)
    own.settle(measured)
    return own.locate(change)

  def _product(self, error, change):
    """Over the entries of a block's output that one loss is about."""
    # Faster on a CPU than the sum of a product, beside an axis of 1.
    product = jnp.vecdot(
        self._apart(error), self._apart(change.astype(error.dtype)),
        precision='highest')
    first = {'block': 1, 'patch': product.ndim - 1, 'group': product.ndim}
    axes = range(first[self._placement], product.ndim)
    return jnp.sum(product, axis=tuple(axes))

  def _apart(self, x):
    """[batch, ..., groups, channels of a group]."""
    if self._has_groups:
      return x
    return x.reshape(*x.shape[:-1], self._groups, -1)

  def kept(self, axes):
    """Of the axes of a block's output, those of its losses."""
    if not self._has_groups:
      size = math.prod(n for n, _ in axes[-1])
      axes = (*axes[:-1], *reach_lib.split(
          axes[-1], (self._groups, size // self._groups)))
    first = {'block': 1, 'patch': len(axes) - 2, 'group': len(axes) - 1}
    return axes[:first[self._placement]]

  def compare(self, here: Any, there: Any) -> dict[str, base.Array]:
    """The losses at another place, each with its own entries moved alone.

    Args:
      here: what `measure` returned; `{'blocks': {block: output}, ...}`.
      there: the same, moved; or `here` itself.

    Returns:
      As `locate`.
    """
    result = {OUTPUT: _rows(self.of_output(there))}
    for name, moved in there['blocks'].items():
      still = here['blocks'][name]
      if self._placement == 'block':
        result[name] = _rows(self.of_block(name, moved))
        continue
      places = jax.eval_shape(self._product, still, still).shape[1:]
      if there is here:  # One loss, in all places.
        losses = _rows(self.of_block(name, still))
        result[name] = jnp.broadcast_to(
            losses.reshape(-1, *(1,) * len(places)), (len(losses), *places))
        continue

      def at(i):
        mask = jnp.arange(math.prod(places)) == i
        mask = mask.reshape(places + (1,) * (
            self._apart(still).ndim - 1 - len(places)))
        mixed = jnp.where(mask, self._apart(moved), self._apart(still))
        return _rows(self.of_block(name, mixed.reshape(still.shape)))  # pylint: disable=cell-var-from-loop

      losses = jax.lax.map(at, jnp.arange(math.prod(places)))
      result[name] = losses.T.reshape(-1, *places)
    return result

  def teach(self, plan: Any, u: Any, v: Any, change: Any) -> tuple[Any, Any]:
    """Each perturbation times the change of the losses that it can reach.

    Args:
      plan: what is perturbed, a `bpjax.engines.perturbation.Plan`.
      u: the perturbation of each output.
      v: that of each perturbed parameter.
      change: as `locate` returns it.

    Returns:
      Two trees like `u` and `v`.
    """
    leaves, structure = jax.tree.flatten((u, v))
    return jax.tree.unflatten(structure, [
        self.taught(plan, leaf, reached, change)
        for leaf, reached in zip(leaves, plan.reached)])

  def taught(
      self, plan: Any, leaf: base.Array, reached: Any, change: Any
  ) -> base.Array:
    """One perturbation times the change of the losses that it can reach."""
    changes = [_times(plan, leaf, change[name], axes)
               for name, axes in reached.items()]
    # One that reaches no loss changes nothing.
    return sum(changes[1:], changes[0]) if changes else jnp.zeros_like(leaf)


def _rows(losses):
  """The losses of each example, [batch]; a scalar as it is."""
  return jnp.sum(losses, axis=tuple(range(1, losses.ndim)))


def _is_float(leaf):
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _times(plan, leaf, change, axes):
  """`leaf` times the change of the losses that each of its entries can reach."""
  digits = [d for axis in axes for d in axis]
  change = _split(change, [[n for n, _ in axis] for axis in axes])
  gone, places = [], []
  for i, (n, source) in enumerate(digits):
    taken = [(a, s) for a, s, m, _ in places if source and a == source[0]
             and s < source[1] * n and source[1] < s * m]
    if source is None or taken or n == 1:
      gone.append(i)
    else:
      places.append((*source, n, i))
  change = jnp.sum(change, axis=tuple(gone))
  # Axis by axis of the leaf, from the most significant digit on.
  order = sorted(range(len(places)), key=lambda j: (
      places[j][0], -places[j][1]))
  change = jnp.transpose(change, order)
  whole, missing = [], []  # The parts of each axis; those without a change.
  for axis, n in enumerate(leaf.shape):
    parts = []
    for a, stride, size, _ in (places[j] for j in order):
      if a == axis:
        parts += [(n // (stride * size), False), (size, True)]
        n = stride
    # What has size 1 is left out: an axis that is not cut stays as it is.
    parts = [(m, own) for m, own in (*parts, (n, False)) if m > 1 or own]
    parts = parts or [(1, False)]
    first = sum(map(len, whole))
    missing += [first + i for i, (_, own) in enumerate(parts) if not own]
    whole.append([m for m, _ in parts])
  product = plan.product(
      _split(leaf, whole), jnp.expand_dims(change, tuple(missing)))
  for axis, n in enumerate(leaf.shape):
    if len(whole[axis]) > 1:
      rest = product.shape[axis + len(whole[axis]):]
      product = product.reshape(*leaf.shape[:axis], n, *rest)
  return product


def _split(x, parts):
  """Each axis as several; one at a time, as explicit sharding asks."""
  for axis, sizes in reversed(list(enumerate(parts))):
    if list(sizes) != [x.shape[axis]]:
      x = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1:])
  return x


def flat_shape(features: Any, grouped: bool) -> jax.ShapeDtypeStruct:
  """Shape of a block's output with its groups side by side."""
  shape = features.shape
  if grouped:
    shape = (*shape[:-2], shape[-2] * shape[-1])
  return jax.ShapeDtypeStruct(shape, features.dtype)


def check(block: str, features: Any, groups: int, grouped: bool) -> None:
  """Raises a ValueError for groups that a block's output does not have."""
  shape = features.shape
  if len(shape) < (3 if grouped else 2):
    raise ValueError(
        f'block `{block}` must put out [batch, ..., '
        f'{"groups, " if grouped else ""}channels], got shape {shape}.')
  if not grouped and shape[-1] % groups:
    raise ValueError(
        f'`groups` must divide the {shape[-1]} channels of block `{block}`, got '
        f'{groups}.')
