"""Feedback that is drawn again where it is used equals feedback that is kept."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import jax
import jax.numpy as jnp
import numpy as np
from tests import zoo

_FA = bpjax.rules.feedback_alignment
_DFA = bpjax.rules.direct_feedback_alignment


def _updates(rule, net, variables, x, y):
  feedback = rule.init(jax.random.key(1), net, variables, x)
  learn = zoo.learn(rule, net)
  return feedback, learn(variables, feedback, x, y, key=jax.random.key(2))[1]


class UnstoredTest(parameterized.TestCase):

  @parameterized.parameters(
      (_FA, 'conv_batch_norm', {}), (_FA, 'encoder', {}), (_FA, 'scan', {}),
      (_DFA, 'encoder_per_token', {}), (_DFA, 'scan', {}),
      (_DFA, 'plain', {'connections': 2}))
  def test_equals_the_stored_rule(self, make, name, arguments):
    model, x, y = zoo.inputs(name)
    net = bpjax.from_linen(model)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    kept, (expected, _) = _updates(make(**arguments), net, variables, x, y)
    keys, (got, zeros) = _updates(
        make(stored=False, **arguments), net, variables, x, y)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)
    self.assertGreater(sum(a.size for a in jax.tree.leaves(kept)),
                       sum(a.size for a in jax.tree.leaves(keys)))
    for key, zero in zip(*map(jax.tree.leaves, (keys, zeros)), strict=True):
      self.assertEqual(key.dtype, jnp.uint32)
      np.testing.assert_array_equal(zero, jnp.zeros_like(key))

  @parameterized.parameters(_FA, _DFA)
  def test_alignment_draws_the_weights_it_compares_with(self, make):
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)

    def angles(rule):
      feedback = rule.init(jax.random.key(1), net, variables, x)
      measure = bpjax.alignment(net, bpjax.losses.softmax_cross_entropy, rule)
      return jax.jit(measure)(variables, feedback, x, y)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 angles(make(stored=False)), angles(make()))

  @parameterized.parameters(_FA, _DFA)
  def test_explicit_axes(self, make):
    model, x, y = zoo.Plain(widths=(8, 16), classes=8), *zoo.inputs(
        'plain', batch=8)[1:]
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    rule = make(stored=False)
    feedback, (expected, _) = _updates(rule, net, variables, x, y)
    mesh = jax.make_mesh(
        (2, 4), ('data', 'model'),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
      rows, whole = (jax.NamedSharding(mesh, jax.P(*axes))
                     for axes in (('data',), ()))
      got = zoo.learn(rule, net)(
          jax.device_put(variables, whole), jax.device_put(feedback, whole),
          *jax.device_put((x, y), rows))[1][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 got, expected)

  def test_holds_one_matrix_at_a_time(self):
    """Temporaries do not grow by the feedback of another layer."""
    x, y = jnp.ones((4, 64)), jnp.arange(4)

    def memory(layers, stored):
      net = bpjax.from_linen(zoo.Plain(widths=(512,) * layers))
      variables = jax.eval_shape(net.init, jax.random.key(0), x)
      rule = _FA(stored=stored)
      feedback = jax.eval_shape(
          lambda key: rule.init(key, net, variables, x), jax.random.key(1))
      found = zoo.learn(rule, net).lower(
          variables, feedback, x, y).compile().memory_analysis()
      return found.temp_size_in_bytes, found.argument_size_in_bytes

    matrix = 4 * 512**2
    (few, _), (many, given) = (memory(n, False) for n in (3, 7))
    self.assertLess(many - few, matrix)
    self.assertAlmostEqual(
        (memory(7, True)[1] - given) / matrix, 6, delta=.1)

  @parameterized.parameters('tied', 'transposed', 'normalised')
  def test_refuses_weights_that_are_not_as_kept(self, how):
    apply = {
        'tied': lambda w, x: jnp.einsum('nj,ij->ni', jnp.tanh(x @ w), w),
        'transposed': lambda w, x: x @ w.T,
        'normalised': lambda w, x: x @ (w / jnp.linalg.norm(w))}[how]
    net = bpjax.from_function(
        lambda params, x: apply(params['w'], x @ params['first']))
    params = {'w': jnp.ones((4, 4)), 'first': jnp.ones((3, 4))}
    with self.assertRaisesRegex(ValueError, '`stored` must be True for unit'):
      _FA(stored=False).init(
          jax.random.key(1), net, {'params': params}, jnp.ones((2, 3)))

  def test_refuses_one_matrix_for_all(self):
    with self.assertRaisesRegex(ValueError, '`stored` must be True'):
      _DFA(shared=True, stored=False)


if __name__ == '__main__':
  absltest.main()
