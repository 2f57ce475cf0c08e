"""Which units read what other units put out, and where derivatives are."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
from typing import Any

from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib
from jax.extend.core import Literal
import jax.numpy as jnp

# Shape, pooling, masks and constant factors: a message passes them.
TRANSPARENT = {
    'reshape', 'squeeze', 'expand_dims', 'transpose', 'broadcast_in_dim', 'copy',
    'convert_element_type', 'slice', 'pad', 'mul', 'div', 'select_n',
    'reduce_window_max', 'reduce_window_sum', 'reduce_sum', 'reduce_max', 'name',
    'optimization_barrier', 'sharding_constraint'}


@dataclasses.dataclass
class Flow:
  """What a plan says of its units.

  Attributes:
    reads: (unit, number of an input) -> the unit whose output it is, with
      nothing between but what a message passes; None for anything else.
    readouts: the units whose output reaches the model's, and no other unit.
    used: the units that the model's output depends on.
    behind: (name, call) of the contacts that readouts reach.
    outs: for each output the unit that it is, with nothing between but what a
      message passes; else the readouts that it is made of.
  """
  reads: dict[tuple[str, int], str | None]
  readouts: set[str]
  used: set[str]
  behind: set[tuple[str, int]]
  outs: list[str | frozenset[str]]


def follow(plan: trace_lib.Plan, outputs: int) -> Flow:
  """Follows the units' outputs through a plan, whose first outputs are told."""
  follower = _Follower()
  outs = follower.run(
      plan, [_Origin()] * len(plan.jaxpr.invars))[:outputs]
  at_output = set().union(*(o.front for o in outs)) if outs else set()
  used, pending = set(), [*at_output]
  while pending:
    unit = pending.pop()
    if unit not in used:
      used.add(unit)
      pending += follower.below.get(unit, ())
  readouts = at_output - follower.read
  behind = {call for call, front in follower.contacts.items()
            if front & readouts}
  return Flow(follower.reads, readouts, used, behind, [
      o.unit or o.front & readouts for o in outs])


@dataclasses.dataclass(frozen=True)
class _Origin:
  """Where a value comes from: the one unit that it is, and all it depends on."""
  unit: str | None = None
  front: frozenset[str] = frozenset()


class _Follower:

  def __init__(self):
    self.reads: dict[tuple[str, int], str | None] = {}
    self.read: set[str] = set()
    self.below: dict[str, set[str]] = {}
    self.contacts: dict[tuple[str, int], frozenset[str]] = {}

  def run(self, plan, given):
    """The origins of a plan's outputs."""
    known = dict(zip(plan.jaxpr.invars, given))
    of = lambda v: (
        _Origin() if isinstance(v, Literal) else known.get(v, _Origin()))
    for step in plan.steps:
      if visited(step) is not None:
        known[step.out] = self._visit(step, [of(v) for v in step.inputs])
      elif step.how == 'contact':
        inside = {v: of(v) for v in (*step.params, *step.inputs)}
        for eqn in step.eqns:
          inside[eqn.outvars[0]] = _through(
              eqn, [inside.get(v, _Origin()) if not isinstance(v, Literal)
                    else _Origin() for v in eqn.invars])
        known[step.out] = inside[step.out]
        self.contacts[step.name, step.index] = known[step.out].front
      else:
        before = [of(v) for v in step.eqn.invars]
        known.update(zip(step.eqn.outvars, self._pass(step, before)))
    return [of(v) for v in plan.jaxpr.outvars]

  def _visit(self, step, before):
    name = visited(step)
    for i, origin in enumerate(before):
      known = self.reads.setdefault((name, i), origin.unit)
      if known != origin.unit:  # Another call reads something else.
        self.reads[name, i] = None
      self.below.setdefault(name, set()).update(origin.front)
      if step.how == 'unit':
        self.read |= origin.front
    return _Origin(name, frozenset([name]))

  def _pass(self, step, before):
    if step.how == 'remat':
      return self.run(step.inner[0], before)
    if step.how == 'cond':
      parts = [self.run(inner, before[1:]) for inner in step.inner]
      return [_Origin(None, frozenset().union(*(o.front for o in outs)))
              for outs in zip(*parts)]
    if step.how == 'scan':
      return self._loop(step, before)
    return [_through(step.eqn, before)] * len(step.eqn.outvars)

  def _loop(self, step, before):
    p, plan = step.eqn.params, step.inner[0]
    first, last = p['num_consts'], p['num_consts'] + p['num_carry']
    given = [*before]
    while True:
      outs = self.run(plan, given)
      carry = [
          _Origin(None, a.front | b.front)
          for a, b in zip(given[first:last], outs)]
      if carry == given[first:last]:
        break
      given[first:last] = carry
    return [*carry, *(_Origin(None, o.front) for o in outs[last - first:])]


def _through(eqn, before):
  front = frozenset().union(*(o.front for o in before))
  if eqn.primitive.name == 'stop_gradient':
    return _Origin(None, front)
  known = [o.unit for o in before if o.unit is not None]
  own = eqn.primitive.name in TRANSPARENT and len(known) == 1
  others = frozenset().union(
      *(o.front for o in before if o.unit is None)) if own else front
  return _Origin(known[0] if own and not others else None, front)


def note_stacked(plan: trace_lib.Plan, given: Iterable[Any] = ()) -> set[Any]:
  """Sets `reads_stacked` of the steps of a plan.

  Args:
    plan: the plan.
    given: those of its inputs that scans outside of it have stacked.

  Returns:
    Its variables that are made of what scans have stacked.
  """
  stacked = set(given)
  for step in plan.steps:
    reads = [v for v in (step.inputs or step.eqn.invars)
             if not isinstance(v, Literal) and v in stacked]
    if step.how == 'scan':
      note_stacked(step.inner[0])
      stacked.update(step.eqn.outvars[step.eqn.params['num_carry']:])
    elif visited(step) is not None:
      step.reads_stacked = bool(reads)
    elif step.inner:
      first = len(step.eqn.invars) - len(step.inner[0].jaxpr.invars)
      for inner in step.inner:
        inside = note_stacked(inner, [
            v for outer, v in zip(step.eqn.invars[first:], inner.jaxpr.invars)
            if not isinstance(outer, Literal) and outer in stacked])
        stacked.update(
            outer for outer, v in zip(step.eqn.outvars, inner.jaxpr.outvars)
            if not isinstance(v, Literal) and v in inside)
    elif reads:
      stacked.update([step.out] if step.out is not None else step.eqn.outvars)
  return stacked


# Their derivative is zero everywhere.
_FLAT = {
    'stop_gradient', 'sign', 'round', 'floor', 'ceil', 'is_finite', 'argmax',
    'argmin', 'nextafter', 'iota'}


@dataclasses.dataclass
class Derivatives:
  """Where a trace has derivatives.

  Attributes:
    sends: the units that read what something trainable has a part in.
    taught: the units that a derivative of the output reaches.
    loops: whether it would have to pass a `while_loop`.
    active: the values that something trainable has a part in, each with the
      context of its jaxpr.
    reached: those that a derivative of the output reaches.
  """
  sends: set[str]
  taught: set[str]
  loops: bool
  active: set[Any]
  reached: set[Any]

  def is_active(self, ctx: tuple[int, ...], atom: Any) -> bool:
    return not isinstance(atom, Literal) and (ctx, atom) in self.active

  def is_reached(self, ctx: tuple[int, ...], atom: Any) -> bool:
    return not isinstance(atom, Literal) and (ctx, atom) in self.reached


def derivatives(
    plan: trace_lib.Plan, outputs: int, cuts: Any = None) -> Derivatives:
  """Which units have anything to send, and which ones an error can reach.

  Args:
    plan: the plan.
    outputs: how many of its outputs are the model's, and not its state.
    cuts: where gradients stop, see `bpjax.local.view`, or None.
  """
  graph = _Graph(cuts)
  graph.body(plan, ())
  jaxpr = plan.jaxpr
  params = [((), v) for v in jaxpr.invars
            if isinstance(plan.kinds[v], trace_lib.View)]
  ends = [((), v) for v in jaxpr.outvars[:outputs]
          if not isinstance(v, Literal) and _is_float(v)]
  active = _closure(graph.after, params)
  taught = _closure(graph.before, [*ends, *graph.ends])
  return Derivatives(
      {name for name, given, _ in graph.units if active & set(given)},
      {name for name, _, out in graph.units if out in taught},
      any(active & set(given) and taught & set(outs)
          for given, outs in graph.loops), active, taught)


def context(
    around: tuple[int, ...], eqn: trace_lib.JaxprEqn, i: int
) -> tuple[int, ...]:
  """What tells the variables of an equation's i-th body from others."""
  return (*around, id(eqn), i)


class _Graph:
  """Between which values of a trace a derivative is more than zero.

  A value is named by its variable and the equations around its jaxpr.
  """

  def __init__(self, cuts):
    self._cuts = cuts
    self.after: dict[Any, list[Any]] = {}
    self.before: dict[Any, list[Any]] = {}
    self.units: list[tuple[str, list[Any], Any]] = []
    self.ends: list[Any] = []
    self.loops: list[tuple[list[Any], list[Any]]] = []

  def body(self, body, ctx):
    """Connects what is in a plan, or in a jaxpr."""
    if isinstance(body, trace_lib.Plan):
      for step in body.steps:
        self._step(step, ctx)
      return
    for eqn in body.eqns:
      self._equation(eqn, (), ctx)

  def _link(self, sources, targets):
    for s in sources:
      self.after.setdefault(s, []).extend(targets)
    for t in targets:
      self.before.setdefault(t, []).extend(sources)

  def _pairs(self, sources, targets):
    for (ctx, s), (other, t) in zip(sources, targets):
      if not isinstance(s, Literal) and not isinstance(t, Literal) and _is_float(
          s) and _is_float(t):
        self._link([(ctx, s)], [(other, t)])

  def _step(self, step, ctx):
    nodes = lambda atoms: [(ctx, v) for v in atoms if not isinstance(
        v, Literal) and _is_float(v)]
    if step.how == 'plain':
      return
    if step.how not in ('unit', 'contact', 'mark'):
      self._equation(step.eqn, step.inner, ctx)
      return
    name = visited(step)
    if name is not None:
      given = [v for v in step.inputs if v not in step.untrained]
      self.units.append((name, nodes(given), (ctx, step.out)))
    if step.how == 'mark' and self._cuts is not None:
      kind, _, module = step.name.partition(':')
      if kind == 'leave' and self._cuts.leave(module) is not None:
        self.ends += nodes(step.inputs)
      if kind == 'leave' and self._cuts.leave(module) or (
          kind == 'enter' and self._cuts.enter(module)):
        return
    self._link(nodes((*step.inputs, *step.params)), nodes([step.out]))

  def _equation(self, eqn, inner, ctx):
    name, p = eqn.primitive.name, eqn.params
    at = lambda ctx, atoms: [(ctx, v) for v in atoms]
    given, outs = at(ctx, eqn.invars), at(ctx, eqn.outvars)
    if name in _FLAT:
      return
    if name == 'optimization_barrier':
      self._pairs(given, outs)
    elif name == 'scan':
      body, = inner or [p['jaxpr'].jaxpr]
      own, count = context(ctx, eqn, 0), p['num_carry']
      jaxpr = getattr(body, 'jaxpr', body)
      self.body(body, own)
      self._pairs(given, at(own, jaxpr.invars))
      self._pairs(at(own, jaxpr.outvars), outs)
      self._pairs(
          at(own, jaxpr.outvars[:count]),
          at(own, jaxpr.invars[p['num_consts']:][:count]))
    elif name == 'cond':
      for i, body in enumerate(inner or [b.jaxpr for b in p['branches']]):
        self._inside(body, given[1:], outs, context(ctx, eqn, i))
    elif inner or name in (*trace_lib.CALLS, *trace_lib.REMATS):
      body, = inner or trace_lib.subjaxprs(eqn)
      self._inside(body, given, outs, context(ctx, eqn, 0))
    else:
      floats = lambda nodes: [
          (c, v) for c, v in nodes if not isinstance(v, Literal)
          and _is_float(v)]
      self._link(floats(given), floats(outs))
      if name == 'while':
        self.loops.append((floats(given), floats(outs)))

  def _inside(self, body, given, outs, ctx):
    jaxpr = getattr(body, 'jaxpr', body)
    self.body(body, ctx)
    self._pairs(given, [(ctx, v) for v in jaxpr.invars])
    self._pairs([(ctx, v) for v in jaxpr.outvars], outs)


def visited(step: trace_lib.Step) -> str | None:
  """The name of the unit that a step is a call of, or None."""
  if step.how == 'unit':
    return step.name
  if step.how == 'mark' and step.name.startswith('boundary:'):
    return unit_lib.boundary_name(step.name.removeprefix('boundary:'))
  return None


def _is_float(variable):
  return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def _closure(edges, start):
  """All that can be reached."""
  found, pending = set(start), list(start)
  while pending:
    for node in edges.get(pending.pop(), ()):
      if node not in found:
        found.add(node)
        pending.append(node)
  return found
