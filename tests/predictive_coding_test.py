"""Predictive coding against numpy, and in its limits."""

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

_RULE = bpjax.rules.predictive_coding
_LOSS = bpjax.losses.softmax_cross_entropy


def reference(params, x, y, steps, step_size):
  """Updates of tanh layers with a linear readout, summed over examples."""
  f64 = lambda a: np.asarray(a, np.float64)
  weights = [(f64(p['kernel']), f64(p['bias'])) for p in params]
  last = len(weights) - 1
  states = [f64(x)]
  for w, b in weights[:-1]:
    states.append(np.tanh(states[-1] @ w + b))

  def errors():
    made = []
    for l, (w, b) in enumerate(weights):
      pre = states[l] @ w + b
      if l == last:
        p = np.exp(pre - pre.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        made.append((p - np.eye(pre.shape[1])[y], None))
      else:
        # -dE/d(pre), and the error of prediction itself.
        error = states[l + 1] - np.tanh(pre)
        made.append((-error * (1 - np.tanh(pre)**2), error))
    return made

  for _ in range(steps):
    made = errors()
    for l in range(1, last + 1):
      force = made[l - 1][1] + made[l][0] @ weights[l][0].T
      states[l] = states[l] - step_size * force
  return [{'kernel': states[l].T @ delta, 'bias': delta.sum(0)}
          for l, (delta, _) in enumerate(errors())]


class PredictiveCodingTest(float64.Float64TestCase):

  def setup(self, model=None):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    net, variables, x = float64.setup(model or zoo.Plain(), x)
    return net, variables, x, jnp.arange(5) % 4

  @parameterized.parameters((1, .2), (3, .2), (25, .1))
  def test_updates(self, steps, step_size):
    net, variables, x, y = self.setup()
    learn = _RULE(steps=steps, step_size=step_size).value_and_grad(
        net, _LOSS, reduction='sum')
    (value, aux), (grads, _) = jax.jit(learn)(variables, {}, x, y)
    np.testing.assert_allclose(aux.output, net.apply(variables, x), rtol=1e-12)
    np.testing.assert_allclose(value, _LOSS(aux.output, y).mean(), rtol=1e-12)
    expected = reference(
        [variables['params'][f'Dense_{i}'] for i in range(3)], x, np.asarray(y),
        steps, step_size)
    for i, unit in enumerate(expected):
      jax.tree.map(
          functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
          grads[f'Dense_{i}'], unit)

  def test_a_weak_loss_gives_backprop(self):
    # Layer norms are outside of units: they learn too.
    class Normed(nn.Module):

      @nn.compact
      def __call__(self, x):
        for _ in range(2):
          x = nn.LayerNorm()(nn.tanh(nn.Dense(6)(x)))
        return nn.LayerNorm()(nn.Dense(4)(x))

    net, variables, x, y = self.setup(Normed())
    weak = lambda out, y: 1e-7 * _LOSS(out, y)
    (_, (grads, _)), (_, (exact, _)) = (
        jax.jit(rule.value_and_grad(net, weak))(variables, {}, x, y)
        for rule in (_RULE(6000, .1), bpjax.rules.backprop()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        1e7 * a, 1e7 * b, rtol=1e-4, atol=1e-5), grads, exact)

  @parameterized.parameters(
      (dict(steps=0), '`steps`'), (dict(steps=1.5), '`steps`'),
      (dict(step_size=0.), '`step_size`'),
      (dict(step_size=float('nan')), '`step_size`'))
  def test_wrong_values_are_refused(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      _RULE(**arguments)

  def test_states_are_not_carried_to_the_next_batch(self):
    net, variables, x, y = self.setup()
    learn = jax.jit(_RULE().value_and_grad(net, _LOSS))
    (_, aux), _ = learn(variables, {}, x, y)
    self.assertNotIn('particles', aux.model_state)


if __name__ == '__main__':
  absltest.main()
