"""Direct Kolen-Pollack against numpy, and its law at the readout."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


class Tokens(nn.Module):
  """Dense layers token by token; their mean is read."""

  @nn.compact
  def __call__(self, x):
    for width in (6, 5):
      x = nn.tanh(nn.Dense(width)(x))
    return nn.Dense(4)(x.mean(1))


class DirectKolenPollackTest(float64.Float64TestCase):

  def setup(self, model, x):
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.direct_kolen_pollack()
    feedback = rule.init(jax.random.key(3), net, variables, x)
    return rule, net, variables, feedback, x, jnp.arange(len(x)) % 4

  def test_updates(self):
    rule, net, variables, feedback, x, y = self.setup(
        zoo.Plain(), jax.random.normal(jax.random.key(0), (5, 7)))
    _, (grads, own) = jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, y)
    params = jax.tree.map(np.asarray, variables['params'])
    expected = reference.direct_feedback_alignment(params, feedback, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-10, atol=1e-13), grads, expected)
    h, pre = np.asarray(x), None
    e = _error(params, h, y)
    for i in range(2):
      pre = h @ params[f'Dense_{i}']['kernel'] + params[f'Dense_{i}']['bias']
      h = np.tanh(pre)
      np.testing.assert_allclose(
          own[f'Dense_{i + 1}'], e.T @ h / len(x), rtol=1e-10)

  def test_one_feedback_for_all_positions(self):
    x = jax.random.normal(jax.random.key(0), (5, 3, 7))
    rule, net, variables, feedback, x, y = self.setup(Tokens(), x)
    _, (_, own) = jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, y)
    first = variables['params']['Dense_0']
    h = np.tanh(np.asarray(x) @ np.asarray(first['kernel'])
                + np.asarray(first['bias']))
    out = net.apply(variables, x)
    e = np.asarray(jax.nn.softmax(out) - jax.nn.one_hot(y, 4))
    np.testing.assert_allclose(
        own['Dense_1'],
        np.einsum('nc,ntd->cd', e, h) / np.sqrt(3) / len(x), rtol=1e-10)

  def test_with_decay_the_last_feedback_becomes_the_readout(self):
    rule, net, variables, feedback, x, y = self.setup(
        zoo.Plain(), jax.random.normal(jax.random.key(0), (5, 7)))
    tx = optax.adamw(.1, weight_decay=1.)  # Both shrink by .9 a step.
    trees = variables['params'], feedback
    state, learn = tx.init(trees), jax.jit(rule.value_and_grad(net, _LOSS))
    gap = lambda trees: np.asarray(
        trees[0]['Dense_2']['kernel'] - trees[1]['Dense_2'].T)
    first = gap(trees)
    for _ in range(20):
      _, updates = learn({'params': trees[0]}, trees[1], x, y)
      updates, state = tx.update(updates, state, trees)
      trees = optax.apply_updates(trees, updates)
    np.testing.assert_allclose(gap(trees), .9**20 * first, rtol=1e-8)

  @parameterized.parameters(0., -1.)
  def test_wrong_scales_are_refused(self, scale):
    with self.assertRaisesRegex(ValueError, '`scale`'):
      bpjax.rules.direct_kolen_pollack(scale)


def _error(params, x, y):
  pre = reference.mlp_forward(params, x)[0][-1]
  p = np.exp(pre - pre.max(1, keepdims=True))
  return p / p.sum(1, keepdims=True) - np.eye(4)[np.asarray(y)]


if __name__ == '__main__':
  absltest.main()
