"""What the convolutional models share: norms, residual blocks, checks.

The models themselves are in `bpjax/models`, where each file is one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

from bpjax import activations
from bpjax import arguments
from bpjax import nn as layers
import flax.linen as nn
import jax
import jax.numpy as jnp

NORMS = ('batch', 'group', 'none')
DTYPES = (None, 'float64', 'float32', 'bfloat16', 'float16')
SHORTCUTS = ('pad', 'projection')
STEMS = ('cifar', 'imagenet')
CONVS = ('conv', 'perturbative')
GROUP_SIZE = 8  # Channels that GroupNorm takes together.

INITS = ('lecun', 'he', 'torch', 'fan_sum')

he_normal = nn.initializers.he_normal()


def check_sizes(name: str, *sizes: int) -> None:
  """Raises a ValueError unless all sizes are positive whole numbers.

  Example:
    >>> check_sizes('num_classes', 10)
  """
  for size in sizes:
    arguments.whole(name, size)


def check_divides(
    name: str, divisor: int, whole_name: str, whole: int) -> None:
  """Raises a ValueError unless `divisor` divides `whole`.

  Example:
    >>> check_divides('groups', 16, 'channels', 512)
  """
  if whole % divisor:
    raise ValueError(
        f'`{name}` must divide the {whole_name}, {whole}, without a rest, got '
        f'{divisor}.')


def check_rate(name: str, rate: float) -> None:
  """Raises a ValueError unless `rate` is that of a dropout.

  Example:
    >>> check_rate('dropout', .5)
  """
  arguments.number(name, rate, least=0, below=1)


def check_scale(name: str, scale: float) -> None:
  """Raises a ValueError unless `scale` is that of a noise.

  Example:
    >>> check_scale('perturbation', .1)
  """
  arguments.number(name, scale, least=0)


def check_images(model: str, x: jnp.ndarray, smallest: int) -> None:
  """Raises a ValueError unless `x` is a batch of images that are large enough.

  Args:
    model: the model's name, for the message.
    x: the input, `[batch, height, width, channels]`.
    smallest: the least height and width.

  Example:
    >>> check_images('lenet', jnp.ones((2, 32, 32, 1)), 16)
  """
  if x.ndim != 4:
    raise ValueError(
        f'`x` must be images [batch, height, width, channels] for `{model}`, '
        f'got shape {x.shape}; add the missing axes.')
  if min(x.shape[1:3]) < smallest:
    raise ValueError(
        f'`x` must be images of at least {smallest} x {smallest} for '
        f'`{model}`, got {x.shape[1]} x {x.shape[2]}; enlarge them or choose a '
        'model with less pooling.')


def initialisers(init: str, fan_in: int) -> dict[str, Callable[..., Any]]:
  """How the kernel and the bias of an affine operation begin, by name.

  Args:
    init: 'lecun' (Flax's own: normal, cut off, of variance `1 / fan_in`), 'he'
      (normal, cut off, `2 / fan_in`), 'fan_sum' (normal,
      `1 / (fan_in + fan_out)`), each with biases of 0; or 'torch' (PyTorch's
      own: both uniform within `1 / sqrt(fan_in)`).
    fan_in: how many inputs each output sums over.

  Returns:
    Keyword arguments of `nn.Dense` or `nn.Conv`.

  Example:
    >>> layer = nn.Dense(8, **initialisers('he', 16))
  """
  if init == 'torch':
    uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    bound = fan_in ** -.5

    def bias(key, shape, dtype=jnp.float32, out_sharding=None):
      del out_sharding
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {'kernel_init': uniform, 'bias_init': bias}
  return {'kernel_init': {
      'lecun': nn.initializers.lecun_normal(), 'he': he_normal,
      'fan_sum': nn.initializers.variance_scaling(.5, 'fan_avg', 'normal'),
  }[init]}


def normalise(
    x: jnp.ndarray, norm: str, train: bool, name: str) -> jnp.ndarray:
  """Applies a norm inside a compact module.

  Args:
    x: `[batch, ..., channels]`.
    norm: 'batch' (its running mean keeps 9/10 at each step), 'group' (groups
      of `GROUP_SIZE` channels) or 'none'.
    train: whether BatchNorm takes the batch's statistics and updates its own.
    name: of the norm's module.

  Returns:
    An array in the shape of `x`.
  """
  if norm == 'batch':
    return nn.BatchNorm(
        use_running_average=not train, momentum=.9, name=name)(x)
  if norm == 'group':
    return nn.GroupNorm(num_groups=None, group_size=GROUP_SIZE, name=name)(x)
  return x


def layer_norm(x: jnp.ndarray, epsilon: float = 1e-5) -> jnp.ndarray:
  """LayerNorm without parameters, with its derivative in closed form.

  `(x - m) / sqrt(mean(x^2) - m^2 + epsilon)` with `m = mean(x)`. With `r` that
  inverse root and `h` the result, a change `d` of `x` changes `h` by
  `r (d - mean(d) - h mean(h d))`, and the same map brings errors back: two
  means in either direction, and nothing kept but `h` and `r`.

  Args:
    x: `[batch, ..., channels]`; the channels are normalised.
    epsilon: added to the variance.

  Returns:
    An array in the shape of `x`.

  Example:
    >>> layer_norm(jnp.array([[1., 2., 3.]])).round(3)
    Array([[-1.225,  0.   ,  1.225]], dtype=float32)
  """
  # Moments in less than single precision would lose what is small beside them.
  precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return _normed(epsilon, precise)[0].astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normed(epsilon, x):
  """`h` and `r`."""
  mean = jnp.mean(x, axis=-1, keepdims=True)
  square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  r = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + epsilon)
  return (x - mean) * r, r


@_normed.defjvp
def _normed_jvp(epsilon, primals, tangents):
  (x,), (d,) = primals, tangents
  # By this rule again, so that a derivative of the derivative has it, too.
  h, r = _normed(epsilon, x)
  d = r * d
  # Products of vectors, in reverse, too: the sum of an elementwise product takes
  # XLA ten times as long on a CPU where the axis before has size 1.
  dot = functools.partial(jnp.einsum, precision='highest')
  along = dot('...c,...c->...', h, d) / x.shape[-1]
  ahead = d - jnp.mean(d, axis=-1, keepdims=True)
  return (h, r), (
      ahead - dot('...c,...->...c', h, along), -r * along[..., None])


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut past them.

  Attributes:
    channels: of the output.
    stride: of the first convolution and of the shortcut.
    norm: one of `NORMS`; a convolution has a bias where there is no norm.
    activation: after the first convolution, and after the sum.
    shortcut: where the shape changes: 'pad' (every stride-th position, zeros
      for the new channels) or 'projection' (a 1x1 convolution with its norm).
    branch_scale: on the initial weights of the second convolution.
    conv: 'conv', or 'perturbative': each 3x3 convolution is a
      `bpjax.nn.PerturbativeConv`.
    perturbation: standard deviation of its noise.
  """
  channels: int
  stride: int
  norm: str
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  shortcut: str
  branch_scale: float = 1.
  conv: str = 'conv'
  perturbation: float = .1

  @nn.compact
  def __call__(self, x, train: bool = False):
    conv = functools.partial(
        nn.Conv, self.channels, use_bias=self.norm == 'none')
    wide = functools.partial(conv, kernel_size=(3, 3), padding=1)
    if self.conv == 'perturbative':
      wide = functools.partial(
          layers.PerturbativeConv, self.channels, scale=self.perturbation,
          use_bias=self.norm == 'none')
    y = wide(strides=self.stride, kernel_init=he_normal, name='conv_0')(x)
    y = self.activation(normalise(y, self.norm, train, 'norm_0'))
    y = wide(kernel_init=_scaled(self.branch_scale), name='conv_1')(y)
    y = normalise(y, self.norm, train, 'norm_1')
    if x.shape != y.shape and self.shortcut == 'pad':
      x = x[:, ::self.stride, ::self.stride]
      x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.channels - x.shape[-1])])
    elif x.shape != y.shape:
      x = conv(
          (1, 1), self.stride, 0, kernel_init=he_normal,
          name='conv_shortcut')(x)
      x = normalise(x, self.norm, train, 'norm_shortcut')
    return self.activation(x + y)


class Stage(nn.Module):
  """Residual blocks `block_0`, `block_1`, ... with the same channels.

  Attributes:
    blocks: their number.
    stride: of the first block.
    block: makes a block, from `stride` and `name`.
  """
  blocks: int
  stride: int
  block: Callable[..., ResidualBlock]

  @nn.compact
  def __call__(self, x, train: bool = False):
    for i in range(self.blocks):
      stride = self.stride if i == 0 else 1
      x = self.block(stride=stride, name=f'block_{i}')(x, train)
    return x


class ResNet(nn.Module):
  """A residual network; see `bpjax.models.resnet20` and `resnet18`.

  Attributes:
    num_classes: number of outputs.
    widths: channels of each stage; every stage but the first halves the image.
    blocks: residual blocks in each stage.
    stem: 'cifar' (3x3 convolution) or 'imagenet' (7x7 convolution of stride 2,
      then 3x3 max pooling of stride 2).
    norm: one of `NORMS`.
    activation: elementwise function.
    shortcut: one of `SHORTCUTS`.
    conv: of the blocks, one of `CONVS`; the stem is a convolution in both.
    perturbation: standard deviation of the noise of 'perturbative'.
  """
  num_classes: int
  widths: Sequence[int]
  blocks: int
  stem: str
  norm: str
  activation: Callable[[jnp.ndarray], jnp.ndarray]
  shortcut: str
  conv: str = 'conv'
  perturbation: float = .1

  @nn.compact
  def __call__(self, x, train: bool = False):
    check_images('resnet', x, 1)
    size, stride, padding = (7, 2, 3) if self.stem == 'imagenet' else (3, 1, 1)
    x = nn.Conv(
        self.widths[0], (size, size), stride, padding,
        use_bias=self.norm == 'none', kernel_init=he_normal,
        name='conv_stem')(x)
    x = self.activation(normalise(x, self.norm, train, 'norm_stem'))
    if self.stem == 'imagenet':
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    # Without a norm each block adds its branch's variance to the sum, which
    # doubles it; shares of one keep it bounded at any depth.
    branches = len(self.widths) * self.blocks
    scale = branches ** -.5 if self.norm == 'none' else 1.
    for i, width in enumerate(self.widths):
      block = functools.partial(
          ResidualBlock, width, norm=self.norm, activation=self.activation,
          shortcut=self.shortcut, branch_scale=scale, conv=self.conv,
          perturbation=self.perturbation)
      x = Stage(
          self.blocks, 1 if i == 0 else 2, block, name=f'stage_{i + 1}')(
              x, train)
    return nn.Dense(self.num_classes, name='readout')(x.mean((1, 2)))


def resnet(
    num_classes: int, widths: Sequence[int], blocks: int, stem: str, norm: str,
    activation: str, shortcut: str, conv: str = 'conv',
    perturbation: float = .1) -> ResNet:
  """A `ResNet` from arguments that are checked.

  Args:
    num_classes: number of outputs.
    widths: channels of each stage.
    blocks: residual blocks in each stage.
    stem: one of `STEMS`.
    norm: one of `NORMS`.
    activation: a name that `bpjax.activations.get` knows.
    shortcut: one of `SHORTCUTS`.
    conv: one of `CONVS`.
    perturbation: standard deviation of the noise of 'perturbative'.

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`; its call takes `train`.

  Raises:
    ValueError: for an unknown stem, norm, activation, shortcut or conv, or
      sizes that are not positive.

  Example:
    >>> model = resnet(10, (16, 32), 2, 'cifar', 'group', 'relu', 'pad')
  """
  check_sizes('num_classes', num_classes)
  check_sizes('widths', *widths)
  check_scale('perturbation', perturbation)
  arguments.choice('stem', stem, STEMS)
  arguments.choice('conv', conv, CONVS)
  arguments.choice('norm', norm, NORMS)
  arguments.choice('shortcut', shortcut, SHORTCUTS)
  return ResNet(
      num_classes, tuple(widths), blocks, stem, norm,
      activations.get(activation), shortcut, conv, perturbation)


def _scaled(scale):
  """He's initialiser with its weights multiplied by `scale`."""
  def init(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    return scale * he_normal(key, shape, dtype)

  return he_normal if scale == 1 else init
