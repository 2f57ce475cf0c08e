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
import math
import os
import re
from typing import Any

from absl import flags
from bpjax import paths
from experiments import generated
from experiments import tokenizer
from experiments.tasks import LOSSES
import ml_collections
from ml_collections import config_flags

DTYPES = ('float32', 'bfloat16')
OPTIMIZERS = (
    'sgd', 'momentum', 'nesterov', 'adam', 'adamw', 'rmsprop', 'lars')
PREPROCESSING = ('', 'gcn', 'gcn_zca')
SCHEDULES = (
    'constant', 'cosine', 'linear', 'noam', 'plateau', 'polynomial')
AUGMENTS = ('', 'crop_flip', 'contrastive')
# Fields that take new keys.
_FREE = ('rule_args', 'model_args', 'dataset_args', 'augment_args', 'mesh')
_CHOICES = {
    'augment': AUGMENTS,
    'dtype': DTYPES,
    'loss': LOSSES,
    'reduction': ('mean', 'sum'),
    'optimizer': OPTIMIZERS,
    'feedback_optimizer': ('', *OPTIMIZERS),
    'feedback_schedule': ('together', 'epochs'),
    'preprocessing': PREPROCESSING,
    'schedule': SCHEDULES,
    'alignment_split': ('train', 'validation', 'test'),
    'tokenizer': ('', *tokenizer.KINDS),
}
_AT_LEAST = {
    'accumulate': 1, 'alignment_every': 0, 'batch_size': 1, 'checkpoint_every': 0,
    'clip_norm': 0, 'contrastive_dim': 1, 'contrastive_temperature': 0,
    'epochs': 1, 'eval_batch_size': 1,
    'feedback_learning_rate': 0, 'final_learning_rate': 0, 'input_noise': 0,
    'keep_checkpoints': 1, 'l2': 0, 'learning_rate': 0, 'length': 0, 'log_every': 0,
    'mirror_every': 1, 'mirror_first': 0, 'momentum': 0, 'plateau_factor': 0,
    'plateau_patience': 1, 'schedule_power': 0,
    'seed': 0, 'steps_per_call': 0, 'train_examples': 0, 'validation': 0,
    'vocabulary': 1, 'warmup_epochs': 0, 'warmup_steps': 0, 'weight_decay': 0, 'zca_epsilon': 0,
}


def default() -> ml_collections.ConfigDict:
  """The config that every config file starts from; the fields are these.

  Example:
    >>> config = default()
    >>> config.rule, config.learning_rate = 'kolen_pollack', 3e-4
  """
  config = ml_collections.ConfigDict()
  # What is trained, how it learns, and on what.
  # A name of bpjax.rules.names(), or of bpjax.variants.names() for models made
  # of blocks; and the arguments of the rule or of `bpjax.variant`.
  config.rule = 'backprop'
  config.rule_args = {}  # Such as rule_args.scale = .5.
  # Triples (path pattern, rule, its arguments) that come before `rule`, as in
  # (('*/boundary', 'feedback_alignment', {'scale': .5}),); the first that
  # matches a unit wins, and `rule` trains those that none does.
  config.rule_by_path = ()
  config.model = 'mlp'  # A name of bpjax.models.names().
  config.model_args = {}  # The model's own arguments: model_args.widths = ...
  # Globs for modules whose outputs are units, too, such as 'stage_*/block_*':
  # what direct feedback brings there replaces all that arrives.
  config.boundaries = ()
  # Globs for modules that are units as a whole, such as 'block_*/*': an affine
  # operation with its norm or nonlinearity; noise comes after all of it.
  config.units = ()
  # 'digits', the name of a TFDS set of images or texts, the path of a text file
  # ('.txt'), or a name of experiments.generated.names().
  config.dataset = 'digits'
  config.dataset_args = {}  # Of a generated task, such as dataset_args.depth.
  config.data_dir = ''  # The TFDS directory; '': the variable TFDS_DATA_DIR.
  config.validation = 0  # Training examples set apart for validation.
  config.train_examples = 0  # Use only so many training examples; 0: all.
  # Texts. The tokeniser, trained on the training texts: 'wordpiece', 'bpe' or
  # 'characters'; '': 'wordpiece' of texts with labels, 'characters' of others,
  # which are languages: each token is predicted from those before it.
  config.tokenizer = ''
  config.vocabulary = 8192  # Largest number of its tokens.
  config.length = 0  # Tokens of a row; 0: 64 with labels, 128 of a language.
  config.text_features = ()  # One or two texts of an example; (): the set's.
  # Subtracted from pixels in [0, 1], and what they are divided by then: a number
  # a channel, or one for all; empty: measured on the training images.
  config.pixel_mean = ()
  config.pixel_std = ()
  # What is done to images in place of that scaling: 'gcn', global contrast
  # normalisation of each image, or 'gcn_zca', ZCA whitening after it, with the
  # mean and the covariance of the training images (without validation).
  config.preprocessing = ''
  config.zca_epsilon = .1  # Added to the covariance's eigenvalues.
  config.input_noise = 0.  # Deviation of Gaussian noise on inputs, in training.
  # What a step does to its images, on the device; the random numbers are a
  # function of seed and step. 'crop_flip': moved by up to
  # `augment_args.padding` pixels (4), and flipped; 'contrastive': two views of
  # every image, cropped to `augment_args.area` (.08) of it at least, flipped,
  # jittered, blurred and solarised. The blocks of a variant then learn to tell
  # the views of one image, the readout alone the labels.
  config.augment = ''
  config.augment_args = {}
  config.contrastive_dim = 128  # Of the projection that views are compared in.
  config.contrastive_temperature = .5

  # The optimisation. A weight decay w shrinks every parameter, and feedback
  # that is trained, at every step: by `learning_rate * w` of itself under
  # adamw, by `w` of itself (after the learning rate, which Kolen-Pollack's law
  # needs) under all others. `l2` is the other kind, and of kernels alone: `l2`
  # times W is added to the gradient, before whatever the optimiser makes of it.
  config.epochs = 10
  config.batch_size = 128  # Over all devices; an epoch's remainder is dropped.
  config.loss = 'cross_entropy'  # Or another of LOSSES, on one-hot labels.
  # Of the computation: float32 or bfloat16. Parameters, feedback and the
  # optimiser's state are float32 in both.
  config.dtype = 'float32'
  # The optimiser takes a step at every n-th batch, with the mean of their updates.
  config.accumulate = 1
  config.reduction = 'mean'  # 'sum': updates are not divided by the batch size.
  # Pairs (path pattern, 'mean' or 'sum') that come before `reduction`.
  config.reduction_by_path = ()
  # Pairs (path pattern, neurons): only so many of a unit's neurons learn.
  config.bottleneck = ()
  # Path patterns of parameters and feedback that keep their first values.
  config.frozen = ()
  # sgd, momentum, nesterov, adam, adamw, rmsprop, lars. LARS scales the step of
  # each kernel to its norm, not those of biases. Rates are taken as they are:
  # for a linear scaling with the batch, give rate * batch_size / 256.
  config.optimizer = 'adam'
  config.learning_rate = 1e-3
  # Triples (path pattern, optimizer, learning rate) that come before these, such
  # as (('readout', 'momentum', .01),); the rate follows the same schedule.
  config.optimizer_by_path = ()
  # 'cosine', 'linear' or 'polynomial': falls to `final_learning_rate`, as
  # half a cosine, or as the remaining share of steps to `schedule_power`. 'noam':
  # behind the warm-up, by one over the square root of the step (the constant of
  # the original is that of which the rate at its end is `learning_rate`).
  # 'plateau': to `plateau_factor` of itself after `plateau_patience` epochs in
  # which the validation loss did not fall.
  config.schedule = 'constant'
  config.schedule_power = 1.
  config.final_learning_rate = 0.
  config.warmup_epochs = 0.  # The rate rises linearly from 0 over these.
  config.warmup_steps = 0  # Or over these, of the optimiser's.
  config.plateau_factor = .2
  config.plateau_patience = 1
  config.momentum = .9  # Of momentum, nesterov and lars.
  config.weight_decay = 0.
  config.l2 = 0.
  config.clip_norm = 0.  # Largest norm of all updates together; 0: any.
  config.feedback_optimizer = ''  # Of feedback that is trained; '': the same.
  config.feedback_learning_rate = 0.  # Of that optimizer; 0: learning_rate.
  # The weight mirror's schedule: its feedback learns at every n-th step, and in
  # `mirror_first` steps of its own before the first one.
  config.mirror_every = 1
  config.mirror_first = 0
  # When feedback that is trained learns: 'together' with the parameters, at every
  # step; 'epochs': in the first, third, ... epoch it alone, in the second,
  # fourth, ... the parameters alone (target propagation's own schedule).
  config.feedback_schedule = 'together'
  # Equilibrium propagation: each training example's free phase goes on from where
  # its last one ended. Takes memory for the states of all examples.
  config.particles = False
  config.seed = 0  # Of everything random: initialisation, order, noise.

  # What is recorded. Steps, except for keep_checkpoints.
  config.eval_batch_size = 1000
  config.log_every = 0  # A line of training loss; 0: at every epoch's end.
  config.alignment_every = 0  # Alignment with backprop; 0: never.
  config.alignment_split = 'train'  # Whose first batch it is measured on.
  config.checkpoint_every = 0  # 0: at every epoch's end.
  config.keep_checkpoints = 2

  # The devices.
  config.steps_per_call = 0  # Steps per dispatch (1 for streams); 0: chosen.
  config.mesh = {'data': -1}  # Axis -> devices; -1: all that are left.
  # Pairs (path pattern, partition spec) for parameters and feedback, such as
  # (('*/kernel', (None, 'model')), ('*', ())). The first that matches wins, and
  # every parameter has to be matched; a pattern may start with 'params/' or
  # 'feedback/'. Empty: every device holds everything.
  config.sharding = ()

  config.lock()
  for field in _FREE:
    config[field].unlock()
  return config


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a value that no run can have."""
  for field, known in _CHOICES.items():
    if config[field] not in known:
      raise ValueError(
          f'`{field}` must be one of its names, got {config[field]!r}; '
          f'{paths.nearest(config[field], filter(None, known))}.')
  for field, least in _AT_LEAST.items():
    if not least <= config[field] < math.inf:
      raise ValueError(
          f'`{field}` must be a number of at least {least}, got '
          f'{config[field]}.')
  if not config.learning_rate:
    raise ValueError('`learning_rate` must be positive, got 0.')
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
  if not 0 < config.plateau_factor < 1:
    raise ValueError(
        '`plateau_factor` must lie between 0 and 1, got '
        f'{config.plateau_factor}.')
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
  for field in ('schedule_power', 'zca_epsilon', 'contrastive_temperature'):
    if not config[field]:
      raise ValueError(f'`{field}` must be positive, got 0.')
  if config.preprocessing and (config.pixel_mean or config.pixel_std):
    raise ValueError(
        '`pixel_mean` and `pixel_std` must be empty with `preprocessing`, '
        f'which scales images itself, got {config.preprocessing!r}; leave one '
        'out.')
  if config.seed >= 2**31:
    raise ValueError(f'`seed` must be less than 2**31, got {config.seed}.')
  if config.feedback_learning_rate and not config.feedback_optimizer:
    raise ValueError(
        '`feedback_learning_rate` needs `feedback_optimizer`, which is empty; '
        'set it, for example to the value of `optimizer`.')
  for field, example in (
      ('sharding', ('*/kernel', (None, 'model'))),
      ('reduction_by_path', ('Dense_0', 'sum')),
      ('bottleneck', ('Dense_0', 10))):
    for pair in config[field]:
      if len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(
            f'`{field}` must be a list of pairs that begin with a path '
            f'pattern, such as {example}, got {pair!r}.')
  for part in config.optimizer_by_path:
    if not (len(part) == 3 and isinstance(part[0], str)
            and part[1] in OPTIMIZERS and isinstance(part[2], (int, float))
            and 0 < part[2] < math.inf):
      raise ValueError(
          '`optimizer_by_path` must be a list of triples (path pattern, '
          "optimizer, learning rate), such as ('readout', 'momentum', .01), got "
          f'{part!r}; known: {", ".join(OPTIMIZERS)}.')
  _check_augment(config)
  for part in config.rule_by_path:
    if not (len(part) == 3 and isinstance(part[0], str)
            and isinstance(part[1], str) and isinstance(part[2], Mapping)):
      raise ValueError(
          '`rule_by_path` must be a list of triples (path pattern, rule, its '
          "arguments), such as ('*/boundary', 'feedback_alignment', {}), got "
          f'{part!r}.')
  for field, least in (('pixel_mean', -math.inf), ('pixel_std', 0)):
    if not all(
        isinstance(v, (int, float)) and least < v < math.inf
        for v in config[field]):
      raise ValueError(
          f'`{field}` must be finite numbers, positive ones for `pixel_std`, '
          f'got {config[field]!r}; leave it empty to measure it.')
  for field, example in (
      ('frozen', 'Dense_0'), ('boundaries', 'block_*'), ('units', 'block_*/*'),
      ('text_features', 'sentence')):
    if isinstance(config[field], str) or not all(
        isinstance(pattern, str) for pattern in config[field]):
      what = 'names' if field == 'text_features' else 'path patterns'
      raise ValueError(
          f'`{field}` must be a list of {what}, such as ({example!r},), '
          f'got {config[field]!r}.')


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
          f'`{field}.{name}` is no argument of `{function.__name__}`; '
          f'{paths.nearest(name, known)}.')
    example = known[name].default
    if not _same_kind(value, example):
      raise ValueError(
          f'`{field}.{name}` must be of the kind of its default, {example!r}, '
          f'got {value!r}.')
  return given


def _same_kind(value, example):
  if value is None or example is None or example is inspect.Parameter.empty:
    return True
  if isinstance(example, tuple) and isinstance(value, (tuple, list)):
    return all(_same_kind(v, e) for v in value for e in example[:1])
  if isinstance(value, bool) or isinstance(example, bool):
    return isinstance(value, bool) and isinstance(example, bool)
  if isinstance(value, str) or isinstance(example, str):
    return isinstance(value, str) and isinstance(example, str)
  return True


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

  Raises:
    ValueError: with one sentence, for whatever is wrong with it.
  """
  with _one_sentence(argv):
    for i, argument in enumerate(argv):
      if re.match('--?config(=|$)', argument):
        file = (argument.partition('=')[2] or ''.join(argv[i + 1:i + 2]))
        if not os.path.isfile(file.split(':')[0]):
          raise ValueError(
              f'`config` must be a config file, and there is none at {file!r}; '
              'give a path such as experiments/configs/quickstart.py.')
    rest = flags.FLAGS(argv)
  if len(rest) > 1:
    raise ValueError(
        f'unexpected argument {rest[1]!r}; every argument is a flag such as '
        '--config.epochs=5.')
  return rest


@contextlib.contextmanager
def _one_sentence(argv):
  """Turns every way in which flags fail into a ValueError of one line."""
  for argument in argv:
    found = re.match(r'--?(?:no)?config\.(\w+)(?:\.(\w+)(\.)?)?', argument)
    if found:
      _check_field(found[1])
    if found and (found[3] or found[2] and found[1] not in _FREE):
      raise ValueError(
          f'only {", ".join(_FREE)} have fields of their own, one level deep, '
          f'got {argument!r}; write for example --config.rule_args.scale=.5.')
  try:
    yield
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    text = str(error.args[0] if error.args else error)
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if unknown:
      _check_field(unknown[1])
    # A config file's own errors come as a traceback; its last line says it.
    line = [line for line in text.splitlines() if line.strip()][-1]
    raise ValueError(f'the command line is not understood: {line}') from error


def _check_field(name):
  known = default()
  if name not in known:
    raise ValueError(
        f'`config.{name}` is no field of a config; '
        f'{paths.nearest(name, known)}.')


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
