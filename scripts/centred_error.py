"""Feedback alignment with and without the batch's mean in its error.

  python scripts/centred_error.py [--tasks=digits,encoder] [--seeds=0,1,2] \
      [--rows=none,units] [--output=results/centred_error_digits.json]

`feedback_alignment(centre=...)` takes the mean over the batch from the error, at
the output unit alone ('output') or at every unit's output ('units'). The row
'units_rate' trains the readout at ten times the rate as well; a bias at the
prior of the classes is 0 here, where all classes are as frequent. 'backprop' and
'frozen' (all but the readout, and a transformer's embedding, as drawn) are beside
them. Tasks, in which no setting was searched:

  cifar10  ResNet-20 on --examples images, one epoch, batch 64, Adam at .002
  digits   ResNet-20 on the 1,437 training digits of scikit-learn (8 x 8), 20
           epochs of the same
  encoder  ListOps by the encoder of experiments/configs/listops.py, two blocks,
           100,000 examples, ten epochs, AdamW at .003 with a decay of .01

all with a cosine. CIFAR-10 is read from TFDS_DATA_DIR. Growth is the largest ratio
of norms of the residual stream from a block to the next, on a training batch behind
the last step; the cosine that of teaching signals with backprop's, the mean over the
units but the readout.

What is finished is not trained again. About a minute a run of ResNet-20, and three of
the encoder, on an idle core.
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
from experiments import transformers
from experiments.configs import transformer_depth

ROWS = {
    'none': ('none', 1), 'output': ('output', 1), 'units': ('units', 1),
    'units_rate': ('units', 10), 'backprop': None, 'frozen': None}
_RATE = 2e-3
_TASKS = {  # Task -> title, residual blocks, what the frozen control keeps.
    'cifar10': ('ResNet-20 on CIFAR-10', ('stage_*/block_*',),
                ('*stem*', 'stage_*')),
    'digits': ('ResNet-20 on digits', ('stage_*/block_*',),
               ('*stem*', 'stage_*')),
    'encoder': ('encoder on ListOps', ('block_*',), ('block_*',))}
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of every row.')
_TASK = flags.DEFINE_list('tasks', list(_TASKS), 'Tasks to train.')
_ROWS = flags.DEFINE_list('rows', list(ROWS), 'Rows to train.')
_EXAMPLES = flags.DEFINE_integer('examples', 2560, 'Images of CIFAR-10.', 64)
_WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/centred_error', "Folder of the runs' folders.")


def config_of(task: str, row: str, seed: int, examples: int):
  """The config of a run."""
  if task == 'encoder':
    config = transformer_depth.get_config('listops:feedback_alignment:2')
    config = transformers.with_candidate(config, 'feedback_alignment', 1)
    config.epochs = 10
  else:
    config = config_lib.default()
    config.model, config.dataset, config.batch_size = 'resnet20', task, 64
    config.train_examples = examples if task == 'cifar10' else 0
    config.epochs = 1 if task == 'cifar10' else 20
    config.learning_rate, config.schedule = _RATE, 'cosine'
  if ROWS[row] is None:
    config.rule = 'backprop'
    config.frozen = _TASKS[task][2] if row == 'frozen' else ()
  else:
    config.rule = 'feedback_alignment'
    config.rule_args.centre, factor = ROWS[row]
    if factor != 1:
      config.optimizer_by_path = ((
          'readout', config.optimizer, factor * config.learning_rate),)
  config.alignment_every, config.keep_checkpoints = 10**9, 1
  config.seed = seed
  return config


def _measure(picture):
  del picture
  for row in _ROWS.value:
    if row not in ROWS:
      raise measurement.FlagError(
          f'`rows` has no {row!r}; known: {", ".join(ROWS)}.')
  for task in _TASK.value:
    if task not in _TASKS:
      raise measurement.FlagError(
          f'`tasks` has no {task!r}; known: {", ".join(_TASKS)}.')
  seeds = measurement.numbers('seeds', _SEEDS.value, 0)
  runs = [
      found for task in _TASK.value for seed in seeds for row in _ROWS.value
      if (found := _trained(task, row, seed))]
  rows = []
  for task in _TASK.value:
    table = measurement.table(
        _TASKS[task][0], 'row', 'test accuracy, %', 'growth', 'cosine', 'n')
    for row in _ROWS.value:
      own = [r for r in runs if (r['task'], r['row']) == (task, row)]
      if not own:
        continue
      numbers = {'task': task, 'row': row, 'n': len(own)}
      for key, scale in (('test_accuracy', 100), ('growth', 1), ('cosine', 1)):
        values = [scale * r[key] for r in own if r[key] is not None]
        numbers[key] = statistics.fmean(values) if values else None
        numbers[f'{key}_std'] = (
            statistics.stdev(values) if len(values) > 1 else None)
      rows.append(numbers)
      table.add_row(row, *(
          '' if numbers[k] is None else f'{numbers[k]:.{digits}f}'
          for k, digits in (('test_accuracy', 2), ('growth', 2), ('cosine', 4))),
                    str(len(own)))
    measurement.show(table)
  return {'rows': rows, 'runs': runs}, []


def _trained(task, row, seed):
  """What a run found; None if its weights did not stay finite."""
  config = config_of(task, row, seed, _EXAMPLES.value)
  run = reproduction.Run(
      reproduction.Row(row, config, {}), config,
      os.path.join(_WORKDIR.value, f'{task},{row},seed={seed}'))
  reproduction.check_folder(run.folder, config)
  if reproduction.train_runs([run]):
    raise KeyboardInterrupt
  if workdir_lib.read_summary(run.folder) is None:
    return None
  found = reproduction.record(run)
  hidden = [] if ROWS[row] is None else [
      u['teaching'] for n, u in found['alignment'].items()
      if n != 'readout' and u['teaching'] is not None]
  return {
      'task': task, **{k: found[k] for k in (
          'row', 'seed', 'rule', 'epochs', 'test_accuracy', 'wall_time',
          'train_accuracy', 'device_kind', 'git_commit', 'data_source')},
      'cosine': statistics.fmean(hidden) if hidden else None,
      'growth': leaderboard.largest_growth(run, _TASKS[task][1])}


if __name__ == '__main__':
  measurement.main('centred_error', _measure, plot=False)
