"""Weights are units wherever they are used; what is exact is printed."""

import warnings

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest


class _Attend(nn.Module):

  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(11, 8, name='embed')
    return embed.attend(nn.tanh(nn.Dense(8, name='hidden')(embed(ids))))


class _Transposed(nn.Module):

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(8, use_bias=False, name='dense')
    h = nn.tanh(dense(x))
    return h @ dense.variables['params']['kernel'].T


class _Raw(nn.Module):

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.lecun_normal(), (5, 8))
    return nn.Dense(3, name='out')(nn.tanh(x @ w))


class _InScan(nn.Module):

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.lecun_normal(), (5, 5))
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)
    return nn.Dense(3, name='out')(h)


class _NoUnit(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x * self.param('w', nn.initializers.ones, (5,))


class _MostlyExact(nn.Module):
  """A convolution in the frequency domain, most of the weights, and a head."""

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.normal(), (5, 5))
    x = jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(w).sum(0)).real
    return nn.Dense(3, use_bias=False)(x)


class _Gains(nn.Module):
  """Norms and biases multiply elementwise: no product, nothing to warn of."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(4)(x))))


def _floats():
  return jax.random.normal(jax.random.key(0), (4, 5))


_CASES = (
    ('attend', _Attend(), jnp.ones((4, 3), int),
     ['embed', 'hidden', 'embed/#1'], ['embed/embedding']),
    ('transposed', _Transposed(), _floats(), ['dense', 'dense/#1'],
     ['dense/kernel']),
    ('raw', _Raw(), _floats(), ['w', 'out'], ['out/kernel']),
    ('scan', _InScan(), _floats(), ['w', 'out'], ['out/kernel', 'w']))


class TransportsTest(parameterized.TestCase):

  @parameterized.named_parameters(*_CASES)
  def test_every_use_is_a_unit(self, model, x, units, feedback_at):
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(1), x)
    rule = bpjax.rules.feedback_alignment()
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      feedback = rule.init(jax.random.key(2), net, variables, x)
    self.assertEqual(list(net.units), units)
    self.assertEmpty(net.units.exact)
    self.assertEqual(
        rule.units(net, variables, x), dict.fromkeys(units, rule.name))
    self.assertContainsSubset(feedback_at, bpjax.paths.leaf_names(feedback))
    for name in units:
      self.assertRegex(str(net.units), rf'{name} .*(dot_general|lookup)')
    # What lies below hears of the feedback, not of the weights.
    loss = lambda out, y: jnp.mean(out**2, axis=-1)
    y = jnp.zeros(4)
    _, (grads, _) = rule.value_and_grad(net, loss)(variables, feedback, x, y)
    _, (exact, _) = bpjax.rules.backprop().value_and_grad(net, loss)(
        variables, {}, x, y)
    lowest = bpjax.paths.subtree(grads, units[0])
    cosine = bpjax.feedback.cosine(
        lowest, bpjax.paths.subtree(exact, units[0]))
    self.assertLess(cosine, .999)

  def test_gains_are_listed(self):
    net = bpjax.from_linen(_Gains())
    x = _floats()
    variables = net.init(jax.random.key(1), x)
    rule = bpjax.rules.feedback_alignment()
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      rule.init(jax.random.key(2), net, variables, x)
    self.assertEqual(net.units.exact_by, {
        'LayerNorm_0/bias': ('add',), 'LayerNorm_0/scale': ('mul',)})
    self.assertEqual(rule.units(net, variables, x)['LayerNorm_0/scale'],
                     'exact gradient (mul)')
    self.assertRegex(str(net.units), 'LayerNorm_0/scale +mul')

  def test_one_warning_where_most_weights_are_exact(self):
    net = bpjax.from_linen(_MostlyExact())
    variables = net.init(jax.random.key(1), _floats())
    rule = bpjax.rules.feedback_alignment()
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      feedback = rule.init(jax.random.key(2), net, variables, _floats())
      rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)(
          variables, feedback, _floats(), jnp.zeros(4, int))
    said, = [str(w.message) for w in caught if w.category is UserWarning]
    self.assertIn('most of the weights keep their exact derivative', said)
    self.assertIn('`w`', said)

  @parameterized.parameters('backprop', 'feedback_alignment')
  def test_a_network_without_units_is_refused(self, name):
    net = bpjax.from_linen(_NoUnit())
    variables = net.init(jax.random.key(1), _floats())
    with self.assertRaisesRegex(ValueError, 'finds no unit'):
      bpjax.rules.get(name)().init(
          jax.random.key(2), net, variables, _floats())


if __name__ == '__main__':
  pytest.main([__file__])
