"""Weights that are used outside of units are named, not passed over."""

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
    return x @ self.param('w', nn.initializers.lecun_normal(), (5, 3))


class _Gains(nn.Module):
  """Norms and biases multiply elementwise: no product, nothing to warn of."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(4)(x))))


def _floats():
  return jax.random.normal(jax.random.key(0), (4, 5))


_CASES = (
    ('attend', _Attend(), jnp.ones((4, 3), int), {'embed/embedding'}),
    ('transposed', _Transposed(), _floats(), {'dense/kernel'}),
    ('raw', _Raw(), _floats(), {'w'}),
    ('scan', _InScan(), _floats(), {'w'}))


class TransportsTest(parameterized.TestCase):

  @parameterized.named_parameters(*_CASES)
  def test_named_in_units_and_warned_of(self, model, x, expected):
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(1), x)
    self.assertEqual(set(net.units.transports), expected)
    rule = bpjax.rules.feedback_alignment()
    with self.assertWarnsRegex(UserWarning, 'keep their exact derivative'):
      rule.init(jax.random.key(2), net, variables, x)
    trained = rule.units(net, variables, x)
    for name in expected:
      self.assertIn('exact gradient (dot_general', trained[name])
      self.assertIn(f'{name}: exact derivative in dot_general', str(net.units))

  def test_gains_are_no_transports(self):
    net = bpjax.from_linen(_Gains())
    variables = net.init(jax.random.key(1), _floats())
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      bpjax.rules.feedback_alignment().init(
          jax.random.key(2), net, variables, _floats())
    self.assertEmpty(net.units.transports)

  @parameterized.parameters('backprop', 'feedback_alignment')
  def test_a_network_without_units_is_refused(self, name):
    net = bpjax.from_linen(_NoUnit())
    variables = net.init(jax.random.key(1), _floats())
    with self.assertRaisesRegex(ValueError, 'finds no unit'):
      bpjax.rules.get(name)().init(
          jax.random.key(2), net, variables, _floats())


if __name__ == '__main__':
  pytest.main([__file__])
