"""Flax NNX modules as networks, against `jax.grad` and the linen networks."""

from absl.testing import parameterized
import bpjax
from bpjax.networks import nnx as bpjax_nnx
import chex
from flax import nnx
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


class Mlp(nnx.Module):
  """Dense layers with tanh, in a list."""

  def __init__(self, rngs, sizes=(7, 6, 5, 4)):
    self.layers = nnx.List([
        nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:])])

  def __call__(self, x):
    for layer in self.layers[:-1]:
      x = nnx.tanh(layer(x))
    return self.layers[-1](x)


class ConvBatchNorm(nnx.Module):
  """Convolutions, BatchNorm, dropout; attributes not in the order of calls."""

  def __init__(self, rngs, dropout=0.):
    self.readout = nnx.Linear(24, 3, rngs=rngs)
    self.conv = nnx.List([
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)])
    self.norm = nnx.List([
        nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(self, x):
    for conv, norm in zip(self.conv, self.norm):
      x = nnx.relu(norm(conv(x)))
    x = nnx.avg_pool(x, (2, 2), (2, 2))
    return self.readout(self.dropout(x.reshape(x.shape[0], -1)))


def attention(query, key, value, **kwargs):
  """Dot-product attention in float64, too: the default one works in float32."""
  del kwargs
  logits = jnp.einsum('bqhd,bkhd->bhqk', query, key) / query.shape[-1]**.5
  return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(logits), value)


class Encoder(nnx.Module):
  """A transformer encoder over tokens, with a raw positional parameter."""

  def __init__(self, rngs, layers=1):
    # `nnx.Embed` keeps the dtype that it is built with.
    dtype = jax.dtypes.canonicalize_dtype(float)
    self.embed = nnx.Embed(11, 8, param_dtype=dtype, rngs=rngs)
    self.position = nnx.Param(.1 * jax.random.normal(rngs.params(), (6, 8)))
    blocks = range(layers)
    self.attend = nnx.List([
        nnx.MultiHeadAttention(
            2, 8, decode=False, attention_fn=attention, rngs=rngs)
        for _ in blocks])
    self.norm = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in blocks])
    self.mix = nnx.List([
        nnx.Einsum('abc,cd->abd', (8, 8), (8,), rngs=rngs) for _ in blocks])
    self.readout = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.position
    for attend, norm, mix in zip(self.attend, self.norm, self.mix):
      x = x + attend(norm(x))
      x = x + mix(nnx.gelu(x))
    return self.readout(x.mean(1))


class Remat(nnx.Module):
  """Layers whose activations are computed again on the way back."""

  def __init__(self, rngs, remat=True):
    self.first = nnx.Linear(7, 6, rngs=rngs)
    self.hidden = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
    self.last = nnx.Linear(6, 4, rngs=rngs)
    self.remat = remat

  def __call__(self, x):
    body = lambda layer, x: nnx.tanh(layer(x))
    if self.remat:
      body = nnx.remat(body)
    x = self.first(x)
    for layer in self.hidden:
      x = body(layer, x)
    return self.last(x)


def build(name, **kwargs):
  """(module, x, y) by name."""
  rngs = nnx.Rngs(0)
  key = jax.random.key(7)
  image = jax.random.normal(key, (5, 8, 8, 2))
  vector = jax.random.normal(key, (5, 7))
  tokens = jax.random.randint(key, (5, 6), 0, 11)
  x, make = {'mlp': (vector, Mlp), 'conv_batch_norm': (image, ConvBatchNorm),
             'encoder': (tokens, Encoder), 'remat': (vector, Remat)}[name]
  return make(rngs, **kwargs), x, jnp.arange(5) % 3


def setup(module, x):
  """(network, variables, inputs), in float64."""
  net = bpjax.from_nnx(module)
  x = float64.doubles(x)
  return net, float64.doubles(net.init(jax.random.key(0), x)), x


def linen_twin(variables):
  """The linen network of `Mlp`, its variables, and how its names translate."""
  layers = variables['params']['layers']
  sizes = [layer['kernel'].shape[1] for layer in layers.values()]
  net = bpjax.from_linen(zoo.Plain(widths=tuple(sizes[:-1]), classes=sizes[-1]))
  rename = lambda tree: {f'Dense_{i}': v for i, v in tree['layers'].items()}
  return net, {'params': rename(variables['params'])}, rename


def weights_as_feedback(feedback, params):
  return bpjax.paths.map_with_name(
      lambda name, _: bpjax.paths.subtree(params, name), feedback)


class ResidualMlp(nnx.Module):
  """`bpjax.models.residual_mlp` in NNX, with the names of its units."""

  def __init__(self, rngs, sizes, gap, activation):
    self.depth, self.gap = len(sizes) - 1, gap
    for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1):
      setattr(self, f'layer_{i}', bpjax.nn.NnxLayer(
          nnx.Linear(a, b, rngs=rngs), activation))
    self.readout = nnx.Linear(sizes[-1], 4, rngs=rngs)

  def __call__(self, x):
    outputs = [x]
    for i in range(1, self.depth + 1):
      skip = outputs[i - self.gap] if i % self.gap == 0 else None
      outputs.append(getattr(self, f'layer_{i}')(outputs[-1], skip))
    return self.readout(outputs[-1])


class ExactnessTest(float64.Float64TestCase):

  @parameterized.parameters('mlp', 'conv_batch_norm', 'encoder', 'remat')
  def test_feedback_alignment_with_b_equal_w_is_jax_grad(self, name):
    module, x, y = build(name)
    net, variables, x = setup(module, x)
    graphdef, *state = nnx.split(module, nnx.Param, ...)
    params, rest = float64.doubles(state)

    def mean_loss(params):
      copy = nnx.merge(graphdef, params, rest, copy=True)
      copy.train()
      return LOSS(copy(x), y).mean()

    exact = net.from_state(jax.jit(jax.grad(mean_loss))(params))['params']
    for rule in ('feedback_alignment', 'kolen_pollack'):
      rule = bpjax.rules.get(rule)()
      feedback = weights_as_feedback(
          rule.init(jax.random.key(1), net, variables, x), variables['params'])
      _, (grads, feedback_grads) = zoo.learn(rule, net)(
          variables, feedback, x, y)
      self.assert_close(grads, exact, 1e-14)
      if rule.name == 'kolen_pollack':
        self.assertNotEmpty(feedback)
        self.assert_close(
            feedback_grads, weights_as_feedback(feedback, grads), 0)

  @parameterized.parameters(
      'feedback_alignment', 'direct_feedback_alignment', 'forward_gradient')
  def test_equals_the_linen_network_of_the_same_weights(self, name):
    module, x, y = build('mlp')
    net, variables, x = setup(module, x)
    rule = bpjax.rules.get(name)()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    twin, twin_variables, rename = linen_twin(variables)
    twin_feedback = rename(feedback) if feedback else {}
    key = jax.random.key(2)
    (value, aux), (grads, _) = zoo.learn(rule, net)(
        variables, feedback, x, y, key=key)
    (expected, twin_aux), (twin_grads, _) = zoo.learn(rule, twin)(
        twin_variables, twin_feedback, x, y, key=key)
    self.assertAlmostEqual(value, expected, 12)
    self.assert_close(aux.output, twin_aux.output, 1e-14)
    self.assert_close(rename(grads), twin_grads, 1e-14)

    measure = lambda net: jax.jit(bpjax.alignment(net, LOSS, rule))
    got = measure(net)(variables, feedback, x, y, key=key)
    expected = measure(twin)(twin_variables, twin_feedback, x, y, key=key)
    for i, unit in enumerate(expected):
      for a, b in zip(got[f'layers/{i}'], expected[unit]):
        self.assertTrue(jnp.allclose(a, b, atol=1e-12, equal_nan=True), unit)

  @parameterized.parameters('direct_feedback_alignment', 'forward_gradient')
  def test_remat_changes_nothing(self, name):
    updates = []
    for remat in (True, False):
      module, x, y = build('remat', remat=remat)
      net, variables, x = setup(module, x)
      rule = bpjax.rules.get(name)()
      feedback = rule.init(jax.random.key(1), net, variables, x)
      updates.append(zoo.learn(rule, net)(
          variables, feedback, x, y, key=jax.random.key(2))[1][0])
    self.assert_close(*updates, 1e-14)

  def test_unit_with_its_nonlinearity(self):

    class Block(nnx.Module):

      def __init__(self, size, rngs):
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.linear = nnx.Linear(size, size, rngs=rngs)

      def __call__(self, x):
        return x + nnx.tanh(self.norm(self.linear(x)))

    rngs = nnx.Rngs(0)
    module = nnx.Sequential(
        nnx.Linear(7, 6, rngs=rngs), Block(6, rngs), Block(6, rngs),
        nnx.Linear(6, 4, rngs=rngs))
    _, x, y = build('mlp')
    plain, variables, x = setup(module, x)
    owned = bpjax.from_nnx(module, is_unit=lambda m: isinstance(m, Block))
    rule = bpjax.rules.backprop()
    _, (expected, _) = zoo.learn(rule, plain)(variables, {}, x, y)
    _, (grads, _) = zoo.learn(rule, owned)(variables, {}, x, y)
    self.assert_close(grads, expected, 1e-14)
    self.assertEqual(list(owned.units), [f'layers/{i}' for i in range(4)])
    self.assertEqual(owned.units.infos['layers/1'].kind, 'Linear')
    self.assertEmpty(owned.units.exact)
    self.assertLen(owned.units, 4)

  @parameterized.parameters(
      ('direct', 'tanh'), ('chain_in_gap', 'tanh'), ('meta', 'sign'))
  def test_layers_move_to_the_same_targets_as_in_linen(self, wiring, name):
    x = jax.random.normal(jax.random.key(7), (5, 6))
    model = bpjax.models.residual_mlp(4, (6,) * 4, 2, name)
    linen, variables, x = float64.setup(model, x)
    net = bpjax.from_nnx(ResidualMlp(
        nnx.Rngs(0), (6,) * 5, 2, bpjax.activations.get(name)))
    net.init(jax.random.key(0), x)
    self.assertEqual(list(net.units), list(linen.units))
    # No chain passes a skip that the unit below does not own.
    wires = {f'layer_{i}': 'output' for i in range(1, 5)}
    wires['layer_3'] = 'layer_4'
    rule = bpjax.rules.recursive_local_representation_alignment(
        wires if wiring == 'chain_in_gap' else wiring, beta=2., update='eq6',
        direct_update='eq6')
    feedback = float64.doubles(
        rule.init(jax.random.key(1), linen, variables, x))
    self.assertEqual(
        bpjax.paths.leaf_names(feedback), bpjax.paths.leaf_names(
            rule.init(jax.random.key(1), net, variables, x)))
    results = [
        zoo.learn(rule, n)(variables, feedback, x, jnp.arange(5) % 4)
        for n in (linen, net)]
    (_, expected), (_, updates) = results
    self.assert_close(updates, expected, 1e-13)
    for leaf in jax.tree.leaves(updates[0]):
      self.assertGreater(jnp.abs(leaf).max(), 0)


class NetworkTest(parameterized.TestCase):

  @parameterized.parameters(*zoo.BARE)
  def test_contract(self, name):
    bpjax.testing.check_rule(
        bpjax.rules.get(name)(),
        net=bpjax.from_nnx(Mlp(nnx.Rngs(0), (8, 16, 12, 3))))

  def test_units_in_the_order_of_the_calls(self):
    module, x, _ = build('conv_batch_norm')
    net = bpjax.from_nnx(module)
    variables = net.init(jax.random.key(0), x)
    self.assertEqual(list(net.units), ['conv/0', 'conv/1', 'readout'])
    self.assertContainsSubset(
        ('norm/0/scale', 'norm/1/bias'), net.units.exact)
    infos = net.units.infos
    self.assertTrue(infos['readout'].is_output)
    self.assertFalse(infos['conv/0'].sends)
    self.assertTrue(infos['conv/1'].sends)
    self.assertEqual(
        list(net.survey(variables, x).batch_coupled), ['norm/0', 'norm/1'])

  def test_attention_projections_are_units(self):
    module, x, _ = build('encoder')
    net = bpjax.from_nnx(module)
    net.init(jax.random.key(0), x)
    self.assertSameElements(net.units, [
        'embed', 'attend/0/query', 'attend/0/key', 'attend/0/value',
        'attend/0/out', 'mix/0', 'readout'])
    self.assertEqual(net.units.infos['attend/0/out'].feature_axes, 2)
    self.assertIn('position', net.units.exact)

  @parameterized.parameters(
      'direct_feedback_alignment', 'forward_gradient', 'weight_mirror')
  def test_batch_statistics_and_dropout_pass_through(self, name):
    module, x, y = build('conv_batch_norm', dropout=.3)
    before = nnx.state(module)
    net = bpjax.from_nnx(module)
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = zoo.learn(rule, net)
    outputs = []
    for key in (2, 2, 3):
      (_, aux), _ = learn(variables, feedback, x, y, key=jax.random.key(key))
      outputs.append(aux.output)
    self.assertTrue(jnp.array_equal(outputs[0], outputs[1]))
    self.assertFalse(jnp.array_equal(outputs[0], outputs[2]))
    expected = nnx.clone(module)
    expected.train()
    expected(x)
    for a, b in zip(
        jax.tree.leaves(net.to_state(aux.model_state)),
        jax.tree.leaves(nnx.state(expected, nnx.BatchStat)), strict=True):
      self.assertTrue(jnp.allclose(a, b, atol=1e-6))
    expected = nnx.clone(module)
    expected.eval()
    self.assertTrue(
        jnp.allclose(rule.predict(net)(variables, x), expected(x), atol=1e-6))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(module)),
                    strict=True):
      self.assertTrue(jnp.array_equal(a, b))  # The module is as it was.

  def test_vmap_over_seeds(self):
    module, x, y = build('mlp')
    net = bpjax.from_nnx(module)
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.direct_feedback_alignment()
    learn = rule.value_and_grad(net, LOSS)

    def one(seed):
      key = jax.random.key(seed)
      feedback = rule.init(key, net, variables, x)
      return learn(variables, feedback, x, y, key=key)[1]

    batched = jax.jit(jax.vmap(one))(jnp.arange(3))
    single = jax.jit(one)(2)
    for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single)):
      self.assertLess(jnp.abs(a[2] - b).max(), 1e-5)

  def test_module_called_twice_is_one_unit(self):

    class Twice(nnx.Module):

      def __init__(self, rngs):
        self.first = nnx.Linear(7, 7, rngs=rngs)
        self.again = self.first

      def __call__(self, x):
        return self.again(nnx.tanh(self.first(x)))

    _, x, y = build('mlp')
    net = bpjax.from_nnx(Twice(nnx.Rngs(0)))
    variables = net.init(jax.random.key(0), x)
    name, = net.units
    self.assertEqual(net.units.infos[name].calls, 2)
    _, (grads, _) = zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, y)

    def mean_loss(kernel, bias):
      apply = lambda x: x @ kernel + bias
      return LOSS(apply(jnp.tanh(apply(x))), y).mean()

    own = variables['params'][name]
    exact = jax.jit(jax.grad(mean_loss))(own['kernel'], own['bias'])
    self.assertLess(jnp.abs(grads[name]['kernel'] - exact).max(), 1e-6)
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y)
    self.assertGreater(jnp.abs(grads[name]['kernel'] - exact).max(), 1e-6)


class Learner(nnx.Module):
  """A module and the feedback that is trained with it."""

  def __init__(self, module, feedback):
    self.module = module
    self.feedback = nnx.data(feedback)


class StateTest(parameterized.TestCase):

  def test_to_state_and_back(self):
    module, x, _ = build('conv_batch_norm', dropout=.3)
    net = bpjax.from_nnx(module)
    variables = net.init(jax.random.key(0), x)
    self.assertEqual(set(variables), {'params', 'batch_stats'})
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    for tree in (variables, {'params': {}, 'feedback': feedback}):
      back = net.from_state(net.to_state(tree))
      self.assertTrue(jax.tree.all(jax.tree.map(jnp.array_equal, back, tree)))
    with self.assertRaisesRegex(ValueError, 'make two states'):
      net.to_state({**variables, 'feedback': feedback})
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    merged = nnx.merge(
        graphdef, net.to_state({'params': variables['params']}), rest)
    self.assertEqual(nnx.graphdef(merged), graphdef)
    kinds = lambda tree: {
        type(leaf) for _, leaf in nnx.to_flat_state(net.to_state(tree))}
    self.assertEqual(kinds(variables), {nnx.Param, nnx.BatchStat})
    self.assertEqual(kinds({'feedback': feedback}), {bpjax_nnx.Feedback})
    self.assertEqual(
        jax.tree.structure(params),
        jax.tree.structure(net.to_state({'params': variables['params']})))

  def test_trains_with_nnx_optimizer(self):
    module, x, y = build('conv_batch_norm', dropout=.1)
    net = bpjax.from_nnx(module)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(
        jax.random.key(1), net, net.init(jax.random.key(0), x), x)
    learn = rule.value_and_grad(net, LOSS)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, feedback, x, y, key):
      variables = net.from_state(nnx.state(module))
      (value, aux), (grads, _) = learn(variables, feedback, x, y, key=key)
      optimizer.update(module, net.to_state({'params': grads}))
      nnx.update(module, net.to_state(aux.model_state))
      return value

    values = [float(step(module, optimizer, feedback, x, y, jax.random.key(i)))
              for i in range(40)]
    self.assertLess(values[-1], .5 * values[0])
    self.assertGreater(jnp.abs(module.norm[0].mean[...]).max(), .01)
    variables = net.init(jax.random.key(0), x)  # What the module holds now.
    module.eval()
    self.assertTrue(jnp.allclose(net.apply(variables, x), module(x), atol=1e-5))

  def test_one_optimizer_for_weights_and_feedback(self):
    module, x, y = build('mlp')
    net = bpjax.from_nnx(module)
    rule = bpjax.rules.kolen_pollack()
    variables = net.init(jax.random.key(0), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learner = Learner(module, net.to_state({'feedback': feedback}))
    learn = rule.value_and_grad(net, LOSS)
    wrt = nnx.Any(nnx.Param, bpjax_nnx.Feedback)
    optimizer = nnx.Optimizer(
        learner, optax.adamw(1e-2, weight_decay=1.), wrt=wrt)

    @nnx.jit
    def step(learner, optimizer, x, y):
      variables = net.from_state(nnx.state(learner.module))
      feedback = net.from_state(learner.feedback)['feedback']
      (value, _), (grads, feedback_grads) = learn(variables, feedback, x, y)
      optimizer.update(learner, nnx.State({
          'module': net.to_state({'params': grads}),
          'feedback': net.to_state({'feedback': feedback_grads})}))
      return value

    def difference():
      params = net.from_state(nnx.state(learner.module))['params']
      feedback = net.from_state(learner.feedback)['feedback']
      return jax.tree.map(
          jnp.subtract, weights_as_feedback(feedback, params), feedback)

    before = difference()
    for _ in range(30):
      step(learner, optimizer, x, y)
    for a, b in zip(jax.tree.leaves(difference()), jax.tree.leaves(before)):
      self.assertLess(jnp.abs(a - .99**30 * b).max(), 1e-5)


class RefusalTest(parameterized.TestCase):

  def stack(self, how):

    class Stack(nnx.Module):

      def __init__(self, rngs):
        make = lambda rngs: nnx.Linear(7, 7, rngs=rngs)
        if how == 'scan':
          make = nnx.split_rngs(splits=2)(nnx.vmap(make))
        self.layer = make(rngs)

      def __call__(self, x):
        body = lambda layer, x: nnx.tanh(layer(x))
        if how == 'scan':
          body = nnx.scan(
              lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0),
              out_axes=nnx.Carry)
          return body(x, self.layer)
        if how == 'vmap':
          return nnx.vmap(body, in_axes=(None, 0))(self.layer, x)
        if how == 'cond':
          return nnx.cond(True, body, body, self.layer, x)
        return nnx.jit(body)(self.layer, x)

    return Stack(nnx.Rngs(0))

  @parameterized.parameters('scan', 'vmap', 'cond', 'jit')
  def test_units_inside_transforms(self, how):
    module = self.stack(how)
    net = bpjax.from_nnx(module)
    x, y = jax.random.normal(jax.random.key(2), (5, 7)), jnp.arange(5)
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    self.assertEqual(list(net.units), ['layer'])
    self.assertEmpty(net.units.exact)
    same = weights_as_feedback(feedback, variables['params'])
    _, (grads, _) = zoo.learn(rule, net)(variables, same, x, y)

    def loss(params):
      graph, _ = nnx.split(module)
      model = nnx.merge(graph, net.to_state({'params': params}))
      return LOSS(model(x), y).mean()

    expected = jax.grad(loss)(variables['params'])
    chex.assert_trees_all_close(grads, expected, atol=1e-6)

  def test_modules(self):
    with self.assertRaisesRegex(ValueError, '`from_linen`'):
      bpjax.from_nnx(nn.Dense(3))
    module, x, _ = build('conv_batch_norm')
    net = bpjax.from_nnx(
        module, is_unit=lambda m: isinstance(m, nnx.BatchNorm))
    with self.assertRaisesRegex(ValueError, 'calls 0 affine operations'):
      net.init(jax.random.key(0), x)

  def test_tied_weights(self):
    rngs = nnx.Rngs(0)
    tied = Mlp(rngs, (4, 4, 4))
    tied.layers[1].kernel = tied.layers[0].kernel
    net = bpjax.from_nnx(tied)
    x, y = jax.random.normal(jax.random.key(2), (5, 7)), jnp.zeros(5, int)
    x = x[:, :tied.layers[0].kernel.shape[0]]
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    same = weights_as_feedback(feedback, variables['params'])
    _, (grads, _) = zoo.learn(rule, net)(variables, same, x, y)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net)(
        variables, {}, x, y)
    chex.assert_trees_all_close(grads, exact, atol=1e-6)
    self.assertNotIn('layers/1/kernel', bpjax.paths.leaf_names(exact))

  def test_unit_with_two_affine_operations(self):
    module, x, _ = build('mlp')
    net = bpjax.from_nnx(module, is_unit=lambda m: m is module)
    with self.assertRaisesRegex(ValueError, 'calls 3 affine operations'):
      net.init(jax.random.key(0), x)

  def test_variables(self):
    module, x, y = build('conv_batch_norm', dropout=.3)
    net = bpjax.from_nnx(module)
    with self.assertRaisesRegex(ValueError, 'call `net.init'):
      _ = net.units
    variables = net.init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'lacks .* in `batch_stats`'):
      net.apply({'params': variables['params']}, x)
    with self.assertRaisesRegex(ValueError, '`state` has `layers/0/bias`'):
      net.from_state(nnx.state(build('mlp')[0]))
    with self.assertRaisesRegex(ValueError, '`Dense_0/kernel` in `params`'):
      net.to_state({'params': {'Dense_0': {'kernel': jnp.ones(3)}}})
    learn = bpjax.rules.backprop().value_and_grad(net, LOSS)
    with self.assertRaisesRegex(
        ValueError, 'draws random numbers .*`default`.*jax.random.key'):
      learn(variables, {}, x, y)
    rule = bpjax.rules.sign_symmetry('brSF')
    module, x, y = build('mlp')
    net = bpjax.from_nnx(module)
    variables = net.init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'at unit `layers/0`; pass'):
      rule.value_and_grad(net, LOSS)(variables, {}, x, y)


if __name__ == '__main__':
  pytest.main([__file__])
