"""Target rules on models as they stand, against the same ones of `Layer`s."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import zoo

_BATCH = 6
_INVERSES = ('target_propagation', 'difference_target_propagation')
_RULES = (*zoo.TARGETS, *zoo.SETTLING)


class _Model(nn.Module):
  """An MLP, residual blocks or a conv net with pooling; with `Layer`s or not."""
  kind: str
  layers: bool

  @nn.compact
  def __call__(self, x):
    if self.kind == 'conv':
      x = x.reshape(_BATCH, 7, 1, 1) * jnp.arange(1., 9.).reshape(1, 1, 8, 1)
      for width in (4, 6):
        x = self._unit(functools.partial(nn.Conv, width, (3, 3)), x)
        x = nn.max_pool(x, (2, 2), (2, 2), 'SAME')
      return nn.Dense(5)(x.reshape(_BATCH, -1))
    widths = (17, 13, 11) if self.kind == 'mlp' else (9,)
    for width in widths:
      x = self._unit(functools.partial(nn.Dense, width), x)
    for _ in range(2 if self.kind == 'residual' else 0):
      x = self._unit(functools.partial(nn.Dense, 9), x, x)
    return nn.Dense(5)(x)

  def _unit(self, affine, x, *skips):
    if self.layers:
      return bpjax.nn.Layer(affine, nn.tanh)(x, *skips)
    return nn.tanh(sum(skips, affine()(x)))


def _flattened(part):
  """What a `Layer` holds, as its affine module alone would hold it."""
  if not isinstance(part, dict) or 'affine' not in part:
    return part
  return {**part['affine'], **{k: v for k, v in part.items() if k != 'affine'}}


class SegmentsTest(float64.Float64TestCase):

  # Of an inverse pooling belongs to the unit here, and not to the `Layer`.
  @parameterized.parameters(*(
      (rule, kind) for rule in _RULES for kind in ('mlp', 'residual', 'conv')
      if kind != 'conv' or rule not in _INVERSES))
  def test_as_with_layers(self, rule, kind):
    key = jax.random.key(3)
    x = jax.random.normal(key, (_BATCH, 7))
    y = jnp.arange(_BATCH) % 5
    rule = bpjax.rules.get(rule)(**({'sigma': 0.} if rule in _INVERSES else {}))
    net, variables, x = float64.setup(_Model(kind, True), x)
    plain = bpjax.from_linen(_Model(kind, False))
    plain.init(key, x)
    names = dict(zip(net.units, plain.units))
    move = lambda tree: {
        new: _flattened(bpjax.paths.subtree(tree, old))
        for old, new in names.items()
        if bpjax.paths.subtree(tree, old) is not None}
    feedback = float64.doubles(rule.init(key, net, variables, x))
    own = {'params': move(variables['params'])}
    self.assertEqual(
        jax.tree.structure(rule.init(key, plain, own, x)),
        jax.tree.structure(move(feedback)))
    _, expected = zoo.learn(rule, net)(variables, feedback, x, y, key)
    _, updates = zoo.learn(rule, plain)(own, move(feedback), x, y, key)
    self.assert_close(updates, tuple(map(move, expected)), 1e-14)
    for leaf in jax.tree.leaves(updates[0]):
      self.assertGreater(jnp.abs(leaf).max(), 0)

  def test_pooling_belongs_to_the_segment_of_an_inverse(self):
    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(_Model('conv', False), x)
    rule = bpjax.rules.difference_target_propagation()
    infos = rule.infos(net, variables, x)
    self.assertEqual(infos['Conv_0'].pre.shape, (_BATCH, 7, 8, 4))
    self.assertEqual(infos['Conv_0'].out.shape, (_BATCH, 4, 4, 4))
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    _, (grads, _) = zoo.learn(rule, net)(
        variables, feedback, x, jnp.arange(_BATCH) % 5, jax.random.key(2))
    for leaf in jax.tree.leaves(grads):
      self.assertGreater(jnp.abs(leaf).max(), 0)

  def test_a_gain_inside_a_segment_is_not_trained(self):

    class Norms(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.LayerNorm()(nn.Dense(6)(x)))
        return nn.Dense(5)(x)

    x = jax.random.normal(jax.random.key(3), (_BATCH, 7))
    net, variables, x = float64.setup(Norms(), x)
    rule = bpjax.rules.local_representation_alignment()
    feedback = float64.doubles(rule.init(jax.random.key(1), net, variables, x))
    self.assertEqual(rule.units(net, variables, x)['LayerNorm_0/scale'],
                     'not trained (inside unit `Dense_0`)')
    _, (grads, _) = zoo.learn(rule, net)(
        variables, feedback, x, jnp.arange(_BATCH) % 5)
    self.assertEqual(jnp.abs(grads['LayerNorm_0']['scale']).max(), 0)
    self.assertGreater(jnp.abs(grads['Dense_0']['kernel']).max(), 0)


if __name__ == '__main__':
  absltest.main()
