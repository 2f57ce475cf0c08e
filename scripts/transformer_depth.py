"""Learning rules in transformers of growing depth: accuracy by depth.

  python scripts/transformer_depth.py [--dataset=sick,glue/sst2,listops] \
      [--depths=1,2,4,8] [--rules=backprop,feedback_alignment] [--seeds=0,1,2] \
      [--trial]

A post-norm encoder in the manner of BERT, trained from scratch: width 64, four
heads, AdamW with a cosine, a WordPiece vocabulary of 8,192 (or the tokens of a
generated task). Data sets: `sst2` (one epoch), `sick` (eight), `listops` (twelve),
`mnli` (GLUE's, one epoch, where it is prepared), and `recall`, associative recall,
with a causal decoder (pre-norm, three epochs). --depths=12 is there as well. Data
that are not generated are read from TFDS_DATA_DIR.

Rows: backprop, feedback alignment, Kolen-Pollack, weight mirror, sign symmetry
(uniform), direct feedback to each block, local representation alignment, its
recursive kind with direct wires, forward gradient of activities with a loss for
every block, and the control `frozen`: embedding and readout learn, the blocks
keep their first values. Each rule has five learning rates and decays, judged on
validation examples at the smallest depth with seed 0 for a quarter of the epochs;
the best is used at all depths. KP's decay has to let feedback align within the
run, so that three of the five are strong ones.

Must hold, where backprop is at least three standard errors above the frozen
blocks: Kolen-Pollack within 1.5 points of backprop at every depth; feedback
alignment above the frozen blocks at depths 1 and 2, and not at 4 and 8 (a
one-sided paired t-test over seeds, p < .05). Where blocks do not matter, it is
said so, and nothing is judged.

The default, SICK with two seeds, is 80 runs and 50 candidates: six to seven hours on
one core, extrapolated. A run of `recall` with two blocks and backprop took 75 s on a
core that others used too, 35 ms a step of 64 rows of 14 tokens (results/
transformer_tasks.json); one on SICK has 868 steps of 48 tokens, 104 s by tokens, 195
s on average over depths by blocks; weight mirror and local losses take twice as
long, compilation 20 s a run. --trial takes about a third of that.
"""

import functools
import math

from experiments import reproduction
from experiments import transformers
from experiments.configs import transformer_depth
import matplotlib.pyplot as plt

_ACCURACY = 'test accuracy, %'
RULES = (
    'backprop', 'kolen_pollack', 'weight_mirror', 'usf', 'feedback_alignment',
    'dfa_macro', 'lra', 'rec_lra', 'lg_fg_a', 'frozen')
DEPTHS = (1, 2, 4, 8, 12)
_NAMES = {'glue/sst2': 'sst2', 'glue/mnli': 'mnli',
          'associative_recall': 'recall'}
# Preset -> chance, and the share of the most frequent label in percent (None: not
# known here).
_LEVELS = {
    'recall': (6.25, 6.25), 'listops': (10., 10.), 'sick': (100 / 3, 56.4),
    'sst2': (50., 50.9), 'mnli': (100 / 3, None)}
_BOUND = 1.5
_MATTERS = 3.  # Standard errors.
TRIAL = transformers.Trial(depths=(1, 2), rules=RULES, seeds=('0', '1'))


def _row(preset, rule, depth):
  return reproduction.Row(
      transformers.row_of(rule, depth), transformer_depth.get_config(
          f'{preset}:{rule}:{depth}'), {}, preset)


def _after_one_epoch(run):
  by_epoch = run.get('test_accuracy_by_epoch')
  return 100 * by_epoch[0] if by_epoch else None


def _gap(preset, rule, other, depth, results):
  """Points by which a rule is above another."""
  of = lambda r: results.mean(
      f'{preset},{transformers.row_of(r, depth)}', _ACCURACY)
  return of(rule) - of(other)


def _p(preset, depth, results):
  """Of feedback alignment above the frozen blocks."""
  rows = [f'{preset},{transformers.row_of(r, depth)}'
          for r in ('feedback_alignment', 'frozen')]
  return transformers.paired(results, *rows)[1]


def _checks(preset):
  count = transformers.ANSWERS[preset]
  made = []
  for depth in DEPTHS:
    excused = transformers.where_blocks_matter(preset, depth, count, _MATTERS)
    made.append(reproduction.Check(
        f'{preset}, depth {depth}: Kolen-Pollack from backprop, points',
        lambda results, d=depth: abs(
            _gap(preset, 'kolen_pollack', 'backprop', d, results)),
        high=math.nextafter(_BOUND, math.inf), excused=excused))
  for depth in (1, 2, 4, 8):
    learns = depth <= 2
    made.append(reproduction.Check(
        f'{preset}, depth {depth}: p-value of feedback alignment above frozen '
        'blocks', functools.partial(_p, preset, depth),
        -math.inf if learns else .05, .05 if learns else math.inf,
        transformers.where_blocks_matter(preset, depth, count, _MATTERS)))
  return made


def _report(results, preset):
  """What is said of each depth, whether or not it is judged."""
  count = transformers.ANSWERS[preset]
  for depth in DEPTHS:
    try:
      gap = _gap(preset, 'backprop', 'frozen', depth, results)
      error = transformers.standard_error(results, *(
          f'{preset},{transformers.row_of(r, depth)}'
          for r in ('backprop', 'frozen')), count)
    except reproduction.MissingError:
      continue
    yield (f'{preset}, depth {depth}: backprop is {gap:+.1f} points from the '
           f'frozen blocks, {gap / error if error else math.inf:.1f} standard '
           'errors: blocks ' + (
               'matter' if gap >= _MATTERS * error
               else 'are not shown to matter'))
    for rule in RULES[1:-1]:
      try:
        above = _gap(preset, rule, 'frozen', depth, results)
        below = _gap(preset, rule, 'backprop', depth, results)
      except reproduction.MissingError:
        continue
      yield (f'{preset}, depth {depth}: {rule}: {above:+.1f} points from the '
             f'frozen blocks, {below:+.1f} from backprop')


def draw(results: reproduction.Results, path: str) -> None:
  """Accuracy by depth, a panel a data set, with the lines to be above."""
  presets = list(dict.fromkeys(run['preset'] for run in results.runs))
  figure, axes = plt.subplots(
      1, len(presets), figsize=(1.5 + 4.2 * len(presets), 4.6), squeeze=False,
      layout='constrained')
  lines = {}
  for axis, preset in zip(axes[0], presets):
    found = transformers.of_rules(results, preset, RULES)
    for rule, numbers in found.items():
      depths, means = list(numbers), [n.mean for n in numbers.values()]
      lines[rule] = axis.errorbar(
          depths, means, yerr=[n.std or 0. for n in numbers.values()],
          marker='o', ms=4, capsize=3, color=f'C{RULES.index(rule)}',
          linestyle='--' if rule == 'frozen' else '-',
          lw=2 if rule in ('backprop', 'frozen') else 1.2)
    chance, majority = _LEVELS[preset]
    lines['chance'] = axis.axhline(chance, color='0.5', lw=1, ls=':')
    if majority is not None and majority != chance:
      lines['most frequent label'] = axis.axhline(
          majority, color='0.3', lw=1, ls='-.')
    axis.set_xscale('log', base=2)
    ticks = sorted({d for numbers in found.values() for d in numbers})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()
    axis.set_title(preset)
    axis.set_xlabel('blocks')
    axis.grid(alpha=.25)
  axes[0, 0].set_ylabel('test accuracy, %')
  figure.legend(
      lines.values(), [name.replace('_', ' ') for name in lines],
      loc='outside lower center', ncols=4, fontsize='small')
  figure.savefig(path, dpi=110)
  plt.close(figure)


EXPERIMENT = reproduction.Experiment(
    name='transformer_depth',
    title='Rules in transformers, by depth',
    rows=[_row(preset, rule, depth)
          for preset in _LEVELS for depth in DEPTHS for rule in RULES],
    columns=[
        reproduction.Column(_ACCURACY, reproduction.test_accuracy),
        reproduction.Column('train accuracy, %', reproduction.train_accuracy),
        reproduction.Column(
            'test accuracy after the first epoch, %', _after_one_epoch),
    ],
    checks=_checks, presets=('sick',), report=_report, draw=draw)

if __name__ == '__main__':
  transformers.main(
      EXPERIMENT, TRIAL, (1, 2, 4, 8), _NAMES, seeds=('0', '1'))
