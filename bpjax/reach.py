"""Which entries of a function's outputs an entry of its inputs can change.

Followed axis by axis through the function's trace, before any data. A noise of
one example, patch or group that cannot change the loss of another need not be
multiplied by how that loss changed: fewer terms, and the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax.extend.core import Var

# An axis is cut into digits, (size, source), from the most significant on.
# `source` is (axis, stride) where entry i of the digit depends on those entries
# of the input alone whose index is i at that digit, or None where on any.
Axis = tuple[tuple[int, tuple[int, int] | None], ...]
Axes = tuple[Axis, ...]

_ELEMENTWISE = {
    'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan',
    'atan2', 'atanh', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'copy',
    'copy_p', 'cos', 'cosh', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc',
    'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite',
    'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'name',
    'ne', 'neg', 'nextafter', 'not', 'optimization_barrier', 'or', 'pow',
    'real', 'reduce_precision', 'rem', 'round', 'rsqrt', 'select_n',
    'sharding_constraint', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'sub', 'tan',
    'tanh', 'xor'}
_ALONG = {'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'}


def reach(
    function: Callable[..., Any], inputs: Any, *others: Any
) -> list[list[Axes | None]]:
  """Follows each input leaf to each output leaf, axis by axis.

  Args:
    function: `(inputs, *others) -> outputs`; traced, never computed. Behind
      `jax.lax.stop_gradient` nothing is followed.
    inputs: the tree whose leaves are followed.
    *others: what else the function takes.

  Returns:
    For each leaf of the outputs, for each leaf of the inputs: None where it
    does not depend on it, else the output's axes in digits. An operation that
    is not known gives digits without a source: never too few dependences.

  Example:
    >>> import jax.numpy as jnp
    >>> f = lambda x: jnp.tanh(x).reshape(5, 2, 3).mean(-1)
    >>> reach(f, jnp.ones((5, 6)))
    [[(((5, (0, 1)),), ((2, (1, 3)),))]]
  """
  jaxpr = jax.make_jaxpr(function)(inputs, *others).jaxpr
  leaves = jax.tree.leaves(inputs)
  given = [
      {i: tuple(_axis((n, (axis, 1))) for axis, n in enumerate(leaf.shape))}
      for i, leaf in enumerate(leaves)]
  given += [{}] * (len(jaxpr.invars) - len(leaves))
  return [[deps.get(i) for i in range(len(leaves))]
          for deps in _follow(jaxpr, given)]


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
  """An axis as several, the sizes of which have its own as their product."""
  return list(_regroup(list(axis), sizes))


def _follow(jaxpr, given):
  """Input leaf -> axes, for each output of a jaxpr; from those of its inputs."""
  known = dict(zip(jaxpr.invars, given))
  of = lambda v: known.get(v, {}) if isinstance(v, Var) else {}
  for eqn in jaxpr.eqns:
    before = [of(v) for v in eqn.invars]
    if any(before):
      known.update(zip(eqn.outvars, _apply(eqn, before)))
  return [of(v) for v in jaxpr.outvars]


def _apply(eqn, before):
  """What one operation makes of its inputs' dependences."""
  name, params = eqn.primitive.name, eqn.params
  outs = [v.aval.shape for v in eqn.outvars]
  if name == 'stop_gradient':
    return [{} for _ in outs]
  if name == 'scan':
    return _scan(eqn, before)
  inner = [getattr(p, 'jaxpr', p) for p in params.values()]
  inner = [p for p in inner if hasattr(p, 'eqns')]
  if len(inner) == 1 and len(inner[0].invars) == len(before) and name not in (
      'while', 'cond'):
    return _follow(inner[0], before)
  if name == 'split':
    kept = lambda a: tuple(
        x for i, x in enumerate(a) if i != params['axis'])
    return [_each(before[0], lambda a: _insert(
        kept(a), params['axis'], shape)) for shape in outs]
  if len(outs) == 1:
    moves = [(b, _move(eqn, i, outs[0])) for i, b in enumerate(before) if b]
    if all(move is not None for _, move in moves):
      return [_join([_each(b, move) for b, move in moves])]
  return [_join([_each(b, lambda a: _any(shape)) for b in before])  # pylint: disable=cell-var-from-loop
          for shape in outs]


def _move(eqn, i, shape):
  """How the axes of operand i become those of the output; None: not known."""
  name, params = eqn.primitive.name, eqn.params
  own = eqn.invars[i].aval.shape
  if name in _ELEMENTWISE:
    if len(own) != len(shape):  # A scalar.
      return lambda a: _any(shape)
    return lambda a: _without(
        a, shape, [j for j, n in enumerate(shape) if n != own[j]])
  if name == 'transpose':
    return lambda a: tuple(a[j] for j in params['permutation'])
  if name == 'broadcast_in_dim':
    places = {d: j for j, d in enumerate(params['broadcast_dimensions'])}
    return lambda a: tuple(
        a[places[d]] if d in places and own[places[d]] == n else _none(n)
        for d, n in enumerate(shape))
  if name == 'reshape' and params.get('dimensions') is None:
    return lambda a: tuple(_regroup([d for axis in a for d in axis], shape))
  if name == 'squeeze' or name.startswith('reduce_') and 'axes' in params:
    gone = params.get('axes', params.get('dimensions'))
    return lambda a: tuple(x for j, x in enumerate(a) if j not in gone)
  if name in ('argmax', 'argmin'):
    return lambda a: tuple(
        x for j, x in enumerate(a) if j not in params['axes'])
  if name in _ALONG:
    return lambda a: _without(a, shape, [params['axis']])
  if name == 'rev':
    return lambda a: _without(a, shape, params['dimensions'])
  if name == 'concatenate':
    return lambda a: _without(a, shape, [params['dimension']])
  if name == 'pad':
    return None if i else lambda a: _without(a, shape, [
        j for j, config in enumerate(params['padding_config']) if any(config)])
  if name in ('slice', 'dynamic_slice') and len(own) == len(shape):
    return lambda a: _without(
        a, shape, [j for j, n in enumerate(shape) if n != own[j]])
  if name.startswith('reduce_window') and 'window_dimensions' in params:
    return lambda a: _without(a, shape, [
        j for j, n in enumerate(params['window_dimensions']) if n > 1
        or params['window_strides'][j] > 1])
  if name == 'dot_general':
    return _dot(params['dimension_numbers'], i, len(own), shape)
  if name == 'conv_general_dilated' and params['batch_group_count'] == 1:
    return _conv(eqn, i, shape)
  return None


def _dot(numbers, i, ndim, shape):
  contracted, batch = (dims[i] for dims in numbers)
  free = [j for j in range(ndim) if j not in (*contracted, *batch)]
  first = len(batch) if i == 0 else len(shape) - len(free)

  def move(axes):
    result = list(_any(shape))
    for place, j in enumerate(batch):
      result[place] = axes[j]
    for place, j in enumerate(free):
      result[first + place] = axes[j]
    return tuple(result)

  return move


def _conv(eqn, i, shape):
  numbers, params = eqn.params['dimension_numbers'], eqn.params
  groups, out = params['feature_group_count'], numbers.out_spec

  def kernel(axes):
    result = list(_any(shape))
    result[out[1]] = axes[numbers.rhs_spec[0]]
    return tuple(result)

  def image(axes):
    result = list(_any(shape))
    result[out[0]] = axes[numbers.lhs_spec[0]]
    features = axes[numbers.lhs_spec[1]]
    inside = math.prod(n for n, _ in features) // groups
    group, _ = _regroup(list(features), (groups, inside))
    result[out[1]] = group + _none(shape[out[1]] // groups)
    for place, size, stride, pad in zip(
        range(2, len(shape)), _kernel_sizes(eqn), params['window_strides'],
        params['padding']):
      if (size, stride, *pad) == (1, 1, 0, 0):
        result[out[place]] = axes[numbers.lhs_spec[place]]
    return tuple(result)

  return kernel if i else image


def _kernel_sizes(eqn):
  shape = eqn.invars[1].aval.shape
  return [shape[j] for j in eqn.params['dimension_numbers'].rhs_spec[2:]]


def _scan(eqn, before):
  """A loop: its carry, until another turn adds no dependence."""
  p = eqn.params
  body = p['jaxpr'].jaxpr
  carried = slice(p['num_consts'], p['num_consts'] + p['num_carry'])
  consts, carry = before[:carried.start], before[carried]
  items = [_each(b, lambda a: a[1:]) for b in before[carried.stop:]]
  while True:
    after = _follow(body, [*consts, *carry, *items])
    joined = [_join(pair) for pair in zip(carry, after)]
    if joined == carry:
      break
    carry = joined
  length = p['length']
  return carry + [
      _each(deps, lambda a: (_none(length), *a))
      for deps in after[p['num_carry']:]]


def _each(deps, move):
  return {leaf: move(axes) for leaf, axes in deps.items()}


def _join(parts):
  """The dependences of what depends on all of these, of one shape."""
  result = {}
  for deps in parts:
    for leaf, axes in deps.items():
      if leaf in result:
        axes = tuple(map(_meet, result[leaf], axes))
      result[leaf] = axes
  return result


def _meet(a, b):
  """An axis that keeps the sources that both have."""
  size = math.prod(n for n, _ in a)
  a, b, result = list(a), list(b), []
  while a and b:
    (n, p), (m, q) = a.pop(0), b.pop(0)
    small = math.gcd(n, m)
    if small not in (n, m):
      return _none(size)
    for rest, n_own, source in ((a, n, p), (b, m, q)):
      if n_own != small:  # The least significant part waits for the next turn.
        rest.insert(0, (n_own // small, source))
    wide = max(n, m) // small
    p = _major(p, wide if n != small else 1)
    q = _major(q, wide if m != small else 1)
    result.append((small, p if p == q else None))
  return _axis(*result)


def _major(source, stride):
  return source and (source[0], source[1] * stride)


def _regroup(digits, shape):
  """Digits of all axes in a row, cut into axes of these sizes."""
  digits = list(digits)
  axes = []
  for n in shape:
    own, size = [], 1
    while size < n:
      m, source = digits.pop(0)
      need = n // size
      if n % size or (m % need and need % m):
        return _any(shape)
      if m > need:
        digits.insert(0, (m // need, source))
        source, m = _major(source, m // need), need
      own.append((m, source))
      size *= m
    axes.append(_axis(*own))
  return tuple(axes)


def _axis(*digits):
  """An axis in as few digits as possible."""
  result = []
  for n, source in digits:
    if n == 1:
      continue
    if result:
      m, before = result[-1]
      if source is None and before is None or (
          source and before == (source[0], source[1] * n)):
        result[-1] = (m * n, source)
        continue
    result.append((n, source))
  return tuple(result)


def _none(n):
  return _axis((n, None))


def _any(shape):
  return tuple(map(_none, shape))


def _without(axes, shape, gone):
  return tuple(
      _none(shape[j]) if j in gone else x for j, x in enumerate(axes))


def _insert(axes, place, shape):
  return (*axes[:place], _none(shape[place]), *axes[place:])
