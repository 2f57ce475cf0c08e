"""Models as they stand in public: their units, what is exact, and B = W.

That feedback with B = W equals `jax.grad`, here in float64, cannot find a
missed unit, so that every model states the units and the exact parameters that
it expects.
"""

import architectures
import bpjax
import control_flow
import expected
import jax
import jax.numpy as jnp
import numpy as np
import pytest

_CASES = {**architectures.ARCHITECTURES, **{
    f'flow_{name}': case for name, case in control_flow.CASES.items()}}
_TOLERANCE = 1e-12
# What is computed in bfloat16 has a relative precision of 2e-3.
_LOOSE = {'flow_bf16_params': 1e-2, 'flow_bf16_compute': 1e-2}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _network(case):
  """The network, its variables, an input, labels and the loss."""
  if isinstance(case, control_flow.Case):
    net = bpjax.from_function(case.apply)
    loss = bpjax.losses.softmax_cross_entropy
    return net, {'params': case.params}, case.x, control_flow.LABELS, loss
  net, variables = architectures.network(case)
  return net, variables, case.x, case.y, case.loss


def _doubles(tree):
  """Numbers of 32 bits with 64; what is narrower is a case of its own."""
  wide = {'float32': jnp.float64, 'complex64': jnp.complex128}
  return jax.tree.map(
      lambda a: jnp.asarray(a, wide.get(str(a.dtype), a.dtype)), tree)


def _floats(tree):
  """Path -> leaf, of those that have a derivative."""
  return {path: leaf for path, leaf in bpjax.paths.leaves(tree).items()
          if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _deviation(a, b, least=0.):
  """The largest difference of two arrays, over the largest entry."""
  difference = np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)
  return difference / (max(np.abs(b).max(initial=0), least) or 1.)


@pytest.mark.parametrize('name', _CASES)
def test_units_and_feedback_equal_to_weights(name):
  case = _CASES[name]
  net, variables, x, y, loss = _network(case)
  variables, x, y = _doubles((dict(variables), x, y))
  key = jax.random.key(7)
  rule = bpjax.rules.feedback_alignment()
  feedback = rule.init(jax.random.key(2), net, variables, x)
  assert set(net.units) == set(case.units)
  assert set(net.units.exact) == set(case.exact)
  same = jax.tree.unflatten(jax.tree.structure(feedback), [
      bpjax.paths.subtree(variables['params'], place)
      for place in bpjax.paths.leaf_names(feedback)])
  learn = rule.value_and_grad(net, loss)

  @jax.jit
  def run(variables, *kinds):
    # The loop compiles the rule once for both kinds of feedback.
    kinds = jax.tree.map(lambda *both: jnp.stack(both), *kinds)
    grads = jax.lax.map(
        lambda i: _floats(learn(
            variables, jax.tree.map(lambda f: f[i], kinds), x, y, key)[1][0]),
        jnp.arange(2))
    return grads, _floats(expected.gradient(net, loss, variables, x, y, key))

  grads, exact = run(variables, same, feedback)
  # Where nothing but rounding is left (a key's bias), the others are the scale.
  least = 1e-3 * max(np.abs(g).max(initial=0) for g in exact.values())
  for path, gradient in exact.items():
    found = _deviation(grads[path][0], gradient, least)
    assert found <= _LOOSE.get(name, _TOLERANCE), (path, found)
  if jax.tree.leaves(feedback):
    assert any(
        _deviation(grads[path][1], gradient) > 1e-3
        for path, gradient in exact.items())


if __name__ == '__main__':
  pytest.main([__file__])
