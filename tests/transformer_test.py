"""Transformers: sizes, rules against numpy, masks, and what is refused."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax import transformer
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference_transformer as reference
import zoo

LOSS = bpjax.losses.softmax_cross_entropy
RULES = bpjax.rules
_TINY = {'width': 8, 'heads': 2, 'hidden': 12, 'dropout': 0.}
_TEXT = {**_TINY, 'vocabulary': 11, 'length': 9}


def tokens(length=6, hidden=True, lengths=(6, 4, 5, 2)):
  """Sentences with a mask, and labels."""
  ids = jax.random.randint(jax.random.key(1), (4, 9), 0, 11)[:, :length]
  mask = jnp.arange(length) < jnp.array(lengths)[:, None]
  ids = jnp.where(mask, ids, 7 if hidden else 3)
  return bpjax.Inputs(ids, mask=mask, segments=ids % 2), jnp.arange(4) % 3


class SizeTest(parameterized.TestCase):

  @parameterized.parameters(
      ('bert_encoder', {'num_classes': 2}, 1_478_786),
      ('bert_encoder', {'num_classes': 2, 'norm': 'pre'}, 1_479_042),
      ('gpt', {'num_classes': 256}, 478_720),
      ('gpt', {'num_classes': 256, 'tied': True}, 478_720 - 32_768),
      ('gpt', {'num_classes': 256, 'positions': 'sinusoidal', 'norm': 'pre'},
       478_720 - 16_384 + 256),
      ('vit', {'num_classes': 10}, 809_098))
  def test_parameters(self, name, arguments, size):
    model = bpjax.models.get(name)(**arguments)
    x = (jnp.zeros((2, 32, 32, 3)) if name == 'vit'
         else jnp.zeros((2, 16), jnp.int32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    got = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes['params']))
    self.assertEqual(got, size)
    if len(arguments) == 1:  # Of the defaults.
      self.assertIn(f'{size:,}', bpjax.models.get(name).__doc__)
    logits = jax.eval_shape(model.apply, shapes, x)
    self.assertEqual(logits.shape, (2, arguments['num_classes']) if name != 'gpt'
                     else (2, 16, 256))

  @parameterized.product(
      name=('bert_encoder', 'gpt', 'vit'), norm=('post', 'pre'),
      placement=('full', 'macro', 'micro'))
  def test_units(self, name, norm, placement):
    model, x, _ = small(name, norm=norm)
    net = bpjax.from_linen(
        model, boundaries=transformer.points(placement, hidden=True))
    jax.eval_shape(net.init, jax.random.key(0), x)
    layer = {
        'full': ('attention/qkv', 'attention/out', 'feed_forward/in',
                 'feed_forward/out'),
        'macro': ('attention/qkv', 'attention/out', 'feed_forward/in',
                  'feed_forward/out', 'boundary'),
        'micro': ('attention/qkv', 'attention/out', 'attention/boundary',
                  'feed_forward/in', 'feed_forward/activation/boundary',
                  'feed_forward/out', 'feed_forward/boundary')}[placement]
    first, last = {
        'bert_encoder': (['token'], ['pooler', 'hidden/boundary', 'readout']),
        'gpt': (['token'], ['hidden/boundary', 'readout']),
        'vit': (['patches'], ['hidden/boundary', 'readout'])}[name]
    self.assertEqual(
        list(net.units),
        [*first, *(f'block_0/{unit}' for unit in layer), *last])

  def test_dtype(self):
    for name in ('bert_encoder', 'gpt', 'vit'):
      model, x, _ = small(name, dtype='bfloat16')
      out = jax.eval_shape(
          bpjax.from_linen(model).apply,
          jax.eval_shape(bpjax.from_linen(model).init, jax.random.key(0), x), x)
      self.assertEqual(out.dtype, jnp.bfloat16)

  @parameterized.parameters(
      ('bert_encoder', {'heads': 3}, '`heads` must divide the width'),
      ('gpt', {'norm': 'batch'}, "`norm` must be 'post' or 'pre'"),
      ('vit', {'dtype': 'int8'}, "`dtype` must be a type of floating"),
      ('gpt', {'positions': 'rotary'}, "`positions` must be 'learned'"),
      ('bert_encoder', {'pool': 'max'}, "`pool` must be 'cls' or 'mean'"),
      ('bert_encoder', {'vocabulary': 0}, '`vocabulary` must be a whole number'),
      ('vit', {'depth': 0}, '`depth` must be a whole number'))
  def test_refused_arguments(self, name, arguments, sentence):
    with self.assertRaisesRegex(ValueError, sentence):
      bpjax.models.get(name)(num_classes=3, **{**_TINY, **arguments})

  @parameterized.parameters(
      ('bert_encoder', jnp.zeros((2, 10), int), None, 'as long as the positions'),
      ('gpt', jnp.zeros((2, 10), int), None, 'as long as the positions'),
      ('gpt', jnp.zeros((2, 5)), None, 'must be whole numbers'),
      ('gpt', jnp.full((2, 5), 11), None, r'must lie in \[0, 11\)'),
      ('bert_encoder', jnp.zeros((2, 5), int), jnp.ones((2, 4), bool),
       '`mask` must have the shape of `tokens`'),
      ('vit', jnp.zeros((2, 9, 8, 3)), None, '`patch` must divide'))
  def test_refused_inputs(self, name, x, mask, sentence):
    model, _, _ = small(name)
    given = {} if mask is None else {'mask': mask}
    with self.assertRaisesRegex(ValueError, sentence):
      model.init(jax.random.key(0), x, **given)


def small(name, depth=1, **arguments):
  """(model, x, y), tiny."""
  if name == 'bert_encoder':
    x, y = tokens()
    return bpjax.models.bert_encoder(
        3, depth=depth, **{**_TEXT, **arguments}), x, y
  if name == 'gpt':
    x = tokens()[0].args[0]
    own = {**_TINY, 'length': 9, **arguments}
    return bpjax.models.gpt(11, depth=depth, **own), x, (x + 1) % 11
  image = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  return bpjax.models.vit(
      3, depth=depth, **{**_TINY, **arguments}), image, jnp.arange(4) % 3


class _Layer(nn.Module):
  """A dense layer, a block, and a readout of the first token."""

  @nn.compact
  def __call__(self, x, mask):
    x = nn.Dense(8, name='stem')(x)
    x = transformer.Block(2, 12, 'post', 0., nn.gelu, name='block_0')(x, mask)
    return nn.Dense(3, name='readout')(x[:, 0])


_PATHS = {
    's': 'stem', 'q': 'block_0/attention/qkv', 'n': 'block_0/attention/out',
    'i': 'block_0/feed_forward/in', 'o': 'block_0/feed_forward/out',
    'r': 'readout', 'norm_n': 'block_0/attention/norm',
    'norm_o': 'block_0/feed_forward/norm'}
_SENDING = 'qnior'


class ReferenceTest(float64.Float64TestCase):

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(4, 6, 5))
    self.mask = np.arange(6) < np.array([6, 4, 5, 2])[:, None]
    self.y = np.array([0, 2, 1, 0])

  def _learn(self, rule, **kwargs):
    """Updates, feedback and its updates, and the parameters for numpy."""
    x = bpjax.Inputs(jnp.asarray(self.x), mask=jnp.asarray(self.mask))
    net = bpjax.from_linen(_Layer(), **kwargs)
    variables = float64.doubles(jax.jit(net.init)(jax.random.key(0), x))
    rng = np.random.default_rng(1)  # Gains of 1 would hide a mistake.
    variables['params'] = jax.tree.map(
        lambda p: p + .3 * rng.normal(size=p.shape), variables['params'])
    feedback = float64.doubles(rule.init(jax.random.key(2), net, variables, x))
    (_, aux), (grads, feedback_grads) = zoo.learn(rule, net)(
        variables, feedback, x, jnp.asarray(self.y), key=jax.random.key(3))
    p = {}
    for letter, path in _PATHS.items():
      own = jax.tree.map(np.asarray, bpjax.paths.subtree(
          variables['params'], path))
      p[letter] = (own['scale'], own['bias']) if 'scale' in own else own
    return grads, feedback, feedback_grads, p, aux.output

  def _assert(self, grads, expected):
    for letter, update in expected.items():
      own = bpjax.paths.subtree(grads, _PATHS[letter])
      if isinstance(update, tuple):
        update = dict(zip(('scale', 'bias'), update))
      for name, value in update.items():
        np.testing.assert_allclose(
            own[name], value, atol=1e-12, err_msg=f'{letter} {name}')

  def _args(self, p):
    return p, self.x, self.y, self.mask, 2

  @parameterized.parameters('backprop', 'feedback_alignment', 'kolen_pollack')
  def test_credit(self, name):
    grads, feedback, feedback_grads, p, output = self._learn(RULES.get(name)())
    _, a = reference.forward(p, self.x, self.mask, 2)
    np.testing.assert_allclose(output, a['r'], atol=1e-12)
    kernel = lambda tree, l: bpjax.paths.subtree(tree, _PATHS[l])['kernel']
    back = {l: p[l]['kernel'] if name == 'backprop' else kernel(feedback, l)
            for l in _SENDING}
    expected = reference.credit(*self._args(p), back)
    self._assert(grads, expected)
    if name == 'kolen_pollack':
      for letter in _SENDING:
        np.testing.assert_array_equal(
            kernel(feedback_grads, letter), kernel(grads, letter))

  @parameterized.parameters('boundaries', 'layers')
  def test_direct_feedback_leaves_out_hidden_tokens(self, placement):
    boundaries = ('block_*',) if placement == 'boundaries' else ()
    grads, feedback, _, p, _ = self._learn(
        RULES.direct_feedback_alignment(placement=placement),
        boundaries=boundaries)
    *_, a = reference.forward(p, self.x, self.mask, 2)
    e = reference.error(a['r'], self.y)
    at = lambda l: np.asarray(bpjax.paths.subtree(feedback, _PATHS[l]))
    if placement == 'boundaries':
      replaced = {'block': reference.projected(
          e, np.asarray(feedback['block_0']['boundary']), self.mask)}
    else:  # Each is kept at the unit that reads what it teaches.
      replaced = {
          taught: reference.projected(e, at(reader), self.mask)
          for taught, reader in zip('sqni', 'qnio')} | {'o': e @ at('r')}
    self._assert(grads, reference.credit(
        *self._args(p), {l: p[l]['kernel'] for l in _SENDING}, replaced))

  @parameterized.parameters('fixed', 'dx')
  def test_local_representation_alignment(self, direct_update):
    beta = .1
    grads, feedback, feedback_grads, p, _ = self._learn(
        RULES.local_representation_alignment(
            beta=beta, direct_update=direct_update))
    at = lambda l: bpjax.paths.subtree(feedback, _PATHS[l])
    synapses = {l: np.asarray(at(l)['kernel']) for l in 'rio'}
    synapses |= {'n': np.asarray(at('q')['direct']),
                 'q': np.asarray(at('s')['direct'])}
    expected, learned = reference.lra(*self._args(p), synapses, beta)
    self._assert(grads, expected)
    self._assert(grads, {l: (np.zeros(8),) * 2 for l in ('norm_n', 'norm_o')})
    for letter in 'rio':  # Those that stand for weights get their update.
      np.testing.assert_array_equal(
          bpjax.paths.subtree(feedback_grads, _PATHS[letter])['kernel'],
          bpjax.paths.subtree(grads, _PATHS[letter])['kernel'])
    for letter, kept in (('n', 'q'), ('q', 's')):
      direct = bpjax.paths.subtree(feedback_grads, _PATHS[kept])['direct']
      np.testing.assert_allclose(
          direct, learned[letter] * (direct_update == 'dx'), atol=1e-12)

  def test_difference_target_propagation(self):
    step = .2
    grads, feedback, feedback_grads, p, _ = self._learn(
        RULES.difference_target_propagation(step=step, sigma=0.))
    inverses, learned = {}, {}
    for letter in 'qnio':
      name = 'inverse_kernel' if letter == 'q' else 'kernel'
      for tree, into in ((feedback, inverses), (feedback_grads, learned)):
        own = bpjax.paths.subtree(tree, _PATHS[letter])
        into[letter] = np.asarray(own[name]), np.asarray(own['inverse_bias'])
    expected, expected_learned = reference.dtp(*self._args(p), inverses, step)
    self._assert(grads, expected)
    for letter, pair in expected_learned.items():
      for got, value in zip(learned[letter], pair):
        np.testing.assert_allclose(got, value, atol=1e-12, err_msg=letter)


class IdentityTest(float64.Float64TestCase):

  @parameterized.parameters('bert_encoder', 'gpt', 'vit')
  def test_feedback_that_is_the_weights_is_backprop(self, name):
    model, x, y = small(name, depth=2)
    x = float64.doubles(x)
    net = bpjax.from_linen(model)
    variables = float64.doubles(jax.jit(net.init)(jax.random.key(0), x))
    args, kwargs = bpjax.inputs.arguments(x)

    @jax.jit
    def exact(params):
      return jax.grad(lambda p: LOSS(model.apply(
          {'params': p}, *args, **kwargs, train=True), y).mean())(params)

    expected = exact(variables['params'])
    for rule in ('backprop', 'kolen_pollack'):
      rule = RULES.get(rule)()
      shapes = jax.eval_shape(
          functools.partial(rule.init, net=net), jax.random.key(1),
          variables=variables, x=x)
      feedback = bpjax.paths.map_with_name(
          lambda name, _: bpjax.paths.subtree(variables['params'], name), shapes)
      _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y)
      self.assert_close(grads, expected, 1e-12)

  @parameterized.parameters((jnp.float64, 1e-10), (jnp.float32, 1e-6))
  def test_law_of_kolen_and_pollack(self, dtype, tolerance):
    rate, decay, steps = 1e-2, 1., 200
    model, x, y = small('bert_encoder', depth=2)
    net = bpjax.from_linen(model)
    cast = lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree)
    rule = RULES.kolen_pollack()
    params = cast(jax.jit(net.init)(jax.random.key(0), x)['params'])
    feedback = cast(rule.init(jax.random.key(1), net, {'params': params}, x))
    tx = bpjax.optimizer(optax.adamw(rate, weight_decay=decay), rule, feedback)
    learn = rule.value_and_grad(net, LOSS)

    def step(carry, _):
      trees, state = carry
      _, grads = learn({'params': trees[0]}, trees[1], x, y)
      updates, state = tx.update(grads, state, trees)
      return (optax.apply_updates(trees, updates), state), None

    trees = params, feedback
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(
        (trees, tx.init(trees)))
    factor = (1 - rate * decay)**steps
    for name in bpjax.paths.leaf_names(feedback):
      before, after = (
          np.asarray(bpjax.paths.subtree(p, name), np.float64)
          - np.asarray(bpjax.paths.subtree(b, name), np.float64)
          for p, b in (trees, trained))
      np.testing.assert_allclose(
          after, factor * before, atol=tolerance, err_msg=name)
      self.assertGreater(np.abs(before).max(), .01)


# They write into the input, or add to it, and tokens are whole numbers.
_REFUSED = ('forward_forward', 'pepita')
# Rules with local losses, and placements, beside all other rules by name; but for
# one that moves all weights, those of words that nobody used among them.
_KINDS = {
    **{name: (RULES.get(name), ()) for name in RULES.names()
       if name not in (*_REFUSED, 'spsa')},
    'frsf': (lambda: RULES.sign_symmetry('frSF'), ()),
    'brsf': (lambda: RULES.sign_symmetry('brSF'), ()),
    'macro': (lambda: RULES.direct_feedback_alignment(
        placement='boundaries'), transformer.points('macro')),
    'micro': (lambda: RULES.direct_feedback_alignment(
        placement='boundaries', shared=True, entries='uniform',
        normalise='largest'), transformer.points('micro')),
    'hidden': (lambda: RULES.direct_feedback_alignment(
        placement='boundaries', error='hidden'),
               transformer.points('macro', hidden=True)),
    'blocks': (lambda: RULES.by_path({
        '*/boundary': RULES.recursive_local_representation_alignment(),
        '*': RULES.backprop()}), transformer.points('macro')),
    # A beta of .1 would leave nothing of an error nine units below in float32.
    'local_representation_alignment': (
        lambda: RULES.local_representation_alignment(beta=1.), ()),
    'LG-FG-A': (lambda: bpjax.variant(
        'LG-FG-A', grouped=False, placement='block'), ()),
}
# Their draws have the shape of the input, or the number of its tokens.
_DRAW = {'forward_gradient', 'weight_mirror', 'LG-FG-A',
         'direct_difference_target_propagation'}
# Its error of a sentence has a matrix for every position.
_BY_POSITION = {'recursive_local_representation_alignment'}


class MaskTest(parameterized.TestCase):

  def _setup(self, kind, **arguments):
    make, boundaries = _KINDS[kind]
    quiet = {'sigma': 0.} if kind.endswith('target_propagation') else {}
    rule = make(**quiet)
    model, x, y = small('bert_encoder', depth=1, **arguments)
    net = bpjax.from_linen(model, boundaries=boundaries)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    return rule, net, variables, feedback, y

  @parameterized.parameters(*_KINDS)
  def test_a_hidden_token_changes_nothing(self, kind):
    rule, net, variables, feedback, y = self._setup(kind)
    learn = zoo.learn(rule, net)
    results = [
        learn(variables, feedback, tokens(hidden=hidden)[0], y,
              key=jax.random.key(3)) for hidden in (True, False)]
    (value, _), one = results[0]
    jax.tree.map(np.testing.assert_array_equal, one, results[1][1])
    # The token that stands for nothing is none of the sentences' own.
    embedding = one[0]['token']['embedding']
    real = set(np.asarray(tokens()[0].args[0])[np.asarray(
        tokens()[0].kwargs['mask'])])
    for unused in set(range(11)) - real:
      self.assertFalse(np.asarray(embedding[unused]).any())
    self.assertTrue(np.asarray(embedding).any())

  @parameterized.parameters(
      'backprop', 'difference_target_propagation', 'kolen_pollack', 'macro')
  def test_the_loss_falls(self, kind):
    rule, net, variables, feedback, y = self._setup(kind)
    learn = zoo.learn(rule, net)
    (value, _), _ = learn(
        variables, feedback, tokens()[0], y, key=jax.random.key(0))
    tx = bpjax.optimizer(optax.adam(1e-3), rule, feedback)
    trees = variables['params'], feedback
    state, update = tx.init(trees), jax.jit(tx.update)
    for i in range(100):
      (last, _), grads = learn(
          {**variables, 'params': trees[0]}, trees[1], tokens()[0], y,
          key=jax.random.key(i))
      updates, state = update(grads, state, trees)
      trees = optax.apply_updates(trees, updates)
    self.assertLess(last, .95 * value)

  @parameterized.parameters(*_REFUSED)
  def test_refused_for_whole_numbers(self, name):
    model, x, _ = small('bert_encoder', depth=1)
    net = bpjax.from_linen(model)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, 'of floats|is part of none'):
      RULES.get(name)().init(jax.random.key(1), net, variables, x)

  @parameterized.parameters(*(k for k in _KINDS if k not in _DRAW | _BY_POSITION))
  def test_any_padding_gives_the_same_updates(self, kind):
    rule, net, variables, feedback, y = self._setup(kind)
    results = [
        zoo.learn(rule, net)(
            variables, feedback, tokens(length)[0], y, key=jax.random.key(3))
        for length in (6, 9)]
    (_, one), (_, other) = results
    # Sums over more positions round otherwise, twenty times where states settle.
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-3)
    jax.tree.map(close, one, other)


class _Layers(nn.Module):
  """A readout that sends next to nothing on, and a stream that grows."""
  shrink: float = 1.
  grow: float = 1.

  @nn.compact
  def __call__(self, x):
    for i in range(3):
      x = nn.Dense(
          4, use_bias=False, name=f'block_{i}',
          kernel_init=lambda *a: self.grow * jnp.eye(4))(x)
    return nn.Dense(3, name='readout')(self.shrink * x)


class DiagnosisTest(parameterized.TestCase):

  @parameterized.parameters((1., False), (1e-5, False), (1e-9, True))
  def test_cosines_with_nothing_are_withheld(self, shrink, withheld):
    net = bpjax.from_linen(_Layers(shrink))
    x, y = jnp.ones((4, 4)) / shrink, jnp.arange(4) % 3
    rule = RULES.feedback_alignment()
    variables = net.init(jax.random.key(0), x)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    x = jnp.ones((4, 4))
    # The readout reads the input as it is: its own gradient stays.
    variables['params']['readout']['kernel'] = jnp.ones((4, 3)) * jnp.arange(3)
    found = bpjax.alignment(net, LOSS, rule)(variables, feedback, x, y)
    self.assertTrue(np.isfinite(found['readout'].update))
    self.assertEqual(bool(np.isnan(found['block_0'].update)), withheld)
    self.assertEqual(bool(np.isnan(found['block_0'].teaching)), withheld)
    self.assertTrue(np.isfinite(found['block_0'].backprop_norm))

  def test_growth(self):
    net = bpjax.from_linen(_Layers(grow=3.))
    x = jnp.ones((4, 4))
    found = bpjax.growth(net)(net.init(jax.random.key(0), x), x)
    self.assertEqual(list(found), ['block_1', 'block_2'])
    np.testing.assert_allclose(list(found.values()), 3., rtol=1e-6)

  def test_frozen_blocks(self):
    model, x, y = small('bert_encoder')
    net, rule = bpjax.from_linen(model), RULES.backprop()
    variables = jax.jit(net.init)(jax.random.key(0), x)
    tx = bpjax.optimizer(optax.adamw(1e-2), rule, {}, frozen=['block_*'])
    trees = variables['params'], {}
    _, grads = zoo.learn(rule, net)(variables, {}, x, y)
    updates, _ = jax.jit(tx.update)(grads, tx.init(trees), trees)
    for name, leaf in zip(
        bpjax.paths.leaf_names(updates[0]), jax.tree.leaves(updates[0])):
      self.assertEqual(
          bool(np.asarray(leaf).any()), not name.startswith('block_'), name)
    with self.assertRaisesRegex(ValueError, 'matches no parameter'):
      bpjax.optimizer(optax.sgd(1.), rule, {}, frozen=['layer_*']).init(trees)


if __name__ == '__main__':
  absltest.main()
