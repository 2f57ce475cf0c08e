"""One optimiser over parameters and feedback."""

from absl.testing import absltest
import bpjax
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo


class OptimizerTest(absltest.TestCase):

  def _trees(self, rule):
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, grads = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)(
        variables, feedback, x, y)
    return (variables['params'], feedback), grads

  def _step(self, rule):
    trees, grads = self._trees(rule)
    tx = bpjax.optimizer(optax.adamw(1e-2, weight_decay=.5), rule, trees[1])
    updates, _ = jax.jit(tx.update)(grads, tx.init(trees), trees)
    return trees, optax.apply_updates(trees, updates)

  def test_fixed_feedback_stays_under_decay(self):
    before, after = self._step(bpjax.rules.feedback_alignment())
    for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1])):
      self.assertTrue(jnp.array_equal(a, b))
    for a, b in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0])):
      self.assertFalse(jnp.array_equal(a, b))

  def test_kolen_pollack_keeps_its_law(self):
    (params, feedback), (new_params, new_feedback) = self._step(
        bpjax.rules.kolen_pollack())
    for unit, part in feedback.items():
      gap = params[unit]['kernel'] - part['kernel']
      new = new_params[unit]['kernel'] - new_feedback[unit]['kernel']
      self.assertLess(jnp.abs(new - (1 - 1e-2 * .5) * gap).max(), 1e-6)

  def test_other_feedback_is_refused(self):
    rule = bpjax.rules.feedback_alignment()
    trees, _ = self._trees(rule)
    tx = bpjax.optimizer(optax.sgd(1.), rule, trees[1])
    with self.assertRaisesRegex(ValueError, 'structure of the feedback'):
      tx.init((trees[0], {}))
    with self.assertRaisesRegex(ValueError, 'takes the pair'):
      tx.init(trees[0])


if __name__ == '__main__':
  pytest.main([__file__])
