"""Writes the pages of results from results/*.json.

  python scripts/report.py [--check]

Every file of `docs/results/templates` becomes a page of the same name in
`docs/results`: its prose, with each `<<name arguments>>` replaced by what the
function of that name makes of a results file. In other pages (README.md and
those of docs/) what stands between `<!-- report: name arguments -->` and
`<!-- end -->` is written anew.

With --check nothing is written: the exit code is 1 where a page is not what its
results make of it, and each such page is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import difflib
import functools
import importlib
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
from typing import Any

from bpjax.train.folder import streams
from experiments import cards as cards_lib
from experiments import leaderboard as leaderboard_lib
from experiments import leaderboard_page
from experiments import reproduction

ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = 'docs/results'
_TEMPLATES = 'docs/results/templates'
_REGION = re.compile(r'(<!-- report: (.+?) -->\n).*?(<!-- end -->)', re.S)
_DIRECTIVE = re.compile(r'<<(.+?)>>')
_NAMED = 8  # Most rows that are said not to have run by name.
_NOTICE = (
    '<!-- Written by scripts/report.py from results/*.json and {}; change '
    'these. -->\n\n')


@functools.cache
def read(name: str) -> dict[str, Any]:
  """The results file `results/NAME.json`."""
  with open(ROOT / 'results' / f'{name}.json', encoding='utf-8') as file:
    return json.load(file)


@functools.cache
def _experiment(script: str) -> reproduction.Experiment:
  return importlib.import_module(f'scripts.{script}').EXPERIMENT


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def _number(
    number: reproduction.Number | None, digits: int, unit: str = '') -> str:
  if number is None:
    return ''
  spread = '' if number.std is None else f' ± {number.std:.{digits}f}'
  n = '' if number.n is None else f' (n={number.n})'
  return f'{number.mean:.{digits}f}{spread}{unit}{n}'


# What a page may ask for. Each function takes texts and returns Markdown.


def reproduction_table(
    script: str, preset: str = '', file: str = '') -> str:
  """A paper's table: ours, and the paper's numbers in the columns beside."""
  experiment, runs = _experiment(script), read(file or script)['runs']
  results = reproduction.Results(
      experiment.columns, [r for r in runs if r['preset'] == preset])
  rows = [r for r in experiment.rows if r.preset == preset]
  columns = [
      c for c in experiment.columns
      if any(results.number(r.label, c.name) for r in rows)]
  paper = [c for c in columns if any(c.name in r.published for r in rows)]
  lines, missing = [], []
  for row in rows:
    ours = [results.number(row.label, c.name) for c in columns]
    if not any(ours):
      missing.append(f'`{row.name}`')
      continue
    lines.append([
        f'`{row.name}`',
        *(_number(n, c.digits) for n, c in zip(ours, columns)),
        *(_number(row.published.get(c.name), c.digits) for c in paper)])
  table = _table(
      ['row', *(c.name for c in columns),
       *(f'paper: {c.name}' for c in paper)], lines)
  if len(missing) > _NAMED:
    return f'{table}\n\nNot run: {len(missing)} other rows.'
  return table + (
      f'\n\nNot run: {", ".join(missing)}.' if missing else '')


def _judged(script, file):
  """Text, number and bounds of every check, and whether it holds."""
  experiment, runs = _experiment(script), read(file or script)['runs']
  results = reproduction.Results(experiment.columns, runs)
  for preset in dict.fromkeys(run['preset'] for run in runs):
    for check in experiment.checks(preset):
      excuse = check.excused(results)
      if excuse and excuse != reproduction.NOT_ASKED:
        yield check, None, excuse
      if excuse:
        continue
      try:
        value = check.measure(results)
      except reproduction.MissingError:
        yield check, None, None
      else:
        yield check, value, check.low < value < check.high


def checks(script: str, file: str = '') -> str:
  """What must hold of a paper's table, and whether it does."""
  lines = []
  for check, value, holds in _judged(script, file):
    low = '' if check.low == -math.inf else f'above {check.low:.4g}'
    high = '' if check.high == math.inf else f'below {check.high:.4g}'
    lines.append([
        check.text.replace('_', r'\_'),
        ', '.join(filter(None, (low, high))),
        ('not judged' if holds else 'not run') if value is None
        else f'{value:.4g}',
        (holds or '') if value is None else 'holds' if holds
        else '**outside**'])
  return _table(['must hold', 'bound', 'here', ''], lines)


def verdict(script: str, file: str = '') -> str:
  """How many of the checks hold, in a few words."""
  holds = [h for _, _, h in _judged(script, file)]
  missing = holds.count(None)
  excused = sum(isinstance(h, str) for h in holds)
  text = f'{holds.count(True)} of {len(holds)} checks hold'
  text += f', {missing} not run' if missing else ''
  return text + (f', {excused} not judged' if excused else '')


def verdicts() -> str:
  """The verdict on every results file of a paper's table."""
  lines = []
  for path in sorted((ROOT / 'results').glob('*.json')):
    scripts = [
        s.stem for s in (ROOT / 'scripts').glob('*.py')
        if f'scripts/{s.name} ' in read(path.stem)['command'] + ' '
        and 'EXPERIMENT =' in s.read_text(encoding='utf-8')]
    if scripts:
      title = _experiment(scripts[0]).title
      lines.append([f'`{path.stem}`', title, verdict(scripts[0], path.stem)])
  return _table(['results', 'table', 'verdict'], lines)


def found(script: str, file: str = '') -> str:
  """What the script reports besides its table."""
  experiment, runs = _experiment(script), read(file or script)['runs']
  results = reproduction.Results(experiment.columns, runs)
  presets = dict.fromkeys(run['preset'] for run in runs)
  return '\n'.join(
      f'- {line}' for p in presets for line in experiment.report(results, p))


def evidence(file: str, kind: str, searched: str) -> str:
  """Where the numbers of a results file come from.

  Args:
    file: its name.
    kind: 'protocol' (the paper's, or the full one here) or 'trial'.
    searched: what was searched on what, in words.
  """
  if kind not in ('protocol', 'trial'):
    raise ValueError(f'`kind` must be protocol or trial, got {kind!r}.')
  held = read(file)
  runs = held.get('runs', [])
  lines = {'kind': kind, 'command': f'`{held["command"]}`'}
  seeds = sorted({r['seed'] for r in runs if 'seed' in r})
  if seeds:
    lines['seeds'] = f'{seeds[0]} alone, so that the spread is not known'
    if len(seeds) > 1:
      lines['seeds'] = (
          f'{", ".join(map(str, seeds))}; n is how many a row has; ± is the '
          'standard deviation over them (n - 1)')
  else:
    rounds = held.get('rounds')
    lines['spread'] = (
        f'median of {rounds} rounds, interleaved in one process; spread not '
        'recorded' if rounds else
        'standard errors in the table, where there are any')
  epochs = sorted({
      r['epochs'] for r in runs if isinstance(r.get('epochs'), int)})  # No curves.
  if epochs or 'epochs' in held:
    lines['epochs'] = ', '.join(map(str, epochs or [held['epochs']]))
  sources = sorted({r['data_source'] for r in runs if 'data_source' in r})
  if sources:
    lines['data'] = '; '.join(sources)
  times = [r['wall_time'] for r in runs if r.get('wall_time')]
  if times:
    lines['time'] = f'{min(times):.0f} to {max(times):.0f} s a run'
  kinds = sorted({r['device_kind'] for r in runs if 'device_kind' in r})
  lines['machine'] = held.get('machine') or (
      f'{", ".join(kinds)}; the model was not recorded' if kinds
      else 'not recorded')
  commits = list(dict.fromkeys(
      r['git_commit'][:9] for r in runs if r.get('git_commit')))
  if commits:
    lines['code'] = f'commit {", ".join(commits)}'
  versions = held.get('versions', {k: held[k] for k in ('jax',) if k in held})
  if versions:
    lines['versions'] = ', '.join(
        f'{name} {versions[name]}'
        for name in ('python', 'jax', 'flax', 'optax') if name in versions)
  lines['date'] = held.get('date', 'not recorded')
  lines['searched'] = searched
  return _table(['evidence', ''], lines.items())


def sweep(*files: str) -> str:
  """Sweeps of `experiments.sweep`: a row a point of their grids."""
  rows = []
  for file in files:
    for point in read(file)['points']:
      name = ', '.join(point['point'].values()) or file
      cells = [
          (_percent(point['test_accuracy']), _percent(point['train_accuracy']),
           _spread(point['alignment'], 3))]
      rows.append([f'`{name}`', *cells[0]])
  return _table(
      ['row', 'test accuracy, %', 'train accuracy, %',
       'alignment, mean of hidden layers'], rows)


def _spread(value, digits, scale=1.):
  if value['mean'] is None:
    return ''
  return _number(reproduction.Number(
      scale * value['mean'], scale * value['std'], value['n']), digits)


def _percent(value):
  return _spread(value, 2, 100.)


def rows(file: str, path: str, *columns: str) -> str:
  """A list of records as a table; a column may be `key:format`."""
  keys = [c.partition(':')[::2] for c in columns]
  return _table(
      [key.replace('_', ' ') for key, _ in keys],
      [[_format(record[key], form) for key, form in keys]
       for record in _at(read(file), path)])


def number(file: str, path: str, form: str = '', scale: str = '1') -> str:
  """One number. `path` is made of keys and indices, split at `/`."""
  value = _at(read(file), path)
  return format(value * float(scale) if scale != '1' else value, form)


def mean(
    script: str, label: str, column: str, file: str = '', unit: str = ''
) -> str:
  """One number of a paper's table, with its spread and n."""
  experiment = _experiment(script)
  results = reproduction.Results(
      experiment.columns, read(file or script)['runs'])
  found_number = results.number(label, column)
  if found_number is None:
    raise ValueError(f'no run of {label!r} has {column!r}.')
  digits = next(c.digits for c in experiment.columns if c.name == column)
  return _number(found_number, digits, unit)


def _at(value, path):
  for key in path.split('/'):
    if isinstance(value, list) and '=' in key:
      name, _, wanted = key.partition('=')
      value = next(v for v in value if str(v[name]) == wanted)
    else:
      value = value[int(key) if isinstance(value, list) else key]
  return value


def _format(value, form):
  if value is None:
    return ''
  return format(value, form) if form else str(value)


def step_times(*files: str) -> str:
  """Ratios of step times, and temporaries: a column a workload of each file."""
  names, columns = [], {}
  for file in files:
    for workload, records in read(file)['workloads'].items():
      label = f'{workload.upper()}, `{file}`' if len(files) > 1 else workload
      columns[label] = {r['rule']: r for r in records}
      names += [r['rule'] for r in records]

  def cell(record):
    if record is None:
      return ''
    text = f'{record["ratio"]:.2f} ({record["milliseconds"]:.2f} ms'
    memory = record.get('temporaries_mib')
    return text + (')' if memory is None else f', {memory:.2f} MiB)')

  return _table(
      ['rule', *columns],
      [[f'`{name}`', *(cell(c.get(name)) for c in columns.values())]
       for name in dict.fromkeys(names)])


def accelerator_times(file: str) -> str:
  """Step times on an accelerator, or one sentence that there are none."""
  held = read(file)
  if not held['step_times']:
    return ('No accelerator was at hand: the step times that this script takes on a '
            'GPU, in float32 and bfloat16, are not known yet.')
  return f'Step times on {held["accelerator"]}:\n\n' + rows(
      file, 'step_times', 'workload', 'rule', 'dtype', 'gflop:.2f',
      'milliseconds:.3f', 'ratio:.2f', 'of_peak:.1%')


def compile_times(file: str) -> str:
  """Seconds of tracing, lowering, compiling and drawing feedback."""
  parts = ('trace', 'lower', 'compile', 'init')
  return _table(
      ['workload', 'rule', *(f'{p}, s' for p in parts), 'ratio'],
      [[workload, f'`{rule}`', *(f'{v[p]:.2f}' for p in parts),
        f'{v["ratio"]:.2f}']
       for workload, rules in read(file)['workloads'].items()
       for rule, v in rules.items()])


def search(file: str) -> str:
  """Candidates of a search: validation accuracies, and which was chosen."""
  held = read(file)
  lines = []
  for row, found_row in held['rows'].items():
    candidates = found_row.get('candidates', held.get('candidates'))
    full = found_row.get('in_full', {})
    for i, candidate in enumerate(candidates):
      text = candidate if not isinstance(candidate, dict) else ', '.join(
          f'{k} {v}' for k, v in candidate.items() if v or k == 'weight_decay')
      lines.append([
          f'`{row}`', text, f'{found_row["validation_accuracy"][i]:.4f}',
          _format(full.get(str(i)), '.4f'),
          'chosen' if i == found_row['best'] else ''])
  return _table(
      ['row', 'candidate', f'validation accuracy, {held["epochs"]} epochs',
       'in full', ''], lines)


def zoo_summary(file: str = 'model_zoo') -> str:
  """How many architectures each rule trains, and how many it refuses."""
  held = read(file)['outcomes']
  rules = dict.fromkeys(rule for row in held.values() for rule in row)
  return _table(
      ['rule', 'works', 'refused', 'fails'],
      [[f'`{rule}`', *(
          sum(row.get(rule, '').startswith(kind) for row in held.values())
          for kind in ('works', 'refused', 'fails'))] for rule in rules])


def zoo(file: str = 'model_zoo') -> str:
  """Every architecture with the rules that refuse it."""
  return _table(
      ['architecture', 'works', 'refused by'],
      [[f'`{model}`', sum(o == 'works' for o in row.values()),
        ', '.join(f'`{r}`' for r, o in row.items() if o != 'works')]
       for model, row in read(file)['outcomes'].items()])


def reasons(file: str = 'model_zoo') -> str:
  """The sentences of refusals, and how often each was given."""
  held = read(file)
  return _table(['refused with', 'times'], [
      [sentence.replace('|', r'\|').replace('`_`', '…'), times]
      for kind in ('refused_by_the_mathematics', 'refused_otherwise')
      for sentence, times in held[kind].items()])


def headline_results() -> str:
  """The README's table: one line of each kind of result."""
  points = {', '.join(p['point'].values()): p['test_accuracy']
            for p in read('mnist_mlp')['points']}
  page = lambda name: f'[page]({_PAGES}/{name}.md)'
  mnist = lambda rule: (
      f'{_spread(points[rule], 2, 100.).partition(" (")[0]}%')
  lra = lambda row: mean(
      'reclra_table1', f'mnist,{row}', 'test error, %', unit='%')
  mixer = lambda row: mean(
      'local_fg_table3', f'mnist_m,{row}', 'test error, %', unit='%')
  angle = lambda row: mean('akrout_mnist', row, 'output angle', unit='°')
  recall = lambda row, file='transformer_recall_8': mean(
      'transformer_depth', f'recall,{row}_2', 'test accuracy, %', file,
      unit='%').partition(' (')[0]
  lists = lambda row: mean(
      'transformer_depth', f'listops,{row}_2', 'test accuracy, %',
      'transformer_listops_12', unit='%').partition(' (')[0]
  ratio = number(
      'step_time', 'workloads/w2/rule=direct_feedback_alignment/ratio', '.2f')
  return _table(['what', 'result', 'evidence'], [
      ['MNIST, 784-256-256-10, 5 epochs: test accuracy, three seeds',
       f'backprop {mnist("backprop")}, Kolen-Pollack {mnist("kolen_pollack")}, '
       f'direct feedback {mnist("direct_feedback_alignment")}, '
       f'forward gradient {mnist("forward_gradient")}', page('mnist')],
      ['Weight mirror, MNIST, 400 epochs: angle of weights and feedback',
       f'{angle("weight_mirror")}; feedback alignment '
       f'{angle("feedback_alignment")}', page('akrout_2019')],
      ['Recursive LRA, MNIST, five layers, 30 epochs: test error',
       f'{lra("recursive_tanh")}; backprop {lra("backprop")}',
       page('ororbia_2023')],
      ['Forward gradient, LocalMixer M/1/16, MNIST: test error',
       f'with local losses {mixer("LG-FG-A")}, without {mixer("FG-A")}',
       page('ren_2023')],
      ['Associative recall, two transformer blocks, 3 epochs: test '
       'accuracy, three seeds',
       f'backprop {recall("backprop")}, sign symmetry {recall("usf")}, weight '
       f'mirror {recall("weight_mirror")}; frozen blocks {recall("frozen")}, '
       f'Kolen-Pollack {recall("kolen_pollack")}, feedback alignment '
       f'{recall("feedback_alignment")}, direct feedback '
       f'{recall("dfa_macro")}, LRA {recall("lra")}; in 9 epochs frozen blocks '
       f'{recall("frozen", "transformer_recall")}',
       page('transformers')],
      ['ListOps, two blocks, 12 epochs: test accuracy, one seed',
       f'backprop {lists("backprop")}, Kolen-Pollack '
       f'{lists("kolen_pollack")}, weight mirror {lists("weight_mirror")}, '
       f'sign symmetry {lists("usf")}; frozen blocks {lists("frozen")}, direct '
       f'feedback {lists("dfa_macro")}, feedback alignment '
       f'{lists("feedback_alignment")}, LRA {lists("lra")}',
       page('transformers')],
      ['A step of direct feedback, 3072-800x3-10, one core',
       f'{ratio} of the time of plain JAX backprop', page('speed')]])


def claims(file: str) -> str:
  """The claims of a results file: bound, value, and whether it holds."""
  return _table(['claim', 'what', 'bound', 'value', 'holds'], [
      [str(c['claim']), c['text'].replace('|', '\\|'), c['bound'],
       f'{c["value"]:.4g}' if isinstance(c['value'], float) else str(c['value']),
       'yes' if c['holds'] else 'no']
      for c in read(file)['claims']])


def averages(file: str, *columns: str) -> str:
  """Rows of averaged networks: mean ± standard error over repetitions."""
  def cell(seeds, column):
    values = [s[column] for s in seeds if s.get(column) is not None]
    if len(values) < 2:
      return '-'
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f'{statistics.mean(values):.2f} ± {error:.2f}'

  return _table(['row', *(c.replace('_', ' ') for c in columns)], [
      [r['row'], *(cell(r['seeds'], c) for c in columns)]
      for r in read(file)['rows']])


def leaderboard(file: str = 'leaderboard') -> str:
  """Every column that has runs, at its largest tier; a row leads to its record."""
  held, parts = read(file), []
  for column, what in leaderboard_lib.COLUMNS.items():
    for tier in leaderboard_lib.tiers_of(held, column)[:1]:
      lines = []
      for own in leaderboard_lib.table(held, tier, column):
        link = f'results/{file}.md#{leaderboard_page.anchor(own)}'
        texts = leaderboard_page.numbers(own)
        lines.append([f'`{own["row"]}`', *(
            f'[{t}]({link})' if t and not i else t.replace('|', r'\|')
            for i, t in enumerate(texts))])
      parts.append(
          f'### {what.title}\n\nTier `{tier}`.\n\n'
          + _table(leaderboard_page.HEADER, lines))
  return '\n\n'.join(parts)


def leaderboard_records(file: str = 'leaderboard') -> str:
  """What every cell was made from, a heading each."""
  return '\n\n'.join(
      f'### {own["tier"]} {own["column"]} {own["row"]}\n\n'
      + '\n'.join(f'- {part}' for part in leaderboard_page.record(own).split('; '))
      for own in leaderboard_page.entries(read(file)))


def leaderboard_commands(file: str = 'leaderboard') -> str:
  """The command of each tier."""
  return _table(['tier', 'command'], [
      [tier, f'`{text}`'] for tier, text in read(file)['commands'].items()])


def leaderboard_missing(file: str = 'leaderboard') -> str:
  """The cells of each tier that were not run yet."""
  lines = []
  for tier in leaderboard_lib.TIERS:
    columns = {}
    for column, row in leaderboard_lib.missing(read(file), tier):
      columns.setdefault(column, []).append(row)
    whole = len(leaderboard_lib.TIERS[tier].rows or leaderboard_lib.rows())
    for column, rows_left in columns.items():
      text = 'every row' if len(rows_left) == whole else ', '.join(
          f'`{row}`' for row in rows_left)
      lines.append([tier, f'`{column}`', text])
  return _table(['tier', 'column', 'not run yet'], lines) if lines else (
      'Nothing is missing.')


def leaderboard_published() -> str:
  """Papers' numbers, and how what they were measured on differs."""
  return _table(['column', 'row', 'accuracy, %', 'source', 'differs'], [
      [f'`{column}`', f'`{row}`', f'{p.accuracy:.2f}', p.source, p.differs]
      for column, what in leaderboard_lib.COLUMNS.items()
      for row, p in what.published.items()])


def leaderboard_cards() -> str:
  """The identity cards of rules."""
  return _table(['rule', *cards_lib.Card._fields], [
      [f'`{name}`', *card] for name, card in cards_lib.CARDS.items()])


FUNCTIONS: dict[str, Callable[..., str]] = {
    'accelerator_times': accelerator_times,
    'averages': averages,
    'checks': checks,
    'claims': claims,
    'compile_times': compile_times,
    'evidence': evidence,
    'found': found,
    'leaderboard': leaderboard,
    'leaderboard_cards': leaderboard_cards,
    'leaderboard_commands': leaderboard_commands,
    'leaderboard_missing': leaderboard_missing,
    'leaderboard_published': leaderboard_published,
    'leaderboard_records': leaderboard_records,
    'mean': mean,
    'number': number,
    'reasons': reasons,
    'reproduction': reproduction_table,
    'rows': rows,
    'search': search,
    'headline_results': headline_results,
    'step_times': step_times,
    'sweep': sweep,
    'verdict': verdict,
    'verdicts': verdicts,
    'zoo': zoo,
    'zoo_summary': zoo_summary,
}


def make(directive: str) -> str:
  """The Markdown of `name arguments`.

  Raises:
    ValueError: for a name that is not one of `FUNCTIONS`, or arguments that the
      results do not have.
  """
  name, *arguments = shlex.split(directive)
  if name not in FUNCTIONS:
    raise ValueError(
        f'`{name}` makes nothing; choose one of {", ".join(FUNCTIONS)}.')
  try:
    return FUNCTIONS[name](*arguments)
  except (KeyError, IndexError, StopIteration, TypeError) as error:
    raise ValueError(f'`{directive}` cannot be made: {error!r}.') from error


def pages() -> dict[pathlib.Path, str]:
  """Every page that holds results, and what it has to say."""
  made = {}
  for template in sorted((ROOT / _TEMPLATES).glob('*.md')):
    text = _DIRECTIVE.sub(
        lambda m: make(' '.join(m[1].split())),
        template.read_text(encoding='utf-8'))
    notice = _NOTICE.format(template.relative_to(ROOT).as_posix())
    made[ROOT / _PAGES / template.name] = notice + text
  for page in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))):
    text = page.read_text(encoding='utf-8')
    if _REGION.search(text):
      made[page] = _REGION.sub(
          lambda m: f'{m[1]}{make(m[2])}\n{m[3]}', text)
  return made


def main(arguments: Sequence[str]) -> int:
  """Writes or checks the pages; returns the exit code."""
  if set(arguments) - {'--check'}:
    print(f'error: unknown argument {arguments[0]!r}; only --check is known.',
          file=sys.stderr)
    return 2
  code = 0
  for path, text in pages().items():
    held = path.read_text(encoding='utf-8') if path.exists() else ''
    if held == text:
      continue
    name = path.relative_to(ROOT)
    if arguments:
      code = 1
      print(f'error: {name} is not what its results make of it; run `python '
            'scripts/report.py`:', file=sys.stderr)
      print('\n'.join(list(difflib.unified_diff(
          held.splitlines(), text.splitlines(), 'page', 'results', n=0,
          lineterm=''))[:12]), file=sys.stderr)
    else:
      path.write_text(text, encoding='utf-8')
      print(f'wrote {name}')
  return code


if __name__ == '__main__':
  streams.guarded(lambda: sys.exit(main(sys.argv[1:])))
