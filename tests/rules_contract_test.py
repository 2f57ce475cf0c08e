"""Every rule that `rules.names()` finds, through the contract."""

from absl.testing import parameterized
import bpjax
import jax
import jax.numpy as jnp
import pytest
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


class ContractTest(parameterized.TestCase):

  @parameterized.parameters(*bpjax.rules.names())
  def test_contract(self, name):
    model = None if name in zoo.BARE else bpjax.models.mlp(
        3, widths=(16, 12), activation='tanh', units='layer')
    bpjax.testing.check_rule(bpjax.rules.get(name)(), model=model)

  def test_names_are_the_files(self):
    self.assertContainsSubset(
        ('backprop', 'direct_feedback_alignment', 'feedback_alignment',
         'forward_gradient', 'kolen_pollack'), bpjax.rules.names())
    for name in bpjax.rules.names():
      self.assertIs(bpjax.rules.get(name), getattr(bpjax.rules, name))
      self.assertEqual(bpjax.rules.get(name).__name__, name)
      self.assertEqual(bpjax.rules.get(name)().name, name)

  def test_unknown_name_names_the_nearest(self):
    with self.assertRaisesRegex(ValueError, 'did you mean `feedback_alignment`'):
      bpjax.rules.get('feedbak_alignment')

  def test_a_broken_rule_is_found_out(self):
    rule = bpjax.rules.feedback_alignment()

    def lazy(unit, params, feedback, activations, signal):
      credit = rule.backward(unit, params, feedback, activations, signal)
      return credit._replace(
          params=jax.tree.map(jnp.zeros_like, credit.params))

    broken = type(rule)(
        name='lazy', init_unit=rule.init_unit, backward=lazy)
    with self.assertRaisesRegex(AssertionError, 'the loss halves'):
      bpjax.testing.check_rule(broken)

  @parameterized.parameters(*zoo.BARE)
  def test_batch_statistics_and_dropout_pass_through(self, name):
    model, x, y = zoo.inputs('conv_batch_norm')
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = jax.jit(rule.value_and_grad(net, LOSS))
    outputs = []
    for key in (2, 2, 3):
      (_, aux), _ = learn(variables, feedback, x, y, key=jax.random.key(key))
      outputs.append(aux.output)
    _, expected = model.apply(
        variables, x, train=True, mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(9)})
    for path, stat in zip(
        bpjax.paths.leaf_names(expected['batch_stats']),
        jax.tree.leaves(expected['batch_stats'])):
      got = bpjax.paths.subtree(aux.model_state['batch_stats'], path)
      self.assertLess(jnp.abs(got - stat).max(), 1e-5, path)
    self.assertTrue(jnp.array_equal(outputs[0], outputs[1]))
    self.assertFalse(jnp.array_equal(outputs[0], outputs[2]))

  @parameterized.parameters(*bpjax.rules.names())
  def test_vmap_over_seeds(self, name):
    model, x, y = zoo.inputs('plain' if name in zoo.BARE else 'layered')
    net = bpjax.from_linen(model)
    rule = bpjax.rules.get(name)()
    learn = rule.value_and_grad(net, LOSS)

    def one(seed):
      key = jax.random.key(seed)
      variables = net.init(key, x)
      feedback = rule.init(key, net, variables, x)
      return learn(variables, feedback, x, y, key=key)

    batched = jax.jit(jax.vmap(one))(jnp.arange(3))
    single = jax.jit(one)(2)
    for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single)):
      self.assertLess(jnp.abs(a[2] - b).max(), 1e-5)


if __name__ == '__main__':
  pytest.main([__file__])
