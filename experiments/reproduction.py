"""A published table trained anew: what the reproduction scripts share.

A script describes its table as an `Experiment` and hands it to `main`. Every
row is trained with every seed in a folder of its own, `PRESET,ROW,seed=SEED`
(without PRESET where a table has none); a finished run is not trained again, an
interrupted one goes on. Two processes can share the work in one folder, each
with some of the rows. Then come the table, ours above the paper's, and one line
for each thing that must hold.

Exit codes: 0 if everything holds; 1 if anything does not, or cannot be said
because a row is not finished or SIGTERM stopped the training; 2 for flags or a
config that cannot be; 130 for Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import math
import os
import re
import statistics
import sys
from typing import Any, NamedTuple

from absl import flags
from absl import logging
from bpjax import paths
from bpjax.train import config as config_lib
from bpjax.train.folder import streams
from bpjax.train.folder import summary as summary_lib
from bpjax.train.folder import workdir as workdir_lib
from experiments import config as flags_lib
from experiments import jobs as jobs_lib
from experiments import measurement
import matplotlib
import ml_collections
import rich.console
import rich.table

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

NOT_ASKED = 'no run is of its kind'  # Why a check is left out altogether.
Record = dict[str, Any]  # One run, as the results file holds it.
_COPIED = (
    'rule', 'epochs', 'steps', 'test_accuracy', 'train_accuracy',
    'median_step_time', 'wall_time', 'device_kind', 'git_commit')
_CURVES = ('teaching', 'weight')


class Number(NamedTuple):
  """A number of a table.

  Attributes:
    mean: over seeds.
    std: over seeds, divided by n - 1; None for one seed, or if not known.
    n: the number of seeds; None if not known.
  """
  mean: float
  std: float | None = None
  n: int | None = None


class Row(NamedTuple):
  """A row of a table.

  Attributes:
    name: of the row, part of its runs' folders.
    config: of its runs, but for the seed.
    published: header of a column -> the paper's number.
    preset: where a table is made several times, with other settings, which.
  """
  name: str
  config: ml_collections.ConfigDict
  published: Mapping[str, Number]
  preset: str = ''

  @property
  def label(self) -> str:
    """The preset, if any, and the name."""
    return ','.join(filter(None, (self.preset, self.name)))


class Column(NamedTuple):
  """A column of a table.

  Attributes:
    name: its header.
    value: a run's record -> its number, or None where the run has none.
    digits: after the point.
  """
  name: str
  value: Callable[[Record], float | None]
  digits: int = 2


class MissingError(Exception):
  """A row that a check needs has no finished run."""


class Results:
  """The finished runs, and the numbers that a table makes from them."""

  def __init__(self, columns: Sequence[Column], runs: Sequence[Record]):
    self.runs = list(runs)
    self._columns = {column.name: column for column in columns}

  def of(self, label: str) -> list[Record]:
    """The runs of a row, one a seed."""
    return [run for run in self.runs if run['row'] == label]

  def number(self, label: str, column: str) -> Number | None:
    """Mean and deviation over seeds; None if no run has that number."""
    found = map(self._columns[column].value, self.of(label))
    values = [v for v in found if v is not None]
    if not values:
      return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Number(statistics.fmean(values), std, len(values))

  def mean(self, label: str, column: str) -> float:
    """The mean over seeds.

    Raises:
      MissingError: if no run has that number.
    """
    number = self.number(label, column)
    if number is None:
      raise MissingError(f'row {label} has no finished run with {column}')
    return number.mean


class Check(NamedTuple):
  """Something that must hold: a number strictly between two others.

  Attributes:
    text: what the number is.
    measure: the number; may raise MissingError.
    low: what it has to be above.
    high: what it has to be below.
    excused: why it is not judged with these results, or ''; with `NOT_ASKED` it
      is not spoken of.
  """
  text: str
  measure: Callable[[Results], float]
  low: float = -math.inf
  high: float = math.inf
  excused: Callable[[Results], str] = lambda results: ''


def between(label: str, column: str, low: float, high: float) -> Check:
  """The check that a number of one row lies between two others."""
  return Check(
      f'{label}: {column}', lambda results: results.mean(label, column), low,
      high)


def near(
    label: str, column: str, published: float, tolerance: float) -> Check:
  """The check that a number of one row is within a tolerance of another."""
  return between(label, column, published - tolerance, published + tolerance)


def difference(
    label: str, other: str, column: str, low: float = 0.,
    high: float = math.inf) -> Check:
  """The check that one row exceeds another, by `low` to `high`."""
  return Check(
      f'{label} minus {other}: {column}',
      lambda results: (
          results.mean(label, column) - results.mean(other, column)),
      low, high)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A table to reproduce.

  Attributes:
    name: of the script, and of its folder under `runs`.
    title: of the table.
    rows: of all presets.
    columns: of the table.
    checks: preset -> what must hold of its rows.
    presets: those that are made unless others are asked for.
    report: results and preset -> lines that are printed but not checked.
    draw: draws the results into a file.
    head: what a results file says of all runs.
  """
  name: str
  title: str
  rows: Sequence[Row]
  columns: Sequence[Column]
  checks: Callable[[str], Sequence[Check]]
  presets: Sequence[str] = ('',)
  report: Callable[[Results, str], Iterable[str]] = lambda results, preset: ()
  draw: Callable[[Results, str], None] | None = None
  head: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# What a script makes of its own flags: `(experiment, the flags here, its own) ->
# (experiment, the flags here)`, either of which may be changed.
Prepare = Callable[
    [Experiment, dict[str, Any], dict[str, Any]],
    tuple[Experiment, dict[str, Any]]]


class Run(NamedTuple):
  """A row with a seed.

  Attributes:
    row: the row.
    config: of this run.
    folder: of this run.
  """
  row: Row
  config: ml_collections.ConfigDict
  folder: str


def main(
    experiment: Experiment,
    more: Mapping[str, tuple[Callable[..., Any], Any, str]] | None = None,
    prepare: Prepare | None = None) -> None:
  """Runs a script: its flags, then `reproduce`; never returns.

  Args:
    experiment: the table.
    more: flags of the script's own: name -> what defines it, default, text.
    prepare: what it makes of them, before anything else; a ValueError ends the
      script with code 2.
  """
  # The flags are the script's, which lists them under --help; and defined here,
  # as another program that imports this module has its own of these names.
  flags.disclaim_key_flags()
  define = {
      'workdir': (flags.DEFINE_string, '', (
          f"Folder of the runs' folders; default runs/{experiment.name}.")),
      'seeds': (flags.DEFINE_list, [], 'Default: 0.'),
      'rows': (flags.DEFINE_list, [], 'The rows to train; default: all.'),
      'presets': (flags.DEFINE_list, [], (
          'Settings to train with; default: '
          f'{",".join(experiment.presets) or "there is one only"}.')),
      'epochs': (flags.DEFINE_integer, 0, (
          'In place of the full protocol, for a trial; 0: the protocol.')),
      'override': (flags.DEFINE_multi_string, [], (
          "FIELD=VALUE: changes every row's config, for a trial.")),
      'train': (flags.DEFINE_boolean, True, (
          '--notrain: only collect the runs that are finished.')),
      'jobs': (flags.DEFINE_integer, 1, 'Runs at a time.'),
      'output': (flags.DEFINE_string, '', 'JSON file to write the results to.'),
      'read': (flags.DEFINE_string, '', (
          'JSON file of results: print its table and checks, train nothing.')),
      'picture': (flags.DEFINE_string, '', (
          f"The plot; default {experiment.name}.png in the runs' folder.")),
  }
  more = more or {}
  for name, (kind, default, text) in (define | dict(more)).items():
    kind(name, default, text)

  def run(argv):
    del argv
    logging.set_verbosity(logging.ERROR)  # Of libraries.
    values = {name: flags.FLAGS[name].value for name in define}
    made = experiment
    if prepare:
      own = {name: flags.FLAGS[name].value for name in more}
      try:
        made, values = prepare(experiment, values, own)
      except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    sys.exit(reproduce(made, **values))

  measurement.run(run)


def reproduce(
    experiment: Experiment, *, workdir: str = '', seeds: Sequence[str] = (),
    rows: Sequence[str] = (), presets: Sequence[str] = (), epochs: int = 0,
    override: Sequence[str] = (), train: bool = True, jobs: int = 1,
    output: str = '',
    read: str = '', picture: str = '') -> int:
  """Trains what is missing, prints the table, and checks it.

  Args:
    experiment: the table.
    workdir: folder of the runs' folders; '': runs/NAME.
    seeds: as texts; none: 0.
    rows: names of the rows to train; none: all.
    presets: those to make; none: the experiment's own.
    epochs: in place of the configs'; 0: theirs.
    override: texts `FIELD=VALUE`, for every row's config.
    train: whether to train; else only what is finished is shown.
    jobs: how many runs are trained at a time.
    output: the JSON file to write, or ''.
    read: the JSON file to read in place of folders, or ''.
    picture: the plot; '': NAME.png in the runs' folder, none with `read`.

  Returns:
    The exit code.

  Example:
    >>> reproduce(experiment, read='results/akrout_mnist.json')
    0
  """
  try:
    jobs_lib.check(jobs)
    jobs_lib.check_device(jobs)
    if read:
      if workdir or seeds or rows or epochs or override or output:
        raise ValueError(
            '`read` shows a file as it is, and goes with --presets and '
            '--picture only; leave the other flags out.')
      runs = _read(experiment, read)
      presets = presets or list(dict.fromkeys(run['preset'] for run in runs))
      _check_names(experiment, rows, presets)
    else:
      presets = presets or experiment.presets
      _check_names(experiment, rows, presets)
      workdir = workdir or os.path.join('runs', experiment.name)
      picture = picture or os.path.join(workdir, f'{experiment.name}.png')
      wanted = _runs(
          experiment, workdir, seeds or ['0'], presets, epochs, override)
    for file in filter(None, (output, picture)):
      parent = os.path.dirname(file) or '.'
      if not os.path.isdir(parent) and parent != workdir:
        raise ValueError(
            f'{file!r} cannot be written: there is no folder {parent!r}; make '
            'it first.')
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if not read:
    if train:
      code = train_runs([
          run for run in wanted if not rows or run.row.name in rows], jobs)
      if code:
        return code
    runs = [r for r in map(record, wanted) if r is not None]
    if output:
      write(experiment, output, runs)
  results = Results(experiment.columns, [
      run for run in runs if run['preset'] in presets])
  holds = _show(experiment, results, presets)
  if experiment.draw and picture and results.runs:
    experiment.draw(results, picture)
    print(f'drew {picture}')
  return 0 if holds else 1


def _check_names(experiment, rows, presets):
  for kind, given, known in (
      ('rows', rows, [row.name for row in experiment.rows]),
      ('presets', presets, [row.preset for row in experiment.rows])):
    for name in given:
      if name not in known:
        choices = list(dict.fromkeys(filter(None, known)))
        raise ValueError(
            f'`{kind}` has no {name!r} in {experiment.name}; '
            + (f'{paths.nearest(name, choices)}.' if choices
               else f'leave --{kind} out.'))


def _runs(experiment, workdir, seeds, presets, epochs, override):
  """Every row with every seed; refused before any of them starts."""
  values = {}
  for text in override:
    field, equals, value = text.partition('=')
    if not field or not equals:
      raise ValueError(
          f'`override` must be FIELD=VALUE, got {text!r}; write for example '
          '--override=train_examples=1000.')
    values[field] = value
  if epochs < 0:
    raise ValueError(f'`epochs` must be at least 0, got {epochs}.')
  if epochs:
    values['epochs'] = str(epochs)
  runs = []
  for row in experiment.rows:
    if row.preset not in presets:
      continue
    for seed in dict.fromkeys(seeds):
      config = flags_lib.override(row.config, {**values, 'seed': seed})
      config_lib.check(config)
      folder = os.path.join(workdir, f'{row.label},seed={config.seed}')
      check_folder(folder, config)
      runs.append(Run(row, config, folder))
  return runs


def check_folder(folder: str, config: ml_collections.ConfigDict) -> None:
  """Raises ValueError if a folder's run has another config.

  Args:
    folder: of the run; it need not be there.
    config: that it is to have.
  """
  held = _read_json(os.path.join(folder, 'config.json'))
  if held is None:
    return
  # A field that is newer than the run was at its default.
  held = config_lib.to_json(config_lib.default()) | held
  text = config_lib.difference(held, config_lib.to_json(config))
  if text:
    raise ValueError(
        f'{folder!r} holds a run with another config: {text}; choose another '
        '`workdir`, or the same settings.')


def train_runs(runs: Sequence[Run], jobs: int = 1) -> int:
  """Trains what is not finished.

  Args:
    runs: those that are wanted.
    jobs: how many are trained at a time.

  Returns:
    The exit code if that cannot go on, else 0.

  Example:
    >>> train_runs([Run(row, config, 'runs/akrout_mnist/backprop,seed=0')])
    0
  """
  try:
    codes = jobs_lib.run_all([
        jobs_lib.Job(os.path.basename(run.folder), run.folder, run.config)
        for run in runs], jobs)
  except jobs_lib.Stopped as stopped:
    # 1: by SIGTERM, and nothing can be said of the table.
    return stopped.exit_code or 1
  # Code 3: this row came to no numbers, which the table shows.
  return 2 if 2 in codes else 0


def record(run: Run) -> Record | None:
  """What the results hold of a run; None if it is not finished.

  Args:
    run: the run.
  """
  summary = workdir_lib.read_summary(run.folder)
  if summary is None:
    return None
  lines = workdir_lib.read_metrics(run.folder)
  measured = [m for m in lines if m['split'] == 'alignment']
  scale = summary['epochs'] / summary['steps']
  config = config_lib.to_json(run.config)
  del config['data_dir']  # Says nothing of the run but where it was.
  return {
      'preset': run.row.preset, 'row': run.row.label, 'seed': run.config.seed,
      **{name: _rounded(summary[name], 6) for name in _COPIED},
      # What was read; where it was found is of no use to others.
      'data_source': re.sub(
          r'( decoded| streamed)? from [^/]*/.*', '', summary['data_source']),
      'test_accuracy_by_epoch': [
          _rounded(m['accuracy'], 4) for m in lines if m['split'] == 'test'],
      **_validation(lines),
      **_language(lines),
      'alignment': {
          unit: {
              kind: _rounded(value, 6)
              for kind, value in summary['alignment'][unit].items()}
          for unit in summary['units'] if unit in summary['alignment']},
      'alignment_epochs': [
          round(step * scale, 2)
          for step in dict.fromkeys(m['step'] for m in measured)],
      'alignment_curves': {
          unit: {
              kind: [
                  _rounded(m[kind], 4) for m in measured if m['unit'] == unit]
              for kind in _CURVES}
          for unit in summary['units'] if unit in summary['alignment']},
      'config': config,
  }


def _validation(lines):
  """Accuracies on held-out examples, where there are any."""
  found = [
      _rounded(m['accuracy'], 4) for m in lines if m['split'] == 'validation']
  return {'validation_accuracy_by_epoch': found} if found else {}


def _language(lines):
  """What is known of a language alone, by split and epoch."""
  found = {
      name: {
          split: [_rounded(m[name], 4) for m in lines
                  if m['split'] == split and name in m]
          for split in ('validation', 'test')}
      for name in ('bits_per_character', 'perplexity')}
  return {
      f'{name}_by_epoch': {k: v for k, v in splits.items() if v}
      for name, splits in found.items() if splits['test']}


def _rounded(value, digits):
  return round(value, digits) if isinstance(value, float) else value


def _read_json(path):
  try:
    with open(path, encoding='utf-8') as file:
      return streams.printable(json.load(file))
  except FileNotFoundError:
    return None


def write(experiment: Experiment, path: str, runs: Sequence[Record]) -> None:
  """Writes a results file, one line a run: small, and its changes readable.

  Args:
    experiment: the table.
    path: of the file.
    runs: the finished runs.

  Example:
    >>> write(experiment, 'results/akrout_mnist.json', runs)
  """
  command = ' '.join([f'python scripts/{experiment.name}.py', *sys.argv[1:]])
  head = {
      'command': command, 'versions': summary_lib.versions(),
      **experiment.head}
  lines = [f'  {json.dumps(run, allow_nan=False)}' for run in runs]
  text = json.dumps(head, indent=1)[:-2]  # Without what closes it.
  with open(path, 'w', encoding='utf-8') as file:
    file.write(text + ',\n "runs": [\n' + ',\n'.join(lines) + '\n ]\n}\n')
  print(f'wrote {path}: {len(runs)} runs')


def _read(experiment, path):
  """The runs of a results file."""
  known = {row.label for row in experiment.rows}
  try:
    runs = _read_json(path)['runs']
    of_this = bool(runs) and {run['row'] for run in runs} <= known
  except (OSError, KeyError, TypeError, ValueError):
    of_this = False
  if not of_this:
    raise ValueError(
        f'`read` must be a file of results of {experiment.name}, and {path!r} '
        'is none; write one with --output.')
  return runs


def _show(experiment, results, presets):
  """Prints tables, reports and checks; whether everything holds."""
  console = rich.console.Console(highlight=False)
  if not console.is_terminal:
    console = rich.console.Console(width=140, highlight=False)
  for preset in presets:
    if any(run['preset'] == preset for run in results.runs):
      console.print(_table(experiment, results, preset))
    else:
      print(f'no run{" of preset " + preset if preset else ""} is finished')
  print('+- is the standard deviation over seeds, n of them here.')
  for source in sorted({run['data_source'] for run in results.runs}):
    if 'JPEG' in source:
      print(f'{source}: compressed once, unlike the original images, so that '
            'accuracies can differ a little from theirs.')
  holds = True
  for preset in presets:
    for line in experiment.report(results, preset):
      print(f'found: {line}')
    for check in experiment.checks(preset):
      holds = _judge(check, results) and holds
  return holds


def _judge(check, results):
  """Prints one line of a check; whether it holds."""
  excuse = check.excused(results)
  if excuse == NOT_ASKED:
    return True
  if excuse:
    print(f'not judged: {check.text}: {excuse}')
    return True
  try:
    value = check.measure(results)
  except MissingError as error:
    print(f'outside: {check.text}: {error}')
    return False
  holds = check.low < value < check.high
  bounds = (
      f'below {check.high:.4g}' if check.low == -math.inf
      else f'above {check.low:.4g}' if check.high == math.inf
      else f'between {check.low:.4g} and {check.high:.4g}')
  print(f'{"within" if holds else "outside"}: {check.text}: {value:.4g}, must '
        f'be {bounds}')
  return holds


def _table(experiment, results, preset):
  """Two lines a row: ours, and the paper's where it gives any number."""
  rows = [row for row in experiment.rows if row.preset == preset]
  epochs = sorted({r['epochs'] for row in rows for r in results.of(row.label)})
  title = experiment.title + (f', preset {preset}' if preset else '')
  if epochs:
    title += f', epochs: {", ".join(map(str, epochs))}'
  table = rich.table.Table('row', 'by', *(
      rich.table.Column(c.name, justify='right')
      for c in experiment.columns), title=title)
  for row in rows:
    n = len(results.of(row.label))
    table.add_row(row.name, f'here, n={n}', *(
        _cell(results.number(row.label, c.name), c.digits)
        for c in experiment.columns))
    if row.published:
      table.add_row('', 'paper', *(
          _cell(row.published.get(c.name), c.digits)
          for c in experiment.columns), end_section=True)
  return table


def _cell(number, digits):
  if number is None:
    return '-'
  spread = '' if number.std is None else f' +- {number.std:.{digits}f}'
  return f'{number.mean:.{digits}f}{spread}'


def test_accuracy(run: Record) -> float:
  """In percent."""
  return 100 * run['test_accuracy']


def train_accuracy(run: Record) -> float:
  """In percent."""
  return 100 * run['train_accuracy']


def alignment(unit: str, kind: str = 'teaching') -> Callable[
    [Record], float | None]:
  """A column's value: the last cosine of a unit; None if it was not measured.

  Args:
    unit: its name.
    kind: 'teaching' or 'weight', of `bpjax.Alignment`.

  Example:
    >>> Column('cosine, layer 1', alignment('dense_1'), 3)
  """
  return lambda run: run['alignment'].get(unit, {}).get(kind)


def draw_alignment(results: Results, path: str) -> None:
  """Draws the teaching signals' cosines over training, a panel a hidden unit.

  One colour a row and one style a preset, for every seed.
  """
  rows = list(dict.fromkeys(
      run['row'].removeprefix(f'{run["preset"]},') for run in results.runs))
  presets = list(dict.fromkeys(run['preset'] for run in results.runs))
  units = list(results.runs[0]['alignment_curves'])[:-1]
  figure, axes = plt.subplots(
      1, len(units), figsize=(1.5 + 3.6 * len(units), 4.4), sharex=True,
      sharey=True, squeeze=False, layout='constrained')
  labels = {}
  for run in results.runs:
    row = run['row'].removeprefix(f'{run["preset"]},')
    for axis, unit in zip(axes[0], units):
      curve = run['alignment_curves'][unit]['teaching']
      line, = axis.plot(
          run['alignment_epochs'],
          [math.nan if v is None else v for v in curve],
          color=f'C{rows.index(row)}',
          linestyle=('-', '--', ':')[presets.index(run['preset'])])
    labels.setdefault(run['row'].replace(',', ', ').replace('_', ' '), line)
  for axis, unit in zip(axes[0], units):
    axis.set_title(unit)
    axis.set_xlabel('epoch')
    axis.axhline(0, color='0.6', lw=.8, zorder=0)
    axis.grid(alpha=.25)
  axes[0, 0].set_ylabel('teaching signal, cosine to backprop')
  figure.legend(
      labels.values(), labels.keys(), loc='outside lower center', ncols=5,
      fontsize='small')
  figure.savefig(path, dpi=110)
  plt.close(figure)
