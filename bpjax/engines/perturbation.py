"""The perturbation engine: learning from directional derivatives.

Every place at which parameters meet data, the gain of a norm included, puts a
tangent on its output. One linearised forward pass gives the change of each
example's loss along it, and each place's own, local VJP turns that into an
update. No error travels backwards between places: a barrier stops it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import dataclasses
import functools
import itertools
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import paths
from bpjax.engines import base as engine
from bpjax.engines import credit
from bpjax.engines import random_bits
from bpjax.engines import reduction as reduction_lib
from bpjax.local import located
from bpjax.networks import examples
from bpjax.networks import network
from bpjax.networks import reach as reach_lib
from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib
import jax
import jax.numpy as jnp

_WORD = 32  # Bits.
Directions = Callable[[base.Key, list[base.Array]], list[base.Array]]


@dataclasses.dataclass(frozen=True)
class Rule(engine.Base):
  """A learning rule of the perturbation engine.

  Attributes:
    name: the rule's name.
    backward: `(unit, params, feedback, activations, signal) -> Credit` of one
      unit, with `signal.teaching` the perturbation times the change of loss.
    directions: `(key, arrays) -> tangents`, one in the shape of each.
    perturb: 'activity' (outputs of units and norms) or 'weight' (parameters).
    samples: how many directions each update averages over.
    loop: whether samples are taken one after the other.
    exact_readout: whether readouts keep their own exact gradient.
    mask: which neurons learn (`bpjax.bottleneck`), or None for all.
    orthogonal: whether the samples' directions are at right angles.
    epsilon: the step of finite differences; 0: exact derivatives.
    antithetic: whether these are taken to both sides.
    signs: whether directions have no entries but 1 and -1.
    noise: None for what `perturb` has by itself; 'shared' for activity noise
      that all examples share, 'independent' for weight noise that none do.
    apart: `(key, arrays) -> functions`, each of which draws one of the tangents
      of `directions` when it is called with what it is to wait for.
    recompute: whether a second forward pass stands in for what the first would
      have to keep.
  """
  name: str
  backward: Callable[..., base.Credit]
  directions: Directions
  perturb: str
  samples: int
  exact_readout: bool
  mask: Any = None
  orthogonal: bool = False
  epsilon: float = 0.
  antithetic: bool = False
  signs: bool = False
  noise: str | None = None
  loop: bool = False
  apart: Callable[..., list[Callable[[Any], base.Array]]] | None = None
  recompute: bool = False
  _no_bind = 'perturbs the forward pass'

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    for unit in () if self.epsilon else survey.blocked:
      raise ValueError(
          f'a perturbation of unit `{unit}` cannot change the loss under '
          f'`{self.name}`: an activation between it and the output has a '
          'derivative that is zero everywhere (sign, round, a comparison); use '
          'a smooth activation, or finite differences, `epsilon=1e-3`.')
    if self.noise and survey.batch_coupled:
      raise ValueError(
          "`noise` must be None where an example's loss depends on the others, "
          f'as `{survey.batch_coupled[0]}` makes it, got {self.noise!r}; use a '
          'norm over single examples, such as LayerNorm.')
    if self.mask is not None:
      self.mask.check(survey.units)
      for info in survey.units.infos.values():
        self.mask.check_unit(info)

  def units(self, net, variables, x) -> dict[str, str]:
    """Unit -> the rule that trains it; also the parameters without a unit."""
    traced = net.traced(variables, x)
    plan, exact = traced.plan, exact_calls(traced) if self.exact_readout else ()
    label = lambda calls: (
        'exact gradient (readout)' if calls and all(c in exact for c in calls)
        else self.name)
    calls = {}
    for step, _ in plan.walk():
      if step.how in ('unit', 'contact'):
        leaves = (leaf for v in step.params.values() for leaf in v.leaves)
        for name in {step.name, *leaves}:
          calls.setdefault(name, []).append((step.name, step.index))
    units = net.survey(variables, x).units
    # Noise passes a boundary as if it were not there.
    return {name: label(calls.get(name)) for name in (*units, *units.exact)
            if name not in units or units[name].info.kind != base.BOUNDARY}

  def value_and_grad(
      self, net: network.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """As `bpjax.engines.credit.Rule.value_and_grad`; `learn` needs a `key` here."""
    arguments.network(net)
    arguments.loss(loss)
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      arguments.step(variables, x, key)
      arguments.no_feedback(self.name, feedback)
      jax.eval_shape(
          lambda output: loss(output, y), net.survey(variables, x).output)
      value, aux, grads, count, _ = self.differentiate(
          net, variables, x, key, Whole(
              loss, y, net.survey(variables, x).axes))
      grads, = reduction_lib.apply(reduction, (grads,), count)
      aux = aux._replace(feedback=feedback)
      return (value, aux), (grads, jax.tree.map(jnp.zeros_like, feedback))

    return learn

  def signals(
      self, net, loss, variables, feedback, x, y, key, judge=None):
    """As `bpjax.engines.credit.Rule.signals`; a readout that is exact has none."""
    del feedback
    _, _, grads, count, signals = self.differentiate(
        net, variables, x, key, judge or Whole(
            loss, y, net.survey(variables, x).axes))
    return jax.tree.map(lambda g: g / count, grads), signals

  def differentiate(self, net, variables, x, key, judge):
    """The engine: one linearised forward pass, `samples` directions.

    Args:
      net: the network.
      variables: its variables.
      x: its input.
      key: a random key.
      judge: what counts as a change, and for which output; such as `Whole`.

    Returns:
      value, aux, the summed updates, the number of losses, and the teaching
      signals (a collection: the perturbation times the change of the loss at
      every perturbed output).
    """
    if key is None:
      raise ValueError(
          f'`key` is needed: rule `{self.name}` draws its directions; pass '
          '`key=jax.random.key(...)`.')
    self.check(net.survey(variables, x))
    if self.noise:
      self._check_examples(net, variables, x, judge)
    if self.noise == 'independent':
      return self._by_example(net, variables, x, key, judge)
    model_key, direction_key = credit.split(key)
    plan = Plan(self, net, variables, x, model_key, judge)

    def forward(noise, perturbed, net=net):
      output, *aux = plan.run(perturbed, noise, net)
      return judge.measure(output), (output, *aux)

    if self.recompute:
      return self._twice(plan, net, direction_key, judge)
    if self.epsilon:
      measured, aux = forward(plan.noise, plan.perturbed)
      still = judge.held(net, measured)
      change = self._differences(
          lambda *moved: forward(*moved, still)[0], measured, plan, judge)
    else:
      measured, push, aux = plan.linearize(forward)
      change = lambda u, v: judge.locate(push(u, v))
    output, state, active = aux
    losses, error = judge.settle(measured)

    # A pass of its own: in a loop, the derivative of a derivative loses those
    # that functions bring along. XLA makes one of what both passes compute.
    def local(params):
      output, outputs = plan.pulled(params)
      return outputs, judge.measure(output) if self.exact_readout else None

    _, pull = jax.vjp(local, {
        k: p for k, p in plan.params.items() if k not in plan.perturbed})

    def teach(directions):
      u, v = directions
      u = plan.where_active(u, active)
      return judge.teach(plan, u, v, change(u, v))

    def update(taught):
      teaching, own = taught
      pulled, = pull((teaching, error if self.exact_readout else None))
      return plan.tree({**pulled, **own}), teaching

    if self.samples == 1:
      grads, teaching = update(teach(plan.draw(direction_key)))
    elif self.loop:
      grads, teaching = self._in_turn(
          lambda directions: update(teach(directions)), plan, direction_key)
    else:
      grads, teaching = update(jax.tree.map(
          lambda t: jnp.mean(t, axis=0),
          jax.vmap(teach)(plan.draw(direction_key))))
    return (jnp.mean(losses), base.Aux(output, state), grads, losses.size,
            teaching)

  def _twice(self, plan, net, key, judge):
    """`differentiate` in two forward passes, of which nothing is kept."""
    output, state, active = plan.run(plan.perturbed, plan.noise, net)
    losses, error = judge.settle(judge.measure(output))
    names = paths.leaf_names(plan.noise)

    def sample(key):
      # After all that the first pass reads: parameters may be overwritten then,
      # where XLA would copy them.
      draws, v = plan.apart(_after(losses, key), active)
      # The errors of the first pass would be kept for all blocks until here.
      change = judge.afresh(*plan.pushed(draws, v, net, judge.measure))
      draws, v = plan.apart(_after(change, key), active)
      teach = lambda name, wait: judge.taught(
          plan, draws[name](wait), plan.reached_by[name], change)

      def second(params):
        output, outputs = plan.pulled(params, change, teach)
        return outputs, judge.measure(output) if self.exact_readout else None

      outputs, pull = jax.vjp(second, {
          k: p for k, p in plan.params.items() if k not in plan.perturbed})
      # What has learned on the way asks for no cotangent.
      seeds = paths.map_with_name(
          lambda name, out: teach(name, change) if name in plan.looped
          else jnp.zeros_like(out), outputs[0])
      pulled, = pull((seeds, error if self.exact_readout else None))
      own = {k: judge.taught(plan, leaf, reached, change) for (k, leaf), reached
             in zip(v.items(), plan.reached[len(names):])}
      return plan.tree({**pulled, **own})

    if self.samples == 1:
      grads = sample(key)
    else:
      grads = self._in_turn(sample, plan, key)
    return (jnp.mean(losses), base.Aux(output, state), grads, losses.size, {})

  def _in_turn(self, sample, plan, key):
    """The mean of the samples, of which one is held at a time."""
    if self.orthogonal:  # They have to be known together.
      items, draw = plan.draw(key), lambda directions: directions
    else:
      items = jax.random.split(key, self.samples)
      draw = (lambda key: key) if self.recompute else plan.draw_one
    at = lambda i: sample(draw(jax.tree.map(lambda a: a[i], items)))
    total = jax.lax.fori_loop(
        1, self.samples, lambda i, total: jax.tree.map(jnp.add, total, at(i)),
        at(0))
    return jax.tree.map(lambda g: g / self.samples, total)

  def _check_examples(self, net, variables, x, judge):
    """Raises unless no example has a part in the loss of another."""
    traced = net.traced(variables, x)
    inputs = _found(net, traced, judge, differences=True).inputs
    first = len(inputs) - 1 - len(jax.tree.leaves(x))  # The key is last.
    for reached in inputs[first:-1]:
      digit = _examples(reached)
      if reached and (digit is None or digit[1] != (0, 1)):
        raise ValueError(
            "`noise` must be None where an example's loss depends on the others' "
            'inputs, through an operation of the model or of the loss (or one '
            f'that cannot be followed), got {self.noise!r}.')

  def _by_example(self, net, variables, x, key, judge):
    """`differentiate` with each example as a batch, whose noise is its own."""
    rule = dataclasses.replace(self, noise=None)

    def one(x, y, key):
      x, y = jax.tree.map(lambda a: a[None], (x, y))
      value, aux, *summed = rule.differentiate(
          net, variables, x, key, judge.of(y))
      output = jax.tree.map(lambda a: a[0], aux.output)
      return (value, output, summed), aux.model_state

    keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
    # A state that differs between examples is an error, here.
    (values, output, summed), state = jax.vmap(
        one, out_axes=(0, None))(x, judge.y, keys)
    summed = jax.tree.map(lambda a: jnp.sum(a, axis=0), summed)
    return jnp.mean(values), base.Aux(output, state), *summed

  def _differences(self, function, here, plan, judge):
    """In place of a derivative: (u, v) -> the losses' change for a step of 1."""

    def moved(u, v, step):
      add = lambda a, b: a + jnp.asarray(step, a.dtype) * b.astype(a.dtype)
      return judge.compare(here, function(
          jax.tree.map(add, plan.noise, u),
          jax.tree.map(add, plan.perturbed, v)))

    def push(u, v):
      there, width = moved(u, v, self.epsilon), self.epsilon
      if self.antithetic:
        back, width = moved(u, v, -self.epsilon), 2 * width
      else:
        back = judge.compare(here, here)
      return jax.tree.map(lambda a, b: (a - b) / width, there, back)

    return push


class Whole(located.Judge):
  """The loss of the model's output: how much each example's changes."""

  def __init__(self, loss: base.Loss, y: Any, axes: tuple[int, ...] = ()):
    super().__init__()
    self._loss, self.y, self._axes = loss, y, axes

  def of(self, y: Any) -> Whole:
    """The same for other labels."""
    return Whole(self._loss, y, self._axes)

  def of_output(self, measured: Any) -> base.Array:
    return self._loss(measured['output'], self.y)

  def measure(self, output: Any) -> Any:
    return {'blocks': {}, 'output': output}

  def settle(self, measured: Any) -> tuple[base.Array, Any]:
    losses, pull = jax.vjp(self.of_output, measured)
    reduction_lib.check_losses(losses, measured['output'], self._axes)
    self.errors, = pull(jnp.ones_like(losses))
    return losses, self.errors


class Plan:
  """Which outputs and which parameters are perturbed, for one shape of input.

  Attributes:
    params: the parameters, by path.
    noise: a zero for each perturbed output, nested as their places; in a loop
      with an axis for the turns in front.
    perturbed: the parameters that are perturbed themselves, by path.
    reached: for each leaf of the two: loss -> its axes, in digits of the leaf.
    reached_by: the same of the noise, by its place.
    looped: the places inside of loops, remats and conditionals.
  """

  def __init__(self, rule, net, variables, x, key, judge):
    self._rule, self._net, self._x, self._key = rule, net, x, key
    self._state = {
        c: v for c, v in variables.items()
        if c not in ('params', *base.COLLECTIONS)}
    self._tree = jax.tree.structure(variables['params'])
    names = paths.leaf_names(variables['params'])
    self.params = dict(zip(names, jax.tree.leaves(variables['params'])))
    traced = net.traced(variables, x)
    found = _found(net, traced, judge, bool(rule.epsilon))
    self._entries = traced.entries
    self._exact = exact_calls(traced) if rule.exact_readout else set()
    taught, noise, reached, around_of = set(), {}, {}, {}
    self.looped = set()
    for step, around in traced.plan.walk():
      if step.how not in ('unit', 'contact'):
        continue
      call = step.name, step.index
      if call in self._exact or not found.places.get(call) or (
          not step.out.aval.size):
        continue
      taught.update(leaf for v in step.params.values() for leaf in v.leaves)
      name = f'{step.name}/call_{step.index}'.removeprefix('/')
      noise[name] = credit.zeros_like_output(step.stacked(around))
      if around:
        self.looped.add(name)
      around_of[name] = noise[name].ndim - step.out.aval.ndim
      reached[f'0/{name}'] = found.places[call]
    if rule.perturb == 'weight':
      noise = {}
    else:  # Parameters that no perturbed output can teach.
      taught = set()
    self._real, self._around = net.real(x), around_of
    self.noise = paths.nest(noise)
    self.perturbed = {
        k: p for k, p in self.params.items()
        if k in taught | found.bare and jnp.issubdtype(p.dtype, jnp.inexact)}
    reached |= {f'1/{k}': r for k, r in zip(names, found.inputs)}
    ours = [reached[name] for name in paths.leaf_names(
        (self.noise, self.perturbed))]
    self.reached = [
        {k: axes for k, axes in r.items() if isinstance(k, str)} for r in ours]
    self.reached_by = dict(zip(paths.leaf_names(self.noise), self.reached))
    # Names of functions that only have a derivative in reverse.
    self._custom = {k[1] for r in ours for k in r if not isinstance(k, str)}
    self._check()

  def _check(self):
    """Raises a ValueError for noise that has no derivative to learn from."""
    custom = self._custom - {unit_lib.GAIN}
    if custom and not self._rule.epsilon:
      raise ValueError(
          f'rule `{self._rule.name}` needs a forward derivative, and the model '
          f'calls {", ".join(f"`{name}`" for name in sorted(custom))}, which '
          'has one in reverse alone (`jax.custom_vjp`); write it with '
          '`jax.custom_jvp`, or use finite differences, `epsilon=1e-3`.')
    for tree in (self.noise, self.perturbed):
      for name, leaf in zip(paths.leaf_names(tree), jax.tree.leaves(tree)):
        if jnp.iscomplexobj(leaf):
          raise ValueError(
              f'rule `{self._rule.name}` needs real numbers, got {leaf.dtype} '
              f'at `{name}`; keep real and imaginary parts in parameters of '
              'their own.')

  def linearize(self, forward):
    """`jax.linearize` of a function of what is perturbed; its aux is last."""
    return jax.linearize(
        self._without_messages(forward), self.noise, self.perturbed,
        has_aux=True)

  def _without_messages(self, forward):
    """`forward` without the messages of a gain that it leaves out."""

    def function(*moved):
      measured, _, aux = jax.vjp(forward, *moved, has_aux=True)
      return measured, aux

    return function if self._custom else forward

  def pushed(self, draws, v, net, measure):
    """`measure(output)` and its derivative along what is drawn at each place."""
    inside = {n: draw(None) for n, draw in draws.items() if n in self.looped}

    def forward(step, noise, perturbed):
      output, *_ = self.run(perturbed, paths.nest(noise), net, step, draws)
      return measure(output), ()

    function = self._without_messages(forward)
    return jax.jvp(
        lambda *moved: function(*moved)[0],
        (jnp.zeros(()), jax.tree.map(jnp.zeros_like, inside), self.perturbed),
        (jnp.ones(()), inside, v))

  def run(self, perturbed, noise, net, step=None, draws=()):
    """The model's output, its state, and what is active.

    With `draws`, the noise of a place is drawn when it is reached, and has the
    derivative with respect to `step` that noise of this size has.
    """

    def visit(call):
      out, zero = call.original(), call.read(base.NOISE, 'call')
      name = _place(call)
      if zero is None and name in draws:
        return _stepped(out, step, draws[name](out))
      return out if zero is None else _perturbed(out, zero)

    output, collections = self._ran(
        net, {**self.params, **perturbed}, visit, [*self._state, base.ACTIVE],
        noise)
    state = {c: collections[c] for c in self._state}
    return output, state, collections[base.ACTIVE]

  def pulled(self, params, after=None, teach=None):
    """The model's output, and each perturbed one, as functions of parameters.

    Behind each perturbed output there is a barrier: derivatives are those of
    each place on its own, and of the readout. With `teach`, a second pass that
    begins when `after` is there, and in which each place that lies in no loop
    has learned before the next one is reached.
    """
    noise = dict(zip(
        paths.leaf_names(self.noise), jax.tree.leaves(self.noise)))

    def visit(call):
      out, name = call.original(), _place(call)
      if name in noise:
        if teach is not None and name not in self.looped:
          out = _learned(call, functools.partial(teach, name))
        call.write(base.NOISE, out, 'call')
        return jax.lax.stop_gradient(out)
      if (call.name, call.index) in self._exact and self._rule.mask:
        still = jax.lax.stop_gradient(out)
        return still + self._mask(call.name, out - still)
      return out

    x = self._x if after is None else _after(after, self._x)
    output, collections = self._ran(
        self._net, {**self.params, **params}, visit, [base.NOISE], x=x)
    return output, collections[base.NOISE]

  def _ran(self, net, params, visit, mutable, noise=None, x=None):
    params = jax.tree.unflatten(self._tree, [params[k] for k in self.params])
    variables = {'params': params, **self._state, base.NOISE: noise or {}}
    return net.run(
        variables, self._x if x is None else x, visit, self._key, mutable,
        owners=True)

  def tree(self, updates):
    """Updates by path, nested as the parameters; of whole numbers, zeros."""
    return jax.tree.unflatten(self._tree, [
        jnp.zeros_like(p) if updates[k].dtype == jax.dtypes.float0
        else updates[k] for k, p in self.params.items()])

  def masks(self, active):
    """Place -> where a rectifier that follows is active, as far as is known."""
    active = dict(zip(paths.leaf_names(active), jax.tree.leaves(active)))
    count = lambda names: collections.Counter(
        name.rpartition('/')[0] for name in names)
    names = dict(zip(
        paths.leaf_names(self.noise), jax.tree.leaves(self.noise)))
    calls, known = count(names), count(active)
    owner = lambda name: name.rpartition('/')[0]
    return {
        name: active[name] for name, leaf in names.items()
        if name in active and known[owner(name)] == calls[owner(name)]
        and active[name].shape == leaf.shape}

  def where_active(self, u, active):
    """The noise `u` with 0 where a rectifier is known to send none of it on."""
    masks = self.masks(active)
    return paths.map_with_name(
        lambda name, leaf: jnp.where(masks[name], leaf, 0)
        if name in masks else leaf, u) if masks else u

  def draw(self, key):
    """Tangents for the noise and the perturbed parameters.

    More samples than one are on a new first axis.
    """
    if self._rule.orthogonal:
      return self._draw_orthogonal(key)
    if self._rule.samples == 1:
      return self.draw_one(key)
    return jax.vmap(self.draw_one)(
        jax.random.split(key, self._rule.samples))

  def draw_one(self, key):
    """The same for one of several samples, of which no other is read."""
    return self.masked(self._drawn(key))

  def apart(self, key, active):
    """Place -> what draws its noise, when called; and perturbed parameters'.

    Together the tangents of `draw_one`, where rectifiers are active.
    """
    tree = (self.noise, self.perturbed)
    draws = self._rule.apart(key, jax.tree.leaves(tree))
    masks = self.masks(active)

    def draw(name, draw, reached, wait):
      u = draw(wait)
      if self._real is not None:
        u = self._only_real(name, u)
      if self._rule.noise == 'shared':
        u = _as_the_first(u, _examples(reached))
      if self._rule.mask is not None:
        u = self._mask(name.rpartition('/')[0], u)
      return jnp.where(masks[name], u, 0) if name in masks else u

    names = paths.leaf_names(self.noise)
    u = {name: functools.partial(draw, name, one, self.reached_by[name])
         for name, one in zip(names, draws)}
    v = {k: one(None) for k, one in zip(self.perturbed, draws[len(names):])}
    return u, self.masked(({}, v))[1]

  def _only_real(self, name, u):
    """The noise of a place without that of hidden positions."""
    hide = lambda u: examples.only_real(u, self._real)
    for _ in range(self._around[name]):
      hide = jax.vmap(hide)
    return hide(u)

  def _drawn(self, key):
    leaves, structure = jax.tree.flatten((self.noise, self.perturbed))
    u, v = jax.tree.unflatten(structure, self._rule.directions(key, leaves))
    if self._real is not None:
      u = paths.map_with_name(self._only_real, u)
    if self._rule.noise == 'shared':
      u = jax.tree.unflatten(jax.tree.structure(u), [
          _as_the_first(leaf, _examples(reached))
          for leaf, reached in zip(jax.tree.leaves(u), self.reached)])
    return u, v

  def _draw_orthogonal(self, key):
    """Directions at right angles, example by example and loss by loss."""
    tree = (self.noise, self.perturbed)
    drawn = jax.vmap(self._drawn)(jax.random.split(key, self._rule.samples))
    names = paths.leaf_names(tree)
    axes = [_example_axis(leaf, reached) for leaf, reached in zip(
        jax.tree.leaves(tree), self.reached)]
    groups = {}
    for i, (name, axis) in enumerate(zip(names, axes)):
      kind = 'example' if axis is not None else 'shared'
      kind = 'weight' if name.startswith('1/') else kind
      groups.setdefault((kind, tuple(self.reached[i])), []).append(i)
    leaves = jax.tree.leaves(drawn)
    for (kind, _), members in groups.items():
      own = [(leaves[i], axes[i] if kind == 'example' else None)
             for i in members]
      for i, leaf in zip(members, _orthogonal(own)):
        leaves[i] = leaf
    drawn = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    if self._rule.samples > 1:
      return jax.vmap(self.masked)(drawn)
    return self.masked(jax.tree.map(lambda leaf: leaf[0], drawn))

  def masked(self, directions):
    """Directions with 0 for the neurons that do not learn."""
    if self._rule.mask is None:
      return directions
    u, v = directions
    u = paths.map_with_name(
        lambda name, leaf: self._mask(name.rpartition('/')[0], leaf), u)
    owners = {leaf: name for name, e in self._entries.items()
              for leaf in (*e.principal, *e.others, *e.biases)}
    return u, {k: self._mask(owners.get(k), leaf) for k, leaf in v.items()}

  def _mask(self, unit, leaf):
    return self._rule.mask.apply(unit, leaf) if unit in self._entries else leaf

  def product(self, u, change):
    """`u * change`, which broadcasts to `u`."""
    change = change.astype(u.dtype)
    if not self._rule.signs:
      return u * change
    # A product would be fused into the sums that read it, and its operands, all
    # the signs of a step, be written out at its start; a choice is made late.
    return jnp.where(u > 0, change, jnp.where(u < 0, -change, 0))


def exact_calls(traced: Any) -> set[tuple[str, int]]:
  """The calls of readouts, and of what lies between them and the output."""
  return traced.flow.behind | {
      (step.name, step.index) for step, _ in traced.plan.walk()
      if step.how == 'unit' and step.name in traced.flow.readouts}


def _found(net, traced, judge, differences):
  """Which losses the places and parameters of a network reach."""
  outs = judge.seeds(traced.output, differences)
  outs += [{}] * (len(traced.plan.jaxpr.outvars) - len(outs))
  return reach_lib.follow(
      traced.plan, outs, net.cuts, judge.blocks(), values=differences)


def _examples(reached):
  """The one digit (size, (axis, stride)) that counts examples, or None."""
  digits = {axes[0] for axes in reached.values() if axes}
  (first, *more), = digits if len(digits) == 1 else [(None,)]
  return None if more or first is None or first[1] is None else first


def _example_axis(leaf, reached):
  """The axis of `leaf` that is that of examples, if there is one."""
  n, (axis, _) = _examples(reached) or (0, (0, 0))
  return axis if leaf.ndim and leaf.shape[axis] == n else None


def _as_the_first(u, examples):
  """The noise of the first example for all of them."""
  if examples is None:
    return u
  n, (axis, stride) = examples
  parts = u.reshape(
      *u.shape[:axis], -1, n, stride, *u.shape[axis + 1:])
  first = jax.lax.slice_in_dim(parts, 0, 1, axis=axis + 1)
  return jnp.broadcast_to(first, parts.shape).reshape(u.shape)


def _orthogonal(leaves):
  """Samples at right angles, of length sqrt(dimension): E[u u^T] stays 1.

  `leaves` are pairs of an array [samples, ...] and the axis of examples that it
  has after the first, or None; all together are one direction.
  """
  rows = [
      leaf.reshape(len(leaf), 1, -1) if axis is None else
      jnp.moveaxis(leaf, axis + 1, 1).reshape(len(leaf), leaf.shape[axis + 1], -1)
      for leaf, axis in leaves]
  joined = jnp.concatenate(rows, axis=2)
  # Half precision is too coarse to take parts of a vector away twice.
  joined = joined.astype(jnp.promote_types(joined.dtype, jnp.float32))
  samples, _, size = joined.shape
  if samples > size:
    raise ValueError(
        f'`samples` must be at most {size}, the number of entries of one '
        f"direction, for directions='orthogonal', got {samples}.")
  joined = orthonormal(joined) * size**.5
  result, first = [], 0
  for row, (leaf, axis) in zip(rows, leaves):
    part = joined[:, :, first:first + row.shape[2]]
    first += row.shape[2]
    part = part.astype(leaf.dtype)
    if axis is None:
      result.append(part.reshape(leaf.shape))
    else:
      moved = jnp.moveaxis(leaf, axis + 1, 1).shape
      result.append(jnp.moveaxis(part.reshape(moved), 1, axis + 1))
  return result


def orthonormal(x: base.Array) -> base.Array:
  """Vectors at right angles, of length 1, that span what the first ones do.

  Gram-Schmidt, each vector cleared of those before it twice. Independent normal
  entries give a frame that is uniform over all rotations, as the Q of a QR
  decomposition is whose R has a positive diagonal. `jnp.linalg.qr` itself hangs
  on CPUs where two of them run at once in one program.

  Args:
    x: `[vectors, batch, size]`, at least as many entries as vectors.

  Returns:
    The same shape.

  Example:
    >>> orthonormal(jnp.array([[[3., 0.]], [[4., 5.]]])).tolist()
    [[[1.0, 0.0]], [[0.0, 1.0]]]
  """
  product = functools.partial(jnp.einsum, precision='highest')

  def unit(v):  # A vector of zeros stays one.
    length = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return v / jnp.where(length > 0, length, 1)

  def add(done, new):
    i, v = new
    v = unit(v)
    for _ in range(2):
      v = unit(v - product('nk,knd->nd', product('knd,nd->nk', done, v), done))
    place = jnp.arange(len(x)).reshape(-1, 1, 1) == i
    return jnp.where(place, v, done), None

  return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(len(x)), x))[0]


def _place(call):
  """What the noise of a call is named."""
  return f'{call.name}/call_{call.index}'.removeprefix('/')


def _after(first, tree):
  """`tree`, no earlier than `first` is there (None: at once).

  What is made of it is not merged with what was made before. A barrier of XLA's
  would not do: on a CPU it is gone before the order is chosen.
  """
  total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(first)
              if leaf.dtype != jax.dtypes.float0)
  never = jnp.isnan(total) & jnp.isinf(total)  # XLA does not see through it.

  def wait(leaf):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.where(never, jnp.zeros_like(leaf), leaf)
    return jax.random.wrap_key_data(
        wait(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))

  return tree if first is None else jax.tree.map(wait, tree)


def _learned(call, teach):
  """A call's output, whose derivative by its parameters is its update already.

  `teach(out)` is what it learns from. Nothing that follows begins before.
  """
  apply = lambda params, inputs: call.unit(params, inputs)[1]

  def forward(params, inputs):
    out, pull = jax.vjp(apply, params, inputs)
    updates = pull(teach(out))
    return _after(updates[0], out), updates

  place = jax.custom_vjp(apply)
  place.defvjp(forward, lambda updates, _: updates)
  return place(call.params, call.inputs)


@jax.custom_jvp
def _stepped(x, step, u):
  """`x`, which a `step` would change by `step * u`."""
  del step, u
  return x


@_stepped.defjvp
def _stepped_jvp(primals, tangents):
  x, step, u = primals
  tangent = tangents[0] + tangents[1].astype(x.dtype) * u
  # Otherwise XLA may run ahead on `x`, and keep what the tangents wait for.
  return _after(tangent, x), tangent


@jax.custom_jvp
def _perturbed(x: base.Array, zero: base.Array) -> base.Array:
  """`x + zero`; a tangent of `zero` is read no earlier than `x` is there."""
  return x + zero


@_perturbed.defjvp
def _perturbed_jvp(primals, tangents):
  x, zero = primals
  tangent, u = tangents
  # Otherwise XLA writes out all the signs of a step at its start: as much memory
  # as all the activations, where their bits take a thirty-second of it.
  late = jnp.where(jnp.isnan(x), x, u)
  return _perturbed(x, zero), tangent + late


def gaussian(key: base.Key, arrays: list[base.Array]) -> list[base.Array]:
  """Standard normal tangents, one in the shape of each array.

  Example:
    >>> u, = gaussian(jax.random.key(0), [jnp.zeros((2, 3))])
    >>> u.shape
    (2, 3)
  """
  return [draw(None) for draw in gaussian_apart(key, arrays)]


def gaussian_apart(key, arrays):
  """What draws each of them, when it is called with what it is to wait for."""
  keys = jax.random.split(key, max(len(arrays), 1))

  def draw(key, x, wait):
    return jax.random.normal(
        _after(wait, key), x.shape, x.dtype, out_sharding=sharding(x))

  return [functools.partial(draw, k, x) for k, x in zip(keys, arrays)]


def rademacher(key: base.Key, arrays: list[base.Array]) -> list[base.Array]:
  """Tangents of random signs, one in the shape of each array.

  A random bit for each sign, where `jax.random.rademacher` takes 32: on a CPU
  the bits would cost more than the products that they go into.

  Example:
    >>> u, = rademacher(jax.random.key(0), [jnp.zeros((2, 3))])
    >>> jnp.abs(u).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
  """
  return [draw(None) for draw in rademacher_apart(key, arrays)]


def rademacher_apart(key, arrays):
  """As `gaussian_apart`; the bits are drawn together."""
  sizes = [-(-x.size // _WORD) for x in arrays]
  words = random_bits.words(key, sum(sizes))
  # One bit of all words, then the next: signs lie in memory as the words do.
  place = jax.lax.broadcasted_iota(jnp.uint32, (_WORD, 1), 0)

  def draw(first, size, x, wait):
    bits = (_after(wait, words[first:first + size]) >> place) & 1
    sign = (2 * bits.reshape(-1)[:x.size].astype(x.dtype) - 1).reshape(x.shape)
    explicit = sharding(x)
    return jax.sharding.reshard(sign, explicit) if explicit else sign

  firsts = itertools.accumulate(sizes, initial=0)
  return [functools.partial(draw, *which)
          for which in zip(firsts, sizes, arrays)]


def sharding(x: base.Array) -> Any:
  """The mesh axes of `x` where they are explicit, else None."""
  return trace_lib.explicit(jax.typeof(x))
