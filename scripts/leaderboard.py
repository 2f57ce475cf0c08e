"""Every rule on every column, with one budget for all: the leaderboard.

  python scripts/leaderboard.py --tier=minute
  python scripts/leaderboard.py --tier=hour --columns=mnist_mlp --jobs=2 \
      --output=results/leaderboard.json
  python scripts/leaderboard.py --tier=minute --rule=mine.py:my_rule
  python scripts/leaderboard.py --html=leaderboard.html

A tier is named after what it costs on two idle cores. Every cell gets the same:
a search over a few learning rates, judged on validation examples, then the best
of them with every seed, judged on test examples. Each run has a folder of its
own in --workdir; what is finished is not trained again, and what was stopped or
killed goes on. A cell whose steps would take longer than the tier gives it is
left empty, and so is one that its rule refuses; the file says why.

--rule=FILE.py:FUNCTION gives a rule of your own its row, with the same budget:
the file is run as code, and FUNCTION() returns the rule. It is trained with the
control and backprop, in the tier's columns, and shown among the rows of
results/leaderboard.json.

--html writes a page that needs no server, from --read. Data are read from
--data_dir or TFDS_DATA_DIR.

Exit codes: 0; 1 if a cell is missing or failed; 2 for flags that cannot be; 130
for Ctrl-C.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys

# Compiling takes longer than training small models: most of LLVM's optimisation
# is left out in runs; steps that are timed have it (`leaderboard._COMPILED`).
_XLA_FLAGS = '--xla_backend_optimization_level=1'
if __name__ == '__main__':
  os.environ['XLA_FLAGS'] = f'{_XLA_FLAGS} {os.environ.get("XLA_FLAGS", "")}'

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import flags
from absl import logging
from bpjax import paths
from bpjax.train.folder import summary as summary_lib
from experiments import leaderboard
from experiments import leaderboard_page
from experiments import measurement
import jax

_READ = 'results/leaderboard.json'
# A test imports this file beside programs with flags of the same names.
_VALUES = flags.FLAGS if __name__ == '__main__' else flags.FlagValues()
_define = lambda make, *a: make(*a, flag_values=_VALUES)
_TIER = _define(flags.DEFINE_string, 'tier', 'minute', (
    f'One of {", ".join(leaderboard.TIERS)}.'))
_COLUMNS = _define(flags.DEFINE_list, 'columns', [], "Default: the tier's.")
_RULES = _define(flags.DEFINE_list, 'rules', [], (
    "Rows; default: the tier's. 'frozen' is the control."))
_RULE = _define(flags.DEFINE_multi_string, 'rule', [], (
    'FILE.py:FUNCTION, a rule of your own; the file is run as code.'))
_JOBS = _define(flags.DEFINE_integer, 'jobs', 1, 'Processes that share the cells.', 1)
_SEEDS = _define(flags.DEFINE_integer, 'seeds', 0, "Default: the tier's.", 0)
_WORKDIR = _define(flags.DEFINE_string, 'workdir', '', (
    "Folder of the runs' folders; default runs/leaderboard_TIER."))
_DATA_DIR = _define(flags.DEFINE_string, 'data_dir', '', 'Default: TFDS_DATA_DIR.')
_TRAIN = _define(flags.DEFINE_boolean, 'train', True, (
    '--notrain: only collect what is finished.'))
_CHECK = _define(flags.DEFINE_boolean, 'check', False, (
    'Train nothing, but ask the rules of cells that were not run whether they '
    'refuse them.'))
_OUTPUT = _define(flags.DEFINE_string, 'output', '', (
    'JSON file for the results; cells that it has and that are not run here '
    'stay in it.'))
_READ_FLAG = _define(flags.DEFINE_string, 'read', _READ, (
    'Results that the page shows, and that a rule of your own is shown among.'))
_HTML = _define(flags.DEFINE_string, 'html', '', (
    'Write the page of --read to this file; nothing is trained.'))
_CELLS = _define(flags.DEFINE_list, 'cells', [], (
    'COLUMN:ROW, of one of the --jobs; for this script itself.'))


def read(path: str) -> dict | None:
  """A file of results, or None where there is none."""
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except FileNotFoundError:
    return None


def write(path: str, settings: leaderboard.Settings, cells, runs) -> None:
  """Writes results, one line a cell and a run; others of the file stay."""
  held = read(path)
  commands = dict((held or {}).get('commands', {}))
  commands[settings.tier] = command()
  content = leaderboard.merged(held, cells, runs)
  commands = {t: commands[t] for t in leaderboard.TIERS if t in commands}
  head = {
      'command': '; '.join(commands.values()), 'commands': commands,
      'machine': measurement.machine(),
      'date': datetime.date.today().isoformat(),
      'versions': summary_lib.versions()}
  text = json.dumps(head, indent=1)[:-2]
  for name in ('cells', 'runs'):
    lines = ',\n'.join(
        f'  {json.dumps(e, allow_nan=False)}' for e in content[name])
    text += f',\n "{name}": [\n{lines}\n ]'
  with open(f'{path}.new', 'w', encoding='utf-8') as file:
    file.write(text + '\n}\n')
  os.replace(f'{path}.new', path)
  print(f'wrote {path}: {len(content["cells"])} cells, '
        f'{len(content["runs"])} runs')


def command() -> str:
  """What was asked for, without the places of this machine."""
  kept = [a for a in sys.argv[1:] if not a.lstrip('-').startswith(
      ('workdir', 'data_dir', 'output', 'notrain', 'read', 'check'))]
  return ' '.join(['python scripts/leaderboard.py', *kept])


def _settings():
  """What was asked for; exits with 2 and one sentence if it cannot be."""
  name = _TIER.value
  if name not in leaderboard.TIERS:
    raise measurement.FlagError(
        f'`tier` must be one of {", ".join(leaderboard.TIERS)}, got {name!r}.')
  tier = leaderboard.TIERS[name]
  leaderboard.register()
  known = leaderboard.rows()
  own = []
  for text in _RULE.value:
    try:
      row, rule = leaderboard.outside(text)
    except ValueError as error:
      raise measurement.FlagError(str(error)) from error
    known[row] = rule
    own.append(row)
  for flag, given, names in (
      ('columns', _COLUMNS.value, list(tier.columns)),
      ('rules', _RULES.value, list(known))):
    for value in given:
      if value not in names:
        raise measurement.FlagError(
            f'`{flag}` has no {value!r} in the tier {name}; '
            f'{paths.nearest(value, names)}.')
  chosen = _RULES.value or ([] if own else list(tier.rows or known))
  if own:
    chosen = ['backprop', leaderboard.FROZEN, *chosen, *own]
  cells = [
      (column, row) for column in _COLUMNS.value or tier.columns
      for row in dict.fromkeys(chosen)]
  if _CELLS.value:
    wanted = {tuple(c.split(':', 1)) for c in _CELLS.value}
    cells = [c for c in cells if c in wanted]
  settings = leaderboard.Settings(
      name, _WORKDIR.value or os.path.join('runs', f'leaderboard_{name}'),
      known, _SEEDS.value, _DATA_DIR.value, _TRAIN.value and not _CHECK.value,
      _CHECK.value)
  return settings, cells, own


def _run_all(settings, cells):
  """Every cell, in this process."""
  found, runs = [], []
  for i, (column, row) in enumerate(cells):
    print(f'[{i + 1}/{len(cells)}] {column}, {row}', file=sys.stderr,
          flush=True)
    own, records = leaderboard.cell(settings, column, row)
    found.append(own)
    runs += records
    accuracies = [100 * r['test_accuracy'] for r in records]
    text = ' '.join(f'{a:.2f}' for a in accuracies) or own['reason']
    print(f'{column}, {row}: {own["status"]}: {text}', flush=True)
    jax.clear_caches()  # None of its programs runs again.
  return found, runs


def _share(cells, jobs):
  """Starts a process for each share of the cells; waits for all of them."""
  workers = []
  for i in range(min(jobs, len(cells))):
    share = ','.join(f'{column}:{row}' for column, row in cells[i::jobs])
    arguments = [a for a in sys.argv[1:] if not a.lstrip('-').startswith(
        ('jobs', 'output', 'html'))]
    workers.append(subprocess.Popen(
        [sys.executable, __file__, *arguments, f'--cells={share}']))
  try:
    codes = [w.wait() for w in workers]
  except KeyboardInterrupt:
    for worker in workers:
      worker.wait()  # They have heard it as well.
    raise
  for code in codes:
    if code not in (0, 1):
      print(f'a process ended with {code}; the same command goes on',
            file=sys.stderr)


def show(results: dict, tier: str) -> None:
  """Prints the columns of a tier."""
  for column in leaderboard.TIERS[tier].columns:
    entries = leaderboard.table(results, tier, column)
    if not entries:
      continue
    shown = measurement.table(
        f'{leaderboard.COLUMNS[column].title}, tier {tier}', 'row',
        'test accuracy, %', 'n', 'p, row below', 'against frozen, p',
        'time', 'memory', 'alignment (floor)', 'verdict')
    for own in entries:
      shown.add_row(own['row'], *leaderboard_page.numbers(own))
    measurement.show(shown, 160)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries.
  try:
    if _HTML.value:
      results = read(_READ_FLAG.value)
      if results is None:
        raise measurement.FlagError(
            f'`read` must be a file of results, and {_READ_FLAG.value!r} is '
            'not there; write one with --output.')
      with open(_HTML.value, 'w', encoding='utf-8') as file:
        file.write(leaderboard_page.html(results))
      print(f'wrote {_HTML.value}')
      return
    settings, cells, own = _settings()
  except measurement.FlagError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  os.makedirs(settings.workdir, exist_ok=True)
  for name, value in (
      ('jax_compilation_cache_dir', os.path.join(settings.workdir, 'programs')),
      ('jax_persistent_cache_min_compile_time_secs', 0.),
      ('jax_persistent_cache_min_entry_size_bytes', -1)):
    jax.config.update(name, value)  # Many programs of a cell are the same.
  try:
    if _JOBS.value > 1 and settings.train and not _CELLS.value:
      _share(cells, _JOBS.value)
      settings = settings._replace(train=False)
    found, runs = _run_all(settings, cells)
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    sys.exit(130)
  if _CELLS.value:
    return
  if _OUTPUT.value:
    write(_OUTPUT.value, settings, found, runs)
  results = leaderboard.merged(
      read(_READ_FLAG.value) if own else None, found, runs)
  show(results, settings.tier)
  missing = [c for c in found if c['status'] in ('missing', 'failed')]
  for entry in missing:
    print(f'missing: {entry["column"]}, {entry["row"]}: {entry["reason"]}')
  sys.exit(1 if missing else 0)


if __name__ == '__main__':
  measurement.run(main)
