"""Linen modules that are units together with their nonlinearity."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp


class Layer(nn.Module):
  """An affine operation with what follows it, as one unit.

  Rules that set targets (`bpjax.rules.local_representation_alignment` and
  others) move the pre-activation of a unit, and so need to own its nonlinearity:
  a bare `nn.tanh` between two modules belongs to none. Under every other rule
  the module is what it looks like. `bpjax.from_linen` takes it for a unit.

  Attributes:
    affine: makes the affine operation, such as `functools.partial(nn.Dense,
      256)`; it takes the module's `name`.
    activation: what follows it, a function of arrays of one shape. It may be one
      without a derivative, such as `jnp.sign`, under rules that take none.

  Example:
    >>> import functools, jax
    >>> hidden = Layer(functools.partial(nn.Dense, 8), nn.tanh)
    >>> model = nn.Sequential([hidden, nn.Dense(3)])
    >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape
    (2, 3)
  """
  affine: Callable[..., nn.Module]
  activation: Callable[[jnp.ndarray], jnp.ndarray]

  @nn.compact
  def __call__(
      self, x: jnp.ndarray, skip: jnp.ndarray | None = None) -> jnp.ndarray:
    """`activation(affine(x) + skip)`.

    Args:
      x: input `[batch, ...]`.
      skip: added before the activation, in the shape of the affine operation's
        output: a residual connection that the unit owns.

    Returns:
      An array in the shape of the affine operation's output.
    """
    pre = self.affine(name='affine')(x)
    return self.activation(pre if skip is None else pre + skip)
