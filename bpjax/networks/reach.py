"""Which entries of a function's outputs an entry of its inputs can change.

Followed axis by axis through the trace, from the outputs back, before any data.
A noise of one example, patch or group that cannot change the loss of another
need not be multiplied by how that loss changed: fewer terms, and the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from bpjax.networks import trace as trace_lib
import jax
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

# An axis is cut into digits, (size, source), from the most significant on.
# `source` is (axis, stride) where entry i of the digit depends on those entries
# of the input alone whose index is i at that digit, or None where on any. Axis
# -1 is the turn of the loop around, -2 that of the loop around that one.
Axis = tuple[tuple[int, tuple[int, int] | None], ...]
Axes = tuple[Axis, ...]
# Name of an output -> its axes in digits of one value; outputs that the value
# cannot change are left out.
Reached = dict[str | tuple[str, str], Axes]

_ELEMENTWISE = {
    'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan',
    'atan2', 'atanh', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'copy',
    'copy_p', 'cos', 'cosh', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc',
    'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite',
    'le', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'name',
    'ne', 'neg', 'nextafter', 'not', 'optimization_barrier', 'or', 'pow',
    'real', 'reduce_precision', 'rem', 'round', 'rsqrt', 'select_n',
    'sharding_constraint', 'sign', 'sin', 'sinh', 'sqrt', 'square',
    'stop_gradient', 'sub', 'tan', 'tanh', 'xor'}
_ALONG = {'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'}
_FLAT = {'sign', 'round', 'floor', 'ceil', 'nextafter'}  # Of derivative zero.
# Beside the names of outputs, with the name of a function: the value reaches
# them through one whose derivative is its author's, in reverse alone.
CUSTOM = 'custom_vjp'
_CUSTOM = ('custom_jvp_call', 'custom_vjp_call')
_CALLS = (*trace_lib.CALLS, *trace_lib.REMATS, *_CUSTOM)


def reach(
    function: Callable[..., Any], inputs: Any, *others: Any,
    values: bool = False) -> list[list[Axes | None]]:
  """Follows each input leaf to each output leaf, axis by axis.

  Args:
    function: `(inputs, *others) -> outputs`; traced, never computed. Behind
      `jax.lax.stop_gradient` nothing is followed.
    inputs: the tree whose leaves are followed.
    *others: what else the function takes.
    values: whether to follow what has no derivative, too: signs, integers.

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
  closed = jax.make_jaxpr(function)(inputs, *others)
  outs = [{str(i): identity(v.aval.shape)}
          for i, v in enumerate(closed.jaxpr.outvars)]
  given = _Follower(values).jaxpr(closed.jaxpr, outs)
  given = given[:len(jax.tree.leaves(inputs))]
  return [[reached.get(str(i)) for reached in given] for i in range(len(outs))]


@dataclasses.dataclass
class Found:
  """What `follow` finds in a plan.

  Attributes:
    places: (name, call) of every unit and contact -> what its output reaches;
      in loops with an axis for the turns in front.
    inputs: the same for each input of the plan.
    bare: the parameters that reach outputs in other ways than through those
      places: inside an operation that is not known, say.
    given: (name, call) -> what each input of it reaches through it, in digits of
      a single turn.
  """
  places: dict[tuple[str, int], Reached]
  inputs: list[Reached]
  bare: set[str]
  given: dict[tuple[str, int], list[Reached]]


def follow(
    plan: trace_lib.Plan, outs: Sequence[Reached], cuts: Any = None,
    blocks: Mapping[str, Callable[[tuple[int, ...]], Axes]] | None = None,
    values: bool = False) -> Found:
  """Follows all values of a plan to what is named in its outputs.

  Args:
    plan: of a network.
    outs: for each output what it is called, and which of its axes are of
      interest; `{}` for one that is not.
    cuts: where gradients stop, see `bpjax.local.view`.
    blocks: the blocks whose outputs are of interest: name -> `shape -> axes`.
    values: as in `reach`.

  Returns:
    What was found.
  """
  follower = _Follower(values, cuts, blocks or {})
  inputs = follower.plan(plan, outs)
  return Found(follower.places, inputs, follower.bare, follower.given)


def identity(shape: Sequence[int]) -> Axes:
  """The axes of an array in digits of itself."""
  return tuple(_axis((n, (axis, 1))) for axis, n in enumerate(shape))


def compose(axes: Axes, inner: Axes) -> Axes:
  """An output's axes in digits of x, from those in y and those of y in x."""
  return tuple(
      _axis(*(d for n, source in axis for d in (
          _part(inner[source[0]], source[1], n)
          if source and source[0] >= 0 else ((n, source),))))
      for axis in axes)


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
  """An axis as several, the sizes of which have its own as their product."""
  return list(_regroup(list(axis), sizes))


class _Follower:
  """Goes through jaxprs and plans from their outputs back."""

  def __init__(self, values, cuts=None, blocks=None):
    self._values, self._cuts, self._blocks = values, cuts, blocks
    self.places, self.bare, self.given = {}, set(), {}

  def jaxpr(self, jaxpr, outs, anything=False):
    """What the inputs of a jaxpr reach.

    `anything`: inside a function with a derivative of its author's, what looks
    as if it had none may have one.
    """
    known = {}
    _add(known, jaxpr.outvars, outs)
    self._back(jaxpr.eqns, known, anything)
    return [known.get(v, {}) for v in jaxpr.invars]

  def _back(self, eqns, known, anything=False):
    makers = {v: eqn for eqn in eqns for v in eqn.outvars}
    for eqn in reversed(eqns):
      after = [known.pop(v, {}) for v in eqn.outvars]
      if any(after):
        _add(known, eqn.invars, self._eqn(eqn, after, makers, anything))

  def plan(self, plan, outs, kinds=()):
    """What the inputs of a plan reach; `kinds`: of its outputs outside."""
    known = {}
    kinds = kinds or [trace_lib.DATA] * len(outs)
    self._give(plan, known, plan.jaxpr.outvars, outs, kinds)
    for step in reversed(plan.steps):
      if step.how in ('unit', 'contact'):
        after = known.pop(step.out, {})
        self.places[step.name, step.index] = after
        inside = {step.out: after}
        self._back([*step.eqns, *step.tail], inside)
        self.given[step.name, step.index] = [
            inside.get(v, {}) for v in step.inputs]
        read = [*step.inputs, *step.params]
        _add(known, read, [inside.get(v, {}) for v in read])
        continue
      made = [step.out] if step.out is not None else step.eqn.outvars
      after = [known.pop(v, {}) for v in made]
      if step.how == 'plain':  # Stopped.
        continue
      if step.how == 'mark':
        after = [self._mark(step, after[0])]
      if any(after):
        kinds = [plan.kinds[v] for v in made]
        before = self._step(step, after, kinds)
        self._give(
            plan, known, step.eqn.invars, before, _read_as(step, kinds))
    return [known.get(v, {}) for v in plan.jaxpr.invars]

  def _give(self, plan, known, atoms, before, kinds):
    """Notes what operands reach, and the parameters that become data here."""
    for atom, reached, kind in zip(atoms, before, kinds):
      own = plan.kind(atom)
      if reached and kind == trace_lib.DATA and isinstance(own, trace_lib.View):
        self.bare.update(own.leaves)
    _add(known, atoms, before)

  def _mark(self, step, after):
    kind, _, name = step.name.partition(':')
    kind += ':'
    if self._cuts is None or kind not in (trace_lib.ENTER, trace_lib.LEAVE):
      return after
    if kind == trace_lib.ENTER:
      return {} if self._cuts.enter(name) else after
    after = {} if self._cuts.leave(name) else after
    if name in self._blocks:
      after = after | {name: self._blocks[name](step.out.aval.shape)}
    return after

  def _step(self, step, after, kinds):
    """What the operands of a step reach."""
    if step.how == 'remat':
      return self.plan(step.inner[0], after, kinds)
    if step.how == 'cond':
      branches = [self.plan(inner, after) for inner in step.inner]
      return [self._anything(step.eqn, 0, after),
              *(_join(reached) for reached in zip(*branches))]
    if step.how == 'scan':
      inner, = step.inner
      first, count = (step.eqn.params[f'num_{k}'] for k in ('consts', 'carry'))
      carried = [inner.kind(v) for v in inner.jaxpr.invars[first:first + count]]
      outside, self.places = self.places, {}
      before = self._scan(step.eqn, after, lambda outs: self.plan(
          inner, outs, [*carried, *kinds[count:]]))
      # The noise of all turns is one array.
      self.places = outside | {
          place: _stacked(reached) for place, reached in self.places.items()}
      return before
    return self._eqn(step.eqn, after, {})

  def _eqn(self, eqn, after, makers, anything=False):
    """What the operands of an equation reach."""
    name, params = eqn.primitive.name, eqn.params
    if name == 'stop_gradient' and not anything or (
        name in _FLAT and not (self._values or anything)):
      return [{}] * len(eqn.invars)
    if name == 'scan':
      return self._scan(eqn, after, lambda outs: self.jaxpr(
          params['jaxpr'].jaxpr, outs, anything))
    if name == 'cond':
      branches = [self.jaxpr(b.jaxpr, after, anything)
                  for b in params['branches']]
      return [self._anything(eqn, 0, after),
              *(_join(reached) for reached in zip(*branches))]
    inner = next(trace_lib.subjaxprs(eqn), None)
    if name == 'custom_vjp_call':
      passed = {(CUSTOM, inner.debug_info.func_name): ()}
      after = [reached and reached | passed for reached in after]
    if name in _CALLS and inner is not None and len(inner.invars) == len(
        eqn.invars):
      return self.jaxpr(inner, after, anything or name in _CUSTOM)
    before = []
    for i, atom in enumerate(eqn.invars):
      if isinstance(atom, Literal) or not (
          self._values or anything or _has_derivative(atom)):
        before.append({})
      else:
        before.append(_join([
            {key: compose(axes, _moved(eqn, i, j, makers))
             for key, axes in reached.items()}
            for j, (v, reached) in enumerate(zip(eqn.outvars, after))
            if self._values or anything or _has_derivative(v)]))
    return before

  def _anything(self, eqn, i, after):
    """What operand i reaches if it can change all of the outputs."""
    if not (self._values or _has_derivative(eqn.invars[i])):
      return {}
    return _join([
        {k: compose(axes, _any(v.aval.shape)) for k, axes in reached.items()}
        for v, reached in zip(eqn.outvars, after)])

  def _scan(self, eqn, after, body):
    """A loop: its carry, until another turn adds nothing."""
    consts, carried = eqn.params['num_consts'], eqn.params['num_carry']
    # Turns that hand nothing on do not see one another.
    alone = not carried
    carry = [_inside(reached) for reached in after[:carried]]
    slices = [_sliced(reached, alone) for reached in after[carried:]]
    while True:
      before = body([*carry, *slices])
      joined = [_join(pair) for pair in zip(carry, before[consts:])]
      if joined == carry:
        break
      carry = joined
    return [*map(_outside, before[:consts]), *map(_outside, joined),
            *map(_stacked, before[consts + carried:])]


def _read_as(step, outs):
  """The kinds of what operands become inside of a step."""
  if step.inner:
    kinds = [step.inner[0].kind(v) for v in step.inner[0].jaxpr.invars]
    return [trace_lib.CONST, *kinds] if step.how == 'cond' else kinds
  kind = trace_lib.DATA if trace_lib.DATA in outs else trace_lib.CONST
  return [kind] * len(step.eqn.invars)


def _has_derivative(atom):
  return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _add(known, atoms, before):
  """Joins what values reach to what they are known to reach."""
  for atom, reached in zip(atoms, before):
    if reached and not isinstance(atom, Literal):
      known[atom] = _join([known[atom], reached]) if atom in known else reached


def _shifted(reached, shift):
  """The same with other axes for the sources."""
  def move(digit):
    n, source = digit
    axis = source and shift(source[0])
    return n, None if axis is None else (axis, source[1])
  return {key: tuple(_axis(*map(move, axis)) for axis in axes)
          for key, axes in reached.items()}


def _inside(reached):
  return _shifted(reached, lambda a: a if a >= 0 else a - 1)


def _sliced(reached, alone):
  return _shifted(reached, lambda a: a - 1 if a or alone else None)


def _outside(reached):
  return _shifted(
      reached, lambda a: a if a >= 0 else None if a == -1 else a + 1)


def _stacked(reached):
  return _shifted(reached, lambda a: a + 1)


def _moved(eqn, i, j, makers):
  """The axes of output j of an equation in digits of operand i."""
  name, params = eqn.primitive.name, eqn.params
  own, shape = eqn.invars[i].aval.shape, eqn.outvars[j].aval.shape
  axes = identity(own)
  if name == 'split':
    return _without(axes, shape, [params['axis']])
  if name == 'optimization_barrier':
    return axes if i == j else _any(shape)
  if name == 'sort':
    return _without(axes, shape, [params['dimension']])
  if name == 'top_k':
    return _without(axes, shape, [params.get('axis', len(shape) - 1)])
  if name == 'gather':
    return _gathered(eqn, i, makers)
  move = _move(eqn, i, shape) if len(eqn.outvars) == 1 else None
  return _any(shape) if move is None else move(axes)


def _gathered(eqn, i, makers):
  """Where the axes of an array go that is read at given indices."""
  table, indices = eqn.invars
  shape = eqn.outvars[0].aval.shape
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  result = list(_any(shape))
  batch = [d for d in range(len(shape)) if d not in numbers.offset_dims]
  if i == 1:
    for axis, d in enumerate(batch):
      result[d] = _axis((shape[d], (axis, 1)))
    return tuple(result)
  kept = [a for a in range(len(sizes)) if a not in (
      *numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
  for a, d in zip(kept, numbers.offset_dims):
    if sizes[a] == table.aval.shape[a]:
      result[d] = _axis((sizes[a], (a, 1)))
  pairs = list(zip(
      numbers.operand_batching_dims, numbers.start_indices_batching_dims))
  for column, a in enumerate(numbers.start_index_map):
    pairs += [(a, axis) for axis in range(len(batch)) if _counts(
        indices, column, axis, table.aval.shape[a], makers)]
  for a, axis in pairs:
    result[batch[axis]] = _axis((shape[batch[axis]], (a, 1)))
  return tuple(result)


def _counts(indices, column, axis, size, makers):
  """Whether a column of indices is 0, 1, ... along an axis: `x[arange, y]`."""
  shape = indices.aval.shape
  maker = makers.get(indices)
  if shape[axis] != size or maker is None:
    return False
  if maker.primitive.name == 'concatenate' and (
      maker.params['dimension'] == len(shape) - 1):
    if len(maker.invars) != shape[-1]:
      return False
    indices, column = maker.invars[column], 0
  value = _constant(indices, makers)
  if value is None:
    return False
  wanted = np.arange(size).reshape(
      [-1 if a == axis else 1 for a in range(len(shape) - 1)])
  return np.array_equal(value[..., column], np.broadcast_to(wanted, shape[:-1]))


def _constant(atom, makers):
  """The value of what is made of no input, or None."""
  if isinstance(atom, Literal):
    return np.asarray(atom.val)
  eqn = makers.get(atom)
  if eqn is None or any(trace_lib.subjaxprs(eqn)) or len(eqn.outvars) > 1:
    return None
  given = [_constant(v, makers) for v in eqn.invars]
  if any(value is None for value in given):
    return None
  with jax.ensure_compile_time_eval():
    params = eqn.primitive.get_bind_params(eqn.params)
    return np.asarray(eqn.primitive.bind(*given, **params))


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
  if name == 'reshape':
    order = params.get('dimensions') or range(len(own))  # As vmap writes it.
    return lambda a: tuple(_regroup([d for j in order for d in a[j]], shape))
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


def _join(parts):
  """The dependences of what depends on all of these, of one shape."""
  result = {}
  for deps in parts:
    for leaf, axes in deps.items():
      if leaf in result:
        axes = tuple(map(_meet, result[leaf], axes))
      result[leaf] = axes
  return result


def _part(axis, stride, size):
  """The digits of an axis that are those of its index from a stride on."""
  result, low = [], 1
  for n, source in reversed(axis):
    start, end = max(low, stride), min(low * n, stride * size)
    if start < end:
      if start % low or end % start or (low * n) % end:
        return _none(size)
      result.insert(0, (end // start, _major(source, start // low)))
    low *= n
  return tuple(result)


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
