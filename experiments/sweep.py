"""Trains every point of a grid with every seed, and compares the points.

python -m experiments.sweep --config=experiments/configs/mnist_mlp.py \
    --workdir=runs/rules --seeds=0,1,2 \
    --grid=rule=feedback_alignment,kolen_pollack --grid=epochs=5,10

Several --grid flags make a product. Each run has a folder of its own, such as
`rule=kolen_pollack,seed=1`; a finished run is not trained again, an interrupted
one goes on, and one that fails is reported while the others go on. Ends with a
table of means and standard deviations over seeds, and with `sweep.json`.
"""

from __future__ import annotations

if __name__ == '__main__':
  from bpjax.train.folder import signals
  signals.exit_quietly()  # While the rest is imported, and between runs.

from collections.abc import Mapping, Sequence
import itertools
import json
import math
import os
import re
import statistics
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
from bpjax.train import config as config_lib
from bpjax.train.folder import streams
from bpjax.train.folder import workdir as workdir_lib
from experiments import config as flags_lib
from experiments import main as main_lib
import ml_collections
import rich.console
import rich.table

_SEEDS = flags.DEFINE_list('seeds', [], 'Seeds; default: that of the config.')
_GRID = flags.DEFINE_multi_string('grid', [], 'FIELD=VALUE,VALUE,...')
_COLUMNS = ('test_accuracy', 'train_accuracy', 'median_step_time', 'alignment')

Point = dict[str, str]


def parse_grid(grid: Sequence[str]) -> list[Point]:
  """The product of grid flags.

  Args:
    grid: texts `FIELD=VALUE,VALUE,...`; a comma within brackets is part of a
      value.

  Returns:
    Field -> text of its value, for each point; one empty point without a grid.

  Raises:
    ValueError: for a text of another form, or a field that is given twice.

  Example:
    >>> parse_grid(['epochs=5', 'mesh.data=1,2'])
    [{'epochs': '5', 'mesh.data': '1'}, {'epochs': '5', 'mesh.data': '2'}]
  """
  axes = {}
  for text in grid:
    field, _, values = text.partition('=')
    values = [v.strip() for v in _split(values)]
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
    axes[field] = values
  product = itertools.product(*axes.values())
  return [dict(zip(axes, values)) for values in product]


def folder_name(point: Point, seed: int) -> str:
  """The name of a run's folder, such as `rule=backprop,seed=0`."""
  name = ','.join(f'{k}={v}' for k, v in {**point, 'seed': seed}.items())
  return re.sub(r'[^\w=,.()+-]', '_', name)


def sweep(
    config: ml_collections.ConfigDict, workdir: str, grid: Sequence[str],
    seeds: Sequence[str]) -> int:
  """Runs the grid, one run after the other in this process.

  Args:
    config: the config of all runs.
    workdir: folder of the runs' folders and of `sweep.json`.
    grid: the grid flags.
    seeds: the seeds as texts; none: the config's own.

  Returns:
    The exit code: 0; 1 if a run failed; 2 if the sweep was refused; 4 if its
    results cannot be written; 130 if it was stopped by Ctrl-C.
  """
  try:
    if not workdir:
      raise ValueError(
          '`workdir` must be a folder, got an empty name; give one such as '
          'runs/rules.')
    workdir = os.path.expanduser(workdir)
    runs = _runs(config, grid, seeds)
    from bpjax.train.folder import summary as summary_lib
    from bpjax.train.loop import (
      launch,  # Loads JAX, which a wrong value need not.
    )
    from bpjax.train.loop import run as run_lib
    checked = set()  # A seed changes nothing that could be refused.
    for point, _, run_config in runs:
      if json.dumps(point) not in checked:
        checked.add(json.dumps(point))
        run_lib.make(run_config)
  except ValueError as error:
    streams.complain(f'error: {error}')
    return 2
  failed = 0
  results = []
  for i, (point, seed, run_config) in enumerate(runs):
    name = folder_name(point, seed)
    streams.put('stderr', f'[{i + 1}/{len(runs)}] {name}')
    folder = os.path.join(workdir, name)
    code = launch.launch(run_config, folder, quiet=True)
    summary = None if code else workdir_lib.read_summary(folder)
    if code == 130 or (code == 0 and summary is None):
      return code  # Stopped by a signal: the same command goes on.
    failed += code != 0
    results.append(
        {'point': point, 'seed': seed, 'folder': name, 'exit_code': code,
         **_numbers(summary or {}),
         **{k: (summary or {}).get(k) for k in ('wall_time', 'device_kind')}})
  points = _compare(results)
  try:
    with workdir_lib.disk(f'sweep.json in {workdir} cannot be written'):
      os.makedirs(workdir, exist_ok=True)
      path = os.path.join(workdir, 'sweep.json')
      with open(path, 'w', encoding='utf-8') as file:
        json.dump({
            'command': ' '.join(['python -m experiments.sweep', *sys.argv[1:]]),
            'config': config_lib.to_json(config), 'grid': list(grid),
            'versions': summary_lib.versions(), 'points': points,
            'runs': results}, file, indent=1)
  except workdir_lib.DiskError as error:
    streams.complain(f'error: {error}')
    return streams.DISK_ERROR
  _print(points)
  for result in results:
    if result['exit_code']:
      print(
          f'error: {result["folder"]} failed with exit code '
          f'{result["exit_code"]}; its log.txt says why', file=sys.stderr)
  return 1 if failed else 0


def _runs(config, grid, seeds):
  """(point, seed, config) of every run; refused before any of them starts."""
  seeds = list(dict.fromkeys(seeds)) or [str(config.seed)]
  runs = []
  for point, seed in itertools.product(parse_grid(grid), seeds):
    run_config = flags_lib.override(config, {**point, 'seed': seed})
    config_lib.check(run_config)
    runs.append((point, run_config.seed, run_config))
  names = [folder_name(point, seed) for point, seed, _ in runs]
  twice = next((n for n in names if names.count(n) > 1), None)
  if twice:
    raise ValueError(
        f'`grid` must give every run its own folder, got {twice!r} twice; use '
        'values that differ in letters and digits.')
  return runs


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


def _numbers(summary: Mapping[str, Any]) -> dict[str, float | None]:
  """The columns of one run.

  The alignment is the mean of `teaching` over all units but the last, the
  output unit, whose teaching signal is exact under every rule.
  """
  measured = summary.get('alignment', {})
  hidden = [unit for unit in summary.get('units', ()) if unit in measured][:-1]
  cosines = [
      measured[unit]['teaching'] for unit in hidden
      if measured[unit]['teaching'] is not None]
  numbers = {c: summary.get(c) for c in _COLUMNS if c != 'alignment'}
  return numbers | {'alignment': statistics.fmean(cosines) if cosines else None}


def _compare(results):
  """Mean, standard deviation (over n - 1) and number of seeds, per point."""
  points = []
  by_point = lambda result: json.dumps(result['point'])
  for _, group in itertools.groupby(results, by_point):
    group = list(group)
    row = {'point': group[0]['point'], 'seeds': [r['seed'] for r in group]}
    for column in _COLUMNS:
      values = [r[column] for r in group if r[column] is not None]
      row[column] = {
          'mean': statistics.fmean(values) if values else None,
          'std': statistics.stdev(values) if len(values) > 1 else None,
          'n': len(values)}
    points.append(row)
  return points


def _print(points):
  """A table on a terminal, else a line per point."""
  console = rich.console.Console()
  if not console.is_terminal:
    for row in points:
      cells = (f'{c} {_cell(c, row[c])}' for c in _COLUMNS)
      print(f'{_label(row["point"])}: {", ".join(cells)}')
    return
  table = rich.table.Table('point', *_COLUMNS)
  for row in points:
    table.add_row(_label(row['point']), *(_cell(c, row[c]) for c in _COLUMNS))
  console.print(table)


def _label(point):
  return ', '.join(f'{k}={v}' for k, v in point.items()) or 'config'


def _cell(column, number):
  if number['mean'] is None:
    return '-'
  scale, unit, digits = {
      'median_step_time': (1e3, ' ms', 3), 'alignment': (1, '', 3),
  }.get(column, (100, '%', 2))
  std = math.nan if number['std'] is None else number['std']
  spread = '' if math.isnan(std) else f' +- {std * scale:.{digits}f}'
  return f'{number["mean"] * scale:.{digits}f}{spread}{unit} (n={number["n"]})'


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  sys.exit(sweep(
      main_lib.CONFIG.value, main_lib.WORKDIR.value, _GRID.value, _SEEDS.value))


if __name__ == '__main__':
  streams.guarded(lambda: app.run(main, flags_parser=main_lib.parse))
