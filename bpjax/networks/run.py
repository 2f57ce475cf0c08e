"""Runs the plan of a trace; a visitor answers for every unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from bpjax import base
from bpjax.networks import trace as trace_lib
import jax
from jax.extend.core import Literal
from jax.extend.core import Var
import jax.numpy as jnp

Place = tuple[str, str, str]  # Collection, unit, name with the call's number.


@dataclasses.dataclass
class Flow:
  """What runs along with the values of a trace, into every body and out again.

  Attributes:
    held: unit -> what it keeps besides twins of its weights (direct feedback).
    given: values for single calls; loops hand out a slice a turn.
    kept: what calls have left; loops stack it.
    tokens: what passes through every call on its way, and into no result: on the
      way back it brings the same to all of them, in loops and branches too.
    key: of the visitor's own draws, or None.
    draws: how many keys were taken from it here.
  """
  held: dict[str, Any]
  given: dict[Place, Any]
  kept: dict[Place, Any] = dataclasses.field(default_factory=dict)
  tokens: dict[str, Any] = dataclasses.field(default_factory=dict)
  key: base.Key | None = None
  draws: int = 0

  def next_key(self) -> base.Key | None:
    if self.key is None:
      return None
    self.draws += 1
    return jax.random.fold_in(self.key, self.draws)


Visit = Callable[..., Any]  # (step, values of its variables, twin, flow) -> out


class Runner:
  """Evaluates plans. `visit` answers for the steps that are units or contacts."""

  def __init__(self, visit: Visit):
    self._visit = visit

  def run(
      self, plan: trace_lib.Plan, values: Sequence[Any],
      twins: Sequence[Any | None], flow: Flow
  ) -> tuple[list[Any], list[Any | None]]:
    """The outputs of a plan, and the twins of those that are views.

    Args:
      plan: the plan.
      values: of its inputs.
      twins: for each input what stands in for it on the way back, or None.
      flow: changed in place.
    """
    jaxpr = plan.jaxpr
    env = _Env(jaxpr.consts.keys(), jaxpr.consts.values())
    env.update(jaxpr.invars, values, twins)
    for step in plan.steps:
      with _scope(step.eqn):
        self._take(plan, step, env, flow)
    outs = jaxpr.outvars
    return env.read(outs), env.twins(outs)

  def _take(self, plan, step, env, flow):
    eqn = step.eqn
    if step.how == 'plain':
      value = evaluate(step.eqns, env, step.out)
      env.update([step.out], [jax.lax.stop_gradient(value)])
      return
    if step.how in ('unit', 'contact', 'mark'):
      env.update([step.out], [self._visit(step, env, flow)])
      return
    run = {
        'bind': self._bind, 'remat': self._remat,
        'scan': self._scan, 'cond': self._cond}[step.how]
    outs, twins = run(step, env.read(eqn.invars), env.twins(eqn.invars), flow)
    env.update(eqn.outvars, outs, twins)

  def _bind(self, step, values, twins, flow):
    outs = bind(step.eqn, values)
    if step.name:
      flow.kept[base.ACTIVE, step.name, f'call_{step.index}'] = outs[0] > 0
    if not step.views or all(twin is None for twin in twins):
      return outs, [None] * len(outs)
    # What has no twin of its own (a gain) stands for itself, and gets nothing.
    stand_ins = [
        jax.lax.stop_gradient(v) if t is None else t
        for v, t in zip(values, twins)]
    return outs, bind(step.eqn, stand_ins)

  def _remat(self, step, values, twins, flow):
    plan, p = step.inner[0], step.eqn.params
    run = jax.checkpoint(
        lambda *args: self._inside(plan, *args), policy=p['policy'],
        prevent_cse=p['prevent_cse'])
    (outs, twins), kept, flow.tokens = run(
        values, twins, flow.held, _own(flow.given, plan), flow.tokens,
        flow.next_key())
    flow.kept.update(kept)
    return outs, twins

  def _inside(self, plan, values, twins, held, given, tokens, key):
    """A plan as a pure function: its results, what calls have left, tokens."""
    flow = Flow(held, given, tokens=dict(tokens), key=key)
    return self.run(plan, values, twins, flow), flow.kept, flow.tokens

  def _cond(self, step, values, twins, flow):
    index, *operands = values
    held = flow.held
    key = flow.next_key()
    args = (operands, twins[1:], held, flow.given, flow.tokens, key)
    runs = [
        lambda *args, plan=plan: self._inside(plan, *args)
        for plan in step.inner]
    shapes = {}
    for run in runs:
      shapes.update(jax.eval_shape(run, *args)[1])

    def whole(run):
      def branch(*args):
        (outs, _), kept, tokens = run(*args)
        return outs, {
            place: kept.get(place, jnp.zeros(s.shape, s.dtype))
            for place, s in shapes.items()}, tokens
      return branch

    outs, kept, flow.tokens = jax.lax.switch(
        index, [whole(run) for run in runs], *args)
    flow.kept.update(kept)
    return list(outs), [None] * len(outs)

  def _scan(self, step, values, twins, flow):
    plan, p = step.inner[0], step.eqn.params
    first, last = p['num_consts'], p['num_consts'] + p['num_carry']
    sliced = {
        unit for unit, loops in plan.loops.items() if id(step.eqn) in loops}
    held = {u: f for u, f in flow.held.items() if u not in sliced}
    held_slices = {u: f for u, f in flow.held.items() if u in sliced}
    given = _own(flow.given, plan)
    key = flow.next_key()
    keys = None if key is None else jax.random.split(key, p['length'])
    # A carry that is data here has no twin, whatever it was outside; one that is
    # a view has one at every turn.
    some = any(twin is not None for twin in twins)
    are_views = [
        some and isinstance(plan.kind(v), trace_lib.View)
        for v in plan.jaxpr.invars[first:last]]

    def twins_of(values, twins):
      return [
          None if not is_view else jax.lax.stop_gradient(v) if t is None else t
          for v, t, is_view in zip(values, twins, are_views)]

    carried = twins_of(values[first:last], twins[first:last])

    def body(carry, turn):
      carry, carry_twins, tokens = carry
      xs, x_twins, held_slices, given, key = turn
      (outs, out_twins), kept, tokens = self._inside(
          plan, [*values[:first], *carry, *xs],
          [*twins[:first], *carry_twins, *x_twins], {**held, **held_slices},
          given, tokens, key)
      carry, ys = outs[:last - first], outs[last - first:]
      return (carry, twins_of(carry, out_twins), tokens), (ys, kept)

    (carry, carried, flow.tokens), (ys, kept) = jax.lax.scan(
        body, (values[first:last], carried, flow.tokens),
        (values[last:], twins[last:], held_slices, given, keys),
        length=p['length'], reverse=p['reverse'], unroll=p['unroll'])
    flow.kept.update(kept)
    return [*carry, *ys], [*carried, *[None] * len(ys)]


def _own(given, plan):
  """What is given to the calls inside a plan."""
  return {
      place: value for place, value in given.items()
      if (place[1], int(place[2].rpartition('_')[2])) in plan.calls}


class _Env:
  """The values of variables, and the twins of those that are views."""

  def __init__(self, variables, values):
    self._values, self._twins = {}, {}
    self.update(variables, values)

  def update(self, variables, values, twins=None):
    self._values.update(zip(variables, values))
    for variable, twin in zip(variables, twins or ()):
      if twin is not None:
        self._twins[variable] = twin

  def read(self, atoms: Sequence[Var | Literal]) -> list[Any]:
    return [v.val if isinstance(v, Literal) else self._values[v] for v in atoms]

  def __getitem__(self, variable: Var) -> Any:
    return self._values[variable]

  def twins(self, atoms: Sequence[Var | Literal]) -> list[Any | None]:
    return [
        None if isinstance(v, Literal) else self._twins.get(v) for v in atoms]


def bind(eqn: trace_lib.JaxprEqn, values: Sequence[Any]) -> list[Any]:
  """Evaluates one equation."""
  primitive = eqn.primitive
  out = primitive.bind(*values, **primitive.get_bind_params(eqn.params))
  return list(out) if primitive.multiple_results else [out]


def evaluate(
    eqns: Sequence[trace_lib.JaxprEqn], env: Mapping[Var, Any], out: Var) -> Any:
  """The value of `out` after some equations, from the values that they read."""
  made = {}
  for eqn in eqns:
    values = [
        v.val if isinstance(v, Literal) else made[v] if v in made else env[v]
        for v in eqn.invars]
    made.update(zip(eqn.outvars, bind(eqn, values)))
  return made[out]


def _scope(eqn):
  """The names that profiles show for an equation."""
  stack = str(eqn.source_info.name_stack)
  return jax.named_scope(stack) if stack else contextlib.nullcontext()
