"""Modules for rules that need more than an affine operation.

`Layer` (linen) and `NnxLayer` (NNX) are units together with their nonlinearity;
`PerturbativeConv` takes the place of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable

from bpjax import base
from bpjax.networks import trace
from flax import nnx
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp


def rectified(module: nn.Module, name: str, x: jnp.ndarray) -> jnp.ndarray:
  """`relu(x)`, with word of which entries are active.

  A perturbation before a rectifier that is off changes no loss, and yet would be
  the update of its neuron: `bpjax.rules.forward_gradient` leaves out such entries
  of the noise on the module `name`, which halves the variance. Everything else
  is that of `nn.relu`. Of a module that is called several times all outputs are
  rectified so, in the order of the calls, or the noise on it stays whole.

  Args:
    module: the module that calls this, inside its compact method.
    name: of its submodule whose output `x` is, or is added to in `x`.
    x: what is rectified, in the shape of the submodule's output.

  Returns:
    An array in the shape of `x`.

  Example:
    >>> import jax
    >>> class Hidden(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     return rectified(self, 'affine', nn.Dense(8, name='affine')(x))
    >>> Hidden().init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape
    (2, 8)
  """
  place = '/'.join((*module.scope.path, name))
  return nn.relu(checkpoint_name(
      x, f'{trace.MARK}{base.ACTIVE}:{place}'))


class Layer(nn.Module):
  """An affine operation with what follows it, as one unit.

  Rules that set targets (`bpjax.rules.local_representation_alignment` and
  others) move the pre-activation of a unit, and so need to own its nonlinearity:
  a bare `nn.tanh` between two modules belongs to none. Under every other rule
  the module is what it looks like. `bpjax.from_linen` takes it for a unit.

  Attributes:
    affine: makes the affine operation, such as `functools.partial(nn.Dense,
      256)`; it takes the module's `name`.
    activation: what follows it, a function of arrays of one shape. It may be one
      without a derivative, such as `jnp.sign`, under rules that take none.

  Example:
    >>> import functools, jax
    >>> hidden = Layer(functools.partial(nn.Dense, 8), nn.tanh)
    >>> model = nn.Sequential([hidden, nn.Dense(3)])
    >>> model.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].shape
    (2, 3)
  """
  affine: Callable[..., nn.Module]
  activation: Callable[[jnp.ndarray], jnp.ndarray]

  @nn.compact
  def __call__(
      self, x: jnp.ndarray, skip: jnp.ndarray | None = None) -> jnp.ndarray:
    """`activation(affine(x) + skip)`.

    Args:
      x: input `[batch, ...]`.
      skip: added before the activation, in the shape of the affine operation's
        output: a residual connection that the unit owns.

    Returns:
      An array in the shape of the affine operation's output.
    """
    pre = self.affine(name='affine')(x)
    return self.activation(pre if skip is None else pre + skip)


class NnxLayer(nnx.Module):
  """`Layer` for Flax NNX. `bpjax.from_nnx` takes it for a unit.

  Attributes:
    affine: the affine operation, built: NNX modules are built with their keys.
    activation: what follows it, as in `Layer`.

  Example:
    >>> rngs = nnx.Rngs(0)
    >>> hidden = NnxLayer(nnx.Linear(4, 8, rngs=rngs), nnx.tanh)
    >>> model = nnx.Sequential(hidden, nnx.Linear(8, 3, rngs=rngs))
    >>> model(jnp.ones((2, 4))).shape
    (2, 3)
  """

  def __init__(
      self, affine: nnx.Module,
      activation: Callable[[jnp.ndarray], jnp.ndarray]):
    self.affine = affine
    self.activation = activation

  def __call__(
      self, x: jnp.ndarray, skip: jnp.ndarray | None = None) -> jnp.ndarray:
    """`activation(affine(x) + skip)`, as in `Layer`."""
    pre = self.affine(x)
    return self.activation(pre if skip is None else pre + skip)


class PerturbativeConv(nn.Module):
  r"""A pseudo-convolution: fixed noise maps, and learned weights between maps.

  .. math::
    z^c = \sum_m w^{c,m} \max(0, x^m + n^m) + b^c, \qquad
    \Delta w^{c,m} = \sum_{i,j} e^c_{ij} \max(0, x^m + n^m)_{ij}

  Perturbative neural networks, Juefei-Xu, Boddeti and Savvides, CVPR 2018
  (https://arxiv.org/abs/1806.01817), in the form of recursive LRA, Ororbia et
  al., AAAI 2023. The noise is drawn once, Gaussian, and kept in the collection
  'perturbation' as `noise` `[1, height, width, maps]`; it ties the module to
  the size of its first input. A 1x1 `nn.Conv`, the child `conv`, holds all that
  learns: `maps * features` weights and `features` biases, a ninth of a 3x3
  convolution. `bpjax.from_linen` takes that child for the unit, or, inside a
  `Layer`, for the unit's affine operation.

  The papers print the update as a product of matrices summed over positions; it
  is the elementwise product that is summed, the gradient of a 1x1 convolution.
  Neither says what takes the place of a stride: here the mean over `strides`
  squared positions, before the weights, which is the mean of what they put out.
  Nothing else here mixes positions: keep a convolution for the first layer, as
  the authors' program does.

  Inside a `Layer`, `weight_mirror` would see its noise through the rectifier;
  let the child be the unit there.

  Attributes:
    features: output channels.
    maps: number of noise maps; map m perturbs channel `m % channels`. 0: one a
      channel.
    scale: standard deviation of the noise. The papers give no value; the
      authors' program has .1, uniform.
    strides: of the output.
    use_bias: whether to add a bias to each output channel.
    kernel_init: of the weights.

  Example:
    >>> model = PerturbativeConv(16)
    >>> x = jnp.ones((2, 8, 8, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> model.apply(variables, x).shape
    (2, 8, 8, 16)
    >>> variables['perturbation']['noise'].shape
    (1, 8, 8, 4)
  """
  features: int
  maps: int = 0
  scale: float = .1
  strides: int = 1
  use_bias: bool = True
  kernel_init: Callable[..., jnp.ndarray] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
    """The output maps.

    Args:
      x: `[batch, height, width, channels]`.

    Returns:
      `[batch, height / strides, width / strides, features]`, rounded up.

    Raises:
      ValueError: for anything but images, fewer maps than channels, or images
        of another size than at initialisation.
    """
    maps = self.maps or x.shape[-1]
    if x.ndim != 4 or maps < x.shape[-1]:
      raise ValueError(
          '`x` must be images [batch, height, width, channels] with at most '
          f'`maps` channels, got shape {x.shape} and {maps} maps.')
    shape = (1, *x.shape[1:3], maps)
    noise = self.variable(
        'perturbation', 'noise', lambda: self.scale * jax.random.normal(
            self.make_rng('params'), shape)).value
    if noise.shape[1:] != shape[1:]:
      raise ValueError(
          f'`x` must have the shape of the noise, {noise.shape[1:]}, as at '
          f'initialisation, got {shape[1:]}; initialise with such images.')
    if maps > x.shape[-1]:
      x = x[..., jnp.arange(maps) % x.shape[-1]]
    x = nn.relu(x + noise.astype(x.dtype))
    if self.strides > 1:
      window = (self.strides,) * 2
      x = nn.avg_pool(x, window, window, 'SAME', count_include_pad=False)
    return nn.Conv(
        self.features, (1, 1), use_bias=self.use_bias,
        kernel_init=self.kernel_init, name='conv')(x)
