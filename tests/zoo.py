"""Small models that the tests share, each with the trait that its name says."""

import functools

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp

# Rules that set targets, which need units with their nonlinearity; those that
# settle, which take no BatchNorm; those that
# train the network as a whole; all others.
TARGETS = (
    'difference_target_propagation', 'local_representation_alignment',
    'recursive_local_representation_alignment', 'target_propagation')
SETTLING = ('equilibrium_propagation', 'predictive_coding')
WHOLE = (
    'direct_difference_target_propagation', 'forward_forward', 'pepita', 'spsa')
BARE = tuple(name for name in bpjax.rules.names()
             if name not in (*TARGETS, *SETTLING, *WHOLE))


class Layered(nn.Module):
  """Layers that hold their nonlinearity."""
  widths: tuple[int, ...] = (6, 5)

  @nn.compact
  def __call__(self, x):
    for width in self.widths:
      x = bpjax.nn.Layer(functools.partial(nn.Dense, width), nn.tanh)(x)
    return nn.Dense(4)(x)


class Plain(nn.Module):
  """Dense layers with tanh."""
  widths: tuple[int, ...] = (6, 5)
  classes: int = 4
  dtype: jnp.dtype | None = None
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    for width in self.widths:
      x = nn.tanh(nn.Dense(
          width, dtype=self.dtype, param_dtype=self.param_dtype)(x))
    return nn.Dense(
        self.classes, dtype=self.dtype, param_dtype=self.param_dtype)(x)


class ConvBatchNorm(nn.Module):
  """Convolutions, BatchNorm, dropout, pooling."""
  dropout: float = .2

  @nn.compact
  def __call__(self, x, train: bool = False):
    for width in (4, 6):
      x = nn.Conv(width, (3, 3))(x)
      x = nn.BatchNorm(use_running_average=not train)(x)
      x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Residual(nn.Module):
  """Residual blocks with GroupNorm."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    for _ in range(2):
      y = nn.relu(nn.GroupNorm(2)(x))
      y = nn.Conv(4, (3, 3))(y)
      x = x + nn.Conv(4, (3, 3), feature_group_count=2)(nn.relu(y))
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))


class Encoder(nn.Module):
  """A transformer encoder over tokens, with a raw positional parameter."""
  per_token: bool = False

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 8)(tokens)
    x = x + self.param(
        'position', nn.initializers.normal(.1), (tokens.shape[1], 8))
    for _ in range(2):
      x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
      y = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))
      x = x + nn.Dense(8)(y)
    x = nn.LayerNorm()(x)
    return nn.Dense(5)(x if self.per_token else x.mean(1))


class Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(nn.Dense(6)(x)), None


class Stack(nn.Module):
  """Three layers: unrolled, under remat, or under scan."""
  how: str = 'plain'

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6)(x)
    if self.how == 'scan':
      layers = nn.scan(
          Layer, variable_axes={'params': 0}, split_rngs={'params': True},
          length=3)
      x, _ = layers(name='layers')(x, None)
    else:
      layer = nn.remat(Layer) if self.how == 'remat' else Layer
      for i in range(3):
        x, _ = layer(name=f'layer_{i}')(x)
    return nn.Dense(4)(x)


def inputs(name: str, batch: int = 5):
  """(model, x, y) by name."""
  key = jax.random.key(7)
  image = jax.random.normal(key, (batch, 8, 8, 2))
  vector = jax.random.normal(key, (batch, 7))
  tokens = jax.random.randint(key, (batch, 6), 0, 11)
  label = jnp.arange(batch) % 3
  return {
      'plain': (Plain(), vector, label),
      'layered': (Layered(), vector, label),
      'conv_batch_norm': (ConvBatchNorm(), image, label),
      'residual': (Residual(), image, label),
      'encoder': (Encoder(), tokens, label),
      'encoder_per_token': (Encoder(per_token=True), tokens, tokens % 5),
      'remat': (Stack('remat'), vector, label),
      'scan': (Stack('scan'), vector, label),
      'stack': (Stack('plain'), vector, label),
  }[name]


def learn(rule, net, loss=bpjax.losses.softmax_cross_entropy, **arguments):
  """The compiled step: op by op, a step takes seconds to dispatch."""
  return jax.jit(rule.value_and_grad(net, loss, **arguments))
