"""A script that measures: its flags, its file and its verdict.

What the scripts share that train no runs of the launcher; those that do are in
`experiments.reproduction`.
"""

from collections.abc import Callable
import json
import os
import platform
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
from bpjax.train.folder import signals
from bpjax.train.folder import streams
from bpjax.train.folder import summary as summary_lib
import jax
import rich.console
import rich.table


class FlagError(Exception):
  """A flag that the script cannot work with, in one sentence."""


def machine() -> str:
  """The processor's name and its cores that this process may use; or the device.
  """
  if jax.default_backend() != 'cpu':
    return jax.devices()[0].device_kind
  name = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      name = next((line.partition(':')[2].strip() for line in file
                   if line.startswith('model name')), name)
  cores = len(os.sched_getaffinity(0)) if hasattr(
      os, 'sched_getaffinity') else os.cpu_count()
  return f'{name}, {"one core" if cores == 1 else f"{cores} cores"}'


def main(
    name: str, measure: Callable[[str], tuple[dict[str, Any], list[str]]],
    plot: bool = True) -> None:
  """Runs a script: its flags, `measure`, its file; never returns.

  Exits with 2 for flags that make no sense, with 1 where something measured is
  outside its bounds.

  Args:
    name: of the script, without '.py'.
    measure: `(path of the plot) -> (record, what is out of bounds)`; prints its
      tables. The record is what `--output` holds.
    plot: whether there is one; without, the path is ''.

  Example (a script's last line):
    measurement.main('local_fg_memory', _measure)
  """
  flags.disclaim_key_flags()
  output = flags.DEFINE_string('output', '', 'JSON file for the results.')
  if plot:
    flags.DEFINE_string('picture', f'{name}.png', 'The plot.')

  def measure_all(argv):
    del argv
    logging.set_verbosity(logging.ERROR)  # Of libraries.
    picture = flags.FLAGS.picture if plot else ''
    try:
      record, wrong = measure(picture)
    except FlagError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    if output.value:
      head = {'command': ' '.join([f'python scripts/{name}.py', *sys.argv[1:]]),
              'versions': summary_lib.versions()}
      with open(output.value, 'w', encoding='utf-8') as file:
        json.dump({**head, **_rounded(record)}, file, indent=1)
        file.write('\n')
    if plot:
      print(f'plot: {picture}')
    for line in wrong:
      print(f'outside: {line}', file=sys.stderr)
    if wrong:
      sys.exit(1)
    print('all of it within its bounds')

  run(measure_all)


def numbers(name: str, values: list[str], lowest: int = 1) -> list[int]:
  """A list flag's whole numbers.

  Raises:
    FlagError: if one is none, or below `lowest`; or there are none at all.

  Example:
    >>> numbers('groups', ['1', '16'])
    [1, 16]
  """
  try:
    found = [int(v) for v in values]
  except ValueError:
    found = []
  if not found or min(found) < lowest:
    raise FlagError(
        f'`{name}` must be whole numbers of at least {lowest}, such as '
        f'--{name}=1,4, got {",".join(values)!r}.')
  return found


def table(title: str, *columns: str) -> rich.table.Table:
  """An empty table whose first column is text, and the others numbers."""
  first, *others = columns
  return rich.table.Table(
      first, *(rich.table.Column(c, justify='right') for c in others),
      title=title)


def show(shown: rich.table.Table, width: int = 100) -> None:
  """Prints a table, `width` characters wide where there is no terminal."""
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=width)
  console.print(shown)


def run(main: Callable[[list[str]], Any]) -> None:
  """Runs a script's main function to its exit code; never returns.

  A wrong flag, a signal and standard output that is closed or full are one
  sentence each, and no traceback.

  Example:
    >>> run(main)
  """
  def program():
    signals.exit_quietly()  # Between the runs, which listen for themselves.
    try:
      app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
      sys.exit(130)

  streams.guarded(program)


def parse_flags(argv: list[str]) -> list[str]:
  """A command line as absl reads it; exits with 2 and one sentence if wrong.

  Example:
    >>> app.run(main, flags_parser=parse_flags)
  """
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f'unknown argument {rest[1]!r}; see --help.')
  except (flags.Error, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  return rest


def _rounded(value):
  """`value` with floats of 5 significant digits."""
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(v) for v in value]
  return float(f'{value:.5g}') if isinstance(value, float) else value
