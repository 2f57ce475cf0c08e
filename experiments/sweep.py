"""Trains every point of a grid with every seed, and compares the points.

python -m experiments.sweep --config=experiments/configs/mnist_mlp.py \
    --workdir=runs/rules --seeds=0,1,2 --jobs=2 \
    --grid=rule=feedback_alignment,kolen_pollack --grid=epochs=5,10

python -m experiments.sweep --config=experiments/configs/mnist_mlp.py \
    --workdir=runs/search --config.validation=5000 --random=20 --seed=0 \
    --grid=learning_rate=log:1e-4:1e-1 --grid=model_args.dropout=uniform:0:.5

Several --grid flags make a product; with --random=N, N points are drawn from
it, and a field may have a range: log:LOW:HIGH, uniform:LOW:HIGH, or
int:LOW:HIGH of whole numbers. Each run has a folder of its own, such as
`rule=kolen_pollack,seed=1`; a finished run is not trained again, an interrupted
one goes on, and one that fails is reported while the others go on. --jobs=N
trains N runs at a time, in processes that share the cores; signals stop them
all, and the same command goes on.

Ends with a table of means and standard deviations over seeds, each point tested
against the first one by a paired t-test, and with `sweep.json`, which has the
tests of all pairs.
"""

from __future__ import annotations

if __name__ == '__main__':
  from bpjax.train.folder import signals
  signals.exit_quietly()  # While the rest is imported, and between runs.

from collections.abc import Mapping, Sequence
import itertools
import json
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
from bpjax.train.folder import watching
from bpjax.train.folder import workdir as workdir_lib
from experiments import comparison
from experiments import config as flags_lib
from experiments import jobs as jobs_lib
from experiments import main as main_lib
from experiments import space
import ml_collections
import rich.console
import rich.table

_SEEDS = flags.DEFINE_list('seeds', [], 'Seeds; default: that of the config.')
_GRID = flags.DEFINE_multi_string(
    'grid', [], 'FIELD=VALUE,VALUE,..., or with --random a range.')
_RANDOM = flags.DEFINE_integer('random', 0, 'Points drawn at random; 0: all.')
_SEED = flags.DEFINE_integer('seed', None, 'Of --random; default: 0.')
_JOBS = flags.DEFINE_integer('jobs', 1, 'Runs at a time.')
# In the table only where there is one: what is here or not by the config.
_AT_TIMES = ('validation_accuracy', 'test_loss')


def folder_name(point: space.Point, seed: int) -> str:
  """The name of a run's folder, such as `rule=backprop,seed=0`."""
  name = ','.join(f'{k}={v}' for k, v in {**point, 'seed': seed}.items())
  return re.sub(r'[^\w=,.()+-]', '_', name)


def sweep(
    config: ml_collections.ConfigDict, workdir: str, grid: Sequence[str],
    seeds: Sequence[str], *, jobs: int = 1, random: int = 0,
    seed: int | None = None, watch: Sequence[str] = watching.DEFAULT) -> int:
  """Runs the grid, or points drawn from it.

  Args:
    config: the config of all runs.
    workdir: folder of the runs' folders and of `sweep.json`.
    grid: the grid flags.
    seeds: the seeds as texts; none: the config's own.
    jobs: how many runs are trained at a time; 1: in this process.
    random: the number of points to draw; 0: all points of the grid.
    seed: of the draws; None: 0.
    watch: who is shown the metrics, see `bpjax.train.folder.watching`.

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
    watching.require(watch)
    jobs_lib.check(jobs)
    _check_flags(random, seed)
    points = space.sample(grid, random, seed or 0) if random else (
        space.parse_grid(grid))
    runs = _runs(config, points, seeds)
    # These load JAX, which a wrong value need not.
    from bpjax.train.folder import summary as summary_lib
    from bpjax.train.loop import build
    checked = set()  # A seed changes nothing that could be refused.
    for point, _, run_config in runs:
      if json.dumps(point) not in checked:
        checked.add(json.dumps(point))
        build.make(run_config)
    jobs_lib.check_device(jobs)
  except ValueError as error:
    streams.complain(f'error: {error}')
    return 2
  names = [folder_name(point, run_seed) for point, run_seed, _ in runs]
  waiting = [
      jobs_lib.Job(name, os.path.join(workdir, name), run_config)
      for name, (_, _, run_config) in zip(names, runs)]
  try:
    codes = jobs_lib.run_all(waiting, jobs, watch)
  except jobs_lib.Stopped as stopped:
    return stopped.exit_code  # By a signal: the same command goes on.
  results = []
  for i, (point, run_seed, _) in enumerate(runs):
    summary = None if codes[i] else workdir_lib.read_summary(waiting[i].folder)
    results.append(
        {'point': point, 'seed': run_seed, 'folder': names[i],
         'exit_code': codes[i], **comparison.numbers(summary or {}),
         **{k: (summary or {}).get(k) for k in ('wall_time', 'device_kind')}})
  points = _compare(results)
  drawn = {'random': {'points': random, 'seed': seed or 0}} if random else {}
  try:
    with workdir_lib.disk(f'sweep.json in {workdir} cannot be written'):
      os.makedirs(workdir, exist_ok=True)
      path = os.path.join(workdir, 'sweep.json')
      with open(path, 'w', encoding='utf-8') as file:
        json.dump({
            'command': ' '.join(['python -m experiments.sweep', *sys.argv[1:]]),
            'config': config_lib.to_json(config), 'grid': list(grid), **drawn,
            'versions': summary_lib.versions(), 'points': points,
            'tests': _tests(results), 'runs': results}, file, indent=1)
  except workdir_lib.DiskError as error:
    streams.complain(f'error: {error}')
    return streams.DISK_ERROR
  _print(points, _tests(results, first_only=True), bool(random))
  for result in results:
    if result['exit_code']:
      print(
          f'error: {result["folder"]} failed with exit code '
          f'{result["exit_code"]}; its log.txt says why', file=sys.stderr)
  return 1 if any(codes) else 0


def _check_flags(random, seed):
  """Raises ValueError for numbers that make no sense."""
  if random < 0:
    raise ValueError(
        f'`random` must be a number of points, or 0 for all, got {random}.')
  if seed is not None and not random:
    raise ValueError(
        '`seed` is that of --random, which is not given; the seeds of the runs '
        'are --seeds=0,1,2.')
  if seed is not None and seed < 0:
    raise ValueError(f'`seed` must be at least 0, got {seed}.')


def _runs(config, points, seeds):
  """(point, seed, config) of every run; refused before any of them starts."""
  seeds = list(dict.fromkeys(seeds)) or [str(config.seed)]
  runs = []
  for point, seed in itertools.product(points, seeds):
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


def _by_point(results):
  """The results of each point, in order."""
  groups = itertools.groupby(results, lambda r: json.dumps(r['point']))
  return [list(group) for _, group in groups]


def _compare(results):
  """Mean, standard deviation (over n - 1) and number of seeds, per point."""
  points = []
  for group in _by_point(results):
    row = {'point': group[0]['point'], 'seeds': [r['seed'] for r in group]}
    for column in comparison.COLUMNS:
      values = [r[column] for r in group if r[column] is not None]
      row[column] = {
          'mean': statistics.fmean(values) if values else None,
          'std': statistics.stdev(values) if len(values) > 1 else None,
          'n': len(values)}
    points.append(row)
  return points


def _tests(results, first_only=False):
  """Paired tests between points over seeds, of every column that has any.

  Those of a column are corrected together; see `comparison.pairs`.
  """
  tests = {}
  for column in comparison.COLUMNS:
    rows = [{r['seed']: r[column] for r in group}
            for group in _by_point(results)]
    found = comparison.pairs(rows, first_only)
    if any(t['n'] > 1 for t in found):
      tests[column] = found
  return tests


def _print(points, tests, by_random):
  """A table on a terminal, else a line per point."""
  columns = [
      c for c in comparison.COLUMNS if c not in _AT_TIMES
      or c == 'validation_accuracy' and any(p[c]['n'] for p in points)
      or c == 'test_loss' and not any(p['test_accuracy']['n'] for p in points)]
  against, column = _against(points, tests)
  title = f'{column} against {_label(points[0]["point"])}'
  order = range(len(points))
  validated = any(p['validation_accuracy']['n'] for p in points)
  if by_random and validated:  # The best first: chosen on validation examples.
    mean = lambda i: points[i]['validation_accuracy']['mean']
    order = sorted(order, key=lambda i: -1 if mean(i) is None else mean(i),
                   reverse=True)
  console = rich.console.Console()
  if not console.is_terminal:
    for i in order:
      cells = [f'{c} {_cell(c, points[i][c])}' for c in columns]
      if against[i]:
        cells.append(f'{title} {against[i]}')
      print(f'{_label(points[i]["point"])}: {", ".join(cells)}')
  else:
    shown = any(against)
    table = rich.table.Table('point', *columns, *[title] * shown)
    for i in order:
      table.add_row(
          _label(points[i]['point']), *(_cell(c, points[i][c]) for c in columns),
          *[against[i]] * shown)
    console.print(table)
  if by_random and not validated:
    streams.put(
        'stderr', 'no run has validation examples: choose no setting by its '
        'test accuracy, but with --config.validation=N')


def _against(points, tests):
  """How each point differs from the first one, and in which column."""
  column = next((c for c in ('test_accuracy', 'test_loss') if c in tests), '')
  texts = [''] * len(points)
  for test in tests.get(column, ()):
    texts[test['b']] = difference_text(column, test)
  return texts, column


def difference_text(column: str, test: Mapping[str, Any]) -> str:
  """A paired test in words; '' where there were not two pairs.

  Example:
    >>> difference_text('test_accuracy', {
    ...     'n': 3, 'difference': .03, 'low': .005, 'high': .055, 'p_holm': .035,
    ...     'd_z': 3.})
    '+3.00% [+0.50, +5.50] (p 0.035, d_z 3.0, n=3)'
  """
  if test['n'] < 2:
    return ''
  scale, unit, digits = comparison.shown_as(column)
  text = f'{test["difference"] * scale:+.{digits}f}{unit}'
  if test['p_holm'] is None:
    return f'{text} (n={test["n"]})'
  low, high = (f'{test[k] * scale:+.{digits}f}' for k in ('low', 'high'))
  return (f'{text} [{low}, {high}] (p {test["p_holm"]:.2g}, '
          f'd_z {test["d_z"]:.1f}, n={test["n"]})')


def _label(point):
  return ', '.join(f'{k}={v}' for k, v in point.items()) or 'config'


def _cell(column, number):
  if number['mean'] is None:
    return '-'
  scale, unit, digits = comparison.shown_as(column)
  spread = '' if number['std'] is None else (
      f' +- {number["std"] * scale:.{digits}f}')
  return f'{number["mean"] * scale:.{digits}f}{spread}{unit} (n={number["n"]})'


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  sys.exit(sweep(
      main_lib.CONFIG.value, main_lib.WORKDIR.value, _GRID.value, _SEEDS.value,
      jobs=_JOBS.value, random=_RANDOM.value, seed=_SEED.value,
      watch=main_lib.WATCH.value))


if __name__ == '__main__':
  streams.guarded(lambda: app.run(main, flags_parser=main_lib.parse))
