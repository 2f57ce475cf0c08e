"""Sets of texts as rows of tokens: sentences, pairs of them, and languages.

A set with labels is a task of classification; one without, or a plain text file,
a language: every token is predicted from those before it. Texts are read once and
kept in `<cache_dir>/<name>-<version>-texts.npz`, all that a machine without TFDS
needs; rows of tokens and their tokeniser in another file, whose name is a hash of
all that goes into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import hashlib
import logging
import os
import pathlib
from typing import Any, NamedTuple

from bpjax.train.data import decoded
from bpjax.train.data import prepared
from bpjax.train.data import splits as splits_lib
from bpjax.train.data import streaming
from bpjax.train.data import tokenizer as tokenizer_lib
from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import NONE
from bpjax.train.data.rows import Tokens
import numpy as np

_CHUNK = 4096  # Examples read from disk at once.
_MAX_BYTES = 2**30  # Of a set that is kept in memory.
_MOST_TRAINED = 10**6  # Texts that a tokeniser is trained on.
_SENTENCE, _WINDOW = 64, 128  # Default lengths.
_FILE_SHARES = (.9, .95)  # Of a text file: where train and validation end.


class Texts(NamedTuple):
  """The texts of one split.

  Attributes:
    columns: one or two lists of n texts.
    labels: int32 `[n]`; 0 where there are none.
  """
  columns: tuple[list[str], ...]
  labels: np.ndarray

  def select(self, positions: np.ndarray) -> Texts:
    """The texts at some positions."""
    return Texts(
        tuple([c[i] for i in positions] for c in self.columns),
        self.labels[positions])


class Corpus(NamedTuple):
  """A set of texts as it was read.

  Attributes:
    splits: 'train', 'test' and perhaps 'validation': a `Texts` or, where they
      are too many to be kept, a `prepared.Texts`.
    num_classes: labels lie in [0, num_classes); 0: a language.
    fingerprint: of the prepared folder.
    source: one line for the log.
  """
  splits: Mapping[str, Any]
  num_classes: int
  fingerprint: str
  source: str


class Loaded(NamedTuple):
  """A set of texts, ready for a model.

  Attributes:
    train: the training examples.
    validation: examples that are held out of train, or the set's own; None where
      there are none.
    test: the test examples.
    asked: what is asked on them.
    tokenizer: the JSON text of the tokeniser.
    source: one line for the log.
  """
  train: Tokens | TextStream
  validation: Tokens | TextStream | None
  test: Tokens | TextStream
  asked: Asked
  tokenizer: str
  source: str


def from_prepared(
    found: prepared.Prepared, cache_dir: pathlib.Path, stream: bool) -> Corpus:
  """The texts of a prepared set: from the cache file, else read and cached.

  Args:
    found: from `prepared.find`.
    cache_dir: folder of the cache file.
    stream: read examples as they are needed, as sets over 1 GiB are in any case.

  Raises:
    ValueError: for a set that cannot be read, or without a single label.
  """
  names = ['train', found.test]
  own = next((s for s in ('validation', 'validation_matched')
              if found.splits.get(s) and s != found.test), None)
  names += [own] if own else []
  keys = dict(zip(('train', 'test', 'validation'), names))
  where = f'{found.name} {found.version}'
  if stream or found.num_bytes > _MAX_BYTES:
    return Corpus(
        {key: prepared.Texts(found, split) for key, split in keys.items()},
        found.num_classes, found.fingerprint,
        f'{where} streamed from {found.path}')
  path = decoded.cache_path(found.name, found.version, cache_dir, 'texts')
  fingerprint = repr((found.fingerprint, found.text_keys))
  cached = decoded.read_arrays(path, _from_file)
  if cached is not None and cached.fingerprint == fingerprint:
    return cached._replace(source=f'{where} from the cache file {path}')
  logging.getLogger(__name__).info('reading %s, once', where)
  texts = {key: _read(found, split) for key, split in keys.items()}
  corpus = Corpus(
      texts, found.num_classes, fingerprint, f'{where} read from {found.path}')
  decoded.write_arrays(path, _to_arrays(corpus))
  return corpus


def from_cache(name: str, cache_dir: pathlib.Path) -> Corpus | None:
  """The texts of a set whose prepared folder is not here; None without them."""
  path = decoded.newest_cache(name, cache_dir, 'texts')
  cached = None if path is None else decoded.read_arrays(path, _from_file)
  return cached and cached._replace(source=f'{name} from the cache file {path}')


def from_file(name: str) -> Corpus:
  """A plain text file: nine tenths are train, a twentieth each the others.

  Args:
    name: its path.

  Raises:
    ValueError: if it is not there, not UTF-8 or too short.
  """
  path = pathlib.Path(name).expanduser()
  try:
    with open(path, encoding='utf-8', newline='') as file:
      text = file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
        f'`dataset` {name!r} must be a text file in UTF-8, and cannot be read '
        f'({error}); give the path of another') from error
  ends = [0, *(int(share * len(text)) for share in _FILE_SHARES), len(text)]
  parts = [text[a:b] for a, b in zip(ends, ends[1:])]
  if not all(parts):
    raise ValueError(
        f'`dataset` {name!r} must hold 20 characters at least, got {len(text)}; '
        'give the path of another text')
  return Corpus(
      {key: Texts(([part],), np.zeros(1, np.int32))
       for key, part in zip(('train', 'validation', 'test'), parts)},
      0, '', f'the text file {os.path.abspath(path)}')


def load(
    name: str, corpus: Corpus, *, kind: str, vocabulary: int, length: int,
    validation: int, train_examples: int | None, cache_dir: pathlib.Path,
    trained: str = '') -> Loaded:
  """Tokenises a set of texts.

  The tokeniser is trained on the training texts alone, without those that are
  held out of them.

  Args:
    name: of the set, for errors and the cache file.
    corpus: its texts.
    kind: of the tokeniser, see `bpjax.train.data.tokenizer`; '': 'wordpiece' of
      sentences, 'characters' of a language.
    vocabulary: largest number of tokens.
    length: of every row; 0: 64 tokens of sentences, 128 of a language.
    validation: number of texts to hold out of train.
    train_examples: keep only so many of the others; None for all.
    cache_dir: folder of the cache file.
    trained: the JSON text of a tokeniser to use in place of training one.

  Raises:
    ValueError: for an unknown tokeniser, a vocabulary or a length that is too
      small, texts without any label, or fewer texts than are asked for.
  """
  language = not corpus.num_classes
  kind = kind or ('characters' if language else 'wordpiece')
  parts = {key: _labelled(name, key, texts, corpus.num_classes)
           for key, texts in corpus.splits.items()}
  kept, held_out = splits_lib.hold_out(
      _size(parts['train']), validation, train_examples)
  if held_out is not None:
    parts['validation'] = _select(parts['train'], held_out)
  if kept is not None:
    parts['train'] = _select(parts['train'], kept)
  pairs = _columns(parts['train']) == 2
  length = length or (_WINDOW if language else _SENTENCE)
  least = 1 if language else 4 + pairs
  if length < least:
    raise ValueError(
        f'`length` must be at least {least} for {name!r}, got {length}; choose '
        'a larger one.')
  texts = _some(parts['train'])
  settings = (kind, vocabulary, length, language, tokenizer_lib.SPECIAL)
  if trained:
    settings += (trained,)
  train = lambda: trained or tokenizer_lib.train(
      kind, texts, vocabulary, None if language else length)
  if isinstance(parts['train'], Texts):
    stem = pathlib.Path(name).stem if name.endswith('.txt') else name
    path = cache_dir / (
        f'{stem.replace("/", "-").replace(":", "-")}-{kind}-'
        f'{_digest(settings, parts)}.npz')
    arrays = decoded.read_arrays(path, dict)
    if arrays is None:
      arrays = _tokenised(parts, train(), length, language)
      decoded.write_arrays(path, arrays)
    text = str(arrays['tokenizer'])
    rows = {key: Tokens(*(
        arrays.get(f'{key}_{field}') for field in Tokens._fields))
            for key in parts}
  else:
    text = train()
    rows = {key: TextStream(
        part, text, length=length, num_classes=corpus.num_classes)
            for key, part in parts.items()}
  size = tokenizer_lib.size(text)
  asked = Asked(
      corpus.num_classes or size, size, length, pairs=pairs,
      each_token=language)
  return Loaded(
      rows['train'], rows.get('validation'), rows['test'], asked, text,
      f'{corpus.source}; {kind}, {size} tokens, of {len(texts)} training texts')


class TextStream(streaming.Stream):
  """Texts that are tokenised as they are needed.

  Of a language each text is a row of its own, [SEP] text [SEP], cut at its
  length; kept in memory, texts are joined instead.

  Args:
    examples: random access, `examples[i]` is (one or two texts, label).
    tokenizer: JSON text.
    indices: which of `examples` belong to this stream; None for all.
    length: of every row.
    num_classes: labels must lie in [0, num_classes); 0: a language.
    num_threads: threads that read; None for one a core, at most 16.
  """

  def __init__(
      self, examples: Sequence[tuple[tuple[str, ...], int]], tokenizer: str,
      indices: np.ndarray | None = None, *, length: int, num_classes: int,
      num_threads: int | None = None):
    super().__init__(examples, indices, num_threads)
    self._tokenizer = tokenizer_lib.load(tokenizer)
    self._length, self._num_classes = length, num_classes

  def rows(self, batch: Mapping[str, np.ndarray]) -> Tokens:
    return Tokens(**batch)

  def _example(self, index, randomness):
    del randomness
    texts, label = self._examples[index]
    if not self._num_classes:
      tokens, characters = tokenizer_lib.passage(self._tokenizer, texts)
      rows = _windows(
          np.append(tokens, tokenizer_lib.SEPARATOR), np.append(characters, 1),
          self._length)
      return {name: x[0] for name, x in rows._asdict().items()}
    label = streaming.check_label(label, self._num_classes, index)
    tokens, ends = tokenizer_lib.rows(self._tokenizer, [[t] for t in texts])
    return {'tokens': tokens[0], 'ends': ends[0], 'labels': label}


def _tokenised(parts, text, length, language):
  """Arrays for the cache file: those of all splits, and the tokeniser."""
  made = tokenizer_lib.load(text)
  arrays = {'tokenizer': np.array(text)}
  for key, part in parts.items():
    if language:
      passage, characters = tokenizer_lib.passage(made, part.columns[0])
      rows = _windows(passage, characters, length)
    else:
      tokens, ends = tokenizer_lib.rows(made, part.columns)
      rows = Tokens(tokens, ends, part.labels)
    arrays |= {f'{key}_{field}': x for field, x in rows._asdict().items()
               if x is not None}
  return arrays


def _windows(passage, characters, length):
  """A passage as rows that predict each token but the first, once."""
  count = -(-(len(passage) - 1) // length)
  fill = lambda x, value: np.pad(
      x, (0, count * length - len(x)),
      constant_values=value).reshape(count, length)
  labels = fill(passage[1:], NONE)
  real = (labels != NONE).sum(1)
  return Tokens(
      np.where(labels == NONE, 0, fill(passage[:-1], 0)).astype(np.int32),
      np.stack([real, real], 1).astype(np.int32), labels.astype(np.int32),
      fill(characters[1:], 0).sum(1).astype(np.int32))


def _labelled(name, key, texts, num_classes):
  """Texts with a label, where there are classes: some sets have a -1."""
  if not isinstance(texts, Texts) or not num_classes:
    if isinstance(texts, Texts) and not any(map(len, texts.columns[0])):
      raise ValueError(
          f'`dataset` {name!r} must hold texts, and all of {key!r} are empty; '
          'choose another set')
    return texts
  has = np.flatnonzero(texts.labels != NONE)
  if not len(has):
    raise ValueError(
        f'`dataset` {name!r} must have labels, and {key!r} has none; choose '
        'another set')
  decoded.check_labels(texts.labels[has], num_classes, f'{name} {key}')
  return texts if len(has) == len(texts.labels) else texts.select(has)


def _size(part):
  return len(part.labels) if isinstance(part, Texts) else len(part)


def _columns(part):
  return len(part.columns) if isinstance(part, Texts) else len(part[0][0])


def _select(part, positions):
  if isinstance(part, Texts):
    return part.select(positions)
  return _Selected(part, positions)


class _Selected(Sequence):
  """Some of the examples of a set that is not kept in memory."""

  def __init__(self, examples, positions):
    self._examples, self._positions = examples, positions

  def __len__(self):
    return len(self._positions)

  def __getitem__(self, index):
    return self._examples[self._positions[index]]


def _some(part) -> list[str]:
  """Texts to train a tokeniser on: all of them, or evenly spaced ones."""
  if isinstance(part, Texts):
    texts = part
  else:
    texts = _gathered(part, np.linspace(
        0, len(part) - 1, min(len(part), _MOST_TRAINED), dtype=np.int64))
  return [text for column in texts.columns for text in column]


def _read(found, split) -> Texts:
  """All texts of a split."""
  examples = prepared.Texts(found, split)
  return _gathered(examples, np.arange(len(examples)))


def _gathered(examples, positions) -> Texts:
  read = getattr(
      examples, '__getitems__', lambda part: [examples[i] for i in part])
  rows = [
      row for i in range(0, len(positions), _CHUNK)
      for row in read(positions[i:i + _CHUNK])]
  columns = zip(*(texts for texts, _ in rows))
  return Texts(
      tuple(map(list, columns)),
      np.array([label for _, label in rows], np.int32))


def _to_arrays(corpus) -> dict[str, Any]:
  arrays = {
      'num_classes': corpus.num_classes, 'fingerprint': corpus.fingerprint}
  for key, texts in corpus.splits.items():
    arrays[f'{key}_labels'] = texts.labels
    for i, column in enumerate(texts.columns):
      encoded = [text.encode() for text in column]
      arrays[f'{key}_{i}'] = np.frombuffer(b''.join(encoded), np.uint8)
      arrays[f'{key}_{i}_ends'] = np.cumsum(list(map(len, encoded)))
  return arrays


def _from_file(file) -> Corpus:
  splits = {}
  for key in ('train', 'validation', 'test'):
    if f'{key}_labels' not in file:
      continue
    columns = []
    while f'{key}_{len(columns)}' in file:
      content = file[f'{key}_{len(columns)}'].tobytes()
      ends = file[f'{key}_{len(columns)}_ends']
      columns.append([
          content[a:b].decode() for a, b in zip([0, *ends[:-1]], ends)])
    labels = file[f'{key}_labels']
    if any(len(column) != len(labels) for column in columns) or not columns:
      raise ValueError(f'{key} has not as many texts as labels')
    splits[key] = Texts(tuple(columns), labels)
  if not {'train', 'test'} <= {*splits}:
    raise ValueError('a split is missing')
  return Corpus(splits, int(file['num_classes']), str(file['fingerprint']), '')


def _digest(settings, parts) -> str:
  """A name for what goes into rows of tokens: the texts, and how they are made.
  """
  digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
  for key, texts in sorted(parts.items()):
    digest.update(repr((key, len(texts.labels))).encode())
    digest.update(np.ascontiguousarray(texts.labels))
    for column in texts.columns:
      digest.update('\0'.join(column).encode())
  return digest.hexdigest()
