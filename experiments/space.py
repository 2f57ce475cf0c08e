"""The points of a sweep: the product of a grid, or points drawn from ranges."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
import math
import random
import re

Point = dict[str, str]

_MOST = 100_000  # Points of a sweep.
_DRAWS = 1000  # For each point, until it is one that was not drawn before.
_RANGE = re.compile(r'(log|uniform|int):([^:]*):([^:]*)')
_FORM = "--grid='learning_rate=log:1e-4:1e-1'"


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both included.

  Attributes:
    kind: 'log', uniform in the logarithm; 'uniform'; or 'int', whole numbers.
    low, high: the ends.
  """
  kind: str
  low: float
  high: float

  def draw(self, share: float) -> str:
    """The number at a share, in [0, 1), of the range, as text.

    Example:
      >>> Range('log', 1e-4, 1e-1).draw(.5), Range('int', 1, 4).draw(.99)
      ('0.003162', '4')
    """
    if self.kind == 'int':
      low, high = int(self.low), int(self.high)
      return str(low + int(share * (high - low + 1)))
    if self.kind == 'log':
      low, high = math.log(self.low), math.log(self.high)
      value = math.exp(low + share * (high - low))
    else:
      value = self.low + share * (self.high - self.low)
    # Four digits name a folder, and are what is trained.
    short = f'{value:.4g}'
    value = min(max(value, self.low), self.high)
    return short if self.low <= float(short) <= self.high else repr(value)


def parse_grid(grid: Sequence[str]) -> list[Point]:
  """The product of grid flags.

  Args:
    grid: texts `FIELD=VALUE,VALUE,...`; a comma within brackets is part of a
      value.

  Returns:
    Field -> text of its value, for each point; one empty point without a grid.

  Raises:
    ValueError: for a text of another form, a field that is given twice, or a
      range, which has no product.

  Example:
    >>> parse_grid(['epochs=5', 'mesh.data=1,2'])
    [{'epochs': '5', 'mesh.data': '1'}, {'epochs': '5', 'mesh.data': '2'}]
  """
  axes = _axes(grid)
  for field, values in axes.items():
    if isinstance(values, Range):
      raise ValueError(
          f'`grid` must list the values of {field!r}, got a range; draw from '
          'it with --random=20, or write its values.')
  return _product(axes)


def sample(grid: Sequence[str], count: int, seed: int = 0) -> list[Point]:
  """Points drawn at random, no two alike: random search.

  Point k is a function of the grid, the seed and k, so that a larger `count`
  only adds points.

  Args:
    grid: texts `FIELD=RANGE` or `FIELD=VALUE,VALUE,...`, where a range is
      `log:LOW:HIGH`, `uniform:LOW:HIGH` or, of whole numbers, `int:LOW:HIGH`,
      ends included.
    count: number of points.
    seed: of the draws.

  Returns:
    Field -> text of its value, for each point.

  Raises:
    ValueError: for a text of another form, a field that is given twice, or
      more points than there are.

  Example:
    >>> sample(['learning_rate=log:1e-4:1e-1', 'epochs=5,10'], 2)
    [{'learning_rate': '0.03414', 'epochs': '10'}, {'learning_rate': '0.001827', 'epochs': '5'}]
  """
  axes = _axes(grid)
  if not axes:
    raise ValueError(
        f'`random` must have a `grid` to draw from, got none; write for '
        f'example {_FORM}.')
  if not 1 <= count <= _MOST:
    raise ValueError(
        f'`random` must be from 1 to {_MOST:,} points, got {count}.')
  size = math.prod(_size(values) for values in axes.values())
  if count > size:
    raise ValueError(
        f'`random` must be at most the {size} points of the grid, got {count}; '
        'train them all without --random.')
  # `random()` alone is the same in every version of Python.
  share = random.Random(seed).random
  if size <= _MOST and not any(isinstance(v, Range) for v in axes.values()):
    points = _product(axes)
    shares = [share() for _ in points]
    order = sorted(range(len(points)), key=shares.__getitem__)
    return [points[i] for i in order[:count]]
  points = {}
  for _ in range(_DRAWS * count):
    point = {
        field: values.draw(share()) if isinstance(values, Range)
        else values[int(share() * len(values))]
        for field, values in axes.items()}
    points.setdefault(tuple(point.values()), point)
    if len(points) == count:
      return list(points.values())
  raise ValueError(
      f'`random` must be at most the points of the grid, and no more than '
      f'{len(points)} were found, got {count}; ask for fewer.')


def _size(values):
  """The number of values; of numbers with a fraction, infinite."""
  if not isinstance(values, Range):
    return len(values)
  if values.kind == 'int':
    return int(values.high) - int(values.low) + 1
  return math.inf


def _product(axes):
  product = itertools.product(*axes.values())
  return [dict(zip(axes, values)) for values in product]


def _axes(grid):
  """Field -> a list of texts, or a Range."""
  axes = {}
  for text in grid:
    field, _, values = text.partition('=')
    field, values = field.strip(), [v.strip() for v in _split(values)]
    if not field or not all(values):
      raise ValueError(
          f'`grid` must be FIELD=VALUE,VALUE,..., got {text!r}; write for '
          "example --grid='rule=backprop,kolen_pollack'.")
    if field in axes or field == 'seed':
      raise ValueError(
          f'`grid` must name each field once, and the seeds in --seeds, got '
          f'{field!r} again; write all its values into one flag.')
    twice = next((v for v in values if values.count(v) > 1), None)
    if twice is not None:
      raise ValueError(
          f'`grid` must name each value of {field!r} once, got {twice!r} twice.')
    ranges = [v for v in values if re.match('(log|uniform|int):', v)]
    if ranges and len(values) > 1:
      raise ValueError(
          f'`grid` must give {field!r} one range or a list of values, got '
          f'{text!r}; write for example {_FORM}.')
    axes[field] = _range(field, ranges[0]) if ranges else values
  return axes


def _range(field, text):
  """The Range of `log:LOW:HIGH` and the like."""
  found = _RANGE.fullmatch(text)
  try:
    kind, low, high = found[1], float(found[2]), float(found[3])
  except (TypeError, ValueError):
    kind, low, high = '', math.nan, math.nan
  fits = -math.inf < low < high < math.inf
  if kind == 'log':
    fits = fits and low > 0
  if kind == 'int':
    fits = fits and low == int(low) and high == int(high) and (
        max(abs(low), abs(high)) < 2**31)
  if not fits:
    raise ValueError(
        f'`grid` must give {field!r} a range such as log:1e-4:1e-1 (above 0), '
        'uniform:0:.5 or int:1:8, the lower end first, got '
        f'{text!r}.')
  return Range(kind, low, high)


def _split(text):
  """Splits at commas outside brackets."""
  parts, depth = [''], 0
  for character in text:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += character
  return parts
