"""Measures a trained run: accuracy, each class, confusions, calibration.

python -m experiments.evaluate --workdir=runs/digits [--split=validation]
    [--dataset=OTHER] [--best] [--output=FILE.json] [--plot=FILE.png]
"""

import json

from absl import flags
from experiments import after

SPLIT = flags.DEFINE_string('split', 'test', 'train, validation or test.')
DATASET = flags.DEFINE_string(
    'dataset', '', 'Another data set of the same classes.')
OUTPUT = flags.DEFINE_string('output', '', 'A JSON file for all numbers.')
PLOT = flags.DEFINE_string(
    'plot', '', 'A picture of the confusions and of the calibration.')


def use(run, files):
  del files
  from bpjax.train import evaluate

  result = evaluate.evaluate(run, SPLIT.value, DATASET.value)
  print(evaluate.table(result))
  if PLOT.value and 'confusion' not in result:
    raise ValueError(
        '`plot` shows classes, and the run predicts tokens; leave it out.')
  try:
    if OUTPUT.value:
      with open(OUTPUT.value, 'w', encoding='utf-8') as file:
        file.write(json.dumps(result, indent=2) + '\n')
    if PLOT.value:
      _plot(result, PLOT.value)
  except OSError as error:
    raise ValueError(
        f'{error.filename} cannot be written ({error.strerror}); give another '
        'path.') from error


def _plot(result, path):
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  import numpy as np

  confusion = np.array(result['confusion'], float)
  share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
  figure, (left, right) = plt.subplots(
      1, 2, figsize=(11, 5), layout='constrained')
  left.imshow(share, cmap='Blues', vmin=0, vmax=1)
  places = range(len(result['classes']))
  if len(places) <= 20:
    left.set_xticks(places, result['classes'], rotation=90)
    left.set_yticks(places, result['classes'])
    for i in places:
      for j in places:
        if confusion[i, j]:
          left.text(j, i, int(confusion[i, j]), ha='center', va='center',
                    fontsize=8, color='white' if share[i, j] > .5 else 'black')
  left.set(xlabel='predicted', ylabel='true',
           title=f'{result["split"]} accuracy {result["accuracy"]:.4f}')
  bins = [b for b in result['calibration']['bins'] if b['count']]
  right.plot([0, 1], [0, 1], color='grey', linewidth=1)
  right.bar([b['from'] for b in bins], [b['accuracy'] for b in bins],
            width=1 / 15, align='edge', edgecolor='white')
  error = result['calibration']['expected_calibration_error']
  right.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1),
            title=f'calibration error {error:.4f}')
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  after.start(use)
