"""Signals of examples, wherever a model keeps its batch."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import zoo


class _Tokens(nn.Module):
  """The same network four times, with its batch in another place."""
  layout: str

  @nn.compact
  def __call__(self, x):
    batch, tokens, _ = x.shape
    if self.layout == 'tokens_first':
      x = x.transpose(1, 0, 2)
    if self.layout == 'folded':
      x = x.reshape(batch * tokens, -1)
    if self.layout == 'folded_tokens_first':
      x = x.transpose(1, 0, 2).reshape(tokens * batch, -1)
    for _ in range(2):
      x = nn.tanh(nn.Dense(8)(x))
    if self.layout == 'tokens_first':
      x = x.transpose(1, 0, 2)
    if self.layout == 'folded':
      x = x.reshape(batch, tokens, -1)
    if self.layout == 'folded_tokens_first':
      x = x.reshape(tokens, batch, -1).transpose(1, 0, 2)
    return nn.Dense(3)(x.mean(1))


class _Heads(nn.Module):
  """An Einsum that puts the batch on its second axis."""

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Dense(8)(x))
    h = nn.tanh(nn.Einsum((5, 8, 6), 'BD,CDH->CBH', name='heads')(h))
    return nn.Dense(3)(h.mean(0))


class ExamplesTest(float64.Float64TestCase):

  @parameterized.product(
      layout=('tokens_first', 'folded', 'folded_tokens_first'),
      rule=('feedback_alignment', 'direct_feedback_alignment',
            'direct_random_target_projection'))
  def test_the_place_of_the_batch_changes_nothing(self, layout, rule):
    x = jax.random.normal(jax.random.key(0), (4, 6, 7))
    y = jnp.arange(4) % 3
    rule = bpjax.rules.get(rule)()
    results = []
    for model in (_Tokens('plain'), _Tokens(layout)):
      net, variables, x = float64.setup(model, x)
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      _, updates = zoo.learn(rule, net)(variables, feedback, x, y)
      measured = jax.jit(bpjax.alignment(
          net, bpjax.losses.softmax_cross_entropy, rule))(
              variables, feedback, x, y)
      results.append((feedback, updates, measured))
    self.assert_close(*(r[0] for r in results), 0)
    self.assert_close(*(r[1] for r in results), 1e-12)
    for name in ('Dense_0', 'Dense_1', 'Dense_2'):
      for a, b in zip(*(r[2][name][:3] for r in results)):
        self.assertAlmostEqual(float(a), float(b), 9)

  def test_the_batch_on_another_axis(self):
    x = jax.random.normal(jax.random.key(0), (4, 7))
    y = jnp.arange(4) % 3
    net, variables, x = float64.setup(_Heads(), x)
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    self.assertEqual(net.units['heads'].info.examples, (1, 1, 4))
    measured = bpjax.alignment(
        net, bpjax.losses.softmax_cross_entropy, rule)(
            variables, feedback, x, y)
    # By hand: each example's row of what arrives at the output of `heads`.
    probe = jnp.zeros((5, 4, 6))

    def run(probe):
      p = variables['params']
      h = jnp.tanh(x @ p['Dense_0']['kernel'] + p['Dense_0']['bias'])
      h = jnp.einsum('BD,CDH->CBH', h, p['heads']['kernel'])
      h = h + p['heads']['bias'][:, None] + probe
      out = jnp.tanh(h).mean(0) @ p['Dense_1']['kernel'] + p['Dense_1']['bias']
      return bpjax.losses.softmax_cross_entropy(out, y).sum(), (h, out)

    exact, (h, out) = jax.grad(run, has_aux=True)(probe)
    error = jax.nn.softmax(out) - jax.nn.one_hot(y, 3)
    message = error @ feedback['Dense_1']
    taught = jnp.broadcast_to(message / 5, h.shape) * (1 - jnp.tanh(h)**2)
    rows = lambda a: jnp.moveaxis(a, 1, 0).reshape(4, -1)
    cosines = [bpjax.feedback.cosine(a, b)
               for a, b in zip(rows(taught), rows(exact))]
    self.assertAlmostEqual(
        float(measured['heads'].teaching), float(jnp.mean(jnp.array(cosines))))


if __name__ == '__main__':
  absltest.main()
