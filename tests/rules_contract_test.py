"""Every rule that `rules.names()` finds, through the contract."""

import dataclasses

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
    bpjax.testing.check_rule(bpjax.rules.get(name)())

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

  @parameterized.parameters(
      ('still', 'hidden layers learn'),
      ('backwards', 'the loss halves|hidden layers learn'),
      ('wrong_sign', 'the right sign'), ('sign', 'is linear in the error'),
      ('dense_only', 'a convolution works'), ('mean', 'summed over examples'))
  def test_rules_that_look_right_are_found_out(self, how, message):
    made = bpjax.rules.feedback_alignment()
    if how in ('still', 'backwards'):
      made = bpjax.rules.backprop()

    def backward(unit, feedback, signal):
      weights = feedback or unit.params  # Backprop has no feedback.
      teaching = signal.teaching
      if how == 'sign':
        teaching = jnp.sign(teaching)
      delta = unit.delta(teaching)
      grad = unit.grad(delta)
      if how == 'dense_only':
        kernel = unit.inputs[0].T @ delta.pre
        grad = {'kernel': kernel, 'bias': delta.pre.sum(0)}
      if how == 'mean':
        grad = jax.tree.map(lambda g: g / len(unit.out), grad)
      if not unit.info.is_output:
        scale = {'still': 0, 'backwards': -1, 'wrong_sign': -1}.get(how, 1)
        grad = jax.tree.map(lambda g: scale * g, grad)
      return bpjax.Credit(grad, unit.send(delta, weights))

    rule = dataclasses.replace(
        made, name='imposter', backward=backward, linear=how == 'sign')
    with self.assertRaisesRegex(AssertionError, message):
      bpjax.testing.check_rule(rule)

  def test_what_a_rule_keeps_besides_gradients(self):
    """Feedback drawn anew every second step, by a rule in the short form."""
    made = bpjax.rules.feedback_alignment()
    seen = []

    def backward(unit, feedback, signal):
      seen.append(signal.step)
      delta = unit.delta(signal.teaching)
      sent = unit.send(delta, feedback) if feedback else None
      return bpjax.Credit(unit.grad(delta), sent)

    def advance(info, feedback, step):
      fresh = made.init_unit(
          jax.random.fold_in(jax.random.key(5), step), info, info.params)
      return jax.tree.map(
          lambda old, new: jnp.where(step % 2 == 1, new, old), feedback, fresh)

    rule = dataclasses.replace(
        made, name='drawn_anew', backward=backward, counts=True,
        advance=advance)
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = jax.jit(rule.value_and_grad(net, LOSS))
    kernels = [feedback['Dense_1']['kernel']]
    for _ in range(4):
      (_, aux), (_, feedback_grads) = learn(variables, feedback, x, y)
      feedback = aux.feedback
      kernels.append(feedback['Dense_1']['kernel'])
    self.assertIsNotNone(seen[0])
    same = [bool(jnp.array_equal(a, b)) for a, b in zip(kernels, kernels[1:])]
    self.assertEqual(same, [True, False, True, False])
    self.assertFalse(any(jax.tree.leaves(rule.trainable(feedback))))
    self.assertEqual(
        jax.tree.structure(feedback), jax.tree.structure(feedback_grads))

  def test_a_rule_that_keeps_nothing_gives_the_same_feedback(self):
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    for name in zoo.BARE:
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      learn, same = rule.value_and_grad(net, LOSS), []

      def step(feedback, key):
        (_, aux), _ = learn(variables, feedback, x, y, key=key)  # pylint: disable=cell-var-from-loop
        same.append(aux.feedback is feedback)  # pylint: disable=cell-var-from-loop
        return aux.output

      jax.eval_shape(step, feedback, jax.random.key(2))
      self.assertEqual(same, [True], name)

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

    def one(key, variables):
      feedback = rule.init(key, net, variables, x)
      return learn(variables, feedback, x, y, key=key)

    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    variables = jax.vmap(net.init, (0, None))(keys, x)
    # In float64: differences of losses multiply a rounding error by a thousand.
    with jax.enable_x64(True):
      x, variables = jax.tree.map(lambda leaf: leaf.astype(float), (x, variables))
      batched = jax.jit(jax.vmap(one))(keys, variables)
      single = jax.jit(one)(keys[2], jax.tree.map(lambda leaf: leaf[2], variables))
      for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single)):
        self.assertLess(jnp.abs(a[2] - b).max(), 1e-9)


if __name__ == '__main__':
  pytest.main([__file__])
