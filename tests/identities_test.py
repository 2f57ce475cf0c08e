"""What has to hold exactly, in float64: identities and independent references."""

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
import zoo

LOSS = bpjax.losses.softmax_cross_entropy
ZOO = ('plain', 'conv_batch_norm', 'residual', 'encoder', 'encoder_per_token',
       'remat', 'scan')


def as_numpy(tree):
  return jax.tree.map(np.asarray, tree)


def weights_as_feedback(feedback, params):
  return bpjax.paths.map_with_name(
      lambda name, _: bpjax.paths.subtree(params, name), feedback)


class BackpropTest(float64.Float64TestCase):

  @parameterized.parameters(*ZOO)
  def test_equals_jax_grad_also_under_feedback_alignment_with_b_equal_w(
      self, name):
    model, x, y = zoo.inputs(name)
    kwargs = {}
    if name == 'conv_batch_norm':
      model, kwargs = zoo.ConvBatchNorm(dropout=0.), {'train': True}
    net, variables, x = float64.setup(model, x)

    def mean_loss(params):
      output, _ = model.apply(
          {**variables, 'params': params}, x, mutable=['batch_stats'], **kwargs)
      return LOSS(output, y).mean()

    value, exact = jax.jit(jax.value_and_grad(mean_loss))(variables['params'])
    learn = bpjax.rules.backprop().value_and_grad(net, LOSS)
    (got, _), (grads, _) = jax.jit(learn)(variables, {}, x, y)
    self.assertAlmostEqual(got, value, 12)
    self.assert_close(grads, exact, 1e-14)

    for rule in ('feedback_alignment', 'kolen_pollack'):
      rule = bpjax.rules.get(rule)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      feedback = weights_as_feedback(feedback, variables['params'])
      learn = zoo.learn(rule, net, LOSS)
      _, (grads, feedback_grads) = learn(variables, feedback, x, y)
      self.assert_close(grads, exact, 1e-14)
      if rule.name == 'kolen_pollack':
        self.assert_close(
            feedback_grads, weights_as_feedback(feedback, grads), 0)

  def test_bind_is_the_rule_under_ordinary_grad(self):
    model, x, y = zoo.inputs('residual')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.kolen_pollack()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, expected = zoo.learn(rule, net, LOSS)(variables, feedback, x, y)
    apply = rule.bind(net)
    got = jax.jit(jax.grad(
        lambda p, b: LOSS(apply({'params': p}, b, x), y).mean(), (0, 1)))(
            variables['params'], feedback)
    self.assert_close(got, expected, 1e-14)


class ReferenceTest(float64.Float64TestCase):
  """Against plain numpy, written from the papers."""

  @parameterized.product(
      rule=('feedback_alignment', 'direct_feedback_alignment', 'kolen_pollack'),
      activation=('tanh', 'relu'), loss=('cross_entropy', 'squared_error'))
  def test_mlp(self, rule, activation, loss):
    model = bpjax.models.mlp(4, widths=(6, 5, 7), activation=activation)
    x = jax.random.normal(jax.random.key(3), (9, 8), jnp.float64)
    y = jnp.arange(9) % 4
    if loss == 'squared_error':
      y = jax.random.normal(jax.random.key(4), (9, 4), jnp.float64)
    function = LOSS if loss == 'cross_entropy' else bpjax.losses.squared_error
    net, variables, x = float64.setup(model, x)
    params = jax.tree.map(
        lambda p: p + .1 * jax.random.normal(jax.random.key(5), p.shape),
        variables['params'])  # Biases that are not zero.
    made = bpjax.rules.get(rule)()
    feedback = float64.doubles(made.init(jax.random.key(1), net, variables, x))
    learn = zoo.learn(made, net, function)
    (value, _), updates = learn({'params': params}, feedback, x, y)
    expected = getattr(reference, rule)(
        as_numpy(params), as_numpy(feedback), np.asarray(x), np.asarray(y),
        activation, loss)
    got = updates if rule == 'kolen_pollack' else updates[0]
    self.assert_close(got, expected, 5e-15)
    output = reference.mlp_forward(as_numpy(params), np.asarray(x), activation)
    losses, _ = reference.loss_and_error(output[0][-1], np.asarray(y), loss)
    self.assertAlmostEqual(value, losses.mean(), 12)

  @parameterized.parameters(
      'feedback_alignment', 'direct_feedback_alignment', 'kolen_pollack')
  def test_conv_net(self, rule):
    model = nn.Sequential([
        nn.Conv(3, (3, 3), name='Conv_0'), nn.tanh,
        nn.Conv(4, (3, 3), name='Conv_1'), nn.tanh,
        lambda h: h.reshape(h.shape[0], -1), nn.Dense(5, name='Dense_0')])
    x = jax.random.normal(jax.random.key(3), (4, 5, 6, 2), jnp.float64)
    y = jnp.arange(4)
    net, variables, x = float64.setup(model, x)
    made = bpjax.rules.get(rule)()
    feedback = float64.doubles(made.init(jax.random.key(1), net, variables, x))
    _, updates = zoo.learn(made, net, LOSS)(
        variables, feedback, x, y)
    expected = getattr(reference, f'conv_net_{rule}')(
        as_numpy(variables['params']), as_numpy(feedback), np.asarray(x),
        np.asarray(y))
    got = updates if rule == 'kolen_pollack' else updates[0]
    self.assert_close(got, expected, 5e-14)

  @parameterized.parameters(True, False)
  def test_direct_feedback_to_sequences(self, per_token):

    class Tokens(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.Dense(6, name='Dense_0')(x))
        x = nn.tanh(nn.Dense(5, name='Dense_1')(x))
        return nn.Dense(3, name='Dense_2')(x if per_token else x.mean(1))

    x = jax.random.normal(jax.random.key(3), (4, 7, 2), jnp.float64)
    y = jnp.arange(28).reshape(4, 7) % 3 if per_token else jnp.arange(4) % 3
    net, variables, x = float64.setup(Tokens(), x)
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    self.assertEqual(feedback['Dense_1'].shape, (3, 6))
    _, (grads, _) = zoo.learn(rule, net, LOSS, reduction='sum')(
        variables, feedback, x, y)
    expected = reference.direct_feedback_alignment(
        as_numpy(variables['params']), as_numpy(feedback), np.asarray(x),
        np.asarray(y), 'tanh', 'cross_entropy', not per_token)
    self.assert_close(grads, jax.tree.map(lambda g: g * 4, expected), 1e-13)


class BackwardTest(float64.Float64TestCase):
  """`rule.backward`, one unit at a time, outside any engine."""

  def test_chain_by_hand_equals_the_engine(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    params = variables['params']
    for name in ('backprop', 'feedback_alignment', 'direct_feedback_alignment',
                 'kolen_pollack'):
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      (_, aux), expected = zoo.learn(rule, net, reduction='sum')(
          variables, feedback, x, y)
      error = jax.grad(lambda out: LOSS(out, y).sum())(aux.output)
      activations, h = {}, x
      for unit in net.units.values():
        pre = unit.affine(params[unit.info.name], (h,))
        activations[unit.info.name] = bpjax.Activations((h,), pre, pre)
        h = jnp.tanh(pre)
      teaching, grads = error, {}
      for unit in reversed(net.units.values()):
        own = unit.info.name
        credit = rule.backward(
            unit, params[own], feedback.get(own), activations[own],
            bpjax.Signal(teaching, error, None))
        grads[own] = credit.params
        if credit.inputs[0] is not None:  # Through tanh, to the unit below.
          teaching = credit.inputs[0] * (1 - activations[own].inputs[0]**2)
      self.assert_close(grads, expected[0], 1e-14)


class DirectFeedbackTest(float64.Float64TestCase):

  def test_one_hidden_layer_equals_feedback_alignment(self):
    model, x, y = zoo.Plain(widths=(6,)), *zoo.inputs('plain')[1:]
    net, variables, x = float64.setup(model, x)
    fa = bpjax.rules.feedback_alignment()
    dfa = bpjax.rules.direct_feedback_alignment()
    feedback = fa.init(jax.random.key(1), net, variables, x)
    transposed = {'Dense_1': feedback['Dense_1']['kernel'].T}
    _, (expected, _) = zoo.learn(fa, net, LOSS)(variables, feedback, x, y)
    _, (grads, _) = zoo.learn(dfa, net, LOSS)(variables, transposed, x, y)
    self.assert_close(grads, expected, 1e-15)

  def test_shared_matrix_is_sliced_and_normalised(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    shared = bpjax.rules.direct_feedback_alignment(shared=True)
    feedback = shared.init(jax.random.key(1), net, variables, x)
    matrix, = jax.tree.leaves(feedback)
    self.assertEqual(matrix.shape, (4, 6))  # The largest hidden layer.
    slices = reference.shared_feedback(np.asarray(matrix), [6, 5])
    independent = dict(zip(('Dense_1', 'Dense_2'), map(jnp.asarray, slices)))
    _, (grads, _) = zoo.learn(shared, net, LOSS)(variables, feedback, x, y)
    rule = bpjax.rules.direct_feedback_alignment()
    _, (expected, _) = zoo.learn(rule, net, LOSS)(
        variables, independent, x, y)
    self.assert_close(grads, expected, 1e-15)

  def test_update_does_not_depend_on_later_layers(self):
    model, x, _ = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    error = jax.random.normal(jax.random.key(2), (5, 4), jnp.float64)
    # This loss has the same error whatever the output is.
    learn = rule.value_and_grad(net, lambda out, e: jnp.sum(out * e, axis=1))

    def first_layer(later):
      params = {**variables['params'], **later}
      return learn({'params': params}, feedback, x, error)[1][0]['Dense_0']

    later = {k: variables['params'][k] for k in ('Dense_1', 'Dense_2')}
    for leaf in jax.tree.leaves(jax.jit(jax.jacfwd(first_layer))(later)):
      self.assertEqual(jnp.abs(leaf).max(), 0)

  def test_product_of_the_weights_is_backprop_in_a_linear_net(self):
    model = bpjax.models.mlp(3, widths=(6, 5), activation='identity')
    x = jax.random.normal(jax.random.key(3), (4, 8), jnp.float64)
    net, variables, x = float64.setup(model, x)
    w1, w2 = (variables['params'][f'Dense_{i}']['kernel'] for i in (1, 2))
    feedback = {'Dense_1': (w1 @ w2).T, 'Dense_2': w2.T}
    y = jnp.arange(4) % 3
    rule = bpjax.rules.direct_feedback_alignment()
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net, LOSS)(
        variables, {}, x, y)
    self.assert_close(grads, exact, 1e-15)


class FeedbackAlignmentTest(float64.Float64TestCase):

  def test_scaling_b_scales_what_lies_below(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = rule.value_and_grad(net, LOSS)
    _, (before, _) = learn(variables, feedback, x, y)
    feedback['Dense_1'] = jax.tree.map(lambda b: 3 * b, feedback['Dense_1'])
    _, (after, _) = learn(variables, feedback, x, y)
    expected = {**before, 'Dense_0': jax.tree.map(
        lambda g: 3 * g, before['Dense_0'])}
    self.assert_close(after, expected, 1e-15)

  def test_one_layer_needs_no_feedback_and_is_backprop(self):
    x = jax.random.normal(jax.random.key(3), (4, 8), jnp.float64)
    y = jnp.arange(4) % 3
    net, variables, x = float64.setup(nn.Dense(3), x)
    for name in ('feedback_alignment', 'direct_feedback_alignment'):
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      self.assertEqual(feedback, {})
      _, (grads, _) = zoo.learn(rule, net, LOSS)(variables, {}, x, y)
      exact = jax.grad(lambda p: LOSS(nn.Dense(3).apply(
          {'params': p}, x), y).mean())(variables['params'])
      self.assert_close(grads, exact, 1e-15)


class KolenPollackTest(float64.Float64TestCase):

  @parameterized.named_parameters(
      ('sgd', lambda: optax.sgd(.1), False),
      ('momentum', lambda: optax.sgd(.05, momentum=.9), False),
      ('adamw', lambda: optax.adamw(.01, weight_decay=.5), True))
  def test_law(self, optimizer, decay_inside):
    decay, steps = .005, 200
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.kolen_pollack()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = rule.value_and_grad(net, LOSS)
    tx = optimizer()
    if not decay_inside:  # Decoupled: once a step, whatever the learning rate.
      tx = optax.chain(tx, optax.add_decayed_weights(-decay))

    def step(carry, i):
      trees, state = carry
      data = jax.random.normal(jax.random.fold_in(jax.random.key(5), i),
                               x.shape, jnp.float64)
      _, grads = learn({'params': trees[0]}, trees[1], data, y)
      updates, state = tx.update(grads, state, trees)
      return (optax.apply_updates(trees, updates), state), None

    trees = (variables['params'], feedback)
    (after, _), _ = jax.jit(lambda c: jax.lax.scan(
        step, c, jnp.arange(steps)))((trees, tx.init(trees)))
    difference = lambda trees: jax.tree.map(
        jnp.subtract, weights_as_feedback(trees[1], trees[0]), trees[1])
    shrink = reference.kolen_pollack_difference
    rate = .01 * .5 if decay_inside else decay
    expected = jax.tree.map(
        lambda d: shrink(np.asarray(d), np.zeros_like(d), rate, steps),
        difference(trees))
    self.assert_close(difference(after), expected, 1e-13)
    self.assertGreater(
        jnp.abs(after[0]['Dense_1']['kernel']
                - trees[0]['Dense_1']['kernel']).max(), .05)
