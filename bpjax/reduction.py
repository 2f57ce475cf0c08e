"""From sums over examples to the updates that an optimiser sees."""

from __future__ import annotations

from collections.abc import Mapping
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


def check_losses(losses: Any, output: Any) -> None:
  """Raises a ValueError unless there is a loss for every example."""
  batch = jax.tree.leaves(output)[0].shape[:1]
  if losses.ndim == 0 or losses.shape[:1] != batch:
    raise ValueError(
        '`loss` must return one loss an example, [batch, ...], with batch = '
        f'{batch[0] if batch else "none"}, got shape {losses.shape}; leave out '
        'the mean.')


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
