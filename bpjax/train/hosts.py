"""Several processes as one run: how they meet, agree, and end together.

Each process is started with the same command but for its number. They meet at
process 0 (`jax.distributed`); from then on arrays are global, process 0 alone
writes logs, metrics and the summary, and all take part in checkpoints.

  process 0   word of the end  <----  process 1 was asked to stop, or failed
     |                                    |
  a collective  <------- steps ------->  a collective

A process that ends before the others leaves word of it, why and with which exit
code, and they end with the same code. One that is killed leaves none: then the
heartbeat of JAX's coordination service, or a collective that fails, ends the
others with one sentence and `GONE`.

Nothing here loads JAX before `meet`.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from typing import Any

from bpjax.train.folder import streams

GONE = 5  # The exit code where another process did not come, or is gone.
_END, _LEFT, _SHARED = 'bpjax/end', 'bpjax/left', 'bpjax/shared'
_LINGER = 5.  # Seconds in which the others may read why process 0 leaves.
_GRACE = 2.  # Seconds in which a process that knows by itself ends by itself.
_SHUTDOWN = 60.  # Seconds for all to leave a run that is finished.
_DAY = 24 * 3600 * 1000  # Milliseconds.
_LEAST_HEARTBEAT = 5  # Those of busy processes come late.
# What errors say when a process at the other end is gone.
_SIGNS = (
    'gloo', 'nccl', 'coordination', 'distributed service', 'closed by peer',
    'heartbeat', 'socket closed', 'connection reset', 'barrier')
LOST = (
    'error: another process of this run is gone; the same commands go on from '
    'the last checkpoint')


_KEPT = []  # What C calls must not be freed.


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a command says of the processes of its run.

  Attributes:
    coordinator: 'HOST:PORT' of process 0, where the others find it; '': none.
    num_processes: how many processes there are; None: not said.
    process_id: which of them this is, from 0; None: not said.
    distributed: whether to take the three from SLURM, Open MPI, a TPU pod or
      GKE, as `jax.distributed.initialize` finds them.
    timeout: seconds to wait until all are there.
    heartbeat: seconds without a sign of life until a process counts as gone.

  Example:
    >>> Asked('10.0.0.1:1234', num_processes=2, process_id=0).check(128)
  """
  coordinator: str = ''
  num_processes: int | None = None
  process_id: int | None = None
  distributed: bool = False
  timeout: int = 300
  heartbeat: int = 100

  @property
  def several(self) -> bool:
    """Whether anything was said at all."""
    return self.distributed or bool(self.coordinator)

  def check(self, batch_size: int) -> None:
    """Raises ValueError for what no run can have. Loads no JAX.

    Args:
      batch_size: examples of a batch, over all processes.
    """
    given = {
        'coordinator': self.coordinator or None,
        'num_processes': self.num_processes, 'process_id': self.process_id}
    missing = [name for name, value in given.items() if value is None]
    if self.timeout < 1:
      raise ValueError(
          f'`timeout` must be at least 1 second, got {self.timeout}.')
    if self.heartbeat < _LEAST_HEARTBEAT:
      raise ValueError(
          f'`heartbeat` must be at least {_LEAST_HEARTBEAT} seconds, since those '
          f'of busy processes come late, got {self.heartbeat}.')
    if self.distributed and len(missing) < 3:
      raise ValueError(
          '`distributed` finds the other processes by itself, so that '
          '`coordinator`, `num_processes` and `process_id` must be left out, '
          f'got {", ".join(n for n in given if n not in missing)}; choose one '
          'of the two ways.')
    if len(missing) == 3:
      return
    if self.num_processes is None or self.process_id is None or missing:
      raise ValueError(
          '`coordinator`, `num_processes` and `process_id` go together, and '
          f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} '
          'missing; give all three, or --distributed.')
    host, colon, port = self.coordinator.rpartition(':')
    if not (host and colon and port.isascii() and port.isdigit()
            and 0 < int(port) < 2**16):
      raise ValueError(
          f'`coordinator` must be HOST:PORT, got {self.coordinator!r}; give '
          'the address of process 0 and a free port there, such as '
          '10.0.0.1:1234.')
    if self.num_processes < 1:
      raise ValueError(
          f'`num_processes` must be at least 1, got {self.num_processes}.')
    if not 0 <= self.process_id < self.num_processes:
      raise ValueError(
          f'`process_id` must be from 0 to {self.num_processes - 1}, one less '
          f'than `num_processes`, got {self.process_id}.')
    _check_batch(batch_size, self.num_processes)


def _check_batch(batch_size, count):
  if batch_size % count:
    raise ValueError(
        f'`batch_size` must be divisible by the {count} processes, which share '
        f'every batch, got {batch_size}; choose a multiple of {count}.')


class Hosts:
  """The processes of a run; here one alone, which agrees with itself.

  Attributes:
    count: how many there are.
    index: which of them this is; 0 writes.
  """
  count = 1
  index = 0

  def share(self, value: Any) -> list[Any]:
    """The values of all processes, in their order; JSON can hold them.

    Every process has to call it, and waits for the others.
    """
    return [value]

  def first(self, function: Callable[[], Any]) -> Any:
    """What `function` returns at process 0, which alone calls it."""
    return function()

  def agree(self, stopper: Any, seconds: float = 0.) -> float:
    """Makes a signal that one process heard one that was asked of all.

    Args:
      stopper: a `progress.Stopper`, or None.
      seconds: any number.

    Returns:
      The largest `seconds` of all processes.
    """
    del stopper
    return seconds

  def end(self, code: int, sentence: str,
          complain: Callable[[str], None] | None = None) -> int:
    """Says why this process ends, here and to the others; returns `code`."""
    if complain is not None:
      complain(sentence)
    return code

  def is_gone(self, error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    del error
    return False

  def close(self) -> None:
    """Waits for the others at the end of a run that went well."""


class _Several(Hosts):
  """More than one process, which have met."""

  def __init__(self, count: int, index: int, ours: bool):
    from jax._src import distributed  # The store has no public name.
    self.count, self.index = count, index
    self._client = distributed.global_state.client
    self._ours = ours
    self._turns = itertools.count()
    self._ending = threading.Lock()  # Who has it says why the process ends.
    self._stopping = False  # Whether all have agreed to.
    self.say = streams.urgent
    threading.Thread(target=self._listen, daemon=True).start()

  def share(self, value):
    place = f'{_SHARED}/{next(self._turns)}'
    self._client.key_value_set(f'{place}/{self.index}', json.dumps(value))
    if self.index == 0:
      texts = [self._client.blocking_key_value_get(f'{place}/{i}', _DAY)
               for i in range(self.count)]
      self._client.key_value_set(f'{place}/all', f'[{", ".join(texts)}]')
    return json.loads(
        self._client.blocking_key_value_get(f'{place}/all', _DAY))

  def first(self, function):
    return self.share(function() if self.index == 0 else None)[0]

  def agree(self, stopper, seconds=0.):
    import jax.experimental.multihost_utils as multihost
    import numpy as np
    heard = stopper.heard.number if stopper and stopper.heard else 0
    found = multihost.process_allgather(np.float32([heard, seconds]))
    if stopper and found[:, 0].any():
      self._stopping = True
      stopper.ask(int(found[:, 0].max()))
    return float(found[:, 1].max())

  def end(self, code, sentence, complain=None):
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # Another thread ends this process.
    super().end(code, sentence, complain)
    self._leave_word(code, sentence)
    return code

  def is_gone(self, error):
    while error is not None:
      text = f'{type(error).__name__} {error}'.lower()
      if any(sign in text for sign in _SIGNS):
        # It may have left word, which says more.
        time.sleep(2 * _GRACE)
        return True
      error = error.__cause__
    return False

  def close(self):
    self.share('finished')
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # Another thread ends this process.
    if self._ours:
      import jax
      timer = threading.Timer(_SHUTDOWN, os._exit, [0])  # All is written.
      timer.daemon = True
      timer.start()
      jax.distributed.shutdown()
      timer.cancel()

  def gone(self) -> None:
    """Ends this process, since another one is gone; from any thread."""
    if self._ending.acquire(blocking=False):
      self.say(LOST)
      os._exit(GONE)

  def _leave_word(self, code, sentence):
    """Tells the others, of whom the first to do so is believed."""
    with contextlib.suppress(RuntimeError):  # There may be nobody to tell.
      with contextlib.suppress(RuntimeError):
        self._client.key_value_set(
            _END, json.dumps([self.index, code, sentence]))
      self._client.key_value_set(f'{_LEFT}/{self.index}', '')
      until = time.monotonic() + _LINGER
      # The store goes with process 0.
      while self.index == 0 and time.monotonic() < until and len(
          self._client.key_value_dir_get(_LEFT)) < self.count:
        time.sleep(.05)

  def _listen(self):
    """Ends this process as soon as another one leaves word that it does."""
    while True:
      try:
        text = self._client.blocking_key_value_get(_END, _DAY)
        break
      except RuntimeError as error:  # JAX's own is one.
        if 'DEADLINE' not in str(error):
          return  # The run is over, or process 0 is gone.
    index, code, sentence = json.loads(text)
    if self._stopping:
      return  # This one is still saving.
    time.sleep(_GRACE)
    if index != self.index and self._ending.acquire(blocking=False):
      self.say(f'process {index} ended: {sentence}')
      self._leave_word(code, sentence)
      os._exit(code)


def meet(asked: Asked | None, batch_size: int) -> Hosts:
  """Waits until all processes of a run are there.

  Where they do not come in time, the process ends with one sentence and `GONE`.
  A program that has called `jax.distributed.initialize` itself is left as it is.

  Args:
    asked: what the command says; None: nothing.
    batch_size: examples of a batch, over all processes.

  Raises:
    ValueError: if `distributed` finds no engine, or the batch cannot be shared.

  Example:
    >>> meet(None, batch_size=128).count
    1
  """
  asked = asked or Asked()
  native = None
  if not _has_met():
    if not asked.several:
      return Hosts()
    native = _Native()
    where = asked.coordinator or 'the coordinator'
    timer = threading.Timer(asked.timeout, _late, [where, asked.timeout])
    timer.daemon = True
    timer.start()
    _initialize(asked)
    timer.cancel()
  import jax
  count, index = jax.process_count(), jax.process_index()
  _check_batch(batch_size, count)
  if count == 1:
    return Hosts()
  hosts = _Several(count, index, ours=native is not None)
  if native is not None:
    native.on_abort(hosts.gone)
  return hosts


def _has_met():
  import jax
  return jax.distributed.is_initialized()


def _initialize(asked):
  """Calls `jax.distributed.initialize`, or raises ValueError."""
  import jax
  # Its handler of SIGTERM would take the place of ours, which all agree on.
  if hasattr(jax.config, 'jax_enable_preemption_service'):
    jax.config.update('jax_enable_preemption_service', False)
  given = {}
  if asked.coordinator:
    # Not the devices that SLURM or Open MPI would choose for a process.
    given = {
        'coordinator_address': asked.coordinator,
        'num_processes': asked.num_processes, 'process_id': asked.process_id,
        'cluster_detection_method': 'deactivate'}
  try:
    jax.distributed.initialize(
        **given,
        # Our own timer comes first, with one sentence.
        initialization_timeout=asked.timeout + 60,
        heartbeat_timeout_seconds=asked.heartbeat)
  except ValueError as error:
    if asked.coordinator:
      raise
    raise ValueError(
        '`distributed` finds no SLURM, Open MPI, TPU pod or GKE around it; give '
        '--coordinator, --num_processes and --process_id.') from error


def _late(where, timeout):
  streams.complain(
      f'error: not all processes came to {where} within {timeout} seconds; '
      'start every --process_id once, with the same --coordinator and '
      '--num_processes, or give a longer --timeout')
  os._exit(GONE)


class _Native:
  """What compiled code prints, kept aside: Python's streams go where they went.

  JAX's coordination service ends a process whose peer is gone by an abort with
  a page of text, and its collectives write to standard output, where a summary
  is expected. The text is shown if the abort has another reason.
  """

  def __init__(self):
    self._file = tempfile.TemporaryFile()  # pylint: disable=consider-using-with
    for name, descriptor in (('stdout', 1), ('stderr', 2)):
      getattr(sys, name).flush()
      setattr(sys, name, open(  # pylint: disable=consider-using-with
          os.dup(descriptor), 'w', buffering=1, encoding='utf-8',
          errors='backslashreplace'))
      os.dup2(self._file.fileno(), descriptor)
    streams.ERRORS = sys.stderr.fileno()
    self._gone: Callable[[], None] = self._leave
    # C calls it: Python's own handlers would wait for the main thread.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(
        signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))
    _KEPT.append(self)

  def on_abort(self, gone: Callable[[], None]) -> None:
    """Says what to do where JAX aborts since another process is gone."""
    self._gone = gone

  def _leave(self):
    streams.urgent(LOST)
    os._exit(GONE)

  def _aborted(self, number):
    del number
    os.lseek(self._file.fileno(), 0, os.SEEK_SET)
    text = self._file.read().decode(errors='replace')
    if any(sign in text.lower() for sign in (
        'distributed service', 'coordination service')):
      self._gone()
      time.sleep(2 * _LINGER)  # Another thread ends this process.
      os._exit(GONE)
    os.write(streams.ERRORS, text.encode())
