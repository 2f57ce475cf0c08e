"""One run from config to exit code.

  0  finished; or stopped by SIGTERM or SIGHUP, and the same command goes on
  2  refused, with one sentence; nothing was changed
  3  a loss, a weight or feedback was not finite
  4  the disk, the folder or standard output could not be written to or read;
     once they can, the same command goes on
  5  another process of the run did not come, or is gone; once all are started
     again, the same commands go on
130  stopped by Ctrl-C, and the same command goes on

Of several processes all end with the code of the first that ends.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import json
import time
import traceback

from bpjax.train import config as config_lib
from bpjax.train import hosts as hosts_lib
from bpjax.train.folder import environment
from bpjax.train.folder import streams
from bpjax.train.folder import summary as summary_lib
from bpjax.train.folder import watching
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import build
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
from bpjax.train.loop import step as step_lib
import ml_collections


class _Refused(ValueError):
  """What was asked for cannot be done; a ValueError raised later is a bug."""


def launch(
    config: ml_collections.ConfigDict, workdir: str, quiet: bool = False,
    watch: Sequence[str] = watching.DEFAULT,
    processes: hosts_lib.Asked | None = None) -> int:
  """Trains, or goes on training, in a folder.

  A run that is finished is not trained again; its summary is printed.

  Args:
    config: the run's config.
    workdir: the run's folder.
    quiet: do not print the summary.
    watch: who is shown the metrics while it trains, of
      `bpjax.train.folder.watching.names()`. None of them changes anything else.
    processes: how several processes find each other; None: this one is alone,
      or has called `jax.distributed.initialize`.

  Returns:
    The exit code.

  Example:
    >>> config = config_lib.default()
    >>> launch(config, 'runs/digits')
    0
  """
  try:
    return _launch(config, workdir, quiet, watch, processes)
  except progress.Interrupted as error:  # While the folder was closed.
    streams.complain(progress.STOPPED.format(error.signal))
    return error.exit_code


def _launch(config, workdir, quiet, watch, processes):
  begin = time.perf_counter()
  with contextlib.ExitStack() as stack:
    complain, hosts = streams.complain, hosts_lib.Hosts()
    end = lambda code, sentence: hosts.end(code, sentence, complain)
    try:
      stopper = stack.enter_context(progress.Stopper())
      with _refusing():
        watching.check(watch)
        hosts = hosts_lib.meet(processes, config.batch_size)
        stopper.together, stopper.leaving = hosts.count > 1, hosts.end
        folder = stack.enter_context(
            workdir_lib.Follower(workdir, hosts.index) if hosts.index
            else workdir_lib.Workdir(workdir))
      complain, stopper.say = folder.complain, folder.urgent
      hosts.say = folder.urgent
      finish(config, folder, stopper, begin, watch=watch, hosts=hosts)
      hosts.close()
      if not quiet and not hosts.index:
        failure = streams.put(
            'stdout', json.dumps(folder.summary(), indent=2))
        if failure:
          complain(f'error: stdout cannot be written to ({failure}); the '
                   f'summary is in {folder.path}.')
          return streams.DISK_ERROR
    except _Refused as error:
      return end(2, f'error: {error}')
    except run_lib.NonFiniteError as error:
      return end(3, f'error: {error}')
    except progress.Interrupted as error:
      return end(error.exit_code, progress.STOPPED.format(error.signal))
    except Exception as error:
      # An error of a checkpoint, too, may come of it.
      if hosts.is_gone(error):
        why = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        return end(hosts_lib.GONE, f'{hosts_lib.LOST} ({why})')
      if isinstance(error, workdir_lib.DiskError):
        return end(streams.DISK_ERROR, f'error: {error}')
      if hosts.count == 1:
        raise
      # Python's own end would wait for threads that wait for the others.
      text = traceback.format_exc()
      hosts.end(1, f'error: {type(error).__name__}: {error}')
      streams.complain(text)
      return 1
  return 0


@contextlib.contextmanager
def _refusing():
  try:
    yield
  except ValueError as error:
    raise _Refused(str(error)) from error


def finish(
    config: ml_collections.ConfigDict, folder: workdir_lib.Workdir,
    stopper: progress.Stopper, begin: float,
    given: build.Given = build.Given(),
    watch: Sequence[str] = watching.DEFAULT,
    hosts: hosts_lib.Hosts = hosts_lib.Hosts()
) -> tuple[run_lib.Run, step_lib.TrainState] | None:
  """Does what is left of a run; nothing, and None, where it is finished.

  Args:
    config: the run's.
    folder: the run's.
    stopper: says whether a signal came.
    begin: `time.perf_counter` of when the command began.
    given: what the config does not name.
    watch: see `launch`.
    hosts: the processes that train it together.

  Raises:
    ValueError: for what cannot work, before anything is written.
  """
  with contextlib.ExitStack() as stack:
    with _refusing():
      ready = _prepare(config, folder, stopper, stack, given, watch, hosts)
    if ready is None:
      return None
    run, checkpoints, state, step = ready
    state, seconds = run_lib.train(run, checkpoints, state, step, stopper)
  summary = summary_lib.summarise(
      run, state, seconds, wall_time=time.perf_counter() - begin)
  if hosts.index:
    return
  folder.finish(summary)
  accuracies = (
      f'test accuracy {summary["test_accuracy"]:.4f}, train accuracy '
      f'{summary["train_accuracy"]:.4f}')
  folder.log(f'finished: {accuracies}' if not summary['diverged'] else (
      f'finished, but diverged: the train loss is {summary["train_loss"]:.4g}, '
      f'and was {summary["first_train_loss"]:.4g} before the first step; '
      f'{accuracies}; try a smaller `learning_rate`, or `clip_norm`'))
  return run, state


def _prepare(config, folder, stopper, stack, given, watch, hosts):
  """What training needs; None for a run that is finished."""
  values = config_lib.to_json(config)
  _check_equal(hosts, values, 'config')
  folder.check(values)
  folder.check_environment(environment.settings())
  summary = hosts.first(folder.summary)
  if summary is not None and summary['epochs'] == config.epochs:
    folder.log(f'{folder.path} is finished; nothing to do')
    return None
  folder.watch(watch, values)
  run = run_lib.setup(config, folder, given, hosts)
  surroundings = environment.describe(run.dataset)
  _check_equal(hosts, surroundings, 'surroundings')
  folder.check_environment(surroundings)
  folder.claim(values, surroundings)
  if run.dataset.tokenizer:
    folder.keep('tokenizer.json', run.dataset.tokenizer)
  folder.log(run.dataset.source)
  for unit, rule in run.units.items():
    folder.log(f'{unit}: {rule}')
  checkpoints = stack.enter_context(run_lib.checkpoints(run))
  return run, checkpoints, *run_lib.start(run, checkpoints, stopper)


def _check_equal(hosts, values, what):
  """Raises ValueError where a process was given other values than process 0."""
  first, own = hosts.share(values)[0], json.loads(json.dumps(values))
  text = config_lib.difference(first, own) if hosts.index else ''
  if text:
    raise ValueError(
        f'every process must have the same {what} as process 0: {text}; start '
        'all of them with the same command but for --process_id.')
