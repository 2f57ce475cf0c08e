"""Classes of files, by a trained run.

python -m experiments.predict --workdir=runs/digits a.png b.png [--top=3]
    [--output=FILE.csv] [--best]

Images, texts (.txt, one a line) or tables of numbers (.csv), as the run was
trained on. Prints the file, the class and its probability.
"""

import csv

from absl import flags
from experiments import after

TOP = flags.DEFINE_integer('top', 1, 'How many classes of each.')
OUTPUT = flags.DEFINE_string('output', '', 'A CSV file for the answers.')


def use(run, files):
  from bpjax.train import predict
  from bpjax.train.folder import streams

  answers = predict.predict(run, files, TOP.value)
  for a in answers:
    where = a['file'] if a['line'] is None else f'{a["file"]}:{a["line"]}'
    print(f'{streams.printable(where)}\t{streams.printable(a["class"])}\t'
          f'{a["probability"]:.4f}')
  if OUTPUT.value:
    try:
      with open(OUTPUT.value, 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, list(answers[0]))
        writer.writeheader()
        writer.writerows(answers)
    except OSError as error:
      raise ValueError(
          f'{OUTPUT.value} cannot be written ({error.strerror}); give another '
          'path.') from error


if __name__ == '__main__':
  after.start(use, takes_files=True)
