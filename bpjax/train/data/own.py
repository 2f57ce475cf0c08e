"""Data of a user's own: folders of images, arrays, tables, saved data sets, code.

Each is read into what the sets by name are read into, with a split that is the
file's own or a fixed one. Nothing in a file is run: arrays are read without
pickles, images by the decoders of plain formats alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import hashlib
import os
import pathlib
from typing import Any, NamedTuple

from bpjax.train import named
from bpjax.train.data import prepared
from bpjax.train.data import splits as splits_lib
from bpjax.train.data import streaming
from bpjax.train.data import text
from bpjax.train.data.decoded import Split
import numpy as np

FORMATS = ('PNG', 'JPEG', 'BMP', 'GIF', 'TIFF', 'WEBP')
_IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.tif', '.tiff', '.webp')
_TABLES = ('.csv', '.tsv', '.parquet')
_FILES = ('.npz', *_TABLES)
_SPLITS = ('train', 'validation', 'test')
_ARRAYS = (  # Names of images and labels in an .npz file.
    ('{}_images', '{}_labels'), ('x_{}', 'y_{}'), ('X_{}', 'y_{}'))
_TEST = 6  # One in so many examples, where nobody says which are test.
_DEEP = ('I', 'I;16', 'I;16B', 'I;16L', 'F')  # More than eight bits a pixel.


class Whole(NamedTuple):
  """A set of images, or of rows of numbers, before examples are held out.

  Attributes:
    train: the training examples.
    test: the examples to test on.
    num_classes: labels lie in [0, num_classes).
    source: one line for the log.
    validation: the set's own, or None.
    classes: their names, where they have some.
  """
  train: Split | streaming.Stream
  test: Split | streaming.Stream
  num_classes: int
  source: str
  validation: Split | streaming.Stream | None = None
  classes: tuple[str, ...] = ()


def is_own(name: Any) -> bool:
  """Whether a name is that of own data: code, a file, or a path of a folder.

  A folder has to be given as a path (with a separator at its start or its end,
  or '~'), or to lie in the current folder under a name without any.

  Example:
    >>> is_own('flowers.csv'), is_own('./flowers'), is_own('glue/sst2')
    (True, True, False)
  """
  if not isinstance(name, str) or not name:
    return False
  return (named.is_code(name) or name.lower().endswith(_FILES)
          or name.startswith(('.', '/', '~')) or name.endswith('/')
          or os.sep not in name and os.path.isdir(name))


def is_bare(name: str) -> bool:
  """Whether a name says by nothing but a folder here that it is own data.

  A set of that name that is prepared comes first.
  """
  return os.path.isdir(name) and not name.startswith(('.', '/', '~')) and (
      not name.endswith('/'))


def load(
    name: str, *, image_size: int, text_features: Sequence[str],
    arguments: Mapping[str, Any], most_bytes: int) -> Any:
  """Reads data of a user's own.

  Args:
    name: code, or a path.
    image_size: height and width that images are scaled to; 0: they must have
      one size.
    text_features: the columns of a table that are texts.
    arguments: `label` and `split`, names of columns of a table or of a saved
      data set; those of the function where `name` is code.
    most_bytes: a larger set of images is streamed.

  Returns:
    A Whole, a `text.Corpus`, or what the code returned.

  Raises:
    ValueError: for whatever cannot be read, in one sentence with the way out.
  """
  if named.is_code(name):
    return named.called(
        'dataset', name, named.find('dataset', name), **arguments)
  path = pathlib.Path(name).expanduser()
  if not path.exists():
    raise _wrong(name, 'is a path where nothing lies', 'give another')
  unknown = set(arguments) - {'label', 'split'}
  if unknown:
    raise ValueError(
        f'`dataset_args` of {name!r} must be `label` or `split`, got '
        f'{sorted(unknown)[0]!r}; leave it out.')
  try:
    if path.is_dir():
      return _directory(
          name, path, image_size, text_features, arguments, most_bytes)
    if path.suffix.lower() == '.npz':
      return _arrays(name, path)
    if path.suffix.lower() in _TABLES:
      return _tables(name, {'': path}, text_features, arguments)
  except OSError as error:
    raise _wrong(name, f'cannot be read ({error.strerror or error})',
                 'mend that, or give another path') from error
  raise _wrong(
      name, 'is a file of no kind that is known',
      f'give one that ends in {", ".join(_FILES)} or .txt, or a folder')


def _wrong(name, what, way_out):
  return ValueError(f'`dataset` {name!r} {what}; {way_out}.')


def _directory(name, path, image_size, text_features, arguments, most_bytes):
  if (path / 'dataset_dict.json').exists() or (path / 'state.json').exists():
    return _saved(name, path, image_size, text_features, arguments)
  for suffix in _TABLES:
    tables = {s: path / f'{s}{suffix}' for s in _SPLITS
              if (path / f'{s}{suffix}').exists()}
    if tables:
      if not {'train', 'test'} <= set(tables):
        raise _wrong(
            name, f'holds {", ".join(t.name for t in tables.values())}',
            f'it must hold train{suffix} and test{suffix}')
      return _tables(name, tables, text_features, arguments)
  if arguments:
    raise _wrong(
        name, 'is a folder of images, whose folders are its classes',
        'leave `dataset_args` out')
  return _images(name, path, image_size, most_bytes)


# Images


class ImageFiles(Sequence):
  """Random access to image files: `examples[i]` is (PIL image, label).

  Args:
    files: their paths.
    labels: a class each.
    channels: 1 or 3.
    name: of the set, for errors.
  """

  def __init__(
      self, files: Sequence[pathlib.Path], labels: Sequence[int], channels: int,
      name: str):
    self._files, self._labels = list(files), list(labels)
    self._channels, self._name = channels, name

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    image = open_image(self._files[index])
    return convert(image, self._channels), self._labels[index]

  @property
  def fingerprint(self) -> str:
    """Of the files' names, sizes and classes."""
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(self._files, self._labels):
      digest.update(
          f'{file.parent.name}/{file.name} {file.stat().st_size} {label}\n'
          .encode())
    return digest.hexdigest()


def open_image(path: pathlib.Path) -> Any:
  """Opens an image of a plain format, and reads its header.

  Raises:
    ValueError: if it is none.
  """
  image_lib = prepared.require('PIL.Image', 'reading images')
  try:
    return image_lib.open(path, formats=FORMATS)
  except (OSError, ValueError, SyntaxError,
          image_lib.DecompressionBombError) as error:
    raise _unreadable(path, error) from error


def convert(image: Any, channels: int) -> Any:
  """A PIL image with one channel or three, of eight bits each."""
  image_lib = prepared.require('PIL.Image', 'reading images')
  try:
    if image.mode in _DEEP:
      pixels = np.asarray(image, np.float64)
      if pixels.size and (pixels.min() < 0 or pixels.max() >= 2**16):
        raise OSError('its pixels do not lie in [0, 65536)')
      image = image_lib.fromarray((pixels / 256).astype(np.uint8))
    return image.convert('L' if channels == 1 else 'RGB')
  except (OSError, ValueError, SyntaxError) as error:
    raise _unreadable(getattr(image, 'filename', 'an image'), error) from error


def _unreadable(path, error):
  return ValueError(
      f'the image {path} cannot be read ({error}); mend or remove it, or save '
      'it as PNG.')


def to_array(image: Any, height: int, width: int, channels: int) -> np.ndarray:
  """An image as uint8 `[height, width, channels]`.

  One of another size is cut to the largest part around its centre that has this
  shape, and scaled.

  Example:
    >>> to_array(open_image('cat.png'), 32, 32, 3).shape
    (32, 32, 3)
  """
  image_lib = prepared.require('PIL.Image', 'reading images')
  image = convert(image, channels)
  if image.size != (width, height):
    scale = min(image.width / width, image.height / height)
    w, h = scale * width, scale * height
    left, top = (image.width - w) / 2, (image.height - h) / 2
    box = (left, top, min(left + w, image.width), min(top + h, image.height))
    image = image.resize(
        (width, height), image_lib.Resampling.BILINEAR, box=box)
  return np.asarray(image).reshape(height, width, channels)


def _images(name, path, image_size, most_bytes):
  """A folder train/CLASS/*, test/CLASS/*, or CLASS/* with a fixed split."""
  folders = {f.name: f for f in sorted(path.iterdir())
             if f.is_dir() and not f.name.startswith('.')}
  if 'val' in folders and 'validation' not in folders:
    folders['validation'] = folders.pop('val')
  given = {s: folders[s] for s in _SPLITS if s in folders}
  if given and not {'train', 'test'} <= set(given):
    raise _wrong(
        name, f'holds the folder {next(iter(given))}, and not both of train '
        'and test', 'make the other, or leave the classes side by side')
  classes = tuple(
      f.name for f in sorted((given or {'train': path})['train'].iterdir())
      if f.is_dir() and not f.name.startswith('.'))
  if len(classes) < 2:
    raise _wrong(
        name, f'holds {len(classes) or "no"} folder{"s" * (len(classes) != 1)} '
        'of a class, and must hold two at least',
        'put the images of each class into a folder of its name, such as '
        'train/cat/1.png')
  listed = {s: _listed(name, s, f, classes) for s, f in (
      given or {'': path}).items()}
  modes, sizes = set(), set()
  for files, _ in listed.values():
    for file in files:
      with open_image(file) as image:
        modes.add(image.mode)
        sizes.add(image.size)
  channels = 1 if modes <= {'1', 'L', 'LA', *_DEEP} else 3
  if not image_size and len(sizes) > 1:
    some = ' and '.join(f'{w} x {h}' for w, h in sorted(sizes)[:2])
    raise _wrong(
        name, f'holds images of several sizes, such as {some}',
        'set `image_size`, to which they are scaled')
  width, height = (image_size, image_size) if image_size else sizes.pop()
  if not given:
    files, labels = listed.pop('')
    kept, held_out = fixed_split(len(files))
    listed = {s: ([files[i] for i in which], [labels[i] for i in which])
              for s, which in (('train', kept), ('test', held_out))}
  total = sum(len(files) for files, _ in listed.values())
  examples = {s: ImageFiles(files, labels, channels, name)
              for s, (files, labels) in listed.items()}
  if total * width * height * channels > most_bytes and image_size:
    made = {s: streaming.ImageStream(
        e, num_classes=len(classes), image_size=image_size, channels=channels)
            for s, e in examples.items()}
    how = 'streamed'
  else:
    made = {s: Split(
        np.stack([to_array(image, height, width, channels)
                  for image, _ in e]), np.array(listed[s][1], np.int32))
            for s, e in examples.items()}
    how = 'decoded'
  return Whole(
      made['train'], made['test'], len(classes),
      f'{total} images {how} from {path}', made.get('validation'), classes)


def _listed(name, split, folder, classes):
  """The image files of a split, in a fixed order, and their labels."""
  extra = [f.name for f in folder.iterdir() if f.is_dir()
           and not f.name.startswith('.') and f.name not in classes]
  if extra:
    raise _wrong(
        name, f'holds the class {extra[0]!r} in {split}, and not in train',
        'give every class a folder in train')
  files, labels = [], []
  for label, known in enumerate(classes):
    found = sorted(f for f in (folder / known).rglob('*') if (
        f.suffix.lower() in _IMAGES and not f.name.startswith('.')
        and f.is_file())) if (folder / known).is_dir() else []
    if not found and split in ('', 'train'):
      raise _wrong(
          name, f'has no image in {folder / known}',
          f'put some there that end in {", ".join(_IMAGES)}, or remove it')
    files += found
    labels += [label] * len(found)
  if not files:
    raise _wrong(name, f'has no image in {folder}', 'put some there')
  return files, labels


def fixed_split(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Positions of train and test where nobody says which are which.

  One in six is test, the same ones for every run.
  """
  order = streaming.epoch_order(size, seed=splits_lib.SEED, epoch=0)
  count = max(1, size // _TEST)
  return np.sort(order[count:]), np.sort(order[:count])


# Arrays


def _arrays(name, path):
  """An .npz file of images (or rows of numbers) and labels."""
  try:
    with np.load(path, allow_pickle=False) as file:
      held = {key: file[key] for key in file.files}
  except Exception as error:  # Raised again: zip, zlib and NumPy have their own.
    raise _wrong(
        name, f'cannot be read ({_first(error)})',
        'save it with numpy.savez, without objects') from error
  arrays = {}
  for split in _SPLITS:
    for pattern in _ARRAYS:
      keys = [key.format(split) for key in pattern]
      if all(key in held for key in keys):
        arrays.setdefault(split, tuple(held[key] for key in keys))
  for keys in (('images', 'labels'), ('x', 'y'), ('X', 'y')):
    if not arrays and all(key in held for key in keys):
      arrays[''] = tuple(held[key] for key in keys)
  if '' not in arrays and not {'train', 'test'} <= set(arrays):
    raise _wrong(
        name, f'holds {", ".join(held) or "nothing"}',
        'name its arrays train_images, train_labels, test_images and '
        'test_labels, or images and labels')
  return from_arrays(name, arrays, f'the arrays of {path}')


def from_arrays(
    name: str, arrays: Mapping[str, tuple[Any, Any]], source: str,
    classes: Sequence[str] = ()) -> Whole:
  """A set made of arrays.

  Args:
    name: of the set, for errors.
    arrays: split -> (images, labels), of 'train', 'test' and perhaps
      'validation', or '' -> both, of which a fixed sixth is test. Images are
      `[n, height, width(, channels)]`, uint8 or floats, or rows of numbers
      `[n, features]`; labels `[n]` are integers from 0 on, or texts.
    source: one line for the log.
    classes: names of the classes; none: those of labels that are texts.

  Raises:
    ValueError: for arrays of other shapes or kinds.
  """
  arrays = {s: (np.asarray(x), np.asarray(y)) for s, (x, y) in arrays.items()}
  texts = [y for _, y in arrays.values() if y.dtype.kind in 'US']
  if texts and not classes:
    classes = tuple(str(c) for c in np.unique(np.concatenate(texts)))
  made = {}
  for split, (x, y) in arrays.items():
    what = f'{split} ' if split else ''
    if y.ndim == 2 and y.shape[1] == 1:
      y = y[:, 0]
    if y.dtype.kind in 'US':
      position = {c: i for i, c in enumerate(classes)}
      y = np.array([position[str(v)] for v in y], np.int32)
    if y.ndim != 1 or y.dtype.kind not in 'iub' or y.size and y.min() < 0:
      raise _wrong(
          name, f'must have {what}labels [n], integers from 0 on or texts, and '
          f'has {y.dtype} {list(y.shape)}', 'give one class an example')
    if len(x) != len(y) or not len(y):
      raise _wrong(
          name, f'has {len(x)} {what}images and {len(y)} {what}labels',
          'give one label an image, and one at least')
    made[split] = Split(_pixels(name, what, x), y.astype(np.int32))
  if '' in made:
    both = made.pop('')
    for split, which in zip(('train', 'test'), fixed_split(len(both.labels))):
      made[split] = Split(both.images[which], both.labels[which])
  shapes = {s: v.images.shape[1:] for s, v in made.items()}
  if len(set(shapes.values())) > 1 or len(
      {v.images.dtype for v in made.values()}) > 1:
    raise _wrong(
        name, f'has images of several shapes or types, {shapes}',
        'make them equal')
  highest = max(int(v.labels.max()) for v in made.values())
  if classes and highest >= len(classes):
    raise _wrong(
        name, f'has the label {highest} and {len(classes)} names of classes',
        'give every class a name')
  return Whole(
      made['train'], made['test'], len(classes) or highest + 1, source,
      made.get('validation'), tuple(classes))


def _pixels(name, what, x):
  """Images `[n, height, width, channels]`, or rows of numbers `[n, features]`."""
  if x.ndim == 3:
    x = x[..., None]
  if x.ndim not in (2, 4) or x.dtype.kind not in 'fiub' or not x.size:
    raise _wrong(
        name, f'must have {what}images [n, height, width(, channels)] or '
        f'[n, features] of numbers, and has {x.dtype} {list(x.shape)}',
        'save them so')
  if x.ndim == 4 and x.dtype.kind != 'f' and 0 <= x.min() and x.max() <= 255:
    return x.astype(np.uint8)
  x = x.astype(np.float32)
  if not np.isfinite(x).all():
    raise _wrong(
        name, f'has {what}numbers that are not finite',
        'fill them in, or leave those examples out')
  return x


# Tables


def _tables(name, paths, text_features, arguments):
  """Tables of one split each, or one of all with a fixed or its own split."""
  tables = {split: _table(name, path) for split, path in paths.items()}
  columns = list(next(iter(tables.values())))
  for table in tables.values():
    if list(table) != columns:
      raise _wrong(
          name, f'has tables of several columns, {columns} and {list(table)}',
          'make them equal')
  source = f'the table{"s" * (len(paths) > 1)} ' + ', '.join(
      map(str, paths.values()))
  return _of_columns(name, tables, columns, text_features, arguments, source)


def _of_columns(name, tables, columns, text_features, arguments, source):
  label = arguments.get('label', 'label')
  if label not in columns:
    raise _wrong(
        name, f'has no column {label!r}; its columns are {", ".join(columns)}',
        'name that of the classes by `dataset_args.label`')
  classes = _classes(name, label, [v for t in tables.values() for v in t[label]])
  split = arguments.get('split', 'split' if 'split' in columns else None)
  if split is not None and '' in tables:
    if split not in columns:
      raise _wrong(
          name, f'has no column {split!r}; its columns are '
          f'{", ".join(columns)}', 'mend `dataset_args.split`')
    tables = _by_split(name, tables[''], split)
  if '' in tables:
    kept, held_out = fixed_split(len(tables[''][label]))
    tables = {s: {c: [v[i] for i in which] for c, v in tables[''].items()}
              for s, which in (('train', kept), ('test', held_out))}
  for part, table in tables.items():
    if not table[label]:
      raise _wrong(name, f'has no example in {part}', 'add some')
  position = {c: i for i, c in enumerate(classes)}
  labels = {s: np.array([position[str(v)] for v in t[label]], np.int32)
            for s, t in tables.items()}
  features = [c for c in columns if c not in (label, split)]
  if not features:
    raise _wrong(name, f'has no column beside {label!r}', 'add what to learn from')
  for column in text_features:
    if column not in features:
      raise ValueError(
          f'`text_features` must be columns of {name!r}, got {column!r}; they '
          f'are {", ".join(features)}.')
  words = [c for c in features if any(
      isinstance(v, str) and v and _number(v) is None
      for v in tables['train'][c])]
  if text_features or words == features and len(features) <= 2:
    chosen = tuple(text_features or features)
    return text.Corpus(
        {s: text.Texts(tuple([str(v or '') for v in t[c]] for c in chosen),
                       labels[s]) for s, t in tables.items()},
        len(classes), '', source)
  if words:
    raise _wrong(
        name, f'has texts in the column {words[0]!r}',
        'leave it out, encode it in numbers, or name one or two columns of '
        'texts by `text_features`')
  arrays = {
      s: (np.stack([_numbers(name, c, t[c]) for c in features], 1), labels[s])
      for s, t in tables.items()}
  whole = from_arrays(name, arrays, source)
  return whole._replace(num_classes=len(classes), classes=classes)


def _by_split(name, table, column):
  parts = {}
  for i, value in enumerate(table[column]):
    value = {'val': 'validation', 'valid': 'validation', 'dev': 'validation'}.get(
        str(value), str(value))
    if value not in _SPLITS:
      raise _wrong(
          name, f'has {value!r} in the column {column!r} of row {i + 1}',
          f'it must be one of {", ".join(_SPLITS)}')
    part = parts.setdefault(value, {c: [] for c in table})
    for c, values in table.items():
      part[c].append(values[i])
  if not {'train', 'test'} <= set(parts):
    raise _wrong(
        name, f'has {", ".join(parts) or "nothing"} in the column {column!r}',
        'mark some rows train and some test')
  return parts


def _classes(name, column, values):
  """The names of the classes, in order: of numbers by value."""
  distinct = {str(v) for v in values}
  if None in values or '' in distinct:
    raise _wrong(
        name, f'has a row without a class in the column {column!r}',
        'fill it in, or leave the row out')
  numbers = {v: _number(v) for v in distinct}
  if all(n is not None for n in numbers.values()):
    if any(n != int(n) for n in numbers.values()):
      raise _wrong(
          name, f'has the number {next(v for v, n in numbers.items() if n != int(n))} '
          f'in the column {column!r}, which holds classes',
          'name another column by `dataset_args.label`')
    return tuple(sorted(distinct, key=lambda v: numbers[v]))
  return tuple(sorted(distinct))


def _number(value):
  try:
    number = float(value)
  except (TypeError, ValueError):
    return None
  return number if np.isfinite(number) else None


def _numbers(name, column, values):
  numbers = [_number(v) for v in values]
  if None in numbers:
    row = numbers.index(None)
    raise _wrong(
        name, f'has {values[row]!r} in the column {column!r} of row {row + 1}, '
        'which is no finite number', 'fill it in, or leave the row out')
  return np.array(numbers, np.float32)


def _table(name, path):
  """Column -> values of one file."""
  if path.suffix.lower() == '.parquet':
    return _parquet(name, path)
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      first = file.readline()
      file.seek(0)
      delimiter = max(',;\t|', key=first.count)
      rows = [row for row in csv.reader(file, delimiter=delimiter, strict=True)
              if row]
  except (UnicodeDecodeError, csv.Error) as error:
    raise _wrong(
        name, f'cannot be read ({_first(error)})',
        'save the table as UTF-8 with commas') from error
  if len(rows) < 2:
    raise _wrong(
        name, f'has {max(0, len(rows) - 1) or "no"} rows below its header in '
        f'{path.name}', 'add some')
  header, rows = [cell.strip() for cell in rows[0]], rows[1:]
  if len(set(header)) < len(header) or '' in header:
    raise _wrong(
        name, f'must have a first line of different names in {path.name}, and '
        f'has {", ".join(header)}', 'add one')
  for i, row in enumerate(rows, 1):
    if len(row) != len(header):
      raise _wrong(
          name, f'has {len(row)} cells in row {i} of {path.name}, and '
          f'{len(header)} names', 'mend that row')
  return {c: [row[i].strip() for row in rows] for i, c in enumerate(header)}


def _parquet(name, path):
  parquet = prepared.require('pyarrow.parquet', 'reading a Parquet table')
  try:
    table = parquet.read_table(path)
  except Exception as error:  # Raised again: pyarrow's have no common base.
    raise _wrong(
        name, f'cannot be read ({_first(error)})', 'save it again') from error
  columns = table.to_pydict()
  for column, values in columns.items():
    strange = [v for v in values if not isinstance(
        v, (str, int, float, bool, type(None)))]
    if strange:
      raise _wrong(
          name, f'has a {type(strange[0]).__name__} in the column {column!r}',
          'leave that column out')
  return columns


# Data sets that the library `datasets` has saved


def _saved(name, path, image_size, text_features, arguments):
  """A folder that `Dataset.save_to_disk` or `DatasetDict`'s has written."""
  try:
    datasets = prepared.require('datasets', 'reading a saved data set')
  except ValueError:
    raise _wrong(
        name, 'is a saved data set, which needs the Python package datasets',
        "install it with `pip install 'bpjax[huggingface]'`") from None
  try:
    loaded = datasets.load_from_disk(str(path))
  except Exception as error:  # Raised again.
    raise _wrong(
        name, f'cannot be read ({_first(error)})', 'save it again') from error
  parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {
      '': loaded}
  if '' not in parts:
    if 'test' not in parts and 'validation' in parts:
      parts['test'] = parts.pop('validation')
    parts = {s: parts[s] for s in _SPLITS if s in parts}
    if not {'train', 'test'} <= set(parts):
      raise _wrong(
          name, f'has the splits {", ".join(loaded)}',
          'save one with train and test, or a single split')
  features = next(iter(parts.values())).features
  label = arguments.get('label') or next(
      (c for c, f in features.items() if isinstance(f, datasets.ClassLabel)),
      'label')
  images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
  source = f'the data set saved in {path}'
  if images:
    return _saved_images(
        name, datasets, parts, images[0], label, image_size, source)
  tables = {}
  for split, part in parts.items():
    table = part.to_dict()
    if isinstance(features.get(label), datasets.ClassLabel):
      names = features[label].names
      table[label] = [None if v is None or v < 0 else names[v]
                      for v in table[label]]
    tables[split] = {c: v for c, v in table.items() if c != 'idx'}
  columns = list(next(iter(tables.values())))
  return _of_columns(
      name, tables, columns, text_features, arguments | {'label': label}, source)


def _saved_images(name, datasets, parts, column, label, image_size, source):
  import io

  names = getattr(next(iter(parts.values())).features.get(label), 'names', ())
  if label not in next(iter(parts.values())).features:
    raise _wrong(
        name, f'has no column {label!r}',
        'name that of the classes by `dataset_args.label`')
  arrays = {}
  for split, part in parts.items():
    # The bytes, so that no path or address in the file is followed.
    part = part.cast_column(column, datasets.Image(decode=False))
    opened = []
    for i, value in enumerate(part[column]):
      if not value or not value.get('bytes'):
        raise _wrong(
            name, f'has no bytes of the image {i} of {split or "it"}',
            'save it with the images inside')
      opened.append(open_image(io.BytesIO(value['bytes'])))
    arrays[split] = opened, list(part[label])
  every = [image for images, _ in arrays.values() for image in images]
  channels = 1 if {i.mode for i in every} <= {'1', 'L', 'LA', *_DEEP} else 3
  sizes = {image.size for image in every}
  if not image_size and len(sizes) > 1:
    raise _wrong(
        name, 'holds images of several sizes',
        'set `image_size`, to which they are scaled')
  width, height = (image_size, image_size) if image_size else sizes.pop()
  return from_arrays(
      name, {s: (np.stack([to_array(i, height, width, channels)
                           for i in images]), labels)
             for s, (images, labels) in arrays.items()}, source, tuple(names))


def _first(error):
  return (str(error).splitlines() or [type(error).__name__])[0]
