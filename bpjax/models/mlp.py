"""Multilayer perceptron."""

from collections.abc import Callable, Sequence
import functools

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
from bpjax import nn as layers
import flax.linen as nn
import jax.numpy as jnp


class MLP(nn.Module):
  """Dense layers with an activation between; see `mlp`."""
  num_classes: int
  widths: Sequence[int]
  activation: Callable[..., jnp.ndarray]
  dropout: float = 0.
  batch_norm: bool = False
  dtype: jnp.dtype | None = None
  start: str = 'lecun'
  units: str = 'affine'

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = x.reshape(x.shape[0], -1)

    def dense(width):
      inits = blocks.initialisers(self.start, x.shape[-1])
      return functools.partial(nn.Dense, width, dtype=self.dtype, **inits)

    for width in self.widths:
      if self.units == 'layer':
        x = layers.Layer(dense(width), self.activation)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        continue
      x = dense(width)()(x)
      if self.batch_norm:
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
      x = self.activation(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return dense(self.num_classes)()(x)


def mlp(
    num_classes: int, widths: Sequence[int] = (256, 256),
    activation: str = 'relu', dropout: float = 0., batch_norm: bool = False,
    dtype: str | None = None, init: str = 'lecun', units: str = 'affine'
) -> MLP:
  """A multilayer perceptron on flattened inputs.

  784-256-256-10 has 269,322 parameters.

  Args:
    num_classes: number of outputs.
    widths: units of each hidden layer.
    activation: a name that `bpjax.activations.get` knows.
    dropout: rate after each hidden layer, in training.
    batch_norm: BatchNorm before each activation.
    dtype: of the computation, such as 'bfloat16'; default that of the inputs.
    init: how the weights begin, a name that `bpjax.blocks.initialisers` knows.
    units: 'affine', or 'layer': each hidden layer is a `bpjax.nn.Layer`, which
      holds its activation, as rules that set targets need; without BatchNorm.

  Returns:
    A module from `[batch, ...]` to logits `[batch, num_classes]`; its call
    takes `train`.

  Raises:
    ValueError: for an unknown activation or init, or widths that are not positive.

  Example:
    >>> model = mlp(10, widths=(64,), activation='tanh')
  """
  widths = tuple(widths) if isinstance(widths, Sequence) else (widths,)
  blocks.check_sizes('widths', *widths)
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_rate('dropout', dropout)
  arguments.flag('batch_norm', batch_norm)
  arguments.dtype('dtype', dtype, blocks.DTYPES)
  arguments.choice('init', init, blocks.INITS)
  arguments.choice('units', units, ('affine', 'layer'))
  if units == 'layer' and batch_norm:
    raise ValueError(
        "`batch_norm` must be False with `units='layer'`, since BatchNorm cannot "
        'be part of a unit.')
  return MLP(
      num_classes, widths, activations.get(activation), dropout, batch_norm,
      dtype and jnp.dtype(dtype), init, units)
