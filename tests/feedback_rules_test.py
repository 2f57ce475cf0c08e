"""Sign symmetry and weight mirror: identities, numpy references, fixed points."""

from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import reference
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


def conv_net():
  return nn.Sequential([
      nn.Conv(3, (3, 3)), nn.tanh,
      nn.Conv(4, (3, 3)), nn.tanh,
      lambda h: h.reshape(h.shape[0], -1), nn.Dense(5)])


class SignSymmetryTest(float64.Float64TestCase):

  @parameterized.product(
      variant=('uSF', 'frSF'), net=('dense', 'conv'), zero_sign=(0, 1))
  def test_equals_feedback_alignment_with_the_signs_in_numpy(
      self, variant, net, zero_sign):
    if net == 'dense':
      model, run = zoo.Plain(), reference.feedback_alignment
      x = jax.random.normal(jax.random.key(3), (5, 7))
    else:
      model, run = conv_net(), reference.conv_net_feedback_alignment
      x = jax.random.normal(jax.random.key(3), (4, 5, 6, 2))
    y = jnp.arange(len(x)) % 4
    network, variables, x = float64.setup(model, x)
    rule = bpjax.rules.sign_symmetry(variant, zero_sign=zero_sign)
    feedback = float64.doubles(
        rule.init(jax.random.key(1), network, variables, x))
    if variant == 'uSF':
      self.assertEqual(feedback, {})
    _, (grads, _) = zoo.learn(rule, network)(variables, feedback, x, y)

    params = jax.tree.map(np.asarray, variables['params'])
    stands_in = {}
    for name in list(network.units)[1:]:
      kernel = params[name]['kernel']
      signs = np.where(kernel == 0, zero_sign, np.sign(kernel))
      if variant == 'uSF':  # Glorot: fan-in + fan-out, receptive field included.
        field = int(np.prod(kernel.shape[:-2]))
        fans = field * (kernel.shape[-2] + kernel.shape[-1])
        magnitude = np.sqrt(2 / fans)
      else:
        magnitude = np.asarray(feedback[name]['kernel'])
        self.assertGreaterEqual(magnitude.min(), 0)
      stands_in[name] = {'kernel': magnitude * signs}
    expected = run(
        params, stands_in, np.asarray(x), np.asarray(y), 'tanh',
        'cross_entropy') if net == 'dense' else run(
            params, stands_in, np.asarray(x), np.asarray(y))
    self.assert_close(grads, expected, 1e-14)

  def test_equals_backprop_where_all_weights_have_that_magnitude(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    params = {
        name: {'kernel': np.sqrt(2 / sum(unit['kernel'].shape))
                         * jnp.sign(unit['kernel']), 'bias': unit['bias']}
        for name, unit in variables['params'].items()}
    _, (grads, _) = zoo.learn(bpjax.rules.sign_symmetry(), net)(
        {'params': params}, {}, x, y)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net)(
        {'params': params}, {}, x, y)
    self.assert_close(grads, exact, 1e-15)

  def test_fixed_magnitudes_of_the_weights_are_backprop(self):
    model, x, y = zoo.inputs('residual')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.sign_symmetry('frSF')
    feedback = rule.init(jax.random.key(1), net, variables, x)
    feedback = bpjax.paths.map_with_name(
        lambda name, _: jnp.abs(
            bpjax.paths.subtree(variables['params'], name)), feedback)
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net)(
        variables, {}, x, y)
    self.assert_close(grads, exact, 1e-14)

  def test_batchwise_magnitudes_change_with_the_key_and_keep_the_signs(self):
    # One linear unit above: its message is e B^T, so B is read off the update.
    model = nn.Sequential([nn.Dense(3, use_bias=False),
                           nn.Dense(3, use_bias=False)])
    x, y = jnp.eye(3), jnp.eye(3)
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.sign_symmetry('brSF')
    loss = lambda out, error: jnp.sum(out * error, axis=1)
    learn = zoo.learn(rule, net, loss, reduction='sum')
    seen = [
        updates['layers_0']['kernel'].T for updates in (
            learn(variables, {}, x, y, key=jax.random.key(i))[1][0]
            for i in range(3))]  # x = e = 1: the update below is B^T.
    kernel = variables['params']['layers_1']['kernel']
    for feedback in seen:
      self.assertTrue(jnp.array_equal(jnp.sign(feedback), jnp.sign(kernel)))
    self.assertGreater(jnp.abs(seen[0] - seen[1]).max(), .01)

  def test_zero_weights(self):

    class Zero(nn.Module):

      @nn.compact
      def __call__(self, x):
        h = nn.tanh(nn.Dense(5)(x))
        return nn.Dense(4, kernel_init=nn.initializers.zeros)(h)

    x = jax.random.normal(jax.random.key(3), (4, 7))
    net, variables, x = float64.setup(Zero(), x)
    for zero_sign, moves in ((0, False), (1, True)):
      rule = bpjax.rules.sign_symmetry(zero_sign=zero_sign)
      _, (grads, _) = zoo.learn(rule, net)(variables, {}, x, jnp.arange(4))
      self.assertEqual(bool(jnp.any(grads['Dense_0']['kernel'])), moves)

  def test_arguments(self):
    for name, value in (('variant', 'usf'), ('scale', 0), ('zero_sign', 2)):
      with self.assertRaisesRegex(ValueError, f'`{name}` must be'):
        bpjax.rules.sign_symmetry(**{name: value})


class WeightMirrorTest(float64.Float64TestCase):

  def mirrored(self, model, x, steps, **arguments):
    """(rule, net, variables, feedback) after mirror-only steps, W frozen."""
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.weight_mirror(**arguments)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = rule.value_and_grad(net, LOSS)
    y = jnp.zeros(len(x), int)

    def step(feedback, key):
      _, (_, update) = learn(variables, feedback, x, y, key=key)
      return jax.tree.map(jnp.subtract, feedback, update), None

    keys = jax.random.split(jax.random.key(2), steps)
    feedback, _ = jax.jit(lambda f: jax.lax.scan(step, f, keys))(feedback)
    return net, variables['params'], feedback

  def assert_mirrors(self, params, feedback, ratio, cosine):
    for name in bpjax.paths.leaf_names(feedback):
      own = bpjax.paths.subtree(params, name)
      learned = bpjax.paths.subtree(feedback, name)
      along = jnp.vdot(own, learned)
      norms = jnp.linalg.norm(own.ravel()), jnp.linalg.norm(learned.ravel())
      self.assertGreater(along / norms[0] / norms[1], cosine, name)
      self.assertBetween(norms[1] / norms[0] / ratio, .98, 1.02, name)

  def test_fixed_point_of_dense_layers(self):
    x = jnp.ones((3, 7))
    _, params, feedback = self.mirrored(
        zoo.Plain(), x, 2500, rate=.01, decay=.005, sigma=.8, samples=128)
    self.assert_mirrors(params, feedback, .01 * .8**2 / .005, .999)

  def test_relu_without_bias_has_half_the_gain(self):
    x = jnp.ones((3, 7))
    _, params, feedback = self.mirrored(
        zoo.Plain(), x, 2500, activation='relu', rate=.005, decay=.005)
    self.assert_mirrors(params, feedback, .5, .998)

  def test_convolutions_tap_by_tap(self):
    x = jnp.ones((2, 5, 5, 2))
    model = nn.Sequential([
        nn.Conv(4, (3, 3)), nn.tanh,
        nn.Conv(4, (3, 3), strides=2, feature_group_count=2), nn.tanh,
        lambda h: h.reshape(h.shape[0], -1), nn.Dense(3)])
    _, params, feedback = self.mirrored(model, x, 1500, samples=64)
    self.assert_mirrors(params, feedback, 1., .99)

  def test_attention_projections(self):
    model, tokens, _ = zoo.inputs('encoder')
    _, params, feedback = self.mirrored(model, tokens, 800, samples=64)
    self.assertIn('query', feedback['MultiHeadDotProductAttention_0'])
    self.assert_mirrors(params, feedback, 1., .99)

  def test_one_step_against_numpy_and_no_dependence_on_the_data(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.weight_mirror(samples=4, sigma=.5)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = zoo.learn(rule, net)
    key = jax.random.key(3)
    _, (grads, updates) = learn(variables, feedback, x, y, key=key)
    _, (_, again) = learn(variables, feedback, -3 * x, y[::-1], key=key)
    self.assert_close(updates, again, 1e-15)
    fa = bpjax.rules.feedback_alignment()
    _, (engaged, _) = zoo.learn(fa, net)(variables, feedback, x, y)
    self.assert_close(grads, engaged, 1e-15)
    total = zoo.learn(rule, net, reduction='sum')(
        variables, feedback, x, y, key=key)[1][1]
    self.assert_close(total, updates, 1e-15)

  def test_one_unit_against_numpy(self):
    model, x, _ = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.weight_mirror(samples=6, sigma=.5, rate=.3, decay=.1)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    unit, params = net.units['Dense_1'], variables['params']['Dense_1']
    inputs = (jnp.ones((5, 6)),)
    pre = unit.affine(params, inputs)
    credit = rule.backward(
        unit, params, feedback['Dense_1'],
        bpjax.Activations(inputs, pre, unit.activation(params, pre, inputs)),
        bpjax.Signal(jnp.zeros_like(pre), None, jax.random.key(4), 5))
    noise = .5 * np.asarray(jax.random.normal(
        jax.random.split(jax.random.key(4), 1)[0], (6, 6), jnp.float64))
    weights = np.asarray(variables['params']['Dense_1']['kernel'])
    expected = .1 * np.asarray(feedback['Dense_1']['kernel']) - (
        .3 * noise.T @ (noise @ weights) / 6)
    np.testing.assert_allclose(
        credit.feedback['kernel'] / 5, expected, atol=1e-14)

  def test_one_convolution_against_numpy(self):
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.tanh, nn.Conv(3, (3, 3))])
    net, variables, x = float64.setup(model, jnp.ones((5, 4, 6, 2)))
    rule = bpjax.rules.weight_mirror(samples=3, sigma=.5, rate=.3, decay=.1)
    feedback = rule.init(jax.random.key(1), net, variables, x)['layers_2']
    unit, params = net.units['layers_2'], variables['params']['layers_2']
    inputs = (jnp.ones((5, 4, 6, 4)),)
    pre = unit.affine(params, inputs)
    credit = rule.backward(
        unit, params, feedback, bpjax.Activations(inputs, pre, pre),
        bpjax.Signal(jnp.zeros_like(pre), None, jax.random.key(4), 7))
    noise = .5 * np.asarray(jax.random.normal(
        jax.random.split(jax.random.key(4), 1)[0], (3, 4, 6, 4), jnp.float64))
    kernel = np.asarray(params['kernel'])
    echo = reference.conv2d_same(noise, kernel)
    correlation = reference.conv2d_same_vjp_kernel(echo, noise, kernel.shape)
    # A tap beside the middle misses a row or a column of positions.
    rows, columns = np.array([3, 4, 3]), np.array([5, 6, 5])
    positions = (rows[:, None] * columns)[:, :, None, None]
    expected = .1 * np.asarray(feedback['kernel']) - (
        .3 * correlation / (3 * positions))
    np.testing.assert_allclose(
        credit.feedback['kernel'] / 7, expected, atol=1e-14)

  def test_arguments(self):
    for name, value in (
        ('rate', 0), ('decay', 1.), ('sigma', -1), ('samples', 0),
        ('noise', 'cauchy'), ('activation', 'rleu'), ('scale', 0)):
      with self.assertRaisesRegex(ValueError, f'`{name}` must be'):
        bpjax.rules.weight_mirror(**{name: value})
