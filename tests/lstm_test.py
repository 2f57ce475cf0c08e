"""The recurrent model against numpy, its mask, and its gradient."""

import math

from absl.testing import absltest
import bpjax
import expected
import float64
import jax
import jax.numpy as jnp
import numpy as np

LOSS = bpjax.losses.softmax_cross_entropy
_LENGTHS = np.array([5, 3, 1])


def _small(pool='mean'):
  model = bpjax.models.lstm(3, width=4, vocabulary=9, length=6, pool=pool)
  tokens = jax.random.randint(jax.random.key(0), (3, 5), 0, 9)
  mask = jnp.arange(5) < jnp.array(_LENGTHS)[:, None]
  net = bpjax.from_linen(model)
  x = bpjax.Inputs(tokens, mask=mask)
  variables = float64.doubles(net.init(jax.random.key(1), x))
  return net, variables, x, np.array(tokens), jnp.arange(3) % 3


def _sigmoid(a):
  return 1 / (1 + np.exp(-a))


def _reference(params, tokens, pool):
  """Sentence by sentence, each as long as it is."""
  p = jax.tree.map(np.asarray, params)
  rows = []
  for row, length in zip(tokens, _LENGTHS):
    h, c, outs = np.zeros(4), np.zeros(4), []
    for token in row[:length]:
      x = p['token']['embedding'][token]
      gates = {
          g: x @ p['cell'][f'i{g}']['kernel'] + h @ p['cell'][f'h{g}']['kernel']
          + p['cell'][f'h{g}']['bias'] for g in 'ifgo'}
      c = (_sigmoid(gates['f']) * c
           + _sigmoid(gates['i']) * np.tanh(gates['g']))
      h = _sigmoid(gates['o']) * np.tanh(c)
      outs.append(h)
    read = np.mean(outs, 0) if pool == 'mean' else outs[-1]
    rows.append(read @ p['readout']['kernel'] + p['readout']['bias'])
  return np.array(rows)


class LstmTest(absltest.TestCase):

  def test_is_that_of_numpy_whatever_is_padded(self):
    with jax.enable_x64(True):
      for pool in ('mean', 'last'):
        net, variables, x, tokens, _ = _small(pool)
        want = _reference(variables['params'], tokens, pool)
        np.testing.assert_allclose(net.apply(variables, x), want, rtol=1e-10)
        other = bpjax.Inputs((x.args[0] + 1 * ~x.kwargs['mask']) % 9,
                             **x.kwargs)
        np.testing.assert_array_equal(
            net.apply(variables, other), net.apply(variables, x))

  def test_backprop_is_the_gradient(self):
    with jax.enable_x64(True):
      net, variables, x, _, y = _small()
      rule = bpjax.rules.backprop()
      learn = jax.jit(rule.value_and_grad(net, LOSS))
      _, (grads, _) = learn(
          variables, rule.init(jax.random.key(2), net, variables, x), x, y)
      want = expected.gradient(net, LOSS, variables, x, y, jax.random.key(0))
      jax.tree.map(lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-9, atol=1e-12), grads, want)

  def test_size_and_refusals(self):
    model = bpjax.models.lstm(2)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((2, 7), jnp.int32))
    size = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes['params']))
    self.assertIn(f'{size:,}', bpjax.models.lstm.__doc__)
    with self.assertRaisesRegex(ValueError, '`pool` must be'):
      bpjax.models.lstm(2, pool='max')
    with self.assertRaisesRegex(ValueError, '`width` must be'):
      bpjax.models.lstm(2, width=0)
    with self.assertRaisesRegex(ValueError, 'as long as the positions'):
      bpjax.models.lstm(2, length=3).init(
          jax.random.key(0), jnp.zeros((2, 7), jnp.int32))


if __name__ == '__main__':
  absltest.main()
