"""Whether two settings that share their seeds differ: paired tests, and how much.

A difference is taken seed by seed, so that what a seed does to both settings
(its first weights, its order of examples) falls out of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
import itertools
import math
import statistics
from typing import Any

# The numbers of a run that are compared.
COLUMNS = (
    'test_accuracy', 'validation_accuracy', 'train_accuracy', 'test_loss',
    'median_step_time', 'alignment')
_CONFIDENCE = .95


def numbers(summary: Mapping[str, Any]) -> dict[str, float | None]:
  """The columns of one run, from its summary.

  The alignment is the mean of `teaching` over all units but the last, the
  output unit, whose teaching signal is exact under every rule.

  Example:
    >>> numbers({'test_accuracy': .9})['test_accuracy']
    0.9
  """
  measured = summary.get('alignment', {})
  hidden = [unit for unit in summary.get('units', ()) if unit in measured][:-1]
  cosines = [
      measured[unit]['teaching'] for unit in hidden
      if measured[unit].get('teaching') is not None]
  found = {c: summary.get(c) for c in COLUMNS if c != 'alignment'}
  return found | {'alignment': statistics.fmean(cosines) if cosines else None}


def shown_as(column: str) -> tuple[float, str, int]:
  """Factor, unit and digits of a column's numbers.

  Example:
    >>> shown_as('test_accuracy')
    (100, '%', 2)
  """
  return {
      'median_step_time': (1e3, ' ms', 3), 'alignment': (1, '', 3),
      'test_loss': (1, '', 4)}.get(column, (100, '%', 2))


def paired(
    a: Mapping[Hashable, float | None], b: Mapping[Hashable, float | None]
) -> dict[str, Any]:
  r"""The paired t-test of b against a, over the keys (seeds) that both have.

  With differences :math:`d_i = b_i - a_i`, their mean :math:`\bar d` and their
  standard deviation s (over n - 1): :math:`t = \bar d \sqrt{n} / s` with n - 1
  degrees of freedom, two-sided, and Cohen's :math:`d_z = \bar d / s` (Lakens,
  Calculating and reporting effect sizes, Frontiers in Psychology 4:863, 2013).

  Args:
    a, b: seed -> value; None or NaN counts as missing.

  Returns:
    `n`, the number of pairs; `difference`, their mean, None without a pair;
    and, None where fewer than two pairs differ from each other: `low` and
    `high`, the 95% confidence interval of the difference; `t`; `p`; `d_z`.

  Example:
    >>> found = paired({0: .90, 1: .92, 2: .91}, {0: .93, 1: .94, 2: .95})
    >>> f"{found['difference']:.3f}, p {found['p']:.3f}, d_z {found['d_z']:.1f}"
    '0.030, p 0.035, d_z 3.0'
  """
  known = lambda x: x is not None and math.isfinite(x)
  differences = [
      b[k] - a[k] for k in a if k in b and known(a[k]) and known(b[k])]
  n = len(differences)
  found = {'n': n, 'difference': statistics.fmean(differences) if n else None,
           **dict.fromkeys(('low', 'high', 't', 'p', 'd_z'))}
  deviation = statistics.stdev(differences) if n > 1 else 0.
  # Differences that are equal but for rounding have no spread to test with.
  if deviation <= 1e-12 * max(map(abs, differences), default=0.):
    return found
  from scipy import stats  # Takes time, which a wrong flag need not.
  mean = found['difference']
  error = deviation / math.sqrt(n)
  reach = error * float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1))
  return found | {
      'low': mean - reach, 'high': mean + reach, 't': mean / error,
      'p': float(2 * stats.t.sf(abs(mean / error), n - 1)),
      'd_z': mean / deviation}


def holm(ps: Sequence[float | None]) -> list[float | None]:
  """Holm's p-values for all tests together; None stays None.

  S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian
  Journal of Statistics 6, 1979.

  Example:
    >>> holm([.01, .04, None, .03])
    [0.03, 0.06, None, 0.06]
  """
  order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
  adjusted, largest = [None] * len(ps), 0.
  for rank, (p, i) in enumerate(order):
    largest = max(largest, min(1., (len(order) - rank) * p))
    adjusted[i] = largest
  return adjusted


def pairs(
    rows: Sequence[Mapping[Hashable, float | None]], first_only: bool = False
) -> list[dict[str, Any]]:
  """`paired` for every two rows, or for each against the first.

  Args:
    rows: seed -> value, for each row.
    first_only: leave out the pairs without the first row.

  Returns:
    For each pair `a` and `b`, numbers of rows; what `paired` says of b against
    a; and `p_holm`, corrected for all pairs that are returned.

  Example:
    >>> [(t['a'], t['b']) for t in pairs([{}, {}, {}])]
    [(0, 1), (0, 2), (1, 2)]
  """
  tests = [
      {'a': a, 'b': b, **paired(rows[a], rows[b])}
      for a, b in itertools.combinations(range(len(rows)), 2)
      if not first_only or a == 0]
  for test, p in zip(tests, holm([t['p'] for t in tests])):
    test['p_holm'] = p
  return tests
