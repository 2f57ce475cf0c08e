"""Standard output and error, which may be closed, full or a terminal.

What is said here never stops a run: a stream that fails is not written to
again, and a `Forgiving` stream keeps why, so that the log can say it.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import select
import sys
from typing import Any, TextIO

ERRORS = 2  # The descriptor of standard error; see `hosts`.
DISK_ERROR = 4  # The exit code where something could not be written or read.


def open_all() -> None:
  """Opens descriptors 0, 1 and 2 where the shell closed them (`2>&-`).

  The next file that a program opens would take their place, and what libraries
  print to descriptor 2 would end up in it.
  """
  while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
  os.close(descriptor)


def printable(value: Any) -> Any:
  """A text without control characters; they are escaped, as in '\\x1b'.

  A terminal obeys control characters, whoever wrote them into a file. Of dicts
  and lists every text is made printable, keys included.

  Example:
    >>> printable('\\x1b[2J')
    '\\\\x1b[2J'
  """
  if isinstance(value, dict):
    return {printable(k): printable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(printable, value))
  if not isinstance(value, str) or value.isprintable():
    return value
  return ''.join(
      c if c.isprintable() or c == '\n' else repr(c)[1:-1] for c in value)


class Forgiving:
  """The stream that `sys` has under a name, whose failures are kept, not raised.

  Attributes:
    failure: why the stream cannot be written to; '' while it can.
  """

  encoding = 'utf-8'

  def __init__(self, name: str):
    self._name = name
    self.failure = ''

  def write(self, text: str) -> int:
    self._do(lambda stream: stream.write(text))
    return len(text)

  def flush(self) -> None:
    self._do(lambda stream: stream.flush())

  def isatty(self) -> bool:
    stream = getattr(sys, self._name)
    try:
      return stream is not None and stream.isatty()
    except ValueError:  # It is closed.
      return False

  def fileno(self) -> int:
    return getattr(sys, self._name).fileno()

  def _do(self, function: Callable[[TextIO], Any]):
    stream = getattr(sys, self._name)
    if self.failure:
      return
    if stream is None:
      self.failure = 'it is closed'
      return
    try:
      function(stream)
    except (OSError, ValueError) as error:
      self.failure = getattr(error, 'strerror', None) or str(error)
      _drop(self._name, stream)


def complain(message: str) -> None:
  """Prints a line to standard error, or where that fails to standard output."""
  if put('stderr', message):
    put('stdout', message)


def put(name: str, text: str) -> str:
  """Prints a line to 'stdout' or 'stderr'; returns why it could not, or ''."""
  stream = Forgiving(name)
  stream.write(f'{printable(text)}\n')
  stream.flush()
  return stream.failure


def urgent(message: str) -> None:
  """Writes a line to standard error at once, or not at all where it would wait.

  For threads that have to go on although the main one holds every lock.
  """
  # A progress bar hides the cursor.
  show = '\x1b[?25h' if os.isatty(ERRORS) else ''
  try:
    if select.select([], [ERRORS], [], 0)[1]:
      os.write(ERRORS, f'{show}{printable(message)}\n'.encode())
  except OSError:
    pass


def guarded(program: Callable[[], Any]) -> None:
  """Runs a program to its exit; standard output that fails is one sentence.

  The process ends at once then: what compiles in the background of a program
  that was stopped would crash in the midst of Python's own end.

  Example:
    >>> guarded(lambda: app.run(main))
  """
  open_all()
  code = 0
  try:
    try:
      program()
    except SystemExit as error:
      code = error.code if isinstance(error.code, int) else int(bool(error.code))
    if sys.stdout is not None:
      sys.stdout.flush()
  except OSError as error:
    if error.filename is not None:
      raise  # A file's, not the stream's.
    complain(f'error: stdout cannot be written to ({error.strerror}).')
    code = DISK_ERROR
  if sys.stderr is not None:
    Forgiving('stderr').flush()
  os._exit(code)


def _drop(name, stream):
  """Sends what is left in a stream's buffer nowhere.

  Python would try to write it at exit, and end with code 120.
  """
  if stream is getattr(sys, f'__{name}__') and not stream.closed:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
