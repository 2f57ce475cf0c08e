"""VGG-16."""

from collections.abc import Callable, Sequence

from bpjax import activations
from bpjax import blocks
import flax.linen as nn
import jax.numpy as jnp

_STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


class VGG16(nn.Module):
  """Five stages of 3x3 convolutions, then dense layers; see `vgg16`."""
  num_classes: int
  classifier: Sequence[int]
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  batch_norm: bool
  dropout: float

  @nn.compact
  def __call__(self, x, train: bool = False):
    blocks.check_images('vgg16', x, 2 ** len(_STAGES))
    norm = 'batch' if self.batch_norm else 'none'
    for i, stage in enumerate(_STAGES, 1):
      for j, channels in enumerate(stage, 1):
        x = nn.Conv(
            channels, (3, 3), padding=1, kernel_init=blocks.he_normal,
            name=f'conv_{i}_{j}')(x)
        x = blocks.normalise(x, norm, train, f'norm_{i}_{j}')
        x = self.activation(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.classifier, 1):
      x = nn.Dense(width, kernel_init=blocks.he_normal, name=f'dense_{i}')(x)
      x = self.activation(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name='readout')(x)


def vgg16(
    num_classes: int, classifier: Sequence[int] = (4096, 4096),
    activation: str = 'relu', batch_norm: bool = False, dropout: float = .5
) -> VGG16:
  """Thirteen 3x3 convolutions with 2x2 max pooling, and three dense layers.

  Very deep convolutional networks for large-scale image recognition, Simonyan
  and Zisserman, ICLR 2015, configuration D (https://arxiv.org/abs/1409.1556):
  64 64, 128 128, 256 256 256, 512 512 512, 512 512 512 channels, pooling after
  each group.

  Parameters for 3 input channels:

    convolutions                                                 14,714,688
    dense_1    25,088*4096 + 4096 at 224x224                    102,764,544
    dense_2    4096*4096 + 4096                                  16,781,312
    readout    4096*1000 + 1000                                   4,097,000
    together   224x224, 1,000 classes                           138,357,544

  For 32x32 images and 10 classes 33,638,218 (dense_1 reads 512 values), or
  14,719,818 with `classifier=()`. `batch_norm` adds 8,448.

  Args:
    num_classes: number of outputs.
    classifier: units of each hidden dense layer; () for a readout alone. The
      first one's parameters grow with the image.
    activation: a name that `bpjax.activations.get` knows.
    batch_norm: BatchNorm between each convolution and its activation.
    dropout: rate after each hidden dense layer, in training.

  Returns:
    A module from images `[batch, height, width, channels]`, at least 32x32, to
    logits `[batch, num_classes]`; its call takes `train`. Units are named
    `conv_1_1`, ..., `conv_5_3`, `dense_1`, `dense_2`, `readout`.

  Raises:
    ValueError: for an unknown activation, sizes that are not positive, or a
      dropout outside [0, 1); in the call, for images smaller than 32x32.

  Example:
    >>> model = vgg16(10, classifier=(512,), batch_norm=True)
  """
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('classifier', *classifier)
  blocks.check_rate('dropout', dropout)
  return VGG16(
      num_classes, tuple(classifier), activations.get(activation), batch_norm,
      dropout)
