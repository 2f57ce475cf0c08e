"""One run from config to exit code.

0: finished, or stopped by SIGTERM with everything saved. 2: refused, with one
sentence. 3: a loss or a weight was not finite. 130: stopped by Ctrl-C, saved.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

from experiments import checkpoint
from experiments import config as config_lib
from experiments import progress
from experiments import summary as summary_lib
from experiments import train
from experiments import workdir as workdir_lib
import ml_collections


def launch(
    config: ml_collections.ConfigDict, workdir: str, quiet: bool = False
) -> int:
  """Trains, or goes on training, in a folder.

  A run that is finished is not trained again; its summary is printed.

  Args:
    config: the run's config.
    workdir: the run's folder.
    quiet: do not print the summary.

  Returns:
    The exit code.

  Example:
    >>> config = config_lib.default()
    >>> launch(config, 'runs/digits')
    0
  """
  begin = time.perf_counter()
  with contextlib.ExitStack() as stack:
    stopper = stack.enter_context(progress.Stopper())
    say = _error
    try:
      try:
        folder = stack.enter_context(workdir_lib.Workdir(workdir))
        say = folder.log
        ready = _prepare(config, folder, stack)
      except ValueError as error:  # Refused; one raised later is a bug.
        say(f'error: {error}')
        return 2
      if ready is not None:
        _run(*ready, stopper, begin)
    except train.NonFiniteError as error:
      say(f'error: {error}')
      return 3
    except progress.Interrupted as error:
      say(f'stopped by {error.signal}; the same command goes on from here')
      return error.exit_code
    if not quiet:
      print(json.dumps(folder.summary(), indent=2))
    return 0


def _prepare(config, folder, stack):
  """What `_run` needs; None for a run that is finished."""
  values = config_lib.to_json(config)
  folder.check(values)
  if folder.summary() is not None:
    folder.log(f'{folder.path} is finished; nothing to do')
    return None
  run = train.setup(config, folder)
  folder.claim(values)
  if run.dataset.tokenizer:
    folder.keep('tokenizer.json', run.dataset.tokenizer)
  folder.log(run.dataset.source)
  for unit, rule in run.units.items():
    folder.log(f'{unit}: {rule}')
  checkpoints = stack.enter_context(checkpoint.Checkpoints(
      folder.checkpoints, config.keep_checkpoints,
      warn=lambda message: folder.log(f'warning: {message}')))
  return run, checkpoints, *train.start(run, checkpoints)


def _run(run, checkpoints, state, step, stopper, begin):
  stopper.deferred = True
  state, seconds = train.train(run, checkpoints, state, step, stopper)
  checkpoints.wait()
  # Everything is saved: from here on a signal may cut in.
  stopper.deferred = False
  summary = summary_lib.summarise(
      run, state, seconds, wall_time=time.perf_counter() - begin)
  run.folder.finish(summary)
  run.folder.log(
      f'finished: test accuracy {summary["test_accuracy"]:.4f}, train accuracy '
      f'{summary["train_accuracy"]:.4f}')


def _error(message):
  print(message, file=sys.stderr)
