"""The perturbation engine: learning from directional derivatives.

Every module that owns parameters, norms included, puts a tangent on its output.
One linearised forward pass gives the change of each example's loss along it,
and each module's own, local VJP turns that into an update. No error travels
backwards between modules: a barrier after each of them stops it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from bpjax import base
from bpjax import checks
from bpjax import credit
from bpjax import feedback as feedback_lib
from bpjax import linen
from bpjax import paths
from bpjax import random_bits
from bpjax import reduction as reduction_lib
import jax
import jax.numpy as jnp

_WORD = 32  # Bits.
Directions = Callable[[base.Key, list[base.Array]], list[base.Array]]


@dataclasses.dataclass(frozen=True)
class Rule(feedback_lib.NoFeedback):
  """A learning rule of the perturbation engine.

  Attributes:
    name: the rule's name.
    backward: `(unit, params, feedback, activations, signal) -> Credit` of one
      unit, with `signal.teaching` the perturbation times the change of loss.
    directions: `(key, arrays) -> tangents`, one in the shape of each.
    perturb: 'activity' (module outputs) or 'weight' (parameters).
    samples: how many directions each update averages over.
    loop: whether samples are taken one after the other.
    exact_readout: whether the output unit keeps its own exact gradient.
    mask: which neurons learn (`bpjax.bottleneck`), or None for all.
    orthogonal: whether the samples' directions are at right angles.
    epsilon: the step of finite differences; 0: exact derivatives.
    antithetic: whether these are taken to both sides.
    signs: whether directions have no entries but 1 and -1.
    noise: None for what `perturb` has by itself; 'shared' for activity noise
      that all examples share, 'independent' for weight noise that none do.
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

  def init(self, key, net, variables, x) -> dict[str, Any]:
    """The rule's feedback: none, {}. Checks that it can train the network."""
    del key
    self.check(net.survey(variables, x))
    return {}

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    checks.check_visible(survey)
    for unit in () if self.epsilon else survey.blocked:
      raise ValueError(
          f'a perturbation of unit `{unit}` cannot change the loss under '
          f'`{self.name}`: an activation between it and the output has a '
          'derivative that is zero everywhere (sign, round, a comparison); use '
          'a smooth activation, or finite differences, `epsilon=1e-3`.')
    checks.check_lists(survey, 'noise', f'rule `{self.name}`')
    for name, info in survey.units.infos.items():
      if self.exact_readout and info.is_output and info.calls > 1:
        raise ValueError(
            f'the readout `{name}` is called {info.calls} times, so that it has '
            'no gradient of its own; use `exact_readout=False`.')
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
    units = net.survey(variables, x).units
    trained = {}
    for name, info in units.infos.items():
      if info.kind == base.BOUNDARY:
        continue  # Noise passes it as if it were not there.
      exact = self.exact_readout and info.is_output
      trained[name] = 'exact gradient (readout)' if exact else self.name
    return trained | {p: self.name for p in units.exact}

  def predict(self, net: linen.Network) -> Callable[..., Any]:
    """`(variables, x) -> output` in evaluation mode."""
    return net.apply

  def bind(self, net: linen.Network) -> Callable[..., Any]:
    """Raises: no function's reverse derivative is this rule."""
    raise ValueError(
        f'`bind` needs a rule that is linear in the error, and `{self.name}` '
        'perturbs the forward pass; use `rule.value_and_grad(net, loss)`.')

  def value_and_grad(
      self, net: linen.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """As `bpjax.credit.Rule.value_and_grad`; `learn` needs a `key` here."""
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      value, aux, grads, count, _ = self.differentiate(
          net, variables, x, key, Whole(loss, y))
      grads, = reduction_lib.apply(reduction, (grads,), count)
      return (value, aux), (grads, jax.tree.map(jnp.zeros_like, feedback))

    return learn

  def infos(self, net, variables, x):
    """Unit -> what the rule knows of it before any data."""
    return net.survey(variables, x).units.infos

  def signals(
      self, net, loss, variables, feedback, x, y, key, judge=None):
    """As `bpjax.credit.Rule.signals`; a readout that is exact has none."""
    del feedback
    _, _, grads, count, signals = self.differentiate(
        net, variables, x, key, judge or Whole(loss, y))
    return jax.tree.map(lambda g: g / count, grads), signals

  def differentiate(self, net, variables, x, key, judge):
    """The engine: one linearised forward pass, `samples` directions.

    Args:
      net: the network.
      variables: its variables.
      x: its input.
      key: a random key.
      judge: what counts as a change, and for which module; such as `Whole`.

    Returns:
      value, aux, the summed updates, the number of losses, and the teaching
      signals (a collection: the perturbation times the change of the loss at
      every module's output).
    """
    if key is None:
      raise ValueError(
          f'`key` is needed: rule `{self.name}` draws its directions; pass '
          '`key=jax.random.key(...)`.')
    survey = net.survey(variables, x)
    self.check(survey)
    if self.noise == 'independent':
      return self._by_example(net, variables, x, key, judge)
    model_key, direction_key = credit.split(key)
    plan = Plan(self, net, survey, variables, x, model_key)
    params = variables['params']

    def forward(params, noise, net=net):
      output, outputs, state, active = plan.run(params, noise, net)
      return (judge.measure(output), outputs), (output, state, active)

    def perturbed_forward(noise, perturbed):
      # Reverse derivatives, cut off at the barriers, see each module's own
      # parameters; forward ones see the noise and the perturbed parameters.
      (measured, _), pull, aux = jax.vjp(
          lambda p: forward({**p, **perturbed}, noise), plan.flat(params),
          has_aux=True)
      return measured, (measured, pull, aux)

    if self.epsilon:
      measured, (_, pull, aux) = perturbed_forward(plan.noise, plan.perturbed)
      still = judge.held(net, measured)
      moved = lambda n, p: forward(
          {**plan.flat(params), **p}, n, still)[0][0]
      push = self._differences(moved, measured, plan, judge)
    else:
      measured, push, (_, pull, aux) = jax.linearize(
          perturbed_forward, plan.noise, plan.perturbed, has_aux=True)
    *aux, active = aux
    losses, error = judge.settle(measured)
    change = push if self.epsilon else lambda u, v: judge.locate(push(u, v))

    def sample(directions):
      u, v = directions
      u = plan.where_active(u, active)
      teaching, grads = judge.teach(plan, u, v, change(u, v))
      pulled, = pull((jax.tree.map(jnp.zeros_like, measured), teaching))
      return {**pulled, **grads}, teaching

    if self.samples == 1:
      grads, teaching = sample(plan.draw(direction_key, judge))
    elif self.loop:
      grads, teaching = self._in_turn(
          sample, plan, direction_key, judge)
    else:
      grads, teaching = jax.tree.map(
          lambda g: jnp.mean(g, axis=0),
          jax.vmap(sample)(plan.draw(direction_key, judge)))
    if self.exact_readout:
      nothing = jax.tree.map(jnp.zeros_like, plan.noise)
      exact, = pull((error, nothing))
      exact, = plan.masked((exact,))
      grads = {k: exact[k] if plan.is_readout(k) else g
               for k, g in grads.items()}
    grads = jax.tree.unflatten(
        jax.tree.structure(params), [grads[k] for k in plan.names])
    return jnp.mean(losses), base.Aux(*aux), grads, losses.size, teaching

  def _in_turn(self, sample, plan, key, judge):
    """The mean of the samples, of which one is held at a time."""
    if self.orthogonal:  # They have to be known together.
      items, draw = plan.draw(key, judge), lambda directions: directions
    else:
      items, draw = jax.random.split(key, self.samples), plan.draw_one
    at = lambda i: sample(draw(jax.tree.map(lambda a: a[i], items)))
    total = jax.lax.fori_loop(
        1, self.samples, lambda i, total: jax.tree.map(jnp.add, total, at(i)),
        at(0))
    return jax.tree.map(lambda g: g / self.samples, total)

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


class Whole:
  """The loss of the model's output: how much each example's changes.

  Another judge has the same methods (`bpjax.local`).
  """

  def __init__(self, loss, y):
    self._loss, self.y = loss, y

  def of(self, y: Any) -> Whole:
    """The same for other labels."""
    return Whole(self._loss, y)

  def measure(self, output: Any) -> Any:
    """What is differentiated: here the losses."""
    losses = self._loss(output, self.y)
    reduction_lib.check_losses(losses, output)
    return losses

  def settle(self, measured: Any) -> tuple[base.Array, Any]:
    """The losses of the output, and the error of what is measured."""
    return measured, jnp.ones_like(measured)

  def locate(self, change: Any) -> Any:
    """The losses' change, from the derivative of what is measured."""
    return change

  def held(self, net: Any, measured: Any) -> Any:
    """The network that differences are taken of: no stop inside, so the same."""
    del measured
    return net

  def compare(self, here: Any, there: Any) -> Any:
    """The losses at another place than the one measured."""
    del here
    return there

  def teach(self, plan: Plan, u: Any, v: Any, change: Any) -> tuple[Any, Any]:
    """The perturbation of each module times its change, and that of weights."""
    change = jnp.sum(change.reshape(change.shape[0], -1), axis=1)
    total = jnp.sum(change)
    return plan.teaching(u, change), {
        k: total.astype(t.dtype) * t for k, t in v.items()}

  def group(self, plan: Plan, kind: str, name: str) -> Any:
    """What is the same for directions that one loss hears of together."""
    del plan, name
    return kind


class Plan:
  """Which module and which parameter is perturbed, for one shape of input.

  `noise` holds a zero for each perturbed output, in a Flax collection: each
  module reads its own and leaves its output in its place, so that the returned
  collection has the same structure.
  """

  def __init__(self, rule, net, survey, variables, x, key):
    self._rule, self._net, self._x, self._key = rule, net, x, key
    self._state = {c: v for c, v in variables.items() if c != 'params'}
    self.params = variables['params']
    self._units = tuple(survey.units)
    self._readout = next(
        (n for n, i in survey.units.infos.items() if i.is_output), None)
    self._coupled = bool(survey.batch_coupled)
    self._owners, self._behind = set(), set()
    batch = jax.tree.leaves(x)[0].shape[0]
    shapes = self._noise_shapes(x)
    larger = self._noise_shapes(jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((batch + 1, *a.shape[1:]), a.dtype), x))
    self._batch_axes = jax.tree.map(
        lambda a, b: next(
            (i for i, sizes in enumerate(zip(a.shape, b.shape))
             if sizes == (batch, batch + 1)), -1), shapes, larger)
    checks.check_calls(survey, shapes)
    self.noise = jax.tree.map(credit.zeros_like_output, shapes)
    self.names = paths.leaf_names(self.params)
    # What no perturbed output can teach is perturbed itself.
    self.perturbed = {
        k: p for k, p in self.flat(self.params).items()
        if not self.is_readout(k) and (
            rule.perturb == 'weight'
            or not any(_inside(k, owner) for owner in self._owners))}

  def flat(self, params):
    return dict(zip(self.names, jax.tree.leaves(params)))

  def is_readout(self, name):
    """Whether a module or parameter keeps its exact gradient."""
    if not self._rule.exact_readout or self._readout is None:
      return False
    return any(_inside(name, m) for m in (self._readout, *self._behind))

  def run(self, params, noise, net=None):
    """The model's output, each perturbed output, the state, what is active."""

    def visit(call):
      out = call.original()
      if call.name not in self._owners or self.is_readout(call.name):
        return out
      zero = call.read('noise', 'call')
      if zero is None:  # Weights are perturbed, and their updates need no VJP.
        return out
      call.write('noise', out, 'call')
      return _perturbed(_barrier(out), zero)

    params = jax.tree.unflatten(
        jax.tree.structure(self.params), [params[k] for k in self.names])
    output, variables = (net or self._net).run(
        {'params': params, 'noise': noise, **self._state}, self._x, visit,
        self._key, [*self._state, 'noise', base.ACTIVE], owners=True)
    state = {c: variables[c] for c in self._state}
    active = variables.get(base.ACTIVE, {})
    return output, variables.get('noise', {}), state, active

  def where_active(self, u, active):
    """The noise `u` with 0 where a rectifier is known to send none of it on."""
    calls = collections.Counter(
        name.rpartition('/')[0] for name in paths.leaf_names(u))

    def apply(name, leaf):
      owner, _, call = name.rpartition('/')
      known = paths.subtree(active, f'{owner}_{base.ACTIVE}')
      if known is None or len(known) != calls[owner]:
        return leaf
      known = known[int(call.rpartition('_')[2])]
      return jnp.where(known, leaf, 0) if known.shape == leaf.shape else leaf

    return paths.map_with_name(apply, u) if active else u

  def draw(self, key, judge):
    """Tangents for the noise and the perturbed parameters.

    More samples than one are on a new first axis.
    """
    if self._rule.orthogonal:
      return self._draw_orthogonal(key, judge)
    if self._rule.samples == 1:
      return self.draw_one(key)
    return jax.vmap(self.draw_one)(
        jax.random.split(key, self._rule.samples))

  def draw_one(self, key):
    """The same for one of several samples, of which no other is read."""
    return self.masked(self._drawn(key))

  def _drawn(self, key):
    leaves, structure = jax.tree.flatten((self.noise, self.perturbed))
    u, v = jax.tree.unflatten(structure, self._rule.directions(key, leaves))
    if self._rule.noise == 'shared':
      u = jax.tree.map(_as_the_first, u, self._batch_axes)
    return u, v

  def _draw_orthogonal(self, key, judge):
    """Directions at right angles, example by example and loss by loss."""
    tree = (self.noise, self.perturbed)
    drawn = jax.vmap(self._drawn)(jax.random.split(key, self._rule.samples))
    names = paths.leaf_names(tree)
    axes = [*jax.tree.leaves(self._batch_axes), *[-1] * len(self.perturbed)]
    groups = {}
    for i, (name, axis) in enumerate(zip(names, axes)):
      place, _, name = name.partition('/')
      kind = 'weight' if place == '1' else 'shared' if axis < 0 else 'example'
      group = (kind, judge.group(self, kind, name))
      groups.setdefault(group, []).append(i)
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

  def masked(self, trees):
    """Trees named by units, with 0 for the neurons that do not learn."""
    return tuple(map(self._masked, trees))

  def _masked(self, tree):
    if self._rule.mask is None:
      return tree

    def apply(name, leaf):
      owner = next((u for u in self._units if name.startswith(u + '/')), None)
      return leaf if owner is None else self._rule.mask.apply(owner, leaf)

    return paths.map_with_name(apply, tree)

  def teaching(self, u, change):
    """The perturbation times the change of loss: of its example, or of all."""
    total = jnp.sum(change)

    def multiply(u, axis):
      if axis < 0 or self._coupled:
        return self.product(u, total)
      shape = [1] * u.ndim
      shape[axis] = -1
      return self.product(u, change.reshape(shape))

    return jax.tree.map(multiply, u, self._batch_axes)

  def product(self, u, change):
    """`u * change`, which broadcasts to `u`."""
    change = change.astype(u.dtype)
    if not self._rule.signs:
      return u * change
    # A product would be fused into the sums that read it, and its operands, all
    # the signs of a step, be written out at its start; a choice is made late.
    return jnp.where(u > 0, change, jnp.where(u < 0, -change, 0))

  def _noise_shapes(self, x):
    """The shape of every output to perturb; notes the modules seen."""
    before = []

    def visit(call):
      out = call.original()
      if hasattr(out, 'dtype') and jnp.issubdtype(out.dtype, jnp.inexact):
        if any(map(self.is_readout, before)):
          self._behind.add(call.name)  # A norm of the readout's output, say.
        before.append(call.name)
        self._owners.add(call.name)
        if self._rule.perturb == 'activity' and not self.is_readout(call.name):
          call.write('noise', jnp.zeros_like(out), 'call')
      return out

    def trace(params, state, x, key):
      return self._net.run(
          {'params': params, **state}, x, visit, key, [*state, 'noise'],
          owners=True)[1].get('noise', {})

    return jax.eval_shape(trace, self.params, self._state, x, self._key)


def _as_the_first(u, axis):
  """The noise of the first example for all of them."""
  if axis < 0:
    return u
  return jnp.broadcast_to(jax.lax.slice_in_dim(u, 0, 1, axis=axis), u.shape)


def _inside(name, module):
  return module == '' or name == module or name.startswith(module + '/')


def _orthogonal(leaves):
  """Samples at right angles, of length sqrt(dimension): E[u u^T] stays 1.

  `leaves` are pairs of an array [samples, ...] and the axis of examples that it
  has after the first, or None; all together are one direction.
  """
  rows = [
      leaf.reshape(len(leaf), 1, -1) if axis is None else
      jnp.moveaxis(leaf, axis + 1, 1).reshape(len(leaf), leaf.shape[axis + 1], -1)
      for leaf, axis in leaves]
  joined = jnp.moveaxis(jnp.concatenate(rows, axis=2), 0, 2)
  # There is no QR decomposition in less than single precision.
  joined = joined.astype(jnp.promote_types(joined.dtype, jnp.float32))
  *_, size, samples = joined.shape
  if samples > size:
    raise ValueError(
        f'`samples` must be at most {size}, the number of entries of one '
        f"direction, for directions='orthogonal', got {samples}.")
  q, r = jnp.linalg.qr(joined)
  # Signs as those of what was drawn: uniform over all rotations.
  signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
  joined = jnp.moveaxis(q * signs[..., None, :] * size**.5, 2, 0)
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


@jax.custom_vjp
def _barrier(x: base.Array) -> base.Array:
  """Passes tangents on, and lets no cotangent back."""
  return x


_barrier.defvjp(lambda x: (x, x), lambda x, _: (jnp.zeros_like(x),))


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
  keys = jax.random.split(key, max(len(arrays), 1))
  return [
      jax.random.normal(k, x.shape, x.dtype, out_sharding=sharding(x))
      for k, x in zip(keys, arrays)]


def rademacher(key: base.Key, arrays: list[base.Array]) -> list[base.Array]:
  """Tangents of random signs, one in the shape of each array.

  A random bit for each sign, where `jax.random.rademacher` takes 32: on a CPU
  the bits would cost more than the products that they go into.

  Example:
    >>> u, = rademacher(jax.random.key(0), [jnp.zeros((2, 3))])
    >>> jnp.abs(u).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
  """
  sizes = [-(-x.size // _WORD) for x in arrays]
  words = random_bits.words(key, sum(sizes))
  # One bit of all words, then the next: signs lie in memory as the words do.
  place = jax.lax.broadcasted_iota(jnp.uint32, (_WORD, 1), 0)
  signs, first = [], 0
  for x, size in zip(arrays, sizes):
    bits = (words[first:first + size] >> place) & 1
    first += size
    sign = (2 * bits.reshape(-1)[:x.size].astype(x.dtype) - 1).reshape(x.shape)
    explicit = sharding(x)
    signs.append(jax.sharding.reshard(sign, explicit) if explicit else sign)
  return signs


def sharding(x: base.Array) -> Any:
  """The mesh axes of `x` where they are explicit, else None."""
  own = jax.typeof(x).sharding
  explicit = jax.sharding.AxisType.Explicit in own.mesh.axis_types
  return own if explicit else None
