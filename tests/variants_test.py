"""The eleven variants: what each name stands for, and their contrastive loss."""

import functools

from absl.testing import parameterized
import bpjax
from bpjax import replicated
from bpjax.local import losses as local_losses
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

LOSS = bpjax.losses.softmax_cross_entropy
# From the paper: name -> rule, perturbed, and where gradients stop.
PAPER = {
    'BP': ('backprop', None, None),
    'L-BP': ('backprop', None, 'none'),
    'LG-BP': ('backprop', None, 'output'),
    'FA': ('feedback_alignment', None, None),
    'L-FA': ('feedback_alignment', None, 'none'),
    'LG-FA': ('feedback_alignment', None, 'output'),
    'DFA': ('direct_feedback_alignment', None, None),
    'FG-W': ('forward_gradient', 'weight', None),
    'FG-A': ('forward_gradient', 'activity', None),
    'LG-FG-W': ('forward_gradient', 'weight', 'output'),
    'LG-FG-A': ('forward_gradient', 'activity', 'output'),
}


class Net(nn.Module):
  """Two blocks and a readout."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = nn.Dense(4, name=f'block_{i}')(nn.tanh(x))
    return nn.Dense(3, name='readout')(x)


@functools.cache
def setup():
  x = jax.random.normal(jax.random.key(0), (6, 5))
  net, variables, x = float64.setup(Net(), x)
  return net, variables, x, jnp.arange(6) % 3


class VariantsTest(parameterized.TestCase):

  def test_names(self):
    self.assertEqual(bpjax.variants.names(), tuple(PAPER))

  @parameterized.parameters(*PAPER)
  def test_what_a_name_stands_for(self, name):
    kind, perturb, stop = PAPER[name]
    rule = bpjax.variant(name)
    inner = rule if stop is None else rule.rule
    self.assertEqual(inner.name, kind)
    self.assertEqual(getattr(inner, 'perturb', None), perturb)
    if perturb:
      self.assertTrue(inner.exact_readout)
    if stop is not None:
      self.assertEqual(
          (rule.stop, rule.readout, rule.placement, rule.grouped, rule.blocks),
          (stop, 'detached', 'group', True, ('block_*',)))
      self.assertEqual(rule.loss.name, 'prediction')

  @parameterized.parameters(*PAPER)
  def test_with_another_loss(self, name):
    kind, _, stop = PAPER[name]
    rule = bpjax.variant(
        name, loss=local_losses.contrastive(), last='block_7')
    self.assertEqual(rule.rule.name, kind)
    self.assertEqual(rule.loss.name, 'contrastive')
    self.assertEqual(rule.stop, stop or 'none')
    self.assertEqual(rule.readout, 'detached')
    # A perturbation of any entry changes a network's only loss.
    self.assertEqual(
        (rule.blocks, rule.placement),
        (('block_*',), 'group') if stop else (('block_7',), 'block'))

  def test_directions_and_samples(self):
    rule = bpjax.variant('FG-A', directions='orthogonal', samples=3)
    self.assertTrue(rule.orthogonal)
    self.assertEqual(rule.samples, 3)

  @parameterized.parameters(
      ('LG-FGA', {}, 'did you mean `LG-FG-A`'),
      ('FA', dict(loss=local_losses.contrastive()), '`last` must be the path'),
      ('BP', dict(samples=0), '`samples` must be'),
      ('BP', dict(directions='normal'), '`directions` must be'),
      ('BP', dict(placement='pixel'), '`placement` must be'),
      ('BP', dict(head_scale=-1), '`head_scale` must be'),
      ('BP', dict(feedback_scale=0), '`scale` must be positive'))
  def test_refuses(self, name, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      bpjax.variant(name, **arguments)


class ContrastiveTest(float64.Float64TestCase):

  @parameterized.parameters('other', 'both')
  def test_is_the_replicated_loss_of_both_views(self, negatives):
    local = local_losses.contrastive(3, .7, negatives)
    h = jax.random.normal(jax.random.key(0), (6, 2, 2, 4), jnp.float64)
    head = local.init(jax.random.key(1), h, jnp.ones((6, 3)))
    self.assertEqual(head['kernel'].shape, (4, 3))

    def here(h, head):
      losses = local.loss(local.predict(head, h), None, None)
      return jnp.sum(losses), losses

    def written(h, head):
      views = jnp.split(h.reshape(6, 4, 1, 4), 2)
      losses = jnp.concatenate([
          replicated.info_nce(
              v, head, views[1 - i], temperature=.7, negatives=negatives,
              placement='block') for i, v in enumerate(views)])
      return jnp.sum(losses), losses.ravel()

    differentiated = jax.jit(lambda *a: [
        jax.grad(f, (0, 1), has_aux=True)(*a) for f in (here, written)])
    (grads, losses), (expected, values) = differentiated(h, head)
    self.assert_close(losses, values, 1e-12)
    # Equal only where the other view, and the denominators, are constants.
    self.assert_close(grads, expected, 1e-12)

  def test_without_labels_a_global_rule_learns_from_the_last_block(self):
    net, variables, x, y = setup()
    variables = float64.doubles(variables)
    x = float64.doubles(x)
    rule = bpjax.variant(
        'BP', loss=local_losses.contrastive(3), last='block_1', grouped=False)
    feedback = float64.doubles(
        rule.init(jax.random.key(2), net, variables, x))
    self.assertEqual(list(feedback['heads']), ['block_1'])
    _, (grads, own) = jax.jit(rule.value_and_grad(net, LOSS))(
        variables, feedback, x, y)

    def written(params, head):
      h = x
      for i in range(2):
        h = nn.Dense(4).apply({'params': params[f'block_{i}']}, nn.tanh(h))
      views = jnp.split(h.reshape(6, 1, 1, 4), 2)
      nce = sum(
          jnp.sum(replicated.info_nce(views[i], head, views[1 - i]))
          for i in (0, 1)) / 6
      logits = nn.Dense(3).apply(
          {'params': params['readout']}, jax.lax.stop_gradient(h))
      return nce + jnp.mean(LOSS(logits, y))

    expected, head = jax.jit(jax.grad(written, (0, 1)))(
        variables['params'], feedback['heads']['block_1'])
    self.assert_close(grads, expected, 1e-12)
    self.assert_close(own['heads']['block_1'], head, 1e-12)
    self.assertGreater(np.abs(grads['block_0']['kernel']).max(), 1e-3)

  def test_odd_batches(self):
    with self.assertRaisesRegex(ValueError, 'an even number, got 5'):
      local_losses.contrastive().loss(jnp.ones((5, 128)), None, None)

  @parameterized.parameters(
      (dict(dim=0), '`dim`'), (dict(temperature=0.), '`temperature`'),
      (dict(negatives='none'), '`negatives`'), (dict(scale=-1), '`scale`'))
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      local_losses.contrastive(**arguments)

  def test_differences_would_move_what_is_constant(self):
    rule = bpjax.rules.forward_gradient(epsilon=1e-3)
    with self.assertRaisesRegex(ValueError, '`epsilon` must be 0'):
      bpjax.local(rule, ['b'], loss=local_losses.contrastive())


if __name__ == '__main__':
  pytest.main([__file__])
