"""Architectures as public examples have them, tiny, with the units expected.

None of these models knows of this library: the tests share them to ask whether
every weight is found, under the name that it should have. Each docstring says
which trait of the architecture could hide a weight.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import bpjax
import flax
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Architecture(NamedTuple):
  """A model with data, and what is to be found in it.

  Attributes:
    name: the key in `ARCHITECTURES`.
    api: 'linen', 'nnx' or 'function'.
    make: makes the model; for 'function' the pair `(apply, params)`, with
      `apply(params, *inputs)`.
    x: the input array, or a tuple of inputs.
    y: what the loss compares with.
    loss: `loss(output, y)`, one loss per example `[batch]` or per token
      `[batch, tokens]`.
    units: names of the units, in the order of their first calls.
    exact: paths of the parameters that keep their exact derivative.
  """
  name: str
  api: str
  make: Callable[[], Any]
  x: Any
  y: Any
  loss: Callable[[Any, Any], jax.Array]
  units: tuple[str, ...]
  exact: frozenset[str] = frozenset()


def network(architecture: Architecture) -> tuple[Any, dict[str, Any]]:
  """The architecture as a network of bpjax, and its variables."""
  if architecture.api == 'function':
    apply, params = architecture.make()
    return bpjax.from_function(apply), {'params': params}
  if architecture.api == 'nnx':
    net = bpjax.from_nnx(architecture.make())
    return net, net.init(jax.random.key(1), architecture.x)
  net = bpjax.from_linen(architecture.make())
  return net, jax.jit(net.init)(jax.random.key(1), architecture.x)


# -----------------------------------------------------------------------------
# Data and losses.
# -----------------------------------------------------------------------------

_BATCH, _TIME, _WIDTH, _VOCABULARY, _CLASSES = 4, 5, 6, 11, 3


def _normal(seed, *shape, scale=1.):
  values = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(values, jnp.float32)


def _integers(seed, limit, *shape):
  values = np.random.default_rng(seed).integers(limit, size=shape)
  return jnp.asarray(values, jnp.int32)


_VECTOR = _normal(0, _BATCH, _WIDTH)
_SEQUENCE = _normal(1, _BATCH, _TIME, _WIDTH)
_IMAGE = _normal(2, _BATCH, 8, 8, 2)
_TOKENS = _integers(3, _VOCABULARY, _BATCH, _TIME)
_NEXT = _integers(4, _VOCABULARY, _BATCH, _TIME)
_LABEL = _integers(5, _CLASSES, _BATCH)
_GRAPH = jnp.asarray(
    np.eye(5) + np.roll(np.eye(5), 1, 0) + np.roll(np.eye(5), -1, 0),
    jnp.float32)[None] / jnp.arange(3., 3. + _BATCH)[:, None, None]


def _cross_entropy(logits, y):
  return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def _binary(logits, y):
  return optax.sigmoid_binary_cross_entropy(logits, y)


def _per_example(losses):
  return losses.reshape(losses.shape[0], -1).sum(1)


def _squared(output, y):
  return _per_example(jnp.square(output - y)) / 2


# -----------------------------------------------------------------------------
# Transformers.
# -----------------------------------------------------------------------------

class _PostNormBlock(nn.Module):
  """Attention and a feed-forward part, each with its norm behind the sum."""

  @nn.compact
  def __call__(self, x):
    attended = nn.MultiHeadDotProductAttention(2, name='attention')(x)
    x = nn.LayerNorm(name='attention_norm')(x + attended)
    y = nn.gelu(nn.Dense(12, name='intermediate')(x))
    return nn.LayerNorm(name='output_norm')(x + nn.Dense(8, name='output')(y))


class Bert(nn.Module):
  """The head applies an unbound layer to the transposed word embedding."""

  def setup(self):
    self.word = nn.Embed(_VOCABULARY, 8)
    self.segment = nn.Embed(2, 8)
    self.position = nn.Embed(_TIME, 8)
    self.norm = nn.LayerNorm()
    self.dropout = nn.Dropout(.1)
    self.layers = [_PostNormBlock() for _ in range(2)]
    self.transform = nn.Dense(8)
    self.transform_norm = nn.LayerNorm()
    self.decoder = nn.Dense(_VOCABULARY, use_bias=False)
    self.decoder_bias = self.param(
        'decoder_bias', nn.initializers.zeros, (_VOCABULARY,))

  def __call__(self, tokens, segments, train: bool = False):
    x = self.word(tokens) + self.segment(segments)
    x = x + self.position(jnp.arange(tokens.shape[1]))
    x = self.dropout(self.norm(x), deterministic=not train)
    for layer in self.layers:
      x = layer(x)
    x = self.transform_norm(nn.gelu(self.transform(x)))
    table = self.word.variables['params']['embedding']
    logits = self.decoder.apply({'params': {'kernel': table.T}}, x)
    return logits + self.decoder_bias


class _Conv1D(nn.Module):
  """A dense layer that is written with raw parameters."""
  width: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
        'kernel', nn.initializers.normal(.3), (x.shape[-1], self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    return x @ kernel + bias


class _CausalBlock(nn.Module):
  """Pre-norm; query, key and value come out of one raw kernel."""

  @nn.compact
  def __call__(self, x):
    batch, time, width = x.shape
    y = _Conv1D(3 * width, name='c_attn')(nn.LayerNorm(name='ln_1')(x))
    q, k, v = (a.reshape(batch, time, 2, -1) for a in jnp.split(y, 3, -1))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((time, time), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v).reshape(x.shape)
    x = x + _Conv1D(width, name='c_proj')(y)
    y = _Conv1D(12, name='c_fc')(nn.LayerNorm(name='ln_2')(x))
    return x + _Conv1D(width, name='mlp_proj')(nn.gelu(y))


class Gpt(nn.Module):
  """Raw kernels everywhere, and the raw table is the head, too."""

  @nn.compact
  def __call__(self, tokens):
    table = self.param('wte', nn.initializers.normal(.5), (_VOCABULARY, 8))
    position = self.param('wpe', nn.initializers.normal(.1), (9, 8))
    x = table[tokens] + position[:tokens.shape[1]]
    for i in range(2):
      x = _CausalBlock(name=f'h_{i}')(x)
    return nn.LayerNorm(name='ln_f')(x) @ table.T


class _SwiGlu(nn.Module):
  """Three raw kernels in one module, one of them a gate."""

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    init = nn.initializers.lecun_normal()
    w1 = self.param('w1', init, (width, 10))
    w2 = self.param('w2', init, (10, width))
    w3 = self.param('w3', init, (width, 10))
    return (nn.silu(x @ w1) * (x @ w3)) @ w2


def _rotate(x):
  """Rotary position embedding of `[batch, time, heads, d]`."""
  half = x.shape[-1] // 2
  angle = np.arange(x.shape[1])[:, None] / 10. ** np.arange(half)
  cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (np.cos, np.sin))
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class _GroupedQuery(nn.Module):
  """Attention with raw kernels, and fewer heads for keys than for queries."""

  @nn.compact
  def __call__(self, x):
    width, heads, size = x.shape[-1], 2, 4
    init = nn.initializers.lecun_normal()
    wq = self.param('wq', init, (width, heads * size))
    wk = self.param('wk', init, (width, size))
    wv = self.param('wv', init, (width, size))
    wo = self.param('wo', init, (heads * size, width))
    split = lambda a: a.reshape(*a.shape[:2], -1, size)
    q, k = _rotate(split(x @ wq)), _rotate(split(x @ wk))[:, :, 0]
    v = x @ wv
    scores = jnp.einsum('bqhd,bkd->bhqk', q, k) * size ** -.5
    mask = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    y = jnp.einsum('bhqk,bkd->bqhd', weights, v)
    return y.reshape(*x.shape[:2], -1) @ wo


class Llama(nn.Module):
  """RMS norms, rotary positions, a gated feed-forward part, a separate head."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(_VOCABULARY, 8, name='embed')(tokens)
    x = x + _GroupedQuery(name='attention')(nn.RMSNorm(name='norm_1')(x))
    x = x + _SwiGlu(name='feed_forward')(nn.RMSNorm(name='norm_2')(x))
    x = nn.RMSNorm(name='norm')(x)
    return nn.Dense(_VOCABULARY, use_bias=False, name='head')(x)


class AttendLanguageModel(nn.Module):
  """A causal convolution over tokens; the embedding attends to its output."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(_VOCABULARY, 8, name='embed')
    x = nn.Conv(10, (3,), padding='CAUSAL', name='window')(embed(tokens))
    return embed.attend(nn.tanh(nn.Dense(8, name='project')(nn.relu(x))))


class VisionTransformer(nn.Module):
  """Patches by a strided convolution; a class token is tiled over the batch."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (4, 4), strides=4, name='patches')(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    token = self.param('token', nn.initializers.normal(.1), (1, 1, 8))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
    x = x + self.param(
        'position', nn.initializers.normal(.1), (1, *x.shape[1:]))
    y = nn.LayerNorm(name='norm_1')(x)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(y, y)
    y = nn.Dense(12, name='up')(nn.LayerNorm(name='norm_2')(x))
    x = x + nn.Dense(8, name='down')(nn.gelu(y))
    return nn.Dense(_CLASSES, name='head')(nn.LayerNorm(name='norm')(x)[:, 0])


class _MixerBlock(nn.Module):
  """Mixes tokens by a product over the transposed axes, then channels."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='token_norm')(x).swapaxes(1, 2)
    y = nn.Dense(x.shape[1], name='token_2')(
        nn.gelu(nn.Dense(7, name='token_1')(y)))
    x = x + y.swapaxes(1, 2)
    y = nn.gelu(nn.Dense(9, name='channel_1')(
        nn.LayerNorm(name='channel_norm')(x)))
    return x + nn.Dense(x.shape[-1], name='channel_2')(y)


class Mixer(nn.Module):
  """Two axes are mixed in turn; the batch is never the only leading axis."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (4, 4), strides=4, name='stem')(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    for i in range(2):
      x = _MixerBlock(name=f'block_{i}')(x)
    return nn.Dense(_CLASSES, name='head')(x.mean(1))


# -----------------------------------------------------------------------------
# Convolutional networks.
# -----------------------------------------------------------------------------

class _ResNetBlock(nn.Module):
  """Two convolutions; a projection where the shape changes."""
  width: int
  strides: int = 1

  @nn.compact
  def __call__(self, x, train):
    norm = lambda name: nn.BatchNorm(not train, momentum=.9, name=name)
    y = nn.Conv(self.width, (3, 3), self.strides, use_bias=False,
                name='conv_1')(x)
    y = nn.relu(norm('norm_1')(y))
    y = norm('norm_2')(
        nn.Conv(self.width, (3, 3), use_bias=False, name='conv_2')(y))
    if x.shape != y.shape:
      x = nn.Conv(self.width, (1, 1), self.strides, use_bias=False,
                  name='shortcut')(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Batch statistics in training, as state; a strided shortcut."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (3, 3), use_bias=False, name='stem')(x)
    x = nn.relu(nn.BatchNorm(not train, momentum=.9, name='stem_norm')(x))
    x = _ResNetBlock(4, name='block_0')(x, train)
    x = _ResNetBlock(6, 2, name='block_1')(x, train)
    return nn.Dense(_CLASSES, name='head')(x.mean((1, 2)))


class UNet(nn.Module):
  """Transposed convolutions up, and what was seen on the way down beside."""

  @nn.compact
  def __call__(self, x):
    skips = []
    for i, width in enumerate((4, 6)):
      x = nn.relu(nn.Conv(width, (3, 3), name=f'down_{i}')(x))
      skips.append(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(8, (3, 3), name='bottom')(x))
    for i, width in ((1, 6), (0, 4)):
      x = nn.ConvTranspose(width, (2, 2), (2, 2), name=f'grow_{i}')(x)
      x = jnp.concatenate([x, skips[i]], -1)
      x = nn.relu(nn.Conv(width, (3, 3), name=f'up_{i}')(x))
    return nn.Conv(_CLASSES, (1, 1), name='head')(x)


class MobileNet(nn.Module):
  """Depthwise and pointwise convolutions; channels gated by the input."""

  @nn.compact
  def __call__(self, x):
    x = nn.hard_swish(nn.Conv(6, (3, 3), strides=2, name='stem')(x))
    y = nn.Conv(12, (1, 1), name='expand')(x)
    y = nn.hard_swish(nn.GroupNorm(3, name='norm')(y))
    y = nn.Conv(12, (3, 3), feature_group_count=12, name='depthwise')(y)
    gate = nn.relu(nn.Dense(4, name='squeeze')(y.mean((1, 2))))
    gate = nn.sigmoid(nn.Dense(12, name='excite')(gate))
    x = x + nn.Conv(6, (1, 1), name='shrink')(y * gate[:, None, None])
    return nn.Dense(_CLASSES, name='head')(x.mean((1, 2)))


# -----------------------------------------------------------------------------
# Recurrent networks.
# -----------------------------------------------------------------------------

class Recurrent(nn.Module):
  """The last output of a cell from the library, run by `nn.RNN`."""
  cell: Any

  @nn.compact
  def __call__(self, x):
    cell = self.cell(8, param_dtype=x.dtype, name='cell')
    states = nn.RNN(cell)(x)
    return nn.Dense(_CLASSES, name='head')(states[:, -1])


class SequenceToSequence(nn.Module):
  """The encoder's last state starts the decoder, which looks at all of them."""

  @nn.compact
  def __call__(self, source, target):
    x = nn.Embed(_VOCABULARY, 6, name='source')(source)
    encoder = nn.GRUCell(8, param_dtype=x.dtype, name='encoder')
    state, memory = nn.RNN(encoder, return_carry=True)(x)
    # The decoder reads the token before the one that it predicts.
    previous = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
    x = nn.Embed(_VOCABULARY, 6, name='target')(previous)
    decoder = nn.SimpleCell(8, param_dtype=x.dtype, name='decoder')
    states = nn.RNN(decoder)(x, initial_carry=state)
    query = nn.Dense(8, use_bias=False, name='query')(states)
    scores = jnp.einsum('btd,bsd->bts', query, memory)
    context = jnp.einsum('bts,bsd->btd', jax.nn.softmax(scores), memory)
    x = jnp.concatenate([states, context], -1)
    return nn.Dense(_VOCABULARY, name='head')(
        nn.tanh(nn.Dense(9, name='combine')(x)))


@jax.custom_jvp
def _spike(v):
  return (v > 0).astype(v.dtype)


@_spike.defjvp
def _spike_jvp(primals, tangents):
  v, = primals
  return _spike(v), tangents[0] / jnp.square(1 + 5 * jnp.abs(v))


def _spiking():
  """Leaky neurons in a loop over time; the spike has a surrogate derivative."""
  params = {
      'hidden': {'w': _normal(10, 6, 8, scale=.8), 'b': _normal(11, 8)},
      'recurrent': {'w': _normal(12, 8, 8, scale=.3)},
      'readout': {'w': _normal(13, 8, _CLASSES), 'b': jnp.zeros(_CLASSES)},
      'leak': jnp.full((8,), 1.)}

  def apply(params, x):
    hidden, readout = params['hidden'], params['readout']

    def step(carry, current):
      v, spikes = carry
      drive = current @ hidden['w'] + hidden['b']
      drive = drive + spikes @ params['recurrent']['w']
      v = jax.nn.sigmoid(params['leak']) * v + drive - spikes
      spikes = _spike(v - 1)
      return (v, spikes), spikes @ readout['w'] + readout['b']

    rest = jnp.zeros((x.shape[0], 8), x.dtype)
    _, outputs = jax.lax.scan(step, (rest, rest), x.swapaxes(0, 1))
    return outputs.mean(0)

  return apply, params


# -----------------------------------------------------------------------------
# Several inputs, several outputs.
# -----------------------------------------------------------------------------

class GraphNetwork(nn.Module):
  """Each layer averages over neighbours; a graph is an example."""

  @nn.compact
  def __call__(self, nodes, adjacency):
    x = nodes
    for i in range(2):
      message = adjacency @ nn.Dense(8, name=f'message_{i}')(x)
      x = nn.relu(nn.Dense(8, use_bias=False, name=f'self_{i}')(x) + message)
    return nn.Dense(_CLASSES, name='head')(x.mean(1))


class VariationalAutoencoder(nn.Module):
  """Draws its code with a key among the inputs; the output is a dictionary."""

  @nn.compact
  def __call__(self, x, key):
    h = nn.relu(nn.Dense(10, name='encode')(x))
    mean = nn.Dense(3, name='mean')(h)
    log_variance = nn.Dense(3, name='log_variance')(h)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    z = mean + jnp.exp(log_variance / 2) * noise
    h = nn.relu(nn.Dense(10, name='decode')(z))
    logits = nn.Dense(x.shape[-1], name='pixels')(h)
    return {'logits': logits, 'mean': mean, 'log_variance': log_variance}


def _evidence(output, y):
  """The negative evidence lower bound in nats, per example."""
  mean, log_variance = output['mean'], output['log_variance']
  divergence = jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1
  return (_per_example(_binary(output['logits'], y))
          + divergence.sum(-1) / 2)


class ActorCritic(nn.Module):
  """Two heads of different sizes on one trunk; the output is a tuple."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = nn.tanh(nn.Dense(8, name=f'trunk_{i}')(x))
    policy = nn.Dense(_CLASSES, name='policy')(x)
    return jax.nn.log_softmax(policy), nn.Dense(1, name='value')(x)[:, 0]


def _advantage(output, y):
  """Policy gradient with the value as baseline; `y` is actions and returns."""
  (log_policy, value), (action, returns) = output, y
  chosen = jnp.take_along_axis(log_policy, action[:, None], -1)[:, 0]
  advantage = jax.lax.stop_gradient(returns - value)
  return jnp.square(returns - value) / 2 - chosen * advantage


class Clip(nn.Module):
  """Two towers; each example is compared with all of the batch."""

  @nn.compact
  def __call__(self, image, tokens):
    a = nn.relu(nn.Conv(6, (3, 3), strides=2, name='image_conv')(image))
    a = nn.Dense(6, use_bias=False, name='image_project')(a.mean((1, 2)))
    b = nn.Embed(_VOCABULARY, 8, name='text_embed')(tokens).mean(1)
    b = nn.relu(nn.Dense(8, name='text_hidden')(b))
    b = nn.Dense(6, use_bias=False, name='text_project')(b)
    a, b = (c / jnp.linalg.norm(c, axis=-1, keepdims=True) for c in (a, b))
    scale = self.param('logit_scale', nn.initializers.constant(1.), ())
    return jnp.exp(scale) * a @ b.T


def _contrast(logits, y):
  """Cross-entropy of rows and of columns."""
  return (_cross_entropy(logits, y) + _cross_entropy(logits.T, y)) / 2


class Recommender(nn.Module):
  """Tables for users, items and bags of tags; their dot products go on."""

  @nn.compact
  def __call__(self, dense, user, item, tags):
    x = nn.relu(nn.Dense(8, name='bottom_0')(dense))
    features = [
        nn.relu(nn.Dense(6, name='bottom_1')(x)),
        nn.Embed(7, 6, name='user')(user),
        nn.Embed(9, 6, name='item')(item),
        nn.Embed(5, 6, name='tags')(tags).mean(1)]
    stacked = jnp.stack(features, 1)
    products = jnp.einsum('bid,bjd->bij', stacked, stacked)
    products = products[:, *np.triu_indices(len(features), 1)]
    x = jnp.concatenate([features[0], products], -1)
    x = nn.relu(nn.Dense(8, name='top_0')(x))
    return nn.Dense(1, name='top_1')(x)[:, 0]


class Siamese(nn.Module):
  """One encoder is called on both inputs."""

  @nn.compact
  def __call__(self, a, b):
    encoder = nn.Sequential([
        nn.Dense(8, name='encode_0'), nn.tanh, nn.Dense(6, name='encode_1')])
    distance = jnp.abs(encoder(a) - encoder(b))
    return nn.Dense(1, name='head')(distance)[:, 0]


@flax.struct.dataclass
class Prediction:
  """What `Structured` returns."""
  logits: jax.Array
  features: jax.Array


class Structured(nn.Module):
  """The output is a dataclass; an inner layer's output is among its fields."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(8, name='hidden')(x))
    features = nn.Dense(7, name='features')(x)
    logits = nn.Dense(_CLASSES, name='head')(nn.tanh(features))
    return Prediction(logits=logits, features=features)


def _structured(output, y):
  penalty = .01 * jnp.square(output.features).sum(-1)
  return _cross_entropy(output.logits, y) + penalty


# -----------------------------------------------------------------------------
# Weights that are chosen, made, masked or normalised.
# -----------------------------------------------------------------------------

class _Expert(nn.Module):
  """A layer up and a layer down."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='down')(nn.relu(nn.Dense(9, name='up')(x)))


class SoftExperts(nn.Module):
  """Experts under one `nn.vmap`; a scalar for the balance beside the logits."""

  @nn.compact
  def __call__(self, x):
    gate = jax.nn.softmax(nn.Dense(3, name='gate')(x))
    experts = nn.vmap(
        _Expert, in_axes=None, out_axes=1, axis_size=3,
        variable_axes={'params': 0}, split_rngs={'params': True})
    y = jnp.einsum('be,bed->bd', gate, experts(name='experts')(x))
    return {'balance': 3 * jnp.square(gate.mean(0)).sum(),
            'logits': nn.Dense(_CLASSES, name='head')(nn.tanh(y))}


def _balanced(output, y):
  return _cross_entropy(output['logits'], y) + .1 * output['balance']


class _ChosenExpert(nn.Module):
  """Gathers each example's expert out of raw kernels."""

  @nn.compact
  def __call__(self, x, index):
    init = nn.initializers.lecun_normal(batch_axis=0)
    up = self.param('up', init, (3, x.shape[-1], 9))
    down = self.param('down', init, (3, 9, x.shape[-1]))
    y = nn.relu(jnp.einsum('bd,bdf->bf', x, up[index]))
    return jnp.einsum('bf,bfd->bd', y, down[index])


class HardExperts(nn.Module):
  """The best expert of each example, weighted by its gate."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(6, name='stem')(x))
    gate = jax.nn.softmax(nn.Dense(3, name='gate')(x))
    index = jnp.argmax(gate, -1)
    chosen = jnp.take_along_axis(gate, index[:, None], -1)
    x = x + chosen * _ChosenExpert(name='experts')(x, index)
    return nn.Dense(_CLASSES, name='head')(x)


class Switched(nn.Module):
  """A branch of `nn.switch` for the whole batch; each has its own layer."""

  def setup(self):
    self.branches = [nn.Dense(6) for _ in range(3)]
    self.head = nn.Dense(_CLASSES)

  def __call__(self, x):
    if self.is_initializing():
      for branch in self.branches:
        branch(x)
    index = jnp.argmax(x.sum(0)[:3])
    calls = [lambda m, h, i=i: m.branches[i](h) for i in range(3)]
    return self.head(nn.tanh(nn.switch(index, calls, self, x)))


class HyperNetwork(nn.Module):
  """The weights of a layer are the output of another, one set per example."""

  @nn.compact
  def __call__(self, x, context):
    made = nn.Dense(6 * 8, name='generator')(context).reshape(-1, 6, 8)
    x = nn.tanh(nn.Dense(6, name='stem')(x))
    x = nn.tanh(jnp.einsum('bi,bij->bj', x, made))
    return nn.Dense(_CLASSES, name='head')(x)


class _LowRank(nn.Module):
  """A kernel with a correction of rank two beside it."""
  width: int

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (x.shape[-1], self.width))
    down = self.param('lora_a', init, (x.shape[-1], 2))
    up = self.param('lora_b', init, (2, self.width))
    return x @ kernel + (x @ down) @ up


class Adapted(nn.Module):
  """Low-rank adapters, kept apart from the kernels that they correct."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(_LowRank(8, name='hidden')(x))
    return nn.Dense(_CLASSES, name='head')(x)


class TiedAutoencoder(nn.Module):
  """The decoder's kernel is the encoder's, transposed."""

  @nn.compact
  def __call__(self, x):
    encode = nn.Dense(5, use_bias=False, name='encode')
    h = nn.tanh(encode(x))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return h @ encode.variables['params']['kernel'].T + bias


class _MaskedDense(nn.Module):
  """A raw kernel, of which a constant mask leaves the lower triangle out."""
  width: int
  offset: int

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.width
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
    bias = self.param('bias', nn.initializers.normal(.1), (self.width,))
    mask = np.triu(np.ones(shape, bool), self.offset)
    return x @ jnp.where(mask, kernel, 0) + bias


class Autoregressive(nn.Module):
  """Each output reads the inputs before it, by masks on the kernels."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(_MaskedDense(x.shape[-1], 0, name='hidden')(x))
    return _MaskedDense(x.shape[-1], 1, name='output')(h)


class WeightNormalised(nn.Module):
  """Kernels are divided by their norms and scaled by parameters elsewhere."""

  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = nn.tanh(nn.WeightNorm(nn.Dense(8, name=f'hidden_{i}'))(x))
    return nn.WeightNorm(nn.Dense(_CLASSES, name='head'))(x)


class SpectrallyNormalised(nn.Module):
  """Kernels are divided by a norm that power iteration finds, with state."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    for i in range(2):
      x = nn.SpectralNorm(nn.Dense(8, name=f'hidden_{i}'))(
          x, update_stats=train)
      x = nn.tanh(x)
    return nn.Dense(_CLASSES, name='head')(x)


class _ScannedBlock(nn.Module):
  """A pre-norm residual block, in the form that `nn.scan` takes."""

  @nn.compact
  def __call__(self, x, _):
    y = nn.tanh(nn.Dense(9, name='up')(nn.LayerNorm(name='norm')(x)))
    return x + nn.Dense(6, name='down')(y), None


class Scanned(nn.Module):
  """Blocks under remat in one scan that lists `params` alone."""

  @nn.compact
  def __call__(self, x):
    blocks = nn.scan(
        nn.remat(_ScannedBlock), variable_axes={'params': 0},
        split_rngs={'params': True}, length=3)
    x, _ = blocks(name='blocks')(nn.Dense(6, name='stem')(x), None)
    return nn.Dense(_CLASSES, name='head')(x)


# -----------------------------------------------------------------------------
# NNX.
# -----------------------------------------------------------------------------

class NnxMlp(nnx.Module):
  """Layers in a list; their paths have numbers in them."""

  def __init__(self, rngs):
    self.hidden = nnx.List(
        [nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 7, rngs=rngs)])
    self.head = nnx.Linear(7, _CLASSES, rngs=rngs)

  def __call__(self, x):
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.head(x)


class NnxConvolutional(nnx.Module):
  """Batch statistics and dropout: state that the module itself holds."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(.2, rngs=rngs)
    self.head = nnx.Linear(64, _CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
    return self.head(self.dropout(x.reshape(x.shape[0], -1)))


class NnxTransformer(nnx.Module):
  """A pre-norm block over tokens, with a raw table of positions."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(_VOCABULARY, 8, rngs=rngs)
    self.position = nnx.Param(_normal(20, _TIME, 8, scale=.1))
    self.attention_norm = nnx.LayerNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.up = nnx.Linear(8, 12, rngs=rngs)
    self.down = nnx.Linear(12, 8, rngs=rngs)
    self.head = nnx.Linear(8, _VOCABULARY, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.position[...]
    x = x + self.attention(self.attention_norm(x))
    x = x + self.down(nnx.gelu(self.up(self.norm(x))))
    return self.head(x)


class _NnxBlock(nnx.Module):
  """A residual block."""

  def __init__(self, rngs):
    self.up = nnx.Linear(6, 9, rngs=rngs)
    self.down = nnx.Linear(9, 6, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.tanh(self.up(x)))


class NnxScanned(nnx.Module):
  """Blocks made by `nnx.vmap` and run by `nnx.scan`."""

  def __init__(self, rngs):

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
      return _NnxBlock(rngs)

    self.blocks = make(rngs)
    self.head = nnx.Linear(6, _CLASSES, rngs=rngs)

  def __call__(self, x):

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
      return block(x)

    return self.head(run(x, self.blocks))


class NnxRecurrent(nnx.Module):
  """A cell from the library, run by `nnx.RNN`."""

  def __init__(self, rngs):
    self.rnn = nnx.RNN(nnx.GRUCell(6, 8, rngs=rngs))
    self.head = nnx.Linear(8, _CLASSES, rngs=rngs)

  def __call__(self, x):
    rest = jnp.zeros((x.shape[0], 8), x.dtype)
    return self.head(self.rnn(x, initial_carry=rest)[:, -1])


# -----------------------------------------------------------------------------
# Plain functions.
# -----------------------------------------------------------------------------

def _haiku():
  """Parameters of each module in a dictionary, under a path with a slash."""
  params = {
      'mlp/linear_0': {'w': _normal(30, 6, 8, scale=.4), 'b': jnp.zeros(8)},
      'mlp/linear_1': {'w': _normal(31, 8, 7, scale=.4), 'b': jnp.zeros(7)},
      'mlp/layer_norm': {'scale': jnp.ones(7), 'offset': jnp.zeros(7)},
      'linear': {'w': _normal(32, 7, 3, scale=.4), 'b': jnp.zeros(3)}}

  def apply(params, x):
    linear = lambda name, x: x @ params[name]['w'] + params[name]['b']
    x = jax.nn.relu(linear('mlp/linear_0', x))
    x = jax.nn.relu(linear('mlp/linear_1', x))
    norm = params['mlp/layer_norm']
    x = jax.nn.standardize(x) * norm['scale'] + norm['offset']
    return linear('linear', x)

  return apply, params


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Linear:
  """A layer that is a tree of its own parameters, for one example."""
  weight: jax.Array
  bias: jax.Array

  def __call__(self, x):
    return self.weight @ x + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Chain:
  """Layers in a tuple, with a nonlinearity between."""
  layers: tuple[_Linear, ...]

  def __call__(self, x):
    for layer in self.layers[:-1]:
      x = jnp.tanh(layer(x))
    return self.layers[-1](x)


def _equinox():
  """The model is its own parameters, and is mapped over the examples."""
  widths = 6, 8, 7, 3
  model = _Chain(tuple(
      _Linear(_normal(40 + i, b, a, scale=a ** -.5), jnp.zeros(b))
      for i, (a, b) in enumerate(zip(widths, widths[1:]))))
  return (lambda model, x: jax.vmap(model)(x)), model


# -----------------------------------------------------------------------------
# All of them.
# -----------------------------------------------------------------------------

def _names(prefix, *names):
  return tuple(f'{prefix}/{name}' for name in names)


def _norms(*paths):
  """The parameters of norms with a gain and a shift."""
  return frozenset(f'{path}/{leaf}' for path in paths
                   for leaf in ('scale', 'bias'))


_ATTENTION = 'query', 'key', 'value', 'out'
_GRU = 'ir', 'hr', 'iz', 'hz', 'in', 'hn'
_classify: dict[str, Any] = {'y': _LABEL, 'loss': _cross_entropy}
_predict: dict[str, Any] = {'y': _NEXT, 'loss': _cross_entropy}

ARCHITECTURES = {a.name: a for a in (
    Architecture(
        'bert', 'linen', Bert, (_TOKENS, _integers(6, 2, _BATCH, _TIME)),
        units=('word', 'segment', *(
            name for i in range(2) for name in (
                *_names(f'layers_{i}/attention', *_ATTENTION),
                *_names(f'layers_{i}', 'intermediate', 'output'))),
               'transform', 'word/#1'),
        exact=_norms('norm', 'transform_norm', *(
            f'layers_{i}/{name}_norm' for i in range(2)
            for name in ('attention', 'output'))) | {'position/embedding'},
        **_predict),
    Architecture(
        'gpt', 'linen', Gpt, _TOKENS,
        units=('wte', *(name for i in range(2) for name in _names(
            f'h_{i}', 'c_attn', 'c_proj', 'c_fc', 'mlp_proj')), 'wte/#1'),
        exact=_norms('ln_f', *(
            f'h_{i}/ln_{j}' for i in range(2) for j in (1, 2))) | {'wpe'},
        **_predict),
    Architecture(
        'llama', 'linen', Llama, _TOKENS,
        units=('embed', *_names('attention', 'wq', 'wk', 'wv', 'wo'),
               *_names('feed_forward', 'w1', 'w3', 'w2'), 'head'),
        exact=frozenset({'norm_1/scale', 'norm_2/scale', 'norm/scale'}),
        **_predict),
    Architecture(
        'attend', 'linen', AttendLanguageModel, _TOKENS,
        units=('embed', 'window', 'project', 'embed/#1'), **_predict),
    Architecture(
        'vit', 'linen', VisionTransformer, _IMAGE,
        units=('patches', *_names('attention', *_ATTENTION), 'up', 'down',
               'head'),
        exact=_norms('norm_1', 'norm_2', 'norm') | {'token', 'position'},
        **_classify),
    Architecture(
        'mixer', 'linen', Mixer, _IMAGE,
        units=('stem', *(name for i in range(2) for name in _names(
            f'block_{i}', 'token_1', 'token_2', 'channel_1', 'channel_2')),
               'head'),
        exact=_norms(*(f'block_{i}/{name}_norm' for i in range(2)
                       for name in ('token', 'channel'))),
        **_classify),
    Architecture(
        'resnet', 'linen', ResNet, _IMAGE,
        units=('stem', *_names('block_0', 'conv_1', 'conv_2'),
               *_names('block_1', 'conv_1', 'conv_2', 'shortcut'), 'head'),
        exact=_norms('stem_norm', *(
            f'block_{i}/norm_{j}' for i in range(2) for j in (1, 2))),
        **_classify),
    Architecture(
        'unet', 'linen', UNet, _IMAGE,
        y=_integers(7, _CLASSES, _BATCH, 8, 8),
        loss=lambda output, y: _per_example(_cross_entropy(output, y)) / 64,
        units=('down_0', 'down_1', 'bottom', 'grow_1', 'up_1', 'grow_0',
               'up_0', 'head')),
    Architecture(
        'mobilenet', 'linen', MobileNet, _IMAGE,
        units=('stem', 'expand', 'depthwise', 'squeeze', 'excite', 'shrink',
               'head'),
        exact=_norms('norm'), **_classify),
    Architecture(
        'lstm', 'linen', lambda: Recurrent(nn.LSTMCell), _SEQUENCE,
        units=(*_names('cell', 'ii', 'hi', 'if', 'hf', 'ig', 'hg', 'io', 'ho'),
               'head'),
        **_classify),
    Architecture(
        'optimized_lstm', 'linen', lambda: Recurrent(nn.OptimizedLSTMCell),
        _SEQUENCE, units=('cell', 'cell/#1', 'head'), **_classify),
    Architecture(
        'gru', 'linen', lambda: Recurrent(nn.GRUCell), _SEQUENCE,
        units=(*_names('cell', *_GRU), 'head'), **_classify),
    Architecture(
        'seq2seq', 'linen', SequenceToSequence, (_TOKENS, _NEXT),
        units=('source', *_names('encoder', *_GRU), 'target',
               *_names('decoder', 'i', 'h'), 'query', 'combine', 'head'),
        **_predict),
    Architecture(
        'spiking', 'function', _spiking, _SEQUENCE,
        units=('hidden', 'recurrent', 'readout'), exact=frozenset({'leak'}),
        **_classify),
    Architecture(
        'graph', 'linen', GraphNetwork, (_SEQUENCE, _GRAPH),
        units=('message_0', 'self_0', 'message_1', 'self_1', 'head'),
        **_classify),
    Architecture(
        'vae', 'linen', VariationalAutoencoder,
        (_VECTOR, jax.random.key(8)), y=jax.nn.sigmoid(_VECTOR),
        loss=_evidence,
        units=('encode', 'mean', 'log_variance', 'decode', 'pixels')),
    Architecture(
        'actor_critic', 'linen', ActorCritic, _VECTOR,
        y=(_LABEL, _normal(8, _BATCH)), loss=_advantage,
        units=('trunk_0', 'trunk_1', 'policy', 'value')),
    Architecture(
        'clip', 'linen', Clip, (_IMAGE, _TOKENS), y=jnp.arange(_BATCH),
        loss=_contrast,
        units=('image_conv', 'image_project', 'text_embed', 'text_hidden',
               'text_project'),
        exact=frozenset({'logit_scale'})),
    Architecture(
        'recommender', 'linen', Recommender,
        (_VECTOR, _integers(9, 7, _BATCH), _integers(10, 9, _BATCH),
         _integers(11, 5, _BATCH, 3)),
        y=jnp.asarray([0., 1., 1., 0.]), loss=_binary,
        units=('bottom_0', 'bottom_1', 'user', 'item', 'tags', 'top_0',
               'top_1')),
    Architecture(
        'siamese', 'linen', Siamese, (_VECTOR, _VECTOR[::-1] + .5),
        y=jnp.asarray([0., 1., 1., 0.]), loss=_binary,
        units=('encode_0', 'encode_1', 'head')),
    Architecture(
        'dataclass', 'linen', Structured, _VECTOR, y=_LABEL, loss=_structured,
        units=('hidden', 'features', 'head')),
    Architecture(
        'soft_experts', 'linen', SoftExperts, _VECTOR, y=_LABEL,
        loss=_balanced,
        units=('gate', *_names('experts', 'up', 'down'), 'head')),
    Architecture(
        'hard_experts', 'linen', HardExperts, _VECTOR,
        units=('stem', 'gate', *_names('experts', 'up', 'down'), 'head'),
        **_classify),
    Architecture(
        'switch', 'linen', Switched, _VECTOR,
        units=('branches_0', 'branches_1', 'branches_2', 'head'), **_classify),
    Architecture(
        'hypernetwork', 'linen', HyperNetwork,
        (_VECTOR, _normal(12, _BATCH, 3)), units=('generator', 'stem', 'head'),
        **_classify),
    Architecture(
        'lora', 'linen', Adapted, _VECTOR,
        units=(*_names('hidden', 'kernel', 'lora_a', 'lora_b'), 'head'),
        **_classify),
    Architecture(
        'tied_autoencoder', 'linen', TiedAutoencoder, _VECTOR, y=_VECTOR,
        loss=_squared, units=('encode', 'encode/#1')),
    Architecture(
        'autoregressive', 'linen', Autoregressive, _VECTOR,
        y=(_VECTOR > 0).astype(jnp.float32),
        loss=lambda output, y: _per_example(_binary(output, y)),
        units=('hidden', 'output')),
    Architecture(
        'weight_norm', 'linen', WeightNormalised, _VECTOR,
        units=('hidden_0', 'hidden_1', 'head'), **_classify),
    Architecture(
        'spectral_norm', 'linen', SpectrallyNormalised, _VECTOR,
        units=('hidden_0', 'hidden_1', 'head'), **_classify),
    Architecture(
        'scan', 'linen', Scanned, _VECTOR,
        units=('stem', *_names('blocks', 'up', 'down'), 'head'),
        exact=_norms('blocks/norm'), **_classify),
    Architecture(
        'nnx_mlp', 'nnx', lambda: NnxMlp(nnx.Rngs(0)), _VECTOR,
        units=('hidden/0', 'hidden/1', 'head'), **_classify),
    Architecture(
        'nnx_conv', 'nnx', lambda: NnxConvolutional(nnx.Rngs(0)), _IMAGE,
        units=('conv', 'head'), exact=_norms('norm'), **_classify),
    Architecture(
        'nnx_transformer', 'nnx', lambda: NnxTransformer(nnx.Rngs(0)), _TOKENS,
        units=('embed', *_names('attention', *_ATTENTION), 'up', 'down',
               'head'),
        exact=_norms('attention_norm', 'norm') | {'position'}, **_predict),
    Architecture(
        'nnx_scan', 'nnx', lambda: NnxScanned(nnx.Rngs(0)), _VECTOR,
        units=(*_names('blocks', 'up', 'down'), 'head'), **_classify),
    Architecture(
        'nnx_rnn', 'nnx', lambda: NnxRecurrent(nnx.Rngs(0)), _SEQUENCE,
        units=(*_names('rnn/cell', 'dense_i', 'dense_h'), 'head'),
        **_classify),
    Architecture(
        'haiku', 'function', _haiku, _VECTOR,
        units=('mlp/linear_0', 'mlp/linear_1', 'linear'),
        exact=frozenset({'mlp/layer_norm/scale', 'mlp/layer_norm/offset'}),
        **_classify),
    Architecture(
        'equinox', 'function', _equinox, _VECTOR,
        units=('layers/0', 'layers/1', 'layers/2'), **_classify),
)}
