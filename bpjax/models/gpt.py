"""A decoder for language modelling."""

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
from bpjax import transformer
import flax.linen as nn
import jax.numpy as jnp

_POSITIONS = ('learned', 'sinusoidal')


class Gpt(transformer.Stack):
  """Embedding, causal blocks, readout; see `gpt`."""
  vocabulary: int = 256
  width: int = 128
  length: int = 128
  positions: str = 'learned'
  tied: bool = False

  @nn.compact
  def __call__(self, tokens, mask=None, train: bool = False):
    transformer.check_tokens('gpt', tokens, mask, self.vocabulary, self.length)
    time = tokens.shape[1]
    token = nn.Embed(
        self.vocabulary, self.width, dtype=self.dtype, name='token')
    x = token(tokens) * self.width ** .5
    if self.positions == 'learned':
      position = self.param(
          'position', nn.initializers.normal(.02), (self.length, self.width))
    else:
      position = transformer.sinusoidal(self.length, self.width)
    x = self.dropped(x + position[:time].astype(x.dtype), train)
    x = self.blocks(x, mask, train, causal=True)
    x = transformer.Identity(name='hidden')(x)
    if self.tied:
      logits = token.attend(x) + self.param(
          'readout_bias', nn.initializers.zeros, (self.vocabulary,)).astype(
              x.dtype)
    else:
      logits = nn.Dense(self.vocabulary, dtype=self.dtype, name='readout')(x)
    # Of a token that is not there no loss depends on anything.
    return logits if mask is None else jnp.where(mask[:, :, None], logits, 0)


def gpt(
    num_classes: int, depth: int = 2, width: int = 128, heads: int = 4,
    hidden: int | None = None, length: int = 128, norm: str = 'post',
    activation: str = 'gelu', positions: str = 'learned', tied: bool = False,
    dropout: float = .1, dtype: str | None = None,
    separate: bool = False) -> Gpt:
  r"""A causal transformer that predicts the next token.

  The embedding times :math:`\sqrt d`, plus positions; blocks as those of
  `bert_encoder`, in which a token attends to none behind it; and a readout to the
  vocabulary. With `norm='pre'`, norms lie before branches and once behind all
  blocks. Language models are unsupervised multitask learners, Radford, Wu,
  Child, Luan, Amodei and Sutskever, 2019.

  The model of Direct feedback alignment scales to modern deep learning tasks and
  architectures, Launay, Poli, Boniface and Krzakala, NeurIPS 2020
  (https://arxiv.org/abs/2006.12878), is `gpt(32000, depth=6, width=512, heads=8,
  hidden=2048, activation='relu', positions='sinusoidal')`.

  Parameters of the defaults with 256 tokens: 478,720

    token           256*128                        32,768
    position        128*128                        16,384
    block_0, block_1  2 * 198,272 (`bert_encoder`) 396,544
    readout         128*256 + 256                  33,024

  With `tied` the readout's are 256, its bias; with sinusoidal positions there is
  no `position`; with `norm='pre'` there is one more norm, of 256.

  Args:
    num_classes: the size of the vocabulary, which the model reads and predicts.
    depth: number of blocks.
    width: d, of the tokens between blocks.
    heads: of each attention; they divide the width.
    hidden: width of a block's middle layer; default 4 d.
    length: number of positions: the longest input.
    norm: 'post' or 'pre'.
    activation: of the middle layer, a name that `bpjax.activations.get` knows.
    positions: 'learned' or 'sinusoidal'.
    tied: whether the embedding is the readout's matrix, too.
    dropout: rate, behind embeddings, W_n and W_o, in training.
    dtype: of the computation, such as 'bfloat16'; default single precision.
    separate: whether queries, keys and values are three maps, the units
      `attention/query`, `attention/key` and `attention/value`, and not one; the
      parameters are as many.

  Returns:
    A module from tokens `[batch, length]` to logits `[batch, length,
    vocabulary]`; its call takes `mask` (bool `[batch, length]`, True at real
    tokens; the logits of others are 0) and `train`.

  Raises:
    ValueError: as in `bert_encoder`.

  Example:
    >>> model = gpt(65, depth=2, width=96, norm='pre')
  """
  transformer.check(
      depth=depth, width=width, heads=heads, hidden=hidden, norm=norm,
      dropout=dropout, separate=separate)
  blocks.check_sizes('num_classes', num_classes)
  blocks.check_sizes('length', length)
  arguments.choice('positions', positions, _POSITIONS)
  return Gpt(
      depth, heads, 4 * width if hidden is None else hidden, norm, dropout,
      activations.get(activation), transformer.check_dtype(dtype), separate,
      num_classes,
      width, length, positions, tied)
