"""A convolutional network for the CIFAR-10 rows of Ororbia et al., 2023."""

from collections.abc import Callable, Sequence
import functools

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
from bpjax import nn as layers
import flax.linen as nn
import jax.numpy as jnp


class OrorbiaCNN(nn.Module):
  """Pairs of convolutions with pooling after each; see `ororbia_cnn`."""
  num_classes: int
  channels: Sequence[int]
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  conv: str
  perturbation: float
  units: str

  @nn.compact
  def __call__(self, x):
    blocks.check_images('ororbia_cnn', x, 2 ** (len(self.channels) // 2))
    for i, channels in enumerate(self.channels, 1):
      affine = functools.partial(
          nn.Conv, channels, (3, 3), kernel_init=blocks.he_normal)
      if self.conv == 'perturbative' and i > 1:
        affine = functools.partial(
            layers.PerturbativeConv, channels, scale=self.perturbation,
            kernel_init=blocks.he_normal)
      name = f'conv_{i}'
      if self.units == 'layer':
        x = layers.Layer(affine, self.activation, name=name)(x)
      else:
        x = self.activation(affine(name=name)(x))
      if i % 2 == 0:
        x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_classes, name='readout')(x)


def ororbia_cnn(
    num_classes: int, channels: Sequence[int] = (64,) * 4,
    activation: str = 'relu', conv: str = 'conv', perturbation: float = .1,
    units: str = 'layer') -> OrorbiaCNN:
  """3x3 convolutions, pooling after every second, and a dense readout.

  For the rows CNN of Backpropagation-free deep learning with recursive local
  representation alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023, Table 2a
  (an earlier version: https://arxiv.org/abs/2002.03911). The paper's text says
  that CNNs were trained on CIFAR-10, and of its residual networks that they
  have 64 filters or noise maps and skips of 2. It does *not* say how many
  layers its CNN has, of which kernels, widths, pooling or activation (that is
  in an appendix that could not be read), so that all of this is a choice here:
  64 maps, four convolutions, pooling of 2x2 at the end of each gap of 2.

  Every hidden layer is a `bpjax.nn.Layer` whose output has the shape of its
  convolution's, with pooling between layers: a target can be set for each.

  Parameters for 32x32x3 images and 10 classes: 153,546, or 55,242 with conv
  'perturbative' (whose noise is 98,304 numbers more, which do not learn)

    conv_1             9*3*64 + 64                     1,792     1,792
    conv_2 to conv_4   3*(9*64*64 + 64 or 64*64 + 64)  110,784   12,480
    readout            8*8*64*10 + 10                  40,970    40,970

  Args:
    num_classes: number of outputs.
    channels: of each convolution.
    activation: a name that `bpjax.activations.get` knows.
    conv: 'conv', or 'perturbative': every convolution but the first is a
      `bpjax.nn.PerturbativeConv`.
    perturbation: standard deviation of its noise; not in the paper.
    units: 'layer', or 'affine': the bare convolutions are the units, as
      `weight_mirror` needs with conv 'perturbative'.

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`. Units are named `conv_1`, `conv_2`, ..., `readout`.

  Raises:
    ValueError: for an unknown activation, conv or units, or sizes that are not
      positive; in the call, for images that pooling leaves nothing of.

  Example:
    >>> model = ororbia_cnn(10, conv='perturbative')
  """
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('channels', *channels)
  arguments.choice('conv', conv, blocks.CONVS)
  arguments.choice('units', units, ('affine', 'layer'))
  blocks.check_scale('perturbation', perturbation)
  return OrorbiaCNN(
      num_classes, tuple(channels), activations.get(activation), conv,
      perturbation, units)
