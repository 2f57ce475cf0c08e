"""The multilayer perceptron of Launay et al., 2019."""

from collections.abc import Callable, Sequence
import functools

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
import flax.linen as nn
import jax.numpy as jnp


class LaunayMLP(nn.Module):
  """Dense layers with dropout, activation and norm, in this order."""
  num_classes: int
  widths: Sequence[int]
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  batch_norm: bool
  input_dropout: float
  dropout: float
  start: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    norm = 'batch' if self.batch_norm else 'none'
    inits = functools.partial(blocks.initialisers, self.start)
    x = x.reshape(x.shape[0], -1)
    x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
    for i, width in enumerate(self.widths, 1):
      x = nn.Dense(width, name=f'dense_{i}', **inits(x.shape[-1]))(x)
      # The authors' order: dropout, activation, norm.
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
      x = blocks.normalise(self.activation(x), norm, train, f'norm_{i}')
    return nn.Dense(
        self.num_classes, name='readout', **inits(x.shape[-1]))(x)


def launay_mlp(
    num_classes: int, widths: Sequence[int] = (800, 800, 800),
    activation: str = 'tanh', batch_norm: bool = False,
    input_dropout: float = 0., dropout: float = 0., init: str = 'he'
) -> LaunayMLP:
  """The network on which the practices of direct feedback are compared.

  Principled training of neural networks with direct feedback alignment, Launay,
  Poli and Krzakala, 2019, Table 2 (https://arxiv.org/abs/1906.04554). Unlike in
  `mlp`, dropout comes before the activation and BatchNorm *after* it.

  Parameters for 32x32x3 images and 10 classes:

    dense_1  3072*800 + 800    2,458,400
    dense_2   800*800 + 800      640,800
    dense_3   800*800 + 800      640,800
    readout    800*10 + 10         8,010
    together                   3,748,010

  `batch_norm` adds 2*3*800 = 4,800.

  Args:
    num_classes: number of outputs.
    widths: units of each hidden layer.
    activation: a name that `bpjax.activations.get` knows, such as
      'leaky_relu(-.5)'.
    batch_norm: BatchNorm after each activation.
    input_dropout: rate of the inputs, in training; .1 in the paper's rows with
      dropout.
    dropout: rate of each hidden layer, before its activation.
    init: how the weights begin, a name that `bpjax.blocks.initialisers` knows;
      'he' in the paper's text, 'torch' in the authors' code.

  Returns:
    A module from `[batch, ...]` to logits `[batch, num_classes]`; its call
    takes `train`. Units are named `dense_1`, `dense_2`, ..., `readout`.

  Raises:
    ValueError: for an unknown activation or init, a rate outside [0, 1), or
      sizes that are not positive.

  Example:
    >>> model = launay_mlp(10, input_dropout=.1, dropout=.1)
  """
  widths = tuple(widths) if isinstance(widths, Sequence) else (widths,)
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('widths', *widths)
  blocks.check_rate('input_dropout', input_dropout)
  blocks.check_rate('dropout', dropout)
  arguments.choice('init', init, blocks.INITS)
  return LaunayMLP(
      num_classes, widths, activations.get(activation), batch_norm,
      input_dropout, dropout, init)
