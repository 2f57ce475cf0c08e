"""How models are called, and what they put out, under every rule that can."""

import typing

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax
from flax import nnx
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


@flax.struct.dataclass
class _Out:
  logits: jax.Array
  value: jax.Array


class _Pair(typing.NamedTuple):
  a: jax.Array
  b: jax.Array


class _Heads(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Dense(8, name='trunk')(x))
    logits = nn.Dense(3, name='policy')(h)
    value = nn.Dense(1, name='value')(h)
    return {
        'tuple': (logits, value), 'value_first': (value, logits),
        'dict': {'aux': jnp.mean(h**2), 'logits': logits, 'value': value},
        'number': {'aux': 3., 'logits': logits, 'value': value},
        'dataclass': _Out(logits, value)}[self.kind]


def _joined(output, y):
  if isinstance(output, _Out):
    output = (output.logits, output.value)
  aux = 0.
  if isinstance(output, dict):
    aux, output = output['aux'], (output['logits'], output['value'])
  logits, value = sorted(output, key=lambda part: -part.shape[-1])
  return _LOSS(logits, y) + value[:, 0]**2 + aux


class OutputsTest(float64.Float64TestCase):

  @parameterized.product(
      kind=('tuple', 'value_first', 'dict', 'number', 'dataclass'),
      rule=('backprop', 'feedback_alignment', 'direct_feedback_alignment',
            'kolen_pollack', 'sign_symmetry', 'equilibrium_propagation',
            'forward_gradient'))
  def test_several_outputs(self, kind, rule):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    y = jnp.arange(6) % 3
    net, variables, x = float64.setup(_Heads(kind), x)
    rule = bpjax.rules.get(rule)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    (value, aux), (grads, _) = zoo.learn(rule, net, _joined)(
        variables, feedback, x, y, jax.random.key(2))

    def mean(params):
      return _joined(_Heads(kind).apply({'params': params}, x), y).mean()

    exact = jax.grad(mean)(variables['params'])
    self.assertGreater(jnp.abs(grads['trunk']['kernel']).max(), 0)
    if rule.name != 'equilibrium_propagation':
      self.assertAlmostEqual(value, mean(variables['params']), 12)
      for head in ('policy', 'value'):  # Two readouts: both are exact.
        self.assert_close(grads[head], exact[head], 1e-12)
    if rule.name == 'backprop':
      self.assert_close(grads, exact, 1e-12)
    if rule.name == 'direct_feedback_alignment':  # The errors of both.
      self.assertEqual(feedback['policy'].shape, (4, 8))
    self.assertEqual(jax.tree.structure(aux.output), jax.tree.structure(
        jax.eval_shape(_Heads(kind).apply, variables, x)))

  @parameterized.parameters(*(
      name for name in bpjax.rules.names()
      if name not in ('forward_gradient', 'equilibrium_propagation')))
  def test_probabilities_teach_as_logits_do(self, name):

    class Model(nn.Module):
      ends: str

      @nn.compact
      def __call__(self, x):
        for width in (8, 7):
          x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(3)(x)
        return jax.nn.log_softmax(x) if self.ends == 'probabilities' else x

    negative = lambda out, y: -jnp.take_along_axis(out, y[:, None], 1)[:, 0]
    x = jax.random.normal(jax.random.key(0), (6, 5))
    y = jnp.arange(6) % 3
    arguments = {'sigma': 0.} if name.endswith('target_propagation') else {}
    rule = bpjax.rules.get(name)(**arguments)
    updates = []
    for ends, loss in (('logits', _LOSS), ('probabilities', negative)):
      net, variables, x = float64.setup(Model(ends), x)
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      updates.append(zoo.learn(rule, net, loss)(
          variables, feedback, x, y, jax.random.key(2))[1])
    self.assert_close(*updates, 1e-12)


class InputsTest(float64.Float64TestCase):

  @parameterized.parameters(
      'train', 'training', 'is_training', 'deterministic')
  def test_flags(self, flag):
    """A model whose default is evaluation is trained in training mode."""

    off = flag == 'deterministic'
    source = (f'def __call__(self, x, {flag}={off}):\n'
              f'  drop = {flag} if {off} else not {flag}\n'
              '  x = nn.Dropout(.5, deterministic=drop)(nn.Dense(32)(x))\n'
              '  return nn.Dense(3)(x)\n')
    scope = {'nn': nn}
    exec(source, scope)  # pylint: disable=exec-used
    model = type('Model', (nn.Module,), {
        '__call__': nn.compact(scope['__call__'])})()
    x, y = jnp.ones((4, 5)), jnp.zeros(4, int)
    net = bpjax.from_linen(model)
    variables = net.init(jax.random.key(0), x)
    learn = zoo.learn(bpjax.rules.backprop(), net)
    outputs = [learn(variables, {}, x, y, jax.random.key(i))[0][1].output
               for i in range(2)]
    self.assertGreater(jnp.abs(outputs[0] - outputs[1]).max(), 0)
    self.assert_close(net.apply(variables, x), net.apply(variables, x), 0)
    self.assertIn(f'{flag}={not off}', str(net.units))

  def test_keywords(self):

    class Masked(nn.Module):

      @nn.compact
      def __call__(self, x, *, mask, table):
        h = nn.tanh(nn.Dense(8)(x)) * mask[..., None]
        return nn.Dense(3)(h.sum(1) + table.sum(0))

    x = bpjax.Inputs(
        jnp.ones((4, 6, 5)), mask=jnp.ones((4, 6)), table=jnp.ones((2, 8)))
    net = bpjax.from_linen(Masked())
    variables = net.init(jax.random.key(0), x)
    rule = bpjax.rules.feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    y = jnp.zeros(4, int)
    zoo.learn(rule, net)(variables, feedback, x, y)
    grads = zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, y)[1][0]
    expected = jax.grad(lambda p: _LOSS(Masked().apply(
        {'params': p}, *x.args, **x.kwargs), y).mean())(variables['params'])
    self.assert_close(grads, expected, 1e-6)
    self.assertEqual(net.apply(variables, x).shape, (4, 3))

  def test_a_named_tuple_is_one_input(self):

    class Sum(nn.Module):

      @nn.compact
      def __call__(self, pair):
        return nn.Dense(3)(pair.a) + nn.Dense(3)(pair.b)

    x = _Pair(jnp.ones((4, 5)), jnp.ones((4, 6)))
    net = bpjax.from_linen(Sum())
    variables = net.init(jax.random.key(0), x)
    self.assertEqual(list(net.units), ['Dense_0', 'Dense_1'])
    zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, jnp.zeros(4, int))

  def test_a_key_among_the_inputs(self):

    def noisy(params, key, x):
      h = jnp.tanh(x @ params['a'] + jax.random.normal(key, (x.shape[0], 8)))
      return h @ params['o']

    params = {'a': jnp.ones((5, 8)), 'o': jnp.ones((8, 3))}
    net = bpjax.from_function(noisy)
    x = (jax.random.key(3), jnp.ones((4, 5)))
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, {'params': params}, x)
    (_, aux), _ = zoo.learn(rule, net)(
        {'params': params}, feedback, x, jnp.zeros(4, int))
    self.assertEqual(aux.output.shape, (4, 3))

  def test_random_streams_as_an_argument(self):

    class Drop(nnx.Module):

      def __init__(self, rngs):
        self.a = nnx.Linear(5, 16, rngs=rngs)
        self.o = nnx.Linear(16, 3, rngs=rngs)

      def __call__(self, x, rngs):
        keep = jax.random.bernoulli(rngs(), .5, (x.shape[0], 16))
        return self.o(self.a(x) * keep)

    net = bpjax.from_nnx(Drop(nnx.Rngs(0)))
    x, y = jnp.ones((4, 5)), jnp.zeros(4, int)
    variables = net.init(jax.random.key(0), x)
    learn = zoo.learn(bpjax.rules.backprop(), net)
    outputs = [learn(variables, {}, x, y, jax.random.key(i))[0][1].output
               for i in range(2)]
    self.assertGreater(jnp.abs(outputs[0] - outputs[1]).max(), 0)


class _Recurrent(nn.Module):
  """A recurrent cell in the middle; some hold two units in one module."""
  cell: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(5, param_dtype=x.dtype)(x)
    x = nn.RNN(getattr(nn, self.cell)(6, param_dtype=x.dtype))(x)
    return nn.Dense(3, param_dtype=x.dtype)(x[:, -1])


class SharedModuleTest(float64.Float64TestCase):

  @parameterized.product(
      cell=('OptimizedLSTMCell', 'GRUCell'),
      name=('kolen_pollack', 'weight_mirror'))
  def test_units_of_one_module_keep_their_feedback_apart(self, cell, name):
    """Under Kolen-Pollack with B = W, feedback learns as the weights do."""
    x = jax.random.normal(jax.random.key(0), (4, 3, 5))
    y = jnp.arange(4) % 3
    net = bpjax.from_linen(_Recurrent(cell))
    variables = net.init(jax.random.key(1), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(2), net, variables, x)
    if name == 'kolen_pollack':
      feedback = jax.tree.unflatten(jax.tree.structure(feedback), [
          bpjax.paths.subtree(variables['params'], place)
          for place in bpjax.paths.leaf_names(feedback)])
    (_, aux), (grads, changes) = rule.value_and_grad(net, _LOSS)(
        variables, feedback, x, y, key=jax.random.key(3))
    self.assertEqual(jax.tree.structure(changes), jax.tree.structure(feedback))
    del aux
    if name == 'kolen_pollack':
      for place, change in bpjax.paths.leaves(changes).items():
        self.assert_close(change, bpjax.paths.subtree(grads, place), 1e-12)


if __name__ == '__main__':
  absltest.main()
