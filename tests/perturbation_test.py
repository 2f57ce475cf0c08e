"""Forward gradient: unbiased, with the variance of the formula, on any model."""

import functools
import os
import subprocess
import sys

from absl.testing import parameterized
import bpjax
from bpjax.engines import credit as credit_lib
from bpjax.engines import perturbation
from bpjax.engines import random_bits
import expected
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import reference
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


def draws(rule, net, variables, x, y, count, loss=LOSS):
  """`count` independent updates, stacked."""
  learn = rule.value_and_grad(net, loss)
  keys = jax.random.split(jax.random.key(17), count)
  one = lambda key: learn(variables, {}, x, y, key=key)[1][0]
  return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=200))(keys)


class UnbiasedTest(float64.Float64TestCase):

  @parameterized.parameters(
      ('plain', dict()), ('plain', dict(directions='rademacher')),
      ('plain', dict(perturb='weight')), ('plain', dict(exact_readout=False)),
      ('plain', dict(samples=3)), ('plain', dict(noise='shared')),
      ('plain', dict(perturb='weight', noise='independent')),
      ('conv_batch_norm', dict()),
      ('residual', dict(directions='rademacher')), ('encoder', dict()),
      ('remat', dict()), ('scan', dict()), ('stack', dict()))
  def test_mean_is_the_gradient(self, name, arguments):
    model, x, y = zoo.inputs(name, batch=3)
    if name == 'conv_batch_norm':
      model = zoo.ConvBatchNorm(dropout=0.)
    net, variables, x = float64.setup(model, x)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, y)
    rule = bpjax.rules.forward_gradient(**arguments)
    updates = draws(rule, net, variables, x, y, 4000)
    # Along fixed random directions, so that few tests stand for all entries.
    for i in range(4):
      key = jax.random.key(i)
      for leaf, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(exact)):
        key, draw = jax.random.split(key)
        along = jax.random.normal(draw, expected.shape)
        values = jnp.tensordot(leaf, along, expected.ndim)
        error = values.mean() - jnp.vdot(expected, along)
        bound = 4 * values.std() / np.sqrt(len(values))
        self.assertLessEqual(abs(error), bound + 1e-12)

  def test_batch_norm_couples_the_examples(self):

    class Net(nn.Module):

      @nn.compact
      def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dense(3)(nn.tanh(x))

    x = jax.random.normal(jax.random.key(3), (3, 4), jnp.float64)
    y = jnp.arange(3)
    net, variables, x = float64.setup(Net(), x)
    self.assertEqual(net.survey(variables, x).batch_coupled, ('BatchNorm_0',))
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, y)
    rule = bpjax.rules.forward_gradient(directions='rademacher')
    updates = draws(rule, net, variables, x, y, 40_000)
    mean, exact = updates['Dense_0']['kernel'].mean(0), exact['Dense_0']['kernel']
    # The change of an example's own loss alone would miss by tens of percent.
    self.assertLess(
        jnp.linalg.norm(mean - exact) / jnp.linalg.norm(exact), .06)

  def test_readout_is_exact(self):
    model, x, y = zoo.inputs('encoder')
    net, variables, x = float64.setup(model, x)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, y)
    for perturb in ('activity', 'weight'):
      rule = bpjax.rules.forward_gradient(perturb=perturb)
      _, (grads, _) = zoo.learn(rule, net, LOSS)(
          variables, {}, x, y, key=jax.random.key(1))
      self.assert_close(grads['Dense_4'], exact['Dense_4'], 1e-14)
      self.assertGreater(
          jnp.abs(grads['Dense_0']['kernel'] - exact['Dense_0']['kernel']).max(),
          1e-3)


class VarianceTest(float64.Float64TestCase):
  """Ren et al. 2023, table 1: shared weight and independent activity noise."""

  def setUp(self):
    super().setUp()
    self.x = jax.random.normal(jax.random.key(3), (6, 5), jnp.float64)
    self.y = jnp.arange(6) % 4
    model = nn.Dense(4, use_bias=False)
    self.net, self.variables, _ = float64.setup(model, self.x)
    errors = jax.grad(lambda out: LOSS(out, self.y).sum())(
        self.net.apply(self.variables, self.x))
    self.per_example = np.einsum('np,nq->npq', self.x, errors)

  def measured(self, **arguments):
    rule = bpjax.rules.forward_gradient(exact_readout=False, **arguments)
    updates = draws(rule, self.net, self.variables, self.x, self.y, 60_000)
    return float(jnp.mean(jnp.var(updates['kernel'], axis=0)))

  @parameterized.parameters('gaussian', 'rademacher')
  def test_activity(self, directions):
    expected = reference.forward_gradient_variance_activity(
        self.per_example, directions)
    if directions == 'gaussian':  # (q + 1)/N times the mean square.
      self.assertAlmostEqual(
          expected, (4 + 1) / 6 * np.mean(self.per_example**2), 12)
    ratio = self.measured(directions=directions) / expected
    self.assertBetween(ratio, .97, 1.03)

  @parameterized.parameters('gaussian', 'rademacher')
  def test_weight(self, directions):
    expected = reference.forward_gradient_variance_weight(
        self.per_example, directions)
    if directions == 'gaussian':  # (pq + 1) times the square of the mean.
      self.assertAlmostEqual(
          expected, (20 + 1) * np.mean(self.per_example.mean(0)**2), 12)
    ratio = self.measured(directions=directions, perturb='weight') / expected
    self.assertBetween(ratio, .96, 1.04)

  @parameterized.parameters(('activity', 'shared'), ('weight', 'independent'))
  def test_the_other_noise(self, perturb, noise):
    expected = getattr(reference, f'forward_gradient_variance_{perturb}')(
        self.per_example, independent=noise == 'independent')
    ratio = self.measured(perturb=perturb, noise=noise) / expected
    self.assertBetween(ratio, .96, 1.04)

  def test_orthogonal(self):
    total = np.sum(self.per_example**2)
    samples = 3  # Of 4 entries an example: (d/K - 1)/N times the mean square.
    ratio = self.measured(directions='orthogonal', samples=samples) / (
        (4 / samples - 1) / 6 * total / self.per_example.size)
    self.assertBetween(ratio, .97, 1.03)

  def test_as_many_orthogonal_directions_as_entries_are_exact(self):
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), self.net, LOSS)(
        self.variables, {}, self.x, self.y)
    for perturb, samples in (('activity', 4), ('weight', 20)):
      rule = bpjax.rules.forward_gradient(
          perturb, 'orthogonal', samples, exact_readout=False)
      _, (grads, _) = zoo.learn(rule, self.net, LOSS)(
          self.variables, {}, self.x, self.y, key=jax.random.key(1))
      self.assert_close(grads, exact, 1e-13)
    with self.assertRaisesRegex(ValueError, '`samples` must be at most 20'):
      rule = bpjax.rules.forward_gradient(
          'weight', 'orthogonal', 21, exact_readout=False)
      zoo.learn(rule, self.net, LOSS)(
          self.variables, {}, self.x, self.y, key=jax.random.key(1))

  def test_samples_in_turn_are_those_at_once(self):
    for arguments in ({}, {'perturb': 'weight'}, {'directions': 'orthogonal'}):
      grads = []
      for loop in (False, True):
        rule = bpjax.rules.forward_gradient(
            samples=3, loop=loop, exact_readout=False, **arguments)
        grads.append(jax.jit(rule.value_and_grad(self.net, LOSS))(
            self.variables, {}, self.x, self.y, jax.random.key(1))[1][0])
      self.assert_close(*grads, 1e-12)

  def test_samples_divide_it(self):
    one = self.measured(directions='rademacher')
    four = self.measured(directions='rademacher', samples=4)
    self.assertBetween(one / four, 3.85, 4.15)


class DifferencesTest(float64.Float64TestCase):

  @parameterized.parameters('activity', 'weight')
  def test_tend_to_derivatives(self, perturb):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)

    def step(**arguments):
      rule = bpjax.rules.forward_gradient(perturb, samples=2, **arguments)
      return zoo.learn(rule, net, LOSS)(
          variables, {}, x, y, key=jax.random.key(1))[1][0]

    exact = step()
    miss = lambda *a, **k: max(map(float, jax.tree.leaves(jax.tree.map(
        lambda p, q: jnp.abs(p - q).max(), step(*a, **k), exact))))
    one, two = miss(epsilon=1e-3), miss(epsilon=1e-3, antithetic=True)
    self.assertBetween(one, 1e-5, 1e-1)
    self.assertLess(two, .05 * one)  # Of second order.
    self.assertLess(miss(epsilon=1e-6), .01 * one)

  def test_train_what_has_no_derivative(self):

    class Signs(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = jnp.sign(nn.Dense(4)(x))
        return nn.Dense(3)(x)

    x = jax.random.normal(jax.random.key(3), (2, 4))
    y = jnp.arange(2)
    net, variables, x = float64.setup(Signs(), x)
    step = .5
    means = []
    for antithetic in (False, True):
      rule = bpjax.rules.forward_gradient(
          epsilon=step, antithetic=antithetic)
      means.append(draws(rule, net, variables, x, y, 20_000)['Dense_0'])
    # The gradient of the loss under noise of this size, by enumeration.
    params = variables['params']
    pre = np.asarray(x @ params['Dense_0']['kernel'])
    signs = np.array(np.meshgrid(*[[-1., 1.]] * 4)).reshape(4, -1).T

    def smoothed(pre):
      up = jax.scipy.stats.norm.cdf(pre / step)
      weight = jnp.where(signs[:, None] > 0, up, 1 - up).prod(-1)
      out = signs @ params['Dense_1']['kernel'] + params['Dense_1']['bias']
      losses = LOSS(
          jnp.broadcast_to(out[:, None], (16, 2, 3)), jnp.tile(y, (16, 1)))
      return jnp.sum(weight * losses) / 2

    expected = x.T @ jax.grad(smoothed)(jnp.asarray(pre))
    for mean in means:
      kernel = mean['kernel']
      error = kernel.std(0) / np.sqrt(len(kernel))
      self.assertLess(
          float(jnp.max(jnp.abs(kernel.mean(0) - expected) / error)), 4.5)


class RandomBitsTest(parameterized.TestCase):

  @parameterized.parameters(
      jax.random.key, jax.random.PRNGKey,
      functools.partial(jax.random.key, impl='rbg'))
  def test_are_those_of_jax(self, make):
    ours = lambda key: random_bits.words(key, 1001)
    theirs = lambda key: jax.random.bits(key, (1001,), jnp.uint32)
    key = make(5)
    np.testing.assert_array_equal(ours(key), theirs(key))
    keys = jax.random.split(key, 3)
    if make is jax.random.key:
      np.testing.assert_array_equal(
          jax.jit(jax.vmap(ours))(keys), jax.vmap(theirs)(keys))

  def test_signs_are_as_many_of_either_kind(self):
    arrays = [jnp.zeros((7, 9)), jnp.zeros((1000, 33)), jnp.zeros(())]
    signs = perturbation.rademacher(jax.random.key(0), arrays)
    self.assertEqual([s.shape for s in signs], [a.shape for a in arrays])
    np.testing.assert_array_equal(jnp.abs(signs[1]), 1)
    self.assertLess(abs(float(signs[1].sum())), 4 * 33000**.5)
    # No two columns are alike: a bit of a word is not taken twice.
    products = np.array(signs[1].T @ signs[1]) - 1000 * np.eye(33)
    self.assertLess(np.abs(products).max(), 5 * 1000**.5)


class Rectified(nn.Module):
  """Two rectified layers, of which one has a residual connection."""
  tells: bool = True

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      out = nn.Dense(6, name=f'layer_{i}')(x)
      out = x + out if i else out
      if self.tells:
        x = bpjax.nn.rectified(self, f'layer_{i}', out)
      else:
        x = nn.relu(out)
    return nn.Dense(3, name='readout')(x)


class Tied(nn.Module):
  """A layer that is called twice; its rectifiers say so."""
  tells: str
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    layer = (nn.remat(nn.Dense) if self.remat else nn.Dense)(5, name='layer')
    for i in range(2):
      x = layer(x)
      if self.tells == 'all' or self.tells == 'some' and i:
        x = bpjax.nn.rectified(self, 'layer', x)
      else:
        x = nn.relu(x)
    return nn.Dense(3, name='readout')(x)


class RectifiedTest(float64.Float64TestCase):

  def setUp(self):
    super().setUp()
    x = jax.random.normal(jax.random.key(0), (4, 5), jnp.float64)
    self.net, self.variables, self.x = float64.setup(Rectified(), x)
    self.y = jnp.arange(4) % 3
    _, (self.exact, _) = zoo.learn(bpjax.rules.backprop(), self.net, LOSS)(
        self.variables, {}, self.x, self.y)

  def test_what_is_off_has_no_update_and_the_rest_less_variance(self):
    self.assertEqual(list(self.variables), ['params'])
    rule = bpjax.rules.forward_gradient()
    got = draws(rule, self.net, self.variables, self.x, self.y, 4000)
    plain = bpjax.from_linen(Rectified(tells=False))
    other = draws(rule, plain, self.variables, self.x, self.y, 4000)
    for layer in ('layer_0', 'layer_1'):
      exact = self.exact[layer]['kernel']
      mean, error = got[layer]['kernel'].mean(0), got[layer]['kernel'].std(0)
      np.testing.assert_array_less(
          jnp.abs(mean - exact), 5 * error / 4000**.5 + 1e-12)
      variance = lambda g: float(jnp.sum(jnp.var(g, axis=0)))  # pylint: disable=cell-var-from-loop
      self.assertLess(
          variance(got[layer]['kernel']), .8 * variance(other[layer]['kernel']))

  @parameterized.parameters('all', 'some', 'none')
  def test_a_module_that_is_called_twice(self, tells):
    net, variables, x = float64.setup(Tied(tells), self.x)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, self.y)
    got = draws(
        bpjax.rules.forward_gradient(), net, variables, x, self.y, 4000)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
      np.testing.assert_array_less(
          jnp.abs(leaf.mean(0) - expected), 5 * leaf.std(0) / 4000**.5 + 1e-12)

  def test_calls_under_remat_are_told_apart(self):
    net, variables, x = float64.setup(Tied('all', remat=True), self.x)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, self.y)
    self.assertLess(0, jnp.abs(exact['layer']['kernel']).max())
    step = lambda net: zoo.learn(bpjax.rules.forward_gradient(), net, LOSS)(
        variables, {}, x, self.y, key=jax.random.key(1))[1][0]
    self.assert_close(step(net), step(bpjax.from_linen(Tied('all'))), 1e-14)

  def test_a_neuron_that_is_never_on(self):
    self.variables['params']['layer_0']['bias'] = jnp.full(6, -50.).at[2].set(9)
    grads = jax.jit(bpjax.rules.forward_gradient().value_and_grad(
        self.net, LOSS))(
            self.variables, {}, self.x, self.y, jax.random.key(1))[1][0]
    moved = np.abs(np.asarray(grads['layer_0']['kernel'])).sum(0) > 0
    self.assertEqual(moved.tolist(), [False, False, True] + 3 * [False])


class NormBehind(nn.Module):
  """A readout with something that learns behind it, or that is called twice."""
  twice: bool = False

  @nn.compact
  def __call__(self, x):
    readout = nn.Dense(5, name='readout')
    x = readout(jnp.tanh(nn.Dense(5, name='hidden')(x)))
    return readout(jnp.tanh(x)) if self.twice else nn.LayerNorm(name='norm')(x)


class ReadoutTest(float64.Float64TestCase):

  def test_what_follows_it_is_exact_too(self):
    x = jax.random.normal(jax.random.key(0), (4, 6), jnp.float64)
    net, variables, x = float64.setup(NormBehind(), x)
    y = jnp.arange(4) % 5
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, y)
    got = draws(bpjax.rules.forward_gradient(), net, variables, x, y, 2000)
    for name in ('readout', 'norm'):
      self.assert_close(jax.tree.map(lambda g: g[0], got[name]), exact[name],
                        1e-12)
    mean, error = (f(got['hidden']['kernel'], axis=0) for f in (jnp.mean, jnp.std))
    np.testing.assert_array_less(
        jnp.abs(mean - exact['hidden']['kernel']), 5 * error / 2000**.5)

  def test_one_that_is_called_twice_is_perturbed(self):
    x = jax.random.normal(jax.random.key(0), (4, 5), jnp.float64)
    net, variables, x = float64.setup(NormBehind(twice=True), x)
    y, key, rule = jnp.arange(4), jax.random.key(1), bpjax.rules.forward_gradient()
    mean = expected.mean_update(rule, net, LOSS, variables, x, y, key)
    self.assert_close(
        mean, expected.gradient(net, LOSS, variables, x, y, key), 1e-12)
    self.assertEqual(rule.units(net, variables, x)['readout'], rule.name)


class EngineTest(float64.Float64TestCase):

  def test_noise_that_is_the_usual_one(self):
    for perturb, noise in (('activity', 'independent'), ('weight', 'shared')):
      self.assertIsNone(
          bpjax.rules.forward_gradient(perturb, noise=noise).noise)

  def test_noise_for_each_example_is_that_of_batches_of_one(self):
    model, x, y = zoo.inputs('plain', batch=3)
    net, variables, x = float64.setup(model, x)
    key = jax.random.key(1)
    rule = bpjax.rules.forward_gradient('weight', noise='independent')
    (value, aux), (grads, _) = zoo.learn(rule, net, LOSS)(
        variables, {}, x, y, key=key)
    learn = zoo.learn(bpjax.rules.forward_gradient('weight'), net, LOSS)
    alone = [
        learn(variables, {}, x[i:i + 1], y[i:i + 1], key=k)
        for i, k in enumerate(jax.random.split(key, len(x)))]
    (values, outputs), each = jax.tree.map(
        lambda *a: jnp.stack(a), *[(one[0], one[1][0]) for one in alone])
    self.assert_close(grads, jax.tree.map(lambda g: g.mean(0), each), 1e-14)
    self.assertAlmostEqual(float(value), float(values.mean()), 12)
    np.testing.assert_allclose(aux.output, outputs.output[:, 0], atol=1e-14)

  @parameterized.parameters(('activity', 'shared'), ('weight', 'independent'))
  def test_noise_of_coupled_examples_is_refused(self, perturb, noise):
    model, x, y = zoo.inputs('conv_batch_norm')
    net = bpjax.from_linen(model)
    rule = bpjax.rules.forward_gradient(perturb, noise=noise)
    with self.assertRaisesRegex(ValueError, '`noise` must be None where an exa'):
      jax.eval_shape(
          lambda: rule.value_and_grad(net, LOSS)(
              net.init(jax.random.key(0), x), {}, x, y, key=jax.random.key(1)))

  def test_update_is_the_local_vjp_of_the_teaching_signal(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.forward_gradient()
    key = jax.random.key(1)
    grads, signals = rule.signals(net, LOSS, variables, {}, x, y, key)
    taught = np.asarray(signals['Dense_0']['call_0'])
    np.testing.assert_allclose(
        grads['Dense_0']['kernel'], x.T @ taught / len(x), atol=1e-14)
    # The signal is u times one number an example: recover it by the reference.
    expected = reference.forward_gradient_activity
    keys = credit_lib.split(key)[1]
    noise = rule.directions(
        keys, [jnp.zeros(s, jnp.float64) for s in ((5, 6), (5, 5))])
    self.assert_close(
        grads, expected(
            jax.tree.map(np.asarray, variables['params']),
            {'Dense_0': np.asarray(noise[0]), 'Dense_1': np.asarray(noise[1])},
            np.asarray(x), np.asarray(y), 'tanh', 'cross_entropy'), 1e-13)

  def test_samples_are_one_forward_pass(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)

    def tanhs(samples):
      rule = bpjax.rules.forward_gradient(samples=samples)
      compiled = jax.jit(lambda v, x: zoo.learn(rule, net, LOSS)(
          v, {}, x, y, key=jax.random.key(1))).lower(variables, x).compile()
      return compiled.as_text().count(' tanh(')

    self.assertEqual(tanhs(1), 2)
    self.assertEqual(tanhs(8), 2)

  def test_backward_is_the_units_own_vjp(self):
    model, x, _ = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.forward_gradient()
    signal = jax.random.normal(jax.random.key(2), (5, 6), jnp.float64)
    unit, params = net.units['Dense_0'], variables['params']['Dense_0']
    pre = unit.affine(params, (x,))
    credit = rule.backward(
        unit, params, {}, bpjax.Activations((x,), pre, pre),
        bpjax.Signal(signal, None, None))
    np.testing.assert_allclose(
        credit.params['kernel'], x.T @ signal, atol=1e-14)
    self.assertEqual(credit.inputs, (None,))


_LOCAL_ORTHOGONAL = """
import bpjax, flax.linen as nn, jax, jax.numpy as jnp
net = bpjax.from_linen(nn.Sequential(
    [nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)]))
x, y = jnp.ones((128, 64)), jnp.zeros(128, int)
variables = net.init(jax.random.key(0), x)
rule = bpjax.local(bpjax.rules.forward_gradient(
    directions='orthogonal', samples=8), ['layers_0', 'layers_2', 'layers_4'])
feedback = rule.init(jax.random.key(1), net, variables, x)
learn = jax.jit(rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy))
for i in range(30):
  jax.block_until_ready(
      learn(variables, feedback, x, y, key=jax.random.key(i)))
"""


class OrthonormalTest(parameterized.TestCase):

  @parameterized.parameters((np.float32, 2e-6), (np.float64, 1e-14))
  def test_as_a_qr_decomposition(self, dtype, tolerance):
    x = np.random.default_rng(0).normal(size=(6, 40, 7)).astype(dtype)
    with jax.enable_x64(True):
      got = np.asarray(perturbation.orthonormal(jnp.asarray(x)))
    self.assertEqual(got.dtype, dtype)
    for n in range(40):
      q, r = np.linalg.qr(x[:, n].T.astype(np.float64))
      np.testing.assert_allclose(
          got[:, n].T, q * np.sign(np.diag(r)), atol=100 * tolerance)
      np.testing.assert_allclose(
          got[:, n] @ got[:, n].T, np.eye(6), atol=tolerance)

  def test_many_at_once_do_not_hang(self):
    """Two LAPACK decompositions in one program wait for each other."""
    subprocess.run(
        [sys.executable, '-c', _LOCAL_ORTHOGONAL], timeout=120, check=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
