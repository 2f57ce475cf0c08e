"""Outputs whose examples lie behind another axis: ensembles, time first."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import chex
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
import zoo

_MEMBERS = 4


class _Member(nn.Module):
  image: bool = False

  @nn.compact
  def __call__(self, x):
    if self.image:
      x = nn.tanh(nn.Conv(3, (3, 3), name='conv')(x))
      x = nn.tanh(nn.Conv(2, (3, 3), name='conv_2')(x))
      x = x.reshape(len(x), -1)
    x = nn.tanh(nn.Dense(8, name='hidden')(x))
    return nn.Dense(3, name='readout')(x)


def _ensemble(image=False):
  return nn.vmap(
      _Member, variable_axes={'params': 0}, split_rngs={'params': True},
      in_axes=None, axis_size=_MEMBERS)(image)


def _each(output, y):
  """A loss for every member and example, `[members, batch]`."""
  return bpjax.losses.softmax_cross_entropy(
      output, jnp.broadcast_to(y, output.shape[:2]))


def _mean(output, y):
  """A loss an example, of all members."""
  return _each(output, y).mean(0)


# As many examples as members, where either axis may be the examples', and more.
_BATCHES = (4, 6)


class EnsemblesTest(float64.Float64TestCase):

  @parameterized.product(batch=_BATCHES, loss=(_each, _mean))
  def test_backprop_is_the_gradient(self, batch, loss):
    net, variables, x, y = self._setup(batch)
    rule = bpjax.rules.backprop()
    _, (grads, _) = zoo.learn(rule, net, loss)(variables, {}, x, y)
    exact = jax.grad(
        lambda params: loss(net.apply({'params': params}, x), y).mean())(
            variables['params'])
    chex.assert_trees_all_close(grads, exact, rtol=0, atol=1e-12)

  @parameterized.product(
      batch=_BATCHES, rule=(
          'backprop', 'feedback_alignment', 'direct_feedback_alignment',
          'direct_kolen_pollack', 'kolen_pollack', 'pepita',
          'local_representation_alignment',
          'recursive_local_representation_alignment',
          'direct_difference_target_propagation'))
  def test_an_example_alone_learns_what_it_does_beside_others(
      self, batch, rule):
    """The updates of a batch are the sum of those of its examples."""
    net, variables, x, y = self._setup(batch, image=True)
    rule = bpjax.rules.get(rule)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    learn = functools.partial(
        zoo.learn(rule, net, _mean, reduction='sum'), key=jax.random.key(2))
    _, (together, _) = learn(variables, feedback, x, y)
    half = batch // 2
    parts = [learn(variables, feedback, x[own], y[own])[1][0]
             for own in (slice(half), slice(half, None))]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *a: sum(a), *parts), rtol=0, atol=1e-10)

  @parameterized.parameters(*_BATCHES)
  def test_a_mirror_finds_the_weights_of_every_member(self, batch):
    net, variables, x, y = self._setup(batch, image=True)
    rule = bpjax.rules.weight_mirror(samples=4098)  # No multiple of the batch.
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (_, learned) = zoo.learn(rule, net, _mean, reduction='sum')(
        variables, feedback, x, y, key=jax.random.key(2))
    self.assertSetEqual(set(feedback), {'conv_2', 'hidden', 'readout'})
    for name, b in feedback.items():
      echo = (.01 * b['kernel'] - learned[name]['kernel']) / .01
      np.testing.assert_allclose(
          echo, variables['params'][name]['kernel'], atol=.1)

  @parameterized.parameters(*_BATCHES)
  def test_every_member_gets_its_own_error(self, batch):
    net, variables, x, y = self._setup(batch)
    rule = bpjax.rules.direct_feedback_alignment()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (grads, _) = zoo.learn(rule, net, _each, reduction='sum')(
        variables, feedback, x, y)
    p = jax.tree.map(np.asarray, variables['params'])
    h = np.tanh(np.einsum('bi,mio->mbo', x, p['hidden']['kernel'])
                + p['hidden']['bias'][:, None])
    logits = np.einsum('mbi,mio->mbo', h, p['readout']['kernel']) + (
        p['readout']['bias'][:, None])
    error = np.asarray(jax.nn.softmax(logits) - jax.nn.one_hot(y, 3))
    matrix, = jax.tree.leaves(feedback)
    sent = np.einsum('mbc,ch->mbh', error, matrix) * (1 - h**2)
    np.testing.assert_allclose(
        grads['hidden']['kernel'], np.einsum('bi,mbo->mio', x, sent), atol=1e-12)

  @parameterized.product(
      batch=_BATCHES, loss=(_each, _mean), perturb=('activity', 'weight'))
  def test_forward_gradient_is_unbiased(self, batch, loss, perturb):
    net, variables, x, y = self._setup(batch)
    rule = bpjax.rules.forward_gradient(perturb=perturb)
    keys = jax.random.split(jax.random.key(3), 4000)
    learn = rule.value_and_grad(net, loss)
    step = lambda key: learn(variables, {}, x, y, key)[1][0]['hidden']['kernel']
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(
        step, keys, batch_size=500))(keys))
    exact = jax.grad(
        lambda params: loss(net.apply({'params': params}, x), y).mean())(
            variables['params'])['hidden']['kernel']
    error = (found.mean(0) - exact) / (found.std(0) / len(keys)**.5)
    self.assertLess(np.abs(error).max(), 5.)

  def test_a_loss_of_no_example_is_refused(self):
    net, variables, x, y = self._setup(5)
    with self.assertRaisesRegex(ValueError, 'one loss an example'):
      zoo.learn(bpjax.rules.backprop(), net, lambda o, y: _each(o, y).mean())(
          variables, {}, x, y)

  def _setup(self, batch, image=False):
    shape = (batch, 4, 4, 2) if image else (batch, 7)
    x = jax.random.normal(jax.random.key(1), shape)
    return (*float64.setup(_ensemble(image), x), jnp.arange(batch) % 3)


if __name__ == '__main__':
  absltest.main()
