"""Structures of direct feedback, against the matrices that they stand for."""

import functools
import itertools

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
_DIRECT = bpjax.rules.direct_feedback_alignment
_RULES = {
    'pyramid': functools.partial(_DIRECT, structure='pyramid'),
    'channel': functools.partial(_DIRECT, structure='channel'),
    'low_rank': functools.partial(_DIRECT, structure='low_rank', rank=2)}


class Maps(nn.Module):
  """Convolutions over any number of axes, down to one position."""

  @nn.compact
  def __call__(self, x):
    spatial = x.ndim - 2
    for width in (4, 5):
      x = nn.tanh(nn.Conv(width, (3,) * spatial)(x))
    x = nn.Conv(3, x.shape[1:-1], padding='VALID')(x)
    return x.reshape(x.shape[0], -1)


def matrix(part, shape):
  """What a part of the feedback stands for, `[n_out, *shape]`, by loops."""
  if not isinstance(part, dict):
    return np.asarray(part)
  part = {name: np.asarray(value) for name, value in part.items()}
  if 'left' in part:
    return np.einsum('kr,r...->k...', part['left'], part['right'])
  *sizes, channels = shape
  n_out = len(part['top'])
  maps = part.pop('top').reshape(n_out, *(1,) * len(sizes), channels)
  if not part:
    return np.broadcast_to(maps, (n_out, *shape))
  for stage in range(len(part)):
    kernel = part[f'stage_{stage}']
    made = np.zeros(
        (n_out, *(2 * size for size in maps.shape[1:-1]), channels))
    for to in np.ndindex(made.shape[1:-1]):
      source = maps[(slice(None), *(i // 2 for i in to))]
      made[(slice(None), *to)] = source @ kernel[
          (slice(None), *(i % 2 for i in to))]
    # No larger than what the stages that follow can make the map from.
    left = 2 ** (len(part) - 1 - stage)
    maps = made[(slice(None), *(slice(-(-size // left)) for size in sizes))]
  return maps


class StructuredTest(float64.Float64TestCase):

  @parameterized.parameters(*itertools.product(
      _RULES, [(Maps(), (7, 6, 2)), (Maps(), (5, 2)),
               (zoo.ConvBatchNorm(dropout=0.), (8, 8, 2)),
               (zoo.Residual(), (5, 4, 2)), (zoo.Plain(), (9,))]))
  def test_equals_the_dense_rule_with_that_matrix(self, structure, inputs):
    model, shape = inputs
    net, variables, x = float64.setup(
        model, jax.random.normal(jax.random.key(0), (4, *shape)))
    rule, dense = _RULES[structure](), _DIRECT()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    like = dense.init(jax.random.key(2), net, variables, x)
    whole = {name: matrix(feedback[name], f.shape[1:])
             for name, f in like.items()}
    y = jnp.arange(4) % 3
    learn = lambda r, f: jax.jit(r.value_and_grad(net, _LOSS))(
        variables, f, x, y)[1]
    grads, feedback_grads = learn(rule, feedback)
    self.assert_close(grads, learn(dense, whole)[0], 1e-14)
    self.assert_close(
        feedback_grads, jax.tree.map(jnp.zeros_like, feedback), 0)
    self.assertFalse(any(jax.tree.leaves(rule.trainable(feedback))))
    if structure == 'low_rank':
      self.assertTrue(all('left' in part for part in feedback.values()))
    elif isinstance(model, Maps):
      self.assertTrue(all('top' in part for part in feedback.values()))
    elif isinstance(model, zoo.Plain):  # No positions: dense.
      self.assert_close(feedback, like, 0)

  @parameterized.parameters(*_RULES)
  def test_entries_have_the_variance_of_the_dense_matrix(self, structure):
    net, variables, x = float64.setup(
        nn.Sequential([nn.Conv(16, (3, 3)), nn.Conv(4, (8, 8), padding='VALID'),
                       lambda x: x.reshape(len(x), -1)]), jnp.ones((1, 8, 8, 1)))
    draw = jax.vmap(lambda key: _RULES[structure]().init(
        key, net, variables, x)['layers_1'])
    drawn = draw(jax.random.split(jax.random.key(2), 100))
    squares = [
        np.mean(matrix(jax.tree.map(lambda f: f[i], drawn), (8, 8, 16))**2)  # pylint: disable=cell-var-from-loop
        for i in range(100)]
    self.assertAlmostEqual(4 * np.mean(squares), 1, delta=.15)

  def test_alignment_of_a_chain_is_with_the_matrices(self):
    net, variables, x = float64.setup(zoo.Plain(), jnp.ones((2, 3)))
    rule = _RULES['low_rank']()
    feedback = rule.init(jax.random.key(0), net, variables, x)
    found = bpjax.alignment(net, _LOSS, rule)(
        variables, feedback, x, jnp.zeros(2, int))['Dense_1'].weight
    target = np.einsum(
        'ki,kj->ij', *(matrix(feedback[f'Dense_{i}'], None) for i in (1, 2)))
    kernel = np.asarray(variables['params']['Dense_1']['kernel'])
    self.assertAlmostEqual(found, np.vdot(kernel, target) / (
        np.linalg.norm(kernel) * np.linalg.norm(target)), places=12)

  def test_boundaries_have_positions(self):
    class Blocks(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), name='block_0')(x))
        return nn.Dense(3)(x.reshape(len(x), -1))

    net, variables, x = float64.setup(
        Blocks(), jnp.ones((2, 4, 4, 1)), boundaries=('block_*',))
    feedback = _DIRECT(placement='boundaries', structure='channel').init(
        jax.random.key(0), net, variables, x)
    self.assertEqual(feedback['block_0']['boundary']['top'].shape, (3, 4))


class DevicesTest(parameterized.TestCase):

  @parameterized.product(structure=tuple(_RULES), axes=('Auto', 'Explicit'))
  def test_eight_devices_equal_one(self, structure, axes):
    net = bpjax.from_linen(Maps())
    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 2))
    y = jnp.arange(8) % 3
    variables = net.init(jax.random.key(1), x)
    rule = _RULES[structure]()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    learn = jax.jit(rule.value_and_grad(net, _LOSS))
    expected = learn(variables, feedback, x, y)[1]
    mesh = jax.make_mesh(
        (8,), ('data',), axis_types=(getattr(jax.sharding.AxisType, axes),))
    with jax.set_mesh(mesh):
      put = lambda tree, *axes: jax.device_put(
          tree, jax.NamedSharding(mesh, jax.P(*axes)))
      got = learn(put(variables), put(feedback), put(x, 'data'), put(y, 'data'))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], expected)


class ContractTest(parameterized.TestCase):

  @parameterized.parameters(*_RULES)
  def test_contract(self, structure):
    bpjax.testing.check_rule(_RULES[structure]())

  @parameterized.parameters(
      (dict(structure='sparse'), "`structure` must be 'dense', 'pyramid'"),
      (dict(structure='channel', shared=True), 'does not go with `shared`'),
      (dict(structure='pyramid', connections=1), 'does not go with `shared`'),
      (dict(structure='low_rank'), 'whole number of at least 1'),
      (dict(structure='low_rank', rank=1.5), 'whole number of at least 1'),
      (dict(rank=2), 'and 0 otherwise'))
  def test_refuses_at_once(self, arguments, text):
    with self.assertRaisesRegex(ValueError, text):
      _DIRECT(**arguments)

  def test_refuses_more_than_the_full_rank(self):
    net = bpjax.from_linen(zoo.Plain())
    x = jnp.ones((2, 3))
    with self.assertRaisesRegex(ValueError, '`rank` must be at most the 4'):
      _DIRECT(structure='low_rank', rank=5).init(
          jax.random.key(0), net, net.init(jax.random.key(1), x), x)


if __name__ == '__main__':
  absltest.main()
