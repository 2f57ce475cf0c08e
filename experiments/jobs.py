"""The runs of a grid, one after another or side by side: of sweeps, tables, searches.

Side by side each is a process of its own. This module is both sides: `run_all`
starts the processes, and `python -m experiments.jobs` is one of them, which reads
what to train as one line of its standard input. That stays open for as long as
the grid lives: where it ends, however that was, the run saves and stops.
"""

from __future__ import annotations

if __name__ == '__main__':
  from bpjax.train.folder import signals
  signals.exit_quietly()  # While the rest is imported.

import ast
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from absl import logging
from bpjax.train.folder import signals
from bpjax.train.folder import streams
from bpjax.train.folder import watching
from bpjax.train.folder import workdir as workdir_lib
import ml_collections

MOST = 1024  # Runs at a time.
_COMMAND = [sys.executable, '-m', 'experiments.jobs']
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Job(NamedTuple):
  """One run: what it is called, its folder and its config."""
  name: str
  folder: str
  config: ml_collections.ConfigDict


class Stopped(Exception):
  """The runs were asked to stop, and have.

  Attributes:
    exit_code: see `signals.exit_code`.
  """

  def __init__(self, exit_code: int):
    super().__init__(exit_code)
    self.exit_code = exit_code


def check(at_once: int) -> None:
  """Raises ValueError for a number of runs at a time that makes no sense."""
  if not 1 <= at_once <= MOST:
    raise ValueError(
        f'`jobs` must be from 1 to {MOST} runs at a time, got {at_once}.')


def check_device(at_once: int) -> None:
  """Raises ValueError where processes cannot share the device; loads JAX."""
  if at_once > 1:
    import jax
    if jax.default_backend() != 'cpu':
      raise ValueError(
          f'`jobs` must be 1 on a {jax.default_backend()}, which processes do '
          'not share; leave it out, or set JAX_PLATFORMS=cpu.')


def run_all(
    jobs: Sequence[Job], at_once: int = 1,
    watch: Sequence[str] = watching.DEFAULT) -> list[int]:
  """Trains what is not finished, and says on stderr what is going on.

  Args:
    jobs: the runs, in the order in which they are begun.
    at_once: how many are trained at a time; 1: in this process.
    watch: who is shown the metrics, see `bpjax.train.folder.watching`.

  Returns:
    The exit codes, see `bpjax.train.loop.launch`.

  Raises:
    Stopped: where a signal asked a run to stop, once all have.

  Example:
    >>> run_all([Job('backprop', 'runs/backprop', config)])
    [0]
  """
  from bpjax.train.loop import launch  # Loads JAX.
  many = len(jobs)
  say = lambda i, line: streams.put('stderr', f'[{i + 1}/{many}] {line}')
  codes, rest = {}, []
  for i, job in enumerate(jobs):
    # A finished run needs no process that finds it finished.
    summary = workdir_lib.read_summary(job.folder)
    if at_once > 1 and (summary or {}).get('epochs') != job.config.epochs:
      rest.append((i, job))
      continue
    say(i, job.name)
    codes[i] = launch.launch(job.config, job.folder, quiet=True, watch=watch)
    if codes[i] == 130 or (
        codes[i] == 0 and workdir_lib.read_summary(job.folder) is None):
      raise Stopped(codes[i])
  if rest:
    codes |= _side_by_side(rest, min(at_once, len(rest)), watch, say)
  return [codes[i] for i in range(many)]


def _side_by_side(
    jobs: Sequence[tuple[int, Job]], processes: int, watch: Sequence[str],
    say: Callable[[int, str], None]) -> dict[int, int]:
  """Runs jobs in some processes at a time, in their order.

  Each process gets its share of the cores. Signals that ask this process to
  stop are handed on to all of them; a second one stops them at once.

  Args:
    jobs: pairs (number, job).
    processes: how many at a time.
    watch: who is shown the metrics, see `bpjax.train.folder.watching`.
    say: `(number, line)`, called for what a run says, from several threads.

  Returns:
    number -> exit code of the run; one that a signal has killed has 128 and
    the signal's number.

  Raises:
    Stopped: once all have stopped, where a signal asked for it.
  """
  crew = _Crew(watch, say, _environment())
  rest, lock = iter(jobs), threading.Lock()
  codes = {}

  def work(cores):
    if cores:  # Of this thread, and so of the processes that it starts.
      os.sched_setaffinity(0, cores)
    while True:
      with lock:
        number, job = next(rest, (-1, None))
      if job is None:
        return
      code = crew.run(number, job)
      if code is None:
        return
      codes[number] = code

  shares = _shares(processes)
  with crew.listening(), futures.ThreadPoolExecutor(processes) as pool:
    for done in [pool.submit(work, cores) for cores in shares]:
      done.result()
  if crew.stopped is not None:
    raise Stopped(crew.stopped)
  return codes


class _Crew:
  """The processes that run now, and whether they were asked to stop."""

  def __init__(self, watch, say, environment):
    self._watch, self._say = list(watch), say
    self._environment = environment
    self._lock = threading.RLock()  # A second signal meets the first one's.
    self._running: set[subprocess.Popen] = set()
    self.stopped: int | None = None  # The exit code of what asked.

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Hands signals on; puts back who listened before."""
    before = {
        number: signal.signal(number, lambda n, _: self.stop(n))
        for number in signals.heeded()}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def stop(self, number: int) -> None:
    """Asks all to stop, by a signal; starts none any more."""
    if self.stopped is None:
      self.stopped = signals.exit_code(number)
    with self._lock:
      for process in self._running:
        process.send_signal(number)

  def run(self, number: int, job: Job) -> int | None:
    """The exit code of a run; None once it was asked to stop."""
    # A session of its own: Ctrl-C on a terminal reaches the sweep alone, which
    # hands it on once.
    with self._lock:
      if self.stopped is not None:
        return None
      process = subprocess.Popen(
          _COMMAND, stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
          start_new_session=True, env=self._environment)
      self._running.add(process)
    assert process.stdin and process.stderr
    with process.stderr:
      self._say(number, job.name)
      with contextlib.suppress(OSError):  # It has ended; its code says more.
        process.stdin.write(f'{_order(job, self._watch)!r}\n'.encode())
        process.stdin.flush()
      for line in process.stderr:
        self._say(number, line.decode(errors='replace').rstrip())
      code = process.wait()
    with contextlib.suppress(OSError):
      process.stdin.close()
    with self._lock:
      self._running.discard(process)
    if self.stopped is not None:
      return None
    if code == 130 or (
        code == 0 and workdir_lib.read_summary(job.folder) is None):
      self.stopped = code  # Somebody stopped this one: so do the others.
      self.stop(signal.SIGTERM)
      return None
    return code if code >= 0 else 128 - code


def _cores():
  """The cores that this process may use; None where nobody can tell."""
  if not hasattr(os, 'sched_setaffinity'):
    return None
  return sorted(os.sched_getaffinity(0))


def _shares(processes):
  """The cores of each process; None where a system has no such thing."""
  cores = _cores()
  if cores is None:
    return [None] * processes
  return [
      cores[i::processes] or [cores[i % len(cores)]] for i in range(processes)]


def _environment():
  """The environment of a process."""
  environment, cores = dict(os.environ), _cores()
  path = filter(None, [_ROOT, environment.get('PYTHONPATH')])
  environment['PYTHONPATH'] = os.pathsep.join(path)
  if cores is not None:
    # XLA cuts large sums by the number of its threads, which decides their last
    # bits: as many as a run would have that had all cores, on fewer of them.
    environment.setdefault('NPROC', str(len(cores)))
  return environment


def _order(job, watch):
  """What a process is told: literals of Python, which keep every bit."""
  return {'config': _literal(job.config.to_dict()), 'folder': job.folder,
          'watch': watch}


def _literal(value: Any) -> Any:
  """A value of a config, of Python's own types alone."""
  if isinstance(value, dict):
    return {str(k): _literal(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(_literal, value))
  for kind in (bool, int, float, str):
    if isinstance(value, kind):
      return kind(value)
  return value


def main() -> int:
  """One run, as it was ordered on standard input; returns its exit code."""
  logging.set_verbosity(logging.ERROR)
  order = ast.literal_eval(sys.stdin.buffer.readline().decode())

  def watch_over():
    sys.stdin.buffer.read()  # Until the sweep has ended.
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch_over, daemon=True).start()
  from bpjax.train.loop import launch
  return launch.launch(
      ml_collections.ConfigDict(order['config']), order['folder'], quiet=True,
      watch=order['watch'])


if __name__ == '__main__':
  streams.guarded(lambda: sys.exit(main()))
