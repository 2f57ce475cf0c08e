"""Steps that follow each other without a flush learn what they learn in turn."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tests import pipeline_test

_LOSS = bpjax.losses.softmax_cross_entropy
_BLOCKS, _RULES = ['block_*'], bpjax.rules
_STEPS, _BATCH, _CLASSES, _WIDTH = 4, 8, 3, 6


class Bare(nn.Module):
  """Blocks that read the data themselves."""

  @nn.compact
  def __call__(self, x):
    for i in range(8):
      x = pipeline_test.Block(name=f'block_{i}')(x)
    return nn.Dense(_CLASSES)(x)


def _data(steps=_STEPS):
  x = jax.random.normal(jax.random.key(0), (steps, _BATCH, _WIDTH))
  return x, jnp.argmax(x[..., :_CLASSES], axis=-1)


def _piped(rule, microbatches, model=pipeline_test.Chain):
  net = bpjax.from_linen(model())
  x, y = _data()
  variables = jax.jit(net.init)(jax.random.key(1), x[0])
  return net, variables, x, y, bpjax.pipeline(
      rule, net, blocks=_BLOCKS, microbatches=microbatches)


def _mesh(stages):
  return jax.set_mesh(jax.make_mesh(
      (stages,), ('layers',), devices=jax.devices()[:stages]))


def _in_turn(rule, net, tx, variables, feedback, x, y):
  """The same steps on one device: values, parameters and feedback."""
  learn = rule.value_and_grad(net, _LOSS)
  tx = bpjax.optimizer(tx, rule, feedback)

  @jax.jit
  def step(trees, state, x, y):
    (value, _), grads = learn({'params': trees[0]}, trees[1], x, y)
    updates, state = tx.update(grads, state, trees)
    return optax.apply_updates(trees, updates), state, value

  trees = variables['params'], feedback
  state, values = tx.init(trees), []
  for now in range(len(x)):
    trees, state, value = step(trees, state, x[now], y[now])
    values.append(float(value))
  return values, *trees


class StepsTest(parameterized.TestCase):

  def assert_close(self, a, b, tolerance):
    self.assertEqual(jax.tree.structure(a), jax.tree.structure(b))
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_allclose(p, q, rtol=0, atol=tolerance)

  @parameterized.parameters(
      (8, 2, _RULES.backprop(), pipeline_test.Chain,
       optax.adam(1e-2, eps=1e-2)),
      (4, 1, _RULES.backprop(), pipeline_test.Chain,
       optax.adamw(1e-2, eps=1e-2)),
      (2, 4, _RULES.direct_feedback_alignment(stored=False), Bare,
       optax.adam(1e-2, eps=1e-2)),
      (1, 2, _RULES.kolen_pollack(), Bare, optax.sgd(.1, momentum=.9)))
  def test_equals_steps_in_turn(self, stages, microbatches, rule, model, tx):
    rule = bpjax.local(rule, _BLOCKS, head_scale=2.)
    net, variables, x, y, piped = _piped(rule, microbatches, model)
    feedback = rule.init(jax.random.key(2), net, variables, x[0])
    values, params, trained = _in_turn(
        rule, net, tx, variables, feedback, x, y)
    with _mesh(stages):
      held = piped.init(jax.random.key(2), variables, x[0])
      state = piped.init_optimizer(tx, *held)
      learn = jax.jit(piped.steps(_LOSS, tx)).lower(
          *held, state, x, y).compile()
      found, (*held, state) = learn(*held, state, x, y)
      found = jax.device_get(found)
    for leaf in jax.tree.leaves(state):
      self.assertEqual(leaf.sharding.spec[0], 'layers')
    self.assertGreater(
        np.abs(variables['params']['block_7']['Dense_1']['kernel']
               - params['block_7']['Dense_1']['kernel']).max(), 1e-2)
    self.assert_close(found[-1], np.array(values), 1e-6)
    self.assertFalse(found[:-1].any())
    self.assert_close(piped.unstack(held[0]['params']), params, 1e-6)
    self.assert_close(piped.unstack(held[1]), trained, 1e-6)

    # One loop of ticks; in it one hop, forward, and nothing else crosses.
    text = learn.as_text()
    ticks = _STEPS * microbatches + stages - 1
    self.assertRegex(text, rf'"known_trip_count":\{{"n":"{ticks}"\}}')
    hops = [line for line in text.splitlines()
            if re.search(r' collective-permute(-start)?\(', line)]
    self.assertLen(hops, stages > 1)
    for line in hops:
      self.assertIn('/forward/', line)
    self.assertNotRegex(
        text, r' (all-reduce|all-gather|all-to-all|reduce-scatter)(-start)?\(')

  @parameterized.parameters(
      ({'rule': _RULES.backprop()}, 'needs local losses, since under'),
      ({'rule': _RULES.direct_feedback_alignment()},
       "`bpjax.local.rule, blocks.`, or `value_and_grad`"),
      ({'tx': 1e-3}, '`tx` must be an optax transformation'),
      ({'tx': optax.chain(optax.clip_by_global_norm(1.), optax.sgd(.1))},
       'must work on each array alone.*leave out what joins'),
      ({'y': jnp.zeros((_STEPS + 1, _BATCH), int)}, 'must be .steps, batch'),
      ({'microbatches': 8, 'steps': slice(None, None, 2)},
       '`microbatches` must divide the batch of 4, got 8'),
      ({'init': False}, 'call `init` first'))
  def test_refuses(self, given, message):
    given = {
        'rule': bpjax.local(_RULES.backprop(), _BLOCKS), 'microbatches': 2,
        'tx': optax.sgd(.1), 'steps': slice(None), 'init': True, **given}
    _, variables, x, y, piped = _piped(given['rule'], given['microbatches'])
    y = given.get('y', y)
    with _mesh(8), self.assertRaisesRegex(ValueError, message):
      held = piped.init(jax.random.key(2), variables, x[0])
      learn = piped.steps(_LOSS, given['tx'])
      state = piped.init_optimizer(given['tx'], *held)
      if not given['init']:
        piped = bpjax.pipeline(piped.rule, piped.net, blocks=_BLOCKS)
        piped.init_optimizer(given['tx'], *held)
      jax.eval_shape(learn, *held, state, x[:, given['steps']],
                     y[:, given['steps']])


if __name__ == '__main__':
  absltest.main()
