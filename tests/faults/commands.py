"""One command of the launcher in a child, warm, with one fault in it."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import sys
import threading
import time
from typing import Any

import bpjax
from bpjax.train import config as config_lib
from bpjax.train.folder import signals
from bpjax.train.folder import summary
from bpjax.train.loop import launch
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
import jax
import numpy as np
import sklearn.datasets

# Imported before a fork, as all that takes time.
assert sklearn.datasets and bpjax.models.mlp and bpjax.rules.kolen_pollack
CODES = {0, 2, 3, 4, 130}
_EVENTS = (
    'open', 'os.listdir', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir',
    'os.scandir', 'os.truncate', 'shutil.rmtree')
_LONGEST = 300.  # Seconds of a child; more is a hang.


def config(seed: int = 0) -> config_lib.ml_collections.ConfigDict:
  """A run of 3 epochs of 6 steps with all that a checkpoint could forget."""
  c = config_lib.default()
  c.rule, c.optimizer, c.seed = 'kolen_pollack', 'momentum', seed
  c.learning_rate, c.schedule, c.weight_decay = .05, 'cosine', 1e-3
  c.batch_size, c.eval_batch_size, c.epochs = 50, 360, 3
  c.train_examples, c.validation = 300, 60
  c.checkpoint_every, c.log_every, c.steps_per_call = 4, 3, 100
  c.model_args.widths = (8,)
  c.model_args.dropout = .1
  return c


@dataclasses.dataclass
class Result:
  """How a command ended.

  Attributes:
    code: its exit code; negative for a signal that killed it.
    out: what it printed.
    error: what it printed to stderr.
    state: a hash of the last state, '' where it did not train to the end.
    seconds: until it ended; `stopped`: since it was signalled, or 0.
    operations: of files in its folder, where they were counted.
  """
  code: int
  out: str = ''
  error: str = ''
  state: str = ''
  seconds: float = 0.
  stopped: float = 0.
  operations: int = 0

  @property
  def problem(self) -> str:
    """What no command may do; '' if it did none of it."""
    said = self.error + self.out
    if 'Traceback' in said or 'Fatal' in said:
      return 'traceback'
    if self.code not in CODES:
      return f'code {self.code}'
    # As a terminal would show it; a full stderr says nothing.
    errors = re.findall('^error: .*', said, re.M)
    if self.code in (2, 3, 4) and len(errors) != 1 and said:
      return f'{len(errors)} sentences'
    return ''


@dataclasses.dataclass
class Fault:
  """What is done to a command while it runs.

  Attributes:
    operation: number of the file operation at which it happens; -1: none.
    after: seconds after which it happens instead.
    step: step of training after which it happens instead.
    numbers: signals that are sent then.
    error: the errno of that operation and of all later ones that write.
    limit: the largest size of a file, in bytes.
    stdout: 'full', 'closed', 'pipe' (that nobody reads) or ''; `stderr`
      likewise.
  """
  operation: int = -1
  after: float = 0.
  step: int = 0
  numbers: tuple[int, ...] = ()
  error: int = 0
  limit: int = 0
  stdout: str = ''
  stderr: str = ''


def run(folder: pathlib.Path, fault: Fault = Fault(), seed: int = 0) -> Result:
  """Runs the launcher in a child, and waits for it."""
  scratch = folder.with_name(f'{folder.name}.said')
  scratch.mkdir(exist_ok=True)
  for file in scratch.iterdir():
    file.unlink()
  begin = time.monotonic()
  child = os.fork()
  if not child:
    code = 70
    try:
      _become(scratch, fault)
      code = _launch(folder, scratch, fault, seed)
    except BaseException:  # pylint: disable=broad-exception-caught
      sys.excepthook(*sys.exc_info())
    finally:
      for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
          stream and stream.flush()
      os._exit(code)
  sent = 0.
  if fault.after:
    time.sleep(fault.after)
    sent = time.monotonic()
    for number in fault.numbers:
      os.kill(child, number)
      time.sleep(.01)
  code = _wait(child, begin)
  end = time.monotonic()
  read = lambda name: (
      (scratch / name).read_text(errors='replace')
      if (scratch / name).exists() else '')
  return Result(
      code, read('out'), read('error'), read('state'), end - begin,
      end - sent if sent else 0., int(read('operations') or 0))


def _wait(child, begin):
  while True:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      return os.waitstatus_to_exitcode(status)
    if time.monotonic() > begin + _LONGEST:
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return 99  # A hang: no code of the launcher.
    time.sleep(.005)


def _become(scratch, fault):
  """Makes a forked child what a command of its own would be."""
  for number in signals.STOPPING:
    signal.signal(number, signal.SIG_DFL)
  signals.exit_quietly()
  for descriptor, name, how in (
      (1, 'out', fault.stdout), (2, 'error', fault.stderr)):
    path = {'full': '/dev/full'}.get(how, str(scratch / name))
    if how == 'pipe':
      read, write = os.pipe()
      os.close(read)
    else:
      write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(write, descriptor)
    os.close(write)
  sys.stdout = sys.__stdout__ = open(1, 'w', encoding='utf-8', closefd=False)
  sys.stderr = sys.__stderr__ = open(
      2, 'w', encoding='utf-8', buffering=1, closefd=False)
  if fault.stdout == 'closed':
    sys.stdout = sys.__stdout__ = None
  if fault.stderr == 'closed':
    sys.stderr = sys.__stderr__ = None
  if fault.limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, fault.limit))


def _launch(folder, scratch, fault, seed):
  """The exit code of a run, within which the fault happens."""
  trained = run_lib.train

  def train_and_tell(*args):
    state, seconds = trained(*args)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
      digest.update(np.ascontiguousarray(leaf))
    (scratch / 'state').write_text(digest.hexdigest())
    return state, seconds

  advance = progress.Progress.advance

  def advance_and_send(self, steps):
    advance(self, steps)
    if fault.step and self._step >= fault.step:
      os.kill(os.getpid(), fault.numbers[0])

  progress.Progress.advance = advance_and_send
  # A commit that is made meanwhile is no fault.
  summary._git_commit = lambda: None
  if not fault.limit:
    run_lib.train = train_and_tell
  count = _count_operations(str(folder), fault)
  code = launch.launch(config(seed), str(folder))
  if not fault.limit:
    (scratch / 'operations').write_text(str(count()))
  return code


def _count_operations(folder: str, fault: Fault) -> Callable[[], int]:
  """Counts operations on files in a folder, and does the fault at its one.

  Those of C++ are not seen here; a fault at a time, and a limit, meet them.
  """
  lock, counted = threading.Lock(), [0]
  quiet = threading.local()
  inside = lambda path: f'{path}/'.startswith(f'{folder}/')

  def step(writes):
    if getattr(quiet, 'on', False):
      return
    with lock:
      number = counted[0]
      counted[0] += 1
    if fault.operation < 0:
      return
    if number == fault.operation:
      quiet.on = True
      try:
        for signum in fault.numbers:
          os.kill(os.getpid(), signum)
      finally:
        quiet.on = False
    if fault.error and writes and number >= fault.operation:
      raise OSError(fault.error, os.strerror(fault.error))

  def hook(event, args):
    if event not in _EVENTS or not args:
      return
    path = args[0]
    if isinstance(path, (str, os.PathLike)) and inside(os.fspath(path)):
      writes = event not in ('os.listdir', 'os.scandir') and not (
          event == 'open' and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
      step(writes)

  def watched(function):
    def call(descriptor, *args):
      try:
        path = os.readlink(f'/proc/self/fd/{descriptor}')
      except OSError:
        path = ''
      if inside(path):
        step(True)
      return function(descriptor, *args)
    return call

  for name in ('write', 'fsync', 'ftruncate'):
    setattr(os, name, watched(getattr(os, name)))
  sys.addaudithook(hook)
  return lambda: counted[0]


def final(folder: pathlib.Path) -> dict[str, Any]:
  """What two runs that ended alike have in common."""
  found = {
      name: json.loads((folder / name).read_text())
      for name in ('config.json', 'environment.json', 'summary.json')}
  for name in ('wall_time', 'median_step_time'):
    del found['summary.json'][name]
  return found | {'metrics.jsonl': (folder / 'metrics.jsonl').read_text()}


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)
