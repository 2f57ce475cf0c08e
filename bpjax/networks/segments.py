"""Segments: what lies between a unit's affine operation and what is read of it.

Rules that set targets move a unit's pre-activation, and so need the function that
follows it. It is found in the trace: from the affine operation to the values that
other units read, or the model puts out.
"""

from __future__ import annotations

from collections.abc import Mapping
import math

from bpjax.networks import flow as flow_lib
from bpjax.networks import trace as trace_lib
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


def own(
    plan: trace_lib.Plan, policies: Mapping[str, str], outputs: int
) -> dict[str, str]:
  """Gives units what follows their affine operation; changes the plan.

  Args:
    plan: a plan whose units have names.
    policies: unit -> how far its segment goes.
    outputs: how many of the plan's outputs are the model's, and not its state.

  Returns:
    Unit -> why it has no segment of its own, for units that a policy names.
  """
  trouble = {}
  _own(plan, policies, plan.jaxpr.outvars[:outputs], trouble)
  return trouble


def _own(plan, policies, outputs, trouble):
  for step in plan.steps:
    for inner in step.inner:
      _own(inner, policies, inner.jaxpr.outvars, trouble)
  graph = _Graph(plan, outputs)
  for unit in [s for s in plan.steps if s.how == 'unit']:
    policy = policies.get(unit.name)
    if policy is None:
      continue
    homes, others = graph.home(unit)
    if policy == MARK:
      homes = [s.inputs[0] for s in plan.steps
               if s.how == 'mark' and s.name == trace_lib.LAYER + unit.name]
    elif others is not None:
      trouble[unit.name] = others
      continue
    if policy == MARK:
      _take_head(plan, unit)
    if homes:
      _extend(plan, unit, policy, homes)


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
