"""Target propagation against numpy, and in its limits."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import reference_targets as reference
from tests import float64
from tests import zoo

_PLAIN = bpjax.rules.target_propagation
_DIFFERENCE = bpjax.rules.difference_target_propagation
_PHI = {'tanh': nn.tanh, 'elu': nn.elu, 'identity': lambda x: x}
_SQUARED = bpjax.losses.squared_error


class Chain(nn.Module):
  widths: tuple[int, ...] = (6, 5, 7)
  outputs: int = 4
  activation: str = 'tanh'
  bias: bool = True

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(self.widths, 1):
      dense = functools.partial(nn.Dense, width, use_bias=self.bias)
      x = bpjax.nn.Layer(dense, _PHI[self.activation], name=f'unit_{i}')(x)
    return nn.Dense(
        self.outputs, use_bias=self.bias,
        name=f'unit_{len(self.widths) + 1}')(x)


def affine(unit):
  return unit.get('affine', unit)


def as_reference(params):
  return [jax.tree.map(np.asarray, affine(params[name]))
          for name in sorted(params)]


def inverse_of(part):
  """A unit's inverse as numpy has it: V from what is above to what is below."""
  return {'kernel': np.asarray(affine(part)['kernel']).T,
          'bias': np.asarray(part['inverse_bias'])}


def squares(key, count, size, orthogonal=True):
  """Square matrices, orthogonal or only well conditioned."""
  result = []
  for k in jax.random.split(key, count):
    q = jnp.linalg.qr(jax.random.normal(k, (size, size), jnp.float64))[0]
    result.append(q if orthogonal else q @ jnp.diag(
        jnp.linspace(.5, 2, size)) @ q[::-1])
  return result


class ReferenceTest(float64.Float64TestCase):

  @parameterized.product(
      difference=(False, True), top=('gradient', 'inverse'),
      loss=('cross_entropy', 'squared_error'))
  def test_updates(self, difference, top, loss):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    net, variables, x = float64.setup(Chain(), x)
    y, learned_loss = jnp.arange(6) % 4, bpjax.losses.softmax_cross_entropy
    if loss == 'squared_error':
      y = jax.random.normal(jax.random.key(3), (6, 4), jnp.float64)
      learned_loss = _SQUARED
    readout = 'softmax' if loss == 'cross_entropy' else 'identity'
    rule = (_DIFFERENCE if difference else _PLAIN)(
        step=.3, sigma=0., top=top, readout=readout)
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    feedback = jax.tree.map(  # Biases are 0 at first.
        lambda f: f + .1 * jnp.cos(jnp.arange(f.size)).reshape(f.shape), feedback)
    _, (grads, feedback_grads) = zoo.learn(
        rule, net, learned_loss, reduction='sum')(variables, feedback, x, y)

    params = as_reference(variables['params'])
    inverses = {
        int(name[-1]): inverse_of(part) for name, part in feedback.items()}
    expected = reference.target_propagation(
        params, {l: reference.inverse_network(v) for l, v in inverses.items()},
        np.asarray(x), np.asarray(y), step=.3, difference=difference, top=top,
        loss=loss)
    self.assertEqual(sorted(inverses), [2, 3] + [4] * (top == 'inverse'))
    for ours, theirs in zip(as_reference(grads), expected.updates):
      self.assert_close(ours, theirs, 1e-12)
    for l, inverse in inverses.items():
      width = inverse['bias'].shape[0]
      _, gradient = reference.inverse_loss_and_gradient(
          params, inverse, l, np.asarray(x), np.zeros((6, width)), loss=loss)
      self.assert_close(
          inverse_of(feedback_grads[f'unit_{l}']), gradient, 1e-12)

  def test_the_noise_of_an_inverse(self):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    net, variables, x = float64.setup(Chain(), x)
    rule = _DIFFERENCE(sigma=.3)
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    params = as_reference(variables['params'])
    _, hidden = reference.forward(params, np.asarray(x))
    unit, own = net.units['unit_3'], variables['params']['unit_3']
    inputs = (jnp.asarray(hidden[2]),)
    pre = unit.affine(own, inputs)
    activations = bpjax.Activations(
        inputs, pre, unit.activation(own, pre, inputs))
    key = jax.random.key(9)
    credit = jax.jit(lambda f, teaching: rule.backward(
        unit, own, f, activations, bpjax.Signal(teaching, None, key)))(
            feedback['unit_3'], jnp.ones_like(pre))
    noise = .3 * jax.random.normal(key, hidden[2].shape, jnp.float64)
    _, gradient = reference.inverse_loss_and_gradient(
        params, inverse_of(feedback['unit_3']), 3, np.asarray(x),
        np.asarray(noise))
    self.assert_close(inverse_of(credit.feedback), gradient, 1e-12)


class IdentitiesTest(float64.Float64TestCase):

  def setup(self, **arguments):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    return float64.setup(Chain((5, 5, 5), 5, bias=False, **arguments), x)

  def with_kernels(self, tree, kernels):
    """`tree` with the kernels of unit_1, unit_2, ..., and no biases."""
    def place(name, leaf):
      if name.endswith('bias'):
        return jnp.zeros_like(leaf)
      return kernels[int(name[len('unit_')]) - 1]

    return bpjax.paths.map_with_name(place, tree)

  def test_a_reached_target_leaves_the_one_below(self):
    net, variables, x = self.setup(activation='tanh')
    rule = _DIFFERENCE(top='inverse', sigma=0.)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    grads = zoo.learn(rule, net, lambda o, y: 0. * o[:, 0])(
        variables, feedback, x, jnp.zeros(6))[1][0]
    self.assertEqual(max(float(jnp.abs(g).max())
                         for g in jax.tree.leaves(grads)), 0.)

  def test_orthogonal_linear_layers_give_the_direction_of_backprop(self):
    net, variables, x = self.setup(activation='identity')
    kernels = squares(jax.random.key(4), 4, 5)
    variables = {'params': self.with_kernels(variables['params'], kernels)}
    y = jax.random.normal(jax.random.key(2), (6, 5), jnp.float64)
    for rule in (_DIFFERENCE(step=.1, inverse='identity'),
                 _PLAIN(step=.1, inverse='identity')):
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      feedback = self.with_kernels(feedback, kernels)
      grads, exact = (
          zoo.learn(r, net, _SQUARED)(
              variables, f, x, y, key=jax.random.key(5))[1][0]
          for r, f in ((rule, feedback), (bpjax.rules.backprop(), {})))
      for i in (1, 2, 3):
        np.testing.assert_allclose(
            affine(grads[f'unit_{i}'])['kernel'],
            2 * .1 * affine(exact[f'unit_{i}'])['kernel'], atol=1e-12)

  def test_exact_inverses_give_gauss_newton_targets(self):
    net, variables, x = self.setup(activation='identity')
    kernels = squares(jax.random.key(4), 4, 5, orthogonal=False)
    variables = {'params': self.with_kernels(variables['params'], kernels)}
    y = jax.random.normal(jax.random.key(2), (6, 5), jnp.float64)
    rule = _DIFFERENCE(
        step=.2, inverse='identity', top='inverse', readout='identity')
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    inverses = [jnp.linalg.inv(w).T for w in kernels]
    feedback = self.with_kernels(feedback, inverses)
    (_, aux), (grads, feedback_grads) = zoo.learn(
        rule, net, _SQUARED, reduction='sum')(
            variables, feedback, x, y, key=jax.random.key(5))
    error = aux.output - y
    jacobian = functools.reduce(jnp.matmul, kernels[1:])
    moved = -.2 * error @ jnp.linalg.inv(jacobian)  # t_1 - h_1.
    np.testing.assert_allclose(
        affine(grads['unit_1'])['kernel'], x.T @ (-2 * moved), atol=1e-11)
    # An inverse that is exact has nothing to learn, whatever the noise.
    for g in jax.tree.leaves(feedback_grads):
      np.testing.assert_allclose(g, 0, atol=1e-11)
    # And the targets lead to the target of the output.
    h1 = x @ kernels[0]
    np.testing.assert_allclose(
        (h1 + moved) @ jacobian, aux.output - .2 * error, atol=1e-11)

  def test_an_inverse_learns_to_invert(self):
    net, variables, x = self.setup(activation='identity')
    kernels = squares(jax.random.key(4), 4, 5, orthogonal=False)
    variables = {'params': self.with_kernels(variables['params'], kernels)}
    rule = _DIFFERENCE(inverse='identity', sigma=1.)
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    learn = rule.value_and_grad(net, _SQUARED)

    def step(feedback, key):
      grads = learn(variables, feedback, x, jnp.zeros((6, 5)), key=key)[1][1]
      return jax.tree.map(lambda f, g: f - .05 * g, feedback, grads), None

    feedback, _ = jax.jit(lambda f: jax.lax.scan(
        step, f, jax.random.split(jax.random.key(3), 3000)))(feedback)
    for i in (2, 3):
      learned = affine(feedback[f'unit_{i}'])['kernel'].T
      np.testing.assert_allclose(
          kernels[i - 1] @ learned, jnp.eye(5), atol=1e-3)


class LayersTest(parameterized.TestCase):

  # Plain targets do not come through an inverse of pooling.
  # The contract for one of them alone: pooling is slow where XLA does not optimise.
  @parameterized.parameters(
      (_DIFFERENCE(), True), (_DIFFERENCE(top='inverse'), False))
  def test_convolutions_that_pool(self, rule, whole):

    class Pooled(nn.Module):

      @nn.compact
      def __call__(self, x):
        y = nn.Conv(3, (2, 2), use_bias=False)(x)
        return nn.max_pool(nn.tanh(y), (2, 2), (2, 2))

    class Net(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = x.reshape(-1, 4, 2, 1)
        x = bpjax.nn.Layer(
            functools.partial(nn.Conv, 4, kernel_size=(2, 2)), nn.tanh)(x)
        x = Pooled()(x)
        x = bpjax.nn.Layer(functools.partial(nn.Dense, 9), nn.tanh)(
            x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)

    net = bpjax.from_linen(Net(), is_unit=lambda m: isinstance(m, Pooled))
    if whole:
      bpjax.testing.check_rule(rule, net=net)
    x = jax.random.normal(jax.random.key(3), (6, 8))
    variables = net.init(jax.random.key(1), x)
    feedback = rule.init(jax.random.key(0), net, variables, x)
    _, (grads, _) = rule.value_and_grad(
        net, bpjax.losses.softmax_cross_entropy)(
            variables, feedback, x, jnp.arange(6) % 3, key=jax.random.key(2))
    for name, grad in bpjax.paths.leaves(grads).items():
      self.assertGreater(jnp.abs(grad).max(), 0, name)
    shapes = jax.tree.map(jnp.shape, feedback)
    self.assertEqual(shapes['Pooled_0'], {
        'Conv_0': {'kernel': (2, 2, 4, 3)}, 'inverse_bias': (4,)})
    self.assertNotIn('Layer_0', shapes)
    self.assertTrue(all(jax.tree.leaves(rule.trainable(feedback))))

  @parameterized.parameters(_PLAIN, _DIFFERENCE)
  def test_refusals(self, rule):
    class Fork(nn.Module):

      @nn.compact
      def __call__(self, x):
        h = nn.tanh(nn.Dense(3)(x))
        return nn.Dense(3)(h) + nn.Dense(3)(h)

    net = bpjax.from_linen(Fork())
    variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
    with self.assertRaisesRegex(ValueError, 'must be the input of one unit'):
      rule().init(jax.random.key(0), net, variables, jnp.ones((2, 4)))
    for arguments, message in (
        ({'step': -1.}, '`step` must'), ({'sigma': -1.}, '`sigma` must'),
        ({'top': 'middle'}, '`top` must'), ({'readout': 'relu'}, '`readout`'),
        ({'scale': 0.}, '`scale` must'), ({'inverse': 'tan'}, '`inverse`')):
      with self.assertRaisesRegex(ValueError, message):
        rule(**arguments)


if __name__ == '__main__':
  absltest.main()
