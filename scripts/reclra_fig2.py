"""Eight layers: Figure 2 of Ororbia et al., 2023, error after each epoch.

  python scripts/reclra_fig2.py [--seeds=0,1,2] [--epochs=10] \
      [--presets=mnist]

Backpropagation-free deep learning with recursive local representation
alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023 (an earlier version:
https://arxiv.org/abs/2002.03911). 8 x 256 with sigmoid or tanh units and
Gaussian initial weights, backprop against recursive LRA: settings in
experiments/configs/reclra_deep.py. 100 epochs as in the paper, whose curves are
an image without numbers; a run of them takes about 6 minutes on one CPU core.

Must hold: with sigmoid units, recursive LRA reaches the test error that backprop
has after 5 epochs in fewer than these.

Also draws the test error over epochs.
"""

import math

from experiments import reproduction
from experiments.configs import reclra_deep
import matplotlib.pyplot as plt

_TEST = 'test error, %'
_REFERENCE = 5  # Epochs of backprop whose error is to be reached.


def _errors(run):
  return [100 * (1 - a) for a in run['test_accuracy_by_epoch']]


def _mean_errors(results, row):
  """The row's test error after each epoch, a mean over seeds."""
  runs = results.of(row)
  if not runs:
    raise reproduction.MissingError(f'row {row} has no finished run')
  return [sum(e) / len(e) for e in zip(*map(_errors, runs))]


def _epochs_needed(results, preset):
  """Epochs of recursive LRA to the error of `_REFERENCE` epochs of backprop."""
  backprop, recursive = (
      _mean_errors(results, f'{preset},{rule}_sigmoid')
      for rule in reclra_deep.RULES)
  if len(backprop) < _REFERENCE:
    raise reproduction.MissingError(
        f'backprop was trained for fewer than {_REFERENCE} epochs')
  return next(
      (epoch for epoch, error in enumerate(recursive, 1)
       if error <= backprop[_REFERENCE - 1]), math.inf)


def _checks(preset):
  return [reproduction.Check(
      f'{preset}, sigmoid: epochs of recursive LRA to the test error of '
      f'{_REFERENCE} epochs of backprop',
      lambda results: _epochs_needed(results, preset), 0, _REFERENCE)]


def _report(results, preset):
  for activation in reclra_deep.ACTIVATIONS:
    for rule in reclra_deep.RULES:
      for run in results.of(f'{preset},{rule}_{activation}'):
        errors = ' '.join(f'{e:.1f}' for e in _errors(run)[:10])
        yield (f'{run["row"]}, seed {run["seed"]}: test error after the first '
               f'epochs, %: {errors}')


def _draw(results, path):
  presets = list(dict.fromkeys(run['preset'] for run in results.runs))
  figure, axes = plt.subplots(
      1, len(presets), figsize=(1 + 4.6 * len(presets), 4), squeeze=False,
      layout='constrained')
  for axis, preset in zip(axes[0], presets):
    labels = set()
    for run in (r for r in results.runs if r['preset'] == preset):
      rule, activation = run['row'].partition(',')[2].split('_')
      label = f'{rule}, {activation}'
      errors = _errors(run)
      axis.plot(
          range(1, len(errors) + 1), errors,
          color=f'C{reclra_deep.RULES.index(rule)}',
          linestyle=('-', '--')[reclra_deep.ACTIVATIONS.index(activation)],
          label=None if label in labels else label)
      labels.add(label)
    axis.set_title(preset)
    axis.set_xlabel('epoch')
    axis.set_ylabel(_TEST)
    axis.set_yscale('log')
    axis.grid(alpha=.25, which='both')
    axis.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


EXPERIMENT = reproduction.Experiment(
    name='reclra_fig2',
    title='Ororbia et al., 2023, Figure 2: eight layers of 256',
    rows=[
        reproduction.Row(
            f'{rule}_{activation}',
            reclra_deep.get_config(f'{rule}:{activation}:{dataset}'), {},
            dataset)
        for dataset in reclra_deep.DATASETS for rule in reclra_deep.RULES
        for activation in reclra_deep.ACTIVATIONS],
    columns=[
        reproduction.Column(
            'train error, %',
            lambda run: 100 - reproduction.train_accuracy(run)),
        reproduction.Column(
            _TEST, lambda run: 100 - reproduction.test_accuracy(run)),
    ],
    checks=_checks, presets=reclra_deep.DATASETS, report=_report, draw=_draw)

if __name__ == '__main__':
  reproduction.main(EXPERIMENT)
