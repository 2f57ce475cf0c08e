"""What a run is told: every field and its default, and what goes together.

A config file is a Python file with `get_config()` that starts from `default()`
and changes what it needs; `rule_args`, `model_args`, `dataset_args`,
`augment_args` and `mesh` take new keys as well. Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import copy
import inspect
import json
import re
from typing import Any

from bpjax.train import fields as fields_lib
from bpjax.train.data import generated
from bpjax.train.data import own
import ml_collections


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
  if config.dataset_args and config.dataset not in generated.names() and (
      not own.is_own(config.dataset)):
    raise ValueError(
        '`dataset_args` needs a generated `dataset`, or one of your own, got '
        f'{config.dataset!r}; known: {", ".join(generated.names())}.')
  if config.image_size and config.dataset in ('digits', *generated.names()):
    raise ValueError(
        f'`image_size` means nothing for `dataset` {config.dataset!r}, got '
        f'{config.image_size}; leave it at 0.')
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
  for name in ('label_smoothing', 'prior_bias'):
    if config[name] and config.loss != 'cross_entropy':
      raise ValueError(
          f"`{name}` is that of `loss='cross_entropy'`, got the loss "
          f'{config.loss!r}; leave it at {fields_lib.BY_NAME[name].default}.')
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


# Schedules whose rates depend on the number of all steps.
OF_THE_TOTAL = ('cosine', 'linear', 'polynomial')


def goes_on(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
  """Whether a run of one config is the beginning of one of another.

  Raises:
    ValueError: if it would be, but for a schedule that depends on `epochs`.

  Example:
    >>> a, b = default().to_dict(), default().to_dict()
    >>> goes_on(a, b | {'epochs': 20})
    True
  """
  if {**old, 'epochs': 0} != {**new, 'epochs': 0} or not (
      isinstance(old['epochs'], int) and old['epochs'] < new['epochs']):
    return False
  if new['schedule'] in OF_THE_TOTAL:
    raise ValueError(
        f'`epochs` is {old["epochs"]} there and {new["epochs"]} here, and the '
        f"rates of `schedule='{new['schedule']}'` depend on it, so that the run "
        'there is not the beginning of this one; choose another `workdir`.')
  return True


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
    >>> import bpjax
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
    >>> import bpjax
    >>> checked(bpjax.models.get('mlp'), {'widths': (64, 64)}, 'model_args')
    {'widths': (64, 64)}
  """
  given = dict(given)
  known = parameters(function)
  if any(p.kind is p.VAR_KEYWORD for p in known.values()):
    return given
  for name, value in given.items():
    if name not in known:
      raise ValueError(
          f'`{field}.{name}` is no argument of `{function.__name__}`'
          f'{fields_lib.nearest(name, list(known)) or "."} Known: '
          f'{", ".join(known) or "none"}. A config file that sets none is '
          'experiments/configs/plain.py.')
    example = known[name].default
    # Some are True, False or a name.
    kinds = re.findall(r'\w+', str(known[name].annotation))
    named = isinstance(value, str) and 'str' in kinds
    if 'int' in kinds and 'float' not in kinds and _holds_float(value):
      raise ValueError(
          f'`{field}.{name}` must be whole, got {fields_lib.shown(value)}.')
    if not named and not _same_kind(value, example):
      raise ValueError(
          f'`{field}.{name}` must be of the kind of its default, {example!r}, '
          f'got {fields_lib.shown(value)}.')
  return given


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """The parameters of a function, or of the `__init__` of a class.

  Example:
    >>> list(parameters(default))
    []
  """
  if not inspect.isclass(function):
    return dict(inspect.signature(function).parameters)
  # A metaclass may have a `__call__` that takes anything, as NNX's does.
  found = dict(inspect.signature(function.__init__).parameters)
  found.pop('self', None)
  return found


def _holds_float(value):
  if isinstance(value, (tuple, list)):
    return any(map(_holds_float, value))
  return isinstance(value, float)


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
