"""Units that share what follows them, or are no chain, under LRA."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import zoo

_BATCH, _BETA = 6, .1
_RULES = {
    'direct': lambda: bpjax.rules.recursive_local_representation_alignment(
        beta=_BETA),
    'chain': lambda: bpjax.rules.local_representation_alignment(beta=_BETA)}


class _Attention(nn.Module):
  """Queries, keys and values by three products, or by one."""
  heads: bool
  stacked: bool

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(8, name='below')(x))
    shape = (2, 4) if self.heads else (8,)
    if self.stacked:
      parts = nn.DenseGeneral((*shape[:-1], 3 * shape[-1]), name='qkv')(x)
      q, k, v = jnp.split(parts, 3, -1)
    else:
      q, k, v = (nn.DenseGeneral(shape, name=name)(x) for name in 'qkv')
    if not self.heads:
      q, k, v = (a[:, :, None] for a in (q, k, v))
    x = nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], 8)
    x = nn.tanh(nn.Dense(8, name='above')(x))
    return nn.Dense(5, name='out')(x.mean(1))


class _Sum(nn.Module):
  """Two products that are added, or one of what they read side by side."""
  stacked: bool

  @nn.compact
  def __call__(self, x):
    a = nn.tanh(nn.Dense(4, name='left')(x))
    b = nn.tanh(nn.Dense(3, name='right')(x))
    if self.stacked:
      x = nn.Dense(6, name='both')(jnp.concatenate([a, b], -1))
    else:
      x = nn.Dense(6, name='of_a')(a) + 1. * nn.Dense(
          6, use_bias=False, name='of_b')(b)
    return nn.Dense(5, name='out')(nn.tanh(x))


class _Mixed(nn.Module):
  """Two units whose outputs meet, `how`."""
  how: str

  @nn.compact
  def __call__(self, x):
    a = nn.Dense(6, name='a')(x)
    b = nn.Dense(6, name='b')(x)
    if self.how == 'product':
      h = nn.tanh(a) * b
    else:
      h = nn.tanh(a) + nn.sigmoid(b)
    return nn.Dense(5, name='out')(h)


class _Cell(nn.Module):
  """A recurrent network of a cell of the library."""
  kind: str

  @nn.compact
  def __call__(self, x):
    cell = getattr(nn, self.kind)(6, param_dtype=x.dtype, name='cell')
    x = jnp.stack([x] * 3, 1) * jnp.arange(1., 4.)[:, None]
    return nn.Dense(5, name='out')(nn.RNN(cell)(x)[:, -1])


def _updates(rule, net, variables, feedback, x):
  return zoo.learn(rule, net)(
      variables, feedback, x, jnp.arange(_BATCH) % 5)[1]


class GraphsTest(float64.Float64TestCase):

  @parameterized.product(rule=tuple(_RULES), heads=(False, True))
  def test_queries_keys_and_values_as_one_product(self, rule, heads):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 3, 7))
    rule = _RULES[rule]()
    one, variables, x = float64.setup(_Attention(heads, True), x)
    three = bpjax.from_linen(_Attention(heads, False))
    three.init(jax.random.key(0), x)
    self.assertEqual(list(rule.units(three, variables_of(three, x), x))[:6], [
        'below', 'q', 'k', 'v', 'q + k + v', 'above'])

    def apart(tree):
      """Of the one product, that of each of the three."""
      tree = dict(tree)
      part = tree.pop('qkv')
      for i, name in enumerate('qkv'):
        tree[name] = jax.tree.map(
            lambda a, i=i: jnp.split(a, 3, -1)[i], part)
      return tree

    own = {'params': apart(variables['params'])}
    feedback = float64.doubles(
        rule.init(jax.random.key(1), one, variables, x))
    moved = dict(feedback)
    moved['q + k + v'] = moved.pop('qkv')
    self.assertEqual(
        jax.tree.map(jnp.shape, moved),
        jax.tree.map(jnp.shape, rule.init(jax.random.key(1), three, own, x)))
    expected, synapses = _updates(rule, one, variables, feedback, x)
    updates, found = _updates(rule, three, own, moved, x)
    self.assert_close(updates, apart(expected), 1e-14)
    found['qkv'] = found.pop('q + k + v')
    self.assert_close(found, synapses, 1e-14)
    for leaf in jax.tree.leaves(updates):
      self.assertGreater(jnp.abs(leaf).max(), 0)

  @parameterized.parameters(*_RULES)
  def test_a_sum_is_moved_as_one(self, rule):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    rule = _RULES[rule]()
    net, variables, x = float64.setup(_Sum(False), x)
    infos = rule.infos(net, variables, x)
    joint = infos['of_a + of_b']
    self.assertEqual(joint.kind, bpjax.base.JOINT)
    self.assertEqual(joint.pre.shape, (_BATCH, 6))
    self.assertTrue(joint.owns_activation)
    self.assertEqual(infos['of_a'].joint, 'of_a + of_b')
    self.assertFalse(infos['of_b'].owns_activation)
    if rule.name == 'local_representation_alignment':
      return  # In one product, two units would have one reader.
    one = bpjax.from_linen(_Sum(True))
    one.init(jax.random.key(0), x)
    params = dict(variables['params'])
    a, b = params.pop('of_a'), params.pop('of_b')
    params['both'] = {
        'kernel': jnp.concatenate([a['kernel'], b['kernel']]),
        'bias': a['bias']}
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    moved = dict(feedback)
    moved['both'] = moved.pop('of_a + of_b')
    updates, _ = _updates(rule, net, variables, feedback, x)
    expected, _ = _updates(rule, one, {'params': params}, moved, x)
    both = {'kernel': jnp.concatenate(
        [updates['of_a']['kernel'], updates['of_b']['kernel']]),
            'bias': updates['of_a']['bias']}
    self.assert_close(both, expected['both'], 1e-14)
    for name in ('left', 'right', 'out'):
      self.assert_close(updates[name], expected[name], 1e-14)

  @parameterized.parameters('product', 'sum')
  def test_against_numpy(self, how):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(_Mixed(how), x)
    rule = _RULES['direct']()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    updates, _ = _updates(rule, net, variables, feedback, x)
    p, data = jax.tree.map(np.asarray, (variables['params'], x))
    a, b = (data @ p[n]['kernel'] + p[n]['bias'] for n in 'ab')
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    h = np.tanh(a) * b if how == 'product' else np.tanh(a) + sigmoid(b)
    logits = h @ p['out']['kernel'] + p['out']['bias']
    q = np.exp(logits - logits.max(1, keepdims=True))
    e = q / q.sum(1, keepdims=True) - np.eye(5)[np.arange(_BATCH) % 5]
    if how == 'product':
      self.assertEqual(list(feedback), ['a + b'])
      matrix = np.asarray(feedback['a + b']['direct'])
      d = e @ matrix.reshape(matrix.shape[0], -1)
      target = np.tanh(a - _BETA * d[:, :6]) * (b - _BETA * d[:, 6:])
      of_a = (h - target) * b * (1 - np.tanh(a)**2)
      of_b = (h - target) * np.tanh(a)
    else:
      # Each ends at a nonlinearity of its own: it has a target of its own.
      self.assertEqual(list(feedback), ['a', 'b'])
      d_a, d_b = (e @ np.asarray(feedback[n]['direct']) for n in 'ab')
      of_a = np.tanh(a) - np.tanh(a - _BETA * d_a)
      of_b = sigmoid(b) - sigmoid(b - _BETA * d_b)
    for name, error in (('a', of_a), ('b', of_b)):
      self.assert_close(
          updates[name], {'kernel': data.T @ error / _BATCH,
                          'bias': error.mean(0)}, 1e-13)

  @parameterized.product(
      kind=('GRUCell', 'SimpleCell', 'OptimizedLSTMCell', 'MGUCell'))
  def test_cells_learn_in_a_loop(self, kind):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(_Cell(kind), x)
    rule = _RULES['direct']()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    updates, _ = _updates(rule, net, variables, feedback, x)
    for name, leaf in zip(bpjax.paths.leaf_names(updates),
                          jax.tree.leaves(updates)):
      self.assertGreater(jnp.abs(leaf).max(), 0, name)

  @parameterized.parameters('norm', 'residual', 'branch')
  def test_a_chain_is_a_graph_where_units_are_none(self, kind):

    class Between(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.Dense(5, name='a')(x))
        if kind == 'norm':
          x = nn.LayerNorm(name='norm')(x)
        elif kind == 'residual':
          x = x + nn.tanh(nn.Dense(5, name='b')(x))
        right = nn.LayerNorm(name='norm')(x) if kind == 'branch' else x
        return nn.Dense(2, name='left')(x), nn.Dense(3, name='right')(right)

    def loss(outputs, y):
      return sum(bpjax.losses.squared_error(o, jnp.ones_like(o) * y[:, None])
                 for o in outputs)

    x = jax.random.normal(jax.random.key(3), (4, 7))
    y = jnp.arange(4.)
    net, variables, x = float64.setup(Between(), x)
    rule, beta = bpjax.rules.local_representation_alignment(beta=.3), .3
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    hidden = {'residual': ['b']}.get(kind, [])
    self.assertEqual(sorted(feedback), [*hidden, 'left', 'right'])
    (_, aux), (updates, synapses) = jax.jit(rule.value_and_grad(net, loss))(
        variables, feedback, x, y)
    p, e_w, data = jax.tree.map(np.asarray, (
        variables['params'], feedback, x))
    h = np.tanh(data @ p['a']['kernel'] + p['a']['bias'])
    errors = [np.asarray(o - y[:, None]) for o in aux.output]
    messages = [e @ e_w[n]['kernel'].T for e, n in zip(
        errors, ('left', 'right'))]
    if kind == 'branch':  # That of `right` passes the norm, exactly.
      _, pull = jax.vjp(lambda h: nn.LayerNorm().apply(
          {'params': p['norm']}, h), jnp.asarray(h))
      messages[1] = np.asarray(pull(jnp.asarray(messages[1]))[0])
    message = sum(messages)

    def moved(pre, d):
      phi = np.tanh
      if kind == 'norm':  # It is the unit's own.
        phi = lambda a: np.asarray(nn.LayerNorm().apply(
            {'params': p['norm']}, np.tanh(a)))
      return phi(pre) - phi(pre - beta * d)

    expected = {}
    if kind == 'residual':  # No message goes by the skip.
      of_b = np.tanh(h @ p['b']['kernel'] + p['b']['bias']) - np.tanh(
          h @ p['b']['kernel'] + p['b']['bias'] - beta * message)
      expected['b'] = h.T @ of_b / 4
      message = of_b @ e_w['b']['kernel'].T
    expected['a'] = data.T @ moved(np.arctanh(h), message) / 4
    for name, update in expected.items():
      self.assert_close(updates[name]['kernel'], update, 1e-12)
      if name in synapses:
        self.assert_close(synapses[name]['kernel'], update, 1e-12)
    self.assertNotIn('a', synapses)

  def test_a_step_goes_down_the_loss(self):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 3, 7))
    net, variables, x = float64.setup(_Attention(True, False), x)
    rule = _RULES['chain']()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    learn = zoo.learn(rule, net)
    losses = []
    for _ in range(60):
      (value, _), (grads, moved) = learn(
          variables, feedback, x, jnp.arange(_BATCH) % 5)
      losses.append(float(value))
      step = lambda p, g: p - .5 * g
      variables = {'params': jax.tree.map(step, variables['params'], grads)}
      feedback = jax.tree.map(step, feedback, moved)
    self.assertLess(losses[-1], .5 * losses[0])

  def test_who_may_not_share(self):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(_Mixed('product'), x)
    key, lra = jax.random.key(1), _RULES['direct']()
    for name in ('target_propagation', 'difference_target_propagation'):
      with self.assertRaisesRegex(ValueError, '`a` is mixed with `b` before'):
        bpjax.rules.get(name)().init(key, net, variables, x)
    with self.assertRaisesRegex(ValueError, '`a` is mixed with `b` before'):
      bpjax.rules.by_path(
          {'a': lra, '*': _RULES['chain']()}).init(key, net, variables, x)
    one = bpjax.rules.by_path({'*': lra})
    self.assertIn('a + b', one.units(net, variables, x))
    feedback = float64.doubles(one.init(key, net, variables, x))
    updates, _ = _updates(one, net, variables, feedback, x)
    alone = lra.init(key, net, variables, x)
    self.assert_close(
        updates, _updates(lra, net, variables, float64.doubles(alone), x)[0],
        1e-14)

  def test_alignment_lists_it(self):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(_Mixed('product'), x)
    rule = _RULES['direct']()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    found = bpjax.alignment(
        net, bpjax.losses.softmax_cross_entropy, rule)(
        variables, feedback, x, jnp.arange(_BATCH) % 5)
    self.assertIn('a', found)


def variables_of(net, x):
  return net.init(jax.random.key(0), x)


if __name__ == '__main__':
  absltest.main()
