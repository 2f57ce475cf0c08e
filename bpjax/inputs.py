"""How a model is called: its inputs, and the flags that say it is training."""

from __future__ import annotations

from collections.abc import Mapping
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp

_FLAGS = {
    'train': True, 'training': True, 'is_training': True,
    'deterministic': False}


@jax.tree_util.register_pytree_node_class
class Inputs:
  """The inputs of a model that takes some of them by keyword.

  A model with one input is given that, one with several a tuple of them;
  anywhere that `x` is asked for. The first axis of the first array is that of
  the examples. A key or a table among them needs no such axis.

  Example:
    >>> import bpjax, jax.numpy as jnp
    >>> x = bpjax.Inputs(jnp.ones((2, 5)), mask=jnp.ones((2, 5), bool))
    >>> x.args[0].shape, x.kwargs['mask'].shape
    ((2, 5), (2, 5))
  """

  def __init__(self, *args: Any, **kwargs: Any):
    if not args and not kwargs:
      raise ValueError(
          '`bpjax.Inputs` needs at least one input, got none; write '
          '`Inputs(x, mask=mask)`.')
    if any(isinstance(a, Inputs) for a in (*args, *kwargs.values())):
      raise ValueError(
          '`bpjax.Inputs` takes arrays, got another `Inputs`; write all inputs '
          'into one.')
    self.args, self.kwargs = args, kwargs

  def tree_flatten(self):
    return (self.args, self.kwargs), None

  @classmethod
  def tree_unflatten(cls, aux, children):
    del aux
    args, kwargs = children
    return cls(*args, **kwargs)

  def __repr__(self):
    parts = [*map(repr, self.args)]
    parts += [f'{name}={value!r}' for name, value in self.kwargs.items()]
    return f'Inputs({", ".join(parts)})'


def call(function: Callable[..., Any], x: Any, **others: Any) -> Any:
  """Calls a model with its inputs, and with arguments that these do not hold."""
  args, kwargs = arguments(x)
  first = list(inspect.signature(function).parameters)[:len(args)]
  others = {n: v for n, v in others.items() if n not in first}
  return function(*args, **{**others, **kwargs})


def arguments(x: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
  """The positional and the keyword arguments that `x` stands for."""
  if isinstance(x, Inputs):
    return x.args, x.kwargs
  if isinstance(x, tuple) and not hasattr(x, '_fields'):
    return x, {}
  return (x,), {}


def mask(x: Any, name: str) -> jax.Array | None:
  """Which positions of each example are real, where the model is told.

  Args:
    x: the model's input.
    name: of the keyword argument that says so.

  Returns:
    bool `[batch, positions]`; None without such an argument, or where it has
    another shape (a mask of pairs of positions, say).

  Example:
    >>> import jax.numpy as jnp
    >>> x = Inputs(jnp.ones((2, 3), int), mask=jnp.array([[1, 1, 0], [1, 1, 1]]))
    >>> mask(x, 'mask').tolist()[0]
    [True, True, False]
  """
  found = x.kwargs.get(name) if isinstance(x, Inputs) else None
  size = next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(x)
               if jnp.ndim(leaf)), None)
  if found is None or jnp.ndim(found) != 2 or found.shape[0] != size:
    return None
  return jnp.asarray(found) != 0


def names(function: Callable[..., Any]) -> frozenset[str]:
  """The names by which a function takes arguments; none if it does not tell."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):  # A function of C, say.
    return frozenset()
  return frozenset(
      n for n, p in parameters.items()
      if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def flags(function: Callable[..., Any]) -> dict[str, bool]:
  """The flags by which a model is told that it is training, and their values.

  Example:
    >>> flags(lambda x, deterministic=True: x)
    {'deterministic': False}
  """
  known = names(function)
  return {name: value for name, value in _FLAGS.items() if name in known}


def opposite(found: Mapping[str, bool]) -> dict[str, bool]:
  """The same flags in evaluation mode."""
  return {name: not value for name, value in found.items()}
