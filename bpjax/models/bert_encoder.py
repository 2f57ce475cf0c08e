"""A BERT-style encoder with a head for classification."""

from bpjax import activations
from bpjax import arguments
from bpjax import blocks
from bpjax import transformer
import flax.linen as nn
import jax.numpy as jnp

_POOLS = ('cls', 'mean')


class BertEncoder(transformer.Stack):
  """Embeddings, blocks, pooler, classifier; see `bert_encoder`."""
  num_classes: int = 2
  width: int = 128
  vocabulary: int = 8192
  length: int = 128
  segments: int = 2
  pool: str = 'cls'

  @nn.compact
  def __call__(self, tokens, mask=None, segments=None, train: bool = False):
    transformer.check_tokens(
        'bert_encoder', tokens, mask, self.vocabulary, self.length)
    x = nn.Embed(
        self.vocabulary, self.width, dtype=self.dtype, name='token')(tokens)
    position = self.param(
        'position', nn.initializers.normal(self.width ** -.5),
        (self.length, self.width))
    x = x + position[:tokens.shape[1]].astype(x.dtype)
    segment = self.param(
        'segment', nn.initializers.normal(self.width ** -.5),
        (self.segments, self.width))
    # No lookup, which would be one more unit in the place of a single one.
    which = jnp.zeros_like(tokens) if segments is None else segments
    for i in range(self.segments):
      x = x + jnp.where(which[..., None] == i, segment[i].astype(x.dtype), 0)
    x = self.dropped(self.normed(x, 'norm_embedding'), train)
    x = self.blocks(x, mask, train)
    if self.pool == 'cls':
      x = x[:, 0]
    elif mask is None:
      x = x.mean(1)
    else:
      real = mask[:, :, None].astype(x.dtype)
      x = (x * real).sum(1) / jnp.maximum(real.sum(1), 1)
    x = nn.tanh(nn.Dense(self.width, dtype=self.dtype, name='pooler')(x))
    x = self.dropped(transformer.Identity(name='hidden')(x), train)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='readout')(x)


def bert_encoder(
    num_classes: int, depth: int = 2, width: int = 128, heads: int = 4,
    hidden: int | None = None, vocabulary: int = 8192, length: int = 128,
    segments: int = 2, norm: str = 'post', activation: str = 'gelu',
    dropout: float = .1, pool: str = 'cls', dtype: str | None = None,
    separate: bool = False
) -> BertEncoder:
  r"""A BERT-style encoder for sentences and pairs of sentences.

  .. math::
    z_1 = \mathrm{attention}(W_{qkv} z_0 + b), \quad
    z_2 = \mathrm{LN}(\mathrm{dropout}(W_n z_1 + b_n) + z_0), \quad
    z_3 = \mathrm{GELU}(W_i z_2 + b_i), \quad
    z_4 = \mathrm{LN}(\mathrm{dropout}(W_o z_3 + b_o) + z_2)

  in each block, on the norm of the sum of token, position and segment
  embeddings; behind the blocks a dense layer with tanh on the first token
  ([CLS]), and the classifier. BERT: Pre-training of deep bidirectional
  transformers for language understanding, Devlin, Chang, Lee and Toutanova,
  NAACL 2019 (https://arxiv.org/abs/1810.04805); queries, keys and values are one
  map here, so that a layer is a chain of four.

  Parameters of the defaults with 2 classes: 1,478,786

    token          8192*128                     1,048,576
    position        128*128                        16,384
    segment           2*128                           256
    norm_embedding    2*128                           256
    block_0, block_1  2 * 198,272                 396,544
      attention/qkv    128*384 + 384     49,536
      attention/out    128*128 + 128     16,512
      feed_forward/in  128*512 + 512     66,048
      feed_forward/out 512*128 + 128     65,664
      two norms        2 * 2*128            512
    pooler           128*128 + 128                 16,512
    readout          128*2 + 2                        258

  With `norm='pre'` one more norm, of 256, lies behind the blocks.

  Args:
    num_classes: number of outputs.
    depth: number of blocks.
    width: d, of the tokens between blocks.
    heads: of each attention; they divide the width.
    hidden: width of a block's middle layer; default 4 d.
    vocabulary: number of tokens.
    length: number of positions: the longest input.
    segments: number of segments.
    norm: 'post' (as above) or 'pre'.
    activation: of the middle layer, a name that `bpjax.activations.get` knows.
    dropout: rate, behind embeddings, W_n, W_o and the pooler, in training.
    pool: what the pooler reads: 'cls', the first token, or 'mean', the mean over
      real tokens.
    dtype: of the computation, such as 'bfloat16'; default single precision.
    separate: whether queries, keys and values are three maps, the units
      `attention/query`, `attention/key` and `attention/value`, and not one; the
      parameters are as many.

  Returns:
    A module from tokens `[batch, length]` to logits `[batch, num_classes]`; its
    call takes `mask` (bool `[batch, length]`, True at real tokens), `segments`
    (whole numbers `[batch, length]`; default 0) and `train`.

  Raises:
    ValueError: for a value out of range; in the call, for tokens that are longer
      than the positions, of another type, or outside of the vocabulary, and a
      mask of another shape.

  Example:
    >>> model = bert_encoder(3, depth=4, width=64, vocabulary=1000)
  """
  transformer.check(
      depth=depth, width=width, heads=heads, hidden=hidden, norm=norm,
      dropout=dropout, separate=separate)
  for name, size in (('num_classes', num_classes), ('vocabulary', vocabulary),
                     ('length', length), ('segments', segments)):
    blocks.check_sizes(name, size)
  arguments.choice('pool', pool, _POOLS)
  return BertEncoder(
      depth, heads, 4 * width if hidden is None else hidden, norm, dropout,
      activations.get(activation), transformer.check_dtype(dtype), separate,
      num_classes,
      width, vocabulary, length, segments, pool)
