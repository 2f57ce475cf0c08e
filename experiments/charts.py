"""Line charts as SVG text, for one HTML page: small, and styled by its CSS.

A curve has the class `r<row>` of its row, whose colour, dashes and visibility are
the page's. The axes' ranges are attributes, so that the page's script can tell
what lies below a pointer from the curves themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
import html
import math
from typing import NamedTuple

_MOST_POINTS = 240  # Of a curve.


class Curve(NamedTuple):
  """One row's curve.

  Attributes:
    row: the row's number.
    points: (x, mean, low, high), in the order of x.
  """
  row: int
  points: Sequence[tuple[float, float, float, float]]


class Axis(NamedTuple):
  """A range of numbers with ticks.

  Attributes:
    low, high: the range.
    ticks: where there is a line and a label.
    log: whether it is logarithmic.
    percent: whether labels are percentages.
  """
  low: float
  high: float
  ticks: tuple[float, ...]
  log: bool = False
  percent: bool = False

  def share(self, value: float) -> float:
    """Where a value lies, 0 at the low end and 1 at the high one."""
    if self.log:
      low, high = math.log(self.low), math.log(self.high)
      return (math.log(max(value, self.low)) - low) / (high - low)
    return (value - self.low) / (self.high - self.low)

  def label(self, tick: float) -> str:
    """The text of a tick."""
    if self.percent:
      return f'{round(100 * tick, 6):g}%'
    return f'{round(tick, 12):g}'.replace('e-0', 'e-').replace('-', '\N{MINUS SIGN}')


def axis(
    values: Sequence[float], *, percent: bool = False, log: bool = False,
    least: float | None = None, most: float | None = None, count: int = 5,
    pad: float = .04
) -> Axis:
  """A range around values, with round ticks.

  Args:
    values: what has to lie in it; at least one.
    percent: label it in percent.
    log: make it logarithmic, where all values allow it.
    least, most: bounds that values have by nature.
    count: about how many steps there are.
    pad: share of the range that is free beyond the values.

  Example:
    >>> axis([.52, .97], percent=True).ticks
    (0.6, 0.7, 0.8, 0.9)
  """
  low, high = min(values), max(values)
  if log and low > 0:
    low, high = (low, high) if high > 1.001 * low else (low / 2, high * 2)
    first, last = math.log10(low), math.log10(high)
    decades = [10.**k for k in range(math.floor(first), math.ceil(last) + 1)]
    factors = (1, 2, 5) if last - first < 1.4 else (1, 3)
    ticks = decades[::max(1, len(decades) // 5)] if last - first > 2.6 else [
        d * k for d in decades for k in factors]
    return Axis(low, high, tuple(
        t for t in ticks if low / 1.02 <= t <= high * 1.02), True)
  if high - low < 1e-9 * max(1e-9, abs(high)):
    low, high = (-.5, .5) if low == 0 else (low - .1 * abs(low), high + .1 * abs(low))
  pad = pad * (high - low)
  low = low - pad if least is None else max(low - pad, least)
  high = high + pad if most is None else min(high + pad, most)
  rough = (high - low) / count
  unit = 10.**math.floor(math.log10(rough))
  step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= rough * .999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  ticks = tuple(round(k * step, 12) for k in range(first, last + 1))
  return Axis(low, high, ticks, percent=percent)


def lines(
    curves: Sequence[Curve], x: Axis, y: Axis, *, title: str, x_label: str,
    size: tuple[int, int] = (440, 250), markers: bool = False,
    most: int = _MOST_POINTS) -> str:
  """One panel: grid, ticks, bands of spread, and the curves.

  Args:
    curves: what is drawn; the first row lies on top.
    x, y: the axes.
    title: for readers who do not see it.
    x_label: what x is.
    size: width and height, in the page's pixels before it is scaled.
    markers: a dot at every point.
    most: points of a curve; of more, some are left out.

  Returns:
    The `<svg>` element.
  """
  width, height = size
  left, right, top, bottom = 44, width - 10, 10, height - 32
  at_x = lambda v: left + x.share(v) * (right - left)
  at_y = lambda v: bottom - y.share(v) * (bottom - top)
  parts = [
      f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
      f'aria-label="{html.escape(title)}" data-x="{x.low!r} {x.high!r}" '
      f'data-y="{y.low!r} {y.high!r}" data-box="{left} {right} {top} {bottom}" '
      f'data-log="{int(y.log)}" data-percent="{int(y.percent)}" '
      f'data-label="{html.escape(x_label)}">']
  for tick in y.ticks:
    at = f'{at_y(tick):.1f}'
    parts.append(
        f'<path class="grid" d="M{left} {at}H{right}"/>'
        f'<text class="tick" x="{left - 6}" y="{at}" dy=".32em" '
        f'text-anchor="end">{html.escape(y.label(tick))}</text>')
  for tick in x.ticks:
    parts.append(
        f'<text class="tick" x="{at_x(tick):.1f}" y="{bottom + 15}" '
        f'text-anchor="middle">{html.escape(x.label(tick))}</text>')
  parts.append(
      f'<text class="tick" x="{right}" y="{height - 3}" text-anchor="end">'
      f'{html.escape(x_label)}</text>')
  for curve in reversed(curves):
    points = _thinned(curve.points, most)
    # A reader of values wants what the eye cannot see.
    digits = 2 if most == _MOST_POINTS else 1
    place = lambda v, w: f'{at_x(v):.1f} {at_y(w):.{digits}f}'
    if any(low < high for _, _, low, high in points):
      edge = [place(p[0], min(p[3], y.high)) for p in points] + [
          place(p[0], max(p[2], y.low)) for p in reversed(points)]
      parts.append(f'<path class="band r{curve.row}" d="M{"L".join(edge)}Z"/>')
    path = 'L'.join(place(p[0], p[1]) for p in points)
    parts.append(
        f'<path class="line r{curve.row}" data-row="{curve.row}" d="M{path}"/>')
    if markers or len(points) == 1:
      parts += [
          f'<circle class="dot r{curve.row}" cx="{at_x(p[0]):.1f}" '
          f'cy="{at_y(p[1]):.2f}" r="2.6"/>' for p in points]
  return ''.join([*parts, '</svg>'])


def strip(
    values: Sequence[float], row: int, span: Axis, *, title: str,
    mean: float | None = None) -> str:
  """A dot for every value on one line, and a stroke at the mean."""
  at = lambda v: 6 + span.share(v) * 98
  dots = ''.join(
      f'<circle class="dot r{row}" cx="{at(v):.1f}" cy="9" r="3.2"/>'
      for v in values)
  stroke = '' if mean is None else (
      f'<path class="mean" d="M{at(mean):.1f} 2V16"/>')
  return (f'<svg class="strip" viewBox="0 0 110 18" role="img" '
          f'aria-label="{html.escape(title)}"><path class="grid" d="M6 9H104"/>'
          f'{dots}{stroke}</svg>')


def interval(
    middle: float, low: float | None, high: float | None, row: int, span: Axis,
    *, title: str) -> str:
  """A difference with its confidence interval, beside a line at 0."""
  at = lambda v: 6 + min(max(span.share(v), 0.), 1.) * 148
  bar = '' if low is None or high is None else (
      f'<path class="reach r{row}" d="M{at(low):.1f} 9H{at(high):.1f}"/>')
  return (f'<svg class="strip wide" viewBox="0 0 160 18" role="img" '
          f'aria-label="{html.escape(title)}">'
          f'<path class="zero" d="M{at(0):.1f} 1V17"/>{bar}'
          f'<circle class="dot r{row}" cx="{at(middle):.1f}" cy="9" r="3.6"/>'
          '</svg>')


def _thinned(points, most=_MOST_POINTS):
  """At most so many of the points, and the last one always."""
  stride = -(-len(points) // most)
  kept = list(points[::stride])
  return kept if kept[-1] == points[-1] else [*kept, points[-1]]
