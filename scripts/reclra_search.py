"""The settings behind `scripts/reclra_table1.py`, chosen on validation examples.

  python scripts/reclra_search.py [--rows=lra,backprop] [--dataset=mnist]

Every row of the table has six candidates, `CANDIDATES` of
experiments/configs/reclra_mnist.py; each is trained for 5 epochs (with a cosine
over these) with seed 0 on the 58,000 training examples, and judged by its
accuracy on the 2,000 validation examples. The test set is not looked at here.
The best, the first of equals, belongs into `CHOSEN` there. Half an hour on one
CPU core; the data are read from TFDS_DATA_DIR.

Runs that are finished are not trained again; `results/reclra_search.json` is
what was found.
"""

import json
import os
import sys

from absl import app
from absl import flags
from absl import logging
from experiments import launch
from experiments import summary as summary_lib
from experiments.configs import reclra_mnist

_DATASET = flags.DEFINE_enum(
    'dataset', 'fashion_mnist', reclra_mnist.DATASETS, 'Which to search on.')
_ROWS = flags.DEFINE_list('rows', [], 'Which rows; default: all.')
_EPOCHS = flags.DEFINE_integer('epochs', 5, 'Of every candidate.', 1)
_WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/reclra_search', "Folder of the runs' folders.")
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file for what was found.')


def config_of(row: str, dataset: str, candidate: int, epochs: int):
  """A candidate's config, shortened."""
  config = reclra_mnist.get_config(f'{row}:{dataset}:{candidate}')
  config.epochs = epochs
  return config


def search(dataset: str, rows: list[str], epochs: int, workdir: str):
  """Trains what is missing; yields (row, [validation accuracy or None])."""
  for row in rows:
    accuracies = []
    for i, _ in enumerate(reclra_mnist.CANDIDATES[row][1]):
      folder = os.path.join(workdir, f'{dataset},{row},candidate={i}')
      code = launch.launch(
          config_of(row, dataset, i, epochs), folder, quiet=True)
      if code not in (0, 3):
        sys.exit(code)
      path = os.path.join(folder, 'summary.json')
      accuracy = None  # Code 3: the weights were not finite.
      if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
          accuracy = json.load(file)['validation_accuracy']
      elif not code:
        sys.exit(1)  # Stopped by SIGTERM.
      accuracies.append(accuracy and round(accuracy, 6))
    yield row, accuracies


def best(accuracies: list[float | None]) -> int:
  """The index of the highest accuracy, the first of equals.

  Example:
    >>> best([.5, None, .7, .7])
    2
  """
  return max(range(len(accuracies)), key=lambda i: accuracies[i] or 0.)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries.
  known = list(reclra_mnist.CANDIDATES)
  for row in _ROWS.value:
    if row not in known:
      print(f'error: `rows` has no {row!r}; known: {", ".join(known)}.',
            file=sys.stderr)
      sys.exit(2)
  found = {}
  for row, accuracies in search(
      _DATASET.value, _ROWS.value or known, _EPOCHS.value, _WORKDIR.value):
    found[row] = {
        'candidates': reclra_mnist.CANDIDATES[row][1],
        'validation_accuracy': accuracies, 'best': best(accuracies)}
    print(f'{_DATASET.value} {row}: best is candidate {best(accuracies)} of '
          f'{accuracies}', flush=True)
  if _OUTPUT.value:
    head = {
        'command': ' '.join(['python scripts/reclra_search.py', *sys.argv[1:]]),
        'versions': summary_lib.versions(), 'dataset': _DATASET.value,
        'epochs': _EPOCHS.value}
    rows = [f'  {json.dumps(row)}: {json.dumps(value)}'
            for row, value in found.items()]
    text = json.dumps(head, indent=1)[:-2]
    with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
      file.write(text + ',\n "rows": {\n' + ',\n'.join(rows) + '\n }\n}\n')


if __name__ == '__main__':
  app.run(main)
