"""Forms in which public models keep their parameters and their examples."""

import warnings

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import chex
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import optax
import zoo

_CLASSES = 3
_DIRECT = (
    'direct_feedback_alignment', 'direct_kolen_pollack',
    'direct_random_target_projection')
_INVERSES = {
    name: {'sigma': 0.}
    for name in ('target_propagation', 'difference_target_propagation')}


def _numbers(i, *shape):
  return jax.random.normal(jax.random.key(i), shape, jnp.float64) / 2.5


def _rule(name):
  return bpjax.rules.get(name)(**_INVERSES.get(name, {}))


def _labels(batch):
  return jnp.arange(batch) % _CLASSES


def _init(rule, apply, params, x):
  """A network of a function, and its feedback in float64."""
  net = bpjax.from_function(apply)
  return net, float64.doubles(
      rule.init(jax.random.key(2), net, {'params': params}, x))


def _updates(rule, net, params, feedback, x):
  (_, _), updates = zoo.learn(rule, net)(
      {'params': params}, feedback, x, _labels(jax.tree.leaves(x)[0].shape[0]),
      jax.random.key(3))
  return updates


def _mlp(p, x):
  return jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']) @ p['c']


class ParametersTest(float64.Float64TestCase):

  @parameterized.product(
      rule=(*_INVERSES, 'local_representation_alignment'),
      form=('flat', 'list'))
  def test_weights_beside_each_other(self, rule, form):
    rule, x = _rule(rule), _numbers(0, 4, 6)
    w = [_numbers(1, 6, 5), _numbers(2, 5, 6), _numbers(3, 6, _CLASSES)]
    nested = {n: {'w': a} for n, a in zip('abc', w)}
    own = dict(zip('abc', w)) if form == 'flat' else w

    def plain(p, x):
      return _mlp(dict(zip('abc', p)) if form == 'list' else p, x)

    net, feedback = _init(
        rule, lambda p, x: _mlp({n: p[n]['w'] for n in 'abc'}, x), nested, x)
    other, drawn = _init(rule, plain, own, x)
    expected, _ = _updates(rule, net, nested, feedback, x)
    updates, learned = _updates(rule, other, own, drawn, x)
    self.assertEqual(jax.tree.structure(learned), jax.tree.structure(drawn))
    # The drawn numbers are those of the same keys.
    in_order = lambda tree: sorted(
        jax.tree.leaves(tree), key=lambda a: (a.shape, float(a.sum())))
    self.assert_close(in_order(drawn), in_order(feedback), 0.)
    for update, wanted in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected)):
      self.assert_close(update, wanted, 1e-14)

  @parameterized.parameters('weight norm', 'standardised', 'exponent')
  def test_kolen_pollack_gives_feedback_the_update_of_the_weight(self, kind):
    view = {
        'weight norm': lambda p: p['g'] * p['w'] / jnp.linalg.norm(
            p['w'], axis=0),
        'standardised': lambda p: (p['w'] - p['w'].mean(0)) / p['w'].std(0),
        'exponent': lambda p: -jnp.exp(p['w']) / 6}[kind]
    params = {n: {'w': _numbers(i, *s), 'g': jnp.ones(s[1:])} for i, (n, s) in
              enumerate({'a': (6, 6), 'b': (6, 6), 'c': (6, 3)}.items())}
    if kind != 'weight norm':
      params = {n: {'w': p['w']} for n, p in params.items()}
    rule, x = bpjax.rules.kolen_pollack(), _numbers(7, 5, 6)
    apply = lambda p, x: _mlp({n: view(p[n]) for n in 'abc'}, x)
    net, feedback = _init(rule, apply, params, x)
    updates, learned = _updates(rule, net, params, feedback, x)
    self.assertEqual(sorted(learned), ['b', 'c'])
    for name, part in learned.items():
      self.assert_close(part, {k: updates[name][k] for k in part}, 0.)
      self.assertGreater(jnp.abs(part['w']).max(), 0)

  def test_names_that_would_be_those_of_what_is_inside(self):

    class Raw(nn.Module):

      @nn.compact
      def __call__(self, x):
        w = self.param('w', nn.initializers.lecun_normal(), (6, 6), x.dtype)
        return nn.tanh(nn.Dense(6)(nn.tanh(x @ w)))

    x = _numbers(0, 4, 6)
    net, variables, x = float64.setup(nn.Sequential([Raw(), nn.Dense(3)]), x)
    self.assertEqual(
        list(net.units), ['layers_0/w', 'layers_0/Dense_0', 'layers_1'])
    p = {'h': _numbers(1, 6, 6), 'w': _numbers(2, 6, 6), 'dw': _numbers(3, 6, 6),
         'o': _numbers(4, 6, 3)}
    total = lambda p, x: jnp.tanh(jnp.tanh(x @ p['h']) @ (
        p['w'] + p['dw'])) @ p['o']
    for name in _DIRECT:
      rule = _rule(name)
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      updates = zoo.learn(rule, net)(
          variables, feedback, x, _labels(4))[1][0]
      self.assertGreater(jnp.abs(updates['layers_0']['w']).max(), 0)
      other, drawn = _init(rule, total, p, x)
      self.assertEqual(list(other.units), ['h', 'dw', 'o'])
      updates, _ = _updates(rule, other, p, drawn, x)
      self.assert_close(updates['w'], updates['dw'], 0.)

  def test_two_weights_with_one_path_are_refused(self):
    p = {'a/b': {'w': _numbers(1, 6, 6)}, 'a': {'b': {'w': _numbers(2, 6, 3)}}}
    with self.assertRaisesRegex(ValueError, 'two parameters have the path'):
      _init(_rule('feedback_alignment'), lambda p, x: jnp.tanh(
          x @ p['a/b']['w']) @ p['a']['b']['w'], p, _numbers(0, 4, 6))

  @parameterized.parameters(*bpjax.rules.names())
  def test_numbers_that_are_no_floats(self, name):
    """A Python number and a count among the parameters."""
    rule, x = _rule(name), _numbers(0, 4, 6)
    p = {'w': _numbers(1, 6, 6), 'count': jnp.asarray(3), 'o': _numbers(3, 6, 3)}
    net, feedback = _init(
        rule, lambda p, x: jnp.tanh(x @ p['w']) @ p['o'], p, x)
    updates, _ = _updates(rule, net, p, feedback, x)
    self.assertGreater(jnp.abs(updates['o']).max(), 0)
    if name not in ('forward_forward', 'pepita'):  # They train units alone.
      scaled = {'w': p['w'], 'scale': 2., 'o': p['o']}
      net, feedback = _init(
          rule, lambda p, x: jnp.tanh(x @ p['w'] * p['scale']) @ p['o'],
          scaled, x)
      self.assertEqual(
          jax.tree.structure(_updates(rule, net, scaled, feedback, x)[0]),
          jax.tree.structure(scaled))

  @parameterized.parameters(*bpjax.rules.names())
  def test_complex_weights(self, name):
    p = {'w': _numbers(1, 6, 6) + 1j * _numbers(2, 6, 6),
         'v': _numbers(5, 6, 6) + 1j * _numbers(6, 6, 6), 'o': _numbers(3, 6, 3)}
    apply = lambda p, x: jnp.abs(
        jnp.tanh(x @ p['w']) @ p['v']) @ p['o']
    rule, x = _rule(name), _numbers(0, 4, 6)
    try:
      net, feedback = _init(rule, apply, p, x)
      updates, _ = _updates(rule, net, p, feedback, x)
    except ValueError as error:
      self.assertRegex(str(error), f'`{name}` needs real numbers')
      self.assertNotIn(name, ('backprop', 'feedback_alignment'))
      return
    self.assertEqual(updates['w'].dtype, p['w'].dtype)

  @parameterized.parameters('shared', 'independent')
  def test_weight_perturbation_leaves_out_what_is_frozen(self, noise):
    rule = bpjax.rules.forward_gradient(perturb='weight', noise=noise)
    p = {'w': _numbers(1, 6, 6), 'a': _numbers(2, 6, 6), 'o': _numbers(3, 6, 3)}
    x = _numbers(0, 4, 6)
    net, feedback = _init(rule, lambda p, x: jnp.tanh(
        x @ jax.lax.stop_gradient(p['w']) + x @ p['a']) @ p['o'], p, x)
    updates, _ = _updates(rule, net, p, feedback, x)
    self.assertEqual(jnp.abs(updates['w']).max(), 0)
    self.assertGreater(jnp.abs(updates['a']).max(), 0)

  def test_weights_inside_one_view_are_warned_of(self):
    """A graph whose nodes are constants: its layers are a view of weights."""
    graph, nodes = jnp.eye(8) + jnp.roll(jnp.eye(8), 1, 0), _numbers(5, 8, 6)
    p = {'a': _numbers(1, 6, 7), 'b': _numbers(2, 7, 5), 'c': _numbers(3, 5, 3)}
    apply = lambda p, ids: (graph @ jnp.tanh(graph @ jnp.tanh(
        graph @ nodes @ p['a']) @ p['b']) @ p['c'])[ids]
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter('always')
      _init(_rule('feedback_alignment'), apply, p, jnp.arange(4))
    self.assertIn('most of the weights keep their exact derivative', ''.join(
        str(w.message) for w in told))


class ExamplesTest(float64.Float64TestCase):

  @parameterized.product(rule=(
      *_DIRECT, 'recursive_local_representation_alignment'), length=(4, 5))
  def test_time_first_where_both_may_be_equal(self, rule, length):
    p = {n: {'w': _numbers(i, 6, o)} for i, (n, o) in enumerate(
        {'a': 6, 'b': 6, 'c': 3}.items())}
    x = _numbers(9, 5, length, 6)
    hidden = lambda p, x: jnp.tanh(
        jnp.tanh(x @ p['a']['w']) @ p['b']['w'])
    rows = lambda p, x: hidden(p, x).mean(1) @ p['c']['w']
    columns = lambda p, x: hidden(p, x.swapaxes(0, 1)).mean(0) @ p['c']['w']
    rule = _rule(rule)
    net, feedback = _init(rule, rows, p, x)
    expected, _ = _updates(rule, net, p, feedback, x)
    other, _ = _init(rule, columns, p, x)
    updates, _ = _updates(rule, other, p, feedback, x)
    self.assert_close(updates, expected, 1e-13)

  @parameterized.parameters(*_DIRECT, 'feedback_alignment', 'forward_gradient')
  def test_a_batch_of_one_in_windows(self, name):

    class Windows(nn.Module):

      @nn.compact
      def __call__(self, x):
        w = nn.tanh(nn.Dense(5)(x.reshape(-1, 2, x.shape[-1])))
        return nn.Dense(3)(w.reshape(x.shape[0], -1))

    rule = _rule(name)
    for batch in (1, 2):
      net, variables, x = float64.setup(Windows(), _numbers(0, batch, 4, 6))
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      updates = zoo.learn(rule, net)(
          variables, feedback, x, _labels(batch), jax.random.key(3))[1][0]
      self.assertGreater(jnp.abs(updates['Dense_0']['kernel']).max(), 0)

  @parameterized.parameters(
      'direct_feedback_alignment', 'direct_kolen_pollack',
      'direct_random_target_projection',
      'recursive_local_representation_alignment')
  def test_a_cell_in_a_python_loop_as_in_a_scan(self, name):
    p = {'w': {'w': _numbers(1, 6, 6)}, 'u': {'w': _numbers(2, 6, 6)},
         'o': {'w': _numbers(3, 6, 3)}}
    cell = lambda p, h, x: jnp.tanh(x @ p['w']['w'] + h @ p['u']['w'])

    def scanned(p, x):
      h, _ = jax.lax.scan(
          lambda h, x: (cell(p, h, x), None), jnp.zeros((x.shape[0], 6)),
          x.swapaxes(0, 1))
      return h @ p['o']['w']

    def looped(p, x):
      h = jnp.zeros((x.shape[0], 6))
      for t in range(x.shape[1]):
        h = cell(p, h, x[:, t])
      return h @ p['o']['w']

    rule, x = _rule(name), _numbers(0, 4, 3, 6)
    net, feedback = _init(rule, scanned, p, x)
    expected, _ = _updates(rule, net, p, feedback, x)
    other, _ = _init(rule, looped, p, x)
    updates, _ = _updates(rule, other, p, feedback, x)
    self.assert_close(updates, expected, 1e-13)

  def test_replies_to_noise_need_calls_of_their_own(self):
    p = {'w': _numbers(1, 6, 6), 'o': _numbers(3, 6, 3)}
    rule = bpjax.rules.direct_difference_target_propagation()
    for apply in (
        lambda p, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ p['w']), None), x,
                                  None, 3)[0] @ p['o'],
        lambda p, x: jnp.tanh(jnp.tanh(x @ p['w']) @ p['w']) @ p['o']):
      with self.assertRaisesRegex(ValueError, 'the reply to noise in each call'):
        _init(rule, apply, p, _numbers(0, 4, 6))

  @parameterized.parameters('edges', 'senders_and_receivers')
  def test_the_first_input_need_not_be_of_examples(self, key):
    p = {'a': _numbers(1, 6, 6), 'o': _numbers(2, 6, 3), 'q': _numbers(3, 6, 1)}

    def apply(p, graph):
      sender, receiver = graph[key]
      h = jnp.tanh(graph['nodes'] @ p['a'])
      h = jax.ops.segment_sum(h[sender], receiver, 4)
      return h @ p['o'], h @ p['q']

    def loss(outputs, y):
      return sum(bpjax.losses.squared_error(o, jnp.ones_like(o) * y[:, None])
                 for o in outputs)

    x = {key: jnp.asarray([[0, 1, 2, 3], [1, 2, 3, 0]]),
         'nodes': _numbers(0, 4, 6)}
    rule = _rule('direct_feedback_alignment')
    net, feedback = _init(rule, apply, p, x)
    _, (updates, _) = jax.jit(rule.value_and_grad(net, loss))(
        {'params': p}, feedback, x, jnp.arange(4.))
    self.assertGreater(jnp.abs(updates['a']).max(), 0)

  @parameterized.parameters(
      *(name for name in bpjax.rules.names() if name not in zoo.SETTLING))
  def test_boxes_of_parameters_are_not_seen(self, name):
    """Parameters with where they are to lie: names and updates stay the same."""
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'm'))
        for _ in range(2):
          x = nn.tanh(nn.Dense(6, kernel_init=init)(x))
        return nn.Dense(3, kernel_init=init, bias_init=nn.with_partitioning(
            nn.initializers.zeros, ('m',)))(x)

    rule, found = _rule(name), []
    x, y = _numbers(0, 4, 5), _labels(4)
    net, boxed, _ = float64.setup(Model(), x)
    self.assertIsInstance(boxed['params']['Dense_2']['bias'], nn.Partitioned)
    for variables in (boxed, nn.meta.unbox(boxed)):
      feedback = rule.init(jax.random.key(1), net, variables, x)
      _, (updates, learned) = zoo.learn(rule, net)(
          variables, feedback, x, y, jax.random.key(2))
      found.append((feedback, updates, learned, list(net.survey(
          variables, x).units)))
      tx = bpjax.optimizer(optax.adam(1e-3), rule, feedback)
      tx.init((variables['params'], feedback))
    self.assertEqual(jax.tree.structure(found[0][1]),
                     jax.tree.structure(boxed['params']))
    chex.assert_trees_all_equal(nn.meta.unbox(found[0]), found[1])


if __name__ == '__main__':
  absltest.main()
