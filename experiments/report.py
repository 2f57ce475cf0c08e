"""One page on runs and sweeps: curves, alignment, final numbers, paired tests.

python -m experiments.report DIR... [--output=report.html] [--title=TEXT]

DIR is the folder of a run, of a sweep, or of several of them. Runs whose configs
differ in nothing but the seed are one row. The page is one file, which loads
nothing else: it can be sent, kept, and read without a network. By default it is
report.html in the first DIR. Trains nothing, and does not load JAX.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import datetime
import html
import json
import os
import pathlib
import re
import shlex
import statistics
import sys
from typing import Any

from bpjax.train import config as config_lib
from bpjax.train import fields as fields_lib
from bpjax.train.folder import streams
from bpjax.train.folder import workdir as workdir_lib
from experiments import charts
from experiments import comparison

_HERE = pathlib.Path(__file__).resolve().parent
_DEPTH = 3  # Folders in folders that are looked into.
_COLOURS = 11  # Of report.css, beside that of backprop.
_DASHES = ('', '7 4', '2 4', '9 3 2 3')
_SMALL = {'size': (330, 210), 'most': 60}  # Charts of a unit.
_MOST_PANELS = 12  # Of a measure of every unit; more are folded.
_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; "
           "script-src 'unsafe-inline'")
_NAMES = {
    'test_accuracy': 'test accuracy', 'validation_accuracy':
    'validation accuracy', 'train_accuracy': 'train accuracy',
    'test_loss': 'test loss', 'median_step_time': 'step time',
    'alignment': 'alignment'}
_MEASURES = {
    'teaching': ('Teaching signals', 'Cosine between what teaches a unit and '
                 "backprop's error there, mean over the examples of a batch."),
    'weight': ('Weights and feedback', "Cosine between a unit's weights and what "
               'the rule aligns them with.'),
    'update': ('Updates', "Cosine between the rule's update of a unit and "
               "backprop's."),
    'growth': ('Growth', 'Norm of what a unit puts out over the norm of what the '
               'one before it does.'),
    'backprop_norm': ('Norm of the gradient', "Norm of backprop's own gradient of "
                      'a unit: a cosine with next to nothing says nothing.')}


@dataclasses.dataclass(frozen=True)
class Run:
  """One run's folder, read.

  Attributes:
    path: as it was named.
    config: every field.
    lines: of metrics.jsonl.
    summary: empty where the run is not finished.
    environment: of environment.json.
  """
  path: str
  config: dict[str, Any]
  lines: list[dict[str, Any]]
  summary: dict[str, Any]
  environment: dict[str, Any]

  @property
  def epochs(self) -> Callable[[int], float]:
    """Step -> epoch; the step itself before the first epoch has ended."""
    ends = [m for m in self.lines if m['split'] == 'test' and m['epoch']]
    steps = ends[-1]['step'] / ends[-1]['epoch'] if ends else 1.
    return lambda step: step / steps


@dataclasses.dataclass(frozen=True)
class Row:
  """The runs of one config, seed by seed.

  Attributes:
    number: its place among the rows.
    name: what tells it from the others.
    runs: in the order of their seeds.
    differing: the fields in which rows differ.
  """
  number: int
  name: str
  runs: list[Run]
  differing: dict[str, Any]

  def values(self, column: str) -> dict[int, float]:
    """seed -> number of `comparison.COLUMNS`, of finished runs."""
    found = {r.config['seed']: comparison.numbers(r.summary)[column]
             for r in self.runs if r.summary}
    return {seed: value for seed, value in found.items() if value is not None}


def find(folders: Sequence[str]) -> tuple[list[Run], list[str]]:
  """The runs in folders, and a sentence for each that cannot be read.

  Args:
    folders: of runs, of sweeps, or of several of these.

  Raises:
    ValueError: for a folder without a run.
  """
  runs, notes, seen = [], [], set()
  for folder in folders:
    paths = list(_run_folders(os.path.expanduser(folder), _DEPTH))
    if not paths:
      raise ValueError(
          f'`{folder}` holds no run; train one with `python -m experiments.main '
          '--config=... --workdir=...`.')
    for path in paths:
      real = os.path.realpath(path)
      if real in seen:
        continue
      seen.add(real)
      try:
        runs.append(_read(path))
      except (ValueError, workdir_lib.DiskError) as error:
        notes.append(f'{path} is left out: {error}')
  if not runs:
    raise ValueError(f'no run can be read; {notes[0]}')
  return runs, notes


def rows_of(runs: Sequence[Run]) -> list[Row]:
  """Runs with equal configs, but for the seed, together."""
  groups = {}
  for run in runs:
    config = {k: v for k, v in run.config.items() if k != 'seed'}
    groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
  flat = [_flat(group[0].config) for group in groups.values()]
  fields = list(dict.fromkeys(field for config in flat for field in config))
  differing = [
      field for field in fields if field != 'seed'
      and len({json.dumps(c.get(field)) for c in flat}) > 1]
  rows = []
  for number, (group, config) in enumerate(zip(groups.values(), flat)):
    values = {field: config.get(field) for field in differing}
    rows.append(Row(
        number, _name(config, values),
        sorted(group, key=lambda r: r.config['seed']), values))
  return rows


def page(
    rows: Sequence[Row], notes: Sequence[str], title: str, command: str) -> str:
  """The page, as one text.

  Args:
    rows: what is compared; at least one.
    notes: what has to be said of runs that are left out.
    title: of the page.
    command: what wrote it.
  """
  now = datetime.datetime.now().strftime('%Y-%m-%d %H:%M')
  parts = [
      f'<header><div><h1>{_e(title)}</h1><p class="soft">{_overview(rows)}</p>'
      '</div><button id="theme" type="button" hidden>light / dark</button>'
      '</header><main>',
      *(f'<p class="note">{_e(note)}</p>' for note in notes),
      _legend(rows), _numbers(rows), _curves(rows), _alignment(rows),
      _tests(rows), _configs(rows), _environment(rows), _runs(rows),
      f'</main><footer>Written {now} by <code>{_e(command)}</code>. Lines are '
      'means over seeds, bands one standard deviation over seeds (n - 1) to '
      'either side.</footer>']
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
      f'<title>{_e(title)}</title><style>{_asset("report.css")}{_style(rows)}'
      f'</style></head>\n<body>{"".join(parts)}'
      f'<script>{_asset("report.js")}</script></body></html>\n')


def _run_folders(folder, depth):
  """Folders of runs, those of a sweep in the order of its sweep.json."""
  if os.path.isfile(os.path.join(folder, 'config.json')):
    yield folder
    return
  if not depth or not os.path.isdir(folder):
    return
  names = sorted(
      n for n in os.listdir(folder) if os.path.isdir(os.path.join(folder, n)))
  held = _json(os.path.join(folder, 'sweep.json')).get('runs')
  order = [r.get('folder') for r in held if isinstance(r, dict)] if (
      isinstance(held, list)) else []
  for name in sorted(names, key=lambda n: (
      order.index(n) if n in order else len(order))):
    yield from _run_folders(os.path.join(folder, name), depth - 1)


def _read(path):
  config = _json(os.path.join(path, 'config.json'))
  if not isinstance(config.get('seed'), int) or not isinstance(
      config.get('rule'), str):
    raise ValueError('its config.json is not that of a run.')
  default = config_lib.to_json(config_lib.default())
  return Run(
      path, default | config, workdir_lib.read_metrics(path),
      workdir_lib.read_summary(path) or {},
      _json(os.path.join(path, 'environment.json')))


def _json(path):
  """The object in a file; {} where there is none."""
  try:
    with open(path, encoding='utf-8') as file:
      value = json.load(file)
  except (OSError, ValueError, RecursionError):
    return {}
  return streams.printable(value) if isinstance(value, dict) else {}


def _flat(config):
  """The fields in their own order; those that are tables, name by name."""
  flat, order = {}, list(fields_lib.BY_NAME)
  place = lambda item: order.index(item[0]) if item[0] in order else len(order)
  for field, value in sorted(config.items(), key=place):
    if isinstance(value, dict):
      flat |= {f'{field}.{name}': v for name, v in value.items()}
    else:
      flat[field] = value
  return flat


def _name(config, differing):
  """Such as 'kolen_pollack' or 'backprop, learning_rate=0.1'."""
  parts = [f'{k}={_shown(v)}' for k, v in differing.items() if k != 'rule']
  if 'rule' in differing or not parts:
    parts.insert(0, config['rule'])
  return ', '.join(parts)


def _shown(value):
  if value is None:
    return '-'
  return value if isinstance(value, str) and value else json.dumps(value)


def _e(text: Any) -> str:
  return html.escape(str(text))


def _n(name: str) -> str:
  """A row's name, which may break after these signs where it has to."""
  return re.sub('([_,=/])', r'\1<wbr>', _e(name))


def _asset(name):
  return (_HERE / name).read_text(encoding='utf-8')


# The page's parts.


def _overview(rows):
  runs = [r for row in rows for r in row.runs]
  done = sum(bool(r.summary) for r in runs)
  seeds = sorted({len(row.runs) for row in rows})
  seeds = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  several = lambda n, what: f'{n} {what}{"" if str(n) == "1" else "s"}'
  texts = [
      several(len(rows), 'row'), f'{several(seeds, "seed")} each',
      f'{done} of {several(len(runs), "run")} finished']
  for field in ('dataset', 'model'):
    values = list(dict.fromkeys(r.config[field] for r in runs))
    texts.append(f'{field} {", ".join(_e(v) for v in values)}')
  devices = list(dict.fromkeys(
      r.summary['device_kind'] for r in runs if r.summary.get('device_kind')))
  if devices:
    texts.append(f'on {_e(", ".join(devices))}')
  return ' &middot; '.join(texts)


def _style(rows):
  """The colour of each row: one a rule; rows of one rule differ in dashes.

  Where all have one rule, each row has a colour.
  """
  rules = list(dict.fromkeys(row.runs[0].config['rule'] for row in rows))
  coloured = [r for r in rules if r != 'backprop']
  used, text = {}, []
  for row in rows:
    rule = row.runs[0].config['rule']
    if len(rules) == 1:
      colour, repeat = f'c{row.number % _COLOURS}', row.number // _COLOURS
    else:
      colour = 'ref'
      if rule != 'backprop':
        colour = f'c{coloured.index(rule) % _COLOURS}'
      repeat = used.get(colour, 0)
    used[colour] = used.get(colour, 0) + 1
    dash = _DASHES[repeat % len(_DASHES)]
    text.append(f'.r{row.number}{{--row:var(--{colour})}}')
    if dash:
      text.append(f'.line.r{row.number}{{stroke-dasharray:{dash};'
                  'stroke-linecap:butt}')
  return ''.join(text)


def _key(row):
  return (f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true">'
          f'<path class="line r{row.number}" d="M1 4H21"/></svg>')


def _named(row):
  return f'<span class="row">{_key(row)}<span>{_n(row.name)}</span></span>'


def _legend(rows):
  buttons = ''.join(
      f'<button type="button" data-row="{row.number}" aria-pressed="true" '
      f'disabled>{_key(row)}<span class="name">{_e(row.name)}</span></button>'
      for row in rows)
  return f'<nav class="legend" aria-label="Rows">{buttons}</nav>'


def _numbers(rows):
  """The table of final numbers."""
  columns = [c for c in comparison.COLUMNS if any(r.values(c) for r in rows)]
  if not columns:
    return ('<section><h2>Final numbers</h2><p class="soft">No run is finished '
            'yet.</p></section>')
  values = {c: [v for r in rows for v in r.values(c).values()] for c in columns}
  head = ('<th class="t"><button type="button">row</button></th>'
          '<th><button type="button">seeds</button></th>')
  for c in columns:
    head += f'<th><button type="button">{_e(_NAMES[c])}</button></th>'
    if c == columns[0]:
      head += '<th class="t">seed by seed</th>'
  body = ''
  for row in rows:
    cells = f'<td class="t wrap" data-v="{_e(row.name)}">{_named(row)}</td>'
    done = sum(bool(r.summary) for r in row.runs)
    of = '' if done == len(row.runs) else f' <small>of {len(row.runs)}</small>'
    cells += f'<td data-v="{done}">{done}{of}</td>'
    for c in columns:
      cells += _cell(c, list(row.values(c).values()))
      if c == columns[0]:
        own = list(row.values(c).values())
        percent = comparison.shown_as(c)[1] == '%'
        cells += '<td class="t">' + (charts.strip(
            own, row.number, charts.axis(values[c], percent=percent),
            title=f'{_NAMES[c]} of {len(own)} seeds',
            mean=statistics.fmean(own)) if own else '') + '</td>'
    body += f'<tr data-row="{row.number}">{cells}</tr>'
  diverged = [row.name for row in rows
              if any(r.summary.get('diverged') for r in row.runs)]
  note = ''.join(
      f'<p class="note">A run of {_e(name)} diverged: its train loss ended above '
      'its first value.</p>' for name in diverged)
  return (
      '<section><h2>Final numbers</h2><p class="soft">Mean &plusmn; standard '
      'deviation over finished seeds. Alignment: cosine of teaching signals to '
      "backprop's, mean over hidden units. A column's head sorts.</p>"
      f'{_table(head, body)}{note}</section>')


def _cell(column, values):
  if not values:
    return '<td class="none" data-v="">&ndash;</td>'
  scale, unit, digits = comparison.shown_as(column)
  mean = statistics.fmean(values)
  spread = f' <small>&plusmn; {statistics.stdev(values) * scale:.{digits}f}</small>' if (
      len(values) > 1) else ''
  return (f'<td data-v="{mean!r}">{mean * scale:.{digits}f}{_e(unit)}{spread}</td>')


def _table(head, body):
  return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')


def _series(rows, wanted):
  """The curve of each row: mean and deviation over the seeds that got there.

  Args:
    rows: the rows.
    wanted: `(line) -> value or None`.
  """
  curves = []
  for row in rows:
    found = {}
    for run in row.runs:
      epoch = run.epochs
      for line in run.lines:
        value = wanted(line)
        if value is not None:
          found.setdefault(line['step'], (epoch(line['step']), []))[1].append(value)
    points = []
    for _, (x, values) in sorted(found.items()):
      mean = statistics.fmean(values)
      spread = statistics.stdev(values) if len(values) > 1 else 0.
      points.append((x, mean, mean - spread, mean + spread))
    if points:
      curves.append(charts.Curve(row.number, sorted(points)))
  return curves


def _panel(curves, caption, label, small=False, **axis):
  """A figure with one chart."""
  values = [v for c in curves for p in c.points for v in (
      p[1:] if not axis.get('log') else p[1:2])]
  x = charts.axis([p[0] for c in curves for p in c.points], count=6, pad=0)
  chart = charts.lines(
      curves, x, charts.axis(values, **axis), title=caption, x_label=label,
      **(_SMALL if small else {}))
  return f'<figure><figcaption>{_e(caption)}</figcaption>{chart}</figure>'


def _curves(rows):
  """Panels of every number that is measured over training."""
  measured = list(dict.fromkeys(
      (line['split'], name) for row in rows for run in row.runs
      for line in run.lines if 'unit' not in line
      for name in line if name not in ('step', 'epoch', 'split')))
  rank = lambda pair: (
      pair[1] != 'accuracy', pair[1] != 'loss', pair[1],
      ('test', 'validation', 'train').index(pair[0]) if pair[0] in (
          'test', 'validation', 'train') else 3)
  found = {}
  for split, name in sorted(measured, key=rank):
    curves = _series(rows, lambda line: (
        line.get(name) if line['split'] == split and 'unit' not in line else None))
    if curves:
      found[split, name] = curves
  means, panels = {}, []
  for (_, name), curves in found.items():
    means.setdefault(name, []).extend(p[1] for c in curves for p in c.points)
  for (split, name), curves in found.items():
    share, least = name == 'accuracy', min(means[name])
    panels.append(_panel(
        curves, f'{split} {name.replace("_", " ")}', 'epoch', percent=share,
        # One kind of axis for all splits.
        log=not share and least > 0 and max(means[name]) > 30 * least,
        least=0. if share or least >= 0 else None, most=1. if share else None))
  if not panels:
    return ''
  return ('<section><h2>Over training</h2><p class="soft">Training losses are '
          'those of the steps since the last point.</p>'
          f'<div class="panels">{"".join(panels)}</div></section>')


def _alignment(rows):
  """Panels of every measure of every unit."""
  units, measures = _units(rows)
  if not measures:
    return ''
  parts = []
  for measure in sorted(measures, key=lambda m: (
      list(_MEASURES).index(m) if m in _MEASURES else len(_MEASURES), m)):
    heading, meaning = _MEASURES.get(measure, (measure.replace('_', ' '), ''))
    cosine = measure in ('teaching', 'weight', 'update')
    everywhere = {u: _series(rows, _of_unit(u, measure)) for u in units}
    everywhere = {u: curves for u, curves in everywhere.items() if curves}
    if not everywhere:
      continue
    # One range for all units of a cosine, so that they can be compared.
    every = [v for curves in everywhere.values() for c in curves
             for p in c.points for v in p[1:]]
    span = {'least': max(-1., min(0., *every)), 'most': 1.} if cosine else (
        {'log': True})
    panels = []
    depth = _by_depth(rows, everywhere)
    if len(everywhere) > 3 and depth:
      panels.append(_depth_panel(depth, list(everywhere), span, cosine))
    for unit, curves in everywhere.items():
      if cosine:  # The ends of the range belong to it.
        panels.append(_unit_panel(curves, unit, span))
      else:
        panels.append(_panel(curves, unit, 'epoch', small=True, **span))
    shown, rest = panels[:_MOST_PANELS], panels[_MOST_PANELS:]
    more = (f'<details><summary>{len(rest)} more units</summary>'
            f'<div class="panels small">{"".join(rest)}</div></details>'
            ) if rest else ''
    folded = measure in ('update', 'backprop_norm')
    inner = f'<div class="panels small">{"".join(shown)}</div>{more}'
    if folded:
      inner = f'<details><summary>{len(everywhere)} units</summary>{inner}</details>'
    parts.append(f'<h3>{_e(heading)}</h3><p class="soft">{_e(meaning)}</p>{inner}')
  return (f'<section><h2>Alignment with backprop, unit by unit</h2>{"".join(parts)}'
          '</section>')


def _units(rows):
  """Units in the order of the models, and what was measured of them."""
  units, measures = {}, {}
  for row in rows:
    for run in row.runs:
      units |= dict.fromkeys(
          u for u in run.summary.get('units', {})
          if u in run.summary.get('alignment', {}))
      for line in run.lines:
        if 'unit' in line:
          units.setdefault(line['unit'])
          measures |= dict.fromkeys(
              k for k, v in line.items() if v is not None and k not in (
                  'step', 'epoch', 'split', 'unit', 'teaching_std'))
  return list(units), list(measures)


def _of_unit(unit, measure):
  return lambda line: line.get(measure) if line.get('unit') == unit else None


def _unit_panel(curves, unit, span):
  x = charts.axis([p[0] for c in curves for p in c.points], count=6, pad=0)
  y = charts.axis([span['least'], span['most']], **span)
  chart = charts.lines(
      curves, x, y, title=unit, x_label='epoch', **_SMALL)
  return f'<figure><figcaption>{_e(unit)}</figcaption>{chart}</figure>'


def _by_depth(rows, everywhere):
  """The last point of every unit, as a curve over the units."""
  curves = []
  for row in rows:
    points = []
    for i, own in enumerate(everywhere.values()):
      last = next((c.points[-1] for c in own if c.row == row.number), None)
      if last:
        points.append((i + 1, *last[1:]))
    if points:
      curves.append(charts.Curve(row.number, points))
  return curves


def _depth_panel(curves, units, span, cosine):
  x = charts.axis([1, len(units)], count=min(6, len(units) - 1), pad=0)
  x = x._replace(ticks=tuple(t for t in x.ticks if t == int(t)))
  y = charts.axis([span['least'], span['most']], **span) if cosine else (
      charts.axis([p[1] for c in curves for p in c.points], **span))
  chart = charts.lines(
      curves, x, y, title='at the end, by unit', x_label='unit',
      markers=True, **_SMALL)
  return ('<figure><figcaption>at the end, from the first unit to the last'
          f'</figcaption>{chart}</figure>')


def _tests(rows):
  """Paired tests of rows over the seeds that they share."""
  column = next((c for c in ('test_accuracy', 'test_loss')
                 if sum(bool(r.values(c)) for r in rows) > 1), None)
  if column is None:
    return ''
  values = [row.values(column) for row in rows]
  title = f'<section><h2>Paired tests, {_e(_NAMES[column])}</h2>'
  first = comparison.pairs(values, first_only=True)
  if not any(t['n'] > 1 for t in first):
    return (f'{title}<p class="soft">A test needs two seeds that rows share; '
            'train more with --seeds=0,1,2.</p></section>')
  rest = comparison.pairs(values)
  every = '' if len(rows) < 3 else (
      f'<details><summary>All {len(rest)} pairs, corrected together</summary>'
      f'{_test_table(rows, rest, column, both=True)}</details>')
  return (
      f'{title}<p class="soft">Each row against <b>{_e(rows[0].name)}</b>, by a '
      't-test of the differences seed by seed: mean difference with its 95% '
      "confidence interval, p-value (Holm's, for all tests of the table "
      "together), and Cohen's d<sub>z</sub>, the mean difference over the "
      'standard deviation of differences. Bold: p below 0.05.</p>'
      f'{_test_table(rows, first, column)}{every}</section>')


def _test_table(rows, tests, column, both=False):
  scale, unit, digits = comparison.shown_as(column)
  ends = [v for t in tests for v in (t['low'], t['high'], t['difference'])
          if v is not None]
  # A test of two seeds may reach far; the others shall be seen beside it.
  most = 3 * max((abs(t['difference']) for t in tests
                  if t['difference'] is not None), default=1.) or 1.
  span = charts.axis([0., *(min(max(v, -most), most) for v in ends)])
  names = ['row'] if not both else ['row', 'against']
  head = ''.join(f'<th class="t">{n}</th>' for n in names) + (
      '<th>difference</th><th class="t">95% interval</th><th></th><th>p</th>'
      '<th>d<sub>z</sub></th><th>seeds</th>')
  body = ''
  for t in tests:
    a, b = rows[t['a']], rows[t['b']]
    cells = f'<td class="t wrap">{_named(b)}</td>'
    if both:
      cells += f'<td class="t wrap">{_named(a)}</td>'
    if not t['n']:
      body += f'<tr>{cells}<td class="none" colspan="6">no seed in common</td></tr>'
      continue
    number = lambda k: f'{t[k] * scale:+.{digits}f}'.replace('-', '&minus;')
    sure = ' class="sure"' if (t['p_holm'] or 1) < .05 else ''
    known = t['p'] is not None
    effect = f'{t["d_z"] or 0:+.1f}'.replace('-', '&minus;')
    between = f'[{number("low")}, {number("high")}]' if known else ''
    bar = charts.interval(
        t['difference'], t['low'], t['high'], b.number, span,
        title='difference with its interval')
    dash = '<span class="soft">&ndash;</span>'
    cells += (
        f'<td{sure}>{number("difference")}{_e(unit)}</td>'
        f'<td class="t">{bar}</td><td class="t"><small>{between}</small></td>'
        f'<td{sure}>{_p(t["p_holm"]) if known else dash}</td>'
        f'<td>{effect if known else dash}</td>'
        f'<td>{t["n"]}</td>')
    body += f'<tr data-row="{b.number}">{cells}</tr>'
  return _table(head, body)


def _p(p):
  return '&lt; 0.0001' if p < 1e-4 else f'{p:.2g}'


def _configs(rows):
  """What differs between rows, and what does not."""
  fields = list(rows[0].differing)
  config = _flat(rows[0].runs[0].config)
  common = ''.join(
      f'<tr><td class="t"><code>{_e(k)}</code></td><td class="t wrap"><code>'
      f'{_e(_shown(v))}</code></td></tr>' for k, v in config.items()
      if k not in fields and k != 'seed')
  same = ('<details><summary>The fields that all rows share</summary>'
          + _table('<th class="t">field</th><th class="t">value</th>', common)
          + '</details>')
  if not set(fields) - {'rule'}:
    what = '<p class="soft">Rows differ in <code>rule</code> alone.</p>' if (
        fields) else ''
    return f'<section><h2>Configuration</h2>{what}{same}</section>'
  head = '<th class="t"><button type="button">row</button></th>' + ''.join(
      f'<th class="t"><button type="button">{_e(f)}</button></th>' for f in fields)
  body = ''.join(
      f'<tr data-row="{row.number}"><td class="t wrap" data-v="{_e(row.name)}">'
      f'{_named(row)}</td>' + ''.join(
          f'<td class="t wrap" data-v="{_e(_shown(row.differing[f]))}"><code>'
          f'{_e(_shown(row.differing[f]))}</code></td>' for f in fields) + '</tr>'
      for row in rows)
  return (f'<section><h2>What differs between rows</h2>{_table(head, body)}{same}'
          '</section>')


def _environment(rows):
  """Versions, devices and data; a column for each that there was."""
  columns = []
  runs = [run for row in rows for run in row.runs]
  # One that is not finished says less, and may go with any that agrees.
  for run in sorted(runs, key=lambda r: not r.summary):
    s = run.summary
    versions = s.get('versions')
    values = {
        'device': _nested(run, 'machine', 'device_kind') or s.get('device_kind'),
        'devices': _nested(run, 'machine', 'device_count') or s.get(
            'device_count'),
        **(versions if isinstance(versions, dict) else {}),
        'jax': _nested(run, 'machine', 'jax'),
        'jaxlib': _nested(run, 'machine', 'jaxlib'),
        'commit': s.get('git_commit'), 'data': s.get('data_source'),
        'data fingerprint': _nested(run, 'data', 'fingerprint')}
    for known, group in columns:
      if all(v is None or v == known.get(k) for k, v in values.items()):
        group.append(run)
        break
    else:
      columns.append((values, [run]))
  names = list(dict.fromkeys(k for values, _ in columns for k in values))
  head = '<th class="t">what</th>' + ''.join(
      f'<th class="t">{len(runs)} run{"s" * (len(runs) > 1)}</th>'
      for _, runs in columns)
  body = ''
  for name in names:
    cells = [values.get(name) for values, _ in columns]
    if any(c is not None for c in cells):
      sure = ' sure' if len({json.dumps(c) for c in cells}) > 1 else ''
      body += f'<tr><td class="t">{_e(name)}</td>' + ''.join(
          f'<td class="t wrap{sure}">{_e("-" if c is None else c)}</td>'
          for c in cells) + '</tr>'
  note = '' if len(columns) == 1 else (
      '<p class="note">Runs were not all trained in the same environment; what '
      'differs is bold.</p>')
  return f'<section><h2>Environment</h2>{note}{_table(head, body)}</section>'


def _nested(run, group, name):
  held = run.environment.get(group)
  return held.get(name) if isinstance(held, dict) else None


def _runs(rows):
  head = ('<th class="t">folder</th><th class="t">row</th><th>seed</th>'
          '<th class="t">state</th><th>training time</th>')
  body = ''
  for row in rows:
    for run in row.runs:
      last = run.lines[-1] if run.lines else {'epoch': 0}
      state = 'finished' if run.summary else (
          f'epoch {last["epoch"]} of {run.config["epochs"]}')
      seconds = run.summary.get('wall_time')
      time = '&ndash;' if seconds is None else f'{seconds:,.0f} s'
      body += (f'<tr><td class="t wrap"><code>{_e(run.path)}</code></td>'
               f'<td class="t wrap">{_named(row)}</td>'
               f'<td>{run.config["seed"]}</td><td class="t">{_e(state)}</td>'
               f'<td>{time}</td></tr>')
  count = sum(len(row.runs) for row in rows)
  return (f'<section><h2>Runs</h2><details><summary>{count} folder'
          f'{"s" * (count > 1)}</summary>{_table(head, body)}</details></section>')


def write(text: str, path: str) -> None:
  """Replaces the page as a whole; raises OSError."""
  temporary = f'{path}.tmp'
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(text)
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


class _Parser(argparse.ArgumentParser):
  """One whose errors are one sentence."""

  def error(self, message):
    streams.complain(f'error: {message}; see --help.')
    sys.exit(2)


def main(argv: Iterable[str]) -> int:
  """Writes the page; returns the exit code: 0, 2 (refused) or 4 (disk)."""
  argv = list(argv)
  parser = _Parser(
      'python -m experiments.report', description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folders', nargs='+', metavar='DIR')
  parser.add_argument('--output', help='the page; default: DIR/report.html')
  parser.add_argument('--title', help="default: the folders' names")
  options = parser.parse_args(argv)
  try:
    runs, notes = find(options.folders)
  except (ValueError, OSError) as error:
    streams.complain(f'error: {error}')
    return 2
  for note in notes:
    streams.complain(f'warning: {note}')
  title = options.title or ', '.join(dict.fromkeys(
      os.path.basename(os.path.abspath(f)) for f in options.folders))
  path = options.output or os.path.join(options.folders[0], 'report.html')
  command = shlex.join(['python', '-m', 'experiments.report', *argv])
  try:
    write(page(rows_of(runs), notes, streams.printable(title), command), path)
  except OSError as error:
    streams.complain(
        f'error: {path} cannot be written ({error.strerror}); name another file '
        'by --output.')
    return streams.DISK_ERROR
  streams.put('stdout', f'wrote {path}')
  return 0


if __name__ == '__main__':
  streams.guarded(lambda: sys.exit(main(sys.argv[1:])))
