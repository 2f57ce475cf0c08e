"""From losses to sums over examples, and to what an optimiser sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpjax import paths
import jax
import jax.numpy as jnp

Reduction = str | Mapping[str, str]


def check(reduction: Reduction) -> None:
  """Raises a ValueError for anything but 'mean', 'sum' or a mapping to them."""
  values = (reduction.values() if isinstance(reduction, Mapping)
            else [reduction])
  for value in values:
    if value not in ('mean', 'sum'):
      raise ValueError(
          "`reduction` must be 'mean', 'sum' or a mapping from path patterns "
          f'to them, got {value!r}.')


def with_whole(updates: Any, tree: Any) -> Any:
  """Updates with zeros of their own for whole numbers, which have no gradient."""
  return jax.tree.map(
      lambda g, x: jnp.zeros_like(x) if g.dtype == jax.dtypes.float0 else g,
      updates, tree)


def check_losses(losses: Any, output: Any, axes: Sequence[int] = ()) -> None:
  """Raises a ValueError unless there is a loss for every example.

  Args:
    losses: what a loss returned.
    output: that of the model.
    axes: on which axis of each output its examples lie; default: the first.
  """
  batches = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(output)} - {()}
  batches |= {
      jnp.shape(leaf)[axis:axis + 1]
      for leaf, axis in zip(jax.tree.leaves(output), axes)} - {()}
  if losses.ndim == 0 or losses.shape[:1] not in batches:
    sizes = ' or '.join(str(b) for b, in sorted(batches))
    raise ValueError(
        '`loss` must return one loss an example, [batch, ...], with batch = '
        f'{sizes or "none"}, got shape {losses.shape}; leave out the mean.')


def errors_together(
    errors: Any, batch: int, axes: Sequence[int] = ()) -> Any | None:
  """The errors of all outputs, for a rule that projects one error.

  Args:
    errors: in the structure of the model's output, or shapes like it.
    batch: the number of examples.
    axes: on which axis of each its examples lie (those of an ensemble on the
      second, say); default: the first.

  Returns:
    The error of a model with one output, examples first; else the entries of every
    output that has a row an example, side by side, `[batch, ...]`; None if
    none has.
  """
  leaves = jax.tree.leaves(errors)
  leaves = [jnp.moveaxis(e, axis, 0) if axis else e for e, axis in zip(
      leaves, axes or (0,) * len(leaves), strict=True)]
  if len(leaves) == 1:
    return leaves[0]
  rows = [e for e in leaves if e.ndim and e.shape[0] == batch
          and jnp.issubdtype(e.dtype, jnp.inexact)]
  if not rows:
    return None
  return jnp.concatenate([e.reshape(batch, -1) for e in rows], axis=1)


def apply(reduction: Reduction, updates: Any, count: int) -> Any:
  """Divides summed updates by the number of losses, where asked to.

  Args:
    reduction: 'mean', 'sum', or pattern -> one of them.
    updates: a tuple of trees, each nested as the parameters are.
    count: the number of losses (the batch size, times the tokens of per-token
      losses).

  Returns:
    The updates.
  """
  return tuple(
      paths.map_with_name(
          lambda name, u: u / divisor(reduction, name, count)
          if jnp.issubdtype(u.dtype, jnp.inexact) else u, tree)
      for tree in updates)


def divisor(reduction: Reduction, name: str, count: int) -> int:
  """What the update of `name` is divided by: the number of losses, or 1.

  Example:
    >>> divisor({'Dense_0': 'sum'}, 'Dense_0/kernel', 128)
    1
  """
  if isinstance(reduction, str):
    reduction = {'*': reduction}
  kind = next(
      (k for p, k in reduction.items() if paths.matches(p, name)), 'mean')
  return count if kind == 'mean' else 1
