"""The gain of a norm, and whether errors pass it."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


class Normed(nn.Module):
  norm: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Dense(6)(x)
    x = {
        'batch': lambda: nn.BatchNorm(use_running_average=not train),
        'layer': nn.LayerNorm,
        'group': lambda: nn.GroupNorm(2),
        'rms': nn.RMSNorm,
    }[self.norm]()(x)
    return nn.Dense(3)(nn.tanh(x))


class NnxNormed(nnx.Module):

  def __init__(self, norm, rngs):
    self.first = nnx.Linear(5, 6, rngs=rngs)
    self.norm = {
        'batch': nnx.BatchNorm, 'layer': nnx.LayerNorm, 'rms': nnx.RMSNorm,
        'group': lambda n, rngs: nnx.GroupNorm(n, 2, rngs=rngs)}[norm](
            6, rngs=rngs)
    self.second = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.tanh(self.norm(self.first(x))))


def nets(api, norm, **arguments):
  """A network whose gains are no ones, with its names of the parts."""
  x = jax.random.normal(jax.random.key(0), (8, 5), jnp.float64)
  if api == 'linen':
    net = bpjax.from_linen(Normed(norm), **arguments)
    variables = net.init(jax.random.key(1), x)
    names = ('Dense_0', next(
        k for k in variables['params'] if 'Norm' in k), 'Dense_1')
  else:
    net = bpjax.from_nnx(NnxNormed(norm, nnx.Rngs(0)), **arguments)
    variables = net.init(jax.random.key(1), x)
    names = ('first', 'norm', 'second')
  variables = float64.doubles(variables)
  params = {**variables['params']}
  params[names[1]] = {
      **params[names[1]], 'scale': jnp.linspace(-1., 2., 6, dtype=jnp.float64)}
  return net, {**variables, 'params': params}, x, names


class NormGainTest(float64.Float64TestCase):

  @parameterized.product(
      api=('linen', 'nnx'), norm=('batch', 'layer', 'group', 'rms'))
  def test_messages_pass_a_gain_of_one(self, api, norm):
    y = jnp.arange(8) % 3
    learned = {}
    for transport in ('exact', 'feedback_diag'):
      net, variables, x, names = nets(
          api, norm, norm_gain_transport=transport)
      (value, aux), (grads, _) = jax.jit(
          bpjax.rules.backprop().value_and_grad(net, _LOSS))(
              variables, {}, x, y)
      learned[transport] = (value, aux, grads)
    first, gain, second = names
    for a, b in zip(*(learned[t][:2] for t in learned)):
      jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, 1e-12), a, b)
    exact, fixed = (learned[t][2] for t in learned)
    # At the norm and above it nothing changes ...
    for name in (gain, second):
      self.assert_close(exact[name], fixed[name], 1e-12)
    # ... below it the gain is missing: what the exact rule gives where the
    # teaching at the norm's output was divided by it.
    scale = variables['params'][gain]['scale']

    def divided(params):
      kernel, bias = params[first]['kernel'], params[first]['bias']
      h = x @ kernel + bias
      if norm == 'batch':
        z = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
      elif norm == 'rms':
        z = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
      else:
        groups = h.reshape(8, 1 if norm == 'layer' else 2, -1)
        z = (groups - groups.mean(-1, keepdims=True)) / jnp.sqrt(
            groups.var(-1, keepdims=True) + 1e-6)
        z = z.reshape(h.shape)
      shift = variables['params'][gain].get('bias', 0.)
      stopped = jax.lax.stop_gradient(z)
      n = scale * stopped + shift + (z - stopped)
      out = jnp.tanh(n) @ params[second]['kernel'] + params[second]['bias']
      return _LOSS(out, y).mean()

    expected = jax.grad(divided)(variables['params'])
    self.assert_close(fixed[first], expected[first], 1e-11)
    self.assertGreater(
        np.abs(exact[first]['kernel'] - fixed[first]['kernel']).max(), 1e-3)

  @parameterized.parameters('linen', 'nnx')
  def test_every_rule_takes_it(self, api):
    net, variables, x, _ = nets(
        api, 'layer', norm_gain_transport='feedback_diag')
    for name in zoo.BARE:
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(2), net, variables, x)
      (_, _), (grads, _) = rule.value_and_grad(net, _LOSS)(
          variables, feedback, x, jnp.arange(8) % 3, jax.random.key(3))
      self.assertTrue(
          all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)))

  def test_refusals(self):
    with self.assertRaisesRegex(ValueError, "'exact' or 'feedback_diag'"):
      bpjax.from_linen(Normed('layer'), norm_gain_transport='none')

    class Across(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm(feature_axes=(1,))(nn.Dense(4)(x)))

    net = bpjax.from_linen(Across(), norm_gain_transport='feedback_diag')
    with self.assertRaisesRegex(ValueError, 'features on the last axis'):
      net.init(jax.random.key(0), jnp.ones((2, 5, 3)))


if __name__ == '__main__':
  absltest.main()
