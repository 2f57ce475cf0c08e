"""Blocks on eight devices learn what they learn on one."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
from tests import float64

_LOSS = bpjax.losses.softmax_cross_entropy
_STAGES, _MICROBATCHES, _WIDTH, _BATCH, _CLASSES = 8, 2, 6, 8, 3
_RULES = bpjax.rules
# Rule, whether the blocks end in boundaries, whether anything goes back.
_CASES = {
    'backprop': (_RULES.backprop(), False, True),
    'direct': (_RULES.direct_feedback_alignment(), True, False),
    'direct, no boundaries': (
        _RULES.direct_feedback_alignment(), False, True),
    'direct rec-LRA': (
        _RULES.recursive_local_representation_alignment(), False, False),
    'local': (bpjax.local(_RULES.backprop(), ['block_*']), False, False),
}


class Block(nn.Module):

  @nn.compact
  def __call__(self, x):
    y = nn.tanh(nn.Dense(x.shape[-1])(x))
    return nn.tanh(nn.Dense(x.shape[-1])(y))


class Chain(nn.Module):
  """Equal blocks between a first layer and a readout."""
  widths: tuple[int, ...] = (_WIDTH,) * _STAGES

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(_WIDTH)(x))
    for i, width in enumerate(self.widths):
      x = nn.Dense(width)(x) if width != _WIDTH else x
      x = Block(name=f'block_{i}')(x)
    return nn.Dense(_CLASSES)(x)


def _case(name, model):
  rule, bounded, goes_back = _CASES[name]
  net, variables, x = float64.setup(
      model, jax.random.normal(jax.random.key(0), (_BATCH, 5)),
      boundaries=['block_*'] if bounded else ())
  return rule, net, variables, x, jnp.arange(_BATCH) % _CLASSES, goes_back


def _bytes(text, kind):
  """The sizes of the results of a kind of collective, in bytes."""
  found = re.findall(rf'= \(?(\w)(\d+)\[([\d,]*)\][^=]* {kind}(?:-start)?\(', text)
  sizes = []
  for _, bits, shape in found:
    size = int(bits) // 8
    for n in filter(None, shape.split(',')):
      size *= int(n)
    sizes.append(size)
  return sizes


class PipelineTest(float64.Float64TestCase):

  @parameterized.parameters(*_CASES)
  def test_equals_one_device(self, name):
    rule, net, variables, x, y, goes_back = _case(name, Chain())
    feedback = rule.init(jax.random.key(1), net, variables, x)
    (value, _), expected = jax.jit(rule.value_and_grad(net, _LOSS))(
        variables, feedback, x, y)
    piped = bpjax.pipeline(
        rule, net, blocks=['block_*'], microbatches=_MICROBATCHES)
    with jax.set_mesh(jax.make_mesh((_STAGES,), ('layers',))):
      held = piped.init(jax.random.key(1), variables, x)
      self.assert_close(piped.unstack(held[1]), feedback, 1e-15)
      step = jax.jit(piped.value_and_grad(_LOSS)).lower(*held, x, y).compile()
      values, (grads, feedback_grads) = jax.device_get(step(*held, x, y))
    self.assertAlmostEqual(float(values[-1]), float(value), delta=1e-12)
    self.assertFalse(values[:-1].any())
    self.assert_close(piped.unstack(grads), expected[0], 1e-12)
    self.assert_close(piped.unstack(feedback_grads), expected[1], 1e-12)

    # What crosses devices: activations forward; back, messages or one error.
    text = step.as_text()
    hops = _MICROBATCHES + _STAGES - 2
    sizes = _bytes(text, 'collective-permute')
    self.assertLen(sizes, hops * (1 + goes_back))
    self.assertEqual(set(sizes), {8 * _BATCH // _MICROBATCHES * _WIDTH})
    told = name.startswith('direct')
    self.assertEqual(
        _bytes(text, 'all-reduce'), [8 * _BATCH * _CLASSES] * told)
    self.assertNotRegex(text, ' (all-gather|all-to-all|reduce-scatter)')

  @parameterized.parameters(
      ({'axis': 'stages'}, Chain(), '`axis` .stages. is none of'),
      ({'microbatches': 3}, Chain(), '`microbatches` must divide the batch'),
      ({}, Chain((_WIDTH,) * 6), 'the 6 blocks must divide by the 8'),
      ({}, Chain((_WIDTH, 5) * 4), 'and nothing else lie between them'),
      ({'blocks': ['layer_*']}, Chain(), '`blocks` must choose modules'))
  def test_refuses(self, arguments, model, message):
    rule, net, variables, x, *_ = _case('backprop', model)
    piped = bpjax.pipeline(rule, net, **{'blocks': ['block_*'], **arguments})
    with jax.set_mesh(jax.make_mesh((_STAGES,), ('layers',))):
      with self.assertRaisesRegex(ValueError, message):
        piped.init(jax.random.key(1), variables, x)

  def test_refuses_rules_without_units(self):
    net = bpjax.from_linen(Chain())
    with self.assertRaisesRegex(ValueError, 'of the credit engine'):
      bpjax.pipeline(_RULES.forward_gradient(), net, blocks=['block_*'])

  def test_refuses_parts_of_a_batch_whose_examples_meet(self):
    net = bpjax.from_linen(Chain())
    rule = bpjax.local(_RULES.backprop(), ['block_*'],
                       loss=bpjax.local_losses.similarity(_CLASSES))
    bpjax.pipeline(rule, net, blocks=['block_*'])
    with self.assertRaisesRegex(ValueError, 'must be 1 with the similarity'):
      bpjax.pipeline(rule, net, blocks=['block_*'], microbatches=2)


if __name__ == '__main__':
  absltest.main()
