"""Trains one network with one rule.

python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/digits [--config.rule=kolen_pollack ...]
    [--watch=tensorboard,wandb]

TensorBoard's event files lie in the run's folder; --watch= writes none.

Exit codes: 0, finished, or stopped by SIGTERM or SIGHUP; 2, refused; 3, a loss
or a weight was not finite; 4, something could not be written or read; 130,
stopped by Ctrl-C. After 0, 4 and 130 the same command goes on where it was.
"""

if __name__ == '__main__':
  from bpjax.train.folder import signals
  signals.exit_quietly()  # While the rest is imported.

import sys

from absl import app
from absl import flags
from absl import logging
from bpjax.train import config as config_lib
from bpjax.train.folder import streams
from bpjax.train.folder import watching
from experiments import config as flags_lib

CONFIG = flags_lib.define_flag()
WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
WATCH = flags.DEFINE_list(
    'watch', ['tensorboard'],
    'Who is shown the metrics while runs train: tensorboard, wandb; empty: '
    'nobody.')
flags.mark_flags_as_required(['config', 'workdir'])


def parse(argv: list[str]) -> list[str] | None:
  """Parses the command line, or exits with one sentence and code 2."""
  try:
    return flags_lib.parse_flags(argv)
  except ValueError as error:
    refuse(error)


def refuse(error: ValueError) -> None:
  """Prints the one sentence of a refused command, and ends it with code 2."""
  streams.complain(f'error: {error}')
  sys.exit(2)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries; a run has its own log.
  try:
    watching.check(WATCH.value)
    config_lib.check(CONFIG.value)
  except ValueError as error:
    refuse(error)
  from bpjax.train.loop import (
    launch,  # Loads JAX, which a wrong value need not.
  )
  sys.exit(launch.launch(
      CONFIG.value, WORKDIR.value, watch=WATCH.value))


if __name__ == '__main__':
  streams.guarded(lambda: app.run(main, flags_parser=parse))
