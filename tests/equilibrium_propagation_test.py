"""Equilibrium propagation against numpy, and in its limits."""

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

_RULE = bpjax.rules.equilibrium_propagation
_PHASES = dict(free_steps=400, nudged_steps=400, step_size=.3)


def cost(output, y):
  """The authors' cost, without a half."""
  return jnp.sum((output - y)**2, axis=1)


class Settled(nn.Module):
  """Layers of several kinds: with their nonlinearity, without, pooled."""
  kind: str = 'dense'

  @nn.compact
  def __call__(self, x, train: bool = False):
    if self.kind == 'dense':
      x = nn.Dense(5)(nn.Dense(6)(x))
    elif self.kind == 'twice':
      layer = nn.Dense(8)
      x = layer(layer(x))
    elif self.kind == 'layer':
      x = bpjax.nn.Layer(functools.partial(nn.Dense, 6), nn.tanh)(x)
      x = bpjax.nn.Layer(functools.partial(nn.Dense, 5), nn.sigmoid)(x)
    else:
      x = nn.Conv(3, (2, 2))(x.reshape(-1, 2, 2, 2))
      x = nn.avg_pool(x, (2, 1)).reshape(x.shape[0], -1)
    if self.kind == 'batch_norm':
      x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(3)(nn.Dropout(.3, deterministic=not train)(x))


def setup(model, **arguments):
  x = jax.random.uniform(jax.random.key(0), (4, 8))
  net, variables, x = float64.setup(model, x, **arguments)
  y = jax.nn.one_hot(jnp.arange(4) % 3, 3, dtype=jnp.float64)
  # States inside of [0, 1]: at its ends the fixed point has no derivative.
  variables['params'] = bpjax.paths.map_with_name(
      lambda name, p: p + .4 if name.endswith('bias') else .2 * p,
      variables['params'])
  return net, variables, x, y


def squares(unit, state):
  """The energy of predictive coding (Whittington and Bogacz, 2017)."""
  return .5 * (state - unit.activation(unit.pre))**2, state


class EnergyTest(float64.Float64TestCase):

  @parameterized.parameters('dense', 'twice', 'layer', 'conv')
  def test_energy_of_predictive_coding_gives_backprop_for_small_nudges(
      self, kind):
    net, variables, x, y = setup(Settled(kind))
    rule = bpjax.engines.settling.Rule(
        'predictive', squares, lambda unit: jnp.zeros_like(unit.pre),
        lambda info, state: state, 400, 400, .3, 1e-6, 'symmetric')
    learn = lambda rule: jax.jit(rule.value_and_grad(net, cost))(
        variables, {}, x, y, jax.random.key(2))
    (value, aux), (grads, _) = learn(rule)
    (expected, plain), (exact, _) = learn(bpjax.rules.backprop())
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(aux.output, plain.output, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-8), grads, exact)


class ReferenceTest(float64.Float64TestCase):

  @parameterized.product(nudge=('positive', 'symmetric', 'random'),
                         start=(False, True))
  def test_updates_and_particles(self, nudge, start):
    net, variables, x, y = setup(
        nn.Sequential([nn.Dense(6), nn.Dense(5), nn.Dense(3)]))
    rule = _RULE(beta=.2, free_steps=9, nudged_steps=5, step_size=.4,
                 nudge=nudge, readout='clip')
    given = rule.particles(net, variables, x)
    if start:
      given = jax.tree.map(
          lambda s: .5 + .5 * jnp.cos(jnp.arange(s.size)).reshape(s.shape), given)
      variables = {**variables, 'particles': given}
    (_, aux), (grads, _) = zoo.learn(rule, net, cost, reduction='sum')(
        variables, {}, x, y, key=jax.random.key(2))
    names = [f'layers_{i}' for i in range(3)]
    params = [
        jax.tree.map(np.asarray, variables['params'][n]) for n in names]
    numbered = lambda tree: {
        i: np.asarray(tree[n]['call_0']) for i, n in enumerate(names, 1)}
    possible = []
    for sign in (1, -1) if nudge == 'random' else (1,):
      expected = reference.equilibrium_propagation(
          params, numbered(given), np.asarray(x), np.asarray(y),
          beta=.2 * sign, free_steps=9, nudged_steps=5, step_size=.4,
          symmetric=nudge == 'symmetric')
      possible.append(all(
          np.allclose(grads[n][k], update[k], atol=1e-12, rtol=0)
          for n, update in zip(names, expected.updates) for k in update))
      for i, s in numbered(aux.model_state['particles']).items():
        np.testing.assert_allclose(s, expected.particles[i], atol=1e-12)
    self.assertEqual(sum(possible), 1)

  def test_the_sign_of_a_random_nudge_depends_on_the_key(self):
    net, variables, x, y = setup(nn.Dense(3))
    learn = zoo.learn(_RULE(readout='clip', beta=.3), net, cost)
    found = {
        float(learn(variables, {}, x, y, key=jax.random.key(k))[1][0]['bias'][0])
        for k in range(6)}
    self.assertLen(found, 2)
    with self.assertRaisesRegex(ValueError, '`key` is needed'):
      learn(variables, {}, x, y)


class LimitsTest(float64.Float64TestCase):

  @parameterized.parameters('dense', 'layer', 'conv', 'twice')
  def test_small_nudges_are_the_gradient_at_the_fixed_point(self, kind):
    net, variables, x, y = setup(Settled(kind), train_args={}, eval_args={})
    rule = _RULE(readout='linear', nudge='positive', **_PHASES)
    predict = rule.predict(net)
    exact = jax.jit(jax.grad(lambda p: jnp.sum(
        bpjax.losses.squared_error(predict({'params': p}, x), y))))(
            variables['params'])

    def distance(nudge, beta):
      rule = _RULE(readout='linear', nudge=nudge, beta=beta, **_PHASES)
      grads = zoo.learn(
          rule, net, bpjax.losses.squared_error, reduction='sum')(
              variables, {}, x, y)[1][0]
      return max(
          float(jnp.linalg.norm((g - e).ravel()) / jnp.linalg.norm(e.ravel()))
          for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact))
          if float(jnp.linalg.norm(e.ravel())) > 1e-9)

    one, one_less = distance('positive', .04), distance('positive', .004)
    two, two_less = distance('symmetric', .04), distance('symmetric', .004)
    self.assertBetween(one / one_less, 7, 13)
    self.assertBetween(two / two_less, 60, 150)
    self.assertLess(two, one)
    self.assertLess(two_less, 1e-4)

  def test_batch_mates_do_not_matter(self):
    net, variables, x, y = setup(Settled('layer'), train_args={})
    learn = jax.jit(_RULE(nudge='symmetric').value_and_grad(
        net, cost, reduction='sum'))
    both = learn(variables, {}, x, y)[1][0]
    halves = [learn(variables, {}, x[i:i + 2], y[i:i + 2])[1][0]
              for i in (0, 2)]
    self.assert_close(both, jax.tree.map(jnp.add, *halves), 1e-12)

  def test_the_free_phase_goes_on_from_the_particles(self):
    net, variables, x, y = setup(Settled('layer'), train_args={})
    learn = zoo.learn(_RULE(free_steps=3, nudge='positive'), net, cost)
    long = zoo.learn(_RULE(free_steps=60, nudge='positive'), net, cost)
    fixed = long(variables, {}, x, y)[0][1].output
    distances, state = [], {}
    for _ in range(20):
      (_, aux), _ = learn({**variables, **state}, {}, x, y)
      state = dict(aux.model_state)
      distances.append(float(jnp.abs(aux.output - fixed).max()))
    self.assertLess(distances[-1], 1e-12)
    self.assertGreater(distances[0], 1e-3)
    self.assertEqual(
        jax.tree.leaves(state['particles'])[0].shape[0], x.shape[0])

  def test_evaluation_has_no_dropout(self):
    net, variables, x, _ = setup(Settled())
    predict = _RULE().predict(net)
    self.assertTrue(jnp.array_equal(
        predict(variables, x), predict(variables, x)))


class RefusedTest(parameterized.TestCase):

  def test_batch_norm(self):
    x = jnp.ones((2, 8))
    net = bpjax.from_linen(Settled('batch_norm'))
    variables = net.init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'normalises over the batch'):
      _RULE().init(jax.random.key(0), net, variables, x)

  @parameterized.parameters(
      ({'beta': 0.}, '`beta`'), ({'free_steps': 0}, '`free_steps`'),
      ({'nudged_steps': 1.5}, '`nudged_steps`'), ({'nudge': 'up'}, '`nudge`'),
      ({'step_size': -1.}, '`step_size`'), ({'readout': 'tanh'}, '`readout`'))
  def test_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      _RULE(**arguments)


if __name__ == '__main__':
  absltest.main()
