"""A recurrent network for sentences."""

from bpjax import arguments
from bpjax import blocks
from bpjax import transformer
import flax.linen as nn
import jax.numpy as jnp

_POOLS = ('mean', 'last')


class Lstm(nn.Module):
  """Embedding, an LSTM, readout; see `lstm`."""
  num_classes: int
  width: int
  vocabulary: int
  length: int
  pool: str
  dtype: jnp.dtype | None

  @nn.compact
  def __call__(self, tokens, mask=None, train: bool = False):
    del train
    transformer.check_tokens(
        'lstm', tokens, mask, self.vocabulary, self.length)
    x = nn.Embed(
        self.vocabulary, self.width, dtype=self.dtype, name='token')(tokens)
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    cell = nn.LSTMCell(self.width, dtype=self.dtype, name='cell')
    zeros = jnp.zeros((len(x), self.width), x.dtype)
    (_, last), x = nn.RNN(cell, return_carry=True, name='rnn')(
        x, initial_carry=(zeros, zeros), seq_lengths=real.sum(1))
    if self.pool == 'mean':
      real = real[:, :, None].astype(x.dtype)
      last = (x * real).sum(1) / jnp.maximum(real.sum(1), 1)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='readout')(last)


def lstm(
    num_classes: int, width: int = 128, vocabulary: int = 8192,
    length: int = 128, pool: str = 'mean', dtype: str | None = None) -> Lstm:
  """An LSTM that reads a sentence, and a readout of what it has put out.

  Long short-term memory, Hochreiter and Schmidhuber, Neural Computation 1997, in
  the form of `flax.linen.LSTMCell`: each of four gates has a matrix for the input,
  and one with a bias for the state, and each of these is a unit.

  Parameters of the defaults with 2 classes: 1,180,418

    token      8192*128               1,048,576
    cell/i*    4 * 128*128               65,536
    cell/h*    4 * (128*128 + 128)       66,048
    readout      128*2 + 2                  258

  Args:
    num_classes: number of outputs.
    width: of the embedding and of the state.
    vocabulary: number of tokens.
    length: the longest input.
    pool: what the readout reads: 'mean', the mean over the outputs at real
      tokens, or 'last', the output at the last of them.
    dtype: of the computation, such as 'bfloat16'; default single precision.

  Returns:
    A module from tokens `[batch, length]` to logits `[batch, num_classes]`; its
    call takes `mask` (bool `[batch, length]`, True at real tokens, which come
    first) and `train`.

  Raises:
    ValueError: for a value out of range; in the call, as in `bert_encoder`.

  Example:
    >>> model = lstm(2, width=64, vocabulary=1000)
  """
  for name, size in (('num_classes', num_classes), ('width', width),
                     ('vocabulary', vocabulary), ('length', length)):
    blocks.check_sizes(name, size)
  arguments.choice('pool', pool, _POOLS)
  return Lstm(
      num_classes, width, vocabulary, length, pool,
      transformer.check_dtype(dtype))
