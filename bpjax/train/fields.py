"""Every field of a config, described once: kind, default and meaning.

`FIELDS` is the one table. From it come `config.default()`, the checks of
`config.check`, `--help`, and docs/config.md, which this command writes:

  python -m bpjax.train.fields > docs/config.md

A new field is one more line of the table. Nothing here imports JAX, so that a
wrong value is refused before it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import math
import numbers
import re
import textwrap
from typing import Any

from bpjax.train import named

_WHOLE = 2**31 - 1  # The largest whole number that a device counts to.
_MOST_SHOWN = 100  # Characters of a value in a message.
# A smaller step or norm moves no float32 weight.
_LEAST_RATE = 1e-12
_FLOAT32 = 3.4e38


class Kind:
  """What values a field, or a part of one, may have.

  Attributes:
    text: what `must be ...` is followed by.
  """
  text: str

  def check(self, where: str, value: Any) -> None:
    """Raises ValueError for a wrong value, or a wrong part of it."""
    if not self.fits(value):
      raise wrong(where, self.text, value)

  def fits(self, value: Any) -> bool:
    """Whether the value, as a whole, is of this kind."""
    raise NotImplementedError


def shown(value: Any) -> str:
  """A value in a message: one short line of printable characters."""
  text = repr(value)
  text = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  if len(text) <= _MOST_SHOWN:
    return text
  return f'{text[:_MOST_SHOWN]}... ({len(text)} characters)'


def wrong(where: str, text: str, value: Any) -> ValueError:
  """The error of a value that is not what it must be."""
  return ValueError(f'`{where}` must be {text}, got {shown(value)}.')


def nearest(name: str, known: Sequence[str]) -> str:
  """A hint at the known name that is closest, or ''."""
  close = difflib.get_close_matches(name, known, n=1, cutoff=.5)
  return f'; did you mean `{close[0]}`?' if close else ''


@dataclasses.dataclass(frozen=True)
class Number(Kind):
  """A finite number in a range; `whole` allows integers alone.

  Attributes:
    least, most: the range, both included.
    above, below: the same, excluded.
    whole: whether it is an integer.
    also: one more number, outside of the range.
  """
  least: float | None = None
  most: float = math.inf
  above: float | None = None
  below: float | None = None
  whole: bool = False
  also: float | None = None

  @property
  def text(self) -> str:
    kind = 'a whole number' if self.whole else 'a number'
    lower = None if self.least == -_FLOAT32 else self.least
    upper = self.most if self.most < 1e9 else math.inf  # Else it is no news.
    if self.above is not None and self.below is not None:
      words = f' between {self.above:g} and {self.below:g}'
    elif lower is not None and self.below is not None:
      words = f' of at least {lower:g} and below {self.below:g}'
    elif lower is not None and upper < math.inf:
      words = f' of at least {lower:g} and at most {upper:g}'
    elif lower is not None:
      words = f' of at least {lower:g}'
    elif self.above == 0:
      kind, words = kind.replace('a ', 'a positive '), ''
    else:
      words = ''
    return f'{kind}{words}' + (
        '' if self.also is None else f', or {self.also:g}')

  def fits(self, value):
    kind = numbers.Integral if self.whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
      return False
    if self.also is not None and value == self.also:
      return True
    return (-math.inf < value < math.inf and value <= self.most
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below))


def count(least: int = 0, most: int = _WHOLE) -> Number:
  """A whole number."""
  return Number(least, most, whole=True)


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
  """True or False."""
  text = 'True or False'

  def fits(self, value):
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Text(Kind):
  """A string without line breaks; `name`: that is not empty."""
  name: bool = False

  @property
  def text(self) -> str:
    return 'a name' if self.name else 'a string, or empty'

  def fits(self, value):
    return (isinstance(value, str) and value.isprintable()
            and bool(value or not self.name))


@dataclasses.dataclass(frozen=True)
class Pattern(Kind):
  """A glob or a regular expression for paths, such as 'block_*'."""
  text = 'a path pattern'

  def fits(self, value):
    return isinstance(value, str) and bool(value) and value.isprintable()


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
  """One of some names."""
  names: tuple[str, ...]

  @property
  def text(self) -> str:
    return 'one of ' + ', '.join(repr(n) for n in self.names)

  def check(self, where, value):
    if not isinstance(value, str) or value not in self.names:
      hint = nearest(value, self.names) if isinstance(value, str) else ''
      raise ValueError(
          f'`{where}` must be {self.text}, got {shown(value)}'
          f'{hint or "."}')


@dataclasses.dataclass(frozen=True)
class Code(Choice):
  """One of some names, or code of the user's own."""

  @property
  def text(self) -> str:
    names = ', '.join(repr(n) for n in self.names)
    return f'one of {names} or {named.HOW}' if names else named.HOW

  def check(self, where, value):
    if not (isinstance(value, str) and value.isprintable()
            and named.is_code(value)):
      super().check(where, value)


@dataclasses.dataclass(frozen=True)
class Parts(Kind):
  """A tuple of some parts of different kinds, each with a name."""
  names: tuple[str, ...]
  kinds: tuple[Kind, ...]

  @property
  def text(self) -> str:
    how = {2: 'pair', 3: 'triple'}[len(self.names)]
    return f'a {how} ({", ".join(self.names)})'

  def check(self, where, value):
    if not isinstance(value, (tuple, list)) or len(value) != len(self.kinds):
      raise wrong(where, self.text, value)
    for i, (kind, part) in enumerate(zip(self.kinds, value)):
      kind.check(f'{where}[{i}]', part)


@dataclasses.dataclass(frozen=True)
class List(Kind):
  """A tuple of any length of parts of one kind.

  Attributes:
    item: the kind of a part.
    example: a value in a message.
    once: whether no two parts may be, or begin with, the same pattern.
  """
  item: Kind
  example: str
  once: bool = False

  @property
  def text(self) -> str:
    what = self.item.text.removeprefix('a ').replace('pattern', 'patterns', 1)
    what = re.sub(r'^(pair|triple|(?:positive )?number)\b', r'\1s', what)
    if isinstance(self.item, Parts):
      what = what.replace('patterns', 'pattern')
    return f'a list of {what}, such as {self.example}'

  def check(self, where, value):
    if not isinstance(value, (tuple, list)):
      raise wrong(where, self.text, value)
    seen = set()
    for i, part in enumerate(value):
      try:
        self.item.check(f'{where}[{i}]', part)
      except ValueError as error:
        raise ValueError(
            f'{str(error).removesuffix(".")}; `{where}` must be {self.text}.'
        ) from error
      pattern = part[0] if isinstance(self.item, Parts) else part
      if self.once and pattern in seen:
        raise ValueError(
            f'`{where}` must have each pattern once, got {shown(pattern)} '
            'twice; the first that matches would win, so leave one out.')
      if self.once:
        seen.add(pattern)


@dataclasses.dataclass(frozen=True)
class Either(Kind):
  """A value of one of several kinds."""
  kinds: tuple[Kind, ...]
  text: str

  def fits(self, value):
    for kind in self.kinds:
      try:
        kind.check('', value)
        return True
      except ValueError:
        pass
    return False


@dataclasses.dataclass(frozen=True)
class Named(Kind):
  """One of some names, or a value of another kind, which is no string."""
  choice: Choice
  other: Kind

  @property
  def text(self) -> str:
    return f'{self.choice.text}, or {self.other.text}'

  def check(self, where, value):
    (self.choice if isinstance(value, str) else self.other).check(where, value)


@dataclasses.dataclass(frozen=True)
class Nothing(Kind):
  """None."""
  text = 'None'

  def fits(self, value):
    return value is None


@dataclasses.dataclass(frozen=True)
class Table(Kind):
  """Names with a value each: `--config.FIELD.NAME=VALUE`, with new names too.

  Attributes:
    what: what the names are.
    value: the kind of the values.
  """
  what: str
  value: Kind | None = None

  @property
  def text(self) -> str:
    values = f' with {self.value.text} each' if self.value else ''
    return f'a mapping of {self.what}{values}'

  def check(self, where, value):
    if not isinstance(value, Mapping) and not hasattr(value, 'to_dict'):
      raise wrong(where, self.text, value)
    for name in value:
      if not (isinstance(name, str) and re.fullmatch(r'[A-Za-z_]\w*', name, re.A)):
        raise ValueError(
            f'`{where}` must have names of Latin letters, digits and _, got '
            f'{shown(name)}.')
      if self.value:
        self.value.check(f'{where}.{name}', value[name])
      else:
        plain(f'{where}.{name}', value[name])


def plain(where: str, value: Any) -> None:
  """Raises ValueError unless a value is made of numbers and strings."""
  if isinstance(value, (tuple, list)):
    for i, part in enumerate(value):
      plain(f'{where}[{i}]', part)
  elif isinstance(value, Mapping) or hasattr(value, 'to_dict'):
    for name in value:
      plain(f'{where}.{name}', value[name])
  elif isinstance(value, float) and not math.isfinite(value):
    raise wrong(where, 'finite', value)
  elif isinstance(value, str) and not value.isprintable():
    raise wrong(where, 'a string of printable characters', value)
  elif isinstance(value, int) and abs(value) > 2**63 - 1:
    raise wrong(where, 'a number of at most 64 bits', value)
  elif value is not None and not isinstance(value, (bool, int, float, str)):
    raise wrong(where, 'a number, a string or a tuple of them', value)


@dataclasses.dataclass(frozen=True)
class Field:
  """One field of a config.

  Attributes:
    name: of the field.
    kind: what values it may have.
    default: its default.
    meaning: one or a few sentences.
    group: its part of the table.
  """
  name: str
  kind: Kind
  default: Any
  meaning: str
  group: str


OPTIMIZERS = (
    'sgd', 'momentum', 'nesterov', 'adam', 'adamw', 'rmsprop', 'lars')
_AXES = Either(
    (Nothing(), Text(name=True), List(Text(name=True), "('data', 'model')")),
    'None, a mesh axis, or a tuple of mesh axes')
_RATE = Number(_LEAST_RATE)
_LEARNED = 'What is trained, how it learns, and on what'
_OPTIMISED = 'The optimisation'
_RECORDED = 'What is recorded (steps, except for `keep_checkpoints`)'
_DEVICES = 'The devices'


def _pairs(second: str, kind: Kind, example: str) -> List:
  """Pairs of a path pattern and something; each pattern once."""
  return List(
      Parts(('path pattern', second), (Pattern(), kind)), example, once=True)


def _patterns(example: str) -> List:
  return List(Pattern(), f"('{example}',)", once=True)


def _fields(group: str, *rows: tuple[str, Kind, Any, str]) -> list[Field]:
  return [Field(*row, group) for row in rows]


FIELDS: tuple[Field, ...] = (
    *_fields(
        _LEARNED,
        ('rule', Text(name=True), 'backprop',
         'A name of `bpjax.rules.names()`, or of `bpjax.variants.names()` for '
         "models made of blocks; or your own, 'package.module:function' or "
         "'file.py:function', which returns a rule."),
        ('rule_args', Table('arguments of the rule'), {},
         'The arguments of the rule, or of `bpjax.variant`: '
         '`rule_args.scale=.5`.'),
        ('rule_by_path', List(Parts(
            ('path pattern', 'rule', 'its arguments'),
            (Pattern(), Text(name=True), Table('arguments of the rule'))),
            "(('*/boundary', 'feedback_alignment', {'scale': .5}),)",
            once=True), (),
         'Rules that come before `rule`; the first that matches a unit wins, '
         'and `rule` trains those that none does.'),
        ('model', Text(name=True), 'mlp',
         "A name of `bpjax.models.names()`, or your own: 'package.module:Class' "
         "or 'file.py:Class', of linen or NNX, or a function that makes one. It "
         'is given `num_classes`, `image_shape`, `in_features` and `rngs` where '
         'it takes an argument of that name.'),
        ('model_args', Table('arguments of the model'), {},
         'The arguments of the model: `model_args.widths="(64, 64)"`.'),
        ('boundaries', _patterns('stage_*/block_*'), (),
         'Globs for modules whose outputs are units, too: what direct feedback '
         'brings there replaces all that arrives.'),
        ('units', _patterns('block_*/*'), (),
         'Globs for modules that are units as a whole: an affine operation '
         'with its norm or nonlinearity; noise comes after all of it.'),
        ('dataset', Text(name=True), 'digits',
         "'digits', the name of a TFDS set of images or texts, a generated "
         "task ('listops', 'associative_recall'), or your own: the path of a "
         "folder of images, of an .npz file, of a CSV or Parquet table, of a "
         "text file ('.txt') or of a saved Hugging Face data set, or "
         "'package.module:function', which returns a `bpjax.train.Dataset`."),
        ('dataset_args', Table('arguments of a generated task or of own data'),
         {},
         'Its arguments: `dataset_args.depth=3`; of a table `label` and `split` '
         'are names of columns; or those of the function.'),
        ('image_size', count(0, 2**16), 0,
         'Height and width that images of your own, and those that are '
         'streamed, are scaled to; 0: their own, and 224 of streamed ones.'),
        ('data_dir', Text(), '',
         'The TFDS directory; empty: the variable TFDS_DATA_DIR.'),
        ('validation', count(), 0,
         'Training examples set apart for validation.'),
        ('train_examples', count(), 0,
         'Use only so many training examples; 0: all.'),
        ('tokenizer', Choice(('', 'wordpiece', 'bpe', 'characters')), '',
         "Of texts, trained on the training texts; empty: 'wordpiece' of texts "
         "with labels, 'characters' of others, which are languages: each token "
         'is predicted from those before it.'),
        ('vocabulary', count(1, 2**24), 8192,
         "Largest number of the tokeniser's tokens."),
        ('length', count(0, 2**20), 0,
         'Tokens of a row; 0: 64 with labels, 128 of a language.'),
        ('text_features', List(Text(name=True), "('sentence',)"), (),
         "One or two texts of an example; empty: the set's."),
        ('pixel_mean', List(Number(-_FLOAT32, _FLOAT32), '(.5,)'), (),
         'Subtracted from pixels in [0, 1]: a number a channel, or one for '
         'all; empty: measured on the training images.'),
        ('pixel_std', List(Number(above=0, most=_FLOAT32), '(.25,)'), (),
         'What pixels are divided by then; likewise.'),
        ('preprocessing', Choice(('', 'gcn', 'gcn_zca')), '',
         "What is done to images in place of that scaling: 'gcn', global "
         "contrast normalisation of each image, or 'gcn_zca', ZCA whitening "
         'after it, with the mean and the covariance of the training images '
         '(without validation).'),
        ('zca_epsilon', Number(above=0, most=_FLOAT32), .1,
         "Added to the covariance's eigenvalues."),
        ('input_noise', Number(0, _FLOAT32), 0.,
         'Deviation of Gaussian noise on inputs, in training.'),
        ('augment', Code(('', 'crop_flip', 'contrastive')), '',
         'What a step does to its images, on the device; the random numbers '
         "are a function of seed and step. 'crop_flip': moved by up to "
         "`augment_args.padding` pixels (4), and flipped; 'contrastive': two "
         'views of every image, cropped to `augment_args.area` (.08) of it at '
         'least, flipped, jittered, blurred and solarised. The blocks of a '
         'variant then learn to tell the views of one image, the readout '
         "alone the labels. Or your own 'package.module:function' of a key and "
         'images, which returns images.'),
        ('augment_args', Table('arguments of the augmentation'), {},
         'Its arguments.'),
        ('contrastive_dim', count(1, 2**16), 128,
         'Of the projection that views are compared in.'),
        ('contrastive_temperature', Number(above=0, most=_FLOAT32), .5,
         'Of the contrastive loss.')),
    *_fields(
        _OPTIMISED,
        ('epochs', count(1), 10,
         'Passes over the training examples. Raise it, and a finished run goes '
         'on, unless its schedule depends on it.'),
        ('batch_size', count(1), 128,
         "Over all devices; an epoch's remainder is dropped."),
        ('loss', Code(
            ('cross_entropy', 'sigmoid_cross_entropy', 'squared_error')),
         'cross_entropy', 'The last two are on one-hot labels. Or your own '
         "'package.module:function' of outputs `[batch, classes]` and labels "
         '`[batch]`, which returns a loss for each example.'),
        ('label_smoothing', Number(0, below=1), 0.,
         'The share of the target that is spread over all classes, in training; '
         "of 'cross_entropy'."),
        ('class_weights', List(Number(0, _FLOAT32), '(1., .5)'), (),
         'What the losses of each class are multiplied by, in training; empty: '
         '1 each.'),
        ('prior_bias', Flag(), False,
         "The readout's bias begins at the logarithm of each class's share of the "
         "training examples, in place of 0; of 'cross_entropy'."),
        ('metrics', List(Code(()), "('my_metrics:top5',)", once=True), (),
         "What is measured beside loss and accuracy: 'package.module:function' "
         'of outputs and labels, which returns a number for each example.'),
        ('ema', Number(0, below=1), 0.,
         'Decay of an exponential moving average of the parameters, which is '
         'what is evaluated then; 0: none.'),
        ('dtype', Choice(('float32', 'bfloat16')), 'float32',
         "Of the computation. Parameters, feedback and the optimiser's state are "
         'float32 in both.'),
        ('accumulate', count(1, 2**20), 1,
         'The optimiser takes a step at every n-th batch, with the mean of their '
         'updates.'),
        ('reduction', Choice(('mean', 'sum')), 'mean',
         "'sum': updates are not divided by the batch size."),
        ('reduction_by_path', _pairs(
            'reduction', Choice(('mean', 'sum')), "(('Dense_0', 'sum'),)"), (),
         'What comes before `reduction`; the first that matches wins.'),
        ('bottleneck', _pairs('neurons', count(1), "(('Dense_0', 10),)"), (),
         "Only so many of a unit's neurons learn; the first that matches "
         'wins.'),
        ('frozen', _patterns('Dense_0'), (),
         'Path patterns of parameters and feedback that keep their first '
         'values.'),
        ('optimizer', Choice(OPTIMIZERS), 'adam',
         'LARS scales the step of each kernel to its norm, not those of '
         'biases. Rates are taken as they are: for a linear scaling with the '
         'batch, give rate * batch_size / 256.'),
        ('learning_rate', _RATE, 1e-3, 'The highest of the schedule.'),
        ('optimizer_by_path', List(Parts(
            ('path pattern', 'optimizer', 'learning rate'),
            (Pattern(), Choice(OPTIMIZERS), _RATE)),
            "(('readout', 'momentum', .01),)", once=True), (),
         'What comes before these; the rate follows the same schedule.'),
        ('schedule', Choice((
            'constant', 'cosine', 'linear', 'noam', 'plateau', 'polynomial')),
         'constant',
         "'cosine', 'linear' and 'polynomial' fall to `final_learning_rate`, "
         'as half a cosine, or as the remaining share of steps to '
         "`schedule_power`. 'noam': behind the warm-up, by one over the square "
         'root of the step (the constant of the original is that of which the '
         "rate at its end is `learning_rate`). 'plateau': to `plateau_factor` of "
         'itself after `plateau_patience` epochs in which the validation loss '
         'did not fall.'),
        ('schedule_power', Number(above=0, most=_FLOAT32), 1.,
         "Of 'polynomial'."),
        ('final_learning_rate', Number(0), 0., 'Where the schedule ends.'),
        ('warmup_epochs', Number(0), 0.,
         'The rate rises linearly from 0 over these.'),
        ('warmup_steps', count(), 0, "Or over these, of the optimiser's."),
        ('plateau_factor', Number(above=0, below=1), .2,
         "What the rate is multiplied by under 'plateau'."),
        ('plateau_patience', count(1), 1,
         'Epochs in which the validation loss does not fall before it is.'),
        ('momentum', Number(0, below=1), .9, 'Of momentum, nesterov and lars.'),
        ('beta_2', Number(0, below=1), .999,
         'Of adam and adamw: the decay of their mean of squares.'),
        ('weight_decay', Number(0, _FLOAT32), 0.,
         'Shrinks every parameter, and feedback that is trained, at every '
         'step: by `learning_rate * weight_decay` of itself under adamw, by '
         '`weight_decay` of itself (after the learning rate, which '
         "Kolen-Pollack's law needs) under all others."),
        ('l2', Number(0, _FLOAT32), 0.,
         'The other kind of decay, of kernels alone: `l2` times W is added to '
         'the gradient, before whatever the optimiser makes of it.'),
        ('clip_norm', Number(_LEAST_RATE, _FLOAT32, also=0), 0.,
         'Largest norm of all updates together; 0: any.'),
        ('feedback_optimizer', Choice(('', *OPTIMIZERS)), '',
         'Of feedback that is trained; empty: the same.'),
        ('feedback_learning_rate', Number(_LEAST_RATE, also=0), 0.,
         'Of that optimizer; 0: `learning_rate`.'),
        ('mirror_every', count(1), 1,
         "The weight mirror's schedule: its feedback learns at every n-th "
         'step.'),
        ('mirror_first', count(), 0,
         'Steps in which it learns alone, before the first one.'),
        ('feedback_schedule', Choice(('together', 'epochs')), 'together',
         "When feedback that is trained learns: 'together' with the "
         "parameters, at every step; 'epochs': in the first, third, ... epoch "
         'it alone, in the second, fourth, ... the parameters alone (target '
         "propagation's own schedule)."),
        ('monitor', Text(name=True), 'accuracy',
         'What of the validation examples says which epoch is the best: '
         "'loss', the lowest; 'accuracy' or the name of another metric, the "
         'highest.'),
        ('early_stopping', count(), 0,
         'The run ends after so many epochs in a row without a better '
         '`monitor`; 0: never.'),
        ('keep_best', Flag(), False,
         'Keep a checkpoint of the best epoch by `monitor`, in the folder '
         '`best`.'),
        ('particles', Flag(), False,
         "Equilibrium propagation: each training example's free phase goes on "
         'from where its last one ended. Takes memory for the states of all '
         'examples.'),
        ('seed', count(), 0,
         'Of everything random: initialisation, order, noise.')),
    *_fields(
        _RECORDED,
        ('eval_batch_size', count(1, 2**16), 1000, 'Examples a pass.'),
        ('log_every', count(), 0,
         "A line of training loss; 0: at every epoch's end."),
        ('alignment_every', count(), 0, 'Alignment with backprop; 0: never.'),
        ('alignment_split', Choice(('train', 'validation', 'test')), 'train',
         'Whose first batch it is measured on.'),
        ('checkpoint_every', count(), 0, "0: at every epoch's end."),
        ('keep_checkpoints', count(1), 2, 'How many are kept.')),
    *_fields(
        _DEVICES,
        ('steps_per_call', count(0, 10**6), 0,
         'Steps per dispatch (1 for streams); 0: chosen.'),
        ('mesh', Table('mesh axes', Number(1, _WHOLE, whole=True, also=-1)),
         {'data': -1}, 'Axis -> devices; -1: all that are left.'),
        ('sharding', _pairs(
            'partition spec', Named(
                Choice(('fsdp', 'tensor')), List(_AXES, "(None, 'model')")),
            "(('*/kernel', (None, 'model')), ('*', ()))"), (),
         'Where parameters and feedback lie, and with them the optimiser\'s '
         'moments. The first that matches wins, and every parameter has to be '
         "matched; a pattern may start with 'params/' or 'feedback/'. In place "
         "of a spec: 'fsdp', the largest axis that can be over 'data'; "
         "'tensor', the last axis of what has two or more over 'model'. Empty: "
         'every device holds everything.')),
)
BY_NAME = {field.name: field for field in FIELDS}
# Fields that take new names.
FREE = tuple(f.name for f in FIELDS if isinstance(f.kind, Table))


def check(values: Mapping[str, Any]) -> None:
  """Raises ValueError for the first field whose value is not of its kind.

  Args:
    values: a config, or a mapping like it.

  Example:
    >>> check({field.name: field.default for field in FIELDS})
  """
  for name in values:
    if name not in BY_NAME:
      raise ValueError(
          f'`config.{name}` is no field of a config'
          f'{nearest(name, list(BY_NAME)) or "."} '
          f'Known: {", ".join(BY_NAME)}.')
  for name, field in BY_NAME.items():
    if name not in values:
      raise ValueError(
          f'`config.{name}` is missing; start from '
          '`bpjax.train.config.default()`.')
    field.kind.check(name, values[name])


def help_text() -> str:
  """What `--help` prints of the fields."""
  lines = []
  for group in dict.fromkeys(f.group for f in FIELDS):
    lines += ['', group + ':']
    for f in (f for f in FIELDS if f.group == group):
      lines.append(f'  --config.{f.name}={_shell(f.default)}')
      lines += textwrap.wrap(
          f'{f.meaning} Must be {f.kind.text}.', 78, initial_indent=' ' * 6,
          subsequent_indent=' ' * 6, break_long_words=False)
  return '\n'.join(lines)


def page() -> str:
  """The documentation of the fields, in Markdown."""
  lines = [
      '# The fields of a config', '',
      '<!-- Written by `python -m bpjax.train.fields > docs/config.md`. -->',
      '',
      'A config file is a Python file with `get_config()` that starts from '
      '`bpjax.train.config.default()`; `--config.FIELD=VALUE` overrides a '
      'field. That file is the one thing that is run as code.']
  for group in dict.fromkeys(f.group for f in FIELDS):
    lines += ['', f'## {group}', '', '| field | default | must be | meaning |',
              '| --- | --- | --- | --- |']
    for f in (f for f in FIELDS if f.group == group):
      cells = (f'`{f.name}`', f'`{f.default!r}`', f.kind.text, f.meaning)
      escaped = (c.replace('|', r'\|').replace('*', r'\*') for c in cells)
      lines.append(f'| {" | ".join(escaped)} |')
  return '\n'.join(lines) + '\n'


def _shell(value):
  return value if isinstance(value, str) else repr(value)


if __name__ == '__main__':
  print(page(), end='')
