"""ResNet-20 on CIFAR-10 by feedback alignment, direct or not, and its signs.

  python scripts/resnet_cifar.py [--epochs=100] [--rows=backprop,usf]

The ordering of a table of BioTorch: Benchmarking the accuracy and robustness
of feedback alignment algorithms, Sanfiz and Akrout, 2021
(https://arxiv.org/abs/2108.13446), ResNet-20 with SGD. Theirs are 250 epochs
with augmentation; here, few and without (experiments/configs/resnet_cifar.py
says what is the same), so that only the ordering of errors can be held against
theirs. CIFAR-10 is read from TFDS_DATA_DIR. A step takes .5 to .8 s on one CPU
core: five epochs of one row 20 to 25 minutes, those of all six more than two
hours. On an accelerator, more epochs by flag.

A cosine is that between teaching signals and backprop's: the mean over 128
test images at the end, and over all units but the output.

Must hold of test errors: each sign symmetry above backprop minus 1 point, and
below feedback alignment; direct feedback alignment above feedback alignment.
"""

import statistics

from experiments import reproduction
from experiments.configs import resnet_cifar

_ERROR = 'test error, %'
_PUBLISHED = {
    'backprop': 8.63, 'feedback_alignment': 32.16,
    'direct_feedback_alignment': 45.94, 'usf': 10.05, 'brsf': 11.02,
    'frsf': 11.2}
_TOLERANCE = 1.  # Points: the signs may be level with backprop.


def _cosine(run):
  hidden = [unit['teaching'] for unit in run['alignment'].values()][:-1]
  values = [value for value in hidden if value is not None]
  return statistics.fmean(values) if values else None


def _checks(preset):
  del preset
  checks = []
  for variant in ('usf', 'brsf', 'frsf'):
    checks += [
        reproduction.difference(variant, 'backprop', _ERROR, -_TOLERANCE),
        reproduction.difference('feedback_alignment', variant, _ERROR)]
  return checks + [reproduction.difference(
      'direct_feedback_alignment', 'feedback_alignment', _ERROR)]


EXPERIMENT = reproduction.Experiment(
    name='resnet_cifar',
    title='Sanfiz and Akrout, 2021: CIFAR-10, ResNet-20',
    rows=[
        reproduction.Row(name, resnet_cifar.get_config(name), {
            _ERROR: reproduction.Number(_PUBLISHED[name])})
        for name in resnet_cifar.ROWS],
    columns=[
        reproduction.Column(
            _ERROR, lambda run: 100 - reproduction.test_accuracy(run)),
        reproduction.Column(
            'train error, %',
            lambda run: 100 - reproduction.train_accuracy(run)),
        reproduction.Column('cosine', _cosine, 3),
    ],
    checks=_checks)

if __name__ == '__main__':
  reproduction.main(EXPERIMENT)
