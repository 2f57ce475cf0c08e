"""The width that direct feedback needs: Figure 4 of Launay et al., 2019.

  python scripts/launay_fig4.py [--presets=code] [--epochs=10] \
      [--rows=neurons=1,neurons=118,neurons=800]

Principled training of neural networks with direct feedback alignment, Launay,
Poli and Krzakala, 2019, section 3.4 (https://arxiv.org/abs/1906.04554).
CIFAR-10, 3072-800-800-800-10 with tanh, normalised shared feedback; in the
second layer only some neurons learn, chosen once by the seed (`bottleneck` of
experiments/config.py). The text says neurons, as here; the authors' program
masks single entries of the gradient. Preset `code`: their learning rate, 5e-4,
and initial weights; `paper`: those of the text, 5e-3 and He's. 50 epochs. A
run takes about 8 minutes on one CPU core, the 14 sizes 2 hours. CIFAR-10 is
read from TFDS_DATA_DIR.

The paper gives a plot alone: accuracy and the alignment of the second layer
(the cosine of its teaching signals to backprop's, mean over 128 test images)
rise to about 100 neurons, then are flat. The cosine cannot be flat where
neurons are masked: a neuron whose weights stay as they were drawn gives the
next layer nothing to align with, so that its entries of the two signals are at
right angles, and those of the n that learn make up sqrt(n / 800) of the
feedback's length. That is about the most that the cosine can come to: the last
column. (A mask on entries leaves every neuron some weights that learn.)

Must hold, in every preset that is made: test accuracy with 118 neurons and
more within 2 points of that with all 800; accuracy and cosine higher with 800
than with one, the cosine by more than .1.

Also draws both against the number of neurons.
"""

import math

from experiments import reproduction
from experiments.configs import launay_mlp
import matplotlib.pyplot as plt

SIZES = (1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800)
_ACCURACY, _COSINE = 'test accuracy, %', 'cosine 2'
_MOST = 'sqrt(n / 800)'
_FLAT_FROM = 118
_FLAT = 2.  # Points, around the accuracy with all neurons.
_RISE = .1  # Of the cosine, from one neuron to all.


def _row(size, preset):
  config = launay_mlp.get_config(f'tanh_norm:{preset}')
  if preset == 'paper':
    config.learning_rate = 5e-3
  config.bottleneck = (('dense_2', size),)
  return reproduction.Row(f'neurons={size}', config, {}, preset)


def _checks(preset):
  label = lambda size: f'{preset},neurons={size}'
  return [
      *(reproduction.difference(
          label(size), label(800), _ACCURACY, -_FLAT, _FLAT)
        for size in SIZES if _FLAT_FROM <= size < 800),
      reproduction.difference(label(800), label(1), _ACCURACY),
      reproduction.difference(label(800), label(1), _COSINE, _RISE),
  ]


def _most(run):
  (_, neurons), = run['config']['bottleneck']
  return math.sqrt(neurons / 800)


def _draw(results, path):
  """Accuracy and cosine against the number of neurons, one line a preset."""
  figure, axes = plt.subplots(
      1, 2, figsize=(9, 3.8), sharex=True, layout='constrained')
  for preset in dict.fromkeys(run['preset'] for run in results.runs):
    for axis, column in zip(axes, (_ACCURACY, _COSINE)):
      numbers = {
          size: results.number(f'{preset},neurons={size}', column)
          for size in SIZES}
      numbers = {size: n for size, n in numbers.items() if n is not None}
      axis.errorbar(
          list(numbers), [n.mean for n in numbers.values()],
          [n.std or 0. for n in numbers.values()], marker='o', capsize=3,
          label=preset)
      axis.set_xscale('log')
      axis.set_xlim(.8, 1000)
      axis.set_xlabel('neurons of the second layer that learn')
      axis.set_ylabel(column)
      axis.grid(alpha=.25)
  axes[0].legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


EXPERIMENT = reproduction.Experiment(
    name='launay_fig4',
    title='Launay et al., 2019, Figure 4: CIFAR-10, 3x800 with a bottleneck',
    rows=[_row(size, preset) for preset in ('code', 'paper') for size in SIZES],
    columns=[
        reproduction.Column(_ACCURACY, reproduction.test_accuracy),
        reproduction.Column('train accuracy, %', reproduction.train_accuracy),
        reproduction.Column(_COSINE, reproduction.alignment('dense_2')),
        reproduction.Column(_MOST, _most),
    ],
    checks=_checks, presets=('code',), draw=_draw)

if __name__ == '__main__':
  reproduction.main(EXPERIMENT)
