"""What the transformers share: the block, embeddings, feedback points, checks.

The models themselves are in `bpjax/models`, where each file is one model.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

from bpjax import arguments
from bpjax import blocks
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

NORMS = ('post', 'pre')
_POINTS = {
    'full': (),
    'macro': ('block_*',),
    'micro': ('block_*/attention', 'block_*/feed_forward/activation',
              'block_*/feed_forward')}


def points(placement: str, hidden: bool = False) -> tuple[str, ...]:
  """Where direct feedback enters a transformer: `boundaries` of its network.

  For `bert_encoder`, `gpt` and `vit` of `bpjax.models`. With 'macro' and 'micro'
  the rule is `direct_feedback_alignment(placement='boundaries')`, which takes
  exact gradients between the points; with 'full' it is the rule as it comes.

  Args:
    placement: 'macro' (the output of each block), 'micro' (three points in each:
      after the first sum and its norm, after the nonlinearity, after the second
      sum and its norm), or 'full' (no boundary: every projection is a point).
    hidden: whether what the readout reads is a boundary as well, whose error
      `error='hidden'` takes.

  Returns:
    Globs for `from_linen(model, boundaries=...)`.

  Raises:
    ValueError: for another placement.

  Example:
    >>> points('macro')
    ('block_*',)
  """
  arguments.choice('placement', placement, tuple(_POINTS))
  return _POINTS[placement] + (('hidden',) if hidden else ())


def check_dtype(dtype: str | None) -> jnp.dtype | None:
  """The type of that name.

  Raises:
    ValueError: unless it is a type of real numbers that jax knows.

  Example:
    >>> check_dtype('bfloat16')
    dtype(bfloat16)
  """
  if dtype is None:
    return None
  try:
    known = jnp.dtype(dtype)
  except TypeError:
    known = None
  if known is None or not jnp.issubdtype(known, jnp.floating):
    raise ValueError(
        "`dtype` must be a type of floating numbers such as 'bfloat16', got "
        f'{dtype!r}.')
  return known


def check_tokens(
    model: str, tokens: Any, mask: Any, vocabulary: int,
    length: int | None) -> None:
  """Raises a ValueError for tokens, or a mask, that a model cannot take.

  Args:
    model: its name, for the message.
    tokens: `[batch, length]`, whole numbers.
    mask: of the same shape, or None.
    vocabulary: how many tokens there are; numbers that are known while the model
      is traced have to be below.
    length: how many positions the model has; None for any number.
  """
  if jnp.ndim(tokens) != 2 or not jnp.issubdtype(
      jnp.result_type(tokens), jnp.integer):
    raise ValueError(
        f'`tokens` must be whole numbers [batch, length] for `{model}`, got '
        f'{jnp.result_type(tokens)}{list(jnp.shape(tokens))}.')
  if length is not None and tokens.shape[1] > length:
    raise ValueError(
        f'`tokens` must be at most as long as the positions of `{model}`, '
        f'{length}, got {tokens.shape[1]}; cut them, or give the model '
        f'`length={tokens.shape[1]}`.')
  if mask is not None and jnp.shape(mask) != tokens.shape:
    raise ValueError(
        f'`mask` must have the shape of `tokens`, {tokens.shape}, got '
        f'{jnp.shape(mask)}.')
  if isinstance(tokens, jax.core.Tracer) or not tokens.size:
    return
  known = np.asarray(tokens)  # Numbers also inside of a trace.
  if not 0 <= known.min() <= known.max() < vocabulary:
    raise ValueError(
        f'`tokens` must lie in [0, {vocabulary}), the vocabulary of `{model}`, '
        f'got {known.min()} to {known.max()}.')


def sinusoidal(length: int, width: int) -> jax.Array:
  r"""Positions as waves, `[length, width]`.

  Entries :math:`2i` and :math:`2i + 1` of position p are sine and cosine of
  :math:`p / 10000^{2i / width}`. Attention is all you need, Vaswani et al.,
  NeurIPS 2017 (https://arxiv.org/abs/1706.03762).

  Example:
    >>> sinusoidal(2, 4).round(2).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
  """
  rate = jnp.exp(-math.log(1e4) * (jnp.arange(width) // 2 * 2) / width)
  angle = jnp.arange(length)[:, None] * rate
  return jnp.where(jnp.arange(width) % 2, jnp.cos(angle), jnp.sin(angle))


def attend(
    qkv: jax.Array, heads: int, mask: jax.Array | None = None,
    causal: bool = False) -> jax.Array:
  """Softmax attention of several heads on stacked queries, keys and values.

  Args:
    qkv: `[batch, length, 3 * width]`: queries, keys, values, each with its heads
      side by side.
    heads: their number.
    mask: bool `[batch, length]`, True where a token is real: the others are
      attended to by none.
    causal: whether a token attends to none behind it.

  Returns:
    `[batch, length, width]`, in the dtype of `qkv`; the softmax is taken in
    single precision at least.
  """
  batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  q, k, v = (
      part.reshape(batch, length, heads, width // heads)
      for part in jnp.split(qkv, 3, axis=-1))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) * (width // heads) ** -.5
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  seen = None if mask is None else mask[:, None, None, :].astype(bool)
  if causal:
    past = jnp.tril(jnp.ones((length, length), bool))
    seen = past if seen is None else seen & past
  if seen is not None:
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
  shares = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum('bhqk,bkhd->bqhd', shares, v).reshape(batch, length, width)


class Activation(nn.Module):
  """A nonlinearity as a module, so that its output can be a boundary."""
  function: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x):
    return self.function(x)


class Identity(nn.Module):
  """A module that only names a value."""

  @nn.compact
  def __call__(self, x):
    return x


class _Sublayer(nn.Module):
  """A branch around which a skip goes, with the norm before or behind."""
  norm: str
  dropout: float
  dtype: jnp.dtype | None

  def dense(self, width, name):
    return nn.Dense(width, dtype=self.dtype, name=name)

  def normed(self, x):
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name='norm')(x)

  def around(self, x, branch, train):
    """The branch with its skip."""
    y = branch(self.normed(x) if self.norm == 'pre' else x)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return x + y if self.norm == 'pre' else self.normed(x + y)


class Attention(_Sublayer):
  """`LN(dropout(W_n attention(W_qkv x)) + x)`; see `Block`."""
  heads: int = 1
  causal: bool = False
  separate: bool = False

  @nn.compact
  def __call__(self, x, mask=None, train: bool = False):
    width = x.shape[-1]

    def qkv(x):
      if not self.separate:
        return self.dense(3 * width, 'qkv')(x)
      return jnp.concatenate([
          self.dense(width, name)(x) for name in ('query', 'key', 'value')], -1)

    return self.around(x, lambda x: self.dense(width, 'out')(attend(
        qkv(x), self.heads, mask, self.causal)), train)


class FeedForward(_Sublayer):
  """`LN(dropout(W_o gelu(W_i x)) + x)`; see `Block`."""
  hidden: int = 1
  activation: Callable[[jax.Array], jax.Array] = nn.gelu

  @nn.compact
  def __call__(self, x, train: bool = False):
    width = x.shape[-1]
    return self.around(x, lambda x: self.dense(width, 'out')(Activation(
        self.activation, name='activation')(
            self.dense(self.hidden, 'in')(x))), train)


class Block(nn.Module):
  r"""A layer of a transformer: four affine maps, each with what follows it.

  .. math::
    z_1 = \mathrm{attention}(W_{qkv} z_0 + b), \quad
    z_2 = \mathrm{LN}(\mathrm{dropout}(W_n z_1 + b_n) + z_0), \quad
    z_3 = \phi(W_i z_2 + b_i), \quad
    z_4 = \mathrm{LN}(\mathrm{dropout}(W_o z_3 + b_o) + z_2)

  With `norm='pre'` each norm is taken of what its branch reads, and not of the
  sum. The maps are the units `attention/qkv` (queries, keys and values in one),
  `attention/out`, `feed_forward/in` and `feed_forward/out`. With `separate` the
  first is three, `attention/query`, `attention/key` and `attention/value`, so
  that each can have a rule of its own; the function is the same.

  Attributes:
    heads: of the attention.
    hidden: width of z_3.
    norm: one of `NORMS`.
    dropout: rate, in training.
    activation: phi.
    causal: whether tokens attend to none behind them.
    dtype: of the computation.
    separate: whether queries, keys and values are three maps.
  """
  heads: int
  hidden: int
  norm: str
  dropout: float
  activation: Callable[[jax.Array], jax.Array]
  causal: bool = False
  dtype: jnp.dtype | None = None
  separate: bool = False

  @nn.compact
  def __call__(self, x, mask=None, train: bool = False):
    x = Attention(
        self.norm, self.dropout, self.dtype, self.heads, self.causal,
        self.separate, name='attention')(x, mask, train)
    return FeedForward(
        self.norm, self.dropout, self.dtype, self.hidden, self.activation,
        name='feed_forward')(x, train)


class Stack(nn.Module):
  """Blocks `block_0`, `block_1`, ... of a model that holds them itself.

  Attributes are those of `Block`, and `depth`, the number of blocks.
  """
  depth: int
  heads: int
  hidden: int
  norm: str
  dropout: float
  activation: Callable[[jax.Array], jax.Array]
  dtype: jnp.dtype | None
  separate: bool

  def blocks(self, x, mask, train, causal=False):
    """All blocks; behind them, with norms before branches, one more norm."""
    for i in range(self.depth):
      x = Block(
          self.heads, self.hidden, self.norm, self.dropout, self.activation,
          causal, self.dtype, self.separate, name=f'block_{i}')(
              x, mask, train)
    if self.norm == 'pre':
      x = self.normed(x, 'norm')
    return x

  def normed(self, x, name):
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

  def dropped(self, x, train):
    return nn.Dropout(self.dropout, deterministic=not train)(x)


def check(
    *, depth: int, width: int, heads: int, hidden: int | None, norm: str,
    dropout: float, separate: bool) -> None:
  """Raises a ValueError for sizes and choices that no transformer can have."""
  for name, size in (('depth', depth), ('width', width), ('heads', heads),
                     ('hidden', 4 * width if hidden is None else hidden)):
    blocks.check_sizes(name, size)
  blocks.check_divides('heads', heads, 'width', width)
  arguments.choice('norm', norm, NORMS)
  blocks.check_rate('dropout', dropout)
  arguments.flag('separate', separate)
