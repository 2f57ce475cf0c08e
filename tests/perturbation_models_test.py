"""Forward gradient on models that nobody wrote for it: the mean, exactly."""

import any_model_test
import bpjax
import expected
import flax.linen as nn
import jax
import jax.numpy as jnp
import norm_gain_test
import numpy as np
import pytest

LOSS = bpjax.losses.softmax_cross_entropy
RULE = bpjax.rules.forward_gradient
KEY = jax.random.key(7)
# Ties, lookups, loops, branches, gates, norms; parameters that meet data as
# gains, in two ways, or in an operation that no place stands for.
MODELS = (
    'attend', 'gru', 'spiking', 'graph', 'actor_critic', 'clip', 'soft_experts',
    'switch', 'tied_autoencoder', 'weight_norm', 'scan', 'nnx_rnn',
    'flow_scan_in_scan', 'flow_cond_in_scan', 'flow_hebbian_carry',
    'flow_lora_merged', 'flow_view_and_direct', 'flow_solve')


def _case(name):
  """The network, its variables, an input, labels and the loss."""
  return any_model_test._network(any_model_test._CASES[name])  # pylint: disable=protected-access


def assert_mean_is_the_gradient(net, variables, x, y, loss=LOSS, **arguments):
  rule = RULE(**arguments)
  got = expected.mean_update(rule, net, loss, variables, x, y, KEY)
  exact = expected.gradient(net, loss, variables, x, y, KEY)
  for name, a, b in zip(bpjax.paths.leaf_names(exact), jax.tree.leaves(got),
                        jax.tree.leaves(exact)):
    np.testing.assert_allclose(
        a, b, atol=2e-3 * np.abs(b).max() + 2e-6, err_msg=name)
  return got


@pytest.mark.parametrize('name', MODELS)
def test_activity(name):
  net, variables, x, y, loss = _case(name)
  assert_mean_is_the_gradient(net, variables, x, y, loss)


@pytest.mark.parametrize(
    'name', ['gru', 'clip', 'flow_cond_in_scan', 'flow_view_and_direct'])
def test_weight(name):
  net, variables, x, y, loss = _case(name)
  assert_mean_is_the_gradient(net, variables, x, y, loss, perturb='weight')


@pytest.mark.parametrize(
    'name', ['resnet', 'clip', 'actor_critic', 'flow_maml'])
def test_without_an_exact_readout(name):
  net, variables, x, y, loss = _case(name)
  assert_mean_is_the_gradient(
      net, variables, x, y, loss, exact_readout=False)


def _made(module, *shape):
  x = jax.random.normal(jax.random.key(0), shape)
  net = bpjax.from_linen(module)
  return net, net.init(jax.random.key(1), x), x, jnp.arange(len(x)) % 3


class HandNorm(nn.Module):
  """Normalised over the batch by hand: examples meet, and part again."""

  @nn.compact
  def __call__(self, x):
    h = nn.Dense(6, name='below')(x)
    h = nn.tanh((h - h.mean(0)) / jnp.sqrt(h.var(0) + .1))
    return nn.Dense(3, name='readout')(
        nn.tanh(nn.Dense(5, name='above')(h)))


def test_examples_that_meet():
  net, variables, x, y = _made(HandNorm(), 4, 5)
  assert_mean_is_the_gradient(net, variables, x, y)
  # Above the norm, each example's change is its own.
  learn = jax.jit(RULE().value_and_grad(net, LOSS))
  grads = jax.vmap(lambda key: learn(variables, {}, x, y, key)[1][0])(
      jax.random.split(KEY, 500))
  spread = lambda g: float(jnp.var(g, 0).sum())
  assert spread(grads['above']['kernel']) < spread(grads['below']['kernel'])
  for noise in ('shared', 'independent'):
    perturb = 'activity' if noise == 'shared' else 'weight'
    with pytest.raises(ValueError, match='`noise` must be None where an exam'):
      jax.eval_shape(lambda: RULE(perturb, noise=noise).value_and_grad(
          net, LOSS)(variables, {}, x, y, KEY))


def test_losses_in_which_examples_meet():
  net, variables, x, _ = _made(nn.Sequential(
      [nn.Dense(6), nn.tanh, nn.Dense(4)]), 4, 5)
  contrast = lambda out, y: LOSS(out @ out.T, y)
  for arguments in ({}, {'epsilon': 1e-2, 'antithetic': True}):
    assert_mean_is_the_gradient(
        net, variables, x, jnp.arange(4), contrast, exact_readout=False,
        **arguments)


class Heads(nn.Module):
  turned: bool

  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Dense(6, name='trunk')(x))
    heads = [nn.Dense(3, name='a'), nn.Dense(4, name='output')]
    outs = [head(h) for head in (heads[::-1] if self.turned else heads)]
    return tuple(outs[::-1] if self.turned else outs)


@pytest.mark.parametrize('turned', [False, True])
def test_two_heads_are_exact(turned):
  net, variables, x, y = _made(Heads(turned), 4, 5)
  loss = lambda outs, y: LOSS(outs[0], y) + LOSS(outs[1], y)
  exact = expected.gradient(net, loss, variables, x, y, KEY)
  grads = jax.jit(RULE().value_and_grad(net, loss))(
      variables, {}, x, y, KEY)[1][0]
  for name in ('a', 'output'):
    np.testing.assert_allclose(
        grads[name]['kernel'], exact[name]['kernel'], rtol=1e-5, atol=1e-7)
  trunk = grads['trunk']['kernel'] - exact['trunk']['kernel']
  assert np.abs(trunk).max() > 1e-2


class Stopped(nn.Module):
  """What no derivative comes back to: a backbone, an unused output."""

  @nn.compact
  def __call__(self, x):
    h = jax.lax.stop_gradient(nn.Dense(6, name='back')(x))
    nn.Dense(4, name='unused')(h)
    h = nn.tanh(nn.Dense(6, name='hidden')(h))
    return nn.Dense(3, name='readout')(h)


@pytest.mark.parametrize('arguments', [
    {}, {'perturb': 'weight'}, {'exact_readout': False}, {'epsilon': 1e-3},
    {'noise': 'shared'}, {'directions': 'orthogonal', 'samples': 2}])
def test_nothing_is_learned_behind_a_stop(arguments):
  net, variables, x, y = _made(Stopped(), 4, 5)
  grads = jax.jit(RULE(**arguments).value_and_grad(net, LOSS))(
      variables, {}, x, y, KEY)[1][0]
  for name in ('back', 'unused'):
    assert not np.any(grads[name]['kernel']), name
  assert np.any(grads['hidden']['kernel'])


class Names(nn.Module):
  """A collection and modules called as the engine might call its own."""

  @nn.compact
  def __call__(self, x):
    count = self.variable('noise', 'count', lambda: jnp.zeros(()))
    count.value += 1
    h = nn.tanh(nn.Dense(6, name='output')(x))
    h = nn.tanh(nn.Dense(6, name='blocks')(h))
    return nn.Dense(3, name='call_0')(h) + 0 * count.value


def test_names_are_the_models():
  net, variables, x, y = _made(Names(), 4, 5)
  assert_mean_is_the_gradient(net, variables, x, y)
  (_, aux), _ = RULE().value_and_grad(net, LOSS)(variables, {}, x, y, KEY)
  assert aux.model_state['noise']['count'] == variables['noise']['count'] + 1
  rule = bpjax.local(RULE(), ['output', 'blocks'])
  feedback = rule.init(KEY, net, variables, x)
  assert set(feedback['heads']) == {'output', 'blocks'}
  for made in (rule, bpjax.local(bpjax.rules.backprop(), ['output', 'blocks'])):
    _, (grads, heads) = jax.jit(made.value_and_grad(net, LOSS))(
        variables, feedback, x, y, KEY)
    for leaf in jax.tree.leaves((grads, heads)):
      assert np.any(leaf)


def test_a_gain_that_messages_leave_out():
  for api in ('linen', 'nnx'):
    net, variables, x, _ = norm_gain_test.nets(
        api, 'layer', norm_gain_transport='feedback_diag')
    got = expected.mean_update(
        RULE(), net, LOSS, variables, x, jnp.arange(8) % 3, KEY)
    net, *_ = norm_gain_test.nets(api, 'layer')
    exact = expected.gradient(
        net, LOSS, variables, x, jnp.arange(8) % 3, KEY)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact)):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_a_derivative_in_reverse_alone_is_refused():
  net, variables, x, y, loss = _case('flow_customvjp_linear')
  with pytest.raises(ValueError, match='calls `_clipped_product`, which has'):
    jax.eval_shape(lambda: RULE().value_and_grad(net, loss)(
        variables, {}, x, y, KEY))
  RULE(epsilon=1e-3).value_and_grad(net, loss)(variables, {}, x, y, KEY)


class Rectifier(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return bpjax.nn.rectified(self, 'layer', nn.Dense(5, name='layer')(x)), None


class Rectifiers(nn.Module):
  """Rectified layers in a loop, or the same ones written out."""
  scan: bool

  @nn.compact
  def __call__(self, x):
    if self.scan:
      scan = nn.scan(Rectifier, variable_axes={'params': 0}, length=2,
                     split_rngs={'params': True})
      x, _ = scan(name='layers')(x, None)
    else:
      for i in range(2):
        x, _ = Rectifier(name=f'layer_{i}')(x, None)
    return nn.Dense(3, name='readout')(x)


def test_rectifiers_in_a_loop_are_those_written_out():
  net, variables, x, y = _made(Rectifiers(True), 4, 5)
  stacked = variables['params']['layers']
  apart = {f'layer_{i}': jax.tree.map(lambda p, i=i: p[i], stacked)
           for i in range(2)}
  flat = bpjax.from_linen(Rectifiers(False))
  params = {**apart, 'readout': variables['params']['readout']}

  def noise(net, variables):
    _, signals = RULE().signals(net, LOSS, variables, {}, x, y, KEY)
    leaves = jax.tree.leaves(signals)
    return [leaf for s in leaves for leaf in (s if s.ndim == 3 else [s])]

  on = [np.asarray(s) != 0 for s in noise(flat, {'params': params})]
  assert 0 < sum(m.sum() for m in on) < 40
  for a, b in zip(noise(net, variables), on):
    np.testing.assert_array_equal(np.asarray(a) != 0, b)


if __name__ == '__main__':
  pytest.main([__file__])
