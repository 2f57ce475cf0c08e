"""Units found in the trace of a function of parameters and data.

The trace of a model is read once: every product, convolution or lookup in which
one operand is made of parameters alone (a view) and the other of data is a
unit's affine operation. `analyse` makes a plan of the trace, in which those
operations are steps of their own; `run.execute` runs it. What is listed as exact
is read off the same plan, so that no weight keeps its exact derivative unsaid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from bpjax import base
import jax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import gensym
from jax.extend.core import Jaxpr
from jax.extend.core import JaxprEqn
from jax.extend.core import Literal
from jax.extend.core import Var
import jax.numpy as jnp

PRODUCTS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')
CALLS = ('jit', 'pjit', 'closed_call', 'core_call')
REMATS = ('remat2', 'remat', 'checkpoint')
# What may lie between a product and the addition of its bias.
_RESHAPES = (
    'reshape', 'transpose', 'convert_element_type', 'broadcast_in_dim', 'squeeze',
    'expand_dims', 'copy', 'sharding_constraint')


@dataclasses.dataclass(frozen=True)
class View:
  """A value that is computed from parameters, and from no data.

  Attributes:
    leaves: the paths of those parameters.
    loops: (id, length) of the scans that hand out a slice a turn, outermost
      first; the id is that of the equation.
    turns: the transpositions that it went through.
  """
  leaves: tuple[str, ...]
  loops: tuple[tuple[int, int], ...] = ()
  turns: tuple[tuple[int, ...], ...] = ()


MARK = 'bpjax-mark:'  # Of names that the network gave to modules' values.
# What is marked: outputs that are units; where a block is read and what it puts
# out; modules that are units as a whole.
BOUNDARY, ENTER, LEAVE, LAYER = 'boundary:', 'enter:', 'leave:', 'layer:'
HEAD = 'layer:in:'  # What goes into the last of those.
CONST = 'const'  # Neither parameters nor data.
DATA = 'data'
Kind = View | str


@dataclasses.dataclass(eq=False)
class Step:
  """One equation of a plan, or those that a visitor answers for together.

  Attributes:
    how: 'bind', 'remat', 'scan', 'cond'; or one that is visited: 'unit'
      (an affine operation with its biases), 'contact' (parameters that meet data
      in any other way, such as the gain and shift of a norm) or 'mark'.
    eqn: the equation; of several the first.
    inner: the plans of its bodies.
    views: whether the outputs are views.
    eqns: all equations of a unit or contact.
    weights: of a unit, the variable of the weights.
    params: variable -> view, of all parameters that a unit or contact reads.
    inputs: the other variables that it reads: the data first.
    out: the variable of the output of what is visited.
    name: of the unit, contact or mark; `index` counts its calls. Set when all
      are known.
    has_head: whether the equations begin before the affine operation.
    pre: of a unit with a segment, the output of its affine operation.
    tail: the equations of the segment, from `pre` to `out`.
    tail_inputs: those of `inputs` that the segment alone reads.
    untrained: variable -> view, of those that are parameters.
    reads_stacked: whether what a scan has stacked is read, with no unit between.
    joint: of a unit that shares its segment with others, the name of the unit
      without parameters that owns it.
    members: of that one, the names of those whose outputs it reads.
  """
  how: str
  eqn: JaxprEqn
  inner: tuple[Plan, ...] = ()
  views: bool = False
  eqns: list[JaxprEqn] = dataclasses.field(default_factory=list)
  weights: Var | None = None
  params: dict[Var, View] = dataclasses.field(default_factory=dict)
  inputs: tuple[Var, ...] = ()
  out: Var | None = None
  name: str = ''
  index: int = 0
  has_head: bool = False
  pre: Var | None = None
  tail: list[JaxprEqn] = dataclasses.field(default_factory=list)
  tail_inputs: tuple[Var, ...] = ()
  untrained: dict[Var, View] = dataclasses.field(default_factory=dict)
  reads_stacked: bool = False
  joint: str = ''
  members: tuple[str, ...] = ()

  @property
  def view(self) -> View:
    """What the weights of a unit are made of."""
    return self.params[self.weights]

  def stacked(self, around: Sequence[Step]) -> jax.ShapeDtypeStruct:
    """The shape of the output, with the turns of the loops around in front."""
    aval = self.out.aval
    lengths = [s.eqn.params['length'] for s in around if s.how == 'scan']
    place = explicit(aval)
    if place is not None:
      place = place.update(spec=(*(None for _ in lengths), *place.spec))
    return jax.ShapeDtypeStruct(
        (*lengths, *aval.shape), aval.dtype, sharding=place)

  @property
  def operation(self) -> str:
    """The primitive that makes this a unit, for people."""
    name = self.eqn.primitive.name
    return 'lookup' if name == 'gather' else name


@dataclasses.dataclass(eq=False)
class Plan:
  """How a jaxpr is run so that units can answer for themselves.

  Attributes:
    jaxpr: the jaxpr, with its constants.
    kinds: what each variable is made of.
    steps: in the order of the equations.
    outs: the kinds of the outputs.
    calls: (name, index) of all that is visited, in inner plans, too.
    loops: unit -> the ids of the scans that hand it slices of its weights.
  """
  jaxpr: Flat
  kinds: dict[Var, Kind]
  steps: list[Step]
  outs: list[Kind]
  calls: set[tuple[str, int]] = dataclasses.field(default_factory=set)
  loops: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

  def kind(self, atom: Var | Literal) -> Kind:
    return CONST if isinstance(atom, Literal) else self.kinds[atom]

  def walk(self) -> Iterator[tuple[Step, tuple[Step, ...]]]:
    """Every step with the steps around it, in the order of the trace."""
    for step in self.steps:
      yield step, ()
      for inner in step.inner:
        for sub, around in inner.walk():
          yield sub, (step, *around)


@dataclasses.dataclass(eq=False)
class Flat:
  """A jaxpr whose calls are written out.

  Attributes:
    eqns: its equations, and those of the calls in it that hold an affine
      operation, in place of the calls.
    invars: its inputs.
    outvars: its outputs.
    consts: variable -> constant, of it and of the calls.
  """
  eqns: list[JaxprEqn]
  invars: Sequence[Var]
  outvars: Sequence[Var | Literal]
  consts: dict[Var, Any]


class Flattener:
  """Writes out the calls of jaxprs; one answer for each."""

  def __init__(self):
    self._known: dict[int, tuple[Any, Flat]] = {}
    self._new = gensym()
    self._holds: dict[int, bool] = {}

  def __call__(self, closed: Any) -> Flat:
    closed = _closed(closed)
    key = id(closed.jaxpr)
    if key not in self._known:
      jaxpr = closed.jaxpr
      flat = Flat([], jaxpr.invars, jaxpr.outvars,
                  dict(zip(jaxpr.constvars, closed.consts)))
      names = {v: v for v in (*jaxpr.invars, *jaxpr.constvars)}
      self._write_out(jaxpr, names, flat, same=True)
      flat.outvars = [
          v if isinstance(v, Literal) else names[v] for v in jaxpr.outvars]
      self._known[key] = (closed, flat)
    return self._known[key][1]

  def _write_out(self, jaxpr, names, flat, same):
    of = lambda v: v if isinstance(v, Literal) else names[v]
    for eqn in jaxpr.eqns:
      given = [of(v) for v in eqn.invars]
      if eqn.primitive.name in CALLS and self.holds_affine(
          eqn.params['jaxpr'].jaxpr):
        inner = eqn.params['jaxpr']
        own = dict(zip(inner.jaxpr.invars, given))
        for v, const in zip(inner.jaxpr.constvars, inner.consts):
          own[v] = self._new(v.aval)
          flat.consts[own[v]] = const
        self._write_out(inner.jaxpr, own, flat, same=False)
        names.update(zip(eqn.outvars, [
            v if isinstance(v, Literal) else own[v]
            for v in inner.jaxpr.outvars]))
        continue
      outs = eqn.outvars if same else [self._new(v.aval) for v in eqn.outvars]
      names.update(zip(eqn.outvars, outs))
      flat.eqns.append(eqn.replace(invars=given, outvars=list(outs)))

  def holds_affine(self, jaxpr: Jaxpr) -> bool:
    """Whether there is a product, a lookup or a mark in a jaxpr."""
    if id(jaxpr) not in self._holds:
      self._holds[id(jaxpr)] = any(
          eqn.primitive.name in (*PRODUCTS, 'gather') or _mark_name(eqn)
          or any(map(self.holds_affine, subjaxprs(eqn))) for eqn in jaxpr.eqns)
    return self._holds[id(jaxpr)]


def _mark_name(eqn):
  """The name of a mark, or None for another equation."""
  name = eqn.params.get('name') if eqn.primitive.name == 'name' else None
  return name.removeprefix(MARK) if name and name.startswith(MARK) else None


class Analysis:
  """Makes plans of jaxprs.

  Attributes:
    grown: the variables that grow with the batch, in all jaxprs.
    flat: writes out calls.
    sizes: parameter -> the number of its entries.
  """

  def __init__(self, grown: Any, flat: Flattener, sizes: Mapping[str, int]):
    self.grown, self.flat, self.sizes = grown, flat, sizes

  def plan(self, closed: Any, given: Sequence[Kind]) -> Plan:
    """The plan of a jaxpr whose inputs are of the kinds `given`."""
    jaxpr = self.flat(closed)
    kinds = dict.fromkeys(jaxpr.consts, CONST)
    kinds.update(zip(jaxpr.invars, given))
    kind = lambda atom: CONST if isinstance(atom, Literal) else kinds[atom]
    steps = []
    for eqn in jaxpr.eqns:
      step, outs = self._step(eqn, [kind(v) for v in eqn.invars])
      kinds.update(zip(eqn.outvars, outs))
      steps.append(step)
    plan = Plan(jaxpr, kinds, steps, [kind(v) for v in jaxpr.outvars])
    plan.steps = _grouped(plan)
    return plan

  def _step(self, eqn, given):
    """The step of an equation, and the kinds of its outputs."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    if _mark_name(eqn) is not None:
      out, = eqn.outvars
      kind = DATA if isinstance(given[0], View) else given[0]
      label, _, place = _mark_name(eqn).partition(':')
      if label == base.ACTIVE:  # It cuts nothing.
        return Step('bind', eqn, name=place), [kind]
      return Step(
          'mark', eqn, inputs=tuple(eqn.invars), out=out,
          name=_mark_name(eqn)), [kind]
    if not any(isinstance(kind, View) for kind in given):
      kind = DATA if DATA in given else CONST
      return Step('bind', eqn), [kind] * count
    weights = self._weights(eqn, given)
    if weights is not None:
      return _visited('unit', eqn, weights, given), [DATA]
    if name in REMATS:
      inner = self.plan(eqn.params['jaxpr'], given)
      return Step('remat', eqn, (inner,)), inner.outs
    if name == 'scan':
      return self._scan(eqn, given)
    if name == 'cond':
      return self._cond(eqn, given)
    if name == 'optimization_barrier':
      return Step('bind', eqn, views=True), list(given)
    if any(_is_data(v, k) for v, k in zip(eqn.invars, given)):
      if name == 'while':
        raise ValueError(
            'a `while_loop` in the model takes parameters and data together, and '
            'has no reverse derivative; use `jax.lax.scan`, or `fori_loop` with '
            'a fixed number of steps.')
      return _contact(eqn, given), [DATA] * count
    joined = _joined(given)
    if name == 'transpose':
      turn = tuple(eqn.params['permutation'])
      joined = dataclasses.replace(joined, turns=(*joined.turns, turn))
    return Step('bind', eqn, views=True), [joined] * count

  def _weights(self, eqn, given):
    """Which operand of an affine operation is the weights; None for another."""
    if eqn.primitive.name == 'gather':
      table, indices = eqn.invars[:2]
      row = sum(n > 1 for n in eqn.params['slice_sizes']) <= 1
      is_table = row and isinstance(given[0], View)
      by_data = given[1] == DATA or is_table and self._grows(indices)
      is_table = is_table and by_data and not self._grows(table, given[0])
      return 0 if is_table else None
    if eqn.primitive.name not in PRODUCTS:
      return None
    views = [isinstance(kind, View) for kind in given[:2]]
    for i in (1, 0):
      other = eqn.invars[1 - i]
      if views[i] and (given[1 - i] == DATA or (
          self._grows(other, given[1 - i])
          and not self._grows(eqn.invars[i], given[i]))):
        return i
    return None

  def _grows(self, atom, kind=CONST):
    """Whether a value grows with the batch. One parameter alone does not."""
    if isinstance(atom, Literal):
      return False
    if isinstance(kind, View) and len(kind.leaves) == 1 and (
        self.sizes[kind.leaves[0]] == atom.aval.size * math.prod(
            length for _, length in kind.loops)):
      return False
    return atom in self.grown

  def _scan(self, eqn, given):
    """A loop. What is carried is a view as long as it comes back as one."""
    p = eqn.params
    first, count = p['num_consts'], p['num_carry']
    given = list(given)
    for i in range(first + count, len(given)):
      if isinstance(given[i], View):
        given[i] = dataclasses.replace(
            given[i], loops=(*given[i].loops, (id(eqn), p['length'])))
    while True:
      inner = self.plan(p['jaxpr'], given)
      carries = [
          DATA if isinstance(a, View) and not isinstance(b, View) or DATA in (a, b)
          else _joined([a, b]) for a, b in zip(given[first:], inner.outs[:count])]
      if carries == given[first:first + count]:
        break
      given[first:first + count] = carries
    stacked = [
        DATA if isinstance(kind, View) else kind for kind in inner.outs[count:]]
    return Step('scan', eqn, (inner,)), [*inner.outs[:count], *stacked]

  def _cond(self, eqn, given):
    branches = tuple(
        self.plan(b, given[1:]) for b in eqn.params['branches'])
    if all(k != DATA for b in branches for k in b.outs) and not any(
        _is_data(v, k) for v, k in zip(eqn.invars, given)):
      return Step('bind', eqn, views=True), [_joined(given)] * len(eqn.outvars)
    return Step('cond', eqn, branches), [DATA] * len(eqn.outvars)


def _is_data(atom, kind):
  """Whether an operand is data through which derivatives go."""
  return kind == DATA and jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _joined(given):
  """The kind of what is made of these without data (but for its integers)."""
  views = [kind for kind in given if isinstance(kind, View)]
  if not views:
    return DATA if DATA in given else CONST
  return View(
      tuple(sorted({leaf for v in views for leaf in v.leaves})),
      max((v.loops for v in views), key=len),
      max((v.turns for v in views), key=len))


def _visited(how, eqn, weights, given):
  """A step that a visitor answers for, of one equation so far."""
  params = {v: k for v, k in zip(eqn.invars, given) if isinstance(k, View)}
  if weights is not None:  # Another view beside it is data: an embedding, say.
    weights = eqn.invars[weights]
    params = {weights: params[weights]}
  inputs = [v for v in eqn.invars
            if not isinstance(v, Literal) and v not in params]
  return Step(how, eqn, eqns=[eqn], weights=weights, params=params,
              inputs=tuple(inputs), out=eqn.outvars[0])


def _contact(eqn, given):
  """A step in which parameters meet data without being weights."""
  out, *more = eqn.outvars
  if more or not jnp.issubdtype(out.aval.dtype, jnp.inexact):
    return Step('bind', eqn)
  return _visited('contact', eqn, None, given)


def _grouped(plan):
  """The steps, with the biases among the equations of their unit.

  A contact that multiplies (a norm's gain) takes in the product that reads it
  alone, and the shift that is added to that.
  """
  readers = {}
  for step in plan.steps:
    for atom in step.eqn.invars:
      if not isinstance(atom, Literal):
        readers.setdefault(atom, []).append(step)
  outs = {v for v in plan.jaxpr.outvars if not isinstance(v, Literal)}
  last, absorbed = {}, set()
  for step in plan.steps:
    if step.how not in ('unit', 'contact') or id(step) in absorbed:
      continue
    last[id(step)] = step
    if step.operation == 'lookup' or step.how == 'contact' and (
        step.operation != 'mul'):
      continue
    waiting, value = [], step.out
    while value not in outs and len(readers.get(value, ())) == 1:
      reader, = readers[value]
      role = _role(step, reader, value)
      if role is None:
        break
      waiting.append(reader)
      value = reader.eqn.outvars[0]
      if role == 'take':
        _take_in(step, waiting, plan)
        absorbed.update(map(id, waiting))
        last[id(step)], waiting = reader, []
  makers = {v: step for step in plan.steps for v in step.eqn.outvars}
  for step in plan.steps:
    if step.how == 'unit':
      _pull_in_reshapes(step, makers, plan)
  ends = {id(end): step for step in plan.steps
          for end in [last.get(id(step))] if end is not None}
  return [
      ends.get(id(step), step) for step in plan.steps
      if id(step) in ends or id(step) not in absorbed and step.how not in (
          'unit', 'contact')]


def _pull_in_reshapes(step, makers, plan):
  """Has a unit read its biases as they are, not as they are broadcast."""
  for v in [v for v in step.params if v is not step.weights]:
    chain, value = [], v
    while value in makers and makers[value].how == 'bind':
      eqn = makers[value].eqn
      read = [a for a in eqn.invars if not isinstance(a, Literal)]
      if eqn.primitive.name not in _RESHAPES or len(read) != 1 or not isinstance(
          plan.kinds[read[0]], View):
        break
      chain.insert(0, eqn)
      value, = read
    if chain:
      step.eqns = [*chain, *step.eqns]
      del step.params[v]
      step.params[value] = plan.kinds[value]


def _role(step, reader, value):
  """What a unit or contact does with the only reader of its output so far.

  'take': it is the end of the group until now; 'wait': it may belong to it;
  None: it does not.
  """
  name = reader.eqn.primitive.name
  others = [v for v in reader.eqn.invars if v is not value]
  if reader.how == 'contact':
    adds = name in ('add', 'add_any', 'sub') and len(others) == 1
    return 'take' if adds else None
  if reader.how != 'bind':
    return None
  if name in _RESHAPES:
    return 'wait'
  if name in ('mul', 'div', 'neg') and all(
      isinstance(v, Literal) for v in others):
    return 'wait'
  return 'take' if step.how == 'contact' and name == 'mul' else None


def _take_in(step, others, plan):
  """Makes other steps' equations part of a step."""
  for other in others:
    step.eqns.append(other.eqn)
  made = {v for eqn in step.eqns for v in eqn.outvars}
  read = dict.fromkeys(
      v for eqn in step.eqns for v in eqn.invars
      if not isinstance(v, Literal) and v not in made)
  weights = {step.weights} if step.weights is not None else set()
  step.params = {
      v: plan.kinds[v] for v in read if v in weights or (
          isinstance(plan.kinds[v], View) and v not in step.inputs)}
  step.inputs = tuple(v for v in read if v not in step.params)
  step.out = step.eqns[-1].outvars[0]


def explicit(aval: Any) -> Any | None:
  """Where a value lies on a mesh with explicit axes; None on another."""
  own = aval.sharding
  return own if jax.sharding.AxisType.Explicit in own.mesh.axis_types else None


def _closed(jaxpr: Any) -> ClosedJaxpr:
  return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def grown(
    a: ClosedJaxpr, b: ClosedJaxpr, flat: Flattener) -> set[Var] | None:
  """The variables of `a` that grow with the batch.

  Args:
    a: the trace of a function.
    b: its trace with twice the batch.
    flat: writes out calls.

  Returns:
    The variables of `a`, in inner jaxprs too, whose shape is another one in
    `b`; None where the two are not the same program.
  """
  found = set()
  return found if _compare(a, b, flat, found) else None


def _compare(a, b, flat, found):
  a, b = flat(a), flat(b)
  if len(a.eqns) != len(b.eqns):
    return False
  pairs = [*zip(a.invars, b.invars), *zip(a.consts, b.consts)]
  for eqn, other in zip(a.eqns, b.eqns):
    if eqn.primitive is not other.primitive:
      return False
    pairs += zip(eqn.outvars, other.outvars)
    inner, inner_other = list(subjaxprs(eqn)), list(subjaxprs(other))
    if len(inner) != len(inner_other) or not all(
        _compare(p, q, flat, found) for p, q in zip(inner, inner_other)):
      return False
  found.update(u for u, v in pairs if u.aval.shape != v.aval.shape)
  return True


def subjaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
  """The jaxprs among an equation's parameters."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, 'jaxpr', item)
      if hasattr(item, 'eqns'):
        yield item


def operations(jaxpr: Jaxpr) -> Iterator[str]:
  """The names of all primitives, in inner jaxprs, too."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in subjaxprs(eqn):
      yield from operations(inner)
