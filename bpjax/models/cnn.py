"""A small convolutional network with pooling."""

from collections.abc import Callable, Sequence

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
import flax.linen as nn
import jax.numpy as jnp


class CNN(nn.Module):
  """Convolutions with pooling, then a readout; see `cnn`."""
  num_classes: int
  channels: Sequence[int]
  activation: Callable[..., jnp.ndarray]
  norm: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    for channels in self.channels:
      x = nn.Conv(channels, (3, 3))(x)
      if self.norm == 'batch':
        x = nn.BatchNorm(use_running_average=not train)(x)
      if self.norm == 'group':
        x = nn.GroupNorm(num_groups=None, group_size=8)(x)
      x = self.activation(x)
      x = nn.max_pool(x, (2, 2), (2, 2), 'SAME')
    return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def cnn(
    num_classes: int, channels: Sequence[int] = (32, 64),
    activation: str = 'relu', norm: str = 'batch') -> CNN:
  """3x3 convolutions, each with a norm, an activation and 2x2 pooling.

  Args:
    num_classes: number of outputs.
    channels: of each convolution; multiples of 8 with norm 'group'.
    activation: a name that `bpjax.activations.get` knows.
    norm: 'batch', 'group' (groups of 8 channels) or 'none'.

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`; its call takes `train`.

  Raises:
    ValueError: for an unknown activation or norm.

  Example:
    >>> model = cnn(10, channels=(16, 32), norm='group')
  """
  arguments.choice('norm', norm, ('batch', 'group', 'none'))
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('channels', *channels)
  if norm == 'group':
    for size in channels:
      blocks.check_divides('group_size', blocks.GROUP_SIZE, 'channels', size)
  return CNN(num_classes, tuple(channels), activations.get(activation), norm)
