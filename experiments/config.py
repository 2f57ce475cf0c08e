"""What a run is told: every field, its default, and the command line for it.

A config file is a Python file with `get_config()` that starts from `default()`
and changes what it needs. On the command line, `--config.FIELD=VALUE` overrides
a field; `rule_args`, `model_args`, `dataset_args`, `augment_args` and `mesh` take
new keys as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import copy
import inspect
import json
import os
import re
import sys
import traceback
from typing import Any

from absl import flags
from experiments import fields as fields_lib
from experiments import generated
import ml_collections
from ml_collections import config_flags


def default() -> ml_collections.ConfigDict:
  """The config that every config file starts from; see `fields.FIELDS`.

  Example:
    >>> config = default()
    >>> config.rule, config.learning_rate = 'kolen_pollack', 3e-4
  """
  config = ml_collections.ConfigDict(copy.deepcopy(
      {field.name: field.default for field in fields_lib.FIELDS}))
  config.lock()
  for field in fields_lib.FREE:
    config[field].unlock()
  return config


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a value that no run can have.

  First every field by itself, then what has to go together. Loads no JAX.
  """
  fields_lib.check(config)
  if config.warmup_epochs >= config.epochs:
    raise ValueError(
        f'`warmup_epochs` must be less than the {config.epochs} epochs, got '
        f'{config.warmup_epochs}.')
  if config.warmup_steps and config.warmup_epochs:
    raise ValueError(
        '`warmup_steps` and `warmup_epochs` must not both be set, got '
        f'{config.warmup_steps} and {config.warmup_epochs}; leave one at 0.')
  if config.schedule == 'noam' and not (
      config.warmup_steps or config.warmup_epochs):
    raise ValueError(
        "`schedule='noam'` needs `warmup_steps` or `warmup_epochs`, which are 0; "
        'set one.')
  if config.accumulate > 1 and config.feedback_schedule == 'epochs':
    raise ValueError(
        "`accumulate` must be 1 with `feedback_schedule='epochs'`, got "
        f'{config.accumulate}.')
  if config.dataset_args and config.dataset not in generated.names():
    raise ValueError(
        f'`dataset_args` needs a generated `dataset`, got {config.dataset!r}; '
        f'known: {", ".join(generated.names())}.')
  if config.feedback_schedule == 'epochs' and config.epochs % 2:
    raise ValueError(
        "`epochs` must be even with `feedback_schedule='epochs'`, half of them "
        f'for the feedback, got {config.epochs}.')
  if config.final_learning_rate > (
      0 if config.schedule == 'constant' else config.learning_rate):
    raise ValueError(
        '`final_learning_rate` must be at most `learning_rate`, '
        f'{config.learning_rate}, and 0 under a constant `schedule`, got '
        f'{config.final_learning_rate}; choose another schedule or rate.')
  if config.preprocessing and (config.pixel_mean or config.pixel_std):
    raise ValueError(
        '`pixel_mean` and `pixel_std` must be empty with `preprocessing`, '
        f'which scales images itself, got {config.preprocessing!r}; leave one '
        'out.')
  if config.feedback_learning_rate and not config.feedback_optimizer:
    raise ValueError(
        '`feedback_learning_rate` needs `feedback_optimizer`, which is empty; '
        'set it, for example to the value of `optimizer`.')
  if config.weight_decay >= 1 and config.optimizer != 'adamw':
    raise ValueError(
        '`weight_decay` must be below 1 outside adamw, where it is the share of '
        f'a weight that is taken away at every step, got {config.weight_decay}.')
  if config.frozen and '*' in config.frozen:
    raise ValueError(
        "`frozen` must leave something that learns, and the pattern '*' leaves "
        'nothing; name what shall keep its first values.')
  _check_augment(config)


def _check_augment(config):
  """Raises ValueError for what cannot go with augmented images."""
  if config.augment_args and not config.augment:
    raise ValueError(
        '`augment_args` needs `augment`, which is empty, got '
        f'{config.augment_args.to_dict()}; set it, or leave them out.')
  if config.augment and config.preprocessing:
    raise ValueError(
        '`augment` works on images in [0, 1] and must be empty with '
        f'`preprocessing`, got {config.augment!r} and '
        f'{config.preprocessing!r}; leave one out.')
  if config.augment == 'contrastive' and config.particles:
    raise ValueError(
        "`augment` must not be 'contrastive' with `particles`, which keep one "
        'state of each image and not of each view; leave one out.')


def arguments(
    function: Callable[..., Any], config: ml_collections.ConfigDict, field: str
) -> dict[str, Any]:
  """The keyword arguments in `config[field]`, checked against a function.

  Args:
    function: makes the rule or the model.
    config: the run's config.
    field: 'rule_args' or 'model_args'.

  Returns:
    The arguments as a dict.

  Raises:
    ValueError: for an argument that the function does not take, with the
      nearest names, or whose type is not that of the function's default.

  Example:
    >>> config = default()
    >>> config.model_args.widths = (64, 64)
    >>> arguments(bpjax.models.get('mlp'), config, 'model_args')
    {'widths': (64, 64)}
  """
  return checked(function, config[field].to_dict(), field)


def checked(
    function: Callable[..., Any], given: Mapping[str, Any], field: str
) -> dict[str, Any]:
  """Keyword arguments, checked against a function as `arguments` does.

  Args:
    function: makes the rule or the model.
    given: name -> value.
    field: where in the config they are, for the error.

  Example:
    >>> checked(bpjax.models.get('mlp'), {'widths': (64, 64)}, 'model_args')
    {'widths': (64, 64)}
  """
  given = dict(given)
  known = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in known.values()):
    return given
  for name, value in given.items():
    if name not in known:
      raise ValueError(
          f'`{field}.{name}` is no argument of `{function.__name__}`'
          f'{fields_lib.nearest(name, list(known)) or "."} Known: '
          f'{", ".join(known) or "none"}.')
    example = known[name].default
    if not _same_kind(value, example):
      raise ValueError(
          f'`{field}.{name}` must be of the kind of its default, {example!r}, '
          f'got {fields_lib.shown(value)}.')
  return given


def _same_kind(value, example):
  """Whether a value can stand where `example` is the default."""
  if example is None or example is inspect.Parameter.empty:
    return True
  if isinstance(example, tuple):
    if isinstance(value, str):  # One name stands for a tuple of it.
      return bool(example) and isinstance(example[0], str)
    return isinstance(value, (tuple, list)) and all(
        _same_kind(v, e) for v in value for e in example[:1])
  for kind in (bool, str):
    if isinstance(value, kind) or isinstance(example, kind):
      return isinstance(value, kind) and isinstance(example, kind)
  return isinstance(value, (int, float))


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
          '`experiments.config.default()`.')
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


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as what a JSON file gives back.

  Raises:
    ValueError: for a value that JSON does not know.
  """
  try:
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(
        'every value of a config must be a number, a string or a tuple of '
        f'them, so that config.json can hold it; got: {error}.') from error


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> str:
  """The first field in which two configs differ, with both values; or ''.

  Example:
    >>> difference({'seed': 0}, {'seed': 1})
    '`seed` is 0 there and 1 here'
  """
  for field in sorted({*old, *new}):
    a, b = (c.get(field, 'absent') for c in (old, new))
    if isinstance(a, dict) and isinstance(b, dict):
      nested = difference(a, b, f'{prefix}{field}.')
      if nested:
        return nested
    elif a != b:
      return f'`{prefix}{field}` is {a!r} there and {b!r} here'
  return ''
