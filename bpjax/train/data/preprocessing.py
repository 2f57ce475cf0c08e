"""Global contrast normalisation and ZCA whitening of small image sets.

Both are done once, before training, to whole sets in memory; the whitened
images of a large one are kept in a cache file beside its decoded arrays. The
statistics are those of the training images alone: what is held out of them for
validation, and the test images, are whitened with them.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import logging
import pathlib
from typing import NamedTuple

from bpjax.train.data import decoded
from bpjax.train.data.decoded import Split
import numpy as np

_CHUNK = 1024  # Images that are floats of full precision at once.
_CONTRAST_BIAS = 10.  # In squared grey levels; of a flat image nothing is left.
_MOST_VALUES = 2**13  # Of an image that is whitened: a covariance of 512 MiB.
_CACHED_FROM = 2**24  # Values of a set; a smaller one takes under a second.


class Whitening(NamedTuple):
  """A linear map that whitens images.

  Attributes:
    mean: float32 `[values]`, of the images that it was made from.
    matrix: float32 `[values, values]`, symmetric.
  """
  mean: np.ndarray
  matrix: np.ndarray


def contrast_normalised(images: np.ndarray) -> np.ndarray:
  r"""Each image minus its mean, divided by its standard deviation.

  .. math::
    x \leftarrow (x - \bar x) / \sqrt{10 + \overline{(x - \bar x)^2}}

  Means are over all positions and channels of an image, in grey levels from 0
  to 255. Deep learning, Goodfellow, Bengio and Courville, 2016, equation 12.3,
  with the customary 10 so that images without contrast stay flat.

  Args:
    images: uint8 `[n, height, width, channels]`.

  Returns:
    float32, in that shape.

  Example:
    >>> image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    >>> x = contrast_normalised(image)
    >>> f'{abs(x.mean()):.3f} {x.std():.3f}'
    '0.000 0.975'
  """
  x = images.astype(np.float32)
  x -= x.mean((1, 2, 3), keepdims=True)
  x /= np.sqrt(_CONTRAST_BIAS + (x * x).mean((1, 2, 3), keepdims=True))
  return x


def whitening(images: np.ndarray, epsilon: float) -> Whitening:
  r"""The ZCA whitening of contrast-normalised images.

  .. math::
    W = U (\Lambda + \epsilon)^{-1/2} U^T, \qquad C = U \Lambda U^T

  C is the covariance over all values of an image. W is the whitening that
  changes images the least; directions whose variance is far below epsilon,
  mostly noise, stay small. Contrast normalisation leaves one of variance 0.

  Args:
    images: uint8 `[n, height, width, channels]`, the training images.
    epsilon: added to each variance; .1 is usual.

  Returns:
    A `Whitening`.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (500, 2, 2, 1), np.uint8)
    >>> whitening(images, .1).matrix.shape
    (4, 4)
  """
  values = int(np.prod(images.shape[1:]))
  pieces = lambda: (
      contrast_normalised(images[i:i + _CHUNK]).reshape(-1, values)
      for i in range(0, len(images), _CHUNK))
  mean = sum(p.sum(0, dtype=np.float64) for p in pieces()) / len(images)
  mean = mean.astype(np.float32)
  covariance = np.zeros((values, values))
  for piece in pieces():
    piece -= mean
    covariance += piece.T @ piece
  variances, directions = np.linalg.eigh(covariance / len(images))
  # Rounding makes variances of 0 negative.
  scale = 1 / np.sqrt(np.maximum(variances, 0) + epsilon)
  return Whitening(
      mean, ((directions * scale) @ directions.T).astype(np.float32))


def whitened(images: np.ndarray, by: Whitening) -> np.ndarray:
  """Contrast-normalised images after a whitening.

  Args:
    images: uint8 `[n, height, width, channels]`.
    by: from `whitening`, of the training images.

  Returns:
    float16, in that shape: half the memory of float32, and rounded by less
    than a thousandth.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> images = rng.integers(0, 256, (500, 2, 2, 1), np.uint8)
    >>> whitened(images, whitening(images, .1)).dtype
    dtype('float16')
  """
  def function(piece):
    x = contrast_normalised(piece)
    return ((x.reshape(len(x), -1) - by.mean) @ by.matrix).reshape(x.shape)

  return _in_pieces(images, function)


def apply(
    kind: str, epsilon: float, splits: Sequence[Split | None],
    stem: str, cache_dir: pathlib.Path) -> list[Split | None]:
  """Preprocesses a set's splits, the first of which is the training images.

  Args:
    kind: 'gcn' or 'gcn_zca'.
    epsilon: of the whitening.
    splits: of uint8 images; None where there is no such split. Statistics are
      those of the first alone.
    stem: what the cache file's name begins with.
    cache_dir: folder of the cache file.

  Returns:
    The splits with float16 images.

  Raises:
    ValueError: for images too large to be whitened.

  Example:
    >>> folder = pathlib.Path('cache')
    >>> train, held_out, test = apply(
    ...     'gcn_zca', .1, (train, held_out, test), 'cifar10', folder)
  """
  if kind == 'gcn':
    return _with_images(splits, [
        None if s is None else _in_pieces(s.images, contrast_normalised)
        for s in splits])
  train = splits[0].images
  if train[0].size > _MOST_VALUES:
    raise ValueError(
        f"`preprocessing` 'gcn_zca' needs images of at most {_MOST_VALUES} "
        f'values, got {train[0].size}, whose covariance is too large; use '
        "'gcn', or smaller images")
  path = None
  if sum(s.images.size for s in splits if s is not None) >= _CACHED_FROM:
    path = cache_dir / f'{stem}-{kind}-{_digest(splits, epsilon)}.npz'
    images = decoded.read_arrays(path, lambda file: _images(file, splits))
    if images is not None:
      return _with_images(splits, images)
    logging.getLogger(__name__).info('whitening %s, once', stem)
  by = whitening(train, epsilon)
  images = [None if s is None else whitened(s.images, by) for s in splits]
  if path is not None:
    decoded.write_arrays(path, {
        f'images_{i}': x for i, x in enumerate(images) if x is not None})
  return _with_images(splits, images)


def _in_pieces(images, function):
  """float16 results of a function of a few images at a time."""
  results = np.empty(images.shape, np.float16)
  for i in range(0, len(images), _CHUNK):
    results[i:i + _CHUNK] = function(images[i:i + _CHUNK])
  return results


def _digest(splits, epsilon):
  """A name for what goes into whitened images: the images, in their splits."""
  settings = repr((epsilon, _CONTRAST_BIAS))
  digest = hashlib.blake2b(settings.encode(), digest_size=8)
  for split in splits:
    images = None if split is None else split.images
    digest.update(repr(getattr(images, 'shape', None)).encode())
    if images is not None:
      digest.update(np.ascontiguousarray(images))
  return digest.hexdigest()


def _images(file, splits):
  """The arrays of a cache file, one a split."""
  images = []
  for i, split in enumerate(splits):
    images.append(None if split is None else file[f'images_{i}'])
    if split is not None and (
        images[i].shape != split.images.shape or images[i].dtype != np.float16):
      raise ValueError(f'shape {images[i].shape} of {images[i].dtype}')
  return images


def _with_images(splits, images):
  return [
      None if split is None else Split(x, split.labels)
      for split, x in zip(splits, images, strict=True)]
