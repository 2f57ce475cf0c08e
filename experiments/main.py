"""Trains one network with one rule.

python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/digits [--config.rule=kolen_pollack ...]
"""

import sys

from absl import app
from absl import flags
from absl import logging
from experiments import config as config_lib

CONFIG = config_lib.define_flag()
WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
flags.mark_flags_as_required(['config', 'workdir'])


def parse(argv: list[str]) -> list[str] | None:
  """Parses the command line, or exits with one sentence and code 2."""
  try:
    return config_lib.parse_flags(argv)
  except ValueError as error:
    refuse(error)


def refuse(error: ValueError) -> None:
  """Prints the one sentence of a refused command, and ends it with code 2."""
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # Of libraries; a run has its own log.
  try:
    config_lib.check(CONFIG.value)
  except ValueError as error:
    refuse(error)
  from experiments import launch  # Loads JAX, which a wrong value need not.
  sys.exit(launch.launch(CONFIG.value, WORKDIR.value))


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
