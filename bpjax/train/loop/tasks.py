"""What a model is asked on a data set: its inputs, its answers, their scores.

A task turns a batch (rows of a split, a NamedTuple of arrays with `labels`
among them) into what the model reads, and what the model answers into sums.
The trainer knows nothing else of images, sentences or languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import bpjax
from bpjax.train import data as data_lib
from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import NONE
from bpjax.train.data.rows import Tokens
import jax
import jax.numpy as jnp
import numpy as np

LOSSES = ('cross_entropy', 'sigmoid_cross_entropy', 'squared_error')


class Sums(NamedTuple):
  """Results of some steps or batches, float32 unless said.

  Attributes:
    loss: sum of the losses, [].
    correct: number of correct answers, int32 [].
    count: number of answers, [].
    characters: that they stand for; 0 where nobody counts, [].
  """
  loss: jax.Array
  correct: jax.Array
  count: jax.Array
  characters: jax.Array


class Task(Protocol):
  """What images, sentences and languages have in common.

  Attributes:
    reads: what the model is called with, 'images' or 'tokens'.
    facts: name -> value of what a model has to know, where it takes an argument
      of that name.
  """
  reads: str

  @property
  def facts(self) -> Mapping[str, int]:
    ...

  def inputs(self, batch: Any) -> Any:
    """What the model reads."""

  def metrics(self, sums: Sums) -> dict[str, float]:
    """Numbers for the metrics; the loss is the first, and accuracy the second.
    """


@dataclasses.dataclass(frozen=True)
class Images:
  """A class for every image.

  Attributes:
    num_classes: how many there are.
    mean: subtracted from images scaled to [0, 1], `[channels]`.
    std: what they are divided by then, `[channels]`.
  """
  num_classes: int
  mean: np.ndarray
  std: np.ndarray
  reads = 'images'

  @property
  def facts(self) -> Mapping[str, int]:
    return {'num_classes': self.num_classes}

  def inputs(self, batch: Any) -> jax.Array:
    """Images `[batch, height, width, channels]` as the model reads them."""
    return data_lib.normalise(batch.images, self.mean, self.std)

  def metrics(self, sums: Sums) -> dict[str, float]:
    """Mean loss, and the share of correct answers."""
    return _means(sums)


@dataclasses.dataclass(frozen=True)
class Text:
  """A class for every text, or the next token for every token."""
  asked: Asked
  reads = 'tokens'

  @property
  def facts(self) -> Mapping[str, int]:
    known = self.asked._asdict()
    return {k: known[k] for k in ('num_classes', 'vocabulary', 'length')}

  def inputs(self, batch: Tokens) -> bpjax.Inputs:
    """Tokens, with a mask that is True at real ones, and segments of a pair."""
    place = jnp.arange(batch.tokens.shape[1])
    first, end = batch.ends[:, :1], batch.ends[:, 1:]
    mask = place < end
    segments = {}
    if self.asked.pairs:
      segments['segments'] = (mask & (place >= first)).astype(jnp.int32)
    return bpjax.Inputs(batch.tokens, mask=mask, **segments)

  def metrics(self, sums: Sums) -> dict[str, float]:
    """Means over answers; of a language perplexity and bits a character, too.

    Bits are counted by the text's own characters, so that tokenisers compare:
    the sum of all losses over log 2, by the number of characters.
    """
    numbers = _means(sums)
    if sums.characters:
      # Too large a loss has no perplexity that a float holds.
      numbers['perplexity'] = math.exp(min(numbers['loss'], 700.))
      numbers['bits_per_character'] = float(
          sums.loss / math.log(2) / sums.characters)
    return numbers


def _means(sums):
  return {
      'loss': float(sums.loss / sums.count),
      'accuracy': float(sums.correct / sums.count)}


def loss_function(
    name: str, num_classes: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The loss called `name`, of an output and integer labels.

  Its mean is that over the labels that are asked for, so that padding changes
  no update: the others are 0, and these are scaled up by their rarity.

  Args:
    name: one of `LOSSES`.
    num_classes: number of the model's outputs.

  Returns:
    `(output [batch, ..., classes], labels [batch, ...]) -> losses`, in single
    precision at least.
  """
  def squared_error(output, labels):
    targets = jax.nn.one_hot(labels, num_classes, dtype=output.dtype)
    return bpjax.losses.squared_error(output, targets)

  function = {
      'cross_entropy': bpjax.losses.softmax_cross_entropy,
      'sigmoid_cross_entropy': bpjax.losses.sigmoid_cross_entropy,
      'squared_error': squared_error}[name]

  def loss(output, labels):
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    if labels.ndim == 1:
      return function(output, labels)
    asked = labels != NONE
    losses = function(output, jnp.maximum(labels, 0))
    rarity = labels.size / jnp.maximum(jnp.sum(asked, dtype=losses.dtype), 1)
    return jnp.where(asked, losses * rarity, 0)

  return loss


def sums(
    loss: jax.Array, output: jax.Array, batch: Any,
    mask: jax.Array | None = None) -> Sums:
  """What a batch adds to the results.

  Args:
    loss: the mean over the labels that are asked for, []; or `loss_function`'s
      losses, whose sum where `mask` is True is taken.
    output: the model's, with its classes last.
    batch: rows of a split.
    mask: bool `[batch]`, False at rows that do not count; None: all do.

  Returns:
    The sums, over the labels that are asked for.
  """
  labels = batch.labels
  asked = labels != NONE if labels.ndim > 1 else jnp.ones(labels.shape, bool)
  # What the loss scaled them by.
  rarity = labels.size / jnp.maximum(jnp.sum(asked, dtype=jnp.float32), 1)
  characters = getattr(batch, 'characters', None)
  if mask is not None:
    asked = asked & mask.reshape(-1, *[1] * (asked.ndim - 1))
    characters = None if characters is None else jnp.where(mask, characters, 0)
  right = (jnp.argmax(output, axis=-1) == labels) & asked
  count = jnp.sum(asked, dtype=jnp.float32)
  loss = loss.astype(jnp.float32)
  return Sums(
      jnp.sum(jnp.where(asked, loss, 0)) / rarity if loss.ndim else loss * count,
      jnp.sum(right, dtype=jnp.int32), count,
      jnp.float32(0) if characters is None
      else jnp.sum(characters, dtype=jnp.float32))
