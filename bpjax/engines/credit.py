"""The credit engine: a rule of one unit, composed over a model by custom_vjp.

Autodiff routes the error through the graph, as the model wrote it; at each unit
the rule answers instead of the unit's own derivative. One forward pass; an
error that a unit reads directly arrives as the cotangent of a zero that the
unit put out (its port).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import inspect
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import paths
from bpjax.engines import calls
from bpjax.engines import checks
from bpjax.engines import reduction as reduction_lib
from bpjax.networks import flow as flow_lib
from bpjax.networks import network
from bpjax.networks import segments as segments_lib
from bpjax.networks import survey as survey_lib
from bpjax.networks import unit as unit_lib
import jax
import jax.numpy as jnp

SHARED = '_shared'  # Key of the feedback that no single unit owns.
STEP = '_step'  # Key of the count of steps in it.
_OWN = ('params', *base.COLLECTIONS)


def no_feedback(key: base.Key, info: base.UnitInfo, params: base.Tree) -> None:
  """`init_unit` of a rule without feedback of its own."""
  del key, info, params


def any_units(units: Mapping[str, base.UnitInfo]) -> None:
  """`check_units` of a rule that refuses no network as a whole."""
  del units


def no_port(info: base.UnitInfo) -> None:
  """`port` of a rule whose units read no error directly."""
  del info


@dataclasses.dataclass(frozen=True)
class Rule:
  """A learning rule of the credit engine. What a rule's function returns.

  Attributes:
    name: the rule's name.
    backward: `(unit, feedback, signal) -> Credit`, the rule itself: a pure
      function of one unit, a `BoundUnit`. Or, with parameters and activations
      apart, `(unit, params, feedback, activations, signal) -> Credit`.
    init_unit: `(key, info, params) -> feedback of this unit`, a dict, an
      array, or None.
    init_shared: `(key, units) -> feedback` that several units read, or None;
      a unit without feedback of its own gets it as `feedback`.
    port: `(info) -> 'output'` for a unit that reads the output's error, the
      name of a unit for one that reads that unit's `Credit.source`, else None.
    check_units: `({unit: info}) -> None`, raises a ValueError where the units
      that the rule is to train, together, are none that it can.
    learns_feedback: whether an optimiser may touch the feedback; or, path of a
      leaf -> whether it may touch that.
    follows: whether feedback in the place of a parameter gets the very update of
      that parameter, whatever view of it the unit reads.
    stochastic: whether `backward` draws random numbers (`signal.key`).
    mirrors: whether the feedback learns from noise, not from the data, so that
      a trainer may choose at which steps it does.
    counts: whether it asks for the number of steps, `signal.step`.
    advance: `(info, feedback, step) -> feedback` of a unit for the next step,
      for what it keeps besides what is trained; or None.
    linear: whether the rule is linear in the error, as `bind` needs; a rule
      has to say so itself.
    segment: how much of what follows a unit's affine operation is the unit's
      own, for rules that move its pre-activation: 'shape' (up to the last value
      of the pre-activation's shape before another unit reads it),
      'shape_or_last' (where there is none, all of it: attention on queries,
      keys and values in one), 'rank' (the last of its rank: pooling too),
      'last'; None: nothing.
    joint: whether units that are mixed before they are read may share what
      follows them: it belongs to a unit without parameters (its kind is
      `Joint`), which is given the target and sends each of them its error.
    weight_target: `(units, params, feedback) -> {unit: weights}`: what the
      rule's weights should align with, for `bpjax.alignment`; or None.
  """
  name: str
  backward: Callable[..., base.Credit]
  init_unit: Callable[..., base.Tree | None] = no_feedback
  init_shared: Callable[..., base.Tree] | None = None
  port: Callable[[base.UnitInfo], str | None] = no_port
  check_units: Callable[[Mapping[str, base.UnitInfo]], None] = any_units
  learns_feedback: bool | Callable[[str], bool] = False
  follows: bool = False
  stochastic: bool = False
  mirrors: bool = False
  counts: bool = False
  advance: Callable[..., base.Tree] | None = None
  linear: bool = False
  segment: str | None = None
  joint: bool = False
  weight_target: Callable[..., Mapping[str, base.Tree]] | None = None

  @property
  def keeps_feedback(self) -> bool:
    """Whether units have feedback of their own."""
    return self.init_unit is not no_feedback

  def answer(
      self, unit: base.Unit, params: base.Tree, feedback: base.Tree,
      activations: base.Activations, signal: base.Signal) -> base.Credit:
    """What `backward` says, in either of its forms."""
    if len(inspect.signature(self.backward).parameters) == 3:
      bound = unit_lib.Bound(unit, params, activations)
      return self.backward(bound, feedback, signal)
    return self.backward(unit, params, feedback, activations, signal)

  def rule_for(self, unit: str) -> tuple[str, Rule]:
    """The rule that trains `unit`, and the name that its shared part has."""
    del unit
    return self.name, self

  def check_names(self, units: Iterable[str]) -> None:
    """Raises a ValueError for a pattern of the rule's that fits no unit."""

  def seen_by(
      self, net: network.Network, variables: Mapping[str, Any], x: Any
  ) -> network.Network:
    """The network whose units own as much as their rules need."""
    return net.owning(self.segments(net.survey(variables, x).units))

  def segments(self, units: Iterable[str]) -> dict[str, segments_lib.Policy]:
    """Unit -> how it owns what follows it, where its rule asks for that."""
    found = {}
    for name in units:
      label, rule = self.rule_for(name)
      if rule.segment is not None:
        found[name] = segments_lib.Policy(
            rule.segment, label if rule.joint else '')
    return found

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    checks.check_any_unit(survey, self.name)
    checks.check_loops(survey, self.name)
    checks.warn_of_exact(survey, self.name)
    self.check_names(survey.units)
    for unit in survey.blocked:
      raise ValueError(
          f'no error can reach unit `{unit}` under `{self.rule_for(unit)[0]}`: '
          'an activation between it and the output has a derivative that is '
          'zero everywhere (sign, round, a comparison); use a smooth '
          'activation or a straight-through one, '
          '`x + jax.lax.stop_gradient(jnp.sign(x) - x)`.')
    infos = self._told(survey.units.infos)
    for unit, why in survey.mixed.items():
      if survey.units[unit].info.is_output:  # It learns by its exact error.
        continue
      raise ValueError(
          f'unit `{unit}` {why}, so that rule `{self.rule_for(unit)[0]}` cannot '
          'give it a target of its own; give it another rule with `by_path`, or '
          'put what belongs together into one module that `is_unit` chooses.')
    for rule, units in self._members(infos).values():
      rule.check_units(units)
    for name, info in infos.items():
      label, rule = self.rule_for(name)
      checks.check_unit(name, info, label, rule, survey)
    self._sources(survey)

  def _told(
      self, units: Mapping[str, base.UnitInfo]) -> Mapping[str, base.UnitInfo]:
    """What each unit's rule is told of it.

    Where several rules share a network, `outs` holds the units of the same rule
    alone, boundaries included, and the last one.
    """
    labels = {name: self.rule_for(name)[0] for name in units}
    if len(set(labels.values())) < 2:
      return units

    def outs(label, block):
      return {
          name: info.out for name, info in units.items()
          if info.block == block and not info.joint and (
              labels[name] == label or info.is_output)}

    return {
        name: dataclasses.replace(info, outs=outs(labels[name], info.block))
        for name, info in units.items()}

  def init(
      self, key: base.Key, net: network.Network, variables: Mapping[str, Any],
      x: Any) -> dict[str, Any]:
    """Draws the rule's feedback for a network.

    Args:
      key: a random key; the same key gives the same feedback.
      net: the network.
      variables: the network's variables.
      x: an input, or a tuple of inputs (only the shapes matter).

    Returns:
      The feedback: nested as `variables['params']` is, a unit's part being
      what the rule keeps there; {} for a rule without feedback.

    Raises:
      ValueError: if the rule cannot train this network.
    """
    arguments.key('key', key)
    arguments.network(net)
    arguments.step(variables, x, None)
    net = self.seen_by(net, variables, x)
    survey = net.survey(variables, x)
    self.check(survey)
    infos = self._told(survey.units.infos)

    feedback = net.draw_feedback(
        key, variables, x, variables['params'],
        {name: self._init_unit(name, info) for name, info in infos.items()})
    shared = self._init_shared(key, infos)
    if any(rule.counts or rule.advance
           for rule, _ in self._members(infos).values()):
      shared[STEP] = jnp.zeros((), jnp.int32)
    feedback = {**feedback, SHARED: shared} if shared else feedback
    survey.feedback_shapes[self] = _shapes(feedback)
    return feedback

  def _init_unit(self, name, info):
    """What draws a unit's feedback, and what it is told; None: there is none."""
    _, rule = self.rule_for(name)
    if _passes_on(info, rule) or not rule.keeps_feedback:
      return None
    return rule.init_unit, info

  def _check_feedback(self, net, variables, x, feedback):
    """Raises a ValueError unless it is what `init` returns for this network."""
    if not isinstance(feedback, Mapping):
      raise ValueError(
          f'`feedback` must be what `rule.init` returned, a mapping, got '
          f'{type(feedback).__name__}.')
    survey = net.survey(variables, x)
    if self not in survey.feedback_shapes:
      jax.eval_shape(
          lambda key: self.init(key, net, variables, x), jax.random.key(0))
    wanted, given = survey.feedback_shapes[self], _shapes(feedback)
    for name, (shape, is_float) in given.items():
      if wanted.get(name) == (shape, not is_float):
        raise ValueError(
            f'`feedback` at `{name}` must be '
            f'{"whole" if is_float else "floating-point"} numbers under rule '
            f'`{self.name}`, got {"floats" if is_float else "whole numbers"}.')
    wanted, given = (
        {n: shape for n, (shape, _) in s.items()} for s in (wanted, given))
    for name in {**wanted, **given}:
      if wanted.get(name) != given.get(name):
        unit = next((u for u in net.survey(variables, x).units
                     if name == u or name.startswith(u + '/')), name)
        raise ValueError(
            f'`feedback` of unit `{unit}` must have the shape '
            f'{wanted.get(name, "of nothing")} at `{name}` under rule '
            f'`{self.name}`, got {given.get(name, "nothing")}; pass what '
            '`rule.init` returned for this network.')

  def _sources(self, survey):
    """Unit -> the unit whose error its port reads; and how deep they hang."""
    ports = {
        name: self.rule_for(name)[1].port(info)
        for name, info in self._told(survey.units.infos).items()}
    sources = {n: p for n, p in ports.items() if p not in (None, 'output')}
    checks.check_sources(sources, survey)
    depths = {}

    def depth(name, around=()):
      """How many units' errors have to be known before this one's is."""
      if name in around:
        cycle = [*around[around.index(name):], name]
        raise ValueError(
            'the wiring goes round and never reaches the output: '
            f'{" -> ".join(cycle)}; wire one of them to \'output\'.')
      if name not in depths:
        around = (*around, name)
        if name in sources:
          depths[name] = 1 + depth(sources[name], around)
        elif ports[name] == 'output':
          depths[name] = 0
        else:
          readers = survey.units[name].info.readers
          depths[name] = max((depth(r, around) for r in readers), default=0)
      return depths[name]

    return sources, max(map(depth, sources), default=0)

  def _init_shared(self, key, units):
    members = {
        label: (rule, infos)
        for label, (rule, infos) in self._members(units).items()
        if rule.init_shared is not None}

    @jax.jit
    def draw(key):
      _, key = jax.random.split(key)  # The first is that of the units.
      return {
          label: rule.init_shared(jax.random.fold_in(key, i), infos)
          for i, (label, (rule, infos)) in enumerate(members.items())}

    return draw(key) if members else {}

  def _members(self, units):
    """Label -> (rule, the units that it trains)."""
    members = {}
    for name, info in units.items():
      label, rule = self.rule_for(name)
      members.setdefault(label, (rule, {}))[1][name] = info
    return members

  def trainable(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools: which feedback an optimiser may touch.

    Example:
      >>> import bpjax
      >>> bpjax.rules.feedback_alignment().trainable({'Dense_1': {'kernel': 1.}})
      {'Dense_1': {'kernel': False}}
    """
    def learns(name, _):
      if name == f'{SHARED}/{STEP}':
        return False
      learns = self._rule_of_leaf(name).learns_feedback
      return learns(name) if callable(learns) else learns

    return paths.map_with_name(learns, feedback)

  def mirrored(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools: which feedback learns from noise (`mirrors`)."""
    return paths.map_with_name(
        lambda name, _: name != f'{SHARED}/{STEP}'
        and self._rule_of_leaf(name).mirrors, feedback)

  def _rule_of_leaf(self, name):
    return self.rule_for(name.removeprefix(SHARED + '/'))[1]

  def units(
      self, net: network.Network, variables: Mapping[str, Any], x: Any
  ) -> dict[str, str]:
    """Unit -> the rule that trains it; parameter -> where it is exact."""
    net = self.seen_by(net, variables, x)
    survey = net.survey(variables, x)
    units = survey.units
    trained = {name: self.rule_for(name)[1].name for name in units}
    trained |= {leaf: f'not trained (inside unit `{unit}`)'
                for leaf, unit in survey.untrained.items()}
    for leaf, operations in units.exact_by.items():
      exact = f'exact gradient ({", ".join(operations)})'
      trained[leaf] = f'{trained[leaf]}; {exact}' if leaf in trained else exact
    return trained

  def predict(self, net: network.Network) -> Callable[..., Any]:
    """`(variables, x) -> output` in evaluation mode."""
    return net.apply

  def value_and_grad(
      self, net: network.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """Like `jax.value_and_grad`, for this rule.

    Args:
      net: the network.
      loss: `(output, y) -> per-example losses [batch, ...]`.
      reduction: 'mean' divides the updates by the number of losses, 'sum' does
        not; or a mapping from path patterns to one of the two (the first that
        matches wins, 'mean' where none does). The value is the mean always.

    Returns:
      `learn(variables, feedback, x, y, key=None) -> ((value, aux), (grads,
      feedback_grads))`, to be called under `jax.jit`. `value` is the mean
      loss, `aux` an `Aux`; `grads` has the structure of `variables['params']`
      and `feedback_grads` that of `feedback` (zeros where it is fixed). Both
      are gradient-signed: an optax optimiser descends them.

    Raises:
      ValueError: before any computation, if the rule cannot train the network.

    Example:
      >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
      >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]))
      >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
      >>> variables = net.init(jax.random.key(0), x)
      >>> rule = bpjax.rules.feedback_alignment()
      >>> feedback = rule.init(jax.random.key(1), net, variables, x)
      >>> learn = jax.jit(
      ...     rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy))
      >>> (value, aux), (grads, feedback_grads) = learn(
      ...     variables, feedback, x, y)
    """
    arguments.network(net)
    arguments.loss(loss)
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      arguments.step(variables, x, key)
      value, aux, grads, count = self.differentiate(
          net, loss, variables, feedback, x, y, key, reduction=reduction)
      return (value, aux), reduction_lib.apply(reduction, grads[:2], count)

    return learn

  def differentiate(
      self, net, loss, variables, feedback, x, y, key, probes=None,
      reduction='mean', settle=None):
    """The engine: one forward pass, one pull.

    `settle(output)` gives the losses, the error of the output, and a function
    from a block to the error of what it puts out; that of `loss` where it is left
    out.

    Returns:
      value, aux, the summed updates of (params, feedback, probes), and the
      number of losses.
    """
    net = self.seen_by(net, variables, x)
    survey = net.survey(variables, x)
    self.check(survey)
    self._check_feedback(net, variables, x, feedback)
    key, _ = split(key)
    params = variables['params']
    state = {c: v for c, v in variables.items() if c not in _OWN}
    given, feedback = feedback, dict(feedback)
    shared = feedback.get(SHARED, {})
    # Labels stay as they are, so that known ones can be refused.
    losses = jax.eval_shape(lambda output: loss(output, y), survey.output)
    if settle is None:
      reduction_lib.check_losses(losses, survey.output, survey.axes)
    count = losses.size
    sources, depth = self._sources(survey)
    readouts = self._readouts(survey) if settle is None else ()
    taps = paths.nest({
        f'{name}/tap_0': zeros_like_output(survey.units[name].info.out)
        for name in sources.values()} | {
            f'{name}/readout_0': zeros_like_output(survey.units[name].info.pre)
            for name in readouts})
    infos = self._told(survey.units.infos)
    tokens = self.tokens(infos)
    # What is computed at once is computed call by call.
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
    visit = functools.partial(
        self.visit, infos=infos, shared=shared,
        kept=calls.Kept(net.alike(variables, x)) if traced else None,
        divisor=lambda unit: reduction_lib.divisor(reduction, unit, count),
        told=(y, shared.get(STEP), net.real(x)))

    def forward(params, feedback, probes, taps):
      own = {k: v for k, v in feedback.items() if k != SHARED}
      collections = {
          **state, 'params': params, base.FEEDBACK: own, base.TOKENS: tokens}
      if probes is not None:
        collections[base.PROBES] = probes
      if taps:
        collections[base.TAPS] = taps
      output, state_out = net.run(
          collections, x, visit, key, [*state, base.PORTS, base.TOKENS])
      ports = state_out.pop(base.PORTS, {})
      return (output, ports, state_out[base.TOKENS]), {
          c: state_out[c] for c in state}

    (output, ports, tokens), pull, state = jax.vjp(
        forward, params, feedback, probes, taps, has_aux=True)
    losses, error, error_of = (settle or functools.partial(
        settled, loss, y, axes=survey.axes))(output)

    def cotangents(errors):
      """What is known with the errors of units that others hang on."""
      of_block = error_of
      if readouts:
        outputs = jax.tree.leaves(error)
        batch = _batch(losses, outputs, survey.axes)
        whole = reduction_lib.errors_together([
            outputs[part] if isinstance(part, int)
            else paths.subtree(errors, part)['readout_0']
            for part in survey.error_parts], batch, survey_lib.axes_of_parts(
                survey.error_parts, survey.axes))
        of_block = lambda block: whole
      return (
          error,
          paths.map_with_name(lambda name, port: _to_port(paths.subtree(
              errors, sources[name.rpartition('/')[0]])['tap_0'], port), ports),
          {block: _to_port(of_block(block), token)
           for block, token in tokens.items()})

    # One pull a level of the wiring: it brings the errors of the units that
    # hang on those already known. XLA merges what they have in common.
    errors = taps
    for _ in range(depth + bool(readouts)):
      *_, errors = pull(cotangents(errors))
    *grads, _ = pull(cotangents(errors))
    grads = reduction_lib.with_whole(tuple(grads), (params, feedback, probes))
    grads = grads[0], self._followed(grads[0], grads[1]), grads[2]
    aux = base.Aux(output, state, self._advanced(given, survey))
    return jnp.mean(losses), aux, grads, count

  def _followed(self, updates, learned):
    """The feedback's updates, with those of parameters where a rule says so."""
    own = paths.leaves(updates)

    def of(name, update):
      if name not in own or name.startswith(SHARED):
        return update
      return own[name] if self._rule_of_leaf(name).follows else update

    return paths.map_with_name(of, learned)

  def tokens(self, infos: Mapping[str, base.UnitInfo]) -> dict[str, base.Array]:
    """Block -> the zero that brings the error of its output to the units' ports."""
    return {
        info.block: zeros_like_output(info.net_output)
        for name, info in infos.items()
        if self.rule_for(name)[1].port(info) == 'output'}

  def _advanced(self, feedback, survey):
    """The feedback that the next step's updates are added to."""
    step = feedback.get(SHARED, {}).get(STEP)
    if step is None:
      return feedback
    own = dict(zip(paths.leaf_names(feedback), jax.tree.leaves(feedback)))
    for name, info in self._told(survey.units.infos).items():
      rule = self.rule_for(name)[1]
      part = paths.subtree(feedback, name)
      if rule.advance is None or part is None:
        continue
      new = rule.advance(info, part, step)
      own |= {'/'.join(filter(None, (name, leaf))): value for leaf, value in zip(
          paths.leaf_names(new), jax.tree.leaves(new))}
    own[f'{SHARED}/{STEP}'] = step + 1
    return jax.tree.unflatten(
        jax.tree.structure(feedback), [own[n] for n in paths.leaf_names(feedback)])

  def _readouts(self, survey):
    """The readouts whose own errors are read by ports."""
    if all(self.rule_for(name)[1].port(info) != 'output'
           for name, info in self._told(survey.units.infos).items()):
      return ()
    return tuple(p for p in survey.error_parts if isinstance(p, str))

  def infos(self, net, variables, x):
    """Unit -> what the rule knows of it before any data."""
    net = self.seen_by(net, variables, x)
    return net.survey(variables, x).units.infos

  def signals(
      self, net, loss, variables, feedback, x, y, key, settle=None):
    """The updates, and what arrives at every unit's output.

    Returns:
      The mean updates of the parameters, and a collection of the teaching
      signals: under each unit's name an array for each of its calls.
    """
    net = self.seen_by(net, variables, x)
    calls = [(flow_lib.visited(step), step, around)
             for step, around in net.traced(variables, x).plan.walk()]
    probes = paths.nest({
        f'{name}/call_{step.index}'.removeprefix('/'):
            zeros_like_output(step.stacked(around))
        for name, step, around in calls if name is not None})
    _, _, (grads, _, signals), count = self.differentiate(
        net, loss, variables, feedback, x, y, key, probes, settle=settle)
    return jax.tree.map(lambda g: g / count, grads), signals

  def weight_targets(self, units, params, feedback):
    """Unit -> the weights that its own should align with."""
    members = {}
    units = self._told(units)
    for name in units:
      label, rule = self.rule_for(name)
      part = paths.of_unit(feedback, name)
      if part is None:
        part = feedback.get(SHARED, {}).get(label)
      if rule.weight_target is not None and part is not None:
        members.setdefault(label, (rule, {}))[1][name] = part
    targets = {}
    for rule, parts in members.values():
      own = {name: paths.subtree(params, name) for name in parts}
      targets |= rule.weight_target(units, own, parts)
    return targets

  def visit(
      self, call, infos, shared, told, divisor=lambda unit: 1, kept=None):
    """Answers for one call of one unit: the unit under `custom_vjp`."""
    info = infos[call.name]
    label, rule = self.rule_for(call.name)
    probe = call.read(base.PROBES, 'call')
    if info.kind == base.BOUNDARY and probe is not None:
      # What counts here is what the boundary hands down, not what it gets.
      call.inputs, probe = (call.inputs[0] + probe,), None
    tap = call.read(base.TAPS, 'tap')
    if _passes_on(info, rule) and tap is None:
      return call.original()
    feedback = call.read(base.FEEDBACK) if rule.keeps_feedback else None
    if feedback is None:
      feedback = shared.get(label)
    key = call.key() if rule.stochastic else None
    source = rule.port(info)
    token = call.token(info.block) if source == 'output' else None
    read = None if source in (None, 'output') else infos[source].out
    args = (
        call.params, feedback, call.taught_inputs(), key,
        tap, call.read(base.TAPS, 'readout'), token, told)
    wrap = lambda info: _wrap(
        call.unit, info, rule, read, divisor(call.name), call.reads_stacked)
    answered = wrap(info) if kept is None else kept.find(
        call.unit, info, wrap, args,
        (rule, read, divisor(call.name), call.reads_stacked))
    out, port = answered(*args)
    if token is not None:
      call.hand_on(info.block, port)
    elif read is not None:
      call.write(base.PORTS, port, 'port')
    return out if probe is None else out + probe

  def bind(self, net: network.Network) -> Callable[..., Any]:
    """An apply function whose ordinary `jax.grad` is the rule.

    For rules that are linear in the error and read no port. What the gradient
    is taken of decides the reduction.

    Args:
      net: the network.

    Returns:
      `apply(variables, feedback, x, *, key=None, mutable=False)`, in training
      mode: the output, or with `mutable` the output and the model's updated
      collections, as in Flax.

    Raises:
      ValueError: for a rule that a gradient cannot express.
    """
    if not self.linear:
      raise ValueError(
          f'`bind` needs a rule that is linear in the error, and `{self.name}` '
          'is not; use `rule.value_and_grad(net, loss)`.')

    def apply(variables, feedback, x, *, key=None, mutable=False):
      seen = self.seen_by(net, variables, x)
      survey = seen.survey(variables, x)
      self.check(survey)
      infos = self._told(survey.units.infos)
      for name, info in infos.items():
        label, rule = self.rule_for(name)
        if rule.port(info):
          raise ValueError(
              f'`bind` cannot bring an error to the port of unit `{name}` '
              f'(rule `{label}`); use `rule.value_and_grad(net, loss)`.')
      own = {k: v for k, v in feedback.items() if k != SHARED}
      state = [c for c in variables if c not in _OWN]
      output, state_out = seen.run(
          {**variables, base.FEEDBACK: own}, x,
          functools.partial(
              self.visit, infos=infos, shared=feedback.get(SHARED, {}),
              told=(None, None, seen.real(x))),
          key, state)
      if not mutable:
        return output
      return output, {c: state_out[c] for c in state}

    return apply


def _shapes(tree):
  """Path -> the shape of the leaf, and whether it holds floats."""
  leaves = [jnp.asarray(leaf) if isinstance(leaf, (int, float)) else leaf
            for leaf in jax.tree.leaves(tree)]
  return {name: (leaf.shape, jnp.issubdtype(leaf.dtype, jnp.inexact))
          for name, leaf in zip(paths.leaf_names(tree), leaves)}


def settled(loss, y, output, axes=()):
  """The losses, the error of the output, and block -> the error that it reads."""
  losses, pull = jax.vjp(lambda o: loss(o, y), output)
  reduction_lib.check_losses(losses, output, axes)
  error, = pull(jnp.ones_like(losses))
  whole = reduction_lib.errors_together(
      error, _batch(losses, jax.tree.leaves(error), axes), axes)
  return losses, error, lambda block: whole


def _batch(losses, outputs, axes):
  """The number of examples; losses may have other axes before theirs."""
  return next((o.shape[axis] for o, axis in zip(outputs, axes) if axis),
              losses.shape[0])


def split(key: base.Key | None) -> tuple[base.Key | None, base.Key | None]:
  """A step's key for the model's run, and one for the engine's own draws."""
  return (None, None) if key is None else tuple(jax.random.split(key))


def _passes_on(info, rule):
  """Whether a boundary hands down what it gets, as if it were not there."""
  return info.kind == base.BOUNDARY and rule.port(info) is None


def _wrap(unit, info, rule, read, divisor, reads_stacked):
  """The unit as a function with the rule for its derivative.

  `read` has the shape of the error of another unit that this one's port reads, if
  any; that of the output, or of the block's, comes with the token, which is handed
  on.
  """
  unit.info = info

  def primal(params, inputs, token):
    pre, out = unit(params, inputs)
    return pre, out, token if read is None else zeros_like_output(read)

  @jax.custom_vjp
  def call(params, feedback, inputs, key, tap, readout, token, told):
    del feedback, key, tap, readout, told
    return primal(params, inputs, token)[1:]

  def forward(params, feedback, inputs, key, tap, readout, token, told):
    pre, out, port = primal(params, inputs, token)
    return (out, port), (
        params, feedback, inputs, pre, out, key, tap, readout, token, told)

  def backward(residuals, cotangents):
    (params, feedback, inputs, pre, out, key, tap, readout, token,
     told) = residuals
    teaching, arrived = cotangents
    error = arrived
    if token is not None:
      error = late(error, teaching)
    activations = base.Activations(inputs, pre, out)
    credit = rule.answer(
        unit, params, feedback, activations,
        base.Signal(teaching, error, key, divisor, *told))
    if tap is not None and credit.source is None:
      raise ValueError(
          f'a port names unit `{info.name}` as its source, and rule '
          f'`{rule.name}` answers no `Credit.source` there; wire it to '
          "'output', or to a unit of a rule that does.")
    updates, messages = credit.params, credit.inputs
    if updates is None:
      updates = jax.tree.map(jnp.zeros_like, params)
    if messages is None:
      messages = (None,) * len(inputs)
    return (updates, credit.feedback,
            _check_messages(info, rule, inputs, messages, reads_stacked), None,
            None if tap is None else credit.source,
            None if readout is None else
            unit.delta(params, activations, teaching).pre,
            None if token is None else arrived, None)

  call.defvjp(forward, backward)
  return call


def late(error: base.Tree, teaching: base.Array) -> base.Tree:
  """`error`, of arrays; on a CPU, no earlier than `teaching` is there.

  Nothing holds a message back that is made of the output's error alone. XLA's
  CPU scheduler makes those of all units first and keeps them, which takes half
  as much memory again as backprop does, and the time to touch it.
  """
  meshes = [jax.typeof(a).sharding.mesh
            for a in jax.tree.leaves((error, teaching))]
  if not all(mesh.empty for mesh in meshes) or not teaching.size or (
      not teaching.ndim):
    return error

  def wait(error, teaching):
    first = teaching[(slice(None),) + (0,) * (teaching.ndim - 1)]
    never = jnp.isnan(first) & jnp.isinf(first)  # XLA does not see through it.

    def of(e):  # Row by row: no device asks another where the batch is split.
      if e.shape[:1] == never.shape:
        return jnp.where(never.reshape(-1, *(1,) * (e.ndim - 1)), 0, e)
      return jnp.where(never[0], 0, e)

    return jax.tree.map(of, error)

  return jax.lax.platform_dependent(
      error, teaching, cpu=wait, default=lambda error, teaching: error)


def _check_messages(info, rule, inputs, messages, reads_stacked):
  """One message an input, in its shape, its dtype and on its mesh axes."""
  if len(messages) != len(inputs):
    raise ValueError(
        f'rule `{rule.name}` must send one message an input at unit '
        f'`{info.name}`, {len(inputs)}, got {len(messages)}.')
  checked = []
  for x, message in zip(inputs, messages):
    if message is not None and message.shape != x.shape:
      raise ValueError(
          f'rule `{rule.name}` must send a message of its input\'s shape '
          f'{x.shape} at unit `{info.name}`, got {message.shape}.')
    if message is None and reads_stacked and jnp.issubdtype(x.dtype, jnp.inexact):
      # The transpose of a scan takes no symbolic zeros for what it stacks.
      message = jnp.zeros_like(x)
    if message is not None:
      message = message.astype(x.dtype)
      place = jax.typeof(x).sharding
      if place != jax.typeof(message).sharding:  # Under explicit axes alone.
        message = jax.sharding.reshard(message, place)
    checked.append(message)
  return tuple(checked)


def zeros_like_output(output: jax.ShapeDtypeStruct) -> base.Array:
  """Zeros like the model's output, on the same mesh axes."""
  sharding = getattr(output, 'sharding', None)
  return jnp.zeros(output.shape, output.dtype, out_sharding=sharding)


def _to_port(error, port):
  """The error for a port, once for every turn of a loop."""
  if port.shape == error.shape:
    return error
  return jnp.broadcast_to(error, port.shape).astype(port.dtype)
