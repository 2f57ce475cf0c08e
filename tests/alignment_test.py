"""What `bpjax.alignment` says where there is nothing to measure."""

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

LOSS = bpjax.losses.softmax_cross_entropy


def _measure(model, rule):
  net = bpjax.from_linen(model)
  x, y = jax.random.normal(jax.random.key(0), (6, 5)), jnp.arange(6) % 3
  variables = net.init(jax.random.key(1), x)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  measured = jax.jit(bpjax.alignment(net, LOSS, rule))(
      variables, feedback, x, y, key=jax.random.key(3))
  exact = jax.grad(lambda p: LOSS(model.apply({'params': p}, x), y).mean())(
      variables['params'])
  return measured, exact


class _Cut(nn.Module):
  """A unit that no loss can feel, and two that one can."""

  @nn.compact
  def __call__(self, x):
    h = jax.lax.stop_gradient(nn.tanh(nn.Dense(4, name='frozen')(x)))
    h = nn.tanh(nn.Dense(4, name='hidden')(h))
    return nn.Dense(3, name='out')(h)


class AlignmentTest(parameterized.TestCase):

  def test_weight_perturbation_has_no_signals(self):
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
    measured, _ = _measure(model, bpjax.rules.forward_gradient(
        perturb='weight', exact_readout=True))
    self.assertTrue(np.isnan(measured['layers_0'].teaching))
    self.assertFalse(np.isnan(measured['layers_0'].update))
    self.assertEqual(measured['layers_2'].teaching, 1)  # An exact readout.

  @parameterized.parameters(
      'backprop', 'feedback_alignment', 'direct_feedback_alignment')
  def test_no_gradient_is_no_cosine(self, name):
    measured, _ = _measure(_Cut(), bpjax.rules.get(name)())
    self.assertTrue(np.isnan(measured['frozen'].teaching))
    self.assertTrue(np.isnan(measured['frozen'].update))
    self.assertEqual(measured['frozen'].backprop_norm, 0)
    self.assertFalse(np.isnan(measured['hidden'].teaching))

  def test_the_norm_is_backprops(self):
    measured, exact = _measure(
        nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]),
        bpjax.rules.feedback_alignment())
    for unit in ('layers_0', 'layers_2'):
      leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(exact[unit])]
      np.testing.assert_allclose(
          measured[unit].backprop_norm,
          np.linalg.norm(np.concatenate(leaves)), rtol=1e-5)


if __name__ == '__main__':
  pytest.main([__file__])
