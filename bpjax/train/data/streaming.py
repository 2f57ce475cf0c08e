"""Streams a large set: random access, decoding and crops in threads.

The order of the examples and every random crop are pure functions of the seed,
the epoch and the example, so a run that resumes at batch k sees exactly the
batches that it would have seen, and skipping to k reads nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
import copy
import hashlib
import math
import os
from typing import Any

from bpjax.train.data import prepared
from bpjax.train.data.decoded import Split
import numpy as np

# Per-channel mean and standard deviation of the ImageNet training images in
# [0, 1], the customary constants: a stream is never read twice to measure its
# own.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The customary evaluation crop: 224 out of a short side of 256.
_CENTRE = 224 / 256
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
  """The order of the examples in one epoch.

  Sorts the raw Philox stream, which NumPy keeps fixed over versions and
  platforms; `Generator.permutation` carries no such promise.

  Args:
    num_examples: number of examples.
    seed: the run's seed, >= 0.
    epoch: which epoch, >= 0.

  Returns:
    int32 `[num_examples]`, a permutation of 0 .. num_examples - 1.

  Raises:
    ValueError: an argument is negative.

  Example:
    >>> order = epoch_order(len(train.labels), seed=0, epoch=3)
    >>> batch = train.images[order[:128]]
  """
  for name, value in (
      ('num_examples', num_examples), ('seed', seed), ('epoch', epoch)):
    if value < 0:
      raise ValueError(
          f'`{name}` must not be negative, got {value}; use 0 or more')
  bits = np.random.Philox(
      np.random.SeedSequence(int(seed), spawn_key=(int(epoch),)))
  return np.argsort(
      bits.random_raw(num_examples), kind='stable').astype(np.int32)


class Stream:
  """The examples of one split, read through grain as they are needed.

  A subclass says what is made of an example, `_example`, and which rows of a
  split a batch of them is, `rows`.

  Args:
    examples: random access.
    indices: which of `examples` belong to this stream; None for all.
    num_threads: threads that read and decode; None for one a core, at most 16.
  """

  def __init__(
      self, examples: Sequence[Any], indices: np.ndarray | None = None,
      num_threads: int | None = None):
    self._examples = examples
    self._indices = (
        np.arange(len(examples), dtype=np.int32) if indices is None
        else np.asarray(indices, np.int32))
    self._num_threads = num_threads or min(16, os.cpu_count() or 1)

  def __len__(self) -> int:
    return len(self._indices)

  @property
  def fingerprint(self) -> str:
    """Changes where the examples are others, or in another order."""
    which = hashlib.blake2b(np.ascontiguousarray(self._indices)).hexdigest()
    return f'{getattr(self._examples, "fingerprint", "")} {which}'

  def select(self, positions: np.ndarray) -> 'Stream':
    """The stream of the examples at `positions` of this one.

    Args:
      positions: integers `[n]` in [0, len(self)).

    Returns:
      A Stream that shares the files and settings of this one.

    Example:
      >>> quick = stream.select(np.arange(1000))
    """
    chosen = copy.copy(self)
    chosen._indices = self._indices[positions]
    return chosen

  def batches(
      self,
      batch_size: int,
      *,
      seed: int = 0,
      epoch: int = 0,
      start: int = 0,
      train: bool = True,
      part: np.ndarray | None = None,
  ) -> Iterator[dict[str, np.ndarray]]:
    """One epoch of batches, from batch `start` on.

    Training shuffles, crops and flips images at random, and drops a last batch
    that is not full (one shape, one compilation). Evaluation keeps the stored
    order, crops the centre, and keeps the last batch as it is.

    Args:
      batch_size: examples of a batch.
      seed: the run's seed; with `epoch` it fixes order and crops.
      epoch: which epoch.
      start: batches to leave out; costs nothing.
      train: training or evaluation.
      part: positions in each batch to read, as one of several processes does,
        `[n]`; None: all. What is behind the last example is that one again.

    Returns:
      An iterator of dicts, of images {'image': uint8 `[b, height, width,
      channels]`, 'label': int32 `[b]`}. Closing it ends the threads.

    Raises:
      ValueError: `batch_size` or `start` is out of range, grain is not
        installed, or (while reading) a label is outside [0, num_classes).

    Example:
      >>> resumed = stream.batches(256, seed=0, epoch=2, start=17)
    """
    if batch_size < 1 or (train and batch_size > len(self)):
      raise ValueError(
          f'`batch_size` must be between 1 and the {len(self)} examples of the '
          f'stream, got {batch_size}; choose a smaller one')
    if start < 0:
      raise ValueError(
          f'`start` must not be negative, got {start}; use 0 for a whole epoch')
    positions = (
        epoch_order(len(self), seed=seed, epoch=epoch) if train
        else np.arange(len(self)))
    grain = prepared.require('grain', 'streaming a data set')
    indices = self._indices[positions][start * batch_size:]
    if part is not None:
      count = (len(indices) if train else len(indices) + batch_size - 1)
      first = np.arange(count // batch_size)[:, None] * batch_size
      indices = indices[np.minimum(first + part, len(indices) - 1).ravel()]
      batch_size = len(part)
    return self._iterate(
        grain, indices, batch_size, (seed, epoch) if train else None)

  def rows(self, batch: Mapping[str, np.ndarray]) -> Any:
    """A batch as rows of a split.

    Example:
      >>> stream.rows(next(stream.batches(256))).labels.shape
      (256,)
    """
    raise NotImplementedError

  def _iterate(self, grain, indices, batch_size, randomness):
    """Yields from grain; `randomness` is (seed, epoch), or None for none."""
    if not len(indices):
      return
    reading = grain.ReadOptions(
        num_threads=self._num_threads,
        prefetch_buffer_size=max(self._num_threads, 2 * batch_size))
    dataset = (
        grain.MapDataset.source(indices)
        .map(lambda index: self._example(int(index), randomness))
        .to_iter_dataset(reading)
        .batch(batch_size, drop_remainder=randomness is not None))
    iterator = iter(dataset)
    try:
      yield from iterator
    finally:
      iterator.close()

  def _example(self, index, randomness) -> dict[str, np.ndarray]:
    """What is made of example `index`, where `randomness` may be None."""
    raise NotImplementedError


def check_label(label: int, num_classes: int, index: int) -> np.int32:
  """The label of a streamed example, if there is such a class.

  Raises:
    ValueError: if there is none.
  """
  if not 0 <= label < num_classes:
    raise ValueError(
        f'`labels` must lie in [0, {num_classes}), got {label} at example '
        f'{index}; prepare the data set again')
  return np.int32(label)


class ImageStream(Stream):
  """Images, cropped and scaled to one size.

  Args:
    examples: random access, `examples[i]` is (PIL image, label).
    indices: which of `examples` belong to this stream; None for all.
    num_classes: labels must lie in [0, num_classes).
    image_size: height and width of the images that are yielded.
    channels: 1 or 3, as the images of `examples` have.
    num_threads: threads that read and decode; None for one a core, at most 16.

  Example:
    >>> train = load('imagenet2012').train
    >>> for batch in train.batches(256, seed=0, epoch=0, start=100):
    ...   step(batch['image'], batch['label'])
  """

  def __init__(
      self,
      examples: Sequence[tuple[Any, int]],
      indices: np.ndarray | None = None,
      *,
      num_classes: int,
      image_size: int = 224,
      channels: int = 3,
      num_threads: int | None = None,
  ):
    if image_size < 1:
      raise ValueError(
          f'`image_size` must be at least 1, got {image_size}; use 224')
    super().__init__(examples, indices, num_threads)
    self._num_classes = num_classes
    self.image_shape = (image_size, image_size, channels)

  def rows(self, batch: Mapping[str, np.ndarray]) -> Split:
    return Split(batch['image'], batch['label'])

  def _example(self, index, randomness):
    image, label = self._examples[index]
    label = check_label(label, self._num_classes, index)
    if randomness is None:
      box, flip = _centre_box(*image.size), False
    else:
      seed, epoch = randomness
      rng = np.random.Generator(np.random.Philox(
          np.random.SeedSequence(seed, spawn_key=(epoch, index))))
      box, flip = _random_box(rng, *image.size), rng.random() < 0.5
    return {'image': _resize(image, box, flip, self.image_shape), 'label': label}


def _resize(image, box, flip, shape) -> np.ndarray:
  from PIL import Image

  pixels = np.asarray(
      image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box))
  return (pixels[:, ::-1] if flip else pixels).reshape(shape)


def _centre_box(width: int, height: int) -> tuple[float, ...]:
  """(left, top, right, bottom) of the centre square that evaluation sees."""
  side = _CENTRE * min(width, height)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _random_box(
    rng: np.random.Generator, width: int, height: int) -> tuple[float, ...]:
  """A crop of random area and aspect ratio (Szegedy et al. 2015, 1409.4842)."""
  for _ in range(_TRIES):
    area = width * height * rng.uniform(*_AREA)
    ratio = math.exp(rng.uniform(*map(math.log, _RATIO)))
    crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if crop_width <= width and crop_height <= height:
      left = rng.uniform(0, width - crop_width)
      top = rng.uniform(0, height - crop_height)
      # Rounding must not push the box one ulp over the edge: PIL refuses that.
      return (left, top, min(left + crop_width, width),
              min(top + crop_height, height))
  return _centre_box(width, height)
