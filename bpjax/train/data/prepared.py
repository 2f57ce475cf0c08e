"""Looks into a TFDS data directory before TFDS is asked anything.

A prepared data set is a folder `<data_dir>/<name>[/<config>]/<version>/` that
holds `dataset_info.json` and `features.json`. Both are plain JSON, so what is
there, and whether it can be read, is known without TFDS and at once: TFDS
itself would try the network for minutes before it says that a set is missing.
"""

from collections.abc import Iterator, Mapping, Sequence
import difflib
import errno
import hashlib
import importlib
import io
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

KNOWN = (
    'ag_news_subset', 'associative_recall', 'cifar10', 'cifar100', 'digits',
    'emnist', 'fashion_mnist', 'glue/mnli', 'glue/sst2', 'imagenet2012',
    'imdb_reviews', 'kmnist', 'listops', 'lm1b', 'mnist', 'multi_nli',
    'svhn_cropped', 'tiny_shakespeare',
)
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_NAME = re.compile(
    r'(?P<path>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?')
# The classes that a features.json may name. TFDS imports whatever it finds there.
_FEATURE = re.compile(r'tensorflow_datasets\.core\.features\.\w+\.\w+')
_FORMATS = ('JPEG', 'PNG')  # What TFDS stores; Pillow runs programs for others.
_HASHED_BYTES = 2**30  # Of a larger set the ends of its files alone are.
_END_BYTES = 2**16
# Their published test split has no labels (all -1).
_UNLABELLED_TEST = frozenset(
    {'glue', 'imagenet2012', 'imagenet2012_subset', 'super_glue'})
# Splits to test on, the first that is there; multi_nli has two of each kind.
_TESTS = ('test', 'validation', 'validation_matched')
# Pairs of texts in the order in which they are read; others are in that of the
# alphabet.
_PAIRS = (
    ('premise', 'hypothesis'), ('sentence1', 'sentence2'),
    ('question1', 'question2'), ('question', 'sentence'), ('title', 'text'),
    ('title', 'content'))


class Prepared(NamedTuple):
  """What the JSON files of one prepared data set say.

  Attributes:
    name: 'mnist', or with a config 'imagenet_resized/8x8'.
    version: '3.0.1'.
    path: the folder that holds `dataset_info.json`.
    splits: number of examples of each split.
    test: the split to test on: 'test', else 'validation'.
    image_key: name of the Image feature; '' of a set of texts.
    label_key: name of the ClassLabel feature; '' where there is none.
    image_shape: (height, width, channels), None where a size varies; () of texts.
    num_classes: classes of the ClassLabel feature; 0 where there is none.
    fingerprint: changes when the set was prepared from other data, of which
      labels are a part.
    text_keys: names of the Text features of an example, one or two; () of a set
      of images.
    num_bytes: that train and test take on the disk.
  """

  name: str
  version: str
  path: pathlib.Path
  splits: Mapping[str, int]
  test: str
  image_key: str
  label_key: str
  image_shape: tuple[int | None, ...]
  num_classes: int
  fingerprint: str
  text_keys: tuple[str, ...] = ()
  num_bytes: int = 0

  @property
  def channels(self) -> int:
    """Channels of the decoded images: 1 or 3."""
    return 1 if self.image_shape[-1] == 1 else 3


class Records:
  """Random access to the records of one split, as TFDS gives them.

  Args:
    prepared: the set.
    split: name of the split.
    decoders: TFDS decoders by feature.
  """

  def __init__(
      self, prepared: Prepared, split: str,
      decoders: Mapping[str, Any] | None = None):
    tfds = require('tensorflow_datasets', f'reading {prepared.name!r}')
    self._prepared = prepared
    self._split = split
    builder = tfds.builder_from_directory(prepared.path)
    try:
      self._source = builder.as_data_source(split=split, decoders=decoders)
      # The files are opened, and found missing or cut short, only here.
      self._source.__getitems__([0])
    except (OSError, RuntimeError) as error:
      raise self._damaged('files', error) from error

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[Any, int]:
    return self.__getitems__([index])[0]

  def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
    """Several examples, read from disk at once: several times as fast."""
    indices = [int(index) for index in indices]
    try:
      records = self._source.__getitems__(indices)
    except (OSError, RuntimeError) as error:
      raise self._damaged('files', error) from error
    return [
        (self._made(index, record), int(record.get(self._prepared.label_key, 0)))
        for index, record in zip(indices, records)]

  @property
  def fingerprint(self) -> str:
    """Of the set and the split."""
    return f'{self._prepared.fingerprint} {self._split}'

  def _made(self, index, record):
    """What an example is made of beside its label."""
    raise NotImplementedError

  def _damaged(self, what: str, error: Exception) -> ValueError:
    return ValueError(
        f'`dataset` {self._prepared.name!r} must be whole, but of '
        f'{self._split!r} in {self._prepared.path} cannot be read: {what} '
        f'({error}); prepare it again')


class Examples(Records):
  """Images of one split: `examples[i]` is (PIL image, label).

  Images are decoded here with PIL, not by TFDS, which would take OpenCV where
  it is installed: JPEG decoders differ in the last bit, and one data set has to
  be the same array on every machine.

  Example:
    >>> image, label = Examples(find('mnist', directory), 'train')[0]
  """

  def __init__(self, prepared: Prepared, split: str):
    tfds = require('tensorflow_datasets', f'reading {prepared.name!r}')
    require('PIL.Image', f'decoding {prepared.name!r}')
    super().__init__(
        prepared, split, {prepared.image_key: tfds.decode.SkipDecoding()})

  @property
  def encoding(self) -> str:
    """How the first image is stored: 'PNG' or 'JPEG'."""
    return self._open(self._source[0]).format

  def _made(self, index, record):
    mode = 'L' if self._prepared.channels == 1 else 'RGB'
    try:
      # Opening reads only the header; converting reads the pixels.
      return self._open(record).convert(mode)
    except OSError as error:
      raise self._damaged(f'an image at example {index}', error) from error

  def _open(self, record: Mapping[str, Any]) -> Any:
    from PIL import Image

    return Image.open(
        io.BytesIO(record[self._prepared.image_key]), formats=_FORMATS)


class Texts(Records):
  """Texts of one split: `examples[i]` is (one or two texts, label).

  The label is 0 in a set without labels.

  Example:
    >>> (sentence,), label = Texts(find('glue/sst2', directory), 'train')[0]
  """

  def _made(self, index, record):
    try:
      return tuple(record[key].decode() for key in self._prepared.text_keys)
    except UnicodeDecodeError as error:
      raise self._damaged(f'a text at example {index}', error) from error


def require(module: str, purpose: str) -> Any:
  """Imports an optional module, or says in one sentence how to get it.

  Args:
    module: name of the module, 'tensorflow_datasets'.
    purpose: what needs it, for the error: "reading 'mnist'".

  Raises:
    ValueError: the module is not installed.

  Example:
    >>> grain = require('grain', 'streaming')
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
        f'{purpose} needs the Python package {module.split(".")[0]} ({error}); '
        "install the extra with `pip install 'bpjax[train]'`, or copy "
        'the decoded cache file of the data set to this machine') from error


def data_directory(data_dir: str | os.PathLike | None) -> pathlib.Path:
  """The TFDS directory: the argument, else TFDS_DATA_DIR, else TFDS's own.

  Example:
    >>> data_directory(None)
    PosixPath('/home/me/tensorflow_datasets')
  """
  chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or os.path.join(
      '~', 'tensorflow_datasets')
  return pathlib.Path(chosen).expanduser()


def names(directory: pathlib.Path) -> list[str]:
  """Names of the data sets, with their configs, that `directory` holds.

  Example:
    >>> names(data_directory('/data/tfds'))
    ['cifar10', 'glue/sst2', 'mnist']
  """
  found = set()
  for pattern in ('*/*/dataset_info.json', '*/*/*/dataset_info.json'):
    for info in directory.glob(pattern):
      if _VERSION.fullmatch(info.parent.name):
        found.add(info.parent.parent.relative_to(directory).as_posix())
  return sorted(found)


def split_name(name: str) -> tuple[str, str | None]:
  """Takes 'name[/config][:version]' apart into its path and its version.

  Raises:
    ValueError: `name` is not of that form.

  Example:
    >>> split_name('mnist:3.0.1')
    ('mnist', '3.0.1')
  """
  match = _NAME.fullmatch(name) if isinstance(name, str) else None
  if match is None:
    raise ValueError(
        "`dataset` must be of the form 'name', 'name/config' or "
        f"'name:1.2.3', got {name!r}; known are {', '.join(KNOWN)}")
  return match['path'], match['version']


def find(
    name: str, directory: pathlib.Path, text_features: Sequence[str] = ()
) -> Prepared | None:
  """Reads what is prepared under `name`; None where nothing is.

  Args:
    name: 'name', 'name/config', each with ':version' if not the newest.
    directory: the TFDS data directory.
    text_features: names of the texts to read, one or two; none: as the set's
      features say.

  Raises:
    ValueError: the set is there but cannot be used: it holds neither images with
      classes nor texts, has no train or test split, is stored in a format
      without random access, or its JSON files are damaged.

  Example:
    >>> find('mnist', data_directory('/data/tfds')).splits
    {'train': 60000, 'test': 10000}
  """
  path, version = split_name(name)
  try:
    infos = [
        info for info in (directory / path).glob('*/dataset_info.json')
        if _VERSION.fullmatch(info.parent.name)
        and version in (None, info.parent.name)]
  except OSError as error:
    if error.errno != errno.ENAMETOOLONG:
      raise
    infos = []  # No folder has such a name.
  if not infos:
    return None
  folder = max(infos, key=lambda info: version_key(info.parent.name)).parent
  return _describe(path, folder, tuple(text_features))


def version_key(version: str) -> tuple[int, ...]:
  """Sorts versions by number: '3.10.0' after '3.9.0'."""
  return tuple(int(part) for part in version.split('.'))


def missing(name: str, directory: pathlib.Path) -> ValueError:
  """The error for a set that `directory` does not hold, or no set at all.

  Args:
    name: what was asked for.
    directory: where it was looked for.

  Returns:
    A ValueError to raise, one sentence with the way out.

  Example:
    >>> raise missing('cifar100', directory)
  """
  here = names(directory)
  path, _ = split_name(name)
  known = {*KNOWN, *here, *(other.split('/')[0] for other in here)}
  known.update(_registered())
  if not directory.is_dir():
    holds = 'which does not exist'
  elif here:
    holds = f'which holds {", ".join(here)}'
  else:
    holds = 'which holds no prepared data set'
  configs = [other for other in here if other.startswith(f'{path}/')]
  if configs:
    return ValueError(
        f'`dataset` must name a config of {path!r}, got {name!r}; '
        f'{directory} holds {", ".join(configs)}')
  if path.split('/')[0] not in known:
    near = difflib.get_close_matches(path, sorted(known), n=3)
    hint = f'did you mean {" or ".join(map(repr, near))}' if near else (
        "use 'digits' or the name of a TFDS set of images or texts")
    return ValueError(
        "`dataset` must be 'digits', a generated task, a TFDS name or data of "
        f"your own (a path such as './{path}', or code), got {name!r}; {hint}; "
        f'searched {directory}, {holds}')
  return ValueError(
      f'`dataset` {name!r} is not prepared in {directory}, {holds}; on a '
      'machine with a network and tensorflow installed (preparing needs it, '
      'reading does not) run `python -m tensorflow_datasets.scripts.cli.main '
      f'build {name} --data_dir={directory} --file_format=array_record`, or '
      'set `data_dir` or TFDS_DATA_DIR to the directory that holds it')


def _registered() -> list[str]:
  """Names that TFDS knows, nothing where it is not installed."""
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    return []
  # The community sets are an index on the network.
  return tfds.list_builders(with_community_datasets=False)


def _describe(
    name: str, folder: pathlib.Path, text_features: tuple[str, ...]) -> Prepared:
  """Reads the two JSON files of one version folder."""
  try:
    info = json.loads((folder / 'dataset_info.json').read_text('utf-8'))
    features = json.loads((folder / 'features.json').read_text('utf-8'))
    classes = sorted(set(_classes(features)))
    splits = {
        split['name']: sum(map(int, split.get('shardLengths', ())))
        for split in info.get('splits', ())}
    features = features.get('featuresDict', {}).get('features', {})
  except (OSError, ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as error:
    raise ValueError(
        f'`dataset` {name!r} must have a readable dataset_info.json and '
        f'features.json in {folder}, got {type(error).__name__}: {error}; '
        'prepare it again') from error
  for feature in classes:
    if not _FEATURE.fullmatch(feature):
      raise ValueError(
          f'`dataset` {name!r} must have features of TFDS alone, got '
          f'{feature!r} in {folder / "features.json"}, which is not imported; '
          'choose another data set')
  _check_format(name, folder, info)
  image_key, text_keys, label_key = _keys(name, info, features, text_features)
  test = _test_split(name, splits)
  shape = ()
  if image_key:
    shape = _image_shape(name, features[image_key]['image'])
  return Prepared(
      name=name, version=folder.name, path=folder, splits=splits, test=test,
      image_key=image_key, label_key=label_key, image_shape=shape,
      num_classes=int(
          features[label_key]['classLabel']['numClasses']) if label_key else 0,
      fingerprint=_fingerprint(folder, [info['splits'], features]),
      text_keys=text_keys,
      num_bytes=sum(
          int(split.get('numBytes', 0)) for split in info['splits']
          if split['name'] in ('train', test)))


def _image_shape(name, image):
  shape = tuple(
      int(size) if int(size) > 0 else None
      for size in image.get('shape', {}).get('dimensions', (-1, -1, -1)))
  if image.get('dtype', 'uint8') != 'uint8' or shape[-1] not in (1, 3, None):
    raise ValueError(
        f'`dataset` {name!r} must have uint8 images of 1 or 3 channels, got '
        f'{image.get("dtype")} of shape {shape}; choose another data set')
  return shape


def _classes(value: Any) -> Iterator[str]:
  """Names of classes in a features.json, also in JSON within its texts."""
  if isinstance(value, Mapping):
    for key, inner in value.items():
      if not isinstance(inner, str):
        yield from _classes(inner)
      elif key in ('pythonClassName', 'python_class_name', 'type'):
        yield inner
      elif key == 'json':
        yield from _classes(json.loads(inner))
  elif isinstance(value, list):
    for inner in value:
      yield from _classes(inner)


def _fingerprint(folder: pathlib.Path, description: Any) -> str:
  """A hash of what a set says of itself, and of its examples' files."""
  files = sorted(folder.glob('*.array_record*'))
  whole = sum(file.stat().st_size for file in files) <= _HASHED_BYTES
  digest = hashlib.blake2b(
      json.dumps(description, sort_keys=True).encode(), digest_size=16)
  for path in files:
    digest.update(f'{path.name} {path.stat().st_size}'.encode())
    with path.open('rb') as file:
      if whole:
        digest.update(hashlib.file_digest(file, 'blake2b').digest())
        continue
      digest.update(file.read(_END_BYTES))
      file.seek(max(path.stat().st_size - _END_BYTES, 0))
      digest.update(file.read())
  return digest.hexdigest()


def _check_format(name: str, folder: pathlib.Path, info: Mapping) -> None:
  stored = [info.get('fileFormat', 'tfrecord'),
            *info.get('alternativeFileFormats', ())]
  if 'array_record' not in stored:
    raise ValueError(
        f'`dataset` {name!r} must be stored as array_record, got '
        f'{", ".join(stored)} in {folder}; prepare it again with `python -m '
        f'tensorflow_datasets.scripts.cli.main build {name} --data_dir=DIR '
        '--file_format=array_record` into another directory')


def _keys(name, info, features, text_features):
  """The Image feature or '', the Text features, the ClassLabel feature or ''."""
  of_kind = lambda kind: [
      key for key, value in features.items() if kind in value]
  images, labels, texts = map(of_kind, ('image', 'classLabel', 'text'))
  supervised = tuple(
      item.get('featureKey') for item in info.get('supervisedKeys', {}).get(
          'tuple', {}).get('items', ()))
  if images and not text_features:
    for pair in (supervised, ('image', 'label')):
      if len(pair) == 2 and pair[0] in images and pair[1] in labels:
        return pair[0], (), pair[1]
    if len(images) == 1 and len(labels) == 1:
      return images[0], (), labels[0]
  elif texts:
    chosen = _text_keys(name, texts, text_features)
    known = [key for key in ('label', *supervised) if key in labels]
    if known or len(labels) < 2:
      return '', chosen, (known or labels or [''])[0]
  raise ValueError(
      f'`dataset` {name!r} must hold images with one ClassLabel, or texts, got '
      f'the features {", ".join(sorted(features)) or "none"}; only such sets are '
      'read')


def _text_keys(name, texts, text_features):
  """The names of one or two texts."""
  if not text_features:
    # What names an example is no text of it.
    found = sorted(t for t in texts if not re.search('(^|_)(id|idx|uid)$', t))
    pair = next((p for p in _PAIRS if set(p) == set(found)), tuple(found))
    if 1 <= len(pair) <= 2:
      return pair
  elif len(text_features) <= 2 and set(text_features) <= set(texts):
    return text_features
  raise ValueError(
      f'`text_features` must name one or two texts of `dataset` {name!r}, got '
      f'{", ".join(text_features) or "none"}; it has {", ".join(sorted(texts))}')


def _test_split(name: str, splits: Mapping[str, int]) -> str:
  unlabelled = name.split('/')[0] in _UNLABELLED_TEST
  for split in _TESTS[unlabelled:]:
    if splits.get(split) and splits.get('train'):
      return split
  raise ValueError(
      f'`dataset` {name!r} must have a train split and one of '
      f'{", ".join(_TESTS[unlabelled:])}, got {", ".join(splits) or "none"}; '
      'choose another data set')
