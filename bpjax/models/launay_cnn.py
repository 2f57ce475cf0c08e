"""The convolutional network of Launay et al., 2019."""

from collections.abc import Callable
import functools

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
import flax.linen as nn
import jax.numpy as jnp


class LaunayCNN(nn.Module):
  """Three convolutions with pooling, two dense layers; see `launay_cnn`."""
  num_classes: int
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  batch_norm: bool
  input_dropout: float
  dropout: float
  start: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    blocks.check_images('launay_cnn', x, 15)
    norm = 'batch' if self.batch_norm else 'none'
    inits = functools.partial(blocks.initialisers, self.start)
    # Whole channels, as in the authors' code.
    x = nn.Dropout(
        self.input_dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    for i, channels in enumerate((32, 64, 64), 1):
      x = nn.Conv(
          channels, (5, 5), padding=2, name=f'conv_{i}',
          **inits(25 * x.shape[-1]))(x)
      x = blocks.normalise(self.activation(x), norm, train, f'norm_{i}')
      x = nn.max_pool(x, (3, 3), (2, 2))
    x = x.reshape(x.shape[0], -1)
    x = nn.Dense(128, name='dense', **inits(x.shape[-1]))(x)
    # The authors' order: dropout, activation, norm.
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = blocks.normalise(self.activation(x), norm, train, 'norm_dense')
    return nn.Dense(
        self.num_classes, name='readout', **inits(x.shape[-1]))(x)


def launay_cnn(
    num_classes: int, activation: str = 'tanh', batch_norm: bool = False,
    input_dropout: float = 0., dropout: float = 0., init: str = 'he'
) -> LaunayCNN:
  """The network on which direct feedback fails to train convolutions.

  Principled training of neural networks with direct feedback alignment, Launay,
  Poli and Krzakala, 2019, Table 4 (https://arxiv.org/abs/1906.04554): 5x5
  convolutions to 32, 64 and 64 channels, each with an activation, BatchNorm
  *after* it as an option, and 3x3 max pooling of stride 2 without padding
  (32 -> 15 -> 7 -> 3), then 576-128-classes.

  Parameters for 32x32x3 images and 10 classes:

    conv_1    25*3*32 + 32       2,432
    conv_2    25*32*64 + 64     51,264
    conv_3    25*64*64 + 64    102,464
    dense     576*128 + 128     73,856
    readout   128*10 + 10        1,290
    together                   231,306

  `batch_norm` adds 2*(32 + 64 + 64 + 128) = 576.

  Args:
    num_classes: number of outputs.
    activation: a name that `bpjax.activations.get` knows.
    batch_norm: BatchNorm after each activation, the dense layer's included.
    input_dropout: rate at which whole channels of the input are dropped, in
      training; .1 in the paper's rows with dropout.
    dropout: rate of the dense layer's outputs, before the activation; .1 or .5
      in the paper's rows with dropout.
    init: 'he' (the paper's text: normal, variance 2 / fan-in, biases 0) or
      'torch' (the authors' code: weights and biases uniform within
      `1 / sqrt(fan-in)`).

  Returns:
    A module from images `[batch, height, width, channels]`, at least 15x15, to
    logits `[batch, num_classes]`; its call takes `train`. Units are named
    `conv_1`, `conv_2`, `conv_3`, `dense`, `readout`.

  Raises:
    ValueError: for an unknown activation or init, or a rate outside [0, 1); in
      the call, for images smaller than 15x15.

  Example:
    >>> model = launay_cnn(10, input_dropout=.1, dropout=.1)
  """
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_rate('input_dropout', input_dropout)
  blocks.check_rate('dropout', dropout)
  arguments.choice('init', init, ('he', 'torch'))
  return LaunayCNN(
      num_classes, activations.get(activation), batch_norm, input_dropout,
      dropout, init)
