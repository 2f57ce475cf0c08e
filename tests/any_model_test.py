"""Models as they stand in public: their units, what is exact, and B = W.

That feedback with B = W equals `jax.grad` cannot find a missed unit, so that
every model states the units and the exact parameters that it expects.
"""

import architectures
import bpjax
from bpjax.networks import network
import control_flow
import jax
import jax.numpy as jnp
import numpy as np
import pytest

_CASES = {**architectures.ARCHITECTURES, **{
    f'flow_{name}': case for name, case in control_flow.CASES.items()}}


def _network(case):
  """The network, its variables, an input, labels and the loss."""
  if isinstance(case, control_flow.Case):
    net = bpjax.from_function(case.apply)
    loss = bpjax.losses.softmax_cross_entropy
    return net, {'params': case.params}, case.x, control_flow.LABELS, loss
  if case.api == 'function':
    apply, params = case.make()
    net = bpjax.from_function(apply)
    return net, {'params': params}, case.x, case.y, case.loss
  make = bpjax.from_linen if case.api == 'linen' else bpjax.from_nnx
  net = make(case.make())
  return net, net.init(jax.random.key(1), case.x), case.x, case.y, case.loss


def _exact_gradient(net, variables, x, y, loss, key):
  """`jax.grad` of the model itself, in training mode."""
  state = {c: v for c, v in variables.items() if c != 'params'}

  def total(params):
    notes = network.Notes(lambda kind, name, module: False)
    run_key, _ = jax.random.split(key)
    model_key, _ = jax.random.split(run_key)
    output, _ = net._call(params, state, x, model_key, True, notes)
    losses = loss(output, y)
    return jnp.sum(losses), losses.size

  # Of the sum, as rules are taught: a derivative of an author's own need not be
  # linear in the error.
  grads, size = jax.jit(jax.grad(total, has_aux=True, allow_int=True))(
      variables['params'])
  return jax.tree.map(
      lambda g: g / size if jnp.issubdtype(g.dtype, jnp.inexact) else g, grads)


def _relative(a, b):
  a, b = np.asarray(a), np.asarray(b)
  return np.abs(a - b).max() / (np.abs(b).max() + 1e-9)


@pytest.mark.parametrize('name', _CASES)
def test_units_and_feedback_equal_to_weights(name):
  case = _CASES[name]
  net, variables, x, y, loss = _network(case)
  key = jax.random.key(7)
  rule = bpjax.rules.feedback_alignment()
  feedback = rule.init(jax.random.key(2), net, variables, x)
  assert set(net.units) == set(case.units)
  assert set(net.units.exact) == set(case.exact)
  learn = jax.jit(rule.value_and_grad(net, loss))
  places = bpjax.paths.leaf_names(feedback)
  same = jax.tree.unflatten(
      jax.tree.structure(feedback),
      [bpjax.paths.subtree(variables['params'], place) for place in places])
  _, (grads, _) = learn(variables, same, x, y, key=key)
  expected = _exact_gradient(net, variables, x, y, loss, key)
  for path, a, b in zip(bpjax.paths.leaf_names(expected),
                        jax.tree.leaves(grads), jax.tree.leaves(expected)):
    if jnp.issubdtype(b.dtype, jnp.inexact):
      assert _relative(a, b) < 2e-5 or np.abs(a - b).max() < 1e-7, path
  if jax.tree.leaves(feedback):
    _, (other, _) = learn(variables, feedback, x, y, key=key)
    assert any(
        _relative(a, b) > 1e-3 for a, b in zip(
            jax.tree.leaves(other), jax.tree.leaves(expected)))


if __name__ == '__main__':
  pytest.main([__file__])
