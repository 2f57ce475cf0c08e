"""The settling engine: a network that relaxes to a minimum of an energy.

Each unit has a state. The model itself is run once with what the states pass on
in place of its units' outputs, and each unit adds the rule's energy of its state
and of what its affine operation makes of the states below. Autodiff gives the
forces on states and on parameters alike, so that whatever lies between units (a
reshape, pooling, a norm over features) is part of the energy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax.engines import base as engine
from bpjax.engines import checks
from bpjax.engines import credit
from bpjax.engines import reduction as reduction_lib
from bpjax.networks import examples
from bpjax.networks import segments
from bpjax.networks import unit as unit_lib
import jax
import jax.numpy as jnp

_STATE, _ENERGY, _DRIVE = 'call', 'energy', 'drive'

# (unit, its state) -> the unit's energy, entry by entry, and what its state
# passes on. `unit.pre` is what its affine operation makes of the states
# below, `unit.activation` what follows that operation.
Energy = Callable[
    [base.BoundUnit, base.Array], tuple[base.Array, base.Array]]
# unit -> its state to begin with; `unit.out` is what the model's own pass makes
# of what the states below pass on.
Start = Callable[[base.BoundUnit], base.Array]


@dataclasses.dataclass(frozen=True)
class Rule(engine.Base):
  """A learning rule of the settling engine.

  Attributes:
    name: the rule's name.
    energy: `(unit, state) -> (energy, out)`, see `Energy`.
    start: `unit -> state`, see `Start`.
    project: `(info, state) -> state`, where states may be: after every step.
    free_steps: steps of the free phase; 0 where `start` is its fixed point.
    nudged_steps: steps of a nudged phase.
    step_size: of the dynamics.
    beta: strength of the nudge.
    nudge: 'random' (a sign for every batch), 'positive' or 'symmetric'.
  """
  name: str
  energy: Energy
  start: Start
  project: Callable[[base.UnitInfo, base.Array], base.Array]
  free_steps: int
  nudged_steps: int
  step_size: float
  beta: float
  nudge: str
  _no_bind = 'lets the network settle'
  segment = segments.SHAPE

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    checks.check_any_unit(survey, self.name)
    checks.check_real(survey.units.infos, self.name)
    for module in survey.batch_coupled:
      raise ValueError(
          f'`{module}` normalises over the batch, which would couple the states '
          f'of its examples under rule `{self.name}`; use LayerNorm or '
          'GroupNorm.')
    for unit in survey.blocked:
      raise ValueError(
          f'no force can reach unit `{unit}` under `{self.name}`: an activation '
          'between it and the output has a derivative that is zero everywhere '
          '(sign, round, a comparison); leave it out, since states are kept in '
          '[0, 1] already.')

  def particles(
      self, net: base.Network, variables: Mapping[str, Any], x: Any
  ) -> base.Tree:
    """States to begin with: nested as `params` is, then by call.

    Args:
      net: the network.
      variables: its variables.
      x: an input (only its shape matters).

    Returns:
      `{unit: {'call_0': [batch, ...]}}`, the collection `variables['particles']`
      of a rule that goes on from where the last free phase ended.
    """
    net = self.seen_by(net, variables, x)
    self.check(net.survey(variables, x))
    return _System(self, net, variables, x, None).start()

  def predict(self, net: base.Network) -> Callable[..., Any]:
    """`(variables, x) -> output` at the end of a free phase from `particles`."""

    def predict(variables, x):
      seen = self.seen_by(net, variables, x)
      self.check(seen.survey(variables, x))
      system = _System(self, seen, variables, x, None, train=False)
      states = system.settle(variables['params'], system.start(),
                             self.free_steps)
      return system.energy(variables['params'], states)[1][0]

    return predict

  def value_and_grad(
      self, net: base.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """As `bpjax.engines.credit.Rule.value_and_grad`.

    `variables` may hold 'particles', from which the free phase goes on, and
    `aux.model_state` holds those at its end, one row an example.
    """
    arguments.network(net)
    arguments.loss(loss)
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      arguments.step(variables, x, key)
      arguments.no_feedback(self.name, feedback)
      jax.eval_shape(
          lambda output: loss(output, y), net.survey(variables, x).output)
      value, aux, grads, count, _ = self.differentiate(
          net, loss, variables, x, y, key)
      grads, = reduction_lib.apply(reduction, (grads,), count)
      aux = aux._replace(feedback=feedback)
      return (value, aux), (grads, jax.tree.map(jnp.zeros_like, feedback))

    return learn

  def signals(self, net, loss, variables, feedback, x, y, key):
    """As `bpjax.engines.credit.Rule.signals`: how far the nudge moved each state."""
    del feedback
    _, _, grads, count, signals = self.differentiate(
        net, loss, variables, x, y, key)
    return jax.tree.map(lambda g: g / count, grads), signals

  def differentiate(self, net, loss, variables, x, y, key):
    """The engine: a free phase, one or two nudged ones, and their contrast.

    Returns:
      value, aux, the summed updates, the number of losses, and the change of
      the states by the nudge (a collection), in place of teaching signals.
    """
    net = self.seen_by(net, variables, x)
    self.check(net.survey(variables, x))
    key, own_key = credit.split(key)
    if self.nudge == 'random' and own_key is None:
      raise ValueError(
          f'`key` is needed: rule `{self.name}` draws the sign of its nudge; '
          "pass `key=jax.random.key(...)`, or choose another `nudge`.")
    system = _System(self, net, variables, x, key)
    params = variables['params']
    begin = variables.get(base.PARTICLES) if self.free_steps else None
    free = system.settle(
        params, system.start() if begin is None else begin, self.free_steps)
    _, (output, state) = system.energy(params, free)
    losses = loss(output, y)
    reduction_lib.check_losses(
        losses, output, net.survey(variables, x).axes)
    beta = self.beta
    if self.nudge == 'random':
      beta = beta * jax.random.rademacher(own_key, (), losses.dtype)

    def cost(beta):
      return lambda output: beta * jnp.sum(loss(output, y))

    def nudged(beta):
      return system.settle(params, free, self.nudged_steps, cost(beta))

    def pull(beta, states):
      """How the whole energy pulls the parameters."""

      def total(params):
        energy, (output, _) = system.energy(params, states)
        return energy + cost(beta)(output)

      return reduction_lib.with_whole(
          jax.grad(total, allow_int=True)(params), params)

    after, before, least = nudged(beta), free, 0.
    if self.nudge == 'symmetric':
      before, least = nudged(-beta), -beta
    span = beta - least
    grads = jax.tree.map(
        lambda a, b: (a - b) / span, pull(beta, after), pull(least, before))
    moved = jax.tree.map(lambda a, b: (b - a) / span, after, before)
    kept = {base.PARTICLES: free} if self.free_steps else {}
    aux = base.Aux(output, {**state, **kept})
    return jnp.mean(losses), aux, grads, losses.size, moved


class _System:
  """The energy of a network with given inputs, and its dynamics."""

  def __init__(self, rule, net, variables, x, key, train=True):
    self._rule, self._net, self._x, self._key = rule, net, x, key
    self._train, self._mask = train, net.real(x)
    self._params = variables['params']
    self._survey = net.survey(variables, x)
    self._infos = self._survey.units.infos
    self._state = {
        c: v for c, v in variables.items() if c not in ('params', base.PARTICLES)}

  def start(self):
    """The states to begin with, in the structure that the model's scans need."""

    def visit(call):
      if self._infos[call.name].kind == base.BOUNDARY:
        return call.original()
      unit = self._bound(call, *call.unit(call.params, call.inputs))
      state = self._rule.start(unit)
      call.write(base.PARTICLES, state, _STATE)
      return self._rule.energy(unit, state)[1]

    return self._run(self._params, {}, visit)[1][base.PARTICLES]

  def energy(self, params, states):
    """The energy of all examples together; and the output and the state."""

    def visit(call):
      info = self._infos[call.name]
      if info.kind == base.BOUNDARY:
        return call.original()
      drive = call.read(base.PARTICLES, _DRIVE)
      if drive is None:
        drive = call.unit.affine(call.params, call.inputs)
      state = call.read(base.PARTICLES, _STATE)
      terms, out = self._rule.energy(self._bound(call, drive), state)
      call.write(base.PARTICLES, jnp.sum(
          examples.only_real(terms, self._mask, info.examples)), _ENERGY)
      return out

    output, collections = self._run(params, states, visit)
    terms = collections.pop(base.PARTICLES)
    named = jax.tree_util.tree_leaves_with_path(terms)
    total = sum(
        jnp.sum(term) for path, term in named
        if str(path[-1].key).startswith(_ENERGY))
    return total, (output, {c: collections[c] for c in self._state})

  def _bound(self, call, pre, out=None):
    call.unit.info = self._infos[call.name]
    return unit_lib.Bound(
        call.unit, call.params, base.Activations(call.inputs, pre, out))

  def settle(self, params, states, steps, cost=None):
    """`steps` steps down the energy, and the cost of the output if any."""

    drives = self._drives(params, states)

    def total(states):
      energy, (output, _) = self.energy(params, _merged(states, drives))
      return energy if cost is None else energy + cost(output)

    def step(states, _):
      force = jax.grad(total)(states)
      return jax.tree_util.tree_map_with_path(self._move, states, force), None

    return jax.lax.scan(step, states, length=steps)[0]

  def _drives(self, params, states):
    """What the units that read the data alone make of it: it never changes."""

    def visit(call):
      info = self._infos[call.name]
      if info.kind == base.BOUNDARY:
        return call.original()
      if not info.sends:
        drive = call.unit.affine(call.params, call.inputs)
        call.write(base.PARTICLES, drive, _DRIVE)
      return jnp.zeros(info.out.shape, info.out.dtype)

    kept = self._run(params, states, visit)[1][base.PARTICLES]
    return _only(kept, _DRIVE)

  def _move(self, path, state, force):
    info = self._infos['/'.join(str(k.key) for k in path[:-1])]
    return self._rule.project(info, state - self._rule.step_size * force)

  def _run(self, params, states, visit):
    return self._net.run(
        {'params': params, base.PARTICLES: states, **self._state}, self._x, visit,
        self._key, [*self._state, base.PARTICLES], train=self._train)


def _only(tree, kind):
  """The entries of a collection whose names begin with `kind`."""
  kept = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      value = _only(value, kind)
      if value:
        kept[name] = value
    elif name.startswith(kind):
      kept[name] = value
  return kept


def _merged(a, b):
  """Two collections in one."""
  both = dict(a)
  for name, value in b.items():
    both[name] = _merged(a[name], value) if isinstance(value, Mapping) else value
  return both
