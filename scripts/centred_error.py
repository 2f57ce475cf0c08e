"""ResNet-20 by feedback alignment, with and without the batch's mean in its error.

  python scripts/centred_error.py [--seeds=0,1,2] [--rows=none,units] \
      [--examples=2560] [--output=results/centred_error.json]

`feedback_alignment(centre=...)` takes the mean over the batch from the error, at
the output unit alone ('output') or at every unit's output ('units'). The row
'units_rate' trains the readout at ten times the rate as well; a bias at the
prior of the classes is 0 here, where all classes are as frequent. CIFAR-10 from
TFDS_DATA_DIR, --examples of its training images, one epoch, batch 64, Adam at a
rate of .002 with a cosine: a trial, in which no setting was searched. Growth is
the largest ratio of norms of the residual stream from a block to the next, on a
training batch behind the last step; the cosine that of teaching signals with
backprop's, the mean over the units but the readout.

What is finished is not trained again. About a minute a run on an idle core.
"""

from __future__ import annotations

import os
import statistics

# Compiling takes longer than so short a training.
os.environ['XLA_FLAGS'] = (
    f'--xla_backend_optimization_level=1 {os.environ.get("XLA_FLAGS", "")}')

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import flags
from bpjax.train import config as config_lib
from bpjax.train.folder import workdir as workdir_lib
from experiments import leaderboard
from experiments import measurement
from experiments import reproduction

ROWS = {
    'none': ('none', 1), 'output': ('output', 1), 'units': ('units', 1),
    'units_rate': ('units', 10)}
_RATE = 2e-3
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of every row.')
_ROWS = flags.DEFINE_list('rows', list(ROWS), 'Rows to train.')
_EXAMPLES = flags.DEFINE_integer('examples', 2560, 'Training images.', 64)
_WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/centred_error', "Folder of the runs' folders.")


def config_of(row: str, seed: int, examples: int):
  """The config of a run."""
  centre, factor = ROWS[row]
  config = config_lib.default()
  config.rule = 'feedback_alignment'
  config.rule_args.centre = centre
  config.model, config.dataset = 'resnet20', 'cifar10'
  config.train_examples, config.epochs, config.batch_size = examples, 1, 64
  config.learning_rate, config.schedule = _RATE, 'cosine'
  if factor != 1:
    config.optimizer_by_path = (('readout', 'adam', factor * _RATE),)
  config.alignment_every, config.keep_checkpoints = 10**9, 1
  config.seed = seed
  return config


def _measure(picture):
  del picture
  for row in _ROWS.value:
    if row not in ROWS:
      raise measurement.FlagError(
          f'`rows` has no {row!r}; known: {", ".join(ROWS)}.')
  runs = []
  for seed in measurement.numbers('seeds', _SEEDS.value, 0):
    for row in _ROWS.value:
      config = config_of(row, seed, _EXAMPLES.value)
      run = reproduction.Run(
          reproduction.Row(row, config, {}), config,
          os.path.join(_WORKDIR.value, f'{row},seed={seed}'))
      reproduction.check_folder(run.folder, config)
      if reproduction.train_runs([run]):
        raise KeyboardInterrupt
      if workdir_lib.read_summary(run.folder) is None:
        continue  # Its weights did not stay finite.
      found = reproduction.record(run)
      hidden = [u['teaching'] for n, u in found['alignment'].items()
                if n != 'readout' and u['teaching'] is not None]
      runs.append({
          **{k: found[k] for k in (
              'row', 'seed', 'rule', 'epochs', 'test_accuracy', 'wall_time',
              'train_accuracy', 'device_kind', 'git_commit', 'data_source')},
          'cosine': statistics.fmean(hidden),
          'growth': leaderboard.largest_growth(run, ('stage_*/block_*',))})
  table = measurement.table(
      'ResNet-20 on CIFAR-10, feedback alignment', 'centre',
      'test accuracy, %', 'growth', 'cosine', 'n')
  rows = []
  for row in _ROWS.value:
    own = [r for r in runs if r['row'] == row]
    if not own:
      continue
    numbers = {'row': row, 'n': len(own)}
    for key, scale in (('test_accuracy', 100), ('growth', 1), ('cosine', 1)):
      values = [scale * r[key] for r in own if r[key] is not None]
      numbers[key] = statistics.fmean(values)
      numbers[f'{key}_std'] = (
          statistics.stdev(values) if len(values) > 1 else None)
    rows.append(numbers)
    table.add_row(row, f'{numbers["test_accuracy"]:.2f}',
                  f'{numbers["growth"]:.2f}', f'{numbers["cosine"]:.4f}',
                  str(len(own)))
  measurement.show(table)
  return {'rows': rows, 'runs': runs}, []


if __name__ == '__main__':
  measurement.main('centred_error', _measure, plot=False)
