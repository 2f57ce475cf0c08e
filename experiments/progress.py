"""What a person sees while a run trains, and how a run is asked to stop."""

from __future__ import annotations

import datetime
import signal
import time

import rich.console
import rich.progress


class Progress:
  """A bar with throughput and time left, on a terminal; else nothing is drawn.

  Example:
    >>> with Progress(console, total=1000, start=0, batch_size=128) as progress:
    ...   progress.advance(10)
  """

  def __init__(
      self, console: rich.console.Console, total: int, start: int,
      batch_size: int):
    """Starts to measure.

    Args:
      console: where the bar is drawn.
      total: number of steps of the run.
      start: steps that were taken before.
      batch_size: examples per step.
    """
    self._total, self._start, self._step = total, start, start
    self._batch_size = batch_size
    self._begin = time.perf_counter()
    self._bar = rich.progress.Progress(
        rich.progress.TextColumn('step {task.completed}/{task.total}'),
        rich.progress.BarColumn(),
        rich.progress.TextColumn('{task.fields[speed]}'),
        console=console, disable=not console.is_terminal, transient=True)
    self._task = self._bar.add_task(
        '', total=total, completed=start, speed='')

  def __enter__(self) -> Progress:
    self._bar.start()
    return self

  def __exit__(self, *error):
    self._bar.stop()

  def advance(self, steps: int) -> None:
    """Counts steps that were taken."""
    self._step += steps
    self._bar.update(self._task, completed=self._step, speed=self.speed())

  def speed(self) -> str:
    """Throughput since the start and time left, such as `9,100 examples/s`."""
    seconds = time.perf_counter() - self._begin
    done = self._step - self._start
    if not done:
      return ''
    left = datetime.timedelta(
        seconds=round(seconds / done * (self._total - self._step)))
    return f'{done * self._batch_size / seconds:,.0f} examples/s, {left} left'


class Interrupted(Exception):
  """SIGTERM or SIGINT asked the run to stop.

  Attributes:
    signal: its name.
    exit_code: 0 for SIGTERM, which a scheduler sends; 130 for SIGINT.
  """

  def __init__(self, number: int):
    super().__init__()
    self.signal = signal.Signals(number).name
    self.exit_code = 130 if number == signal.SIGINT else 0


class Stopper:
  """Turns SIGTERM and SIGINT into `Interrupted`, where it does no harm.

  Attributes:
    deferred: false: the exception comes at once. True: `asked` is set, and the
      trainer raises it when it has saved. A second signal acts as if there were
      no Stopper.
    asked: the exception to raise, or None.
  """

  def __init__(self):
    self.deferred = False
    self.asked: Interrupted | None = None
    self._before = {}

  def __enter__(self) -> Stopper:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._ask)
    return self

  def __exit__(self, *error):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    del frame
    signal.signal(number, self._before[number])
    self.asked = Interrupted(number)
    if not self.deferred:
      raise self.asked
