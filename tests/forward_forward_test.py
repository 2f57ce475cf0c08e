"""Forward-Forward against numpy, and what it refuses."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64

_LOSS = bpjax.losses.softmax_cross_entropy
_RULE = bpjax.rules.forward_forward


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    for width in (6, 5):
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(4)(x)


def _sigmoid(a):
  return 1 / (1 + np.exp(-a))


def reference(params, x, passes, y, threshold):
  """Mean updates; `passes` are the inputs with right, wrong and no label."""
  grads = [[0., 0.] for _ in params]
  for inputs, sign in zip(passes, (1, -1, 0)):
    h = inputs
    for l, (w, b) in enumerate(params):
      a = h @ w + b
      if l == len(params) - 1:
        if sign == 0:
          p = np.exp(a - a.max(1, keepdims=True))
          delta = p / p.sum(1, keepdims=True) - np.eye(a.shape[1])[y]
          grads[l][0] += h.T @ delta / len(x)
          grads[l][1] += delta.mean(0)
        continue
      out = np.maximum(a, 0)
      goodness = (out**2).mean(1, keepdims=True)
      delta = -sign * _sigmoid(sign * (threshold - goodness)) * (
          2 * out / out.shape[1])
      grads[l][0] += h.T @ delta / len(x)
      grads[l][1] += delta.mean(0)
      h = out / np.sqrt((out**2).mean(1, keepdims=True) + 1e-8)
  return grads


class ForwardForwardTest(float64.Float64TestCase):

  def setup(self):
    net, variables, x = float64.setup(
        Net(), jax.random.normal(jax.random.key(0), (5, 7)))
    return net, variables, x, jnp.arange(5) % 4

  def test_updates(self):
    net, variables, x, y = self.setup()
    key = jax.random.key(2)
    (_, aux), (grads, _) = jax.jit(_RULE(.7).value_and_grad(net, _LOSS))(
        variables, {}, x, y, key=key)
    wrong = (y + jax.random.randint(
        jax.random.split(key)[1], y.shape, 1, 4)) % 4
    self.assertTrue(np.all(wrong != y))
    labelled = lambda said: np.concatenate([np.asarray(x)[:, :4] + said, np.asarray(x)[:, 4:]], 1)
    passes = [labelled(np.eye(4)[np.asarray(y)]),
              labelled(np.eye(4)[np.asarray(wrong)]),
              labelled(np.full((5, 4), .25))]
    params = [tuple(np.asarray(variables['params'][f'Dense_{i}'][n])
                    for n in ('kernel', 'bias')) for i in range(3)]
    for i, (kernel, bias) in enumerate(
        reference(params, x, passes, np.asarray(y), .7)):
      np.testing.assert_allclose(
          grads[f'Dense_{i}']['kernel'], kernel, rtol=1e-10, atol=1e-13)
      np.testing.assert_allclose(
          grads[f'Dense_{i}']['bias'], bias, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(
        _RULE(.7).predict(net)(variables, x), aux.output, rtol=1e-12)

  def test_what_it_cannot_train_is_refused(self):
    net, variables, x, _ = self.setup()
    learn = _RULE().value_and_grad(net, _LOSS)
    with self.assertRaisesRegex(ValueError, 'whole numbers'):
      learn(variables, {}, x, jnp.ones((5, 4)), key=jax.random.key(0))
    both = _RULE().value_and_grad(net, lambda output, y: _LOSS(output, y[0]))
    with self.assertRaisesRegex(ValueError, 'whole numbers .*, got tuple'):
      both(variables, {}, x, (jnp.zeros(5, int), jnp.ones(5)),
           key=jax.random.key(0))
    with self.assertRaisesRegex(ValueError, '`key` is needed'):
      learn(variables, {}, x, jnp.zeros(5, int))
    narrow = jnp.ones((5, 3))
    variables = net.init(jax.random.key(0), narrow)
    with self.assertRaisesRegex(ValueError, 'first 4 entries'):
      _RULE().init(jax.random.key(0), net, variables, narrow)

  def test_logits_are_found_among_outputs(self):
    """A scalar and a value before them, and the same updates as alone."""
    def apply(params, x, beside=True):
      h = jnp.tanh(x @ params['a'])
      logits, value = h @ params['o'], h @ params['v']
      if not beside:
        return logits
      return {'balance': jnp.mean(h), 'chance': value, 'logits': logits}

    params = {name: jax.random.normal(jax.random.key(i), shape) for i, (
        name, shape) in enumerate({'a': (8, 6), 'o': (6, 4), 'v': (6, 1)}.items())}
    x, y = jax.random.normal(jax.random.key(3), (5, 8)), jnp.arange(5) % 4
    found = []
    for beside in (True, False):
      net = bpjax.from_function(functools.partial(apply, beside=beside))
      loss = (lambda o, y: _LOSS(o['logits'], y)) if beside else _LOSS
      _RULE().init(jax.random.key(0), net, {'params': params}, x)
      found.append(jax.jit(_RULE().value_and_grad(net, loss))(
          {'params': params}, {}, x, y, key=jax.random.key(1))[1][0])
    for name in ('a', 'o'):
      self.assertGreater(jnp.abs(found[0][name]).max(), 0)
      np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    net = bpjax.from_function(lambda params, x: (x @ params['a'])[:, 0])
    with self.assertRaisesRegex(ValueError, r'needs logits.* got \(5,\)'):
      _RULE().init(jax.random.key(0), net, {'params': params}, x)

  @parameterized.parameters(
      (dict(threshold=0.), '`threshold`'),
      (dict(label_scale=float('inf')), '`label_scale`'))
  def test_wrong_values_are_refused(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      _RULE(**arguments)


if __name__ == '__main__':
  absltest.main()
