"""Pseudo-convolutions: their gradient against numpy, and rules on them."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64
from tests import zoo


class Bare(nn.Module):
  """Pseudo-convolutions as a user writes them: the 1x1 children are units."""
  strides: int = 1
  maps: int = 0
  activation: str = 'tanh'

  @nn.compact
  def __call__(self, x):
    act = bpjax.activations.get(self.activation)
    x = act(nn.Conv(3, (3, 3), name='stem')(x))
    x = act(bpjax.nn.PerturbativeConv(
        5, maps=self.maps, scale=.5, strides=self.strides, name='pseudo')(x))
    return nn.Dense(4, name='readout')(x.reshape(x.shape[0], -1))


class Owned(nn.Module):
  """The same function, with layers that hold their nonlinearity."""

  @nn.compact
  def __call__(self, x):
    pseudo = functools.partial(bpjax.nn.PerturbativeConv, 5, scale=.5)
    conv = functools.partial(nn.Conv, 3, (3, 3))
    x = bpjax.nn.Layer(conv, nn.tanh, name='stem')(x)
    x = bpjax.nn.Layer(pseudo, nn.tanh, name='pseudo')(x)
    return nn.Dense(4, name='readout')(x.reshape(x.shape[0], -1))


def owned(variables):
  """Variables of `Bare` as those of `Owned`."""
  params, noise = variables['params'], variables['perturbation']
  return {
      'params': {
          **params, 'stem': {'affine': params['stem']},
          'pseudo': {'affine': params['pseudo']}},
      'perturbation': {'pseudo': {'affine': noise['pseudo']}}}


def pooled(x, stride):
  n, h, w, c = x.shape
  return x.reshape(n, h // stride, stride, w // stride, stride, c).mean((2, 4))


class GradientTest(float64.Float64TestCase):

  @parameterized.parameters((1, 0), (2, 0), (1, 7))
  def test_against_numpy(self, stride, maps):
    layer = bpjax.nn.PerturbativeConv(4, maps=maps, scale=.7, strides=stride)
    x = jax.random.normal(jax.random.key(0), (5, 6, 6, 3), jnp.float64)
    variables = float64.doubles(
        jax.jit(layer.init)(jax.random.key(1), x))
    error = np.asarray(jax.random.normal(
        jax.random.key(2), (5, 6 // stride, 6 // stride, 4), jnp.float64))

    @jax.jit
    def run(params, x):
      out, pull = jax.vjp(
          lambda p, x: layer.apply({**variables, 'params': p}, x), params, x)
      return out, pull(error)

    out, (updates, below) = run(variables['params'], x)
    noise = np.asarray(variables['perturbation']['noise'])[0]
    weights, bias = (
        np.asarray(variables['params']['conv'][name])
        for name in ('kernel', 'bias'))
    channel = np.arange(maps or 3) % 3
    noisy = np.maximum(0, np.asarray(x)[..., channel] + noise)
    maps_of_x = pooled(noisy, stride)
    # One scalar weight a map, as the paper has it.
    expected = np.zeros((maps or 3, 4))
    for m in range(maps or 3):
      for c in range(4):
        for i in range(6 // stride):
          for j in range(6 // stride):
            expected[m, c] += np.sum(
                error[:, i, j, c] * maps_of_x[:, i, j, m])
    np.testing.assert_allclose(
        updates['conv']['kernel'][0, 0], expected, atol=1e-12)
    np.testing.assert_allclose(
        updates['conv']['bias'], error.sum((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(
        out, np.einsum('nijm,mc->nijc', maps_of_x, weights[0, 0]) + bias,
        atol=1e-12)
    sent = np.einsum('nijc,mc->nijm', error, weights[0, 0]) / stride**2
    sent = sent.repeat(stride, 1).repeat(stride, 2) * (noisy > 0)
    down = np.zeros(x.shape)
    for m, c in enumerate(channel):
      down[..., c] += sent[..., m]
    np.testing.assert_allclose(below, down, atol=1e-12)

  def test_only_the_weights_learn_and_the_noise_is_kept(self):
    layer = bpjax.nn.PerturbativeConv(4, scale=.3)
    x = jnp.ones((2, 16, 16, 8))
    one, same, other = (
        layer.init(jax.random.key(k), x) for k in (1, 1, 2))
    self.assertEqual(
        bpjax.paths.leaf_names(one['params']), ['conv/bias', 'conv/kernel'])
    self.assertEqual(one['params']['conv']['kernel'].shape, (1, 1, 8, 4))
    noise = one['perturbation']['noise']
    self.assertEqual(noise.shape, (1, 16, 16, 8))
    np.testing.assert_array_equal(noise, same['perturbation']['noise'])
    self.assertTrue((noise != other['perturbation']['noise']).any())
    self.assertAlmostEqual(float(noise.std()), .3, delta=.02)
    self.assertAlmostEqual(float(noise.mean()), 0, delta=.02)

  @parameterized.parameters(
      ((2, 5), {}, 'must be images'), ((2, 4, 4, 3), {'maps': 2}, 'and 2 maps'))
  def test_refused(self, shape, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(
          bpjax.nn.PerturbativeConv(4, **arguments).init, jax.random.key(0),
          jnp.ones(shape))

  def test_other_sizes_are_refused(self):
    layer = bpjax.nn.PerturbativeConv(4)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 4, 4, 3)))
    with self.assertRaisesRegex(ValueError, r'shape of the noise, \(4, 4, 3\)'):
      layer.apply(variables, jnp.ones((2, 6, 6, 3)))


class RulesTest(float64.Float64TestCase):

  def setup(self, model=None):
    x = jax.random.normal(jax.random.key(3), (5, 4, 4, 2))
    net, variables, x = float64.setup(model or Bare(), x)
    return net, variables, x, jnp.arange(5) % 4

  def exact(self, net, variables, x, y):
    return zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, y)

  @parameterized.parameters(1, 2)
  def test_backprop_is_the_gradient(self, stride):
    net, variables, x, y = self.setup(Bare(strides=stride))
    self.assertEqual(list(net.units), ['stem', 'pseudo/conv', 'readout'])
    (_, aux), (grads, _) = self.exact(net, variables, x, y)

    def loss(params):
      output = net.model.apply({**variables, 'params': params}, x)
      return bpjax.losses.softmax_cross_entropy(output, y).mean()

    expected = jax.jit(jax.grad(loss))(variables['params'])
    self.assert_close(grads, expected, 1e-14)
    self.assert_close(
        aux.model_state, {'perturbation': variables['perturbation']}, 0)

  def test_a_layer_around_it_is_one_unit(self):
    net, variables, x, y = self.setup()
    whole = bpjax.from_linen(Owned())
    held = owned(variables)
    _ = jax.jit(whole.init)(jax.random.key(0), x)
    self.assertEqual(list(whole.units), ['stem', 'pseudo', 'readout'])
    self.assertEqual(whole.units['pseudo'].info.kind, 'Conv')
    self.assertTrue(whole.units['pseudo'].info.owns_activation)
    _, (expected, _) = self.exact(net, variables, x, y)
    (_, aux), (grads, _) = self.exact(whole, held, x, y)
    self.assert_close(grads, owned({**variables, 'params': expected})['params'],
                      1e-14)
    self.assert_close(
        aux.model_state, {'perturbation': held['perturbation']}, 0)

  @parameterized.parameters('feedback_alignment', 'kolen_pollack')
  def test_feedback_that_is_the_weights_is_backprop(self, name):
    net = bpjax.from_linen(Owned())
    _, variables, x, y = self.setup()
    held = owned(variables)
    rule = bpjax.rules.get(name)()
    feedback = bpjax.paths.map_with_name(
        lambda name, _: bpjax.paths.subtree(held['params'], name),
        rule.init(jax.random.key(1), net, held, x))
    self.assertEqual(
        bpjax.paths.leaf_names(feedback),
        ['pseudo/affine/conv/kernel', 'readout/kernel'])
    _, (grads, _) = zoo.learn(rule, net)(held, feedback, x, y)
    _, (exact, _) = self.exact(net, held, x, y)
    self.assert_close(grads, exact, 1e-14)

  def test_recursive_lra_moves_the_pre_activation(self):
    net = bpjax.from_linen(Owned())
    _, variables, x, y = self.setup()
    held = owned(variables)
    rule = bpjax.rules.recursive_local_representation_alignment(beta=.3)
    feedback = float64.doubles(rule.init(jax.random.key(1), net, held, x))
    _, (grads, _) = zoo.learn(rule, net, reduction='sum')(held, feedback, x, y)
    # Numpy: h = tanh(a), e = h - tanh(a - beta d), w += e relu(x + n).
    apply = functools.partial(
        nn.Conv(3, (3, 3)).apply, {'params': variables['params']['stem']})
    below = np.tanh(np.asarray(apply(x)))
    part = variables['params']['pseudo']['conv']
    seen = np.maximum(
        0, below + np.asarray(variables['perturbation']['pseudo']['noise']))
    a = seen @ np.asarray(part['kernel'])[0, 0] + np.asarray(part['bias'])
    out = net.model.apply(held, x)
    error = np.asarray(jax.nn.softmax(out) - jax.nn.one_hot(y, 4))
    d = np.tensordot(error, np.asarray(feedback['pseudo']['direct']), 1)
    e = np.tanh(a) - np.tanh(a - .3 * d)
    np.testing.assert_allclose(
        grads['pseudo']['affine']['conv']['kernel'][0, 0],
        np.einsum('nijm,nijc->mc', seen, e), atol=1e-12)

  @parameterized.parameters(
      'direct_feedback_alignment', 'feedback_alignment', 'forward_gradient',
      'weight_mirror', 'local_representation_alignment')
  def test_every_parameter_learns_in_a_layer(self, name):
    net = bpjax.from_linen(Owned())
    _, variables, x, y = self.setup()
    held = owned(variables)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, held, x)
    _, (grads, _) = zoo.learn(rule, net)(
        held, feedback, x, y, jax.random.key(2))
    for path, leaf in zip(
        bpjax.paths.leaf_names(grads), jax.tree.leaves(grads)):
      self.assertGreater(jnp.abs(leaf).max(), 0, path)
      self.assertTrue(jnp.isfinite(leaf).all(), path)


if __name__ == '__main__':
  absltest.main()
