"""Direct difference target propagation against numpy, and its fixed point."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import reference
import reference_targets
from tests import float64
from tests import zoo

_RULE = bpjax.rules.direct_difference_target_propagation
_LOSS = bpjax.losses.softmax_cross_entropy


class Linear(nn.Module):
  """Three linear layers that narrow."""

  @nn.compact
  def __call__(self, x):
    for width in (6, 5, 3):
      x = nn.Dense(width, use_bias=False)(x)
    return x


class Pooled(nn.Module):
  """A convolution with mean pooling, and two dense layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.avg_pool(nn.tanh(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.tanh(nn.Dense(6)(x.reshape(x.shape[0], -1)))
    return nn.Dense(4)(x)


class Padded(nn.Module):
  """Dense layers token by token; the readout sees hidden positions, too."""

  @nn.compact
  def __call__(self, x, mask):
    for width in (6, 5):
      x = nn.tanh(nn.Dense(width)(x))
    return nn.Dense(4)(x.mean(1) + 0 * mask.sum(1, keepdims=True))


class Probabilities(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.softmax(zoo.Plain(name='inner')(x))


def noise_of(key, unit, shape):
  """The noise in the input of the `unit`-th unit, counted from 0."""
  own = jax.random.fold_in(jax.random.split(key)[1], unit)
  return np.asarray(jax.random.normal(
      jax.random.split(own, 1)[0], shape, jnp.float64))


class ReferenceTest(float64.Float64TestCase):

  def setup(self, model, x, **arguments):
    net, variables, x = float64.setup(model, x)
    rule = _RULE(**arguments)
    feedback = float64.doubles(rule.init(jax.random.key(3), net, variables, x))
    y = jnp.arange(len(jax.tree.leaves(x)[0])) % 4
    return rule, net, variables, feedback, x, y

  @parameterized.parameters('logits', 'probabilities')
  def test_updates(self, kind):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    rule, net, variables, feedback, x, y = self.setup(
        zoo.Plain() if kind == 'logits' else Probabilities(), x, step=.3,
        sigma=.2, decay=.05)
    loss = _LOSS if kind == 'logits' else (
        lambda p, y: -jnp.log(jnp.take_along_axis(p, y[:, None], 1)[:, 0]))
    key = jax.random.key(8)
    _, (grads, own) = zoo.learn(rule, net, loss, reduction='sum')(
        variables, feedback, x, y, key=key)
    params = variables['params']
    if kind == 'probabilities':
      params, grads, own, feedback = (
          tree['inner'] for tree in (params, grads, own, feedback))
    names = ['Dense_0', 'Dense_1', 'Dense_2']
    expected = reference_targets.direct_difference_target_propagation(
        [jax.tree.map(np.asarray, params[n]) for n in names],
        {l: np.asarray(feedback[names[l]]).T for l in (1, 2)}, x, y,
        {1: noise_of(key, 1, (5, 6)), 2: noise_of(key, 2, (5, 5))},
        step=.3, sigma=.2, decay=.05)
    self.assert_close([grads[n] for n in names], expected.updates, 1e-10)
    for l in (1, 2):
      np.testing.assert_allclose(
          own[names[l]].T, expected.feedback_updates[l], atol=1e-10)

  def test_a_convolution_that_pools(self):
    x = jax.random.normal(jax.random.key(0), (5, 4, 6, 2))
    rule, net, variables, feedback, x, y = self.setup(
        Pooled(), x, step=.3, sigma=.2, decay=.05)
    key = jax.random.key(8)
    _, (grads, own) = zoo.learn(rule, net)(variables, feedback, x, y, key=key)

    conv, first, last = (jax.tree.map(np.asarray, variables['params'][name])
                         for name in ('Conv_0', 'Dense_0', 'Dense_1'))
    read_out = lambda h: h @ last['kernel'] + last['bias']
    dense = lambda h: np.tanh(h @ first['kernel'] + first['bias'])
    a = reference.conv2d_same(x, conv['kernel']) + conv['bias']
    # [n, row, row in the window, column, column in it, channel].
    windows = np.tanh(a).reshape(5, 2, 2, 3, 2, 3)
    h1 = windows.mean((2, 4)).reshape(5, -1)
    h2 = dense(h1)
    e = reference.loss_and_error(read_out(h2), np.asarray(y))[1]
    q1 = np.asarray(feedback['Dense_0']).reshape(4, 18).T
    q2 = np.asarray(feedback['Dense_1']).T
    back = 2 * .3 * (e @ q1.T).reshape(5, 2, 1, 3, 1, 3) / 4
    delta = (back * (1 - windows**2)).reshape(a.shape)
    np.testing.assert_allclose(
        grads['Conv_0']['kernel'], reference.conv2d_same_vjp_kernel(
            delta, x, conv['kernel'].shape) / 5, atol=1e-10)
    np.testing.assert_allclose(
        grads['Dense_0']['kernel'],
        h1.T @ (2 * .3 * (e @ q2.T) * (1 - h2**2)) / 5, atol=1e-10)
    for name, q, unit, h, through in (
        ('Dense_0', q1, 1, h1, lambda h: read_out(dense(h))),
        ('Dense_1', q2, 2, h2, read_out)):
      noise = noise_of(key, unit, h.shape)
      change = (through(h + .2 * noise) - read_out(h2)) / .2
      expected = 2 * (change @ q.T - noise).T @ change / 5 + 2 * .05 * q
      np.testing.assert_allclose(
          own[name].reshape(4, -1).T, expected, atol=1e-10)

  def test_no_noise_is_the_limit_of_little(self):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    results = []
    for sigma in (1e-5, 0.):
      rule, net, variables, feedback, x, y = self.setup(
          zoo.Plain(), x, sigma=sigma)
      results.append(zoo.learn(rule, net)(
          variables, feedback, x, y, key=jax.random.key(8))[1])
    self.assert_close(*results, 1e-3)

  def test_turns_of_a_loop_are_layers(self):
    x = jax.random.normal(jax.random.key(0), (5, 7))
    rule, net, variables, feedback, x, y = self.setup(zoo.Stack('scan'), x)
    rows = feedback['layers']['Dense_0']
    self.assertEqual(rows.shape, (3, 4, 6))
    own = zoo.learn(rule, net)(
        variables, feedback, x, y, key=jax.random.key(8))[1][1]
    kernel, bias = (np.asarray(variables['params']['layers']['Dense_0'][k])
                    for k in ('kernel', 'bias'))
    ends = [jax.tree.map(np.asarray, variables['params'][n])
            for n in ('Dense_0', 'Dense_1')]
    keys = jax.random.split(jax.random.fold_in(
        jax.random.split(jax.random.key(8))[1], 1), 3)

    def output(moved=None, noise=0.):
      h = np.asarray(x) @ ends[0]['kernel'] + ends[0]['bias']
      for turn in range(3):
        h = np.tanh((h + noise * (turn == moved)) @ kernel[turn] + bias[turn])
      return h @ ends[1]['kernel'] + ends[1]['bias']

    for turn in range(3):
      noise = np.asarray(jax.random.normal(keys[turn], (5, 6), jnp.float64))
      change = (output(turn, .1 * noise) - output()) / .1
      q = np.asarray(rows[turn]).T
      np.testing.assert_allclose(
          own['layers']['Dense_0'][turn].T,
          2 * (change @ q.T - noise).T @ change / 5 + 2 * .1 * q, atol=1e-10)

  def test_hidden_positions_have_no_noise(self):
    x = jax.random.normal(jax.random.key(0), (5, 3, 7))
    mask = jnp.arange(3)[None] < jnp.array([3, 2, 1, 2, 3])[:, None]
    rule, net, variables, feedback, given, y = self.setup(
        Padded(), bpjax.Inputs(x, mask=mask), sigma=.2, decay=0.)
    x = np.asarray(given.args[0])
    key = jax.random.key(8)
    own = zoo.learn(rule, net)(variables, feedback, given, y, key=key)[1][1]
    layers = [jax.tree.map(np.asarray, variables['params'][f'Dense_{i}'])
              for i in range(3)]
    affine = lambda p, h: h @ p['kernel'] + p['bias']
    real, count = np.asarray(mask)[:, :, None], np.asarray(mask).sum(1)
    h1 = np.tanh(affine(layers[0], x))
    through = lambda h: affine(
        layers[2], np.tanh(affine(layers[1], h)).mean(1))
    noise = noise_of(key, 1, h1.shape) * real
    change = (through(h1 + .2 * noise) - through(h1)) / .2
    # One projection for all real positions, by the root of their number.
    spread = real / np.sqrt(count)[:, None, None]
    rebuilt = (change @ np.asarray(feedback['Dense_1']))[:, None] * spread
    expected = 2 * np.einsum(
        'nc,ntd->cd', change, (rebuilt - noise) * spread) / 5
    np.testing.assert_allclose(own['Dense_1'], expected, atol=1e-10)


class FixedPointTest(float64.Float64TestCase):
  """On a linear network the loss is quadratic in Q.

  With noise of second moment S = E[eps eps^T] = I and h_L^c - h_L = sigma J eps,
  E|Q J eps - eps|^2 + decay |Q|^2 = |Q J - I|^2 + decay |Q|^2, which is least at
  Q (J J^T + decay I) = J^T: lambda' is `decay` itself, whatever sigma is.
  """

  def setup(self, batch, decay):
    x = jax.random.normal(jax.random.key(0), (batch, 7))
    net, variables, x = float64.setup(Linear(), x)
    rule = _RULE(step=.2, sigma=.7, decay=decay)
    feedback = float64.doubles(rule.init(jax.random.key(3), net, variables, x))
    kernels = [np.asarray(variables['params'][f'Dense_{i}']['kernel'])
               for i in (1, 2)]
    jacobians = {'Dense_1': (kernels[0] @ kernels[1]).T, 'Dense_2': kernels[1].T}
    y = jax.random.normal(jax.random.key(4), (batch, 3), jnp.float64)
    learn = rule.value_and_grad(
        net, bpjax.losses.squared_error, reduction='mean')
    return learn, variables, feedback, x, y, jacobians

  def descend(self, learn, variables, feedback, x, y, keys, rates):
    def step(feedback, turn):
      key, rate = turn
      own = learn(variables, feedback, x, y, key=key)[1][1]
      return jax.tree.map(lambda q, g: q - rate * g, feedback, own), None

    return jax.jit(lambda f: jax.lax.scan(step, f, (keys, rates))[0])(feedback)

  @parameterized.parameters(.1, 1.)
  def test_the_feedback_is_a_damped_pseudo_inverse(self, decay):
    learn, variables, feedback, x, y, jacobians = self.setup(20, decay)
    key = jax.random.key(8)  # The same noise at every step: S is known exactly.
    feedback = self.descend(
        learn, variables, feedback, x, y, jnp.stack([key] * 2000),
        jnp.full(2000, .05))
    for unit, (name, j) in enumerate(jacobians.items(), 1):
      eps = noise_of(key, unit, (20, j.shape[1]))
      s = eps.T @ eps / 20
      expected = s @ j.T @ np.linalg.inv(j @ s @ j.T + decay * np.eye(3))
      np.testing.assert_allclose(feedback[name].T, expected, atol=1e-8)

  def test_its_targets_are_gauss_newton(self):
    decay = .3
    learn, variables, feedback, x, y, jacobians = self.setup(400, decay)
    turns = 600
    feedback = self.descend(
        learn, variables, feedback, x, y,
        jax.random.split(jax.random.key(8), turns),
        .2 / (1 + jnp.arange(turns) / 10))
    (_, aux), (grads, _) = jax.jit(learn)(
        variables, feedback, x, y, key=jax.random.key(9))
    e = np.asarray(aux.output - y)
    below = np.asarray(x)
    for i, (name, j) in enumerate(jacobians.items()):
      # The targets' step by Gauss and Newton, damped as Levenberg does.
      moved = .2 * e @ j @ np.linalg.inv(j.T @ j + decay * np.eye(j.shape[1]))
      expected = below.T @ (2 * moved) / len(x)
      got = np.asarray(grads[f'Dense_{i}']['kernel'])
      self.assertLess(
          np.linalg.norm(got - expected) / np.linalg.norm(expected), .01, name)
      plain = below.T @ (e @ j) / len(x)  # The gradient is something else.
      self.assertLess(bpjax.feedback.cosine(got, plain), .98, name)
      below = below @ np.asarray(variables['params'][f'Dense_{i}']['kernel'])


class RefusalsTest(parameterized.TestCase):

  def test_what_it_cannot_train(self):

    class Shared(nn.Module):

      @nn.compact
      def __call__(self, x):
        layer = nn.Dense(4)
        return nn.Dense(3)(layer(nn.tanh(layer(x))))

    x = jnp.ones((2, 4))
    net = bpjax.from_linen(Shared())
    variables = net.init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'is called 2 times'):
      _RULE().init(jax.random.key(0), net, variables, x)
    with self.assertRaisesRegex(ValueError, '`by_path` combines'):
      bpjax.rules.by_path({'*': _RULE()})
    net = bpjax.from_linen(zoo.Plain())
    variables = net.init(jax.random.key(0), x)
    feedback = _RULE().init(jax.random.key(0), net, variables, x)
    with self.assertRaisesRegex(ValueError, '`key` is needed'):
      _RULE().value_and_grad(net, _LOSS)(
          variables, feedback, x, jnp.zeros(2, int))

  @parameterized.parameters('step', 'sigma', 'decay', 'scale')
  def test_wrong_arguments(self, name):
    with self.assertRaisesRegex(ValueError, f'`{name}` must be'):
      _RULE(**{name: -1.})


if __name__ == '__main__':
  absltest.main()
