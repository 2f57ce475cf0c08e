"""LocalMixer: sizes, an independent forward pass, rules, what it refuses."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax import blocks
from bpjax.models.local_mixer import to_patches
import float64
import jax
import jax.numpy as jnp
import numpy as np

_LOSS = bpjax.losses.softmax_cross_entropy
_TINY = dict(blocks=3, patches=2, channels=8, hidden=12, groups=2)


def tiny(**arguments):
  return bpjax.models.local_mixer(5, **(_TINY | arguments))


def images(size=4, batch=3, channels=2):
  return jax.random.normal(jax.random.key(7), (batch, size, size, channels))


@functools.cache
def setup(**arguments):
  """(model, network, variables, inputs) with a readout that is not 0."""
  model = tiny(**arguments)
  net, variables, x = float64.setup(model, images())
  kernel = variables['params']['readout']['kernel']
  variables['params']['readout']['kernel'] = jax.random.normal(
      jax.random.key(3), kernel.shape, kernel.dtype)
  return model, net, variables, x


def norm(x):
  """LayerNorm in numpy, from the paper's formula."""
  mean = x.mean(-1, keepdims=True)
  square = (x * x).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(square - mean**2 + 1e-5)


def reference(params, x, patches, groups, mixer):
  """The forward pass in numpy, with loops where the model has products."""
  batch, side = len(x), x.shape[1] // patches
  relu = lambda a: np.maximum(a, 0)
  cut = [x[:, i * side:(i + 1) * side, j * side:(j + 1) * side].reshape(
      batch, -1) for i in range(patches) for j in range(patches)]
  x, outputs = np.stack(cut, axis=1), []
  for i in range(len(params) - 1):
    block = jax.tree.map(np.asarray, params[f'block_{i}'])
    y = norm(x.reshape(batch, patches**2, -1))
    if i:
      w, b = (block['token']['affine'][k] for k in ('kernel', 'bias'))
    if i and mixer == 'dense':
      mixed = np.stack([
          sum(w[p, q] * y[:, p] for p in range(patches**2)) + b[q]
          for q in range(patches**2)], axis=1)
      y = norm(relu(norm(mixed)))
    elif i:
      grid = np.pad(y.reshape(batch, patches, patches, -1),
                    ((0, 0), (1, 1), (1, 1), (0, 0)))
      mixed = sum(
          w[r, c, 0] * grid[:, r:r + patches, c:c + patches]
          for r in range(3) for c in range(3)) + b
      y = norm(relu(norm(mixed.reshape(y.shape))))
    affine = block['channel']['affine']
    y = relu(norm(y @ affine['kernel'] + affine['bias']))
    affine = block['group']['affine']
    y = np.stack([
        norm(norm(part) @ affine['kernel'][g] + affine['bias'][g])
        for g, part in enumerate(np.split(y, groups, axis=-1))], axis=2)
    x = relu(x + y if i else y)
    outputs.append(x)
  pooled = norm(x.mean(axis=1).reshape(batch, -1))
  readout = params['readout']
  return pooled @ readout['kernel'] + readout['bias'], outputs


class SizeTest(parameterized.TestCase):

  @parameterized.parameters(
      ('s/1/1', (28, 28, 1), 10, 266_752, 271_892),
      ('m/1/16', (28, 28, 1), 10, 418_816, 429_076),
      ('m/8/16', (32, 32, 3), 10, 893_120, 918_770),
      ('l/8/64', (32, 32, 3), 10, 12_972_224, 13_074_674),
      ('l/32/64', (224, 224, 3), 1000, 16_311_296, 26_556_296))
  def test_parameters(self, size, image, classes, backbone, published):
    model = bpjax.models.local_mixer(classes, size)
    params = jax.eval_shape(
        model.init, jax.random.key(0),
        jax.ShapeDtypeStruct((2, *image), jnp.float32))['params']
    count = lambda tree: sum(math.prod(p.shape) for p in jax.tree.leaves(tree))
    blocks_ = {k: v for k, v in params.items() if k.startswith('block_')}
    self.assertEqual(count(blocks_), backbone)
    heads = len(blocks_) * (model.channels + 1) * classes
    self.assertEqual(count(params) + heads, published)

  @parameterized.parameters('dense', 'conv')
  def test_units_and_outputs(self, mixer):
    model = tiny(mixer=mixer)
    net = bpjax.from_linen(model, boundaries=['block_*'])
    jax.eval_shape(net.init, jax.random.key(0), images())
    layers = lambda i: [
        f'block_{i}/{name}/affine' for name in ('token', 'channel', 'group')]
    self.assertEqual(list(net.units), [
        *layers(0)[1:], 'block_0/boundary', *layers(1), 'block_1/boundary',
        *layers(2), 'block_2/boundary', 'readout'])
    self.assertEqual(net.units.exact, ())
    for i in range(3):
      info = net.units[f'block_{i}/boundary'].info
      self.assertEqual(info.out.shape, (3, 4, 2, 4))

  @parameterized.parameters(
      ('kaiming', 'channel', 1 / 16), ('kaiming', 'token', .1),
      ('lecun', 'group', 1 / 8), ('constant', 'channel', .1))
  def test_initial_weights(self, init, unit, deviation):
    model = bpjax.models.local_mixer(
        10, blocks=2, patches=8, channels=1024, groups=16, init=init)
    x = jnp.zeros((1, 16, 16, 1))
    params = jax.jit(lambda key: model.init(key, x)['params'])(
        jax.random.key(0))
    affine = params['block_1'][unit]['affine']
    self.assertAlmostEqual(
        float(affine['kernel'].std()) / deviation, 1, delta=.03)
    self.assertFalse(affine['bias'].any())
    self.assertFalse(params['readout']['kernel'].any())


class ForwardTest(float64.Float64TestCase):

  @parameterized.parameters('dense', 'conv')
  def test_against_numpy(self, mixer):
    model, _, variables, x = setup(mixer=mixer)
    variables = jax.tree.map(  # Biases that are not 0.
        lambda p: p + .1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape),
        variables)
    output, state = jax.jit(functools.partial(
        model.apply, capture_intermediates=lambda m, _: (
            m.name or '').startswith('block_')))(variables, x)
    expected, outputs = reference(
        variables['params'], np.asarray(x), 2, 2, mixer)
    for i, out in enumerate(outputs):
      got = state['intermediates'][f'block_{i}']['__call__'][0]
      np.testing.assert_allclose(got, out, atol=1e-10)
    np.testing.assert_allclose(output, expected, atol=1e-10)

  def test_one_patch_and_group(self):
    model = tiny(blocks=1, patches=1, groups=1)
    _, variables, x = float64.setup(model, images())
    variables['params']['readout']['kernel'] += 1.
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, x),
        reference(variables['params'], np.asarray(x), 1, 1, 'dense')[0],
        atol=1e-10)

  def test_patches(self):
    x = np.arange(2. * 4 * 6 * 3).reshape(2, 4, 6, 3)
    got = to_patches(jnp.asarray(x), 2)
    self.assertEqual(got.shape, (2, 4, 18))
    np.testing.assert_array_equal(got[1, 1], x[1, :2, 3:].ravel())
    np.testing.assert_array_equal(got[1, 2], x[1, 2:, :3].ravel())

  def test_layer_norm_has_the_derivative_of_its_formula(self):
    x, d = jax.random.normal(jax.random.key(0), (2, 3, 4, 5), jnp.float64)
    mean = lambda x: x.mean(-1, keepdims=True)
    plain = lambda x: (x - mean(x)) * jax.lax.rsqrt(
        mean(x * x) - mean(x)**2 + 1e-5)
    both = lambda f: (jax.jvp(f, (x,), (d,)), jax.vjp(f, x)[1](d))
    a, b = jax.jit(lambda: (both(blocks.layer_norm), both(plain)))()
    self.assert_close(a, b, 1e-12)
    np.testing.assert_allclose(a[0][0], norm(np.asarray(x)), atol=1e-12)
    constant = blocks.layer_norm(jnp.full((2, 3), 1e4, jnp.float32))
    np.testing.assert_allclose(constant, 0, atol=1e-3)
    # In half precision a mean of 16 deviations would leave nothing of the rest.
    half = (16 + jax.random.normal(jax.random.key(1), (4, 64))).astype('bfloat16')
    got = blocks.layer_norm(half)
    self.assertEqual(got.dtype, jnp.bfloat16)
    np.testing.assert_allclose(
        got.astype('float64'), norm(np.asarray(half, np.float64)), atol=.02)


class RulesTest(float64.Float64TestCase):

  def exact(self, model, variables, x, y):
    def value(params):
      return _LOSS(model.apply({'params': params}, x), y).mean()
    return jax.jit(jax.grad(value))(variables['params'])

  @parameterized.parameters(
      ('dense', 'affine'), ('conv', 'affine'), ('dense', 'with_norm'))
  def test_feedback_alignment_with_b_equal_w_is_backprop(self, mixer, units):
    model, net, variables, x = setup(mixer=mixer)
    if units == 'with_norm':
      net = bpjax.from_linen(model, is_unit=is_normed)
    y = jnp.array([0, 3, 1])
    rule = bpjax.rules.feedback_alignment()
    feedback = jax.eval_shape(
        functools.partial(rule.init, net=net), jax.random.key(1),
        variables=variables, x=x)
    feedback = bpjax.paths.map_with_name(
        lambda name, _: bpjax.paths.subtree(variables['params'], name),
        feedback)
    _, (grads, _) = jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, y)
    self.assert_close(grads, self.exact(model, variables, x, y), 1e-12)

  def test_jvp_and_gradient_agree(self):
    model, _, variables, x = setup()
    y = jnp.array([0, 3, 1])
    params = variables['params']
    along = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    _, change = jax.jit(lambda: jax.jvp(
        lambda p: _LOSS(model.apply({'params': p}, x), y).mean(), (params,),
        (along,)))()
    exact = self.exact(model, variables, x, y)
    total = sum(map(jnp.vdot, jax.tree.leaves(exact), jax.tree.leaves(along)))
    self.assertAlmostEqual(float(change), float(total), 10)

  @parameterized.parameters('direct_feedback_alignment', 'forward_gradient')
  def test_every_unit_learns(self, name):
    _, net, variables, x = setup()
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (grads, _) = jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, jnp.array([0, 3, 1]), key=jax.random.key(2))
    for path, leaf in zip(
        bpjax.paths.leaf_names(grads), jax.tree.leaves(grads)):
      self.assertGreater(jnp.abs(leaf).max(), 0, path)

  def test_local_forward_gradient_is_unbiased_in_every_weight_and_bias(self):
    model, _, variables, x = setup(blocks=2)
    net = bpjax.from_linen(model, is_unit=is_normed)
    y, samples, draws = jnp.array([0, 3, 1]), 16, 300
    local = functools.partial(
        bpjax.local, blocks=['block_*'], placement='group', grouped=True)
    rule = local(bpjax.rules.forward_gradient(
        directions='rademacher', samples=samples))
    feedback = float64.doubles(rule.init(jax.random.key(2), net, variables, x))
    exact = local(bpjax.rules.backprop()).value_and_grad(net, _LOSS)
    step = rule.value_and_grad(net, _LOSS)

    @jax.jit
    def run(keys):
      expected = exact(variables, feedback, x, y)[1][0]

      def slopes(key):
        grads = step(variables, feedback, x, y, key=key)[1][0]
        # The norm takes a token layer's bias away: there is nothing to learn.
        vanished = grads['block_1']['token']['affine'].pop('bias')
        return vanished, jax.tree.map(
            lambda g, e: jnp.vdot(g, e) / jnp.vdot(e, e), grads, expected)

      del expected['block_1']['token']['affine']['bias']
      return jax.lax.map(slopes, keys, batch_size=50)

    vanished, found = run(jax.random.split(jax.random.key(5), draws))
    self.assertLess(jnp.abs(vanished).max(), 1e-12)
    names = bpjax.paths.leaf_names(found)
    self.assertLen(names, 11)  # Of five layers and the readout.
    for name, slope in zip(names, jax.tree.leaves(found)):
      error = slope.std() / draws**.5
      self.assertLess(abs(slope.mean() - 1), 4 * error + 1e-12, name)
      # Not vacuous: the slope of 1/2 that the released code's biases have
      # would be seen.
      self.assertLess(4 * error, .4, name)

  def test_a_detached_readout_learns_alone(self):
    model, _, variables, x = setup()
    y = jnp.array([0, 3, 1])
    whole = self.exact(model, variables, x, y)
    alone = self.exact(tiny(detach_readout=True), variables, x, y)
    self.assert_close(alone.pop('readout'), whole['readout'], 1e-12)
    for leaf in jax.tree.leaves(alone):
      self.assertFalse(leaf.any())

  def test_half_precision(self):
    model = tiny(dtype='bfloat16')
    variables = jax.jit(model.init)(jax.random.key(0), images())
    output = jax.jit(model.apply)(variables, images())
    self.assertEqual(output.dtype, jnp.bfloat16)


def is_normed(module):
  return type(module).__name__ == 'NormedLayer'


class ShardingTest(float64.Float64TestCase):

  @parameterized.parameters('Auto', 'Explicit')
  def test_examples_on_four_devices(self, axes):
    model = tiny(blocks=2)
    _, variables, x = float64.setup(model, images(batch=4))

    @jax.jit
    def run(variables, x):
      return jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)

    variables['params']['readout']['kernel'] += 1.
    variables['params']['readout']['bias'] += jnp.arange(5)
    expected = run(variables, x)
    mesh = jax.make_mesh(
        (4,), ('data',), axis_types=(jax.sharding.AxisType[axes],),
        devices=jax.devices()[:4])
    place = lambda tree, *axes: jax.device_put(
        tree, jax.NamedSharding(mesh, jax.P(*axes)))
    with jax.set_mesh(mesh):
      got = run(place(variables), place(x, 'data'))
    self.assert_close(got, expected, 1e-10)


  @parameterized.parameters('LG-FG-A', 'LG-FG-W', 'LG-FA')
  def test_local_losses_of_examples_on_two_devices(self, name):
    mesh = jax.make_mesh(
        (2,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,),
        devices=jax.devices()[:2])
    net, variables, x = float64.setup(
        tiny(blocks=2), images(batch=4), is_unit=is_normed)
    rule, y = bpjax.variant(name), jnp.arange(4)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
    key = jax.random.key(2)
    expected = jax.jit(learn)(variables, feedback, x, y, key)[1]
    place = lambda tree, *axes: jax.device_put(
        tree, jax.NamedSharding(mesh, jax.P(*axes)))
    with jax.set_mesh(mesh):
      got = jax.jit(learn)(
          place(variables), place(feedback), place(x, 'data'),
          place(y, 'data'), place(key))[1]
    self.assert_close(got, expected, 1e-10)


class ErrorsTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'size': 'M/8/16'}, "`size` must be 's/1/1', .*got 'M/8/16'"),
      ({'groups': 3}, '`groups` must divide the channels, 8, .*got 3'),
      ({'groups': 4, 'hidden': 6}, '`groups` must divide the hidden, 6'),
      ({'mixer': 'token'}, "`mixer` must be 'dense' or 'conv'"),
      ({'dtype': 'floa'}, "`dtype` must name a dtype, got 'floa'"),
      ({'init': 'he'}, "`init` must be 'kaiming', 'lecun' or 'constant'"),
      ({'blocks': 0}, '`blocks` must be a whole number'),
      ({'patches': 1.5}, '`patches` must be a whole number'))
  def test_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      tiny(**arguments)

  @parameterized.parameters(
      ((2, 4, 4, 1), 3, "`patches` must divide the image's height, 4, .*3"),
      ((2, 4, 6, 1), 4, "`patches` must divide the image's width, 6"),
      ((2, 16), 2, r'images \[batch, height, width, channels\]'))
  def test_images(self, shape, patches, message):
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(
          tiny(patches=patches).init, jax.random.key(0), jnp.ones(shape))


if __name__ == '__main__':
  absltest.main()
