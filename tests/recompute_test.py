"""Forward gradient with a second forward pass: same updates, less memory."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


class Rectified(nn.Module):

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      name = f'norm_{i}'
      x = bpjax.nn.rectified(
          self, name, nn.LayerNorm(name=name)(nn.Dense(6)(x)))
    return nn.Dense(3)(x)


def _blocks(depth):
  return [f'Dense_{i}' for i in range(depth)]


class RecomputeTest(parameterized.TestCase):

  @parameterized.parameters(
      ('plain', {}), ('plain', {'perturb': 'weight'}),
      ('plain', {'noise': 'shared'}),
      ('plain', {'directions': 'rademacher', 'samples': 2}), ('scan', {}),
      ('conv_batch_norm', {'directions': 'rademacher'}), ('rectified', {}))
  def test_the_same_updates(self, name, arguments):
    if name == 'rectified':
      model, (_, x, y) = Rectified(), zoo.inputs('plain')
    else:
      model, x, y = zoo.inputs(name)
    net = bpjax.from_linen(model)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    (a, b), (c, d) = [
        zoo.learn(bpjax.rules.forward_gradient(recompute=r, **arguments), net)(
            variables, {}, x, y, key=jax.random.key(3)) for r in (False, True)]
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6, rtol=1e-5),
        (a[0], a[1].model_state, b), (c[0], c[1].model_state, d))

  def test_memory_does_not_grow_with_depth(self):
    x, y = jnp.ones((256, 32)), jnp.arange(256) % 4

    def memory(rule, depth):
      net = bpjax.from_linen(zoo.Plain(widths=(32,) * depth))
      variables = jax.eval_shape(net.init, jax.random.key(0), x)
      return zoo.learn(rule, net).lower(
          variables, {}, x, y, key=jax.random.key(1)
      ).compile().memory_analysis().temp_size_in_bytes

    def growth(rule):
      return memory(rule, 12) - memory(rule, 4)

    again = growth(bpjax.rules.forward_gradient(recompute=True))
    self.assertLess(again, .5 * growth(bpjax.rules.backprop()))

  @parameterized.parameters(
      {}, {'directions': 'rademacher', 'samples': 2}, {'perturb': 'weight'})
  def test_the_same_updates_of_local_losses(self, **arguments):
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    found = []
    for recompute in (False, True):
      rule = bpjax.local(bpjax.rules.forward_gradient(
          recompute=recompute, **arguments), _blocks(2), head_scale=2.)
      feedback = rule.init(jax.random.key(1), net, variables, x)
      found.append(zoo.learn(rule, net)(
          variables, feedback, x, y, key=jax.random.key(3)))
    self.assertGreater(max(
        jnp.abs(g).max() for g in jax.tree.leaves(found[0][1][1]['heads'])), .01)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, atol=1e-6, rtol=1e-5),
        *found)

  def test_memory_of_local_losses_does_not_grow_with_depth(self):
    x, y = jnp.ones((256, 32)), jnp.arange(256) % 4

    def memory(rule, depth):
      net = bpjax.from_linen(zoo.Plain(widths=(32,) * depth))
      variables = jax.eval_shape(net.init, jax.random.key(0), x)
      feedback = jax.eval_shape(
          lambda key: rule.init(key, net, variables, x), jax.random.key(1))
      learn = rule.value_and_grad(net, _LOSS)

      def step(variables, feedback, key):  # In the memory of its parameters.
        _, (grads, _) = learn(variables, feedback, x, y, key=key)
        return {'params': jax.tree.map(
            lambda p, g: p - .1 * g, variables['params'], grads)}

      return jax.jit(step, donate_argnums=0).lower(
          variables, feedback, jax.random.key(1)
      ).compile().memory_analysis().temp_size_in_bytes

    own = bpjax.rules.forward_gradient(recompute=True)
    again = memory(bpjax.local(own, _blocks(12)), 12) - memory(
        bpjax.local(own, _blocks(4)), 4)
    whole = bpjax.rules.backprop()
    self.assertLess(again, .1 * (memory(whole, 12) - memory(whole, 4)))

  @parameterized.parameters(
      {'epsilon': 1e-3}, {'directions': 'orthogonal'})
  def test_refuses_what_it_cannot_take_by_layers(self, **arguments):
    with self.assertRaisesRegex(ValueError, '`recompute` must be False'):
      bpjax.rules.forward_gradient(recompute=True, **arguments)


if __name__ == '__main__':
  absltest.main()
