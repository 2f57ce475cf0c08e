"""Which path of a transformer breaks feedback alignment?

  python scripts/transformer_paths.py [--dataset=recall_post,recall_pre] \
      [--depths=1,2,4] [--rules=feedback_alignment,bp_v] [--seeds=0,1,2] [--trial]

Feedback alignment everywhere but on one path: queries and keys (`qk`), values
(`v`), the attention's output (`o`), the two maps of the feed-forward part (`in`,
`out`), or the readout with the pooler (`readout`). There the error goes through the
true weights (`bp_...`) or Kolen-Pollack's (`kp_...`). Beside them backprop, feedback
alignment everywhere, and the frozen blocks. Presets are a data set of
scripts/transformer_depth.py and where the norms are, `post` or `pre`, with the
sizes, the settings and the search of that script; queries, keys and values are maps
of their own here, which changes the function by nothing.

The gain of a path is its test accuracy minus that of feedback alignment
everywhere. Must hold, where backprop is at least three standard errors above the
frozen blocks: the largest gain of a path is at least three standard errors, so
that there is a path that breaks it; and it closes half of the gap to backprop at
least, so that it is one path.

The default is 90 runs and 150 candidates of a third each; by the 30 to 90 s that a
run of `recall` with two blocks took on one core, three to four hours. --trial,
two blocks with one seed, is 18 runs: 16 minutes without the search.
"""

import math

from experiments import reproduction
from experiments import transformers
from experiments.configs import transformer_paths
import matplotlib.pyplot as plt

_ACCURACY = 'test accuracy, %'
_DATASETS = ('recall', 'listops', 'sick')
_NORMS = ('post', 'pre')
DEPTHS = (1, 2, 4)
_PATHS = [row for row in transformer_paths.ROWS if '_' in row
          and row != 'feedback_alignment']
TRIAL = transformers.Trial(
    depths=(2,), rules=(
        'backprop', 'feedback_alignment', 'frozen',
        *(r for r in _PATHS if r.startswith('bp_'))))


def _row(dataset, norm, rule, depth):
  return reproduction.Row(
      transformers.row_of(rule, depth), transformer_paths.get_config(
          f'{dataset}:{norm}:{rule}:{depth}'), {}, f'{dataset}_{norm}')


def _gains(results, preset, depth):
  """Path -> points above feedback alignment everywhere, largest first."""
  of = lambda rule: results.mean(
      f'{preset},{transformers.row_of(rule, depth)}', _ACCURACY)
  gains = {}
  for path in _PATHS:
    try:
      gains[path] = of(path) - of('feedback_alignment')
    except reproduction.MissingError:
      continue
  if not gains:
    raise reproduction.MissingError(
        f'no path of {preset}, depth {depth}, is finished')
  return dict(sorted(gains.items(), key=lambda pair: -pair[1]))


def _in_errors(preset, depth, count):
  """Measures the largest gain in standard errors."""
  def measure(results):
    path, gain = next(iter(_gains(results, preset, depth).items()))
    error = transformers.standard_error(results, *(
        f'{preset},{transformers.row_of(r, depth)}'
        for r in (path, 'feedback_alignment')), count)
    return gain / error if error else math.inf

  return measure


def _share(preset, depth):
  """Measures the largest gain as a share of backprop's."""
  def measure(results):
    of = lambda rule: results.mean(
        f'{preset},{transformers.row_of(rule, depth)}', _ACCURACY)
    gain = next(iter(_gains(results, preset, depth).values()))
    return gain / (of('backprop') - of('feedback_alignment'))

  return measure


def _checks(preset):
  count = transformers.ANSWERS[preset.rpartition('_')[0]]
  made = []
  for depth in DEPTHS:
    excused = transformers.where_blocks_matter(preset, depth, count)
    made.append(reproduction.Check(
        f'{preset}, depth {depth}: largest gain of a path, standard errors',
        _in_errors(preset, depth, count), low=3., excused=excused))
    made.append(reproduction.Check(
        f'{preset}, depth {depth}: largest gain as a share of the gap',
        _share(preset, depth), low=.5, excused=excused))
  return made


def _report(results, preset):
  for depth in DEPTHS:
    try:
      gains = _gains(results, preset, depth)
    except reproduction.MissingError:
      continue
    yield f'{preset}, depth {depth}: gains over feedback alignment: ' + ', '.join(
        f'{path} {gain:+.1f}' for path, gain in gains.items())


def draw(results: reproduction.Results, path: str) -> None:
  """Accuracy of every row, a panel a preset and depth."""
  panels = list(dict.fromkeys(
      (run['preset'], transformers.parts(
          run['row'].removeprefix(f'{run["preset"]},'))[1])
      for run in results.runs))
  figure, axes = plt.subplots(
      1, len(panels), figsize=(1.5 + 3.2 * len(panels), 4.4), sharey=True,
      squeeze=False, layout='constrained')
  rows = [r for r in transformer_paths.ROWS if any(
      transformers.parts(run['row'].rpartition(',')[2])[0] == r
      for run in results.runs)]
  for axis, (preset, depth) in zip(axes[0], panels):
    found = transformers.of_rules(results, preset, rows)
    numbers = [found.get(row, {}).get(depth) for row in rows]
    axis.barh(
        range(len(rows)), [n.mean if n else math.nan for n in numbers],
        xerr=[n.std or 0. if n else 0. for n in numbers], capsize=3,
        color=['C1' if r in _PATHS else 'C0' for r in rows])
    axis.set_yticks(range(len(rows)), [r.replace('_', ' ') for r in rows])
    axis.set_title(f'{preset.replace("_", ", ")}, {depth} blocks')
    axis.set_xlabel('test accuracy, %')
    axis.grid(alpha=.25, axis='x')
  axes[0, 0].invert_yaxis()
  figure.savefig(path, dpi=110)
  plt.close(figure)


EXPERIMENT = reproduction.Experiment(
    name='transformer_paths',
    title='Feedback alignment on all paths but one',
    rows=[_row(dataset, norm, rule, depth)
          for dataset in _DATASETS for norm in _NORMS for depth in DEPTHS
          for rule in transformer_paths.ROWS],
    columns=[
        reproduction.Column(_ACCURACY, reproduction.test_accuracy),
        reproduction.Column('train accuracy, %', reproduction.train_accuracy),
    ],
    checks=_checks, presets=('recall_post', 'recall_pre'), report=_report,
    draw=draw)

if __name__ == '__main__':
  transformers.main(EXPERIMENT, TRIAL, DEPTHS)
