"""The credit engine at the edges: transforms, dtypes, shapes, devices, paths."""

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo

LOSS = bpjax.losses.softmax_cross_entropy
CREDIT = ('backprop', 'feedback_alignment', 'direct_feedback_alignment',
          'kolen_pollack')
ALL = zoo.BARE


def learned(name, model, x, y, **arguments):
  net = bpjax.from_linen(model)
  variables = jax.jit(net.init)(jax.random.key(0), x)
  rule = bpjax.rules.get(name)(**arguments)
  feedback = rule.init(jax.random.key(1), net, variables, x)
  learn = zoo.learn(rule, net, LOSS)
  return net, variables, feedback, learn(
      variables, feedback, x, y, key=jax.random.key(2))


class TransformTest(float64.Float64TestCase):

  @parameterized.parameters(*CREDIT)
  def test_remat_and_scan_equal_the_unrolled_model(self, name):
    _, x, y = zoo.inputs('stack')
    rule = bpjax.rules.get(name)()
    net, variables, x = float64.setup(zoo.Stack(), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    expected = zoo.learn(rule, net, LOSS)(
        variables, feedback, x, y)[1]

    remat = bpjax.from_linen(zoo.Stack('remat'))
    got = jax.jit(rule.value_and_grad(remat, LOSS))(
        variables, feedback, x, y)[1]
    self.assert_close(got, expected, 1e-14)

    scan = bpjax.from_linen(zoo.Stack('scan'))
    got = jax.jit(rule.value_and_grad(scan, LOSS))(
        {'params': stacked(variables['params'])}, stacked(feedback), x, y)[1]
    self.assert_close(got, tuple(map(stacked, expected)), 1e-14)

  def test_scan_draws_other_feedback_for_each_layer(self):
    model, x, _ = zoo.inputs('scan')
    net, variables, x = float64.setup(model, x)
    for name in ('feedback_alignment', 'direct_feedback_alignment'):
      feedback = bpjax.rules.get(name)().init(
          jax.random.key(1), net, variables, x)
      leaf, = jax.tree.leaves(feedback['layers'])
      self.assertEqual(leaf.shape[0], 3)
      self.assertGreater(jnp.abs(leaf[0] - leaf[1]).max(), .01)

  @parameterized.parameters(*CREDIT)
  def test_one_forward_pass(self, name):
    model, x, y = zoo.inputs('plain')
    net = bpjax.from_linen(model)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    jaxpr = jax.make_jaxpr(rule.value_and_grad(net, LOSS))(
        variables, feedback, x, y)
    self.assertEqual(str(jaxpr).count('= tanh '), 2)


def stacked(tree):
  """layer_0, layer_1, layer_2 -> layers, on a new first axis."""
  tree = dict(tree)
  layers = [tree.pop(f'layer_{i}') for i in range(3) if f'layer_{i}' in tree]
  if layers:
    tree['layers'] = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  return tree


class ShapeTest(parameterized.TestCase):

  # Forward gradient draws other directions for another shape.
  @parameterized.product(
      name=sorted(set(ALL) - {'forward_gradient'}),
      shape=((4, 3, 7), (4, 2, 3, 7)))
  def test_dense_on_more_axes_is_dense_on_flattened_ones(self, name, shape):
    x = jax.random.normal(jax.random.key(3), shape)
    y = jnp.arange(x[..., 0].size).reshape(shape[:-1]) % 4
    net, variables, feedback, (_, grads) = learned(name, zoo.Plain(), x, y)
    rule = bpjax.rules.get(name)()
    _, flat = zoo.learn(rule, net)(
        variables, feedback, x.reshape(-1, 7), y.reshape(-1),
        key=jax.random.key(2))
    for a, b in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(flat[0])):
      np.testing.assert_allclose(a, b, atol=1e-6)

  @parameterized.parameters(*ALL)
  def test_one_output_unit_and_batch_of_one(self, name):
    x = jax.random.normal(jax.random.key(3), (1, 7))
    net = bpjax.from_linen(zoo.Plain(classes=1))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    (value, _), (grads, _) = jax.jit(rule.value_and_grad(
        net, bpjax.losses.squared_error))(
            variables, feedback, x, jnp.ones((1, 1)), key=jax.random.key(2))
    self.assertTrue(jnp.isfinite(value))
    self.assertGreater(jnp.abs(grads['Dense_0']['kernel']).max(), 0)

  @parameterized.product(name=ALL, param=(jnp.float32, jnp.bfloat16))
  def test_bfloat16(self, name, param):
    _, x, y = zoo.inputs('plain')
    model = zoo.Plain(dtype=jnp.bfloat16, param_dtype=param)
    _, variables, feedback, ((_, _), (grads, feedback_grads)) = learned(
        name, model, x, y)
    for tree, like in ((grads, variables['params']), (feedback_grads, feedback)):
      for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like)):
        self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype))
    net = bpjax.from_linen(zoo.Plain())
    full = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    _, (expected, _) = bpjax.rules.get(name)().value_and_grad(net, LOSS)(
        full(variables), full(feedback), x, y, key=jax.random.key(2))
    if name != 'forward_gradient':  # Other random bits in another dtype.
      for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        self.assertLess(jnp.abs(a - b).max(), .03)

  @parameterized.parameters(*CREDIT)
  def test_transposed_grouped_and_einsum_layers(self, name):

    class Odd(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x))
        x = nn.tanh(nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x))
        x = nn.tanh(nn.Conv(6, (3, 3), kernel_dilation=2)(x))
        x = nn.tanh(nn.Einsum((4, 4, 6, 5), 'nabc,abcd->nd', name='E')(x))
        return nn.DenseGeneral((2, 3), name='D')(x).reshape(-1, 6)

    x = jax.random.normal(jax.random.key(3), (3, 4, 4, 2))
    _, variables, feedback, (_, (grads, _)) = learned(
        name, Odd(), x, jnp.arange(3))
    self.assertEqual(jax.tree.map(jnp.shape, grads),
                     jax.tree.map(jnp.shape, variables['params']))
    for leaf in jax.tree.leaves(grads):
      self.assertGreater(jnp.abs(leaf).max(), 0)
    if name == 'direct_feedback_alignment':
      self.assertEqual(feedback['Conv_0'].shape, (6, 8, 8, 4))


class SharingTest(float64.Float64TestCase):

  def test_a_unit_called_twice_gets_both_updates(self):

    class Shared(nn.Module):

      @nn.compact
      def __call__(self, x):
        layer = nn.Dense(5)
        return nn.Dense(3)(nn.tanh(layer(nn.tanh(layer(x)))))

    x = jax.random.normal(jax.random.key(3), (4, 5))
    y = jnp.arange(4) % 3
    net, variables, x = float64.setup(Shared(), x)
    self.assertEqual(net.units['Dense_0'].info.calls, 2)
    exact = jax.grad(lambda p: LOSS(
        Shared().apply({'params': p}, x), y).mean())(variables['params'])
    fa = bpjax.rules.feedback_alignment()
    feedback = {k: {'kernel': v['kernel']}
                for k, v in variables['params'].items()}
    _, (grads, _) = zoo.learn(fa, net, LOSS)(variables, feedback, x, y)
    self.assert_close(grads, exact, 1e-14)
    _, signals = fa.signals(
        net, LOSS, variables, feedback, x, y, jax.random.key(0))
    first, again = (signals['Dense_0'][f'call_{i}'] for i in range(2))
    kernel = variables['params']['Dense_0']['kernel']
    slope = 1 - jnp.tanh(x @ kernel)**2
    self.assert_close(again @ kernel.T * slope, first, 1e-14)
    dfa = bpjax.rules.direct_feedback_alignment()
    feedback = float64.doubles(dfa.init(jax.random.key(1), net, variables, x))
    (_, aux), (grads, _) = zoo.learn(dfa, net, LOSS)(variables, feedback, x, y)
    error = jax.nn.softmax(aux.output) - jax.nn.one_hot(y, 3)
    once = jnp.tanh(x @ kernel)
    twice = jnp.tanh(once @ kernel)
    upper = error @ feedback['Dense_1'] * (1 - twice**2)
    lower = error @ feedback['Dense_0'] * (1 - once**2)
    self.assert_close(
        grads['Dense_0']['kernel'], (once.T @ upper + x.T @ lower) / 4, 1e-14)


class MemoryTest(parameterized.TestCase):

  def test_direct_messages_are_not_kept(self):
    x = jnp.ones((64, 32))
    net = bpjax.from_linen(bpjax.models.mlp(10, widths=(128,) * 6))
    variables = net.init(jax.random.key(0), x)
    y, sizes = jnp.arange(64) % 10, {}
    for name in ('backprop', 'direct_feedback_alignment'):
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      step = zoo.learn(rule, net).lower(variables, feedback, x, y)
      sizes[name] = step.compile().memory_analysis().temp_size_in_bytes
    self.assertLess(
        sizes['direct_feedback_alignment'], 1.1 * sizes['backprop'])


class DevicesTest(parameterized.TestCase):

  @parameterized.product(
      name=ALL, axes=('Auto', 'Explicit'), zoo_name=('plain', 'conv_batch_norm'))
  def test_eight_devices_equal_one(self, name, axes, zoo_name):
    model, x, y = zoo.inputs(zoo_name, batch=16)
    if zoo_name == 'conv_batch_norm':
      model = zoo.ConvBatchNorm(dropout=0.)
    net, variables, feedback, (_, expected) = learned(name, model, x, y)
    rule = bpjax.rules.get(name)()
    mesh = jax.make_mesh(
        (8,), ('data',), axis_types=(getattr(jax.sharding.AxisType, axes),))
    with jax.set_mesh(mesh):
      x, y = jax.device_put((x, y), jax.NamedSharding(mesh, jax.P('data')))
      variables, feedback = jax.device_put(
          (variables, feedback), jax.NamedSharding(mesh, jax.P()))
      _, got = zoo.learn(rule, net, LOSS)(
          variables, feedback, x, y, key=jax.random.key(2))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
      np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)

  @parameterized.parameters(*CREDIT)
  def test_sharded_parameters_and_feedback(self, name):
    model, x, y = zoo.Plain(widths=(8, 16), classes=8), *zoo.inputs(
        'plain', batch=8)[1:]
    net, variables, feedback, (_, expected) = learned(name, model, x, y)
    rule = bpjax.rules.get(name)()
    mesh = jax.make_mesh(
        (2, 4), ('data', 'model'),
        axis_types=(jax.sharding.AxisType.Auto,) * 2)
    columns = lambda a: jax.device_put(a, jax.NamedSharding(
        mesh, jax.P(None, 'model') if a.ndim == 2 else jax.P('model')))
    variables, feedback = jax.tree.map(columns, (variables, feedback))
    x, y = jax.device_put((x, y), jax.NamedSharding(mesh, jax.P('data')))
    _, got = zoo.learn(rule, net, LOSS)(
        variables, feedback, x, y, key=jax.random.key(2))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
      np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)


class CompositionTest(float64.Float64TestCase):

  def test_by_path_gives_each_unit_its_rule(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    fa = bpjax.rules.feedback_alignment()
    rule = bpjax.rules.by_path({
        'Dense_2': fa, '.*': bpjax.rules.backprop()})
    feedback = rule.init(jax.random.key(1), net, variables, x)
    self.assertEqual(list(feedback), ['Dense_2'])
    learn = rule.value_and_grad(net, LOSS)
    _, (grads, _) = learn(variables, feedback, x, y)
    mixed = {**feedback,
             'Dense_1': {'kernel': variables['params']['Dense_1']['kernel']}}
    _, (expected, _) = zoo.learn(fa, net, LOSS)(variables, mixed, x, y)
    self.assert_close(grads, expected, 1e-15)
    self.assertEqual(
        rule.units(net, variables, x),
        {'Dense_0': 'backprop', 'Dense_1': 'backprop',
         'Dense_2': 'feedback_alignment'})

  def test_by_path_with_shared_and_learned_feedback(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.by_path({
        'Dense_1': bpjax.rules.direct_feedback_alignment(shared=True),
        '*': bpjax.rules.kolen_pollack()})
    feedback = rule.init(jax.random.key(1), net, variables, x)
    free = rule.trainable(feedback)
    self.assertTrue(free['Dense_2']['kernel'])
    self.assertEqual(jax.tree.leaves(free['_shared']), [False])
    _, (_, feedback_grads) = zoo.learn(rule, net, LOSS)(
        variables, feedback, x, y)
    self.assertGreater(jnp.abs(feedback_grads['Dense_2']['kernel']).max(), 0)

  def test_reduction_by_path(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.backprop()
    grads = [
        zoo.learn(rule, net, LOSS, reduction=r)(variables, {}, x, y)[1][0]
        for r in ('mean', 'sum', {'Dense_0': 'sum'})]
    self.assert_close(
        grads[2], {**grads[0], 'Dense_0': grads[1]['Dense_0']}, 1e-15)
    self.assert_close(
        jax.tree.map(lambda g: 5 * g, grads[0]), grads[1], 1e-14)

  def test_owned_activation(self):

    class Block(nn.Module):

      @nn.compact
      def __call__(self, x):
        return nn.tanh(nn.LayerNorm()(nn.Dense(6)(x))) + x

    class Net(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = Block()(x)
        return nn.Dense(3)(Block()(x))

    x = jax.random.normal(jax.random.key(3), (4, 6))
    y = jnp.arange(4) % 3
    net, variables, x = float64.setup(
        Net(), x, is_unit=lambda module: isinstance(module, Block))
    self.assertEqual(list(net.units), ['Block_0', 'Block_1', 'Dense_0'])
    self.assertEqual(net.units['Block_1'].info.kind, 'Dense')
    exact = jax.grad(lambda p: LOSS(
        Net().apply({'params': p}, x), y).mean())(variables['params'])
    for rule in (bpjax.rules.backprop(), bpjax.rules.feedback_alignment()):
      feedback = rule.init(jax.random.key(1), net, variables, x)
      feedback = bpjax.paths.map_with_name(
          lambda name, _: bpjax.paths.subtree(variables['params'], name),
          feedback)
      _, (grads, _) = zoo.learn(rule, net, LOSS)(
          variables, feedback, x, y)
      self.assert_close(grads, exact, 1e-14)

  def test_optimiser_leaves_fixed_feedback_alone(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    trees = (variables['params'], feedback)
    labels = (jax.tree.map(lambda _: True, trees[0]), rule.trainable(feedback))
    tx = optax.multi_transform(
        {True: optax.adamw(1e-2, weight_decay=.1), False: optax.set_to_zero()},
        labels)
    learn = rule.value_and_grad(net, LOSS)

    @jax.jit
    def step(trees, state):
      _, grads = learn({'params': trees[0]}, trees[1], x, y)
      updates, state = tx.update(grads, state, trees)
      return optax.apply_updates(trees, updates), state

    state = tx.init(trees)
    for _ in range(20):
      trees, state = step(trees, state)
    self.assert_close(trees[1], feedback, 0)
