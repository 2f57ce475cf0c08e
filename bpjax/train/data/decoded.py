"""The decoded arrays of a small image set, and the file that keeps them.

A cache file, `<cache_dir>/<name>-<version>.npz`, holds both splits and all that
is known about them, so it can be copied to a machine without TFDS. It appears
whole or not at all, however many processes write it at once.
"""

from collections.abc import Callable, Mapping
import hashlib
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple
import uuid
import warnings
import zipfile
import zlib

from bpjax.train.data import prepared
import numpy as np

_CHUNK = 256  # examples read from disk at once


class Split(NamedTuple):
  """The decoded examples of one split.

  Attributes:
    images: uint8 `[n, height, width, channels]`, as decoded; float16 once they
      are preprocessed; float32 `[n, features]` of rows of numbers.
    labels: int32 `[n]`.
  """

  images: np.ndarray
  labels: np.ndarray


class Decoded(NamedTuple):
  """A small set in memory: what a cache file holds.

  Attributes:
    train: all train examples.
    test: the examples to test on.
    num_classes: labels lie in [0, num_classes).
    encoding: how the images were stored: 'PNG' or 'JPEG'.
    fingerprint: of the prepared folder, `Prepared.fingerprint`.
  """

  train: Split
  test: Split
  num_classes: int
  encoding: str
  fingerprint: str


def decode(found: prepared.Prepared) -> Decoded:
  """Decodes the train and the test split of a prepared set.

  Args:
    found: a set of fixed image shape.

  Raises:
    ValueError: TFDS or Pillow is not installed, an image is damaged or of
      another size, or a label is outside its classes.

  Example:
    >>> decode(prepared.find('mnist', directory)).train.images.shape
    (60000, 28, 28, 1)
  """
  logging.getLogger(__name__).info(
      'decoding %s %s, once', found.name, found.version)
  splits, size = [], found.image_shape[1::-1]
  for split in ('train', found.test):
    examples = prepared.Examples(found, split)
    piece = []
    images = np.empty((len(examples), *found.image_shape), np.uint8)
    labels = np.empty(len(examples), np.int32)
    for i in range(len(examples)):
      if i % _CHUNK == 0:
        piece = examples.__getitems__(
            range(i, min(i + _CHUNK, len(examples))))
      image, labels[i] = piece[i % _CHUNK]
      if image.size != size:
        raise ValueError(
            f'`dataset` {found.name!r} must have images {size[0]} wide and '
            f'{size[1]} high, got {image.size} at example {i} of {split!r}; '
            'prepare it again')
      images[i] = np.asarray(image).reshape(found.image_shape)
    check_labels(labels, found.num_classes, f'{found.name} {split}')
    splits.append(Split(images, labels))
  return Decoded(
      *splits, found.num_classes, examples.encoding, found.fingerprint)


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
  """Raises ValueError, naming the first label outside [0, num_classes).

  Args:
    labels: integers `[n]`.
    num_classes: the number of classes.
    where: which labels they are, for the error.

  Example:
    >>> check_labels(np.array([0, 9]), 10, 'mnist train')
  """
  bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(bad):
    raise ValueError(
        f'`labels` of {where} must lie in [0, {num_classes}), got '
        f'{labels[bad[0]]} at example {bad[0]}; prepare the data set again')


def cache_path(
    name: str, version: str, cache_dir: pathlib.Path, kind: str = ''
) -> pathlib.Path:
  """The file that keeps one version of a set; of another `kind` than images too.

  Example:
    >>> cache_path('mnist', '3.0.1', pathlib.Path('cache'))
    PosixPath('cache/mnist-3.0.1.npz')
  """
  kind = kind and f'-{kind}'
  return cache_dir / f'{name.replace("/", "-")}-{version}{kind}.npz'


def newest_cache(
    name: str, cache_dir: pathlib.Path, kind: str = '') -> pathlib.Path | None:
  """The cache file of 'name[/config][:version]', the newest; None without one.

  Raises:
    ValueError: `name` is not of that form.

  Example:
    >>> newest_cache('mnist', pathlib.Path('cache'))
    PosixPath('cache/mnist-3.0.1.npz')
  """
  path, version = prepared.split_name(name)
  kind = kind and f'-{kind}'
  pattern = re.compile(
      re.escape(path.replace('/', '-')) + rf'-(\d+\.\d+\.\d+){kind}\.npz')
  files = {
      match[1]: file for file in cache_dir.glob('*.npz')
      if (match := pattern.fullmatch(file.name))
      and version in (None, match[1])}
  return files[max(files, key=prepared.version_key)] if files else None


def read_cache(path: pathlib.Path) -> Decoded | None:
  """The arrays of a cache file; None where there is none.

  A damaged file is None too, with a warning that names it.

  Example:
    >>> read_cache(pathlib.Path('cache/mnist-3.0.1.npz')).num_classes
    10
  """
  return read_arrays(path, _from_file)


def _from_file(file):
  """A `Decoded`; ValueError where its arrays are not those that were written."""
  splits = [
      Split(file[f'{split}_images'], file[f'{split}_labels'])
      for split in ('train', 'test')]
  for images, labels in splits:
    if images.ndim != 4 or labels.shape != images.shape[:1]:
      raise ValueError(f'shapes {images.shape} and {labels.shape}')
    if images.dtype != np.uint8 or labels.dtype != np.int32:
      raise ValueError(f'dtypes {images.dtype} and {labels.dtype}')
  found = Decoded(
      *splits, int(file['num_classes']), str(file['encoding']),
      str(file['fingerprint']))
  if str(file['digest']) != _digest(found):
    raise ValueError('its arrays are not those that were written')
  return found


def _digest(decoded):
  """A hash of images, labels and all that is said of them."""
  digest = hashlib.blake2b(repr(decoded[2:]).encode(), digest_size=16)
  for split in (decoded.train, decoded.test):
    for array in split:
      digest.update(repr(array.shape).encode())
      digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def read_arrays(
    path: pathlib.Path, make: Callable[[Mapping[str, np.ndarray]], Any]
) -> Any | None:
  """What `make` makes of the arrays of a cache file; None where there is none.

  A damaged file is None too, with a warning that names it.

  Args:
    path: of the file.
    make: takes the arrays by name; may raise a ValueError or a KeyError for
      what they cannot be.

  Example:
    >>> read_arrays(path, lambda file: file['train_labels'])
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      return make(file)
  except (FileNotFoundError, NotADirectoryError):
    return None
  # What NumPy and zipfile raise depends on the byte that is damaged.
  except (OSError, ValueError, KeyError, TypeError, EOFError,
          zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
    warnings.warn(
        f'the cache file {path} is damaged or cannot be read '
        f'({type(error).__name__}: {error}) and is not used', stacklevel=3)
    return None


def write_cache(path: pathlib.Path, cached: Decoded) -> None:
  """Writes a cache file whole or not at all; a folder that refuses it warns.

  Not compressed: reading takes a fraction of a second so, and seconds else.

  Example:
    >>> write_cache(cache_path('mnist', '3.0.1', folder), decode(found))
  """
  write_arrays(path, {
      'train_images': cached.train.images, 'train_labels': cached.train.labels,
      'test_images': cached.test.images, 'test_labels': cached.test.labels,
      'num_classes': cached.num_classes, 'encoding': cached.encoding,
      'fingerprint': cached.fingerprint, 'digest': _digest(cached)})


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes a cache file of any arrays, as `write_cache` does.

  Example:
    >>> write_arrays(pathlib.Path('cache/mine.npz'), {'mean': np.zeros(3)})
  """
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, 'xb') as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    warnings.warn(
        f'the cache file {path} cannot be written ({error}), so what it would '
        'hold is made anew each time; set BPJAX_CACHE_DIR to a folder with '
        'write permission', stacklevel=3)
