"""Data sets as arrays or streams, with fixed splits and a fixed order.

`load` reads scikit-learn's `digits`, any TFDS set of images with classes or of
texts that is prepared on this machine, without TensorFlow, a plain text file, or
makes the examples of a generated task. A set of images of up to 1 GiB is decoded
once to arrays and kept in one cache file, `<cache_dir>/<name>-<version>.npz`;
that file is all that a machine without TFDS needs. A larger set, or one whose
images vary in size, is streamed (`Stream`). Of texts see `bpjax.train.data.text`,
of a user's own data `bpjax.train.data.own`.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any, NamedTuple

from bpjax.train.data import decoded
from bpjax.train.data import generated
from bpjax.train.data import own
from bpjax.train.data import prepared
from bpjax.train.data import preprocessing as preprocessing_lib
from bpjax.train.data import splits
from bpjax.train.data import text
from bpjax.train.data.decoded import Split
from bpjax.train.data.own import Whole
from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import Tokens
from bpjax.train.data.streaming import epoch_order
from bpjax.train.data.streaming import IMAGENET_MEAN
from bpjax.train.data.streaming import IMAGENET_STD
from bpjax.train.data.streaming import ImageStream
from bpjax.train.data.streaming import Stream
import numpy as np

_MAX_DECODED_BYTES = 2**30
_DIGITS_TEST = 360
_CHUNK = 1024


class Dataset(NamedTuple):
  """A data set as `load` returns it.

  Attributes:
    name: as it was asked for.
    num_classes: labels lie in [0, num_classes).
    image_shape: (height, width, channels) of what the model sees, (features,) of
      rows of numbers; () of texts.
    train: the training examples, without those of `validation`.
    validation: examples held out of train; None where none were asked for.
    test: the test examples.
    mean: float32 `[channels]`, of the train images scaled to [0, 1]; of
      ImageNet where `train` is a Stream; 0 where images are preprocessed.
    std: float32 `[channels]`, likewise; 1 where a channel is constant, and
      where images are preprocessed.
    source: one line for the log: what was read, and from where.
    asked: what is asked of texts; None of images, whose class it is.
    tokenizer: the JSON text of the tokeniser of texts, or ''.
    classes: their names, where they have some.
  """

  name: str
  num_classes: int
  image_shape: tuple[int, ...]
  train: Split | Tokens | Stream
  validation: Split | Tokens | Stream | None
  test: Split | Tokens | Stream
  mean: np.ndarray
  std: np.ndarray
  source: str
  asked: Asked | None = None
  tokenizer: str = ''
  classes: tuple[str, ...] = ()


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    validation: int = 0,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    train_examples: int | None = None,
    stream: bool = False,
    image_size: int = 0,
    preprocessing: str = '',
    zca_epsilon: float = .1,
    tokenizer: str = '',
    vocabulary: int = 8192,
    length: int = 0,
    text_features: Sequence[str] = (),
    dataset_args: Mapping[str, Any] | None = None,
    trained_tokenizer: str = '',
) -> Dataset:
  """Loads a data set by name.

  Args:
    name: 'digits' (in scikit-learn's wheel); a name of `generated.names()`; the
      path of a text file, which ends in '.txt'; the path of own data, or code
      that returns a Dataset, see `own.load`; or the name of a TFDS set of
      images with classes or of texts, 'name[/config][:version]'.
    data_dir: TFDS data directory; default TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    validation: number of examples to hold out of train, 0: none, or of texts the
      set's own validation split, if it has one besides test.
    seed: the run's seed, accepted so that a caller can hand over its config;
      no split depends on it.
    cache_dir: folder of the decoded arrays; default BPJAX_CACHE_DIR, else
      ~/.cache/bpjax.
    train_examples: keep only so many of the remaining train examples; None
      for all.
    stream: stream a set that would fit into arrays as well.
    image_size: height and width that streamed images, and those of one's own,
      are scaled to; 0: 224 of streamed ones, their own of others.
    preprocessing: '' (none), 'gcn' (global contrast normalisation) or 'gcn_zca'
      (ZCA whitening after it, by the images of `train` alone); see
      `bpjax.train.data.preprocessing`. Whitened images are kept in a cache file.
    zca_epsilon: of the whitening.
    tokenizer: of texts, see `text.load`; so are `vocabulary` and `length`.
    vocabulary: largest number of tokens.
    length: tokens of every row; 0: the default of the task.
    text_features: which texts of an example to read, one or two; none: as the
      set's features say.
    dataset_args: arguments of a generated task, or of own data, by name.
    trained_tokenizer: the JSON text of a tokeniser to use in place of training
      one.

  Returns:
    A Dataset of uint8 images and int32 labels, or float16 images where they are
    preprocessed; of rows of tokens where it is one of texts.

  Raises:
    ValueError: the set is unknown, not prepared, neither of images with classes
      nor of texts, damaged, has a label outside its classes, or is smaller than
      `validation` and `train_examples` ask for; it is streamed, or its
      images are too large, and they are to be preprocessed; or an argument does
      not fit the set.

  Example:
    >>> dataset = load('digits', validation=200)
    >>> dataset.train.images.shape
    (1237, 8, 8, 1)
  """
  del seed
  folder = _cache_folder(cache_dir)
  directory = prepared.data_directory(data_dir)
  corpus = found = None
  if name in generated.names():
    arguments = dict(dataset_args or {})
    if length:
      arguments['length'] = length
    made = generated.get(name)(**arguments)
    kept, out = splits.hold_out(
        len(made.train.labels), validation, train_examples)
    chosen = made.validation if out is None else _select(made.train, out)
    train = made.train if kept is None else _select(made.train, kept)
    return _of_texts(name, text.Loaded(
        train, chosen, made.test, made.asked, '', made.source))
  whole = None
  if str(name).endswith('.txt'):
    corpus = text.from_file(name)
  elif own.is_own(name) and not (
      own.is_bare(name) and prepared.find(name, directory, text_features)):
    read = own.load(
        name, image_size=image_size, text_features=text_features,
        arguments=dict(dataset_args or {}), most_bytes=_MAX_DECODED_BYTES)
    if isinstance(read, Dataset):
      return held_out(checked(name, read), validation, train_examples)
    if isinstance(read, text.Corpus):
      corpus = read
    elif isinstance(read, Whole):
      whole = read
    else:
      raise ValueError(
          f'`dataset` {name!r} must return a `bpjax.train.Dataset`, got '
          f'{type(read).__name__}; make one with `bpjax.train.dataset`.')
  elif name != 'digits':
    found = prepared.find(name, directory, text_features)
    if found is None:
      corpus = text.from_cache(name, folder)
    elif found.text_keys:
      corpus = text.from_prepared(found, folder, stream)
  if corpus is not None:
    return _of_texts(name, text.load(
        name, corpus, kind=tokenizer, vocabulary=vocabulary, length=length,
        validation=validation, train_examples=train_examples,
        cache_dir=folder, trained=trained_tokenizer))
  if whole is not None:
    pass
  elif name == 'digits':
    if stream:
      raise ValueError(
          "`stream` must be False for 'digits', got True; it is a small array")
    whole = _digits()
  else:
    whole = _tfds(name, found, directory, folder, stream, image_size or 224)
  kept, out = splits.hold_out(_size(whole.train), validation, train_examples)
  dataset = _described(name, whole._replace(
      train=whole.train if kept is None else _select(whole.train, kept),
      validation=(
          whole.validation if out is None else _select(whole.train, out))))
  if not preprocessing:
    return dataset
  return _preprocessed(dataset, preprocessing, zca_epsilon, folder)


def from_arrays(
    train: tuple[Any, Any], test: tuple[Any, Any],
    validation: tuple[Any, Any] | None = None, *,
    classes: Sequence[str] = (), name: str = 'arrays') -> Dataset:
  """A Dataset of arrays, for `fit` and for functions that return data.

  Args:
    train: images and labels. Images are `[n, height, width(, channels)]`, uint8
      or floats, or rows of numbers `[n, features]`, each of which is scaled by
      itself; labels `[n]` are integers from 0 on, or texts.
    test: likewise.
    validation: likewise, or None.
    classes: names of the classes.
    name: of the set.

  Raises:
    ValueError: for arrays of other shapes or kinds.

  Example:
    >>> x, y = np.random.rand(90, 5), np.arange(90) % 3
    >>> data = from_arrays((x[:60], y[:60]), (x[60:], y[60:]))
    >>> data.num_classes, data.image_shape
    (3, (5,))
  """
  arrays = {'train': train, 'test': test}
  if validation is not None:
    arrays['validation'] = validation
  return _described(name, own.from_arrays(name, arrays, name, classes))


def checked(name: str, dataset: Dataset) -> Dataset:
  """A Dataset that somebody else has made, if its parts fit together.

  Raises:
    ValueError: if they do not.
  """
  for part in ('train', 'test', 'validation'):
    split = getattr(dataset, part)
    if split is None and part == 'validation' or isinstance(split, Stream):
      continue
    if not isinstance(split, (Split, Tokens)):
      raise ValueError(
          f'`{part}` of `dataset` {name!r} must be a Split, Tokens or a Stream, '
          f'got {type(split).__name__}; make it with `bpjax.train.dataset`.')
    labels = np.asarray(split.labels)
    if not len(labels) or labels.dtype.kind != 'i' or (
        labels.max() >= dataset.num_classes):
      raise ValueError(
          f'labels of `{part}` of `dataset` {name!r} must be integers below '
          f'{dataset.num_classes}, and one at least; mend them.')
  return dataset


def held_out(
    dataset: Dataset, validation: int, train_examples: int | None) -> Dataset:
  """A Dataset without some training examples; its own validation else."""
  kept, out = splits.hold_out(
      _size(dataset.train), validation, train_examples)
  if out is not None:
    dataset = dataset._replace(validation=_select(dataset.train, out))
  if kept is not None:
    dataset = dataset._replace(train=_select(dataset.train, kept))
  return dataset


def _described(name: str, whole: Whole) -> Dataset:
  """A set with the moments of its training images."""
  if isinstance(whole.train, Stream):
    image_shape = whole.train.image_shape
    mean, std = _imagenet_moments(image_shape[-1])
  else:
    image_shape = whole.train.images.shape[1:]
    mean, std = _moments(whole.train.images)
  return Dataset(
      name=name, num_classes=whole.num_classes, image_shape=image_shape,
      train=whole.train, validation=whole.validation, test=whole.test,
      mean=mean, std=std, source=whole.source, classes=whole.classes)


def _of_texts(name: str, loaded: text.Loaded) -> Dataset:
  nothing = np.zeros(0, np.float32)
  return Dataset(
      name=name, num_classes=loaded.asked.num_classes, image_shape=(),
      train=loaded.train, validation=loaded.validation, test=loaded.test,
      mean=nothing, std=nothing, source=loaded.source, asked=loaded.asked,
      tokenizer=loaded.tokenizer)


def _preprocessed(dataset, kind, epsilon, cache_dir) -> Dataset:
  if len(dataset.image_shape) != 3:
    raise ValueError(
        f"`preprocessing` must be '' for {dataset.name!r}, got {kind!r}: it "
        'holds rows of numbers, and no images; leave it out')
  if isinstance(dataset.train, Stream):
    raise ValueError(
        f"`preprocessing` must be '' for {dataset.name!r}, got {kind!r}: it is "
        'streamed, and preprocessed images have to fit into memory; choose a '
        'smaller set, or none')
  train, validation, test = preprocessing_lib.apply(
      kind, epsilon, (dataset.train, dataset.validation, dataset.test),
      dataset.name.replace('/', '-').replace(':', '-'), cache_dir)
  return dataset._replace(
      train=train, validation=validation, test=test,
      mean=np.zeros_like(dataset.mean), std=np.ones_like(dataset.std),
      source=f'{kind} of {dataset.source}')


def normalise(images: Any, mean: Any, std: Any) -> Any:
  """Scales images to [0, 1], then to mean 0 and variance 1 in each channel.

  Args:
    images: uint8 `[..., channels]`, a NumPy or a JAX array (traced or not); or
      floats, which are not scaled to [0, 1].
    mean: float32 `[channels]`.
    std: float32 `[channels]`.

  Returns:
    float32, in the shape of `images`.

  Example:
    >>> data = load('digits')
    >>> normalise(data.test.images, data.mean, data.std).dtype.name
    'float32'
  """
  white = np.float32(
      1 if np.issubdtype(images.dtype, np.floating) else 255)
  return (images.astype(np.float32) / white - mean) / std


def _digits() -> Whole:
  """scikit-learn's 1,797 digits; the last 360 of a fixed order are test."""
  datasets = prepared.require('sklearn.datasets', "reading 'digits'")
  images, labels = datasets.load_digits(return_X_y=True)
  order = epoch_order(len(labels), seed=splits.SEED, epoch=0)
  images = np.rint(images[order] * (255 / 16)).astype(np.uint8)
  images = images.reshape(-1, 8, 8, 1)
  labels = labels[order].astype(np.int32)
  return Whole(
      train=Split(images[:-_DIGITS_TEST], labels[:-_DIGITS_TEST]),
      test=Split(images[-_DIGITS_TEST:], labels[-_DIGITS_TEST:]),
      num_classes=10, source='digits from scikit-learn')


def _tfds(name, found, directory, cache_dir, stream, image_size) -> Whole:
  """A TFDS set of images: from its cache file, else from its prepared folder."""
  if found is None:
    path = None if stream else decoded.newest_cache(name, cache_dir)
    cached = None if path is None else decoded.read_cache(path)
    if cached is None:
      raise prepared.missing(name, directory)
    return _from_cache(name, cached, path)
  if stream or not _fits(found):
    return _streamed(found, image_size)
  path = decoded.cache_path(found.name, found.version, cache_dir)
  cached = decoded.read_cache(path)
  # The same name and version may have been prepared from other data.
  if cached is not None and cached.fingerprint == found.fingerprint:
    return _from_cache(name, cached, path)
  cached = decoded.decode(found)
  decoded.write_cache(path, cached)
  return Whole(
      cached.train, cached.test, cached.num_classes,
      f'{found.name} {found.version} ({cached.encoding} images) decoded from '
      f'{found.path}')


def _cache_folder(cache_dir) -> pathlib.Path:
  return pathlib.Path(
      cache_dir or os.environ.get('BPJAX_CACHE_DIR')
      or os.path.join('~', '.cache', 'bpjax')).expanduser()


def _fits(found: prepared.Prepared) -> bool:
  """Whether the arrays of train and test fit into memory as uint8."""
  if None in found.image_shape:
    return False
  examples = found.splits['train'] + found.splits[found.test]
  return examples * int(np.prod(found.image_shape)) <= _MAX_DECODED_BYTES


def _streamed(found: prepared.Prepared, image_size: int) -> Whole:
  splits = [
      ImageStream(
          prepared.Examples(found, split), num_classes=found.num_classes,
          image_size=image_size, channels=found.channels)
      for split in ('train', found.test)]
  return Whole(
      *splits, found.num_classes,
      f'{found.name} {found.version} streamed from {found.path}')


def _from_cache(
    name: str, cached: decoded.Decoded, path: pathlib.Path) -> Whole:
  for split, which in ((cached.train, 'train'), (cached.test, 'test')):
    decoded.check_labels(split.labels, cached.num_classes, f'{name} {which}')
  return Whole(
      cached.train, cached.test, cached.num_classes,
      f'{path.stem} ({cached.encoding} images) from the cache file {path}')


def _size(split: Split | Stream) -> int:
  return len(split) if isinstance(split, Stream) else len(split.labels)


def _select(split: Split | Stream, positions: np.ndarray) -> Split | Stream:
  if isinstance(split, Stream):
    return split.select(positions)
  return type(split)(*(
      x if x is None else x[positions] for x in split))


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation `[channels]`, of bytes scaled to [0, 1]."""
  if images.dtype != np.uint8:
    pixels = images.reshape(-1, images.shape[-1])
    std = pixels.std(0, dtype=np.float64)
    return (pixels.mean(0, dtype=np.float64).astype(np.float32),
            np.where(std > 0, std, 1.).astype(np.float32))
  # In pieces: a float copy of a set at the size limit would take 8 GiB.
  total, squares = 0, 0
  for start in range(0, len(images), _CHUNK):
    piece = images[start:start + _CHUNK].astype(np.uint32)
    total = total + piece.sum((0, 1, 2), dtype=np.uint64)
    squares = squares + (piece * piece).sum((0, 1, 2), dtype=np.uint64)
  count = images[..., 0].size
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0)) / 255
  # A constant channel carries nothing; dividing by 0 would make it NaN.
  std = np.where(std > 0, std, 1.0)
  return (mean / 255).astype(np.float32), std.astype(np.float32)


def _imagenet_moments(channels: int) -> tuple[np.ndarray, np.ndarray]:
  """ImageNet's constants; their average where images are grey."""
  mean = np.asarray(IMAGENET_MEAN, np.float32)
  std = np.asarray(IMAGENET_STD, np.float32)
  if channels == 1:
    return mean.mean(keepdims=True), std.mean(keepdims=True)
  return mean, std
