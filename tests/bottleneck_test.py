"""A mask on neurons, under every rule."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax.train import config as config_lib
import jax
import jax.numpy as jnp
import numpy as np
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy
_LEARNERS = [False, True, False, True, False]


def learn(rule, net, variables, x, y):
  """Updates of the parameters and the feedback that they were made with."""
  feedback = rule.init(jax.random.key(2), net, variables, x)
  (_, _), (grads, _) = jax.jit(rule.value_and_grad(net, _LOSS))(
      variables, feedback, x, y, jax.random.key(3))
  return grads, feedback


def moved(updates):
  """Which neurons have an update of any parameter."""
  kernel = np.abs(updates['kernel']).reshape(-1, updates['bias'].size)
  return ((kernel.sum(axis=0) > 0) | (np.abs(updates['bias']) > 0)).tolist()


class BottleneckTest(float64.Float64TestCase):

  def setUp(self):
    super().setUp()
    self.x = jax.random.normal(jax.random.key(0), (8, 7), jnp.float64)
    self.y = jnp.arange(8) % 4
    self.net, self.variables, self.x = float64.setup(
        zoo.Plain(widths=(6, 5, 9)), self.x)

  @parameterized.parameters(*zoo.BARE)
  def test_only_the_chosen_neurons_learn(self, name):
    rule = bpjax.bottleneck(
        bpjax.rules.get(name)(), {'Dense_1': _LEARNERS, 'Dense_2': 4})
    grads, _ = learn(rule, self.net, self.variables, self.x, self.y)
    self.assertEqual(moved(grads['Dense_1']), _LEARNERS)
    self.assertEqual(sum(moved(grads['Dense_2'])), 4)
    self.assertTrue(all(moved(grads['Dense_0']) + moved(grads['Dense_3'])))

  def test_weights_that_are_perturbed(self):
    rule = bpjax.bottleneck(
        bpjax.rules.forward_gradient(perturb='weight'), {'Dense_1': _LEARNERS})
    grads, _ = learn(rule, self.net, self.variables, self.x, self.y)
    self.assertEqual(moved(grads['Dense_1']), _LEARNERS)
    self.assertTrue(all(moved(grads['Dense_2'])))

  def test_orthogonal_directions(self):
    rule = bpjax.bottleneck(
        bpjax.rules.forward_gradient(directions='orthogonal', samples=2),
        {'Dense_1': _LEARNERS})
    one = jax.vmap(lambda key: rule.value_and_grad(self.net, _LOSS)(
        self.variables, {}, self.x, self.y, key)[1][0]['Dense_1'])
    got = jax.jit(one)(jax.random.split(jax.random.key(4), 4000))
    exact, _ = learn(
        bpjax.bottleneck(bpjax.rules.backprop(), {'Dense_1': _LEARNERS}),
        self.net, self.variables, self.x, self.y)
    want = exact['Dense_1']['kernel']
    slope = jnp.sum(got['kernel'].mean(0) * want) / jnp.sum(want**2)
    self.assertBetween(float(slope), .9, 1.1)
    silent = ~np.array(_LEARNERS)
    np.testing.assert_array_equal(got['kernel'][..., silent], 0)

  def test_backprop_below_is_that_of_the_masked_gradient(self):
    rule = bpjax.bottleneck(bpjax.rules.backprop(), {'Dense_1': _LEARNERS})
    grads, _ = learn(rule, self.net, self.variables, self.x, self.y)
    mask = jnp.array(_LEARNERS)

    def loss(params):
      h = self.x
      for i in range(4):
        h = h @ params[f'Dense_{i}']['kernel'] + params[f'Dense_{i}']['bias']
        if i == 1:
          h = jnp.where(mask, h, jax.lax.stop_gradient(h))
        h = jnp.tanh(h) if i < 3 else h
      return _LOSS(h, self.y).mean()

    self.assert_close(grads, jax.grad(loss)(self.variables['params']), 1e-14)

  def test_direct_feedback_below_does_not_pass_the_bottleneck(self):
    rule = bpjax.rules.direct_feedback_alignment()
    plain, _ = learn(rule, self.net, self.variables, self.x, self.y)
    masked, _ = learn(
        bpjax.bottleneck(rule, {'Dense_1': 1}), self.net, self.variables,
        self.x, self.y)
    self.assert_close(masked['Dense_0'], plain['Dense_0'], 0)

  def test_the_choice_depends_on_the_seed_and_on_the_name_alone(self):
    make = lambda n, seed: bpjax.bottleneck(
        bpjax.rules.backprop(), {'Dense_[12]': n}, seed)
    chosen = lambda rule: tuple(
        tuple(moved(learn(rule, self.net, self.variables, self.x, self.y)[0][u]))
        for u in ('Dense_1', 'Dense_2'))
    self.assertEqual(chosen(make(2, 0)), chosen(make(2, 0)))
    self.assertLen({chosen(make(2, seed)) for seed in range(4)}, 4)

  def test_inside_by_path(self):
    rule = bpjax.rules.by_path({
        'Dense_1': bpjax.bottleneck(
            bpjax.rules.feedback_alignment(), {'*': _LEARNERS}),
        '*': bpjax.rules.backprop()})
    grads, _ = learn(rule, self.net, self.variables, self.x, self.y)
    self.assertEqual(moved(grads['Dense_1']), _LEARNERS)
    wrong = bpjax.rules.by_path({
        'Dense_1': bpjax.bottleneck(
            bpjax.rules.feedback_alignment(), {'Dense_2': 3}),
        '*': bpjax.rules.backprop()})
    with self.assertRaisesRegex(ValueError, 'matches no unit'):
      wrong.init(jax.random.key(0), self.net, self.variables, self.x)

  def test_channels_of_convolutions(self):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    net = bpjax.from_linen(zoo.ConvBatchNorm())
    variables = jax.jit(net.init)(jax.random.key(1), x)
    rule = bpjax.bottleneck(bpjax.rules.feedback_alignment(), {'Conv_1': 2})
    grads, _ = learn(rule, net, variables, x, jnp.arange(4) % 3)
    by_channel = np.abs(grads['Conv_1']['kernel']).sum((0, 1, 2))
    self.assertEqual(np.count_nonzero(by_channel), 2)

  @parameterized.parameters(
      ({}, 'at least one path pattern'),
      ({'Dense_1': 0}, 'at least one neuron'),
      ({'Dense_1': [False] * 5}, 'at least one neuron'),
      ({'Dense_1': 1.5}, 'whole number'),
      ({'Dense_1': True}, 'whole number'))
  def test_refused_at_once(self, neurons, message):
    with self.assertRaisesRegex(ValueError, message):
      bpjax.bottleneck(bpjax.rules.backprop(), neurons)

  @parameterized.product(
      name=('feedback_alignment', 'forward_gradient'),
      case=(({'Dense_9': 1}, 'matches no unit'),
            ({'Dense_1': 6}, 'at most its 5'),
            ({'Dense_1': [True] * 4}, 'a bool for each of its 5')))
  def test_refused_before_any_computation(self, name, case):
    neurons, message = case
    rule = bpjax.bottleneck(bpjax.rules.get(name)(), neurons)
    with self.assertRaisesRegex(ValueError, message):
      rule.init(jax.random.key(0), self.net, self.variables, self.x)

  def test_refuses_what_is_no_rule(self):
    with self.assertRaisesRegex(ValueError, 'must be of the credit or the perturbation'):
      bpjax.bottleneck(bpjax.rules.backprop, {'Dense_1': 1})

  def test_a_field_of_a_config(self):
    config = config_lib.default()
    config.bottleneck = ('Dense_0',)
    with self.assertRaisesRegex(ValueError, '`bottleneck` must be a list'):
      config_lib.check(config)


if __name__ == '__main__':
  absltest.main()
