"""The rates behind `scripts/local_fg_table3.py`, chosen on validation examples.

  python scripts/local_fg_search.py [--rows=BP,LG-FG-A] [--of=m/1/16:mnist]

Every variant has the same candidates, `CANDIDATES` of
experiments/configs/local_mixer.py: rates of Adam. Each is trained for 3 epochs
(with a cosine over these) with seed 0, and judged by its accuracy on 2,000
training examples set apart; the best two are trained again, for as long as the
table's rows. The test set is not looked at here. The best of the two, the first
of equals, belongs into `CHOSEN` there. On MNIST 55 runs, an hour on one CPU core;
the data are read from TFDS_DATA_DIR.

Runs that are finished are not trained again; `results/local_fg_search.json` is
what was found.
"""

from absl import flags
from absl import logging
import bpjax
from experiments import jobs as jobs_lib
from experiments import measurement
from experiments import search as search_lib
from experiments.configs import local_mixer

_OF = flags.DEFINE_enum(
    'of', 'm/1/16:mnist', ('s/1/1:mnist', 'm/1/16:mnist', 'm/8/16:cifar10'),
    'Size and data set to search on.')
_ROWS = flags.DEFINE_list('rows', [], 'Which variants; default: all.')
_EPOCHS = flags.DEFINE_integer(
    'epochs', 3, 'Of every candidate in the first round.', 1)
_FINALISTS = flags.DEFINE_integer(
    'finalists', 2, 'How many of them are trained in full.', 1)
_EXAMPLES = flags.DEFINE_integer(
    'train_examples', 0, 'To train on; 0: all, which is hours on CIFAR-10.', 0)
_WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/local_fg_search', "Folder of the runs' folders.")
_JOBS = flags.DEFINE_integer('jobs', 1, 'Runs at a time.', 1, jobs_lib.MOST)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file for what was found.')


def config_of(of: str, row: str, candidate: int, examples: int, epochs: int = 0):
  """A candidate's config, as long as the table's or for so many epochs."""
  config = local_mixer.get_config(f'{row}:{of}:{candidate}')
  config.epochs = epochs or config.epochs
  config.train_examples = examples
  return config


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries.
  known = bpjax.variants.names()
  search_lib.check_rows(_ROWS.value, known)
  configs = lambda row, epochs=0: [
      config_of(_OF.value, row, i, _EXAMPLES.value, epochs)
      for i, _ in enumerate(local_mixer.CANDIDATES)]
  rows = {
      row: configs(row, _EPOCHS.value) for row in _ROWS.value or known}
  prefix = _OF.value.replace('/', '_').replace(':', '_')
  accuracies = search_lib.search(rows, _WORKDIR.value, prefix, _JOBS.value)
  full = search_lib.in_full(
      {row: configs(row) for row in rows}, accuracies, _FINALISTS.value,
      _WORKDIR.value, prefix, _JOBS.value)
  found = {}
  for row, (finalists, best) in full.items():
    found[row] = {
        'validation_accuracy': accuracies[row], 'in_full': finalists,
        'best': best}
    print(f'{_OF.value} {row}: best is candidate {best} of {finalists}')
  if _OUTPUT.value:
    search_lib.write(_OUTPUT.value, 'local_fg_search', {
        'of': _OF.value, 'epochs': _EPOCHS.value,
        'train_examples': _EXAMPLES.value,
        'candidates': local_mixer.CANDIDATES}, found)


if __name__ == '__main__':
  measurement.run(main)
