"""PEPITA against numpy, and what it refuses."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


def _forward(params, x):
  """[x, h_1, ..., logits] of tanh layers."""
  hs = [x]
  for i, p in enumerate(params):
    a = hs[-1] @ np.asarray(p['kernel']) + np.asarray(p['bias'])
    hs.append(a if i == len(params) - 1 else np.tanh(a))
  return hs


class Probabilities(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.softmax(zoo.Plain(name='inner')(x))


class Normed(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.LayerNorm()(nn.tanh(nn.Dense(6)(x))))


class PepitaTest(float64.Float64TestCase):

  def setup(self, model):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.pepita()
    feedback = rule.init(jax.random.key(3), net, variables, x)
    return rule, net, variables, feedback, x, jnp.arange(5) % 4

  @parameterized.parameters('logits', 'probabilities')
  def test_updates(self, kind):
    rule, net, variables, feedback, x, y = self.setup(
        zoo.Plain() if kind == 'logits' else Probabilities())
    loss = _LOSS if kind == 'logits' else (
        lambda p, y: -jnp.log(jnp.take_along_axis(p, y[:, None], 1)[:, 0]))
    _, (grads, fixed) = jax.jit(rule.value_and_grad(net, loss))(
        variables, feedback, x, y)
    params = variables['params']
    if kind == 'probabilities':
      params, grads = params['inner'], grads['inner']
    params = [params[f'Dense_{i}'] for i in range(3)]
    f, = (np.asarray(leaf) for leaf in jax.tree.leaves(feedback))
    hs = _forward(params, np.asarray(x))
    p = np.exp(hs[-1] - hs[-1].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    at_logits = p - np.eye(4)[np.asarray(y)]
    changed = _forward(params, np.asarray(x) + at_logits @ f)
    for i in range(3):
      delta = at_logits if i == 2 else hs[i + 1] - changed[i + 1]
      np.testing.assert_allclose(
          grads[f'Dense_{i}']['kernel'], changed[i].T @ delta / 5, rtol=1e-10,
          atol=1e-14)
      np.testing.assert_allclose(
          grads[f'Dense_{i}']['bias'], delta.mean(0), rtol=1e-10, atol=1e-14)
    self.assertFalse(any(jnp.any(leaf) for leaf in jax.tree.leaves(fixed)))

  def test_what_it_cannot_train_is_refused(self):
    rule = bpjax.rules.pepita()
    x = jnp.ones((5, 7))
    net, variables, x = float64.setup(Normed(), x)
    with self.assertRaisesRegex(ValueError, 'is part of none'):
      rule.init(jax.random.key(0), net, variables, x)
    embed = nn.Sequential([nn.Embed(7, 3), lambda h: h.mean(1), nn.Dense(4)])
    net = bpjax.from_linen(embed)
    tokens = jnp.zeros((5, 7), int)
    variables = net.init(jax.random.key(0), tokens)
    with self.assertRaisesRegex(ValueError, 'needs one array of floats'):
      rule.init(jax.random.key(0), net, variables, tokens)
    with self.assertRaisesRegex(ValueError, '`scale`'):
      bpjax.rules.pepita(scale=0.)

  def test_feedback_of_another_network_is_refused(self):
    rule, net, variables, _, x, y = self.setup(zoo.Plain())
    with self.assertRaisesRegex(ValueError, 'must be what `rule.init`'):
      rule.value_and_grad(net, _LOSS)(variables, {}, x, y)


if __name__ == '__main__':
  absltest.main()
