"""The local engine: every block learns from its own loss, and from no other."""

from collections.abc import Callable
import functools

from absl.testing import parameterized
import bpjax
from bpjax.local import losses as local_losses
from flax import nnx
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

LOSS = bpjax.losses.softmax_cross_entropy
RULES = bpjax.rules


class Block(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(self.width)(x))
    return nn.LayerNorm()(nn.tanh(nn.Dense(self.width)(x)))


class Net(nn.Module):
  """A stem, blocks, and a readout."""
  blocks: int = 2
  skip: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(5, name='stem')(x)
    for i in range(self.blocks):
      out = Block(5, name=f'block_{i}')(x)
      x = x + out if self.skip else out
    return nn.Dense(3, name='readout')(x)


def setup(model=None, shape=(4, 6), **kwargs):
  x = jax.random.normal(jax.random.key(0), shape)
  net, variables, x = float64.setup(model or Net(), x, **kwargs)
  return net, variables, x, jnp.arange(len(x)) % 3


def learn(rule, net, variables, x, y, feedback=None, key=3, **kwargs):
  if feedback is None:
    feedback = float64.doubles(rule.init(jax.random.key(2), net, variables, x))
  (value, aux), grads = jax.jit(rule.value_and_grad(net, LOSS, **kwargs))(
      variables, feedback, x, y, jax.random.key(key))
  return value, aux, *grads, feedback


def losses(params, heads, x, y, model=None, stop=True, detach=True, branch=False):
  """The sum of all mean losses, written out for `Net`."""
  model = model or Net()
  cut = lambda x, now: jax.lax.stop_gradient(x) if now else x
  apply = lambda module, name, x: module.apply({'params': params[name]}, x)
  total = 0.
  x = apply(nn.Dense(5), 'stem', x)
  for i in range(model.blocks):
    name = f'block_{i}'
    out = apply(Block(5), name, cut(x, branch))
    if name in heads:
      total += jnp.mean(LOSS(out @ heads[name]['kernel'] + heads[name]['bias'], y))
    out = cut(out, detach if i == model.blocks - 1 else stop)
    x = x + out if model.skip else out
  return total + jnp.mean(LOSS(apply(nn.Dense(3), 'readout', x), y))


class BackpropTest(float64.Float64TestCase):

  @parameterized.parameters(
      (dict(), dict()),
      (dict(stop='none'), dict(stop=False)),
      (dict(stop='none', readout='joined'), dict(stop=False, detach=False)),
      (dict(readout='joined'), dict(detach=False)))
  def test_is_the_gradient_of_the_local_losses(self, arguments, written):
    net, variables, x, y = setup()
    rule = bpjax.local(RULES.backprop(), ['block_*'], **arguments)
    value, aux, grads, feedback_grads, feedback = learn(
        rule, net, variables, x, y)
    self.assertEqual(set(feedback), {'rule', 'heads'})
    joined = arguments.get('readout') == 'joined'
    self.assertEqual(
        list(feedback['heads']), ['block_0'] if joined else
        ['block_0', 'block_1'])
    expected, heads = jax.jit(jax.grad(
        functools.partial(losses, **written), (0, 1)))(
            variables['params'], feedback['heads'], x, y)
    self.assert_close(grads, expected, 1e-14)
    self.assert_close(feedback_grads['heads'], heads, 1e-14)
    output = net.apply(variables, x)
    self.assertAlmostEqual(float(value), float(LOSS(output, y).mean()), 12)
    np.testing.assert_allclose(aux.output, output, atol=1e-14)

  def test_a_later_block_changes_nothing(self):
    net, variables, x, y = setup()
    rule = bpjax.local(RULES.backprop(), ['block_*'])
    feedback = rule.init(jax.random.key(2), net, variables, x)
    step = rule.value_and_grad(net, LOSS)

    def first(later):
      params = {**variables['params'], **later}
      grads = step({'params': params}, feedback, x, y)[1][0]
      return grads['stem'], grads['block_0']

    later = {n: variables['params'][n] for n in ('block_1', 'readout')}
    tangent = jax.tree.map(jnp.ones_like, later)
    _, change = jax.jit(lambda t: jax.jvp(first, (later,), (t,)))(tangent)
    for leaf in jax.tree.leaves(change):
      self.assertFalse(np.any(leaf))
    # And the readout's loss none of theirs.
    grads = learn(rule, net, variables, x, y, feedback)[2]
    other = {'params': {**variables['params'], 'readout': jax.tree.map(
        lambda p: 2 * p + 1, variables['params']['readout'])}}
    moved = learn(rule, net, other, x, y, feedback)[2]
    for name in ('stem', 'block_0', 'block_1'):
      self.assert_close(grads[name], moved[name], 0)

  @parameterized.parameters(
      'backprop', 'feedback_alignment', 'direct_feedback_alignment')
  def test_one_block_without_a_head_is_the_global_rule(self, name):
    net, variables, x, y = setup(Net(blocks=1))
    rule = RULES.get(name)()
    _, _, plain, plain_feedback, feedback = learn(rule, net, variables, x, y)
    whole = bpjax.local(rule, ['block_0'], readout='joined')
    _, _, grads, feedback_grads, _ = learn(
        whole, net, variables, x, y, {'rule': feedback, 'heads': {}})
    self.assert_close(grads, plain, 1e-15)
    self.assert_close(feedback_grads['rule'], plain_feedback, 1e-15)

  def test_stop_every_and_overlap(self):
    model = Net(blocks=4)
    net, variables, x, y = setup(model)
    backprop = RULES.backprop()
    feedback = None
    grads = {}
    for name, arguments in dict(
        one=dict(stop_every=2, stop_remainder=0), two=dict(stop_every=2),
        both=dict(stop='overlap'), each=dict()).items():
      rule = bpjax.local(backprop, ['block_*'], **arguments)
      _, _, grads[name], heads, feedback = learn(
          rule, net, variables, x, y, feedback)
      if name == 'one':
        first = heads
      self.assert_close(heads, first, 1e-14)

    def pairs(params, stops):
      hidden = nn.Dense(5).apply({'params': params['stem']}, x)
      total = 0.
      for i in range(4):
        hidden = Block(5).apply({'params': params[f'block_{i}']}, hidden)
        head = feedback['heads'][f'block_{i}']
        total += jnp.mean(LOSS(hidden @ head['kernel'] + head['bias'], y))
        if i in stops:
          hidden = jax.lax.stop_gradient(hidden)
      return total

    for name, stops in dict(one=(0, 2, 3), two=(1, 3)).items():
      expected = jax.jit(jax.grad(functools.partial(pairs, stops=stops)))(
          variables['params'])
      for part in ('stem', 'block_0', 'block_1', 'block_2', 'block_3'):
        self.assert_close(grads[name][part], expected[part], 1e-14)
    # The readout has one loss in either pass, and learns from it once.
    self.assert_close(grads['both'].pop('readout'), grads['one'].pop('readout'),
        1e-14)
    del grads['two']['readout']
    self.assert_close(
        grads['both'], jax.tree.map(jnp.add, grads['one'], grads['two']), 1e-14)

  def test_blocks_that_are_not_called_in_the_order_of_their_names(self):

    class Backwards(nn.Module):

      @nn.compact
      def __call__(self, x):
        for name in ('second', 'first'):
          x = nn.tanh(nn.Dense(6, name=name)(x))
        return nn.Dense(3, name='readout')(x)

    net, variables, x, y = setup(Backwards())
    rule = bpjax.local(
        bpjax.rules.forward_gradient(), ['second', 'first'], placement='group',
        groups=2)
    feedback = rule.init(jax.random.key(2), net, variables, x)
    own = rule.value_and_grad(net, LOSS)
    key = jax.random.key(1)
    outside = jax.jit(lambda: own(variables, feedback, x, y, key))()
    self.assert_close(
        jax.jit(own)(variables, feedback, x, y, key), outside, 1e-12)

  def test_branch_only(self):
    model = Net(blocks=2, skip=True)
    net, variables, x, y = setup(model)
    rule = bpjax.local(
        RULES.backprop(), ['block_*'], stop='branch',
        branches=['block_*/Dense_0'], readout='joined')
    _, _, grads, _, feedback = learn(rule, net, variables, x, y)
    expected = jax.jit(jax.grad(functools.partial(
        losses, model=model, stop=False, detach=False, branch=True)))(
            variables['params'], feedback['heads'], x, y)
    self.assert_close(grads, expected, 1e-14)
    self.assertGreater(np.abs(grads['stem']['kernel']).max(), 1e-3)


class FeedbackTest(float64.Float64TestCase):

  def test_ports_read_the_error_of_their_block(self):
    net, variables, x, y = setup()
    rule = bpjax.local(RULES.direct_feedback_alignment(), ['block_*'])
    _, _, grads, feedback_grads, feedback = learn(
        rule, net, variables, x, y, reduction='sum')
    own = feedback['rule']
    self.assertEqual(
        bpjax.paths.leaf_names(own),
        ['block_0/Dense_0', 'block_0/Dense_1', 'block_1/Dense_1'])
    params, heads = variables['params'], feedback['heads']
    hidden = nn.Dense(5).apply({'params': params['stem']}, x)
    for i in range(2):
      part, head = params[f'block_{i}'], heads[f'block_{i}']
      below = hidden
      hidden = Block(5).apply({'params': part}, below)
      error = jax.nn.softmax(hidden @ head['kernel'] + head['bias'])
      error = error - jax.nn.one_hot(y, 3)
      first = nn.tanh(nn.Dense(5).apply({'params': part['Dense_0']}, below))
      taught = error @ own[f'block_{i}']['Dense_1'] * (1 - first**2)
      np.testing.assert_allclose(
          grads[f'block_{i}']['Dense_0']['kernel'], below.T @ taught, atol=1e-13)
      np.testing.assert_allclose(
          feedback_grads['heads'][f'block_{i}']['kernel'], hidden.T @ error,
          atol=1e-13)
      if i == 0:
        np.testing.assert_allclose(
            grads['stem']['kernel'], x.T @ (error @ own['block_0']['Dense_0']),
            atol=1e-13)

  def test_feedback_in_place_of_the_weights_is_backprop(self):
    net, variables, x, y = setup()
    rule = bpjax.local(RULES.feedback_alignment(), ['block_*'])
    *_, feedback = learn(rule, net, variables, x, y)
    # Block 1 begins behind a stop: its first layer sends nothing.
    self.assertEqual(
        list(feedback['rule']), ['block_0', 'block_1'])
    self.assertEqual(list(feedback['rule']['block_1']), ['Dense_1'])
    same = {n: {k: {'kernel': variables['params'][n][k]['kernel']} for k in part}
            for n, part in feedback['rule'].items()}
    feedback = {**feedback, 'rule': same}
    _, _, grads, _, _ = learn(rule, net, variables, x, y, feedback)
    exact = bpjax.local(RULES.backprop(), ['block_*'])
    _, _, expected, _, _ = learn(
        exact, net, variables, x, y, {**feedback, 'rule': {}})
    self.assert_close(grads, expected, 1e-14)
    mask = rule.trainable(feedback)
    self.assertTrue(all(jax.tree.leaves(mask['heads'])))
    self.assertFalse(any(jax.tree.leaves(mask['rule'])))

  def test_targets_within_each_block(self):
    class Pair(nn.Module):

      @nn.compact
      def __call__(self, x):
        for width in (5, 4):
          x = bpjax.nn.Layer(functools.partial(nn.Dense, width), nn.tanh)(x)
        return x

    class Targets(nn.Module):

      @nn.compact
      def __call__(self, x):
        for i in range(2):
          x = Pair(name=f'block_{i}')(x)
        return nn.Dense(3, name='readout')(x)

    net, variables, x, y = setup(Targets())
    beta = .1
    rule = bpjax.local(
        RULES.local_representation_alignment(beta=beta), ['block_*'])
    _, _, grads, _, feedback = learn(rule, net, variables, x, y, reduction='sum')
    self.assertEqual(
        bpjax.paths.leaf_names(feedback['rule']),
        [f'block_{i}/Layer_1/affine/kernel' for i in range(2)])
    hidden = x
    for i in range(2):
      params = variables['params'][f'block_{i}']
      head = feedback['heads'][f'block_{i}']
      inputs, pres = hidden, []
      for k in range(2):
        layer = params[f'Layer_{k}']['affine']
        pres.append(hidden @ layer['kernel'] + layer['bias'])
        below, hidden = hidden, jnp.tanh(pres[-1])
      error = jax.nn.softmax(hidden @ head['kernel'] + head['bias'])
      taught = (error - jax.nn.one_hot(y, 3)) @ head['kernel'].T
      taught *= 1 - hidden**2  # The error of the last pre-activation.
      wires = feedback['rule'][f'block_{i}']['Layer_1']['affine']['kernel']
      target = jnp.tanh(pres[0] - beta * taught @ wires.T)
      np.testing.assert_allclose(
          grads[f'block_{i}']['Layer_1']['affine']['kernel'], below.T @ taught,
          atol=1e-13)
      np.testing.assert_allclose(
          grads[f'block_{i}']['Layer_0']['affine']['kernel'],
          inputs.T @ (below - target), atol=1e-13)

  def test_alignment(self):
    net, variables, x, y = setup()
    for name in ('direct_feedback_alignment', 'forward_gradient'):
      rule = bpjax.local(RULES.get(name)(), ['block_*'])
      feedback = rule.init(jax.random.key(2), net, variables, x)
      measured = jax.jit(bpjax.alignment(net, LOSS, rule))(
          variables, feedback, x, y, key=jax.random.key(4))
      self.assertAlmostEqual(float(measured['readout'].update), 1, 6)
      self.assertTrue(np.isfinite(measured['block_0/Dense_0'].teaching))


class UnbiasedTestCase(float64.Float64TestCase):

  def assert_unbiased(self, model, x, y, arguments, local, draws=4000, bound=.13):
    """Slope 1 of the mean update on the exact one, within 4 standard errors."""
    net, variables, x = float64.setup(model, x, is_unit=(
        lambda module: isinstance(module, Normed)))
    rule = bpjax.local(RULES.forward_gradient(**arguments), **local)
    exact = bpjax.local(RULES.backprop(), **local)
    feedback = float64.doubles(rule.init(jax.random.key(2), net, variables, x))
    expected, heads = jax.jit(exact.value_and_grad(net, LOSS))(
        variables, feedback, x, y)[1]
    step = rule.value_and_grad(net, LOSS)

    @jax.jit
    def many(keys):
      one = lambda key: step(variables, feedback, x, y, key=key)[1]
      return jax.lax.map(one, keys, batch_size=100)

    grads, own = many(jax.random.split(jax.random.key(5), draws))
    self.assert_close(
        jax.tree.map(lambda g: g[0], own['heads']), heads['heads'], 1e-13)
    for name, leaf, g in zip(
        bpjax.paths.leaf_names(expected), jax.tree.leaves(grads),
        jax.tree.leaves(expected)):
      slopes = jnp.tensordot(leaf, g, g.ndim) / jnp.vdot(g, g)
      error = slopes.std() / np.sqrt(draws)
      self.assertLess(abs(slopes.mean() - 1), 4 * error + 1e-12, name)
      # Not vacuous: a slope of 1/2 would be seen.
      self.assertLess(error, bound, name)


class ForwardGradientTest(UnbiasedTestCase):

  @parameterized.parameters(
      (dict(), dict()), (dict(perturb='weight', samples=4), dict()),
      (dict(), dict(stop='none')))
  def test_mean_is_that_of_backprop(self, arguments, local):
    x = jax.random.normal(jax.random.key(0), (4, 6))
    self.assert_unbiased(
        Net(), x, jnp.arange(4) % 3, arguments, dict(blocks=['block_*'], **local))

  def test_scalars_are_of_each_block(self):
    net, variables, x, y = setup()
    rule = bpjax.local(RULES.forward_gradient(), ['block_*'])
    feedback = rule.init(jax.random.key(2), net, variables, x)
    _, _, grads, _, _ = learn(rule, net, variables, x, y, feedback)
    head = feedback['heads']['block_1']
    other = {**feedback, 'heads': {**feedback['heads'], 'block_1': jax.tree.map(
        lambda h: 3 * h + 1, head)}}
    _, _, moved, _, _ = learn(rule, net, variables, x, y, other)
    self.assert_close(grads['block_0'], moved['block_0'], 0)
    self.assert_close(grads['stem'], moved['stem'], 0)
    self.assertGreater(np.abs(
        grads['block_1']['Dense_0']['kernel']
        - moved['block_1']['Dense_0']['kernel']).max(), 1e-3)


def norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


class Normed(nn.Module):
  """An affine operation and its norm: noise comes after it."""
  affine: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x):
    return norm(self.affine(name='affine')(x))


def normed(name, module, *args):
  return Normed(functools.partial(module, *args), name=name)


class MixerBlock(nn.Module):
  """Tokens, channels, grouped channels."""
  groups: int
  tokens: bool

  @nn.compact
  def __call__(self, x):
    if self.tokens:
      y = norm(x.reshape(*x.shape[:2], -1)).swapaxes(1, 2)
      x = nn.tanh(normed('token', nn.Dense, y.shape[-1])(y)).swapaxes(1, 2)
    y = nn.tanh(normed('channel', nn.Dense, 3 * self.groups)(norm(x)))
    y = norm(y.reshape(*y.shape[:2], self.groups, 3))
    return nn.tanh(normed(
        'group', nn.Einsum, (self.groups, 3, 4), 'npgi,gij->npgj')(y))


class Mixer(nn.Module):
  """Two blocks on patches, [batch, patches, groups, channels of a group]."""
  groups: int = 2

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = MixerBlock(self.groups, i > 0, name=f'block_{i}')(x)
    return nn.Dense(3, name='readout')(x.mean(1).reshape(x.shape[0], -1))


class PlacementTest(UnbiasedTestCase):
  """Losses of patches and groups: less variance, the same mean."""

  def setUp(self):
    super().setUp()
    self.x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    self.y = jnp.arange(3)

  @parameterized.parameters(
      dict(samples=4), dict(perturb='weight', samples=16))
  def test_mean_is_that_of_backprop(self, **arguments):
    self.assert_unbiased(
        Mixer(), self.x, self.y, dict(arguments), dict(
            blocks=['block_*'], placement='group', grouped=True), bound=.3)

  def test_finite_differences_are_close_to_derivatives(self):
    for placement, antithetic in (
        ('block', True), ('patch', False), ('group', True)):
      local = functools.partial(
          bpjax.local, blocks=['block_*'], placement=placement, grouped=True)
      net, variables, x, y = setup(Mixer(), (3, 4, 5))
      results = [
          learn(local(RULES.forward_gradient(**arguments)), net, variables, x, y)
          for arguments in (
              dict(), dict(epsilon=1e-7, antithetic=antithetic))]
      self.assert_close(results[0][2], results[1][2], 1e-6)

  def test_each_perturbation_meets_the_losses_that_it_reaches(self):
    net, variables, x, y = setup(
        Mixer(), (3, 4, 5), is_unit=lambda m: isinstance(m, Normed))
    spread = {}
    for placement in ('block', 'patch', 'group'):
      rule = bpjax.local(
          RULES.forward_gradient(), ['block_*'], placement=placement,
          grouped=True)
      feedback = rule.init(jax.random.key(2), net, variables, x)
      step = rule.value_and_grad(net, LOSS)
      one = lambda key: step(variables, feedback, x, y, key=key)[1][0]  # pylint: disable=cell-var-from-loop
      grads = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=100))(
          jax.random.split(jax.random.key(1), 1000))
      spread[placement] = {
          name: float(jnp.sum(jnp.var(g, axis=0))) for name, g in zip(
              bpjax.paths.leaf_names(grads), jax.tree.leaves(grads))}
    for name in spread['block']:
      if 'readout' in name:
        continue
      block, patch, group = (spread[p][name] for p in spread)
      if name.startswith('block_1/token'):
        # Tokens mix what comes in: noise reaches all groups of its patch.
        self.assertLess(patch, .6 * block, name)
        self.assertBetween(group / patch, .9, 1.1, name)
      else:
        self.assertLess(group, .8 * patch, name)
        self.assertLess(patch, .6 * block, name)


class NnxBlock(nnx.Module):

  def __init__(self, rngs):
    self.first = nnx.Linear(5, 5, rngs=rngs)
    self.second = nnx.Linear(5, 5, rngs=rngs)

  def __call__(self, x):
    return nnx.tanh(self.second(nnx.tanh(self.first(x))))


class NnxNet(nnx.Module):

  def __init__(self, rngs):
    self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
    self.readout = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.readout(x)


class NnxTest(float64.Float64TestCase):

  def test_is_the_gradient_of_the_local_losses(self):
    net = bpjax.from_nnx(NnxNet(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (4, 5), jnp.float64)
    y = jnp.arange(4) % 3
    variables = float64.doubles(net.init(jax.random.key(1), x))
    rule = bpjax.local(
        RULES.backprop(), lambda module: isinstance(module, NnxBlock))
    _, _, grads, _, feedback = learn(rule, net, variables, x, y)
    heads = feedback['heads']
    self.assertEqual(list(heads), ['blocks/0', 'blocks/1'])

    def total(params):
      apply = lambda p, x: x @ p['kernel'] + p['bias']
      hidden, result = x, 0.
      for i in range(2):
        part = params['blocks'][str(i)]
        hidden = jnp.tanh(apply(part['second'], jnp.tanh(
            apply(part['first'], hidden))))
        result += jnp.mean(LOSS(apply(heads[f'blocks/{i}'], hidden), y))
        hidden = jax.lax.stop_gradient(hidden)
      return result + jnp.mean(LOSS(apply(params['readout'], hidden), y))

    expected = jax.jit(jax.grad(total))(variables['params'])
    self.assert_close(grads, expected, 1e-14)
    noisy = bpjax.local(RULES.forward_gradient(), ['blocks/*'])
    _, _, grads, _, _ = learn(
        noisy, net, variables, x, y, {'rule': {}, 'heads': heads})
    self.assert_close(grads['readout'], expected['readout'], 1e-14)
    self.assertGreater(
        np.abs(grads['blocks']['0']['first']['kernel']).max(), 0)


class LocalLossesTest(float64.Float64TestCase):

  @parameterized.parameters('similarity', 'prediction_and_similarity')
  def test_of_labels(self, name):
    net, variables, x, y = setup()
    local = getattr(local_losses, name)(3)
    rule = bpjax.local(RULES.backprop(), ['block_*'], loss=local)
    _, _, grads, own, feedback = learn(rule, net, variables, x, y)

    def cosines(z):
      z = z - z.mean(1, keepdims=True)
      z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
      return z @ z.T

    def first(params, head):
      hidden = nn.Dense(5).apply({'params': params['stem']}, x)
      hidden = Block(5).apply({'params': params['block_0']}, hidden)
      kernel = head.get('similarity', head)['kernel']
      labels = cosines(jax.nn.one_hot(y, 3))
      result = jnp.mean((cosines(hidden @ kernel) - labels)**2)
      if 'prediction' in head:
        linear = head['prediction']
        logits = hidden @ linear['kernel'] + linear['bias']
        result = .99 * result + .01 * jnp.mean(LOSS(logits, y))
      return result

    expected, head = jax.jit(jax.grad(first, (0, 1)))(
        variables['params'], feedback['heads']['block_0'])
    self.assert_close(grads['block_0'], expected['block_0'], 1e-14)
    self.assert_close(own['heads']['block_0'], head, 1e-14)

  def test_similarity_compares_classes(self):
    local = local_losses.similarity(3)
    with self.assertRaisesRegex(ValueError, r'must be integers \[batch\]'):
      local.loss(jnp.ones((3, 4)), jnp.eye(3), None)

  def test_a_head_is_no_less_precise_than_parameters(self):
    features = jax.ShapeDtypeStruct((2, 5, 4), jnp.bfloat16)
    for local in (local_losses.prediction(), local_losses.similarity(3),
                  local_losses.contrastive(4)):
      head = local.init(jax.random.key(0), features, jnp.ones((2, 3)))
      self.assertEqual({a.dtype for a in head.values()}, {jnp.dtype('float32')})

  def test_similarity_of_images(self):
    local = local_losses.similarity(3)
    h = jax.random.normal(jax.random.key(0), (4, 5, 5, 2))
    head = local.init(jax.random.key(1), h, jnp.ones((4, 3)))
    self.assertEqual(head['kernel'].shape, (3, 3, 2, 2))
    self.assertEqual(local.predict(head, h).shape, (4, 2))

  @parameterized.parameters(
      ('prediction', dict(scale=-1), '`scale`'),
      ('similarity', dict(classes=1), '`classes`'),
      ('similarity', dict(classes=3, kernel=2), '`kernel`'),
      ('prediction_and_similarity', dict(classes=3, share=2), '`share`'))
  def test_refuses(self, name, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      getattr(local_losses, name)(**arguments)


class Turn(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return Block(5, name='block')(x), None


class Odd(nn.Module):
  """A block that a local loss cannot have."""
  how: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(5)(x)
    if self.how == 'twice':
      block = Block(5, name='block')
      x = block(block(x))
    elif self.how == 'scan':
      loop = nn.scan(Turn, variable_axes={'params': 0},
                     split_rngs={'params': True}, length=2)
      x, _ = loop(name='loop')(x, None)
    else:
      x, _ = Turn(name='turn')(x, None)
    return nn.Dense(3)(x)


class Loop(nn.Module):

  @nn.compact
  def __call__(self, x):
    loop = nn.scan(Turn, variable_axes={'params': 0},
                     split_rngs={'params': True}, length=2)
    return loop(name='turns')(x, None)[0]


class Looped(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(Loop(name='loop')(nn.Dense(5)(x)))


class ErrorsTest(parameterized.TestCase):

  def init(self, blocks, rule=None, model=None, **kwargs):
    net = bpjax.from_linen(model or Net())
    x = jnp.ones((4, 6))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    rule = bpjax.local(rule or RULES.backprop(), blocks, **kwargs)
    return rule.init(jax.random.key(1), net, variables, x)

  @parameterized.parameters(
      (['block_*', 'block_0'], {}, 'names `block_0` 2 times'),
      (['blok_0'], {}, "'blok_0', which fits no module.*did you mean `block_0`"),
      (['block_0', 'block_0/Dense_0'], {}, 'must not overlap'),
      (['block_0/Dense_*', 'block_0/LayerNorm_0'], {},
       '`block_0/LayerNorm_0` must have a trainable unit'),
      (['block_*'], dict(groups=2), '`groups` must divide the 5 channels'),
      (['block_*'], dict(grouped=True), 'must put out'),
      (['block_*'], dict(stop='branch', branches=['block_*/Dens']),
       '`branches` has the glob'))
  def test_networks(self, blocks, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      self.init(blocks, **arguments)

  @parameterized.parameters(
      (dict(blocks=[]), '`blocks` needs'),
      (dict(blocks=['a', 'a']), 'a twice'),
      (dict(rule='backprop'), '`rule` must be'),
      (dict(stop='never'), '`stop` must be'),
      (dict(placement='pixel'), '`placement` must be'),
      (dict(readout='linear'), '`readout` must be'),
      (dict(groups=0), '`groups` must be'),
      (dict(stop_every=1.5), '`stop_every` must be'),
      (dict(stop_every=2, stop_remainder=2), '`stop_remainder` must be'),
      (dict(stop='none', stop_every=2), '`stop_every` needs'),
      (dict(branches=['a']), '`branches` and'),
      (dict(head_scale=-1), '`head_scale` must be'),
      (dict(rule=RULES.forward_gradient(epsilon=.1), stop='branch',
            branches=['a']), '`epsilon` must be 0'),
      (dict(rule=RULES.forward_gradient(epsilon=.1),
            loss=local_losses.similarity(3)), '`epsilon` must be 0'),
      (dict(loss=LOSS), '`loss` must be a local loss'),
      (dict(rule=RULES.forward_gradient(noise='shared')),
       '`noise` must be None in'))
  def test_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      bpjax.local(**{'rule': RULES.backprop(), 'blocks': ['b'], **arguments})

  @parameterized.parameters(
      ('twice', 'block', 'must be called once in a forward pass, got a second'),
      ('scan', 'loop/block', 'is inside a scan or a conditional'),
      ('tuple', 'turn', 'must return one array of floats, got tuple'))
  def test_a_block_puts_out_one_array_once(self, how, block, message):
    for rule in (RULES.backprop(), RULES.forward_gradient()):
      with self.assertRaisesRegex(ValueError, f'block `{block}` {message}'):
        self.init([block], rule, Odd(how))

  def test_a_loop_may_lie_in_a_block(self):
    feedback = self.init(['loop'], RULES.feedback_alignment(), Looped())
    self.assertEqual(list(feedback['heads']), ['loop'])

  def test_bind(self):
    with self.assertRaisesRegex(ValueError, '`bind` needs one loss'):
      bpjax.local(RULES.backprop(), ['b']).bind(None)


if __name__ == '__main__':
  pytest.main([__file__])
