"""Direct feedback does not train convolutions: Table 4 of Launay et al., 2019.

  python scripts/launay_table4.py [--seeds=0,1,2] [--presets=paper,code]

Principled training of neural networks with direct feedback alignment, Launay,
Poli and Krzakala, 2019 (https://arxiv.org/abs/1906.04554). CIFAR-10; three 5x5
convolutions with pooling, then 576-128-10; tanh, plain SGD at 5e-4, batch 128,
50 epochs, one shared feedback matrix. In the rows with dropout, .1 is for the
input's channels and the number in the name for the dense layer. Preset `code`
begins with the weights of the authors' program; its other settings are those
of `paper`. CIFAR-10 is read from TFDS_DATA_DIR. An epoch takes about 3 minutes
on one CPU core, a row 2.5 hours: --epochs=5 is a trial, an accelerator does it
all.

A cosine is that between a layer's teaching signals and backprop's: the mean
over 128 test images at the end. The last column is the hidden dense layer of
128.

Must hold, in every preset that is made: cosine of the first convolution
between -.1 and .1 in every row; cosine of the dense layer above .9 in every
row but that with BatchNorm, where the paper has .14.

Also draws the cosines over training.
"""

import math

from experiments import reproduction
from experiments.configs import launay_cnn

_ACCURACY = 'test accuracy, %'
_UNITS = ('conv_1', 'conv_2', 'conv_3', 'dense')
# Row -> test accuracy in %, its deviation, and the cosines of _UNITS.
_PUBLISHED = {
    'norm': (62.65, .65, .02, .15, .59, 1.),
    'no_norm': (57.90, .82, .00, .09, .62, 1.),
    'batch_norm': (48.50, 1.52, .01, .00, .00, .14),
    'dropout_.5': (57.95, 1.02, .01, .09, .30, .96),
    'dropout_.1': (61.31, .78, .02, .12, .44, .98),
}


def _row(name, preset):
  accuracy, std, *cosines = _PUBLISHED[name]
  published = {_ACCURACY: reproduction.Number(accuracy, std)}
  for unit, value in zip(_UNITS, cosines):
    published[f'cos {unit}'] = reproduction.Number(value)
  return reproduction.Row(
      name, launay_cnn.get_config(f'{name}:{preset}'), published, preset)


def _checks(preset):
  first = [
      reproduction.between(f'{preset},{name}', 'cos conv_1', -.1, .1)
      for name in _PUBLISHED]
  last = [
      reproduction.between(f'{preset},{name}', 'cos dense', .9, math.inf)
      for name in _PUBLISHED if name != 'batch_norm']
  return first + last


EXPERIMENT = reproduction.Experiment(
    name='launay_table4',
    title='Launay et al., 2019, Table 4: CIFAR-10, three convolutions',
    rows=[_row(name, preset)
          for preset in ('paper', 'code') for name in launay_cnn.ROWS],
    columns=[
        reproduction.Column(_ACCURACY, reproduction.test_accuracy),
        reproduction.Column('train accuracy, %', reproduction.train_accuracy),
        *(reproduction.Column(f'cos {unit}', reproduction.alignment(unit))
          for unit in _UNITS),
    ],
    checks=_checks, presets=('paper',), draw=reproduction.draw_alignment)

if __name__ == '__main__':
  reproduction.main(EXPERIMENT)
