"""Models of the papers: sizes, shapes, and what their blocks compute."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax import blocks
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np

LOSS = bpjax.losses.softmax_cross_entropy


def count(model, image):
  """Number of parameters, and the output's shape; nothing is allocated."""
  x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
  output, variables = jax.eval_shape(
      model.init_with_output, jax.random.key(0), x)
  params = jax.tree.leaves(variables['params'])
  return sum(math.prod(p.shape) for p in params), output.shape


_MAPS_64 = {'stem': 'cifar', 'widths': (64,) * 4}


class SizeTest(parameterized.TestCase):

  @parameterized.parameters(
      ('resnet20', {}, 10, (32, 32, 3), 269_722),
      ('resnet20', {'norm': 'group'}, 10, (32, 32, 3), 269_722),
      ('resnet20', {'norm': 'none'}, 10, (32, 32, 3), 269_034),
      ('resnet20', {'shortcut': 'projection'}, 10, (32, 32, 3), 272_474),
      ('resnet20', {'activation': 'tanh'}, 10, (8, 8, 3), 269_722),
      ('resnet56', {}, 10, (32, 32, 3), 853_018),
      ('resnet56', {'norm': 'none'}, 10, (32, 32, 3), 850_986),
      ('resnet56', {'shortcut': 'projection'}, 10, (32, 32, 3), 855_770),
      ('resnet18', {}, 1000, (224, 224, 3), 11_689_512),
      ('resnet18', {'stem': 'cifar'}, 10, (32, 32, 3), 11_173_962),
      ('resnet18', {'norm': 'none'}, 1000, (224, 224, 3), 11_684_712),
      ('vgg16', {}, 1000, (224, 224, 3), 138_357_544),
      ('vgg16', {'batch_norm': True}, 1000, (224, 224, 3), 138_365_992),
      ('vgg16', {}, 10, (32, 32, 3), 33_638_218),
      ('vgg16', {'classifier': ()}, 10, (32, 32, 3), 14_719_818),
      ('lenet', {}, 10, (32, 32, 1), 61_706),
      ('lenet', {'padding': 'SAME'}, 10, (28, 28, 1), 61_706),
      ('lenet', {'pool': 'max'}, 10, (28, 28, 1), 44_426),
      ('lenet', {}, 10, (32, 32, 3), 62_006),
      ('launay_cnn', {}, 10, (32, 32, 3), 231_306),
      ('launay_cnn', {'init': 'torch'}, 10, (32, 32, 3), 231_306),
      ('launay_cnn', {'batch_norm': True}, 10, (32, 32, 3), 231_882),
      ('resnet18', _MAPS_64, 10, (32, 32, 3), 607_050),
      ('resnet18', {**_MAPS_64, 'conv': 'perturbative'}, 10, (32, 32, 3),
       82_762),
      ('residual_mlp', {}, 10, (28, 28, 1), 466_698),
      ('ororbia_cnn', {}, 10, (32, 32, 3), 153_546),
      ('ororbia_cnn', {'units': 'affine'}, 10, (32, 32, 3), 153_546),
      ('ororbia_cnn', {'conv': 'perturbative'}, 10, (32, 32, 3), 55_242))
  def test_parameters_and_output(self, name, arguments, classes, image, size):
    model = bpjax.models.get(name)(classes, **arguments)
    got, shape = count(model, image)
    self.assertEqual(got, size)
    self.assertEqual(shape, (2, classes))

  @parameterized.parameters(
      ('resnet20', {}, ('conv_stem', 'stage_1/block_0/conv_0',
                        'stage_3/block_2/conv_1', 'readout'), 20),
      ('resnet20', {'shortcut': 'projection'},
       ('stage_2/block_0/conv_shortcut',), 22),
      ('resnet56', {}, ('stage_2/block_8/conv_1',), 56),
      ('resnet18', {}, ('stage_4/block_0/conv_shortcut', 'readout'), 21),
      ('vgg16', {}, ('conv_1_1', 'conv_5_3', 'dense_2', 'readout'), 16),
      ('lenet', {}, ('conv_1', 'conv_2', 'dense_2', 'readout'), 5),
      ('launay_cnn', {}, ('conv_1', 'conv_3', 'dense', 'readout'), 5),
      ('resnet18', _MAPS_64, ('stage_4/block_0/conv_shortcut',), 21),
      ('resnet18', {**_MAPS_64, 'conv': 'perturbative'},
       ('conv_stem', 'stage_1/block_0/conv_0/conv',
        'stage_2/block_0/conv_shortcut'), 21),
      ('residual_mlp', {}, ('layer_1', 'layer_5'), 6),
      ('ororbia_cnn', {}, ('conv_1', 'conv_4'), 5),
      ('ororbia_cnn', {'conv': 'perturbative'}, ('conv_1', 'conv_4'), 5),
      ('ororbia_cnn', {'conv': 'perturbative', 'units': 'affine'},
       ('conv_1', 'conv_4/conv'), 5))
  def test_units(self, name, arguments, units, number):
    net = bpjax.from_linen(bpjax.models.get(name)(10, **arguments))
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    self.assertContainsSubset(units, net.units)
    self.assertLen(net.units, number)
    self.assertEqual(list(net.units)[-1], 'readout')


class ResNetTest(float64.Float64TestCase):

  def test_feedback_alignment_with_b_equal_w_is_backprop(self):
    model = bpjax.models.resnet20(4)
    x = jax.random.normal(jax.random.key(7), (2, 8, 8, 3))
    y = jnp.array([1, 3])
    net, variables, x = float64.setup(model, x)

    @jax.jit
    def exact(params):
      def mean_loss(params):
        output, state = model.apply(
            {**variables, 'params': params}, x, train=True,
            mutable=['batch_stats'])
        return LOSS(output, y).mean(), state
      return jax.grad(mean_loss, has_aux=True)(params)

    rule = bpjax.rules.feedback_alignment()
    feedback = jax.eval_shape(
        functools.partial(rule.init, net=net), jax.random.key(1),
        variables=variables, x=x)
    feedback = bpjax.paths.map_with_name(
        lambda name, _: bpjax.paths.subtree(variables['params'], name),
        feedback)
    learn = jax.jit(rule.value_and_grad(net, LOSS))
    (_, aux), (grads, _) = learn(variables, feedback, x, y)
    expected, state = exact(variables['params'])
    self.assert_close(grads, expected, 1e-12)
    self.assert_close(aux.model_state, state, 1e-12)
    for before, after in zip(
        jax.tree.leaves(variables['batch_stats']),
        jax.tree.leaves(aux.model_state['batch_stats'])):
      self.assertTrue((before != after).any())

  @parameterized.parameters('pad', 'projection')
  def test_shortcut(self, shortcut):
    block = blocks.ResidualBlock(6, 2, 'none', jnp.tanh, shortcut)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    params = block.init(jax.random.key(1), x)['params']
    # Without weights in the branch's last convolution: the shortcut alone.
    params['conv_1'] = jax.tree.map(jnp.zeros_like, params['conv_1'])
    kernel = (
        params['conv_shortcut']['kernel'][0, 0] if shortcut == 'projection'
        else np.eye(3, 6))
    got = block.apply({'params': params}, x)
    np.testing.assert_allclose(
        got, np.tanh(np.asarray(x)[:, ::2, ::2] @ kernel), atol=1e-6)

  def test_without_norm_activity_stays_bounded(self):
    model = bpjax.models.resnet20(10, norm='none')
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))

    @jax.jit
    def stages(key):
      _, state = model.init_with_output(
          key, x, capture_intermediates=lambda m, _: isinstance(
              m, blocks.Stage), mutable=True)
      return state['intermediates']

    powers = [
        float((out['__call__'][0] ** 2).mean())
        for _, out in sorted(stages(jax.random.key(1)).items())]
    self.assertLen(powers, 3)
    # Doubling in each of nine blocks would make 512.
    self.assertBetween(powers[-1] / powers[0], .1, 10)


class LaunayCNNTest(parameterized.TestCase):

  def test_norm_follows_the_activation(self):
    model = bpjax.models.launay_cnn(10, batch_norm=True)
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    _, state = jax.jit(functools.partial(
        model.apply, train=True, mutable=['batch_stats']))(variables, x)
    conv = nn.Conv(32, (5, 5), padding='SAME')
    h = jnp.tanh(conv.apply({'params': variables['params']['conv_1']}, x))
    # A running mean that starts at 0 and keeps 9/10 at each step.
    np.testing.assert_allclose(
        state['batch_stats']['norm_1']['mean'], .1 * h.mean((0, 1, 2)),
        atol=1e-6)

  def test_dropout(self):
    model = bpjax.models.launay_cnn(10, input_dropout=.5, dropout=.5)
    x = jnp.ones((8, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    @functools.partial(jax.jit, static_argnums=0)
    def dropouts(train):
      _, state = model.apply(
          variables, x, train, rngs={'dropout': jax.random.key(2)},
          capture_intermediates=lambda m, _: isinstance(m, nn.Dropout))
      return [state['intermediates'][name]['__call__'][0]
              for name in ('Dropout_0', 'Dropout_1')]

    image, dense = map(np.asarray, dropouts(True))
    # Each channel of each image is dropped as a whole, or doubled.
    self.assertEqual(set(np.unique(image)), {0., 2.})
    self.assertTrue((image == image[:, :1, :1]).all())
    self.assertBetween((dense == 0).mean(), .4, .6)
    image, dense = map(np.asarray, dropouts(False))
    self.assertTrue((image == 1).all())
    self.assertFalse((dense == 0).any())

  @parameterized.parameters('he', 'torch')
  def test_initial_weights(self, init):
    model = bpjax.models.launay_cnn(10, init=init)
    x = jnp.zeros((1, 32, 32, 3))
    conv = jax.jit(lambda key: model.init(key, x)['params']['conv_2'])(
        jax.random.key(0))
    kernel, bias = conv['kernel'], conv['bias']
    fan_in = 25 * 32
    variance = 2 / fan_in if init == 'he' else 1 / (3 * fan_in)
    self.assertAlmostEqual(float(kernel.var()) / variance, 1, delta=.05)
    if init == 'he':
      self.assertFalse(bias.any())
    else:
      self.assertBetween(float(jnp.abs(kernel).max()) * fan_in ** .5, .99, 1)
      self.assertBetween(float(jnp.abs(bias).max()) * fan_in ** .5, .5, 1)


class OrorbiaTest(float64.Float64TestCase):

  @parameterized.parameters(
      ('resnet18', _MAPS_64, 412_672), ('ororbia_cnn', {}, 98_304))
  def test_noise(self, name, arguments, size):
    model = bpjax.models.get(name)(10, conv='perturbative', **arguments)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    noise = jax.tree.leaves(variables['perturbation'])
    self.assertEqual(sum(math.prod(n.shape) for n in noise), size)

  @parameterized.parameters((2, (5, 5, 5, 5)), (3, (5, 5, 4, 4, 4)))
  def test_skips_are_added_before_the_activation(self, gap, widths):
    model = bpjax.models.residual_mlp(3, widths, gap, 'tanh')
    x = jax.random.normal(jax.random.key(0), (4, 5), jnp.float64)
    params = float64.doubles(model.init(jax.random.key(1), x)['params'])
    z = [np.asarray(x)]
    for i, width in enumerate(widths, 1):
      layer = params[f'layer_{i}']['affine']
      a = z[i - 1] @ np.asarray(layer['kernel']) + np.asarray(layer['bias'])
      if i % gap == 0 and z[i - gap].shape[1] == width:
        a = a + z[i - gap]
      z.append(np.tanh(a))
    readout = params['readout']
    np.testing.assert_allclose(
        model.apply({'params': params}, x),
        z[-1] @ np.asarray(readout['kernel']) + np.asarray(readout['bias']),
        atol=1e-12)

  def test_both_kinds_of_units_are_one_network(self):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    make = functools.partial(
        bpjax.models.ororbia_cnn, 10, (3, 4), conv='perturbative')
    whole, bare = make(), make(units='affine')
    variables = whole.init(jax.random.key(1), x)
    inner = {
        c: {n: part.get('affine', part) for n, part in tree.items()}
        for c, tree in variables.items()}
    np.testing.assert_array_equal(
        whole.apply(variables, x), bare.apply(inner, x))

  @parameterized.product(
      model=(
          ('residual_mlp', {'widths': (6, 5, 5)}),
          ('ororbia_cnn', {'channels': (3, 4)}),
          ('ororbia_cnn', {'channels': (3, 4), 'conv': 'perturbative'}),
          ('resnet18', {'stem': 'cifar', 'widths': (2, 3), 'activation': 'elu',
                        'conv': 'perturbative'})),
      rule=('backprop', 'feedback_alignment', 'direct_feedback_alignment'))
  def test_every_parameter_takes_a_step(self, model, rule):
    name, arguments = model
    net = bpjax.from_linen(bpjax.models.get(name)(4, **arguments))
    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))
    y = jnp.arange(5) % 4
    variables = jax.jit(net.init)(jax.random.key(1), x)
    rule = bpjax.rules.get(rule)()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    (_, aux), (grads, _) = jax.jit(rule.value_and_grad(net, LOSS))(
        variables, feedback, x, y)
    self.assertEqual(aux.output.shape, (5, 4))
    for path, leaf in zip(
        bpjax.paths.leaf_names(grads), jax.tree.leaves(grads)):
      self.assertTrue(jnp.isfinite(leaf).all(), path)
      self.assertGreater(jnp.abs(leaf).max(), 0, path)


class ErrorsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('resnet20', {'norm': 'layer'}, "`norm` must be 'batch', 'group' or"),
      ('resnet56', {'shortcut': 'C'}, "`shortcut` must be 'pad' or"),
      ('resnet18', {'stem': 'mnist'}, "`stem` must be 'cifar' or"),
      ('resnet20', {'num_classes': 0}, '`num_classes` must be a whole number'),
      ('resnet20', {'activation': 'rleu'}, 'did you mean `relu`'),
      ('vgg16', {'classifier': (64, 0)}, '`classifier` must be a whole number'),
      ('vgg16', {'dropout': 1.}, r'`dropout` must be in \[0, 1\)'),
      ('lenet', {'pool': 'mean'}, "`pool` must be 'average' or 'max'"),
      ('lenet', {'padding': 'same'}, "`padding` must be 'VALID' or 'SAME'"),
      ('launay_cnn', {'input_dropout': -.1}, '`input_dropout` must be in'),
      ('launay_cnn', {'init': 'xavier'}, "`init` must be 'he' or 'torch'"),
      ('resnet18', {'conv': 'pconv'}, "`conv` must be 'conv' or 'perturbative"),
      ('resnet18', {'widths': (64, 0)}, '`widths` must be a whole number'),
      ('resnet18', {'perturbation': -1.}, '`perturbation` must be at least 0'),
      ('residual_mlp', {'gap': 0}, '`gap` must be a whole number'),
      ('residual_mlp', {'init': 'xavier'}, '`init` must be'),
      ('ororbia_cnn', {'units': 'block'}, "`units` must be 'affine' or"),
      ('ororbia_cnn', {'conv': 'pconv'}, '`conv` must be'))
  def test_arguments(self, name, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      bpjax.models.get(name)(**{'num_classes': 10} | arguments)

  @parameterized.parameters(
      ('vgg16', (2, 28, 28, 1), 'at least 32 x 32 for `vgg16`, got 28 x 28'),
      ('lenet', (2, 8, 8, 1), 'at least 16 x 16'),
      ('launay_cnn', (2, 8, 8, 1), 'at least 15 x 15'),
      ('ororbia_cnn', (2, 3, 3, 1), 'at least 4 x 4'),
      ('resnet20', (2, 784), r'images \[batch, height, width, channels\]'))
  def test_images(self, name, shape, message):
    model = bpjax.models.get(name)(10)
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))

  @parameterized.parameters(
      ('vgg16', 32, {}), ('lenet', 16, {}), ('lenet', 12, {'padding': 'SAME'}),
      ('launay_cnn', 15, {}), ('resnet20', 1, {}), ('resnet18', 1, {}),
      ('ororbia_cnn', 4, {}), ('resnet18', 1, {'conv': 'perturbative'}))
  def test_the_smallest_image_is_taken(self, name, size, arguments):
    model = bpjax.models.get(name)(10, **arguments)
    self.assertEqual(count(model, (size, size, 1))[1], (2, 10))


if __name__ == '__main__':
  absltest.main()
