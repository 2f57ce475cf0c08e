"""Trains one network with one rule.

python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/digits [--config.rule=kolen_pollack ...]
    [--watch=tensorboard,wandb]

TensorBoard's event files lie in the run's folder; --watch= writes none.

Several processes, on one host or many, train together, each started with

    --coordinator=HOST:PORT --num_processes=N --process_id=I

or, under SLURM, Open MPI, a TPU pod or GKE, with --distributed; all are to come
within --timeout seconds (300), and one that gives no sign of life for
--heartbeat seconds (100) counts as gone. See docs/hosts.md.

Exit codes: 0, finished, or stopped by SIGTERM or SIGHUP; 2, refused; 3, a loss
or a weight was not finite; 4, something could not be written or read; 5,
another process did not come, or is gone; 130, stopped by Ctrl-C. After 0, 4, 5
and 130 the same command goes on where it was.
"""

if __name__ == '__main__':
  from bpjax.train.folder import signals
  signals.exit_quietly()  # While the rest is imported.

import sys

from absl import app
from absl import flags
from absl import logging
from bpjax.train import config as config_lib
from bpjax.train import hosts as hosts_lib
from bpjax.train.folder import streams
from bpjax.train.folder import watching
from experiments import config as flags_lib

CONFIG = flags_lib.define_flag()
WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
WATCH = flags.DEFINE_list(
    'watch', list(watching.DEFAULT),
    'Who is shown the metrics while runs train: tensorboard, wandb, aim; empty: '
    'nobody.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0, where all processes meet.')
NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'How many processes train together.')
PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0.')
DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False,
    'Take the three from SLURM, Open MPI, a TPU pod or GKE.')
TIMEOUT = flags.DEFINE_integer(
    'timeout', 300, 'Seconds to wait until all processes are there.')
HEARTBEAT = flags.DEFINE_integer(
    'heartbeat', 100,
    'Seconds without a sign of life until a process counts as gone.')
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
  processes = hosts_lib.Asked(
      COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value,
      DISTRIBUTED.value, TIMEOUT.value, HEARTBEAT.value)
  try:
    watching.check(WATCH.value)
    config_lib.check(CONFIG.value)
    processes.check(CONFIG.value.batch_size)
  except ValueError as error:
    refuse(error)
  from bpjax.train.loop import (
    launch,  # Loads JAX, which a wrong value need not.
  )
  sys.exit(launch.launch(
      CONFIG.value, WORKDIR.value, watch=WATCH.value, processes=processes))


if __name__ == '__main__':
  streams.guarded(lambda: app.run(main, flags_parser=parse))
