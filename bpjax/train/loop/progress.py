"""What a person sees while a run trains, and how a run is asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import datetime
import os
import select
import signal
import socket
import sys
import threading
import time

from bpjax.train.folder import signals
from bpjax.train.folder import streams
import rich.console
import rich.progress

STOPPED = 'stopped by {}; the same command goes on from here'
_PATIENCE = 1.  # Seconds until a signal that the main thread ignores acts.

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


class Interrupted(KeyboardInterrupt):
  """A signal asked the run to stop.

  No Exception: what handles errors must not take it for one. A
  KeyboardInterrupt, since asyncio lets those through.

  Attributes:
    number: its number.
    signal: its name.
    exit_code: see `signals.exit_code`.
  """

  def __init__(self, number: int):
    super().__init__()
    self.number = number
    self.signal = signal.Signals(number).name
    self.exit_code = signals.exit_code(number)


def _silence():
  """Says nothing of an `Interrupted` that a destructor met: the thread knows."""
  before = sys.unraisablehook
  if getattr(before, 'knows', None) is Interrupted:
    return

  def hook(unraisable):
    if not isinstance(unraisable.exc_value, Interrupted):
      before(unraisable)

  setattr(hook, 'knows', Interrupted)
  sys.unraisablehook = hook


class Stopper:
  """Turns signals into `Interrupted`, where it does no harm.

  The first signal is raised at once or, within `deferring`, kept for `check`;
  within `reading`, for its end. A second one ends the process at once; all that
  lies on the disk is whole at any time. A thread watches, since Python's own
  handlers wait for compiled code, and what they raise within a destructor is lost:
  where nothing has to be saved it ends the process after a moment, else it says
  that the signal was heard.

  Of several processes each hears for itself, and none acts on it within
  `deferring` until `ask` says that all do. Outside the main thread, where Python
  hears no signals, nothing is turned into anything.

  Attributes:
    asked: the exception to raise, or None.
    heard: the same, of this process alone.
    together: whether there are other processes.
    say: takes what the thread has to say; must not wait for other threads.
    leaving: called with exit code and sentence where the thread ends the process.

  Example:
    >>> with Stopper() as stopper, stopper.deferring():
    ...   state = step(state)
    ...   stopper.check()
  """

  def __init__(self, say: Callable[[str], None] = streams.urgent):
    self.asked: Interrupted | None = None
    self.heard: Interrupted | None = None
    self.together = False
    self.say = say
    self.leaving: Callable[[int, str], object] = lambda code, sentence: None
    self._free_since: float | None = 0.  # None: deferring.
    self._reading = False
    self._before = {}

  def __enter__(self) -> Stopper:
    _silence()
    self._read, self._write = socket.socketpair()
    self._write.setblocking(False)
    if threading.current_thread() is not threading.main_thread():
      self._wakeup = None
      return self
    for number in signals.heeded():
      self._before[number] = signal.signal(number, self._ask)
    self._wakeup = signal.set_wakeup_fd(
        self._write.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *error):
    self._free_since = None  # What comes from here on comes too late.
    if self._wakeup is None:
      self._read.close()
    else:
      signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._write.close()  # Ends the thread.

  @contextlib.contextmanager
  def deferring(self) -> Iterator[None]:
    """Signals are kept, for `check` to raise; at the end they are raised."""
    self._free_since = None
    try:
      yield
    finally:
      self._free_since = time.monotonic()
    if self.heard:
      raise self.heard

  @contextlib.contextmanager
  def reading(self) -> Iterator[None]:
    """A signal is raised at the end; the thread does not wait for that long.

    For reads by other libraries, whose coroutines lose an exception of ours, or
    raise it as one of theirs, so that a whole file looks damaged.
    """
    self._reading = True
    try:
      yield
    finally:
      self._reading = False
    if self.heard:
      raise self.heard

  def check(self) -> None:
    """Raises what was asked for, if anything was."""
    if self.asked:
      raise self.asked

  def ask(self, number: int) -> None:
    """Asks for what a signal asks for."""
    if self.asked is None:
      self.asked = self.heard = self.heard or Interrupted(number)

  def _ask(self, number, frame):
    del frame
    if self.heard is None:  # At a second one the thread ends the process.
      self.heard = Interrupted(number)
      if not self.together:
        self.asked = self.heard
      if self._free_since is not None and not self._reading:
        raise self.heard

  def _watch(self):
    """Ends the process where the main thread does not, or not soon enough."""
    first, heard, said = None, 0., False
    with self._read:
      while True:
        pause = None if first is None else _PATIENCE / 10
        if select.select([self._read], [], [], pause)[0]:
          data = self._read.recv(16)
          if not data:
            return
          for number in data:
            if number in self._before:
              if first is not None:
                self._end(number)
              first, heard = number, time.monotonic()
          continue
        free_since = self._free_since
        if time.monotonic() < max(heard, free_since or 0.) + _PATIENCE:
          continue
        if free_since is not None:
          self._end(first)
        if not said:
          said = True
          self.say(
              f'{signal.Signals(first).name} was heard; the run stops once this '
              'step is taken and saved, and at once at a second signal')

  def _end(self, number):
    sentence = STOPPED.format(signal.Signals(number).name)
    self.say(sentence)
    self.leaving(signals.exit_code(number), sentence)
    os._exit(signals.exit_code(number))
