"""What a model is asked on a data set: its inputs, its answers, their scores.

A task turns a batch (rows of a split, a NamedTuple of arrays with `labels`
among them) into what the model reads, and what the model answers into sums.
The trainer knows nothing else of images, sentences or languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    more: name -> sum of a metric of the user's own, []; {} in training.
  """
  loss: jax.Array
  correct: jax.Array
  count: jax.Array
  characters: jax.Array
  more: dict[str, jax.Array]


class Task(Protocol):
  """What images, sentences and languages have in common.

  Attributes:
    reads: what the model is called with, 'images' or 'tokens'.
    facts: name -> value of what a model has to know, where it takes an argument
      of that name.
  """
  reads: str

  @property
  def facts(self) -> Mapping[str, Any]:
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
    image_shape: (height, width, channels), or (features,).
    mean: subtracted from images scaled to [0, 1], `[channels]`.
    std: what they are divided by then, `[channels]`.
  """
  num_classes: int
  image_shape: tuple[int, ...]
  mean: np.ndarray
  std: np.ndarray
  reads = 'images'

  @property
  def facts(self) -> Mapping[str, Any]:
    return {
        'num_classes': self.num_classes, 'image_shape': self.image_shape,
        'in_features': math.prod(self.image_shape)}

  def inputs(self, batch: Any) -> jax.Array:
    """Images `[batch, *image_shape]` as the model reads them."""
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
      'accuracy': float(sums.correct / sums.count),
      **{name: float(x / sums.count) for name, x in sums.more.items()}}


def loss_function(
    loss: str | Callable[..., jax.Array], num_classes: int,
    smoothing: float = 0., weights: Sequence[float] = ()
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """A loss of an output and integer labels, as the trainer calls it.

  Its mean is that over the labels that are asked for, so that padding changes
  no update: the others are 0, and these are scaled up by their rarity.

  Args:
    loss: one of `LOSSES`, or a function of output and labels.
    num_classes: number of the model's outputs.
    smoothing: the share of the target that is spread over all classes (Szegedy
      et al. 2016, arXiv 1512.00567).
    weights: what the losses of each class are multiplied by; none: 1.

  Returns:
    `(output [batch, ..., classes], labels [batch, ...]) -> losses`, in single
    precision at least.
  """
  def squared_error(output, labels):
    targets = jax.nn.one_hot(labels, num_classes, dtype=output.dtype)
    return bpjax.losses.squared_error(output, targets)

  function = loss if callable(loss) else {
      'cross_entropy': bpjax.losses.softmax_cross_entropy,
      'sigmoid_cross_entropy': bpjax.losses.sigmoid_cross_entropy,
      'squared_error': squared_error}[loss]

  def of_classes(output, labels):
    losses = function(output, labels)
    if losses.shape != labels.shape:
      raise ValueError(
          f'`loss` must return one number for each of the {labels.shape} labels, '
          f'got {losses.shape}.')
    if smoothing:
      uniform = -jnp.mean(jax.nn.log_softmax(output), axis=-1)
      losses = (1 - smoothing) * losses + smoothing * uniform
    if len(weights):
      losses *= jnp.asarray(weights, losses.dtype)[labels]
    return losses

  def of_labels(output, labels):
    output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
    if labels.ndim == 1:
      return of_classes(output, labels)
    asked = labels != NONE
    losses = of_classes(output, jnp.maximum(labels, 0))
    rarity = labels.size / jnp.maximum(jnp.sum(asked, dtype=losses.dtype), 1)
    return jnp.where(asked, losses * rarity, 0)

  return of_labels


def sums(
    loss: jax.Array, output: jax.Array, batch: Any,
    mask: jax.Array | None = None,
    metrics: Mapping[str, Callable[..., jax.Array]] | None = None) -> Sums:
  """What a batch adds to the results.

  Args:
    loss: the mean over the labels that are asked for, []; or `loss_function`'s
      losses, whose sum where `mask` is True is taken.
    output: the model's, with its classes last.
    batch: rows of a split.
    mask: bool `[batch]`, False at rows that do not count; None: all do.
    metrics: name -> `(output, labels) -> a number a label`.

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
      else jnp.sum(characters, dtype=jnp.float32),
      {name: jnp.sum(jnp.where(
          asked, metric(output, jnp.maximum(labels, 0)), 0), dtype=jnp.float32)
       for name, metric in (metrics or {}).items()})
