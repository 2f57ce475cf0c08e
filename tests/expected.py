"""What forward gradient gives on average, exactly: no draw is needed.

An update is quadratic in the direction, whose entries have no correlation and a
variance of 1: its mean is the sum of the updates along each axis.
"""

import dataclasses

from bpjax.networks import network
import jax
import jax.numpy as jnp


def mean_update(rule, net, loss, variables, x, y, key, feedback=None):
  """The mean of the updates over all draws of the directions."""
  sizes = []

  def updates(index):

    def axis(key, arrays):
      del key
      sizes.append(sum(a.size for a in arrays))
      places = jnp.cumsum(jnp.array([0, *(a.size for a in arrays)]))
      return [(jnp.arange(a.size) + place == index).reshape(a.shape).astype(
          a.dtype) for a, place in zip(arrays, places)]

    along = dataclasses.replace(rule, directions=axis)
    return along.value_and_grad(net, loss)(
        variables, feedback or {}, x, y, key=key)[1][0]

  still = jax.jit(lambda: updates(-1))()  # What is exact, alone.
  total = sizes[0]

  def turn(first, total):
    batch = jax.vmap(updates)(first + jnp.arange(32))
    return jax.tree.map(
        lambda t, b, s: t + (b - s).sum(0), total, batch, still)

  # Beyond the last axis, directions are zero.
  return jax.jit(lambda: jax.lax.fori_loop(
      0, -(-total // 32), lambda i, t: turn(32 * i, t), still))()


def gradient(net, loss, variables, x, y, key):
  """`jax.grad` of the model in training mode, as the engines call it."""
  state = {c: v for c, v in variables.items() if c != 'params'}
  for _ in range(2):
    key, _ = jax.random.split(key)

  def total(params):
    notes = network.Notes(lambda kind, name, module: False)
    output, _ = net._call(params, state, x, key, True, notes)  # pylint: disable=protected-access
    losses = loss(output, y)
    return jnp.sum(losses), losses.size

  # Of the sum, as rules are taught: a derivative of an author's own need not be
  # linear in the error.
  grads, size = jax.jit(jax.grad(total, has_aux=True, allow_int=True))(
      variables['params'])
  return jax.tree.map(
      lambda g: g / size if jnp.issubdtype(g.dtype, jnp.inexact) else g, grads)
