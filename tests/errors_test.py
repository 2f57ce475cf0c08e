"""Every condition that the library refuses, in one clear sentence, up front."""

from absl.testing import parameterized
import bpjax
import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


class Signs(nn.Module):
  activation: str = 'sign'

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(5)(x)
    h = {'sign': jnp.sign, 'step': lambda h: jnp.where(h > 0, 1., 0.),
         'straight_through': lambda h: h + jax.lax.stop_gradient(
             jnp.sign(h) - h)}[self.activation](h)
    return nn.Dense(4)(h)


JitDense = nn.jit(nn.Dense)


class Jitted(nn.Module):
  jit: bool = True

  @nn.compact
  def __call__(self, x):
    below = JitDense(5) if self.jit else nn.Dense(5, name='Dense_1')
    return nn.Dense(4, name='Dense_0')(nn.tanh(below(x)))


def initialise(rule, model, x=None, **kwargs):
  x = jnp.ones((3, 7)) if x is None else x
  net = bpjax.from_linen(model, **kwargs)
  variables = jax.jit(net.init)(jax.random.key(0), x)
  return net, variables, rule.init(jax.random.key(1), net, variables, x)


class NetworkErrorsTest(parameterized.TestCase):

  @parameterized.product(
      name=zoo.BARE, activation=('sign', 'step'))
  def test_zero_derivative(self, name, activation):
    rule = bpjax.rules.get(name)()
    with self.assertRaisesRegex(ValueError, 'unit `Dense_0`.*zero everywhere'):
      initialise(rule, Signs(activation))
    # The same from `learn`, where the feedback is made by hand.
    net = bpjax.from_linen(Signs(activation))
    x = jnp.ones((3, 7))
    variables = Signs(activation).init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'unit `Dense_0`.*zero everywhere'):
      rule.value_and_grad(net, LOSS)(
          variables, {}, x, jnp.zeros(3, int), key=jax.random.key(1))

  def test_straight_through_trains(self):
    rule = bpjax.rules.feedback_alignment()
    net, variables, feedback = initialise(rule, Signs('straight_through'))
    _, (grads, _) = zoo.learn(rule, net)(
        variables, feedback, jnp.ones((3, 7)), jnp.zeros(3, int))
    self.assertGreater(jnp.abs(grads['Dense_0']['kernel']).max(), 0)

  def test_a_detached_part_is_no_error(self):

    class Frozen(nn.Module):

      @nn.compact
      def __call__(self, x):
        h = jax.lax.stop_gradient(nn.Dense(5)(x))
        return nn.Dense(4)(h)

    net, variables, feedback = initialise(
        bpjax.rules.feedback_alignment(), Frozen())
    self.assertEqual(feedback, {})  # Nothing below hears of it.
    self.assertFalse(net.units['Dense_0'].info.taught)
    del variables

  @parameterized.parameters(*zoo.BARE)
  def test_nn_jit(self, name):
    x, y, key = jnp.ones((3, 7)), jnp.zeros(3, int), jax.random.key(2)
    variables = Jitted().init(jax.random.key(0), x)
    Jitted().apply(variables, x)  # Fills the cache with a plain trace.
    rule = bpjax.rules.get(name)()
    net, _, feedback = initialise(rule, Jitted())
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y, key)
    rename = lambda tree: {
        {'JitDense_0': 'Dense_1', 'Dense_0': 'Dense_0'}.get(n, n): part
        for n, part in tree.items()}
    # The same network with the same names, but for the jit.
    plain = bpjax.from_linen(Jitted(jit=False))
    same = rule.value_and_grad(plain, LOSS)(
        {'params': rename(variables['params'])}, rename(feedback), x, y, key)
    chex.assert_trees_all_close(
        rename(grads), same[1][0], rtol=1e-5, atol=1e-6)

  def test_alignment_in_a_scan(self):
    model, x, y = zoo.inputs('scan')
    rule = bpjax.rules.backprop()
    net, variables, feedback = initialise(rule, model, x)
    measured = bpjax.alignment(net, LOSS, rule)(variables, feedback, x, y)
    self.assertAlmostEqual(measured['layers/Dense_0'].update, 1., 5)
    self.assertAlmostEqual(measured['layers/Dense_0'].teaching, 1., 5)

  def test_units_are_unknown_before_an_input(self):
    with self.assertRaisesRegex(ValueError, 'call `net.init'):
      bpjax.from_linen(zoo.Plain()).units  # pylint: disable=expression-not-assigned

  def test_parameters_without_a_unit_are_listed(self):
    model, x, _ = zoo.inputs('encoder')
    rule = bpjax.rules.feedback_alignment()
    net, variables, _ = initialise(rule, model, x)
    self.assertIn('position', net.units.exact)
    self.assertIn('LayerNorm_0/scale', net.units.exact)
    self.assertEqual(rule.units(net, variables, x)['position'],
                     'exact gradient (add)')
    self.assertRegex(repr(net.units), 'position +add')

  def test_is_unit_with_two_affine_operations(self):
    with self.assertRaisesRegex(ValueError, 'calls 3 affine operations'):
      initialise(bpjax.rules.backprop(), zoo.Plain(),
                 is_unit=lambda module: isinstance(module, zoo.Plain))

  def test_is_unit_with_batch_norm(self):
    """The rule answers for the affine operation; all else is exact."""

    class Block(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))

    class Net(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.Dense(4)(Block()(x))

    x = jax.random.normal(jax.random.key(3), (3, 7))
    y = jnp.arange(3)
    rule = bpjax.rules.backprop()
    net, variables, _ = initialise(
        rule, Net(), is_unit=lambda module: isinstance(module, Block))
    self.assertTrue(net.units['Block_0'].info.owns_activation)
    (_, aux), (grads, _) = zoo.learn(rule, net)(variables, {}, x, y)

    def loss(params):
      out, state = Net().apply({**variables, 'params': params}, x,
                               mutable=['batch_stats'])
      return LOSS(out, y).mean(), state

    expected, state = jax.grad(loss, has_aux=True)(variables['params'])
    chex.assert_trees_all_close(grads, expected, atol=1e-6)
    chex.assert_trees_all_close(aux.model_state, state, atol=1e-6)

  def test_not_a_module(self):
    with self.assertRaisesRegex(ValueError, 'must be a flax.linen.Module'):
      bpjax.from_linen(zoo.Plain)

  def test_a_model_that_needs_a_key(self):
    model, x, y = zoo.inputs('conv_batch_norm')
    rule = bpjax.rules.backprop()
    net, variables, feedback = initialise(rule, model, x)
    with self.assertRaisesRegex(ValueError, 'pass `key='):
      rule.value_and_grad(net, LOSS)(variables, feedback, x, y)


class StepErrorsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.x, self.y = jnp.ones((3, 7)), jnp.zeros(3, int)
    self.rule = bpjax.rules.feedback_alignment()
    self.net, self.variables, self.feedback = initialise(
        self.rule, zoo.Plain())

  def step(self, feedback=None, loss=LOSS, y=None, rule=None):
    rule = rule or self.rule
    feedback = self.feedback if feedback is None else feedback
    return rule.value_and_grad(self.net, loss)(
        self.variables, feedback, self.x, self.y if y is None else y)

  def test_missing_feedback(self):
    with self.assertRaisesRegex(ValueError, '`feedback` of unit `Dense_1`'):
      self.step(feedback={'Dense_2': self.feedback['Dense_2']})

  def test_feedback_of_a_wrong_shape(self):
    wrong = {**self.feedback, 'Dense_1': {'kernel': jnp.ones((2, 2))}}
    with self.assertRaisesRegex(ValueError, r'`Dense_1`.*\(6, 5\).*\(2, 2\)'):
      self.step(feedback=wrong)

  def test_feedback_of_another_rule(self):
    rule = bpjax.rules.direct_feedback_alignment()
    with self.assertRaisesRegex(ValueError, 'pass what `rule.init` returned'):
      self.step(rule=rule)

  def test_loss_that_is_a_mean(self):
    with self.assertRaisesRegex(ValueError, 'leave out the mean'):
      self.step(loss=lambda out, y: LOSS(out, y).mean())

  def test_losses_of_other_shapes(self):
    with self.assertRaisesRegex(ValueError, 'must have the shape'):
      self.step(loss=bpjax.losses.squared_error)
    with self.assertRaisesRegex(ValueError, 'integer labels `y`'):
      self.step(y=jnp.zeros((3, 4), int))

  @parameterized.parameters('avg', ({'Dense_0': 'max'},))
  def test_reduction(self, reduction):
    with self.assertRaisesRegex(ValueError, "'mean', 'sum' or a mapping"):
      self.rule.value_and_grad(self.net, LOSS, reduction=reduction)

  def test_forward_gradient_without_a_key(self):
    with self.assertRaisesRegex(ValueError, '`key` is needed'):
      self.step(rule=bpjax.rules.forward_gradient(), feedback={})

  def test_bind(self):
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = rule.init(jax.random.key(1), self.net, self.variables, self.x)
    with self.assertRaisesRegex(ValueError, 'port of unit `Dense_1`'):
      rule.bind(self.net)(self.variables, feedback, self.x)
    with self.assertRaisesRegex(ValueError, 'linear in the error'):
      bpjax.rules.forward_gradient().bind(self.net)

  def test_by_path(self):
    fa, bp = bpjax.rules.feedback_alignment(), bpjax.rules.backprop()
    init = lambda rules: bpjax.rules.by_path(rules).init(
        jax.random.key(1), self.net, self.variables, self.x)
    with self.assertRaisesRegex(ValueError, 'no pattern.*`Dense_0`'):
      init({'Dense_1': fa})
    with self.assertRaisesRegex(ValueError, '`Dense_7`.*matches no unit'):
      init({'Dense_7': fa, '*': bp})
    with self.assertRaisesRegex(ValueError, 'credit engine.*forward_gradient'):
      init({'*': bpjax.rules.forward_gradient()})
    with self.assertRaisesRegex(ValueError, 'at least one'):
      init({})

  def test_shared_feedback_of_two_sizes(self):

    class Mixed(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.Dense(5)(x.reshape(x.shape[0], -1)))
        x = nn.tanh(nn.Dense(6)(x)).reshape(-1, 2, 3)
        return nn.Dense(4)(x)

    with self.assertRaisesRegex(ValueError, 'use `shared=False`'):
      initialise(bpjax.rules.direct_feedback_alignment(shared=True), Mixed(),
                 jnp.ones((3, 2, 4)))


class ArgumentErrorsTest(parameterized.TestCase):

  @parameterized.parameters(
      ('feedback_alignment', dict(scale=0.)),
      ('kolen_pollack', dict(scale=-1.)),
      ('direct_feedback_alignment', dict(scale=0)),
      ('forward_gradient', dict(perturb='both')),
      ('forward_gradient', dict(directions='uniform')),
      ('forward_gradient', dict(epsilon=-1.)),
      ('forward_gradient', dict(antithetic=True)),
      ('forward_gradient', dict(noise='both')),
      ('forward_gradient', dict(samples=0)),
      ('forward_gradient', dict(samples=1.5)))
  def test_rules(self, name, arguments):
    argument, = arguments
    with self.assertRaisesRegex(ValueError, f'`{argument}` must be'):
      bpjax.rules.get(name)(**arguments)

  def test_models(self):
    with self.assertRaisesRegex(ValueError, 'did you mean `mlp`'):
      bpjax.models.get('mpl')
    with self.assertRaisesRegex(ValueError, 'did you mean `relu`'):
      bpjax.models.mlp(10, activation='rleu')
    with self.assertRaisesRegex(ValueError, '`widths`'):
      bpjax.models.mlp(10, widths=(0,))
    with self.assertRaisesRegex(ValueError, '`dropout`'):
      bpjax.models.mlp(10, dropout=1.)
    with self.assertRaisesRegex(ValueError, '`norm`'):
      bpjax.models.cnn(10, norm='layer')
