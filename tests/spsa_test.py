"""SPSA: its mean is the gradient, and its memory that of inference."""

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


class Wide(nn.Module):

  @nn.compact
  def __call__(self, x, train: bool = False):
    for _ in range(6):
      x = nn.tanh(nn.Dense(64)(x))
    return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


class SpsaTest(float64.Float64TestCase):

  def test_the_change_of_the_loss_along_the_direction(self):
    x = jax.random.normal(jax.random.key(0), (6, 7))
    net, variables, x = float64.setup(zoo.Plain(), x)
    y = jnp.arange(6) % 4
    learn = jax.jit(bpjax.rules.spsa(1e-5).value_and_grad(net, _LOSS))
    (value, _), (grads, _) = learn(variables, {}, x, y, key=jax.random.key(1))
    plain = lambda p: _LOSS(net.apply({'params': p}, x), y).mean()
    np.testing.assert_allclose(value, plain(variables['params']), rtol=1e-6)
    # The update is c z with c the slope along z: c z . grad = c^2.
    exact = jax.grad(plain)(variables['params'])
    flat = lambda tree: np.concatenate(
        [np.ravel(a) for a in jax.tree.leaves(tree)])
    g = flat(grads)
    slope = np.sqrt(g @ flat(exact))
    z = g / slope
    np.testing.assert_allclose(z @ flat(exact), slope, rtol=1e-6)
    self.assertLess(abs(np.mean(z)), 4 / np.sqrt(len(z)))
    self.assertLess(abs(np.mean(z**2) - 1), 4 * np.sqrt(2 / len(z)))

  def test_the_mean_of_many_is_the_gradient(self):
    x = jax.random.normal(jax.random.key(0), (6, 3))
    net, variables, x = float64.setup(zoo.Plain((3,)), x)
    y = jnp.arange(6) % 4
    learn = bpjax.rules.spsa(1e-4).value_and_grad(net, _LOSS)
    draws = jax.jit(jax.vmap(
        lambda key: learn(variables, {}, x, y, key=key)[1][0]))(
            jax.random.split(jax.random.key(1), 4000))
    _, (exact, _) = bpjax.rules.backprop().value_and_grad(net, _LOSS)(
        variables, {}, x, y)

    def near(a, b):
      error = a.std(0) / np.sqrt(len(a))
      # 4 standard errors, for each of 28 entries.
      self.assertTrue(np.all(np.abs(a.mean(0) - b) < 4 * error + 1e-7))

    jax.tree.map(near, draws, exact)

  @parameterized.parameters(1, 3)
  def test_a_step_needs_the_memory_of_inference(self, samples):
    x, y = jnp.ones((8192, 64)), jnp.zeros(8192, int)
    net = bpjax.from_linen(Wide())
    variables = jax.jit(net.init)(jax.random.key(0), x)
    learn = bpjax.rules.spsa(samples=samples).value_and_grad(net, _LOSS)
    step = jax.jit(lambda *args, key: (lambda r: (r[0][0], r[1]))(
        learn(*args, key=key)))
    inference = jax.jit(lambda v, x, y: _LOSS(net.apply(v, x), y).mean())
    memory = lambda lowered: (
        lowered.compile().memory_analysis().temp_size_in_bytes
        + sum(a.nbytes for a in jax.tree.leaves((variables, x, y))))
    self.assertLess(
        memory(step.lower(variables, {}, x, y, key=jax.random.key(1))),
        1.15 * memory(inference.lower(variables, x, y)))

  @parameterized.parameters(
      (dict(epsilon=0.), '`epsilon`'), (dict(samples=0), '`samples`'),
      (dict(samples=1.5), '`samples`'))
  def test_wrong_values_are_refused(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      bpjax.rules.spsa(**arguments)

  def test_a_key_is_needed(self):
    net, variables, x = float64.setup(
        zoo.Plain(), jax.random.normal(jax.random.key(0), (6, 7)))
    with self.assertRaisesRegex(ValueError, '`key` is needed'):
      bpjax.rules.spsa().value_and_grad(net, _LOSS)(
          variables, {}, x, jnp.zeros(6, int))


if __name__ == '__main__':
  absltest.main()
