"""Activation functions by name, for the models that experiments choose."""

from collections.abc import Callable
import functools
import re

from bpjax import paths
import flax.linen as nn
import jax.numpy as jnp

_KNOWN = {
    'abs': jnp.abs, 'elu': nn.elu, 'gelu': nn.gelu, 'identity': lambda x: x,
    'leaky_relu': nn.leaky_relu, 'relu': nn.relu, 'sigmoid': nn.sigmoid,
    'sign': jnp.sign, 'softplus': nn.softplus, 'swish': nn.swish,
    'tanh': nn.tanh,
}


def get(
    name: str, argument: str = 'activation'
) -> Callable[[jnp.ndarray], jnp.ndarray]:
  """The elementwise function called `name`.

  Args:
    name: such as 'tanh'; 'leaky_relu(-.5)' has that slope below zero (.01
      without a number).
    argument: what it is called in an error.

  Raises:
    ValueError: for an unknown name, with the nearest ones.

  Example:
    >>> get('tanh')(0.)
    Array(0., dtype=float32, weak_type=True)
  """
  if not isinstance(name, str):
    raise ValueError(
        f'`{argument}` must be the name of a function, got {name!r}; Known: '
        f'{", ".join(_KNOWN)}.')
  slope = re.fullmatch(r'leaky_relu\(([-+]?(?:\d+\.?\d*|\.\d+))\)', name)
  if slope:
    return functools.partial(nn.leaky_relu, negative_slope=float(slope[1]))
  if name not in _KNOWN:
    raise ValueError(
        f'`{argument}` must be a known function, got {name!r}; '
        f'{paths.nearest(name, _KNOWN)}.')
  return _KNOWN[name]
