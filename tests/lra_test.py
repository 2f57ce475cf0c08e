"""Local representation alignment against numpy, and in its limits."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np
import reference_targets as reference
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy
_RECURSIVE = bpjax.rules.recursive_local_representation_alignment
_CHAIN = bpjax.rules.local_representation_alignment
_WIDTHS = (6, 5, 7, 6)
_PHI = {'tanh': nn.tanh, 'relu': nn.relu, 'elu': nn.elu, 'sign': jnp.sign,
        'identity': lambda x: x}


class Chain(nn.Module):
  activation: str = 'tanh'

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(_WIDTHS, 1):
      x = bpjax.nn.Layer(
          functools.partial(nn.Dense, width), _PHI[self.activation], name=f'unit_{i}')(x)
    return nn.Dense(4, name='unit_5')(x)


def affine(unit):
  return unit.get('affine', unit)


class ReferenceTest(float64.Float64TestCase):

  def setup(self, activation='tanh'):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    net, variables, x = float64.setup(Chain(activation), x)
    params = [
        jax.tree.map(np.asarray, affine(variables['params'][f'unit_{i}']))
        for i in range(1, 6)]
    return net, variables, x, jnp.arange(6) % 4, params

  def wires(self, feedback, wiring):
    """{i: E of i's wire, [d_i, d_j]}, from where the rule keeps it."""
    found = {}
    for i, j in wiring.items():
      own = feedback.get(f'unit_{i}', {})
      if 'direct' in own:
        found[i] = np.asarray(own['direct']).T
      else:
        found[i] = np.asarray(affine(feedback[f'unit_{j}'])['kernel'])
    return found

  def learn(self, rule, net, variables, x, y):
    feedback = float64.doubles(
        rule.init(jax.random.key(1), net, variables, x))
    _, (grads, feedback_grads) = zoo.learn(rule, net, reduction='sum')(
        variables, feedback, x, y)
    return feedback, grads, feedback_grads

  def check(self, rule, wiring, activation='tanh', **arguments):
    net, variables, x, y, params = self.setup(activation)
    feedback, grads, feedback_grads = self.learn(rule, net, variables, x, y)
    wires = self.wires(feedback, wiring)
    expected = reference.recursive_local_representation_alignment(
        params, wires, wiring, np.asarray(x), np.asarray(y),
        activation=activation, **arguments)
    for i, updates in enumerate(expected.updates, 1):
      self.assert_close(
          jax.tree.map(np.asarray, affine(grads[f'unit_{i}'])), updates, 1e-12)
    return expected, self.wires(feedback_grads, wiring)

  @parameterized.product(
      activation=('tanh', 'relu', 'elu', 'sign'),
      update=('transpose', 'eq6', 'fixed'), l2_share=(1., .3))
  def test_chain(self, activation, update, l2_share):
    rule = _CHAIN(beta=.2, gamma=.7, update=update, l2_share=l2_share)
    expected, learned = self.check(
        rule, reference.chain_wiring(5), activation, beta=.2, gamma=.7,
        mode=update, l2_share=l2_share)
    for i, wire in learned.items():
      np.testing.assert_allclose(wire, expected.feedback_updates[i], atol=1e-12)

  @parameterized.product(update=('fixed', 'eq6'), inner=('chain_in_gap', 'meta'),
                         gap=(2, 3))
  def test_depth_two(self, update, inner, gap):
    rule = _RECURSIVE(
        inner, gap, beta=.2, gamma=.7, update=update, direct_update=update)
    expected, learned = self.check(
        rule, reference.gap_wiring(5, gap, inner), beta=.2, gamma=.7,
        mode=update)
    for i, wire in learned.items():
      np.testing.assert_allclose(wire, expected.feedback_updates[i], atol=1e-12)

  @parameterized.product(
      activation=('tanh', 'elu'), kind=('chain', 'direct', 'meta'),
      l2_share=(1., .3))
  def test_the_derivative_by_the_wires(self, activation, kind, l2_share):
    rule = _RECURSIVE(kind, 2, beta=.2, update='dx', l2_share=l2_share)
    wiring = {
        'chain': reference.chain_wiring(5), 'direct': reference.direct_wiring(5),
        'meta': reference.gap_wiring(5, 2, 'meta')}[kind]
    expected, learned = self.check(
        rule, wiring, activation, beta=.2, mode='dx', l2_share=l2_share)
    for i, wire in learned.items():
      np.testing.assert_allclose(wire, expected.feedback_updates[i], atol=1e-12)

  def test_the_discrepancy_falls(self):
    net, variables, x, y, params = self.setup()
    rule = _RECURSIVE('meta', beta=.2)
    feedback, grads, _ = self.learn(rule, net, variables, x, y)
    wiring = reference.gap_wiring(5, 2, 'meta')
    targets = reference.recursive_local_representation_alignment(
        params, self.wires(feedback, wiring), wiring, np.asarray(x),
        np.asarray(y), beta=.2).targets
    after = [
        {k: p[k] - 1e-3 * np.asarray(affine(grads[f'unit_{i}'])[k]) for k in p}
        for i, p in enumerate(params, 1)]
    before, after = (
        reference.total_discrepancy(p, targets, np.asarray(x))
        for p in (params, after))
    self.assertLess(after, before)

  def test_linear_units_at_any_step_are_backprop(self):
    net, variables, x, y, _ = self.setup('identity')
    for model in (Chain('identity'), nn.Sequential(
        [nn.Dense(width) for width in (*_WIDTHS, 4)])):
      net, variables, x = float64.setup(model, x)
      exact = zoo.learn(bpjax.rules.backprop(), net)(variables, {}, x, y)[1][0]
      rule = _CHAIN(beta=.7)
      feedback = bpjax.paths.map_with_name(
          lambda name, _: bpjax.paths.subtree(variables['params'], name),
          rule.init(jax.random.key(1), net, variables, x))
      grads = zoo.learn(rule, net)(variables, feedback, x, y)[1][0]
      names = sorted(grads)
      for i, name in enumerate(names, 1):
        np.testing.assert_allclose(
            affine(grads[name])['kernel'] / .7**(5 - i),
            affine(exact[name])['kernel'], atol=1e-12)

  def test_sources_at_one_depth_are_independent(self):
    # By the jaxpr: which wires each unit's update could depend on at all.
    net, variables, x, y, _ = self.setup()
    rule = _RECURSIVE('meta', 2)  # unit_2, unit_4 at the output; 1 and 3 below.
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = rule.value_and_grad(net, _LOSS)
    inputs = bpjax.paths.leaf_names(feedback)

    def wires_behind(unit):
      jaxpr = jax.make_jaxpr(
          lambda f: learn(variables, f, x, y)[1][0][unit])(feedback).jaxpr
      _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
      return {name for name, read in zip(inputs, used) if read}

    direct = {'unit_2/direct', 'unit_4/direct'}
    self.assertEqual(wires_behind('unit_2') & direct, {'unit_2/direct'})
    self.assertEqual(wires_behind('unit_4') & direct, {'unit_4/direct'})
    self.assertEqual(wires_behind('unit_1') & direct, {'unit_2/direct'})
    self.assertEqual(wires_behind('unit_3') & direct, {'unit_4/direct'})

  def test_depth_one(self):
    self.check(_RECURSIVE(beta=.2), reference.direct_wiring(5), beta=.2)

  def test_any_graph(self):
    wiring = {1: 3, 2: 5, 3: 4, 4: 2}
    named = {f'unit_{i}': f'unit_{j}' for i, j in wiring.items()}
    expected, learned = self.check(
        _RECURSIVE(named, beta=.2, gamma=.7, update='eq6', direct_update='eq6'),
        wiring, beta=.2, gamma=.7, mode='eq6')
    for i, wire in learned.items():
      np.testing.assert_allclose(wire, expected.feedback_updates[i], atol=1e-12)

  def test_small_steps_are_backprop_where_the_wires_are_the_weights(self):
    net, variables, x, y, _ = self.setup()
    exact = zoo.learn(bpjax.rules.backprop(), net, reduction='sum')(
        variables, {}, x, y)[1][0]
    worst = []
    for beta in (1e-1, 1e-2):
      rule = _CHAIN(beta=beta)
      feedback = rule.init(jax.random.key(1), net, variables, x)
      feedback = bpjax.paths.map_with_name(
          lambda name, _: bpjax.paths.subtree(variables['params'], name),
          feedback)
      grads = zoo.learn(rule, net, reduction='sum')(
          variables, feedback, x, y)[1][0]
      errors = []
      for i in range(1, 6):
        ours, theirs = (affine(g[f'unit_{i}'])['kernel'] for g in (grads, exact))
        errors.append(float(
            jnp.linalg.norm(ours / beta**(5 - i) - theirs)
            / jnp.linalg.norm(theirs)))
      worst.append(max(errors))
    self.assertLess(worst[0], .3)
    self.assertLess(worst[1], .15 * worst[0])

  def test_direct_wires_are_direct_feedback_in_the_limit(self):
    net, variables, x, y, _ = self.setup()
    rule = _RECURSIVE(beta=1e-5)
    feedback, grads, _ = self.learn(rule, net, variables, x, y)
    dfa = bpjax.rules.direct_feedback_alignment()
    matrices = {
        f'unit_{i + 1}': feedback[f'unit_{i}']['direct'] for i in range(1, 5)}
    expected = zoo.learn(dfa, net, reduction='sum')(
        variables, matrices, x, y)[1][0]
    for i in range(1, 5):
      np.testing.assert_allclose(
          affine(grads[f'unit_{i}'])['kernel'] / 1e-5,
          affine(expected[f'unit_{i}'])['kernel'], atol=1e-4)

  def test_a_step_of_zero_teaches_no_hidden_unit(self):
    net, variables, x, y, _ = self.setup()
    _, grads, _ = self.learn(_RECURSIVE('meta', beta=0.), net, variables, x, y)
    for i in range(1, 5):
      kernel = affine(grads[f'unit_{i}'])['kernel']
      self.assertLess(jnp.abs(kernel).max(), 1e-14)  # Rounding of phi(a).
    self.assertGreater(jnp.abs(grads['unit_5']['kernel']).max(), 0)

  def test_the_norm_of_updates_is_bounded(self):
    net, variables, x, y, _ = self.setup()
    rule = _RECURSIVE('chain_in_gap', radius=1e-3)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, grads = zoo.learn(rule, net)(variables, feedback, x, y)
    norms = [float(jnp.linalg.norm(g.ravel())) for g in jax.tree.leaves(grads)]
    self.assertLess(max(norms), 1e-3 * (1 + 1e-9))
    self.assertGreater(sorted(norms)[-3], .99e-3)

  def test_which_feedback_learns(self):
    net, variables, x, _, _ = self.setup()
    rule = _RECURSIVE('chain_in_gap')
    feedback = rule.init(jax.random.key(1), net, variables, x)
    self.assertEqual(rule.trainable(feedback), {
        'unit_2': {'affine': {'kernel': True}, 'direct': False},
        'unit_4': {'affine': {'kernel': True}, 'direct': False}})

  def test_the_error_is_all_that_a_block_knows_of_those_above(self):
    # With the output's error as the only loss, linear in the output, the
    # updates of units 1 and 2 cannot depend on the weights of units 3 to 5.
    net, variables, x, _, _ = self.setup()
    error = jax.random.normal(jax.random.key(5), (6, 4), jnp.float64)
    loss = lambda output, error: jnp.sum(output * error, axis=1)
    rule = _RECURSIVE('meta', 2, beta=.2)
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = zoo.learn(rule, net, loss)
    below = lambda params: {
        i: learn({'params': params}, feedback, x, error)[1][0][i]
        for i in ('unit_1', 'unit_2')}
    changed = {
        name: jax.tree.map(lambda w: w + 1., unit)
        if name in ('unit_3', 'unit_4', 'unit_5') else unit
        for name, unit in variables['params'].items()}
    self.assert_close(below(variables['params']), below(changed), 0)


class Blocks(nn.Module):
  """Residual blocks, inside of which another rule than LRA can be at work."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='stem')(x)
    for i in range(3):
      x = Block(name=f'block_{i}')(x)
    return nn.Dense(4, name='head')(x)


class Block(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.tanh(x + nn.Dense(6)(nn.LayerNorm()(nn.tanh(nn.Dense(5)(x)))))


class HybridTest(float64.Float64TestCase):

  def learned(self, rule, wiring_of=None):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    net, variables, x = float64.setup(
        Blocks(), x, boundaries=['block_[01]'])
    y = jnp.arange(6) % 4
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    (_, aux), (grads, _) = zoo.learn(rule, net, reduction='sum')(
        variables, feedback, x, y)
    error = jax.nn.softmax(aux.output) - jax.nn.one_hot(y, 4)
    return net, variables, x, feedback, grads, error

  @parameterized.parameters('direct', 'chain')
  def test_backprop_inside_blocks(self, wiring):
    rule = bpjax.rules.by_path({
        '*/boundary': _RECURSIVE(wiring, beta=.2),
        '*': bpjax.rules.backprop()})
    _, variables, x, feedback, grads, error = self.learned(rule)
    params = variables['params']
    wires = [feedback[f'block_{i}']['boundary']['direct'] for i in (0, 1)]
    sent = {1: .2 * error @ wires[1]}
    sent[0] = .2 * (error if wiring == 'direct' else sent[1]) @ wires[0]

    def stage(names, own, h):
      for name in names:
        h = (nn.Dense(6).apply({'params': own[name]}, h) if name == 'stem'
             else Block().apply({'params': own[name]}, h))
      return h

    h = x
    for i, names in enumerate((('stem', 'block_0'), ('block_1',))):
      own = {name: params[name] for name in names}
      h, pull = jax.vjp(lambda own: stage(names, own, h), own)  # pylint: disable=cell-var-from-loop
      expected, = pull(sent[i])
      self.assert_close(
          {name: {k: v for k, v in grads[name].items() if k != 'boundary'}
           for name in names}, expected, 1e-12)

  def test_other_rules_inside_blocks(self):
    rule = bpjax.rules.by_path({
        '*/boundary': _RECURSIVE(beta=.2), 'head': bpjax.rules.backprop(),
        '*': bpjax.rules.feedback_alignment()})
    _, _, _, feedback, grads, _ = self.learned(rule)
    self.assertIn('kernel', feedback['block_0']['Dense_1'])
    self.assertGreater(jnp.abs(grads['stem']['kernel']).max(), 0)

  def test_a_unit_of_another_rule_below(self):
    rule = bpjax.rules.by_path({
        'unit_[12]': bpjax.rules.backprop(), '*': _RECURSIVE()})
    x = jnp.ones((2, 5))
    net = bpjax.from_linen(Chain())
    with self.assertRaisesRegex(ValueError, '`unit_2` gets no error'):
      rule.init(
          jax.random.key(0), net, net.init(jax.random.key(0), x), x)


class ConvolutionsTest(float64.Float64TestCase):

  def test_wires_between_maps(self):

    class Net(nn.Module):

      @nn.compact
      def __call__(self, x):
        for i, width in enumerate((3, 4, 5)):
          conv = functools.partial(nn.Conv, width, kernel_size=(3, 3))
          x = bpjax.nn.Layer(conv, nn.tanh, name=f'conv_{i}')(x)
          if i == 1:
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(4, name='head')(x.reshape(x.shape[0], -1))

    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    net, variables, x = float64.setup(Net(), x)
    rule = _RECURSIVE('chain_in_gap', 2, beta=.2)
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    self.assertEqual(jax.tree.map(jnp.shape, feedback), {
        'conv_1': {'affine': {'kernel': (3, 3, 3, 4)}, 'direct': (4, 4, 4, 4)},
        'head': {'kernel': (20, 4)}})
    (_, aux), (grads, feedback_grads) = zoo.learn(rule, net, reduction='sum')(
        variables, feedback, x, jnp.arange(3))
    error = jax.nn.softmax(aux.output) - jax.nn.one_hot(jnp.arange(3), 4)
    params = variables['params']
    conv = lambda p, x: nn.Conv(p['kernel'].shape[-1], (3, 3)).apply(
        {'params': p}, x)
    a0 = conv(params['conv_0']['affine'], x)
    a1 = conv(params['conv_1']['affine'], nn.tanh(a0))
    e1 = nn.tanh(a1) - nn.tanh(
        a1 - .2 * jnp.einsum('nc,chwk->nhwk', error, feedback['conv_1']['direct']))
    back = {**params['conv_1']['affine'], **feedback['conv_1']['affine']}
    d0, = jax.vjp(lambda h: conv(back, h), nn.tanh(a0))[1](e1)
    e0 = nn.tanh(a0) - nn.tanh(a0 - .2 * d0)
    expected = {}
    for name, error, below in (('conv_0', e0, x), ('conv_1', e1, nn.tanh(a0))):
      expected[name] = {'affine': jax.vjp(
          lambda p: conv(p, below), params[name]['affine'])[1](error)[0]}  # pylint: disable=cell-var-from-loop
    self.assert_close({n: grads[n] for n in expected}, expected, 1e-12)
    self.assert_close(
        feedback_grads['conv_1']['affine']['kernel'],
        expected['conv_1']['affine']['kernel'], 1e-12)


class RefusedTest(parameterized.TestCase):

  def refuse(self, rule, model, message, x=None):
    net = bpjax.from_linen(model)
    x = jnp.ones((2, 5)) if x is None else x
    variables = net.init(jax.random.key(0), x)
    with self.assertRaisesRegex(ValueError, message):
      rule.init(jax.random.key(1), net, variables, x)

  def test_a_derivative_that_is_zero(self):
    net = bpjax.from_linen(Chain('sign'))
    x, y = jnp.ones((2, 5)), jnp.zeros(2, int)
    variables = net.init(jax.random.key(0), x)
    rule = _RECURSIVE(update='dx')
    feedback = rule.init(jax.random.key(1), net, variables, x)
    with self.assertRaisesRegex(ValueError, "'dx' needs an activation"):
      jax.eval_shape(
          rule.value_and_grad(net, _LOSS), variables, feedback, x, y)

  @parameterized.parameters(
      ({'unit_1': 'unit_9'}, 'no unit'),
      ({'unit_1': 'output'}, 'has none for `unit_2`'),
      ({'unit_1': 'unit_3', 'unit_2': 'output', 'unit_3': 'unit_1',
        'unit_4': 'output'}, 'goes round'))
  def test_wirings(self, wiring, message):
    self.refuse(_RECURSIVE(wiring), Chain(), message)

  @parameterized.parameters(
      ({'wiring': 'star'}, '`wiring` must'), ({'gap': 0}, '`gap` must'),
      ({'beta': -1.}, '`beta` must'), ({'update': 'dy'}, '`update` must'),
      ({'direct_update': 'transpose'}, 'has no weights'),
      ({'l2_share': 2.}, '`l2_share` must'), ({'scale': 0.}, '`scale` must'))
  def test_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      _RECURSIVE(**arguments)


if __name__ == '__main__':
  absltest.main()
