"""Rules on models where examples, weights or states lie in an unusual way."""

import any_model_test
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

LOSS = bpjax.losses.softmax_cross_entropy
KEY = jax.random.key(7)


def _case(name):
  """The network, its variables, an input, labels and the loss."""
  # pylint: disable=protected-access
  return any_model_test._network(any_model_test._CASES[name])


@pytest.mark.parametrize('name,rule,unit', [
    # A lookup that is the first unit has no inverse, and no noise to mirror.
    ('gpt', 'target_propagation', 'wte'),
    ('gpt', 'weight_mirror', 'wte'),
    # Examples on the second axis.
    ('soft_experts', 'recursive_local_representation_alignment', 'experts'),
    ('soft_experts', 'weight_mirror', 'experts'),
    # Kernels of each example's own.
    ('hard_experts', 'weight_mirror', 'experts'),
    ('flow_ragged', 'weight_mirror', 'e'),
    # States that would stay at 0, where relu has no slope.
    ('nnx_mlp', 'equilibrium_propagation', 'hidden'),
])
def test_learns(name, rule, unit):
  net, variables, x, y, loss = _case(name)
  rule = bpjax.rules.get(rule)()
  feedback = rule.init(jax.random.key(2), net, variables, x)
  grads = jax.jit(rule.value_and_grad(net, loss))(
      variables, feedback, x, y, key=KEY)[1]
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()
  assert any(np.any(leaf) for leaf in jax.tree.leaves(
      bpjax.paths.subtree(grads[0], unit)))


@pytest.mark.parametrize('name,picked', [
    ('soft_experts', (0, 1, 2)), ('hard_experts', (2,))])
def test_mirrors_of_experts(name, picked):
  """B comes to W for each expert that the data picks, and stays for others."""
  net, variables, x, y, loss = _case(name)
  rule = bpjax.rules.weight_mirror(rate=.05, decay=.05, samples=256)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  learn = rule.value_and_grad(net, loss)

  def step(feedback, key):
    update = learn(variables, feedback, x, y, key=key)[1][1]
    return jax.tree.map(jnp.subtract, feedback, update), None

  keys = jax.random.split(KEY, 400)
  mirrored, _ = jax.jit(lambda f: jax.lax.scan(step, f, keys))(feedback)
  drawn = bpjax.paths.leaves(feedback)
  for path, weights in bpjax.paths.leaves(mirrored).items():
    if not path.startswith('experts/'):
      continue
    target = bpjax.paths.subtree(variables['params'], path)
    for i in range(3):
      if i in picked:
        error = jnp.linalg.norm(weights[i] - target[i])
        assert error < .15 * jnp.linalg.norm(target[i]), path
      else:
        np.testing.assert_array_equal(weights[i], drawn[path][i])


def test_relu_states_settle_at_their_drives():
  x = jax.random.normal(jax.random.key(0), (4, 5))
  net = bpjax.from_linen(nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)]))
  variables = net.init(jax.random.key(1), x)
  # A readout that sends next to nothing down.
  params = variables['params']
  params['layers_2']['kernel'] *= 1e-6
  rule = bpjax.rules.equilibrium_propagation(free_steps=60)
  (_, aux), _ = jax.jit(rule.value_and_grad(net, LOSS))(
      variables, {}, x, jnp.arange(4) % 3, key=KEY)
  state = aux.model_state['particles']['layers_0']['call_0']
  drive = x @ params['layers_0']['kernel'] + params['layers_0']['bias']
  np.testing.assert_allclose(nn.relu(state), nn.relu(drive), atol=1e-5)


if __name__ == '__main__':
  pytest.main([__file__])
