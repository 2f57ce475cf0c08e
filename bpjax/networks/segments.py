"""Segments: what lies between a unit's affine operation and what is read of it.

Rules that set targets move a unit's pre-activation, and so need the function that
follows it. It is found in the trace: from the affine operation to the values that
other units read, or the model puts out.

Units that are mixed before that (queries, keys and values; two products that are
added) cannot be moved one by one. Where each has a nonlinearity of its own before
they meet in a sum, each ends there. Else they share a segment: it belongs to a unit
without parameters, which reads theirs, is given the target, and sends each its error.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import NamedTuple

from bpjax.networks import flow as flow_lib
from bpjax.networks import names as names_lib
from bpjax.networks import trace as trace_lib
import jax
from jax.extend.core import gensym
from jax.extend.core import Literal
import jax.numpy as jnp

# How far a segment goes: to the mark of its module, or to the last value that
# has the shape of the pre-activation, or its rank, or to the last of all; or to the
# last of its positions where none has that shape and more than shapes changes, as in
# attention on queries, keys and values in one.
MARK, SHAPE, RANK, LAST = 'mark', 'shape', 'rank', 'last'
SHAPE_OR_LAST = 'shape_or_last'
# They pick positions out, as a readout of the first token does: what lies behind
# is no unit's own.
_SELECT = ('slice', 'dynamic_slice', 'gather')
# What adds, or leaves values as they are.
_SUMS = {'add', 'add_any', 'sub', 'neg', 'concatenate', *flow_lib.TRANSPARENT} - {
    'mul', 'div', 'select_n', 'reduce_window_max', 'reduce_max'}
# What is linear in each operand.
_PRODUCTS = ('mul', *trace_lib.PRODUCTS)


class Policy(NamedTuple):
  """How a unit owns what follows it.

  Attributes:
    far: how far its segment goes.
    joint: units of the same label may share a segment; '': with none.
  """
  far: str
  joint: str = ''


def own(
    plan: trace_lib.Plan, policies: Mapping[str, Policy], outputs: int
) -> dict[str, str]:
  """Gives units what follows their affine operation; changes the plan.

  Args:
    plan: a plan whose units have names.
    policies: unit -> how it owns that.
    outputs: how many of the plan's outputs are the model's, and not its state.

  Returns:
    Unit -> why it has no segment of its own, for units that a policy names.
  """
  trouble = {}
  _own(plan, policies, plan.jaxpr.outvars[:outputs], trouble, True)
  counts = {}
  for step, _ in plan.walk():
    if step.members:
      step.index = counts.setdefault(step.name, 0)
      counts[step.name] += 1
  if counts:
    names_lib.place(plan)
  return trouble


def _own(plan, policies, outputs, trouble, outermost=False):
  for step in plan.steps:
    for inner in step.inner:
      _own(inner, policies, inner.jaxpr.outvars, trouble)
  graph = _Graph(plan, outputs)
  done = set()
  for unit in [s for s in plan.steps if s.how == 'unit']:
    policy = policies.get(unit.name)
    if policy is None or unit in done:
      continue
    homes, others = graph.home(unit)
    if policy.far == MARK:
      homes = [s.inputs[0] for s in plan.steps
               if s.how == 'mark' and s.name == trace_lib.LAYER + unit.name]
    elif others is not None:
      group, homes = graph.group(unit)
      # What the model puts out has its exact error, mixed or not.
      if group and policy.joint and not (
          outermost and any(v in outputs for v in homes)) and (
              {policies.get(u.name) for u in group} == {policy}):
        done.update(group)
        if _share(plan, group, policy.far, homes):
          continue
      trouble[unit.name] = others
      continue
    if policy.far == MARK:
      _take_head(plan, unit)
    if homes:
      _extend(plan, unit, policy.far, homes)


def _share(plan, group, far, homes):
  """Gives units that are mixed what follows them; whether that can be."""
  pres = {unit.out: unit for unit in group}
  fronts = {v: frozenset([v]) for v in pres}
  between, meet = [], []
  for step in plan.steps:
    if step.how in ('bind', 'contact') and any(
        v in fronts for v in _inputs(step)):
      between.append(step)
      front = frozenset().union(*(fronts.get(v, ()) for v in _inputs(step)))
      fronts.update(dict.fromkeys(_outputs(step), front))
  between = _needed(between, homes)
  for step in between:
    given = {fronts[v] for v in _inputs(step) if v in fronts}
    if len(given) > 1 and len(fronts[_outputs(step)[0]]) > max(map(len, given)):
      meet.append(step)
  cuts = [v for step in between for v in _outputs(step)]

  def linear(steps):
    return all(
        s.how == 'bind' and (s.eqn.primitive.name in _SUMS or (
            s.eqn.primitive.name in _PRODUCTS
            and sum(v in fronts for v in _inputs(s)) == 1)) for s in steps)

  # Each with a nonlinearity of its own, and then a sum: each ends there.
  ends = {}
  for pre in pres:
    private = [v for v in cuts if fronts[v] == {pre} and not _reaches(
        between, pre, homes, v)]
    if private and not linear(_needed(between, private[-1:])):
      ends[pre] = private[-1]
  if len(ends) == len(pres) and linear(meet):
    for pre, end in ends.items():
      _extend(plan, pres[pre], far, [end])
    return True
  joint = _Joint(group, between)
  total = next((
      v for v in cuts if fronts[v] == pres.keys()
      and linear(_needed(between, [v])) and not any(
          _reaches(between, pre, homes, v) for pre in pres)), None)
  made = joint.summed(total) if total is not None else joint.laid_side_by_side()
  if made is None:
    return False
  steps = plan.steps
  plan.steps = joint.placed(steps)
  plan.kinds.update(dict.fromkeys(joint.new, trace_lib.DATA))
  _extend(plan, joint.step, far, joint.renamed(homes))
  if not joint.step.tail and total is None:  # Nothing that all go through.
    plan.steps = steps
    return True
  for unit in group:
    unit.joint = joint.step.name
  return True


class _Joint:
  """The unit without parameters that owns the segment of several."""

  def __init__(self, group, between):
    self._group, self._between = group, between
    self.new, self.step = [], None
    self._head, self._splits, self._names = [], [], {}

  def _made(self, eqns, steps, out):
    members = tuple(unit.name for unit in self._group)
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = dict.fromkeys(unit.out for unit in self._group)
    inputs |= dict.fromkeys(
        v for eqn in eqns for v in eqn.invars
        if not isinstance(v, Literal) and v not in made)
    self._head = steps
    self.step = trace_lib.Step(
        'unit', eqns[-1], eqns=eqns, inputs=tuple(inputs), out=out,
        name=names_lib.joint_name(members), members=members)
    return self.step

  def summed(self, total):
    """Their sum is what is moved."""
    head = _needed(self._between, [total])
    return self._made([s.eqn for s in head], head, total)

  def laid_side_by_side(self):
    """What is moved has the features of all, for each of the common positions."""
    shapes = [unit.out.aval.shape for unit in self._group]
    common = 0
    while all(len(s) > common + 1 for s in shapes) and len(
        {s[common] for s in shapes}) == 1:
      common += 1
    if not common or len({unit.out.aval.dtype for unit in self._group}) > 1:
      return None
    sizes = [math.prod(s[common:]) for s in shapes]

    def join(*pres):
      return jnp.concatenate(
          [p.reshape(*p.shape[:common], -1) for p in pres], axis=-1)

    def split(joined):
      at = [sum(sizes[:i + 1]) for i in range(len(sizes) - 1)]
      return [part.reshape(s) for part, s in zip(
          jnp.split(joined, at, axis=-1), shapes)]

    given = [unit.out for unit in self._group]
    eqns, (joined,) = self._spliced(join, given)
    parts, outs = self._spliced(split, [joined])
    self._splits = [trace_lib.Step('bind', eqn) for eqn in parts]
    self._names = dict(zip(given, outs))
    return self._made(eqns, [], joined)

  def _spliced(self, function, given):
    """The equations of a function of some variables, and its results."""
    closed = jax.make_jaxpr(function)(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in given))
    new = gensym()
    names = dict(zip(closed.jaxpr.invars, given))
    eqns = []
    for eqn in closed.jaxpr.eqns:
      names.update({v: new(v.aval) for v in eqn.outvars})
      eqns.append(eqn.replace(
          invars=[v if isinstance(v, Literal) else names[v] for v in eqn.invars],
          outvars=[names[v] for v in eqn.outvars]))
      self.new += eqns[-1].outvars
    return eqns, [names[v] for v in closed.jaxpr.outvars]

  def renamed(self, variables):
    return [self._names.get(v, v) for v in variables]

  def placed(self, steps):
    """The steps of the plan with this one among them."""
    inside = set(map(id, self._head))
    rest = [s for s in steps if id(s) not in inside or any(
        v in _inputs(other) for other in steps if id(other) not in inside
        for v in _outputs(s) if v is not self.step.out)]
    needs = set(self.step.inputs)
    last = max((i for i, s in enumerate(rest) if needs & {*_outputs(s)}), default=-1)
    before, after = rest[:last + 1], rest[last + 1:]
    # They read what is split, behind the last of the units.
    moved = [s for s in before if self._names and s in self._between]
    stay = [s for s in before if s not in moved]
    kept = _needed(moved, [v for s in stay for v in _inputs(s)])
    before = [s for s in before if s in stay or s in kept]
    return [*before, self.step, *self._splits, *map(self._renamed_step, moved),
            *(self._renamed_step(s) if s in self._between else s for s in after)]

  def _renamed_step(self, step):
    if not any(v in self._names for v in _inputs(step)):
      return step
    eqns = [eqn.replace(invars=[
        v if isinstance(v, Literal) else self._names.get(v, v)
        for v in eqn.invars]) for eqn in (step.eqns or [step.eqn])]
    return dataclasses.replace(
        step, eqn=eqns[0], eqns=eqns if step.eqns else [],
        inputs=tuple(self.renamed(step.inputs)))


class _Graph:
  """Which units reach which values with no other unit between."""

  def __init__(self, plan, outputs):
    self.fronts = {}
    reads = {v: True for v in outputs if not isinstance(v, Literal)}
    for step in plan.steps:
      given = _inputs(step)
      front = frozenset().union(*(self.fronts.get(v, ()) for v in given))
      if step.how in ('unit', 'mark') or any(p.calls for p in step.inner):
        reads.update(dict.fromkeys(v for v in given if v not in step.params))
        if step.how != 'mark' or not step.name.startswith(trace_lib.LAYER):
          front = frozenset([step] if step.how == 'unit' else ())
      elif step.eqn.primitive.name == 'stop_gradient':
        front = frozenset()
      self.fronts.update(dict.fromkeys(_outputs(step), front))
    self.reads = [v for v in reads if self.fronts.get(v)]
    self.units = [s for s in plan.steps if s.how == 'unit']

  def home(self, unit):
    """The values that are read of a unit; or None and with whom it is mixed."""
    fronts = {self.fronts[v] for v in self.reads if unit in self.fronts[v]}
    least = [f for f in fronts if not any(g < f for g in fronts)]
    if not least:
      return [], None
    names = lambda front: sorted(
        f'`{s.name}`' for s in front if s is not unit)
    if len(least) > 1:
      return [], ('is read together with ' + ' and elsewhere with '.join(
          ', '.join(names(f)) or 'none' for f in least))
    front, = least
    mates = [u for u in front if u is not unit and self._least(u) == front]
    if mates:
      return [], f'is mixed with {", ".join(names(mates))} before it is read'
    return [v for v in self.reads if self.fronts[v] == front], None

  def group(self, unit):
    """The units that have their home in common with this one, and that home."""
    front = self._least(unit)
    if front is None:
      return [], []
    return ([u for u in self.units if u in front and self._least(u) == front],
            [v for v in self.reads if self.fronts[v] == front])

  def _least(self, unit):
    fronts = {self.fronts[v] for v in self.reads if unit in self.fronts[v]}
    least = [f for f in fronts if not any(g < f for g in fronts)]
    return least[0] if len(least) == 1 else None


def _inputs(step):
  if step.how in ('unit', 'contact'):
    return (*step.inputs, *step.params)
  return tuple(v for v in step.eqn.invars if not isinstance(v, Literal))


def _outputs(step):
  return [step.out] if step.out is not None else step.eqn.outvars


def _take_head(plan, unit):
  """Makes what a chosen module does before its affine operation the unit's."""
  given = [s.out for s in plan.steps
           if s.how == 'mark' and s.name == trace_lib.HEAD + unit.name]
  below = set(given)
  head = []
  for step in plan.steps:
    if step.how == 'bind' and any(v in below for v in _inputs(step)):
      head.append(step)
      below.update(_outputs(step))
  head = _needed(head, unit.inputs)
  made = {v for step in head for v in _outputs(step)}
  if not head or any(
      v in made for step in plan.steps if step not in head and step is not unit
      for v in _inputs(step)):
    return
  unit.eqns = [*(step.eqn for step in head), *unit.eqns]
  unit.has_head = True
  own = {v for eqn in unit.eqns for v in eqn.outvars} | unit.params.keys()
  read = [v for eqn in unit.eqns for v in eqn.invars
          if not isinstance(v, Literal) and v not in own]
  # What the module is given comes first; constants that it holds, behind.
  unit.inputs = tuple(dict.fromkeys(sorted(read, key=lambda v: v not in given)))
  plan.steps = [step for step in plan.steps if step not in head]


def _extend(plan, unit, policy, homes):
  """Makes the equations from a unit's output to a cut part of the unit."""
  pre = unit.out
  below, between = {pre}, []
  for step in plan.steps:
    if step.how in ('bind', 'contact') and any(v in below for v in _inputs(step)):
      between.append(step)
      below.update(_outputs(step))
  between = _needed(between, homes)
  cuts = [v for step in between for v in _outputs(step)
          if not _reaches(between, pre, homes, v)]
  made_by = {v: step.eqn.primitive.name for step in between if step.how == 'bind'
             for v in _outputs(step)}
  if policy in (SHAPE, SHAPE_OR_LAST):
    same = [v for v in cuts if v.aval.shape == pre.aval.shape]
    mixes = not {*made_by.values()} <= flow_lib.TRANSPARENT
    placed = [v for v in cuts if v.aval.shape[:-1] == pre.aval.shape[:-1]]
    cuts = same or (placed if mixes and policy == SHAPE_OR_LAST else [])
  elif policy == RANK:
    cuts = [v for v in cuts if v.aval.ndim == pre.aval.ndim
            and v.aval.size and math.prod(v.aval.shape) <= math.prod(
                pre.aval.shape) and made_by.get(v) not in _SELECT]
  cuts = [v for v in cuts if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
  if policy == MARK:
    cuts = [v for v in cuts if v in homes]
  if not cuts:
    return
  out = cuts[-1]
  tail = _needed(between, [out])
  made = {v for step in tail for v in _outputs(step)}
  inside = made - {out} | {pre}
  leaks = any(
      v in inside for step in plan.steps if step not in tail and step is not unit
      for v in _inputs(step)) or any(
          not isinstance(v, Literal) and v in inside for v in plan.jaxpr.outvars)
  unit.pre, unit.out = pre, out
  unit.tail = [
      eqn for step in tail for eqn in (step.eqns or [step.eqn])]
  own_made = {v for eqn in unit.tail for v in eqn.outvars}
  read = dict.fromkeys(
      v for eqn in unit.tail for v in eqn.invars
      if not isinstance(v, Literal) and v not in own_made and v is not pre)
  if policy == MARK:  # Gains of the module are parameters of the unit.
    unit.params |= {v: k for step in tail if step.how == 'contact'
                    for v, k in step.params.items() if v in read}
  unit.tail_inputs = tuple(
      v for v in read if v not in unit.params and v not in unit.inputs)
  unit.inputs = (*unit.inputs, *unit.tail_inputs)
  unit.untrained = {
      v: plan.kinds[v] for v in unit.tail_inputs
      if isinstance(plan.kinds.get(v), trace_lib.View)}
  last = tail[-1]
  steps = []
  for step in plan.steps:
    if step is unit:
      if leaks:
        steps.append(trace_lib.Step(
            'plain', unit.eqn, eqns=list(unit.eqns), inputs=unit.inputs,
            params=unit.params, out=pre))
    elif step is last:
      steps.append(unit)
    elif leaks or step not in tail:
      steps.append(step)
  plan.steps = steps


def _needed(steps, wanted):
  """Those of the steps that the wanted values depend on."""
  need, kept = set(wanted), []
  for step in reversed(steps):
    if any(v in need for v in _outputs(step)):
      kept.insert(0, step)
      need.update(_inputs(step))
  return kept


def _reaches(between, start, ends, without):
  """Whether a value reaches one of others by a way around a third."""
  seen = {start}
  if start in ends:
    return True
  for step in between:
    if any(v in seen for v in _inputs(step)):
      seen.update(v for v in _outputs(step) if v is not without)
  return any(v in seen for v in ends)
