"""The residual multilayer perceptron of Ororbia et al., 2023."""

from collections.abc import Callable, Sequence
import functools

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
from bpjax import nn as layers
import flax.linen as nn
import jax.numpy as jnp


class ResidualMLP(nn.Module):
  """Dense layers with skips before activations; see `residual_mlp`."""
  num_classes: int
  widths: Sequence[int]
  gap: int
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  start: str

  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)

    def dense(width):
      inits = blocks.initialisers(self.start, x.shape[-1])
      return functools.partial(nn.Dense, width, **inits)

    outputs = [x]  # z_0, z_1, ...
    for i, width in enumerate(self.widths, 1):
      skip = outputs[i - self.gap] if i % self.gap == 0 else None
      if skip is not None and skip.shape[-1] != width:
        skip = None
      x = layers.Layer(
          dense(width), self.activation, name=f'layer_{i}')(x, skip)
      outputs.append(x)
    return dense(self.num_classes)(name='readout')(x)


def residual_mlp(
    num_classes: int, widths: Sequence[int] = (256,) * 5, gap: int = 2,
    activation: str = 'tanh', init: str = 'lecun') -> ResidualMLP:
  r"""A multilayer perceptron whose every `gap`-th layer adds a skip.

  .. math::
    a_l = z_{l-1} W_l + b_l + [l \bmod g = 0]\, z_{l-g}, \qquad
    z_l = \phi(a_l)

  Backpropagation-free deep learning with recursive local representation
  alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023, Algorithm 1 (an earlier
  version: https://arxiv.org/abs/2002.03911). The skip is added *before* the
  activation, as in the algorithm; the paper's text adds it after. It is left
  out where the sizes differ, and the readout has none. (The algorithm prints
  :math:`W_l h_{l-1}` for :math:`W_l z_{l-1}`.)

  Every hidden layer is a `bpjax.nn.Layer`, a unit with its skip and activation,
  so that all rules can train it, those that set targets included.

  Parameters of 784-256-256-256-256-256-10: 466,698

    layer_1             784*256 + 256     200,960
    layer_2 to layer_5  4*(256*256 + 256) 263,168
    readout             256*10 + 10         2,570

  Args:
    num_classes: number of outputs.
    widths: units of each hidden layer.
    gap: g, how many layers a skip passes: 2 or 3 in the paper. The first skip
      is the input's own, where `widths` has its size.
    activation: a name that `bpjax.activations.get` knows.
    init: how the weights begin, a name that `bpjax.blocks.initialisers` knows.

  Returns:
    A module from `[batch, ...]` to logits `[batch, num_classes]`. Units are
    named `layer_1`, `layer_2`, ..., `readout`.

  Raises:
    ValueError: for an unknown activation or init, or sizes that are not
      positive.

  Example:
    >>> model = residual_mlp(10, widths=(64,) * 4, activation='sign')
  """
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('widths', *widths)
  blocks.check_sizes('gap', gap)
  arguments.choice('init', init, blocks.INITS)
  return ResidualMLP(
      num_classes, tuple(widths), gap, activations.get(activation), init)
