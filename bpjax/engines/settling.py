"""The settling engine: a network that relaxes to a minimum of an energy.

Each unit has a state in place of its output, and the energy is written by the
model itself: it is run once with the states for its units' outputs, and each
unit adds the agreement of its state with what its affine operation makes of the
states below. Autodiff gives the forces on states and on parameters alike, so
that whatever lies between units (a reshape, pooling, a norm over features) is
part of the energy.
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
from bpjax.networks import network
import jax
import jax.numpy as jnp

_STATE, _ENERGY, _DRIVE = 'call', 'energy', 'drive'


@dataclasses.dataclass(frozen=True)
class Rule(engine.Base):
  """A learning rule of the settling engine.

  Attributes:
    name: the rule's name.
    free_steps: steps of the free phase.
    nudged_steps: steps of a nudged phase.
    step_size: of the dynamics.
    beta: strength of the nudge.
    nudge: 'random' (a sign for every batch), 'positive' or 'symmetric'.
    readout: what the output unit's state is kept in, 'linear' or 'clip'.
  """
  name: str
  free_steps: int
  nudged_steps: int
  step_size: float
  beta: float
  nudge: str
  readout: str
  _no_bind = 'lets the network settle'

  def seen_by(
      self, net: network.Network, variables: Mapping[str, Any], x: Any
  ) -> network.Network:
    """The network whose units own their nonlinearity."""
    return net.owning(
        dict.fromkeys(net.survey(variables, x).units, 'shape'))

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    checks.check_any_unit(survey, self.name)
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
      self, net: network.Network, variables: Mapping[str, Any], x: Any
  ) -> base.Tree:
    """States to begin with: nested as `params` is, then by call.

    All are 0, but for a unit whose activation has no slope there (relu): 1.

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

  def predict(self, net: network.Network) -> Callable[..., Any]:
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
      self, net: network.Network, loss: base.Loss, *,
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
    begin = variables.get(base.PARTICLES)
    free = system.settle(
        params, system.start() if begin is None else begin, self.free_steps)
    _, (output, state) = system.energy(params, free)
    losses = loss(output, y)
    reduction_lib.check_losses(losses, output)
    beta = self.beta
    if self.nudge == 'random':
      beta = beta * jax.random.rademacher(own_key, (), losses.dtype)

    def nudged(beta):
      cost = lambda output: beta * jnp.sum(loss(output, y))
      return system.settle(params, free, self.nudged_steps, cost)

    after, before, span = nudged(beta), free, beta
    if self.nudge == 'symmetric':
      before, span = nudged(-beta), 2 * beta
    force = jax.grad(lambda p, s: system.energy(p, s)[0])
    grads = jax.tree.map(
        lambda a, b: (a - b) / span, force(params, after), force(params, before))
    moved = jax.tree.map(lambda a, b: (b - a) / span, after, before)
    aux = base.Aux(output, {**state, base.PARTICLES: free})
    return jnp.mean(losses), aux, grads, losses.size, moved


class _System:
  """The energy of a network with given inputs, and its dynamics."""

  def __init__(self, rule, net, variables, x, key, train=True):
    self._rule, self._net, self._x, self._key = rule, net, x, key
    self._train = train
    self._params = variables['params']
    self._survey = net.survey(variables, x)
    self._infos = self._survey.units.infos
    self._state = {
        c: v for c, v in variables.items() if c not in ('params', base.PARTICLES)}

  def start(self):
    """States of 0, in the structure that the model's own scans need.

    Those of a unit whose activation has no slope at 0, such as relu, would stay
    there: they begin at 1.
    """

    def visit(call):
      info = self._infos[call.name]
      if info.kind == base.BOUNDARY:
        return call.original()
      activation = lambda s: call.unit.activation(call.params, s, call.inputs)
      state = jnp.zeros_like(call.unit(call.params, call.inputs)[0])
      if info.owns_activation:
        out, pull = jax.vjp(activation, state)
        # In any direction; a norm's slopes add up to 0.
        slope, = pull(jnp.zeros_like(out) + jax.random.normal(
            jax.random.key(0), out.shape, out.dtype))
        alive = jnp.any(slope != 0) & jnp.all(jnp.isfinite(slope))
        state = jnp.where(alive, state, 1)
      call.write(base.PARTICLES, state, _STATE)
      return activation(state)

    return self._run(self._params, {}, visit)[1][base.PARTICLES]

  def energy(self, params, states):
    """The energy of all examples together; and the output and the state."""

    def visit(call):
      info = self._infos[call.name]
      if info.kind == base.BOUNDARY:
        return call.original()
      s = call.read(base.PARTICLES, _STATE)
      out = s  # A state that is kept within [0, 1] is its own rate.
      if info.owns_activation:
        out = call.unit.activation(call.params, s, call.inputs)
      drive = call.read(base.PARTICLES, _DRIVE)
      if drive is None:
        drive = call.unit.affine(call.params, call.inputs)
      call.write(base.PARTICLES, jnp.sum(.5 * s**2) - jnp.sum(drive * out), _ENERGY)
      return out

    output, collections = self._run(params, states, visit)
    terms = collections.pop(base.PARTICLES)
    named = jax.tree_util.tree_leaves_with_path(terms)
    total = sum(
        jnp.sum(term) for path, term in named
        if str(path[-1].key).startswith(_ENERGY))
    return total, (output, {c: collections[c] for c in self._state})

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
    state = state - self._rule.step_size * force
    info = self._infos['/'.join(str(k.key) for k in path[:-1])]
    bounded = not info.owns_activation and (
        not info.is_output or self._rule.readout == 'clip')
    return jnp.clip(state, 0, 1) if bounded else state

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
