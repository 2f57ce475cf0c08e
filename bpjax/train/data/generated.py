"""Generated tasks of structure, on which a transformer's blocks matter.

Sentiment is decided by words: a model whose blocks keep their first values loses
nothing there. These tasks need what blocks do. Their examples are a function of
the arguments alone, never of a run's seed; train, validation and test share none,
and every class is as frequent as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import NONE
from bpjax.train.data.rows import Tokens
import numpy as np

# ListOps: padding, [CLS], ten digits, four operators that open, one that closes.
LISTOPS = ('[PAD]', '[CLS]', *'0123456789', '[MAX', '[MIN', '[MED', '[SM', ']')
_DIGIT, _OPERATOR, _CLOSE = 2, 12, 16
_ROUND = 2**14  # Expressions that are drawn at once.


class Generated(NamedTuple):
  """Examples of a generated task.

  Attributes:
    train: rows of tokens.
    validation: other ones.
    test: other ones.
    asked: what is asked.
    source: one line for the log.
  """
  train: Tokens
  validation: Tokens
  test: Tokens
  asked: Asked
  source: str


def names() -> tuple[str, ...]:
  """The names of the tasks."""
  return tuple(_TASKS)


def get(name: str) -> Callable[..., Generated]:
  """The function that makes the examples of a task.

  Example:
    >>> get('listops')(train=1000, validation=100, test=100).asked.num_classes
    10
  """
  return _TASKS[name]


def listops(
    train: int = 50_000, validation: int = 2000, test: int = 2000,
    length: int = 64, depth: int = 4, arguments: int = 5) -> Generated:
  """Nested lists of digits, to be reduced to one: ten classes.

  As `[MAX 2 9 [MIN 4 7 ] 0 ]`, which is 9. The operators are the largest, the
  smallest, the median (of an even number of digits the mean of the middle two,
  rounded down) and the sum modulo 10. ListOps: a diagnostic dataset for latent
  tree learning, Nangia and Bowman, NAACL student research workshop 2018
  (https://arxiv.org/abs/1804.06028). Theirs are longer, up to depth 20, and their
  classes are not of one size; here every class has a tenth of each split.

  Args:
    train: number of examples, a multiple of ten; so are the next two.
    validation: of others to choose settings on.
    test: of others to report.
    length: most tokens of an expression, a first [CLS] included; 8 at least.
    depth: most lists within each other.
    arguments: most digits or lists in a list; a list has two at least.

  Returns:
    Rows of tokens (`LISTOPS` names them), with the value as the label.

  Raises:
    ValueError: for a value out of range, or where there are too few expressions.

  Example:
    >>> made = listops(train=1000, validation=100, test=100, depth=2)
    >>> made.train.tokens.shape, made.train.labels.shape
    ((1000, 64), (1000,))
  """
  sizes = {'train': train, 'validation': validation, 'test': test}
  for name, size in sizes.items():
    if size < 10 or size % 10:
      raise ValueError(
          f'`dataset_args.{name}` must be a multiple of ten for listops, got '
          f'{size}.')
  _check('length', length, 8)
  _check('depth', depth, 1)
  _check('arguments', arguments, 2)
  rng = _generator(1)
  wanted = sum(sizes.values()) // 10
  found = [np.zeros((0, length), np.uint8)] * 10
  while min(map(len, found)) < wanted:
    before = sum(map(len, found))
    rows, values = _expressions(rng, length, depth, arguments)
    for digit in range(10):
      if len(found[digit]) < wanted:
        both = np.concatenate([found[digit], rows[values == digit]])
        # The first of equals stays, so that the order is that of the draws.
        _, first = np.unique(both, axis=0, return_index=True)
        found[digit] = both[np.sort(first)][:wanted]
    if sum(map(len, found)) == before:  # Nothing new in so many.
      raise ValueError(
          f'`dataset_args` ask for {wanted} different expressions of every '
          f'value, and {min(map(len, found))} were found for one; make them '
          'fewer, or `length`, `depth` or `arguments` larger.')
  tokens = np.concatenate(found).astype(np.int32)
  labels = np.repeat(np.arange(10, dtype=np.int32), wanted)
  # Of every value the first go to train, and so on; then all are mixed.
  place = np.tile(np.arange(wanted), 10)
  lengths = (tokens != 0).sum(1)
  parts, start = [], 0
  for size in sizes.values():
    chosen = np.flatnonzero((place >= start) & (place < start + size // 10))
    chosen = rng.permutation(chosen)
    parts.append(_rows(tokens[chosen], lengths[chosen], labels[chosen]))
    start += size // 10
  return Generated(
      *parts, Asked(10, len(LISTOPS), length),
      f'listops, generated: length {length}, depth {depth}, {arguments} '
      'arguments')


def _expressions(rng, length, depth, arguments):
  """Some random expressions `[n, length]` that fit, and their values `[n]`."""
  flat, sizes, values = _lists(rng, _ROUND, depth, arguments)
  fits = sizes < length
  rows = np.zeros((fits.sum(), length), np.uint8)
  rows[:, 0] = LISTOPS.index('[CLS]')
  at = np.arange(1, length) <= sizes[fits, None]
  rows[:, 1:][at] = flat[np.repeat(fits, sizes)]
  return rows, values[fits]


def _lists(rng, count, depth, arguments):
  """`count` random lists: tokens end to end, how many each has, and values."""
  children = rng.integers(2, arguments + 1, count)
  total = children.sum()
  owner = np.repeat(np.arange(count), children)
  # A child is a list in two cases of five, as long as the depth allows.
  nested = (rng.random(total) < .4) & (depth > 1)
  values = rng.integers(0, 10, total)
  sizes = np.ones(total, np.int64)
  inner = np.zeros(0, np.uint8)
  if nested.any():
    inner, sizes[nested], values[nested] = _lists(
        rng, nested.sum(), depth - 1, arguments)
  operator = rng.integers(0, 4, count)
  whole = 2 + np.bincount(owner, sizes, count).astype(np.int64)
  begin = np.cumsum(whole) - whole
  flat = np.empty(whole.sum(), np.uint8)
  flat[begin] = _OPERATOR + operator
  flat[begin + whole - 1] = _CLOSE
  # What lies before a child: earlier children, and the ends of their lists.
  at = np.cumsum(sizes) - sizes + 2 * owner + 1
  flat[at[~nested]] = _DIGIT + values[~nested]
  run = sizes[nested]
  flat[np.repeat(at[nested] - (np.cumsum(run) - run), run)
       + np.arange(run.sum())] = inner
  table = np.full((count, arguments), 10, np.int64)  # Sorted behind digits.
  first = np.cumsum(children) - children
  table[owner, np.arange(total) - first[owner]] = values
  table.sort(axis=1)
  rows = np.arange(count)
  reduced = np.stack([
      table[rows, children - 1], table[:, 0],
      (table[rows, (children - 1) // 2] + table[rows, children // 2]) // 2,
      np.bincount(owner, values, count).astype(np.int64) % 10])
  return flat, whole, reduced[operator, rows]


def associative_recall(
    train: int = 50_000, validation: int = 2000, test: int = 2000,
    length: int = 0, pairs: int = 8, keys: int = 32, values: int = 16,
    queries: int = 1) -> Generated:
  """Which value goes with a key that was seen among others before.

  A row is [CLS] k v k v ... [SEP] and then, for one query, its key, whose value
  is the class of the row. For several queries the rows are those of a language:
  keys are asked one after the other, and the label of each is the token of its
  value; no other token has a label. Keys of a row are different ones, values are drawn
  freely. Zoology: measuring and improving recall in efficient language models,
  Arora et al., 2023 (https://arxiv.org/abs/2312.04927), where several queries
  are asked by and by.

  Args:
    train: number of examples.
    validation: of others to choose settings on.
    test: of others to report.
    length: of a row, with padding; 0: as long as it has to be.
    pairs: of keys and values in a row.
    keys: how many there are.
    values: how many there are: the classes.
    queries: how many of a row's keys are asked.

  Returns:
    Rows of tokens: 0 is padding, 1 [CLS], 2 [SEP], then keys, then values.

  Raises:
    ValueError: for a value out of range.

  Example:
    >>> made = associative_recall(1000, 100, 100, pairs=4)
    >>> made.train.tokens.shape, made.train.labels.shape
    ((1000, 11), (1000,))
  """
  sizes = {'train': train, 'validation': validation, 'test': test}
  for name, size in sizes.items():
    _check(name, size, 1)
  _check('pairs', pairs, 1)
  _check('keys', keys, pairs)
  _check('values', values, 2)
  _check('queries', queries, 1)
  if queries > pairs:
    raise ValueError(
        f'`dataset_args.queries` must be at most the {pairs} pairs, got '
        f'{queries}.')
  least = 2 + 2 * pairs + queries
  length = length or least
  _check('length', length, least)
  rng = _generator(2)
  count = sum(sizes.values())
  found = np.zeros((0, 2 * pairs + queries), np.int64)
  while len(found) < count:
    before = len(found)
    # The order of random numbers is a random order, row by row.
    chosen = rng.random((count, keys)).argsort(1)[:, :pairs]
    given = rng.integers(0, values, (count, pairs))
    asked = rng.random((count, pairs)).argsort(1)[:, :queries]
    both = np.concatenate([
        found, np.concatenate([chosen, given, asked], axis=1)])
    _, first = np.unique(both, axis=0, return_index=True)
    found = both[np.sort(first)][:count]
    if len(found) == before:  # Nothing new in so many.
      raise ValueError(
          f'`dataset_args` ask for {count} different examples, and {before} were '
          'found; make them fewer, or `pairs` more.')
  chosen, given, asked = np.split(found, [pairs, 2 * pairs], axis=1)
  tokens = np.zeros((count, length), np.int32)
  tokens[:, 0] = 1
  tokens[:, 1:2 * pairs + 1:2] = 3 + chosen
  tokens[:, 2:2 * pairs + 1:2] = 3 + keys + given
  tokens[:, 2 * pairs + 1] = 2
  tokens[:, least - queries:least] = 3 + np.take_along_axis(chosen, asked, 1)
  answers = np.take_along_axis(given, asked, 1).astype(np.int32)
  labels = answers[:, 0]
  if queries > 1:
    labels = np.full((count, length), NONE, np.int32)
    labels[:, least - queries:least] = 3 + keys + answers
  ends = np.cumsum([0, *sizes.values()])
  parts = [
      _rows(tokens[a:b], np.full(b - a, least), labels[a:b])
      for a, b in zip(ends, ends[1:])]
  vocabulary = 3 + keys + values
  return Generated(
      *parts, Asked(
          vocabulary if queries > 1 else values, vocabulary, length,
          each_token=queries > 1),
      f'associative_recall, generated: {pairs} of {keys} keys, {values} values, '
      f'{queries} asked')


def _rows(tokens, lengths, labels):
  ends = np.stack([lengths, lengths], axis=1).astype(np.int32)
  return Tokens(tokens, ends, labels)


def _check(name: str, value: Any, least: int) -> None:
  if not isinstance(value, (int, np.integer)) or value < least:
    raise ValueError(
        f'`dataset_args.{name}` must be a whole number of at least {least}, got '
        f'{value!r}.')


def _generator(key: int) -> np.random.Generator:
  # A bit generator by name: the default one may be another in a later NumPy.
  return np.random.Generator(np.random.PCG64(key))


_TASKS = {'associative_recall': associative_recall, 'listops': listops}
