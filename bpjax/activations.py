"""Activation functions by name, for the models that experiments choose."""

from collections.abc import Callable

from bpjax import paths
import flax.linen as nn
import jax.numpy as jnp

_KNOWN = {
    'abs': jnp.abs, 'elu': nn.elu, 'gelu': nn.gelu, 'identity': lambda x: x,
    'leaky_relu': nn.leaky_relu, 'relu': nn.relu, 'sigmoid': nn.sigmoid,
    'sign': jnp.sign, 'softplus': nn.softplus, 'swish': nn.swish,
    'tanh': nn.tanh,
}


def get(name: str) -> Callable[[jnp.ndarray], jnp.ndarray]:
  """The elementwise function called `name`.

  Raises:
    ValueError: for an unknown name, with the nearest ones.

  Example:
    >>> get('tanh')(0.)
    Array(0., dtype=float32, weak_type=True)
  """
  if name not in _KNOWN:
    raise ValueError(
        f'`activation` must be a known function, got {name!r}; '
        f'{paths.nearest(name, _KNOWN)}.')
  return _KNOWN[name]
