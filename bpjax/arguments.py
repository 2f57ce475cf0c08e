"""Checks of arguments: one sentence each, before any computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
import numbers
from typing import Any

from bpjax import paths
import jax
import jax.numpy as jnp
import numpy as np


def number(
    name: str, value: Any, *, least: float | None = None,
    above: float | None = None, most: float = math.inf,
    below: float = math.inf) -> None:
  """Raises a ValueError unless `value` is a finite number in a range.

  Args:
    name: of the argument.
    value: a number; a bool is none.
    least, most: the range, both included.
    above, below: the same, excluded.

  Example:
    >>> number('scale', .5, above=0)
  """
  fits = isinstance(value, (numbers.Real, np.generic)) and not isinstance(
      value, (bool, np.bool_)) and isinstance(value.real, numbers.Real)
  if fits and (-math.inf < value < math.inf and value <= most and value < below
               and (least is None or value >= least)
               and (above is None or value > above)):
    return
  if above == 0 and most == below == math.inf:
    text = 'positive'
  elif most < math.inf:
    text = f'in [{least:g}, {most:g}]'
  elif below < math.inf:
    text = f'in [{least:g}, {below:g})'
  elif above is not None:
    text = f'above {above:g}'
  else:
    text = 'a number' if least is None else f'at least {least:g}'
  what = '' if fits else ' and finite'
  raise ValueError(f'`{name}` must be {text}{what}, got {value!r}.')


def whole(name: str, value: Any, least: int = 1) -> None:
  """Raises a ValueError unless `value` is a whole number, such as 3 or 3.0.

  Example:
    >>> whole('samples', 3)
  """
  if isinstance(value, (bool, np.bool_)) or not isinstance(
      value, numbers.Real) or not math.isfinite(value) or (
          value != int(value) or value < least):
    raise ValueError(
        f'`{name}` must be a whole number of at least {least}, got {value!r}.')


def flag(name: str, value: Any) -> None:
  """Raises a ValueError unless `value` is True or False.

  Example:
    >>> flag('shared', True)
  """
  if not isinstance(value, (bool, np.bool_)):
    raise ValueError(f'`{name}` must be True or False, got {value!r}.')


def choice(name: str, value: Any, known: Sequence[Any]) -> None:
  """Raises a ValueError unless `value` is one of `known`.

  Example:
    >>> choice('norm', 'batch', ('batch', 'group'))
  """
  if not any(type(value) is type(k) and value == k for k in known):
    *first, last = map(repr, known)
    choices = f'{", ".join(first)} or {last}' if first else last
    raise ValueError(f'`{name}` must be {choices}, got {value!r}.')


def patterns(name: str, given: Any) -> tuple[str, ...]:
  """`given` as a tuple of globs; raises a ValueError for anything else.

  Example:
    >>> patterns('boundaries', ['block_*'])
    ('block_*',)
  """
  given = (given,) if isinstance(given, str) else given
  if not isinstance(given, (Sequence, set, frozenset, Mapping)) or not all(
      isinstance(p, str) and p for p in given):
    raise ValueError(
        f"`{name}` must be a list of path patterns, such as ['block_*'], got "
        f'{given!r}.')
  return tuple(given)


def key(name: str, value: Any) -> None:
  """Raises a ValueError unless `value` is one random key, new or old style.

  Example:
    >>> key('key', jax.random.key(0))
  """
  dtype, shape = getattr(value, 'dtype', None), getattr(value, 'shape', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    if shape == ():
      return
  elif dtype == jnp.uint32 and len(shape) == 1 and shape[0] in (2, 4):
    return
  got = type(value).__name__ if shape is None else f'{dtype} of shape {shape}'
  raise ValueError(
      f'`{name}` must be one random key, `jax.random.key(0)`, got {got}.')


def variables(value: Any) -> None:
  """Raises a ValueError unless `value` holds parameters.

  Example:
    >>> variables({'params': {}})
  """
  if not isinstance(value, Mapping) or 'params' not in value:
    got = (f'the names {", ".join(map(str, value)) or "none"}'
           if isinstance(value, Mapping) else type(value).__name__)
    raise ValueError(
        "`variables` must be a mapping with 'params', as `net.init` returns, "
        f'got {got}.')


def batch(x: Any) -> None:
  """Raises a ValueError for inputs without an example, or that are no arrays.

  Example:
    >>> batch(jnp.ones((2, 4)))
  """
  leaves = jax.tree.leaves(x)
  for leaf in leaves:
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise ValueError(
          '`x` must be an array, a tuple of arrays or `bpjax.Inputs`, got '
          f'{type(leaf).__name__}; call `jnp.asarray`.')
  if not leaves:
    raise ValueError('`x` must hold an array, got none.')
  if leaves[0].shape[:1] == (0,):
    raise ValueError(
        f'`x` must hold at least one example, got shape {leaves[0].shape}; '
        'leave empty batches out.')


def network(value: Any) -> None:
  """Raises a ValueError unless `value` is a network of units.

  Example:
    >>> import bpjax
    >>> network(bpjax.from_function(lambda params, x: x @ params))
  """
  if not hasattr(value, 'survey'):
    raise ValueError(
        '`net` must be a network of units, such as `bpjax.from_linen(model)`, '
        f'got {type(value).__name__}.')


def loss(value: Any) -> None:
  """Raises a ValueError unless `value` can be called.

  Example:
    >>> loss(lambda output, y: (output - y)**2)
  """
  if not callable(value):
    raise ValueError(
        '`loss` must be a function `(output, y) -> losses`, such as '
        f'`bpjax.losses.softmax_cross_entropy`, got {value!r}.')


def rule(value: Any) -> None:
  """Raises a ValueError unless `value` is a learning rule.

  Example:
    >>> import bpjax
    >>> rule(bpjax.rules.backprop())
  """
  if isinstance(value, type) or not hasattr(value, 'value_and_grad'):
    raise ValueError(
        '`rule` must be a rule, such as `bpjax.rules.backprop()`, got '
        f'{value!r}; call its function.')


def dtype(name: str, value: Any, known: Sequence[str | None]) -> None:
  """Raises a ValueError unless `value` names one of some dtypes, or is None.

  Example:
    >>> dtype('dtype', 'bfloat16', (None, 'bfloat16'))
  """
  if value is not None and not isinstance(value, str):
    try:
      value = jnp.dtype(value).name
    except TypeError:
      pass
  if value not in known:
    known = [k for k in known if k]
    hint = paths.nearest(value, known) if isinstance(value, str) else (
        f'Known: {", ".join(known)}')
    raise ValueError(f'`{name}` must name a dtype, got {value!r}; {hint}.')


def is_unit(value: Any) -> None:
  """Raises a ValueError unless `value` is a function or None.

  Example:
    >>> is_unit(lambda module: False)
  """
  if value is not None and not callable(value):
    raise ValueError(
        f'`is_unit` must be a function from a module to a bool, got {value!r}.')


def step(variables_: Any, x: Any, key_: Any) -> None:
  """Raises a ValueError for what no step can be taken with.

  Example:
    >>> step({'params': {}}, jnp.ones((2, 4)), None)
  """
  variables(variables_)
  batch(x)
  if key_ is not None:
    key('key', key_)


def no_feedback(name: str, feedback: Any) -> None:
  """Raises a ValueError for feedback of a rule that keeps none.

  Example:
    >>> no_feedback('backprop', {})
  """
  names = paths.leaf_names(feedback)
  if names:
    raise ValueError(
        f'`feedback` must be empty under rule `{name}`, which keeps none, got '
        f'{names[0] or type(feedback).__name__!r}; pass what `rule.init` '
        'returned.')


def labels(y: Any, classes: int) -> None:
  """Raises a ValueError for a known label outside `[0, classes)`.

  Labels under `jax.jit` are not known, and pass.

  Example:
    >>> labels(jnp.array([0, 3]), classes=4)
  """
  if isinstance(y, jax.core.Tracer) or not y.size:
    return
  known = np.asarray(y)  # Not an operation of JAX, which would be traced.
  least, most = int(known.min()), int(known.max())
  if least < 0 or most >= classes:
    raise ValueError(
        f'labels `y` must be in [0, {classes}), one for each entry of `output`, '
        f'got {least if least < 0 else most}.')


def targets(y: Any) -> Any:
  """`y` as an array; raises a ValueError for what is none.

  Example:
    >>> targets([0, 1]).shape
    (2,)
  """
  try:
    return y if hasattr(y, 'dtype') else jnp.asarray(y)
  except (TypeError, ValueError) as error:
    raise ValueError(
        f'`y` must be an array of labels or targets, got {type(y).__name__}.'
    ) from error
