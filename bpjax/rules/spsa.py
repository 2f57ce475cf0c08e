"""SPSA: one random direction, two losses, no derivative at all.

Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation, Spall, IEEE Transactions on Automatic Control 1992; Fine-tuning
language models with just forward passes, Malladi, Gao, Nichani, Damian, Lee,
Chen and Arora, NeurIPS 2023 (https://arxiv.org/abs/2305.17333).
"""

from bpjax import arguments
from bpjax import base
from bpjax.engines import base as engine
import jax
import jax.numpy as jnp


def spsa(epsilon: float = 1e-3, samples: int = 1) -> engine.Base:
  r"""SPSA (MeZO): the change of the loss along a random direction of weights.

  .. math::
    g = \frac{\ell(\theta + \epsilon z) - \ell(\theta - \epsilon z)}{2 \epsilon}
    \, z, \qquad z \sim N(0, I)

  :math:`z` is drawn from its key wherever it is used and never kept, and the two
  passes come one after the other: a step needs the memory of inference and of
  the updates. In expectation this is the gradient, up to :math:`O(\epsilon^2)`;
  its variance grows with the number of weights, so that training from scratch
  is slow and fine-tuning is where it is used.

  It sees no derivatives, and so no `stop_gradient`: freeze weights in the
  optimiser (`optax.masked`), or keep them out of the parameters.

  What fails: rates of backprop (ours are a hundred times smaller); an epsilon so
  small that the losses differ by rounding alone.

  Args:
    epsilon: the distance that weights are moved by.
    samples: directions a step, averaged; two passes each.

  Returns:
    A rule without feedback. The value is the mean of all the losses, and
    `aux.output` that at :math:`\theta + \epsilon z`.

  Raises:
    ValueError: for a value out of range; for a step without a key.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.spsa(samples=4)
  """
  arguments.number('epsilon', epsilon, above=0)
  arguments.whole('samples', samples)
  return _Spsa(epsilon, int(samples))


class _Spsa(engine.Base):
  """The rule."""
  name = 'spsa'

  def __init__(self, epsilon, samples):
    self._epsilon, self._samples = epsilon, samples

  def differentiate(self, net, loss, variables, feedback, x, y, key):
    if key is None:
      raise ValueError(
          f'`key` is needed: rule `{self.name}` draws a direction; pass '
          '`key=jax.random.key(...)`.')
    params = variables['params']
    key, own_key = jax.random.split(key)

    def run(step, direction_key):
      """The losses where the weights have moved `step` along the direction."""
      moved = _along(lambda p, z: p + step * z, params, direction_key)
      output, state, _ = self.recorded(
          net, {**variables, 'params': moved}, x, key)
      return loss(output, y), output, state

    def sample(total, direction_key):
      # A loop holds the memory of one pass, not of two.
      losses, outputs, states = jax.lax.map(
          lambda step: run(step, direction_key),
          jnp.array([self._epsilon, -self._epsilon]))
      slope = jnp.sum(losses[0] - losses[1]) / (2 * self._epsilon)
      total = _along(
          lambda t, z: t + slope * z / self._samples, total, direction_key)
      first = lambda tree: jax.tree.map(lambda a: a[0], tree)
      return total, (losses, first(outputs), first(states))

    grads, (losses, outputs, states) = jax.lax.scan(
        sample, jax.tree.map(jnp.zeros_like, params),
        jax.random.split(own_key, self._samples))
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)
    return (jnp.mean(losses), base.Aux(first(outputs), first(states)), grads,
            losses[0, 0].size)


def _along(move, tree, key):
  """`move(leaf, z)` for every leaf of numbers, z drawn again from the key."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [
      move(a, jax.random.normal(k, a.shape, a.dtype)).astype(a.dtype)
      if jnp.issubdtype(a.dtype, jnp.inexact) else a
      for a, k in zip(leaves, keys)])
