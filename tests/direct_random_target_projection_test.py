"""Direct random target projection against numpy, and what it refuses."""

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _reference(params, feedback, x, target, error):
  """Two hidden tanh layers: arXiv 1909.01311, in float64."""
  w = [np.asarray(params[f'Dense_{i}']['kernel'], np.float64) for i in range(3)]
  b = [np.asarray(params[f'Dense_{i}']['bias'], np.float64) for i in range(3)]
  h1 = np.tanh(x @ w[0] + b[0])
  h2 = np.tanh(h1 @ w[1] + b[1])
  e = error(h2 @ w[2] + b[2])
  projections = [np.asarray(feedback[f'Dense_{i}'], np.float64) for i in (1, 2)]
  d1 = (target @ projections[0]) * (1 - h1**2)
  d2 = (target @ projections[1]) * (1 - h2**2)
  n = len(x)
  return [(x.T @ d1 / n, d1.mean(0)), (h1.T @ d2 / n, d2.mean(0)),
          (h2.T @ e / n, e.mean(0))]


class _Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    for width in (7, 6):
      x = nn.tanh(nn.Dense(width)(x))
    return nn.Dense(4)(x)


def _softmax(a):
  a = np.exp(a - a.max(-1, keepdims=True))
  return a / a.sum(-1, keepdims=True)


class DirectRandomTargetProjectionTest(parameterized.TestCase):

  @parameterized.parameters('labels', 'probabilities', 'squared_error')
  def test_against_numpy(self, kind):
    net = bpjax.from_linen(_Net())
    x = jax.random.normal(jax.random.key(0), (9, 5))
    labels = jnp.arange(9) % 4
    one_hot = jax.nn.one_hot(labels, 4)
    y = labels if kind == 'labels' else one_hot
    loss = (bpjax.losses.squared_error if kind == 'squared_error' else
            bpjax.losses.softmax_cross_entropy)
    error = (lambda a: a - one_hot) if kind == 'squared_error' else (
        lambda a: _softmax(a) - one_hot)
    variables = net.init(jax.random.key(1), x)
    rule = bpjax.rules.direct_random_target_projection()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    _, (grads, fixed) = jax.jit(rule.value_and_grad(net, loss))(
        variables, feedback, x, y)
    expected = _reference(
        variables['params'], feedback, np.asarray(x, np.float64),
        np.asarray(one_hot, np.float64), error)
    for i, (kernel, bias) in enumerate(expected):
      np.testing.assert_allclose(grads[f'Dense_{i}']['kernel'], kernel, atol=2e-6)
      np.testing.assert_allclose(grads[f'Dense_{i}']['bias'], bias, atol=2e-6)
    self.assertFalse(any(jnp.any(f) for f in jax.tree.leaves(fixed)))

  def test_a_target_of_another_shape_is_refused(self):
    net = bpjax.from_linen(_Net())
    x, y = jnp.ones((9, 5)), jnp.ones((9, 2))
    variables = net.init(jax.random.key(1), x)
    rule = bpjax.rules.direct_random_target_projection()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    loss = lambda output, y: jnp.sum(output[:, :2] * y, axis=1)
    with self.assertRaisesRegex(ValueError, 'targets of the shape of the output'):
      rule.value_and_grad(net, loss)(variables, feedback, x, y)


if __name__ == '__main__':
  pytest.main([__file__])
