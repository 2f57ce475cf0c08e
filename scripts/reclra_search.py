"""The settings behind `scripts/reclra_table1.py`, chosen on validation examples.

  python scripts/reclra_search.py [--rows=lra,backprop] [--dataset=mnist]

Every row of the table has six candidates, `CANDIDATES` of
experiments/configs/reclra_mnist.py; each is trained for 5 epochs (with a cosine
over these) with seed 0 on the 58,000 training examples, and judged by its
accuracy on the 2,000 validation examples. The best three of them are trained
again, for as long as the table's rows: some rules do well at first and fall
apart later. The test set is not looked at here. The best of the three, the
first of equals, belongs into `CHOSEN` there. Two hours on one CPU core; the data
are read from TFDS_DATA_DIR.

Runs that are finished are not trained again; `results/reclra_search.json` is
what was found.
"""

from absl import flags
from absl import logging
from experiments import jobs as jobs_lib
from experiments import measurement
from experiments import search as search_lib
from experiments.configs import reclra_mnist

_DATASET = flags.DEFINE_enum(
    'dataset', 'fashion_mnist', reclra_mnist.DATASETS, 'Which to search on.')
_ROWS = flags.DEFINE_list('rows', [], 'Which rows; default: all.')
_EPOCHS = flags.DEFINE_integer(
    'epochs', 5, 'Of every candidate in the first round.', 1)
_FINALISTS = flags.DEFINE_integer(
    'finalists', 3, 'How many of them are trained in full.', 1, 6)
_WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/reclra_search', "Folder of the runs' folders.")
_JOBS = flags.DEFINE_integer('jobs', 1, 'Runs at a time.', 1, jobs_lib.MOST)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file for what was found.')


def config_of(row: str, dataset: str, candidate: int, epochs: int = 0):
  """A candidate's config, as long as the table's or for so many epochs."""
  config = reclra_mnist.get_config(f'{row}:{dataset}:{candidate}')
  if epochs:
    config.epochs = epochs
  return config


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries.
  known = list(reclra_mnist.CANDIDATES)
  search_lib.check_rows(_ROWS.value, known)
  dataset = _DATASET.value
  rows = {
      row: [config_of(row, dataset, i, _EPOCHS.value)
            for i, _ in enumerate(reclra_mnist.CANDIDATES[row][1])]
      for row in _ROWS.value or known}
  accuracies = search_lib.search(rows, _WORKDIR.value, dataset, _JOBS.value)
  full = search_lib.in_full(
      {row: [config_of(row, dataset, i) for i, _ in enumerate(configs)]
       for row, configs in rows.items()},
      accuracies, _FINALISTS.value, _WORKDIR.value, dataset, _JOBS.value)
  found = {}
  for row, (finalists, best) in full.items():
    found[row] = {
        'candidates': reclra_mnist.CANDIDATES[row][1],
        'validation_accuracy': accuracies[row], 'in_full': finalists,
        'best': best}
    print(f'{dataset} {row}: best is candidate {best} of {finalists}')
  if _OUTPUT.value:
    search_lib.write(_OUTPUT.value, 'reclra_search', {
        'dataset': dataset, 'epochs': _EPOCHS.value}, found)


if __name__ == '__main__':
  measurement.run(main)
