"""Signals that ask a program to stop. Imports nothing that takes time."""

import os
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_code(number: int) -> int:
  """130 for SIGINT; 0 for those that a scheduler or a closed terminal sends."""
  return 130 if number == signal.SIGINT else 0


def heeded() -> list[signal.Signals]:
  """The signals that stop; not SIGHUP where it is ignored, as under nohup."""
  return [
      s for s in STOPPING
      if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def exit_quietly() -> None:
  """Until something else listens, signals end the program without a traceback.

  To be called before the imports that take time.
  """
  for number in heeded():
    signal.signal(number, lambda n, frame: os._exit(exit_code(n)))
