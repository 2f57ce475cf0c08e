"""Configs on the command line: `--config=FILE` and `--config.FIELD=VALUE`.

A config file is a Python file with `get_config()` that starts from `default()`
of this module and changes what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import copy
import os
import re
import sys
import traceback

from absl import flags
from bpjax.train import fields as fields_lib
from bpjax.train.config import default
import ml_collections
from ml_collections import config_flags

__all__ = ('default', 'define_flag', 'override', 'parse_flags')


def override(
    config: ml_collections.ConfigDict, values: Mapping[str, str]
) -> ml_collections.ConfigDict:
  """A copy of a config with fields set from text, as on the command line.

  Raises:
    ValueError: for an unknown field or a value of the wrong type.

  Example:
    >>> override(default(), {'rule': 'kolen_pollack', 'seed': '1'}).seed
    1
  """
  argv = ['', *(f'--config.{field}={text}' for field, text in values.items())]
  parsed = flags.FlagValues()
  with _one_sentence(argv):
    # A copy: flags write their values into the config that they are given.
    config_flags.DEFINE_config_dict(
        'config', copy.deepcopy(config), flag_values=parsed, lock_config=False,
        accept_new_attributes=True, sys_argv=argv)
    parsed(argv)
    return parsed.config


def define_flag() -> flags.FlagHolder:
  """Defines `--config=FILE` and its overrides `--config.FIELD=VALUE`."""
  return config_flags.DEFINE_config_file(
      'config', lock_config=False, accept_new_attributes=True,
      help_string='Path of a config file, such as '
      'experiments/configs/quickstart.py.')


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line of a program with a `--config` flag.

  `--help` prints the program's own text and every field, and ends it.

  Raises:
    ValueError: with one sentence, for whatever is wrong with it.
  """
  if any(re.fullmatch('--?h(elp(short|full)?)?', a) for a in argv[1:]):
    print((sys.modules['__main__'].__doc__ or '').strip())
    print(fields_lib.help_text())
    sys.exit(0)
  with _one_sentence(argv):
    for i, argument in enumerate(argv):
      if re.match('--?config(=|$)', argument):
        file = (argument.partition('=')[2] or ''.join(argv[i + 1:i + 2]))
        if '\0' in file or not os.path.isfile(file.split(':')[0]):
          raise ValueError(
              '`config` must be a config file, and there is none at '
              f'{fields_lib.shown(file)}; give a path such as '
              'experiments/configs/quickstart.py.')
    rest = flags.FLAGS(argv)
    if not isinstance(flags.FLAGS.config, ml_collections.ConfigDict):
      raise ValueError(
          '`config` must be a file whose `get_config()` returns a ConfigDict, '
          f'got {type(flags.FLAGS.config).__name__}; start from '
          '`bpjax.train.config.default()`.')
  if len(rest) > 1:
    raise ValueError(
        f'unexpected argument {fields_lib.shown(rest[1])}; every argument is a '
        'flag such as --config.epochs=5.')
  return rest


@contextlib.contextmanager
def _one_sentence(argv):
  """Turns every way in which flags fail into a ValueError of one line."""
  for argument in argv:
    found = re.match(
        r'--?(?:no)?config\.([^=.]*)(?:\.([^=.]*)(\.)?)?', argument)
    if found:
      _check_field(found[1])
    if found and (found[3] or found[2] and found[1] not in fields_lib.FREE):
      raise ValueError(
          f'only {", ".join(fields_lib.FREE)} have fields of their own, one '
          f'level deep, got {fields_lib.shown(argument)}; write for example '
          '--config.rule_args.scale=.5.')
    if found and found[2] and hasattr(ml_collections.ConfigDict, found[2]):
      raise ValueError(
          f'`{found[1]}.{found[2]}` cannot be set on the command line, since '
          'every ConfigDict has a method of that name; set it in a config file: '
          f"config.{found[1]}['{found[2]}'] = VALUE.")
    if found and not re.fullmatch(r'\w*', found[2] or '', re.A):
      raise ValueError(
          f'`{found[1]}` must have names of Latin letters, digits and _, got '
          f'{fields_lib.shown(found[2])}.')
  try:
    yield
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    raise _of_flags(error) from error
  except ValueError as error:
    where = _in_config_file(error, argv)
    if where or '\n' in str(error):
      raise _of_flags(error, where) from error
    raise
  except (Exception, SystemExit) as error:
    # The config file is run as code, and may raise anything.
    where = _in_config_file(error, argv)
    if not where:
      raise
    raise _of_flags(error, where) from error


def _of_flags(error, where=''):
  """The sentence for what parsing flags, or the config file, has raised."""
  text = str(error.args[0] if error.args else error)
  unknown = re.search(r'Key "(\w+)" does not exist', text)
  if unknown:
    _check_field(unknown[1])
  # A config file's own errors come as a traceback; its last line says it.
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  line = lines[-1] if lines else type(error).__name__
  line = ''.join(c if c.isprintable() else ' ' for c in line)
  if where:
    return ValueError(
        f'`config` must be a file that runs, and {where} raises '
        f'{type(error).__name__}: {line}')
  return ValueError(f'the command line is not understood: {line}')


def _in_config_file(error, argv):
  """'FILE, line N' where an error comes from the config file, else ''."""
  files = {
      os.path.abspath(a.partition('=')[2].split(':')[0]) for a in argv
      if re.match('--?config=', a)}
  files |= {os.path.abspath(b.split(':')[0]) for a, b in zip(argv, argv[1:])
            if re.fullmatch('--?config', a)}
  if isinstance(error, SyntaxError) and os.path.abspath(
      error.filename or '') in files:
    return f'{error.filename}, line {error.lineno},'
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if os.path.abspath(frame.filename) in files:
      return f'{frame.filename}, line {frame.lineno},'
  return ''


def _check_field(name):
  if name not in fields_lib.BY_NAME:
    raise ValueError(
        f'`config.{fields_lib.shown(name)[1:-1]}` is no field of a config'
        f'{fields_lib.nearest(name, list(fields_lib.BY_NAME)) or "."} Known: '
        f'{", ".join(fields_lib.BY_NAME)}.')
