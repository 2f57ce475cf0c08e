"""Boundaries: feedback at the outputs of modules, and what skips then carry."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax.projection import feedback_shape
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64

_LOSS = bpjax.losses.softmax_cross_entropy
_DIRECT = bpjax.rules.direct_feedback_alignment


class Block(nn.Module):
  """A residual block; its parameter `tap` shows what arrives at its output."""
  stride: int
  tapped: bool = True

  @nn.compact
  def __call__(self, x, train: bool = False):
    channels = x.shape[-1] * self.stride
    y = nn.Conv(channels, (3, 3), self.stride, name='conv_0')(x)
    y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
    y = nn.Conv(channels, (3, 3), name='conv_1')(y)
    if y.shape != x.shape:
      x = nn.Conv(channels, (1, 1), self.stride, name='conv_shortcut')(x)
    out = nn.relu(x + y)
    if not self.tapped:
      return out
    return out + self.param('tap', nn.initializers.zeros, out.shape)


class Residual(nn.Module):
  tapped: bool = True

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.relu(nn.Conv(4, (3, 3), name='stem')(x))
    for i, stride in enumerate((1, 2, 1)):
      x = Block(stride, self.tapped, name=f'block_{i}')(x, train)
    return nn.Dense(3, name='readout')(x.mean((1, 2)))


class NnxBlock(nnx.Module):

  def __init__(self, rngs):
    self.up = nnx.Linear(5, 7, rngs=rngs)
    self.down = nnx.Linear(7, 5, rngs=rngs)
    self.tap = nnx.Param(jnp.zeros((6, 5)))

  def __call__(self, x):
    return x + self.down(nnx.tanh(self.up(x))) + self.tap[...]


class NnxResidual(nnx.Module):

  def __init__(self, rngs):
    self.stem = nnx.Linear(4, 5, rngs=rngs)
    self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])
    self.readout = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.tanh(self.stem(x))
    for block in self.blocks:
      x = block(x)
    return self.readout(x)


def learn(rule, net, variables, x, y, feedback=None):
  if feedback is None:
    feedback = rule.init(jax.random.key(2), net, variables, x)
  (_, aux), (grads, _) = jax.jit(
      rule.value_and_grad(net, _LOSS, reduction='sum'))(
          variables, feedback, x, y, jax.random.key(3))
  return grads, feedback, aux


def error_of(output, y):
  return jax.nn.softmax(output) - jax.nn.one_hot(y, output.shape[-1])


def cosine(a, b):
  a, b = np.ravel(a), np.ravel(b)
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


class LinenBoundariesTest(float64.Float64TestCase):

  def setUp(self):
    super().setUp()
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 2))
    self.y = jnp.arange(6) % 3
    self.mixed, self.variables, self.x = float64.setup(Residual(), x)
    self.net = bpjax.from_linen(Residual(), boundaries=('block_*',))
    self.net.init(jax.random.key(0), self.x)

  def test_are_units_without_parameters(self):
    names = list(self.net.units)
    self.assertEqual([n for n in names if n not in self.mixed.units], [
        f'block_{i}/boundary' for i in range(3)])
    info = self.net.units['block_1/boundary'].info
    self.assertEqual(info.kind, 'Boundary')
    self.assertEqual(info.params, {})
    self.assertEqual(feedback_shape(info), (3, 4, 4, 8))
    self.assertEqual(self.net.units.exact, self.mixed.units.exact)

  @parameterized.parameters(
      'backprop', 'feedback_alignment', 'kolen_pollack', 'sign_symmetry',
      'weight_mirror')
  def test_other_rules_pass_them(self, name):
    rule = bpjax.rules.get(name)()
    feedback = rule.init(
        jax.random.key(2), self.mixed, self.variables, self.x)
    plain, _, _ = learn(
        rule, self.mixed, self.variables, self.x, self.y, feedback)
    bounded, _, _ = learn(
        rule, self.net, self.variables, self.x, self.y, feedback)
    self.assert_close(plain, bounded, 1e-13)
    drawn = rule.init(jax.random.key(2), self.net, self.variables, self.x)
    self.assertEqual(jax.tree.structure(drawn), jax.tree.structure(feedback))

  def test_forward_gradient_passes_them(self):
    rule = bpjax.rules.forward_gradient()
    model = Residual(tapped=False)  # A parameter without a batch axis is asked.
    mixed = bpjax.from_linen(model)
    net = bpjax.from_linen(model, boundaries=('block_*',))
    variables = mixed.init(jax.random.key(1), self.x)
    grads, _, _ = learn(rule, net, variables, self.x, self.y)
    plain, _, _ = learn(rule, mixed, variables, self.x, self.y)
    self.assert_close(plain, grads, 0)
    trained = rule.units(net, variables, self.x)
    self.assertNotIn('block_0/boundary', trained)

  @parameterized.parameters(False, True)
  def test_skips_carry_the_direct_term_alone(self, shared):
    grads, feedback, aux = learn(
        _DIRECT(shared=shared), self.net, self.variables, self.x, self.y)
    error = error_of(aux.output, self.y)
    for i in range(3):
      arrives = grads[f'block_{i}']['tap']
      if shared:
        matrix = feedback['_shared']['direct_feedback_alignment']
        matrix = matrix[:, :arrives[0].size] / (3 * arrives[0].size) ** .5
        matrix = matrix.reshape(3, *arrives.shape[1:])
      else:
        matrix = feedback[f'block_{i}']['boundary']
      direct = jnp.tensordot(error, matrix, 1)
      self.assert_close(arrives, direct, 1e-14)

  def test_without_them_skips_mix_the_terms(self):
    grads, feedback, aux = learn(
        _DIRECT(), self.mixed, self.variables, self.x, self.y)
    error = error_of(aux.output, self.y)
    direct = jnp.tensordot(error, feedback['block_1']['conv_0'], 1)
    self.assertLess(cosine(grads['block_0']['tap'], direct), .95)

  def test_at_each_block_with_the_exact_gradient_inside(self):
    rule = bpjax.rules.by_path({
        '*/boundary': _DIRECT(), '*': bpjax.rules.backprop()})
    grads, feedback, aux = learn(
        rule, self.net, self.variables, self.x, self.y)
    self.assertEqual(
        bpjax.paths.leaf_names(feedback),
        [f'block_{i}/boundary' for i in range(3)])
    error = error_of(aux.output, self.y)

    # Block by block: the input detached, the output taught by e B.
    class Taught(nn.Module):

      @nn.compact
      def __call__(self, x, train: bool = True):
        total = 0.
        x = nn.relu(nn.Conv(4, (3, 3), name='stem')(x))
        for i, stride in enumerate((1, 2, 1)):
          x = Block(stride, name=f'block_{i}')(x, train)
          taught = jnp.tensordot(error, feedback[f'block_{i}']['boundary'], 1)
          total += jnp.sum(x * taught)
          x = jax.lax.stop_gradient(x)
        output = nn.Dense(3, name='readout')(x.mean((1, 2)))
        return total + jnp.sum(output * error)

    def function(params):
      return Taught().apply(
          {**self.variables, 'params': params}, self.x,
          mutable=['batch_stats'])[0]

    self.assert_close(
        grads, jax.grad(function)(self.variables['params']), 1e-13)

  def test_alignment_there_is_that_of_what_is_handed_down(self):
    rule = _DIRECT()
    feedback = rule.init(jax.random.key(2), self.net, self.variables, self.x)
    measured = bpjax.alignment(self.net, _LOSS, rule)(
        self.variables, feedback, self.x, self.y)['block_2/boundary']
    output = self.net.run(
        self.variables, self.x, lambda call: call.original(), None,
        ['batch_stats'])[0]
    error = error_of(output, self.y)
    direct = jnp.tensordot(error, feedback['block_2']['boundary'], 1)
    exact = error @ self.variables['params']['readout']['kernel'].T
    exact = jnp.broadcast_to(exact[:, None, None] / 16, direct.shape)
    expected = np.mean([cosine(a, b) for a, b in zip(direct, exact)])
    self.assertAlmostEqual(float(measured.teaching), expected, places=12)
    self.assertTrue(np.isnan(measured.update))

  @parameterized.parameters(
      (('block_9',), 'fits no module'), (('stem/*',), 'fits no module'),
      (('block_*', 'readuot'), 'fits no module'))
  def test_refuses_a_glob_without_a_module(self, boundaries, message):
    net = bpjax.from_linen(Residual(), boundaries=boundaries)
    with self.assertRaisesRegex(ValueError, message):
      net.init(jax.random.key(0), self.x)

  def test_refuses_to_cut_the_output(self):

    class Wrapped(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(3)], name='all')(x)

    net = bpjax.from_linen(Wrapped(), boundaries=('all',))
    with self.assertRaisesRegex(ValueError, 'must be followed by a unit'):
      net.init(jax.random.key(0), jnp.ones((2, 3)))


class NnxBoundariesTest(float64.Float64TestCase):

  def test_skips_carry_the_direct_term_alone(self):
    model = NnxResidual(nnx.Rngs(0))
    net = bpjax.from_nnx(model, boundaries=('blocks/*',))
    x = jax.random.normal(jax.random.key(0), (6, 4))
    y = jnp.arange(6) % 3
    variables = net.init(jax.random.key(1), x)
    grads, feedback, aux = learn(_DIRECT(), net, variables, x, y)
    error = error_of(aux.output, y)
    for i in range(3):
      direct = error @ feedback['blocks'][str(i)]['boundary']
      np.testing.assert_allclose(
          grads['blocks'][str(i)]['tap'], direct, atol=1e-6)
    plain = bpjax.from_nnx(model)
    plain.init(jax.random.key(1), x)
    rule = bpjax.rules.feedback_alignment()
    given = rule.init(jax.random.key(2), plain, variables, x)
    self.assert_close(
        learn(rule, plain, variables, x, y, given)[0],
        learn(rule, net, variables, x, y, given)[0], 1e-6)
    state = net.to_state({'feedback': feedback})
    self.assertEqual(
        jax.tree.leaves(net.from_state(state)['feedback'])[0].shape, (3, 5))


if __name__ == '__main__':
  absltest.main()
