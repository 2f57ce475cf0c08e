"""The leaderboard for readers: cells of tables, and a page without a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import leaderboard


def numbers(own: Mapping[str, Any]) -> list[str]:
  """What a table says of a cell behind its name, one text a column.

  Args:
    own: an entry of `leaderboard.table`.

  Returns:
    Accuracy, n, p against the row below, difference and p against the control,
    time and memory over backprop's, alignment with its floor, and the verdict.
  """
  cost = own.get('cost') or {}
  time = f'{cost["time_ratio"]:.2f}' if cost else ''
  memory = f'{cost["memory_ratio"]:.2f}' if cost else ''
  if 'mean' not in own:
    return ['', '', '', '', time, memory, '', f'{own["status"]}: {own["reason"]}']
  spread = '' if own['std'] is None else f' ± {own["std"]:.2f}'
  return [
      f'{own["mean"]:.2f}{spread}', str(own['n']), _p(own['below']),
      '' if own['row'] == leaderboard.FROZEN else _compared(own['frozen']),
      time, memory, _aligned(own), own['verdict']]


def _p(against):
  if against is None or against.p is None:
    return ''
  return f'{against.p:.3f}' if against.p >= .001 else '< 0.001'


def _compared(against):
  if against is None:
    return ''
  p = _p(against)
  return f'{against.difference:+.2f}' + (f' (p {p})' if p else '')


def _aligned(own):
  measured, units = own['aligned_units']
  if own['alignment'] is None:
    return 'no signal'
  part = '' if measured == units else f', {measured} of {units} units'
  return f'{own["alignment"]:.2f} ({own["floor"]:.2f}{part})'


def html(results):
  raise NotImplementedError
