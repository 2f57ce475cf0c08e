"""LocalMixer: an MLP-Mixer whose channels come in groups, for local losses."""

from collections.abc import Callable
import functools
import math

from bpjax import arguments
from bpjax import blocks as blocks_lib
from bpjax import nn as layers
import flax.linen as nn
import jax
import jax.numpy as jnp

SIZES = {
    's/1/1': dict(blocks=1, patches=1, channels=256, groups=1),
    'm/1/16': dict(blocks=1, patches=1, channels=512, groups=16),
    'm/8/16': dict(blocks=4, patches=8, channels=512, groups=16),
    'l/8/64': dict(blocks=4, patches=8, channels=2048, groups=64),
    'l/32/64': dict(blocks=4, patches=32, channels=2048, groups=64),
}
INITS = {
    'kaiming': lambda fan_in: min(2 / math.sqrt(fan_in), .1),
    'lecun': lambda fan_in: 1 / math.sqrt(fan_in),
    'constant': lambda fan_in: .1,
}
MIXERS = ('dense', 'conv')


class _Einsum(nn.Einsum):
  """An Einsum that is contracted in the way that is fast on CPUs, too.

  `jnp.einsum` chooses an order of axes that XLA copies and transposes operands
  for, in the gradients above all.
  """

  def bias_shape(self):
    """Shape of the bias, and that in which it is added."""
    raise NotImplementedError

  def contract(self, x, kernel):
    """What the einsum says."""
    raise NotImplementedError

  @nn.compact
  def __call__(self, x):
    shape, broadcast = self.bias_shape()
    kernel = self.param(
        'kernel', self.kernel_init, self.shape, self.param_dtype)
    bias = self.param('bias', self.bias_init, shape, self.param_dtype)
    x, kernel, bias = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return self.contract(x, kernel) + bias.reshape(broadcast)


class TokenMixing(_Einsum):
  """`bpc,pq->bqc`: patches with patches, the same for every channel."""

  def bias_shape(self):
    return self.shape[1:], (self.shape[1], 1)

  def contract(self, x, kernel):
    if kernel.shape[0] > 256:  # As many copies of the kernel would be large.
      return jnp.einsum('bpc,pq->bqc', x, kernel, precision=self.precision)
    # A product for each example, W^T x: nothing is transposed on the way, in
    # either direction. Adding zeros broadcasts under explicit sharding, too.
    kernels = kernel.T + jnp.zeros_like(x[:, :1, :1])
    return jnp.matmul(kernels, x, precision=self.precision)


class GroupedDense(_Einsum):
  """`bpgi,gij->bpgj`: each group of channels by itself."""

  def bias_shape(self):
    return (self.shape[0], self.shape[2]), (self.shape[0], self.shape[2])

  def contract(self, x, kernel):
    batch, patches, groups, _ = x.shape
    x = x.reshape(batch * patches, groups, -1).swapaxes(0, 1)
    y = jnp.matmul(x, kernel, precision=self.precision)
    return y.swapaxes(0, 1).reshape(batch, patches, groups, -1)


def _flat_dot_general(x, kernel, dimension_numbers, precision=None, **kwargs):
  """`x @ kernel` with `x` as one matrix.

  XLA copies and transposes operands of more than two axes on CPUs before the
  product that gives the kernel's gradient, which takes as long as the product.
  """
  del dimension_numbers
  y = jax.lax.dot_general(
      x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())),
      precision, **kwargs)
  return y.reshape(*x.shape[:-1], -1)


class NormedLayer(nn.Module):
  """An affine operation, `affine`, and the LayerNorm of what it puts out.

  Noise on activations is added to the output of this module: after the norm,
  before the rectifier.

  Attributes:
    affine: makes the affine operation; it takes the module's `name`.
  """
  affine: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x):
    return blocks_lib.layer_norm(self.affine(name='affine')(x))


class Block(nn.Module):
  """A block of `local_mixer`.

  Attributes:
    channels: of the output.
    hidden: channels between the two channel layers.
    groups: of channels, which the last layer keeps apart.
    mixer: 'dense', 'conv' or None (a first block, without residual).
    kernel_size: of the mixing convolution.
    deviation: fan-in -> standard deviation of the initial weights.
    dtype: of the computation.
  """
  channels: int
  hidden: int
  groups: int
  mixer: str | None
  kernel_size: int
  deviation: Callable[[int], float]
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x):
    batch, patches, *_ = x.shape
    y = blocks_lib.layer_norm(x.reshape(batch, patches, -1))
    if self.mixer is not None:
      y = blocks_lib.layer_norm(_mixed(self, y))
    y = layers.rectified(self, 'channel', _layer(
        self, 'channel', y.shape[-1], nn.Dense, self.hidden,
        dot_general=_flat_dot_general)(y))
    y = blocks_lib.layer_norm(y.reshape(batch, patches, self.groups, -1))
    widths = self.hidden // self.groups, self.channels // self.groups
    y = _layer(
        self, 'group', widths[0], GroupedDense, (self.groups, *widths),
        'bpgi,gij->bpgj')(y)
    return layers.rectified(
        self, 'group', y if self.mixer is None else x + y)


def _layer(block, name, fan_in, module, *args, **kwargs):
  """One `NormedLayer` of a block."""
  init = nn.initializers.normal(block.deviation(fan_in))
  affine = functools.partial(
      module, *args, kernel_init=init, dtype=block.dtype, **kwargs)
  return NormedLayer(affine, name=name)


def _mixed(block, x):
  """The token layer of a block, rectified."""
  batch, patches, channels = x.shape
  if block.mixer == 'dense':
    return layers.rectified(block, 'token', _layer(
        block, 'token', patches, TokenMixing, (patches, patches),
        'bpc,pq->bqc')(x))
  side, size = math.isqrt(patches), block.kernel_size
  layer = _layer(
      block, 'token', size * size, nn.Conv, channels, (size, size),
      feature_group_count=channels)
  y = layer(x.reshape(batch, side, side, channels))
  return layers.rectified(block, 'token', y).reshape(x.shape)


class LocalMixer(nn.Module):
  """Blocks of token and channel layers; see `local_mixer`."""
  num_classes: int
  blocks: int
  patches: int
  channels: int
  hidden: int
  groups: int
  mixer: str
  kernel_size: int
  detach_readout: bool
  deviation: Callable[[int], float]
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, x):
    x = to_patches(x, self.patches)
    for i in range(self.blocks):
      x = Block(
          self.channels, self.hidden, self.groups, self.mixer if i else None,
          self.kernel_size, self.deviation, self.dtype, name=f'block_{i}')(x)
    if self.detach_readout:
      x = jax.lax.stop_gradient(x)
    x = blocks_lib.layer_norm(x.mean(axis=1).reshape(x.shape[0], -1))
    return nn.Dense(
        self.num_classes, kernel_init=nn.initializers.zeros_init(),
        dtype=self.dtype, name='readout')(x)


def local_mixer(
    num_classes: int, size: str = 'm/8/16', *, blocks: int | None = None,
    patches: int | None = None, channels: int | None = None,
    hidden: int | None = None, groups: int | None = None,
    mixer: str = 'dense', kernel_size: int = 3, detach_readout: bool = False,
    init: str = 'kaiming', dtype: str | None = None) -> LocalMixer:
  """An MLP-Mixer with few, wide blocks, made for a loss in each of them.

  Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
  ICLR 2023 (https://arxiv.org/abs/2210.03310). An image is cut into patches;
  the first block is two channel layers, every other one a token layer (across
  patches), a channel layer and a grouped channel layer (each group by itself),
  and a residual. A LayerNorm without parameters comes before and after every
  affine operation::

    block_0     [B,P,I]      norm > channel, norm > relu
                             > [B,P,G,H/G] norm > group, norm > relu
    block_i     [B,P,G,C/G]  norm > token, norm > relu > norm > channel, norm
                             > relu > [B,P,G,H/G] norm > group, norm > + x
                             > relu
    readout                  mean over P > norm > dense, weights of 0

  Sizes are named by width, patches on each side and groups. Parameters, without
  the heads of local losses (one dense layer a block)::

    size      blocks  patches  channels  groups  image          backbone
    's/1/1'     1        1        256       1    28x28x1         266,752
    'm/1/16'    1        1        512      16    28x28x1         418,816
    'm/8/16'    4        8x8      512      16    32x32x3         893,120
    'l/8/64'    4        8x8     2048      64    32x32x3      12,972,224
    'l/32/64'   4       32x32    2048      64    224x224x3    16,311,296

  to which the readout adds `(C + 1) * num_classes`, and so does each head. With
  both, and 10 classes: 271,892, 429,076, 918,770 and 13,074,674, as published.

  Args:
    num_classes: number of outputs.
    size: one of the above; the arguments that follow replace its numbers.
    blocks: how many.
    patches: on each side of the image, which they have to divide.
    channels: C, of each block's output.
    hidden: H, between the channel layers; C by default.
    groups: G, which have to divide C and H.
    mixer: 'dense' (all patches with all) or 'conv' (each channel by itself,
      `kernel_size` patches across).
    kernel_size: of 'conv'; 3 in the paper.
    detach_readout: whether the readout alone learns from the output's loss, as
      where every block has a loss of its own.
    init: standard deviation of the weights: 'kaiming' (`2 / sqrt(fan_in)`, at
      most .1, the paper's), 'lecun' (`1 / sqrt(fan_in)`) or 'constant' (.1).
    dtype: of the computation, such as 'bfloat16'; default that of the inputs.

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`. Block `block_i` puts out `[batch, patches, groups,
    channels / groups]`; units are named `block_1/token/affine` and so on, and
    `block_1/token` is the unit together with its norm.

  Raises:
    ValueError: for an unknown option, sizes that are not positive, or groups
      that do not divide the channels; in the call, for patches that do not
      divide the image.

  Example:
    >>> model = local_mixer(10, 'm/8/16', channels=64)
  """
  arguments.choice('size', size, tuple(SIZES))
  arguments.dtype('dtype', dtype, blocks_lib.DTYPES)
  arguments.choice('mixer', mixer, MIXERS)
  arguments.choice('init', init, tuple(INITS))
  given = {'blocks': blocks, 'patches': patches, 'channels': channels,
           'groups': groups}
  sizes = SIZES[size] | {k: v for k, v in given.items() if v is not None}
  sizes['hidden'] = sizes['channels'] if hidden is None else hidden
  for name, value in {
      'num_classes': num_classes, 'kernel_size': kernel_size, **sizes}.items():
    blocks_lib.check_sizes(name, value)
  for width in ('channels', 'hidden'):
    blocks_lib.check_divides('groups', sizes['groups'], width, sizes[width])
  return LocalMixer(
      num_classes, mixer=mixer, kernel_size=kernel_size,
      detach_readout=detach_readout, deviation=INITS[init],
      dtype=dtype and jnp.dtype(dtype), **sizes)


def to_patches(x: jnp.ndarray, patches: int) -> jnp.ndarray:
  """Cuts images into square patches, row by row.

  Args:
    x: images `[batch, height, width, channels]`.
    patches: on each side.

  Returns:
    `[batch, patches**2, height * width * channels / patches**2]`: within a
    patch, rows, columns and channels in this order.

  Raises:
    ValueError: if `patches` does not divide the height and the width.

  Example:
    >>> to_patches(jnp.ones((2, 32, 32, 3)), 8).shape
    (2, 64, 48)
  """
  blocks_lib.check_images('local_mixer', x, 1)
  batch, height, width, channels = x.shape
  blocks_lib.check_divides('patches', patches, "image's height", height)
  blocks_lib.check_divides('patches', patches, "image's width", width)
  # One axis at a time, as explicit sharding asks.
  rows, columns = height // patches, width // patches
  x = x.reshape(batch, patches, rows, width, channels)
  x = x.reshape(batch, patches, rows, patches, columns, channels)
  x = x.swapaxes(2, 3).reshape(batch, patches**2, rows, columns, channels)
  return x.reshape(batch, patches**2, -1)
