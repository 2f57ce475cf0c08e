"""LeNet-5."""

from collections.abc import Callable

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
import flax.linen as nn
import jax.numpy as jnp


class LeNet(nn.Module):
  """Two convolutions with pooling, three dense layers; see `lenet`."""
  num_classes: int
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  pool: str
  padding: str

  @nn.compact
  def __call__(self, x, train: bool = False):
    del train  # Nothing here differs in training.
    blocks.check_images('lenet', x, 16 if self.padding == 'VALID' else 12)
    pool = nn.avg_pool if self.pool == 'average' else nn.max_pool
    x = nn.Conv(6, (5, 5), padding=self.padding, name='conv_1')(x)
    x = pool(self.activation(x), (2, 2), (2, 2))
    x = nn.Conv(16, (5, 5), padding='VALID', name='conv_2')(x)
    x = pool(self.activation(x), (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    x = self.activation(nn.Dense(120, name='dense_1')(x))
    x = self.activation(nn.Dense(84, name='dense_2')(x))
    return nn.Dense(self.num_classes, name='readout')(x)


def lenet(
    num_classes: int, activation: str = 'tanh', pool: str = 'average',
    padding: str = 'VALID') -> LeNet:
  """Two 5x5 convolutions with 6 and 16 channels, and 120-84-classes.

  Gradient-based learning applied to document recognition, LeCun, Bottou, Bengio
  and Haffner, Proceedings of the IEEE, 1998. As it is built today: the second
  convolution reads all channels, pooling has no weights, and the readout is a
  dense layer in place of radial basis functions.

  Parameters for 10 classes:

    32x32x1, 'VALID'   156 + 2,416 + 48,120 + 10,164 + 850 = 61,706
    28x28x1, 'SAME'    the same, 61,706: both give 14x14 after the first pooling
    28x28x1, 'VALID'   44,426 (dense_1 reads 4*4*16 values in place of 5*5*16)
    32x32x3, 'VALID'   62,006

  Args:
    num_classes: number of outputs.
    activation: a name that `bpjax.activations.get` knows.
    pool: 'average' or 'max', 2x2.
    padding: of the first convolution, 'VALID' or 'SAME'; with 'SAME', MNIST's
      28x28 images are read as if in a frame of 32x32.

  Returns:
    A module from images `[batch, height, width, channels]`, at least 16x16
    (12x12 with padding 'SAME'), to logits `[batch, num_classes]`; its call
    takes `train`. Units are named `conv_1`, `conv_2`, `dense_1`, `dense_2`,
    `readout`.

  Raises:
    ValueError: for an unknown activation, pool or padding; in the call, for
      images that are too small.

  Example:
    >>> model = lenet(10, activation='relu', pool='max', padding='SAME')
  """
  blocks.check_sizes('num_classes', num_classes)
  arguments.choice('pool', pool, ('average', 'max'))
  arguments.choice('padding', padding, ('VALID', 'SAME'))
  return LeNet(num_classes, activations.get(activation), pool, padding)
