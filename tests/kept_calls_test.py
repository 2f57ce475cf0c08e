"""Equal units share one traced function, and learn as if they did not."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax.engines import calls
import chex
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


class _Blocks(nn.Module):
  """Four residual blocks of two convolutions, and a remat of four layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    for _ in range(4):
      y = nn.Conv(4, (3, 3))(nn.tanh(nn.GroupNorm(2)(x)))
      x = x + nn.Conv(4, (1, 1), use_bias=False)(nn.tanh(y))
    x = x.mean((1, 2))
    for i in range(4):
      x, _ = nn.remat(zoo.Layer)(name=f'layer_{i}')(
          x if i else nn.Dense(6)(x))
    return nn.Dense(3)(x)


def _setup(what):
  key = jax.random.key(7)
  label = jnp.arange(5) % 3
  if what == 'chain':
    model, x = zoo.Plain((7,) * 5), jax.random.normal(key, (5, 7))
  else:
    model, x = _Blocks(), jax.random.normal(key, (5, 6, 6, 2))
  return (*float64.setup(model, x), label)


def _step(rule, net, variables, x, y):
  feedback = rule.init(jax.random.key(1), net, variables, x)
  return zoo.learn(rule, net)(variables, feedback, x, y, jax.random.key(2))


class KeptCallsTest(float64.Float64TestCase):

  @parameterized.parameters(
      'feedback_alignment', 'direct_feedback_alignment', 'kolen_pollack',
      'weight_mirror')
  def test_all_learn_as_if_traced_alone(self, rule):
    self._assert_same(bpjax.rules.get(rule)(), 'blocks')

  @parameterized.parameters(*zoo.TARGETS)
  def test_targets_are_set_as_if_traced_alone(self, rule):
    self._assert_same(bpjax.rules.get(rule)(), 'chain')

  @parameterized.parameters('mean', 'sum')
  def test_a_mixture_of_rules(self, reduction):
    rule = bpjax.rules.by_path({
        'Conv_*': bpjax.rules.feedback_alignment(),
        'layer_1/*': bpjax.rules.kolen_pollack(),
        '*': bpjax.rules.direct_feedback_alignment()})
    self._assert_same(rule, 'blocks', reduction={'Conv_3*': reduction})

  def _assert_same(self, rule, what, **kwargs):
    net, variables, x, y = _setup(what)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    step = lambda: zoo.learn(rule, net, **kwargs)(
        variables, feedback, x, y, jax.random.key(2))
    kept = step()
    few, calls._FEW = calls._FEW, 10**6
    self.addCleanup(setattr, calls, '_FEW', few)
    chex.assert_trees_all_close(kept, step(), rtol=0, atol=1e-12)

  def test_a_rule_is_traced_a_few_times_however_deep_the_net(self):
    counts = []
    for depth in (6, 24):
      net, variables, x = float64.setup(
          zoo.Plain((7,) * depth), jnp.ones((5, 7)))
      asked = []

      def backward(unit, feedback, signal):
        del feedback
        asked.append(None)  # pylint: disable=cell-var-from-loop
        delta = unit.delta(signal.teaching)
        return bpjax.Credit(unit.grad(delta), unit.send(delta, unit.params))

      rule = bpjax.engines.UnitRule(name='mine', backward=backward)
      jax.jit(rule.value_and_grad(net, _LOSS)).trace(
          variables, {}, x, jnp.zeros(5, int))
      counts.append(len(asked))
    self.assertEqual(counts[0], counts[1])
    self.assertLess(counts[0], 8)

  def test_a_rule_that_reads_a_name_answers_for_each(self):
    net, variables, x, y = _setup('chain')

    def backward(unit, feedback, signal):
      del feedback
      delta = unit.delta(signal.teaching)
      factor = 1. + int(unit.info.name.removeprefix('Dense_'))
      return bpjax.Credit(
          jax.tree.map(lambda g: factor * g, unit.grad(delta)),
          unit.send(delta, unit.params))

    rule = bpjax.engines.UnitRule(name='mine', backward=backward)
    _, (grads, _) = _step(rule, net, variables, x, y)
    _, (exact, _) = _step(bpjax.rules.backprop(), net, variables, x, y)
    for i in range(6):
      chex.assert_trees_all_close(
          grads[f'Dense_{i}'],
          jax.tree.map(lambda g: (1 + i) * g, exact[f'Dense_{i}']),  # pylint: disable=cell-var-from-loop
          rtol=0, atol=1e-12)

  def test_equal_shapes_are_not_equal_equations(self):
    """Axes, factors, and what is taken from what."""
    def apply(params, x, train=False):
      del train
      for i, layer in enumerate(params.values()):
        h = jnp.einsum('ni,oi->no' if i % 2 else 'ni,io->no', x, layer['w'])
        h = h * (2. if i < 6 else 3.)
        x = jnp.tanh(h - layer['b'] if i % 4 < 2 else layer['b'] - h)
      return x

    params = {f'layer_{i:02}': {
        name: jax.random.normal(jax.random.key(i), shape) / 4
        for name, shape in (('w', (4, 4)), ('b', (4,)))} for i in range(12)}
    # One example: its outputs have the shape of a bias that is broadcast.
    net, x = bpjax.from_function(apply), jnp.linspace(-1, 1, 4)[None]
    y = jnp.arange(1)
    few, calls._FEW = calls._FEW, 2
    self.addCleanup(setattr, calls, '_FEW', few)
    _, (grads, _) = _step(
        bpjax.rules.backprop(), net, {'params': params}, x, y)
    exact = jax.grad(lambda p: _LOSS(apply(p, x), y).mean())(params)
    chex.assert_trees_all_close(grads, exact, rtol=0, atol=1e-12)


if __name__ == '__main__':
  absltest.main()
