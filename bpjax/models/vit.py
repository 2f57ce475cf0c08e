"""A vision transformer."""

from bpjax import activations
from bpjax import blocks
from bpjax import transformer
import flax.linen as nn


class Vit(transformer.Stack):
  """Patches, blocks, mean, readout; see `vit`."""
  num_classes: int = 10
  width: int = 128
  patch: int = 4

  @nn.compact
  def __call__(self, x, train: bool = False):
    blocks.check_images('vit', x, self.patch)
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise ValueError(
          f'`patch` must divide the height and the width of the images of `vit`, '
          f'got {self.patch} for {x.shape[1]} x {x.shape[2]}.')
    size = (self.patch, self.patch)
    x = nn.Conv(
        self.width, size, size, 'VALID', dtype=self.dtype, name='patches')(x)
    x = x.reshape(x.shape[0], -1, self.width)
    position = self.param('position', nn.initializers.normal(.02), x.shape[1:])
    x = self.dropped(x + position.astype(x.dtype), train)
    x = self.blocks(x, None, train)
    x = transformer.Identity(name='hidden')(x.mean(1))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='readout')(x)


def vit(
    num_classes: int, depth: int = 4, width: int = 128, heads: int = 4,
    hidden: int | None = None, patch: int = 4, norm: str = 'pre',
    activation: str = 'gelu', dropout: float = 0., dtype: str | None = None,
    separate: bool = False
) -> Vit:
  r"""A vision transformer: blocks of a transformer on patches of an image.

  A convolution whose stride is its size makes a token of each patch; positions
  are added; blocks as those of `bert_encoder`; the readout reads the mean over
  tokens. An image is worth 16x16 words, Dosovitskiy et al., ICLR 2021
  (https://arxiv.org/abs/2010.11929), which reads a token of its own instead.

  Parameters of the defaults with 10 classes on 32x32x3: 809,098

    patches        4*4*3*128 + 128                6,272
    position       64*128                         8,192
    block_0 to block_3  4 * 198,272 (`bert_encoder`) 793,088
    norm           2*128                            256
    readout        128*10 + 10                    1,290

  Args:
    num_classes: number of outputs.
    depth: number of blocks.
    width: d, of the tokens between blocks.
    heads: of each attention; they divide the width.
    hidden: width of a block's middle layer; default 4 d.
    patch: side of a patch; it divides the image's.
    norm: 'post', or 'pre' with one more norm behind the blocks.
    activation: of the middle layer, a name that `bpjax.activations.get` knows.
    dropout: rate, behind patches, W_n and W_o, in training.
    dtype: of the computation, such as 'bfloat16'; default single precision.
    separate: whether queries, keys and values are three maps, the units
      `attention/query`, `attention/key` and `attention/value`, and not one; the
      parameters are as many.

  Returns:
    A module from images `[batch, height, width, channels]` to logits `[batch,
    num_classes]`; its call takes `train`.

  Raises:
    ValueError: for a value out of range; in the call, for anything but images
      that the patch divides.

  Example:
    >>> model = vit(10, depth=2, width=64)
  """
  transformer.check(
      depth=depth, width=width, heads=heads, hidden=hidden, norm=norm,
      dropout=dropout, separate=separate)
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('patch', patch)
  return Vit(
      depth, heads, 4 * width if hidden is None else hidden, norm, dropout,
      activations.get(activation), transformer.check_dtype(dtype), separate,
      num_classes,
      width, patch)
