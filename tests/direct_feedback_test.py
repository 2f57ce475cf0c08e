"""Direct feedback: sparse matrices, where it is placed, matrices over devices."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy
_DIRECT = bpjax.rules.direct_feedback_alignment


def dense(part, n_out):
  """The matrix that a sparse one stands for, entry by entry."""
  entries, values = map(np.asarray, (part['entries'], part['values']))
  whole = np.zeros((n_out, *entries.shape[1:]), values.dtype)
  for index in np.ndindex(entries.shape):
    whole[(entries[index], *index[1:])] += values[index]
  return whole


class SparseTest(float64.Float64TestCase):

  def _learn(self, rule, net, variables, x, y, feedback):
    return jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, y, jax.random.key(3))[1]

  @parameterized.parameters(
      (zoo.Plain(widths=(6, 5, 7)), (8, 10), 4),
      (zoo.ConvBatchNorm(), (8, 8, 8, 2), 3))
  def test_equals_the_dense_rule_with_that_matrix(self, model, shape, n_out):
    net, variables, x = float64.setup(
        model, jax.random.normal(jax.random.key(0), shape))
    y = jnp.arange(8) % n_out
    sparse = _DIRECT(connections=2)
    feedback = sparse.init(jax.random.key(2), net, variables, x)
    whole = {unit: dense(part, n_out) for unit, part in feedback.items()}
    for matrix in whole.values():
      np.testing.assert_array_equal(np.count_nonzero(matrix, axis=0), 2)
    grads, feedback_grads = self._learn(sparse, net, variables, x, y, feedback)
    expected, _ = self._learn(_DIRECT(), net, variables, x, y, whole)
    self.assert_close(grads, expected, 1e-14)
    self.assert_close(
        feedback_grads, jax.tree.map(jnp.zeros_like, feedback), 0)
    self.assertFalse(any(jax.tree.leaves(sparse.trainable(feedback))))

  def test_one_matrix_for_all_layers(self):
    net, variables, x = float64.setup(
        zoo.Plain(widths=(6, 5, 7)), jax.random.normal(jax.random.key(0), (8, 9)))
    y = jnp.arange(8) % 4
    rule = _DIRECT(shared=True, connections=3)
    feedback = rule.init(jax.random.key(2), net, variables, x)
    shared = dense(feedback['_shared']['direct_feedback_alignment'], 4)
    self.assertEqual(shared.shape, (4, 7))
    whole = {f'Dense_{i}': shared[:, :size] / np.sqrt(3 * size)
             for i, size in ((1, 6), (2, 5), (3, 7))}
    grads, _ = self._learn(rule, net, variables, x, y, feedback)
    expected, _ = self._learn(_DIRECT(), net, variables, x, y, whole)
    self.assert_close(grads, expected, 1e-14)

  def test_all_connections_have_the_variance_of_the_dense_matrix(self):
    net, variables, x = float64.setup(
        zoo.Plain(widths=(4000,)), jax.random.normal(jax.random.key(0), (2, 9)))
    for connections in (1, 4):
      feedback = _DIRECT(connections=connections).init(
          jax.random.key(2), net, variables, x)
      whole = dense(feedback['Dense_1'], 4)
      self.assertAlmostEqual(np.mean(np.sum(whole**2, axis=0)), 1, delta=.1)
      used = np.count_nonzero(whole, axis=1) / 4000
      np.testing.assert_allclose(used, connections / 4, atol=.03)

  @parameterized.parameters(-1, 1.5)
  def test_refuses_at_once(self, connections):
    with self.assertRaisesRegex(ValueError, '`connections` must be a whole'):
      _DIRECT(connections=connections)

  def test_refuses_more_connections_than_entries(self):
    net, variables, x = float64.setup(zoo.Plain(), jnp.ones((2, 3)))
    with self.assertRaisesRegex(ValueError, 'at most the 4 entries'):
      _DIRECT(connections=5).init(jax.random.key(0), net, variables, x)


class Blocks(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(6)(x))
    for i in range(2):
      y = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(6)], name=f'block_{i}')
      x = x + y(x)
    return nn.Dense(3)(x)


class PlacementTest(float64.Float64TestCase):

  def test_boundaries_alone_are_backprop_elsewhere(self):
    x = jax.random.normal(jax.random.key(0), (4, 7), jnp.float64)
    y = jnp.arange(4) % 3
    net = bpjax.from_linen(Blocks(), boundaries=('block_*',))
    variables = float64.doubles(net.init(jax.random.key(1), x))
    rule = _DIRECT(placement='boundaries')
    feedback = rule.init(jax.random.key(2), net, variables, x)
    self.assertEqual(
        bpjax.paths.leaf_names(feedback),
        ['block_0/boundary', 'block_1/boundary'])
    composed = bpjax.rules.by_path(
        {'*/boundary': _DIRECT(), '*': bpjax.rules.backprop()})
    learn = lambda rule: rule.value_and_grad(net, _LOSS)(
        variables, feedback, x, y)[1][0]
    self.assert_close(learn(rule), learn(composed), 0)

  def test_refuses_a_network_without_boundaries(self):
    net, variables, x = float64.setup(zoo.Plain(), jnp.ones((2, 3)))
    with self.assertRaisesRegex(ValueError, 'this one has none'):
      _DIRECT(placement='boundaries').init(
          jax.random.key(0), net, variables, x)

  def test_refuses_another_placement(self):
    with self.assertRaisesRegex(ValueError, "'layers' or 'boundaries'"):
      _DIRECT(placement='blocks')


class Turn(nn.Module):
  """A turn of a loop, with a branch in it or without."""
  branch: bool = False

  @nn.compact
  def __call__(self, h, turn):
    dense = nn.Dense(16)
    if self.branch and not self.is_initializing():
      h = nn.cond(turn >= 0, lambda m, h: jnp.tanh(m(h)), lambda m, h: h, dense, h)
    else:
      h = jnp.tanh(dense(h))
    return h, None


class Looped(nn.Module):
  outputs: int
  branch: bool = False

  @nn.compact
  def __call__(self, x):
    loop = nn.scan(Turn, variable_axes={'params': 0},
                   split_rngs={'params': True}, length=12)
    return nn.Dense(self.outputs)(loop(self.branch)(x, jnp.arange(12))[0])


class LoopsTest(parameterized.TestCase):

  def test_a_loop_keeps_one_error_and_not_one_a_turn(self):
    x, y = jnp.ones((64, 16)), jnp.arange(64)
    net = bpjax.from_linen(Looped(4096))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    bytes_ = {}
    for name in ('backprop', 'direct_feedback_alignment'):
      rule = bpjax.rules.get(name)()
      feedback = jax.eval_shape(
          lambda key, v: rule.init(key, net, v, x), jax.random.key(1), variables)  # pylint: disable=cell-var-from-loop
      learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
      bytes_[name] = jax.jit(learn).lower(
          variables, feedback, x, y).compile().memory_analysis(
              ).temp_size_in_bytes
    error = 4 * 64 * 4096
    self.assertLess(
        bytes_['direct_feedback_alignment'], bytes_['backprop'] + 3 * error)

  def test_branches_get_the_error_too(self):
    x, y = jax.random.normal(jax.random.key(3), (6, 16)), jnp.arange(6) % 5
    found = []
    for branch in (False, True):
      net = bpjax.from_linen(Looped(5, branch))
      variables = net.init(jax.random.key(0), x)
      rule = bpjax.rules.direct_feedback_alignment()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      _, (grads, _) = jax.jit(rule.value_and_grad(
          net, bpjax.losses.softmax_cross_entropy))(variables, feedback, x, y)
      found.append(bpjax.paths.leaves(grads))
    plain, branched = (list(f.values()) for f in found)
    for a, b in zip(plain, branched, strict=True):
      self.assertGreater(jnp.abs(a).min(axis=None), 0)
      np.testing.assert_allclose(a, b, atol=1e-6)


class DevicesTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'data': 8}, PartitionSpec()),
      ({'data': 4, 'model': 2}, PartitionSpec(None, 'model')),
      ({'data': 1, 'model': 8}, PartitionSpec(None, 'model')))
  def test_the_shared_matrix_split_over_devices(self, axes, spec):
    net = bpjax.from_linen(zoo.Plain(widths=(16, 8)))
    x = jax.random.normal(jax.random.key(0), (8, 5))
    y = jnp.arange(8) % 4
    variables = net.init(jax.random.key(1), x)
    rule = _DIRECT(shared=True)
    feedback = rule.init(jax.random.key(2), net, variables, x)
    learn = jax.jit(rule.value_and_grad(net, _LOSS))
    expected = learn(variables, feedback, x, y)[1][0]

    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    split = put(feedback, spec)
    matrix, = jax.tree.leaves(split)
    self.assertEqual(
        matrix.addressable_shards[0].data.shape, (4, 16 // axes.get('model', 1)))
    grads = learn(
        put(variables, PartitionSpec()), split, put(x, PartitionSpec('data')),
        put(y, PartitionSpec('data')))[1][0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        grads, expected)


if __name__ == '__main__':
  absltest.main()
