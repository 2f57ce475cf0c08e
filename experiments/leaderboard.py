"""The leaderboard: every rule on every column, with one budget for all.

A column is a model on a data set, a row a rule, and a cell the two together. Each
cell gets the same search, a few learning rates on validation examples, and then
the same seeds on test examples; runs are those of `bpjax.train`, in folders named
as in `experiments.search` and `experiments.reproduction`. The control is a row
like any other: hidden layers as they were drawn, and a readout that learns.

`scripts/leaderboard.py` is the command, `docs/leaderboard.md` the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
import hashlib
import json
import math
import os
import statistics
import time
import traceback
from typing import Any, NamedTuple
import warnings

import bpjax
from bpjax.train import config as config_lib
from bpjax.train import fields as fields_lib
from bpjax.train import named
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import build
from experiments import reproduction
from experiments import search as search_lib
import jax
import ml_collections
import numpy as np
from scipy import special

FROZEN = 'frozen'
_SEARCH_SEED = 100  # None of those that are tested.
_NEVER = 10**9  # Alignment before the first step and behind the last alone.
_ROUNDS, _STEPS = 7, 3  # Of timing a step.
# As a user's step is; runs may be compiled in less time.
_COMPILED = {'xla_backend_optimization_level': 3}
LEVEL = .05  # Of the paired test against the control.


class Published(NamedTuple):
  """A number from a paper beside a column.

  Attributes:
    accuracy: test accuracy, %.
    source: where it stands.
    differs: how its network or its training is another than ours.
  """
  accuracy: float
  source: str
  differs: str


class Column(NamedTuple):
  """A model on a data set.

  Attributes:
    title: for readers.
    fields: of the config, `model_args` among them.
    readout: the module that reads the hidden layers.
    blocks: globs of the blocks that have local losses; none: it has none.
    grouped: whether blocks put out an axis for groups.
    growth: globs of residual blocks, for which growth means something.
    published: row -> a paper's number.
  """
  title: str
  fields: Mapping[str, Any]
  readout: str = 'readout'
  blocks: tuple[str, ...] = ()
  grouped: bool = False
  growth: tuple[str, ...] = ()
  published: Mapping[str, Published] = {}


class Row(NamedTuple):
  """A rule with its settings, the same in every column.

  Attributes:
    rule: a name that configs know.
    rule_args: its arguments.
    fields: of the config, besides.
    rates: learning rates to search; as many for every row.
    local: whether blocks have losses of their own.
    source: hash of the file of a rule that is not the library's.
  """
  rule: str
  rule_args: Mapping[str, Any] = {}
  fields: Mapping[str, Any] = {}
  rates: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
  local: bool = False
  source: str = ''


class Budget(NamedTuple):
  """What a tier spends on each cell of a column.

  Attributes:
    search_examples: training examples of a candidate.
    search_epochs: its epochs.
    train_examples: training examples of a seed; 0: all that are not held out.
    epochs: its epochs.
    limit: seconds that a cell may take by the measured time of its step.
  """
  search_examples: int
  search_epochs: int
  train_examples: int
  epochs: int
  limit: float


class Tier(NamedTuple):
  """One size of the leaderboard; its name is what it costs on two cores.

  Attributes:
    rates: how many of a row's learning rates are searched.
    seeds: how many are tested.
    columns: column -> what each of its cells may spend.
    rows: those of the tier; none: all.
  """
  rates: int
  seeds: int
  columns: Mapping[str, Budget]
  rows: tuple[str, ...] = ()


_AKROUT = 'Akrout et al., 2019, log of the authors\' program'
_ORORBIA = 'Ororbia et al., 2023, Table 1'
_ORORBIA_2 = 'Ororbia et al., 2023, Table 2a'
_SANFIZ = 'Sanfiz and Akrout, 2021, Table of CIFAR-10'
_SANFIZ_LENET = 'Sanfiz and Akrout, 2021, benchmarks of LeNet'
_REN = 'Ren et al., 2023, Table 3'
_NOKLAND = 'Nøkland and Eidnes, 2019, authors\' program'


def _errors(source, differs, **errors):
  return {row: Published(round(100 - error, 3), source, differs)
          for row, error in errors.items()}


_MLP = {
    'model': 'mlp', 'model_args': {
        'widths': (256, 256), 'activation': 'tanh', 'units': 'layer'}}
_LENET = {
    'validation': 5000, 'batch_size': 128, 'model': 'lenet',
    'model_args': {'padding': 'SAME'}}
_LENET_NET = '100 epochs of SGD with momentum, batch 64, one run'
_CIFAR = {'dataset': 'cifar10', 'validation': 5000, 'batch_size': 128}
_SST2 = {
    'dataset': 'glue/sst2', 'validation': 5000, 'length': 32,
    'vocabulary': 4096, 'batch_size': 64}
_ORORBIA_NET = 'five layers of 256; baselines from other papers\' networks'

COLUMNS: dict[str, Column] = {
    'digits_mlp': Column(
        'digits, MLP 64-64-64-10 tanh',
        {'dataset': 'digits', 'validation': 300, 'batch_size': 64,
         'model': 'mlp', 'model_args': {
             'widths': (64, 64), 'activation': 'tanh', 'units': 'layer'}},
        readout='Dense_0', blocks=('Layer_*',)),
    'mnist_mlp': Column(
        'MNIST, MLP 784-256-256-10 tanh',
        {'dataset': 'mnist', 'validation': 5000, 'batch_size': 128, **_MLP},
        readout='Dense_0', blocks=('Layer_*',),
        published={
            **_errors(
                _ORORBIA, _ORORBIA_NET, target_propagation=1.86,
                equilibrium_propagation=9.21, direct_feedback_alignment=2.75,
                local_representation_alignment=1.97,
                recursive_local_representation_alignment=1.82),
            **_errors(
                _AKROUT, '784-500-10 sigmoid, 400 epochs, one seed',
                backprop=1.50, feedback_alignment=2.20, weight_mirror=1.51,
                kolen_pollack=1.55),
            **_errors(
                _NOKLAND, '3 x 1024 relu, BatchNorm, dropout, 100 epochs',
                **{'LG-BP': .68, 'local_similarity': .80,
                   'local_prediction_and_similarity': .62})}),
    'fashion_mlp': Column(
        'Fashion-MNIST, MLP 784-256-256-10 tanh',
        {'dataset': 'fashion_mnist', 'validation': 5000, 'batch_size': 128,
         **_MLP},
        readout='Dense_0', blocks=('Layer_*',),
        published={
            **_errors(
                _ORORBIA, _ORORBIA_NET, backprop=12.98, target_propagation=19.66,
                equilibrium_propagation=20.97,
                local_representation_alignment=12.31, feedback_alignment=12.89,
                direct_feedback_alignment=13.09, weight_mirror=12.49,
                recursive_local_representation_alignment=11.87),
            **_errors(
                _NOKLAND, '3 x 1024 relu, BatchNorm, dropout, 100 epochs',
                **{'LG-BP': 8.60, 'local_similarity': 9.70,
                   'local_prediction_and_similarity': 8.54})}),
    'mnist_lenet': Column(
        'MNIST, LeNet-5 tanh', {'dataset': 'mnist', **_LENET},
        blocks=('conv_*', 'dense_*'),
        published=_errors(
            _SANFIZ_LENET, _LENET_NET, backprop=.91, feedback_alignment=1.70,
            direct_feedback_alignment=1.61, sign_symmetry=.94)),
    'fashion_lenet': Column(
        'Fashion-MNIST, LeNet-5 tanh', {'dataset': 'fashion_mnist', **_LENET},
        blocks=('conv_*', 'dense_*'),
        published=_errors(
            _SANFIZ_LENET, _LENET_NET, backprop=9.20, feedback_alignment=13.06,
            direct_feedback_alignment=12.81, sign_symmetry=9.69)),
    'cifar_cnn': Column(
        'CIFAR-10, CNN of two convolutions, relu',
        {**_CIFAR, 'model': 'cnn',
         'model_args': {'channels': (32, 64), 'norm': 'none'}},
        readout='Dense_0', blocks=('Conv_*',),
        published={
            'direct_feedback_alignment': Published(
                62.65, 'Launay et al., 2019, Table 4',
                'three convolutions and a dense layer, tanh, 50 epochs'),
            **_errors(
                _ORORBIA_2, 'a larger network', backprop=30.17,
                weight_mirror=36.57,
                recursive_local_representation_alignment=33.50)}),
    'cifar_resnet20': Column(
        'CIFAR-10, ResNet-20',
        {**_CIFAR, 'model': 'resnet20'}, blocks=('stage_*/block_*',),
        growth=('stage_*/block_*',),
        published=_errors(
            _SANFIZ, '250 epochs with flips and crops', backprop=8.63,
            feedback_alignment=32.16, direct_feedback_alignment=45.94,
            sign_symmetry=10.05)),
    'cifar_local_mixer': Column(
        'CIFAR-10, LocalMixer M/8/16',
        {**_CIFAR, 'model': 'local_mixer', 'model_args': {'size': 'm/8/16'},
         'units': ('block_*/*',)}, blocks=('block_*',), grouped=True,
        published=_errors(
            _REN, 'more epochs; its number is not given', **{
                'backprop': 33.62, 'L-BP': 30.75, 'LG-BP': 33.84,
                'feedback_alignment': 39.94, 'LG-FA': 39.73,
                'direct_feedback_alignment': 38.80, 'forward_gradient': 59.72,
                'LG-FG-A': 30.68})),
    'cifar_vit': Column(
        'CIFAR-10, ViT of 4 blocks, width 64',
        {**_CIFAR, 'model': 'vit', 'model_args': {
            'depth': 4, 'width': 64, 'heads': 4}},
        blocks=('block_*',), growth=('block_*',)),
    'sst2_lstm': Column(
        'SST-2, LSTM of 64',
        {**_SST2, 'model': 'lstm', 'model_args': {'width': 64}}),
    'sst2_encoder': Column(
        'SST-2, encoder of 2 blocks, width 64',
        {**_SST2, 'model': 'bert_encoder', 'model_args': {
            'depth': 2, 'width': 64, 'heads': 4, 'hidden': 128,
            'dropout': 0.}},
        blocks=('block_*',), growth=('block_*',)),
    'shakespeare_gpt': Column(
        'tiny Shakespeare, next character, GPT of 2 blocks, width 96',
        {'dataset': 'tiny_shakespeare', 'validation': 400, 'length': 128,
         'batch_size': 32, 'eval_batch_size': 100, 'model': 'gpt',
         'model_args': {'depth': 2, 'width': 96, 'heads': 4, 'norm': 'pre',
                        'dropout': 0.}},
        blocks=('block_*',), growth=('block_*',)),
}

# What a rule's own page says that it needs. All else is the same for all rows.
_DECAY = {'weight_decay': 5e-4}  # Feedback forgets how it began by this alone.
_PIXELS = {'pixel_mean': (0.,), 'pixel_std': (1.,)}  # Not below 0.
_TARGETS = {'step': .1, 'sigma': .1}
_SETTINGS: dict[str, Row] = {
    'difference_target_propagation': Row(
        'difference_target_propagation', _TARGETS),
    'direct_kolen_pollack': Row('direct_kolen_pollack', fields=_DECAY),
    'equilibrium_propagation': Row(
        # A nudge travels one unit a step; 20 of them settle one hidden layer.
        'equilibrium_propagation', {'free_steps': 100, 'nudged_steps': 8},
        {'optimizer': 'sgd'}, (.02, .05, .1)),
    'forward_forward': Row('forward_forward', fields=_PIXELS),
    'kolen_pollack': Row('kolen_pollack', fields=_DECAY),
    'spsa': Row('spsa', rates=(1e-4, 5e-4, 2e-3)),
    'target_propagation': Row('target_propagation', _TARGETS),
    'weight_mirror': Row('weight_mirror', fields={
        'feedback_optimizer': 'sgd', 'feedback_learning_rate': 1.,
        'mirror_first': 200}),
}
# In a column, what a row needs besides.
_SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    (column, 'equilibrium_propagation'): {
        **_PIXELS, 'loss': 'squared_error', 'rule_args': {'readout': 'clip'},
        # Its own nonlinearity: states are kept in [0, 1].
        'model_args': {'activation': 'identity', 'units': 'affine'}}
    for column in ('digits_mlp', 'mnist_mlp', 'fashion_mlp')}
_LOCAL_LOSSES = ('local_similarity', 'local_prediction_and_similarity')
_VARIANTS = ('L-BP', 'LG-BP', 'LG-FA', 'LG-FG-W', 'LG-FG-A')


def rows() -> dict[str, Row]:
  """Every row: the control, the rules of the library, and local losses.

  Example:
    >>> list(rows())[:2]
    ['backprop', 'frozen']
  """
  names = [n for n in LIBRARY if n != 'backprop']
  return {
      'backprop': Row('backprop'), FROZEN: Row('backprop'),
      **{name: _SETTINGS.get(name, Row(name)) for name in names},
      **{name: Row(name, local=True) for name in (*_VARIANTS, *_LOCAL_LOSSES)}}


LIBRARY = bpjax.rules.names()  # Before others are registered.
_CPU = {
    'mnist_mlp': Budget(15_000, 1, 0, 2, 400.),
    'fashion_mlp': Budget(15_000, 1, 0, 2, 400.)}
_DAY = {
    'mnist_mlp': Budget(0, 3, 0, 20, 3600.),
    'fashion_mlp': Budget(0, 3, 0, 20, 3600.),
    'mnist_lenet': Budget(15_000, 1, 0, 3, 3600.),
    'fashion_lenet': Budget(15_000, 1, 0, 3, 3600.),
    'cifar_cnn': Budget(10_000, 1, 20_000, 3, 3600.),
    'cifar_resnet20': Budget(3000, 1, 6000, 2, 3600.),
    'cifar_local_mixer': Budget(3000, 1, 6000, 2, 3600.),
    'cifar_vit': Budget(3000, 1, 6000, 3, 3600.),
    'sst2_lstm': Budget(10_000, 1, 20_000, 2, 3600.),
    'sst2_encoder': Budget(10_000, 1, 20_000, 2, 3600.),
    'shakespeare_gpt': Budget(3000, 1, 0, 1, 3600.)}
TIERS: dict[str, Tier] = {
    'minute': Tier(
        2, 3, {'digits_mlp': Budget(0, 5, 0, 10, 30.)},
        ('backprop', FROZEN, 'feedback_alignment', 'direct_feedback_alignment',
         'kolen_pollack', 'sign_symmetry')),
    'hour': Tier(3, 3, _CPU),
    'day': Tier(3, 3, _DAY),
    'gpu': Tier(3, 5, {
        'mnist_mlp': Budget(0, 10, 0, 50, math.inf),
        'fashion_mlp': Budget(0, 10, 0, 50, math.inf),
        'mnist_lenet': Budget(0, 10, 0, 100, math.inf),
        'fashion_lenet': Budget(0, 10, 0, 100, math.inf),
        'cifar_cnn': Budget(0, 10, 0, 50, math.inf),
        'cifar_resnet20': Budget(0, 10, 0, 100, math.inf),
        'cifar_local_mixer': Budget(0, 10, 0, 50, math.inf),
        'cifar_vit': Budget(0, 10, 0, 100, math.inf),
        'sst2_lstm': Budget(0, 2, 0, 5, math.inf),
        'sst2_encoder': Budget(0, 2, 0, 5, math.inf),
        'shakespeare_gpt': Budget(0, 4, 0, 20, math.inf)}),
}


def register() -> None:
  """Gives the rows of other local losses than a variant's a name in configs."""
  for name, loss in zip(_LOCAL_LOSSES, (
      bpjax.local_losses.similarity,
      bpjax.local_losses.prediction_and_similarity)):
    bpjax.rules.register(name, functools.partial(_with_loss, loss))


def _with_loss(
    loss: Callable[..., Any], blocks: tuple[str, ...] = ('block_*',),
    grouped: bool = False, classes: int = 10) -> Any:
  """Backprop inside each block, from a loss of its own; none between."""
  return bpjax.local(
      bpjax.rules.backprop(), tuple(blocks), loss=loss(classes),
      grouped=grouped)


def outside(text: str) -> tuple[str, Row]:
  """Registers a rule from a file that a user names; its code is run.

  Args:
    text: 'FILE.py:FUNCTION'; the function takes no arguments, or has a default
      for each, and returns a rule.

  Returns:
    The row's name, 'FUNCTION@HASH' with a hash of the file, so that changed code
    is another row; and the row.

  Raises:
    ValueError: with one sentence, for a file or function that there is not, one
      that needs arguments or returns no rule, or a name of the library.

  Example:
    >>> name, row = outside('mine.py:my_rule')
  """
  path, _, function = text.rpartition(':')
  if not path.endswith('.py') or not function.isidentifier():
    raise ValueError(
        f'`rule` must be FILE.py:FUNCTION, got {fields_lib.shown(text)}; write '
        'for example --rule=mine.py:my_rule.')
  if function in (*LIBRARY, *rows()):
    raise ValueError(
        f'`rule` must have a name of its own, and {function!r} is a row of the '
        'leaderboard; rename the function.')
  make = named.find('rule', text)
  rule = named.called('rule', text, make)
  if not callable(getattr(rule, 'value_and_grad', None)):
    raise ValueError(
        f'`rule` must be a function that returns a rule, and {function}() '
        f'returns {type(rule).__name__}; see docs/writing_a_rule.md.')
  bpjax.rules.register(function, make)
  with open(path, 'rb') as file:
    digest = hashlib.sha256(file.read()).hexdigest()[:8]
  return f'{function}@{digest}', Row(function, source=digest)


def config_of(
    tier: str, column: str, row: str, known: Mapping[str, Row], *,
    candidate: int = 0, seed: int = _SEARCH_SEED, search: bool = False
) -> ml_collections.ConfigDict:
  """The config of one run of a cell.

  Args:
    tier: name of the tier.
    column: name of the column.
    row: name of the row.
    known: the rows, by name.
    candidate: which of the row's learning rates.
    seed: of the run.
    search: whether it is one of the search.

  Returns:
    The config; that of the control without what is frozen (see `freeze`).
  """
  what, own = COLUMNS[column], known[row]
  budget = TIERS[tier].columns[column]
  special = dict(_SPECIAL.get((column, row), {}))
  config = config_lib.default()
  config.schedule, config.keep_checkpoints = 'cosine', 1
  config.checkpoint_every = _NEVER if search else 0
  args = {**own.rule_args, **special.pop('rule_args', {})}
  model_args = {
      **what.fields.get('model_args', {}), **special.pop('model_args', {})}
  of_text = 'length' in what.fields
  for name, value in {**what.fields, **own.fields, **special}.items():
    if name not in ('model_args', 'rule_args') and not (
        of_text and name in _PIXELS):
      config[name] = value
  if own.local:
    args.update(blocks=what.blocks, grouped=what.grouped)
    if row in _LOCAL_LOSSES:
      args['classes'] = 2 if what.fields['dataset'] == 'glue/sst2' else 10
  for field, value in (('rule_args', args), ('model_args', model_args)):
    for name, part in value.items():
      config[field][name] = part
  config.rule, config.learning_rate = own.rule, own.rates[candidate]
  config.seed = seed
  config.train_examples = (
      budget.search_examples if search else budget.train_examples)
  config.epochs = budget.search_epochs if search else budget.epochs
  if not search:
    config.alignment_every, config.alignment_split = _NEVER, 'validation'
  return config


def freeze(config: ml_collections.ConfigDict, readout: str) -> None:
  """Leaves the readout alone to learn; hidden layers stay as they were drawn."""
  *_, like = build.make(config)
  config.frozen = tuple(sorted(n for n in like.params if n != readout))


def refusal(column: str, row: str, known: Mapping[str, Row]) -> str:
  """Why a cell is none before any rule is asked; '' if it is one."""
  if known[row].local and not COLUMNS[column].blocks:
    return 'The model has no blocks that local losses could be given to.'
  return ''


class Settings(NamedTuple):
  """What a call of the leaderboard is made with.

  Attributes:
    tier: name of the tier.
    workdir: folder of all runs' folders.
    known: the rows, by name.
    seeds: how many are tested; 0: the tier's.
    data_dir: of the data; '': the variable TFDS_DATA_DIR.
    train: whether what is missing is trained.
    check: whether rules are asked what they refuse where nothing is trained.
  """
  tier: str
  workdir: str
  known: Mapping[str, Row]
  seeds: int = 0
  data_dir: str = ''
  train: bool = True
  check: bool = False

  @property
  def number_of_seeds(self) -> int:
    """How many are tested."""
    return self.seeds or TIERS[self.tier].seeds


def cell(
    settings: Settings, column: str, row: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Trains what is missing of a cell, and says what came of it.

  Args:
    settings: of the call.
    column: name of the column.
    row: name of the row.

  Returns:
    The cell as the results hold it, and its runs. `status` is 'run', 'refused',
    'not in this tier', 'diverged', 'failed' or 'missing', and `reason` says why.
  """
  tier, known = TIERS[settings.tier], settings.known
  own = known[row]
  label = f'{column},{row}'
  result = {
      'tier': settings.tier, 'column': column, 'row': row, 'rule': own.rule,
      **({'source': own.source} if own.source else {})}

  def without(status, reason):
    return {**result, 'status': status, 'reason': reason}, []

  if refusal(column, row, known):
    return without('refused', refusal(column, row, known))
  make = functools.partial(_made, settings, column, row)
  path = os.path.join(settings.workdir, f'{label},cell.json')
  facts = _held(path, make())
  if facts is None:
    if not settings.train:
      found = _refused(make()) if settings.check else None
      if found:
        return without(*found)
      return without('missing', 'It was not run.')
    facts = _facts(make(), tier.columns[column].search_examples)
    os.makedirs(settings.workdir, exist_ok=True)
    _write(path, {'config': _identity(make()), **facts})
  if 'none' in facts:
    return without(*facts['none'])
  rates = range(tier.rates)
  budget, cost = tier.columns[column], facts['cost']
  steps = facts['examples'] * budget.epochs * settings.number_of_seeds
  steps += facts['search_examples'] * budget.search_epochs * len(rates)
  seconds = steps / make().batch_size * cost['milliseconds'] / 1e3
  result['cost'] = cost
  if seconds > budget.limit:
    return without('not in this tier', (
        f'A step takes {cost["milliseconds"]:.0f} ms, so that the cell would '
        f'take {seconds / 60:.0f} minutes; {budget.limit / 60:.0f} are given.'))
  search = [make(candidate=i, search=True) for i in rates]
  if settings.train:
    try:
      accuracies = search_lib.search(
          {row: search}, settings.workdir, column)[row]
    except SystemExit as error:
      if error.code == 2:  # What no step has asked for.
        return without('failed', 'The launcher refuses it: see its log.')
      raise
    _write(path, {'config': _identity(make()), **facts,
                  'validation_accuracy': accuracies})
  else:
    accuracies = facts.get('validation_accuracy')
    if accuracies is None:
      return without('missing', 'Its search is not finished.')
  chosen = search_lib.best(accuracies)
  result.update(
      candidates=[{'optimizer': search[i].optimizer,
                   'learning_rate': search[i].learning_rate} for i in rates],
      validation_accuracy=accuracies, chosen=chosen)
  if all(a is None for a in accuracies):
    return without('diverged', 'No learning rate of the search kept the '
                   'weights finite.')
  runs = [
      reproduction.Run(
          reproduction.Row(row, config, {}, column), config,
          os.path.join(settings.workdir, f'{label},seed={seed}'))
      for seed in range(settings.number_of_seeds)
      for config in [make(candidate=chosen, seed=seed)]]
  for run in runs:
    reproduction.check_folder(run.folder, run.config)
  if settings.train and reproduction.train_runs(runs):
    raise KeyboardInterrupt
  records = [
      _record(settings, run, column, facts['units'])
      for run in runs if workdir_lib.read_summary(run.folder)]
  if not records:
    if settings.train:
      return without('diverged', 'The weights did not stay finite.')
    return without('missing', 'No seed is finished.')
  missing = len(runs) - len(records)
  result.update(status='run', reason=(
      f'{missing} of {len(runs)} seeds are missing or did not stay finite.'
      if missing else ''))
  return result, records


def _made(settings, column, row, **which):
  config = config_of(settings.tier, column, row, settings.known, **which)
  config.data_dir = settings.data_dir
  if row == FROZEN:
    config.frozen = _frozen(settings, column)
  return config


@functools.cache
def _frozen_of(tier, column, data_dir):
  config = config_of(tier, column, 'backprop', rows())
  config.data_dir = data_dir
  freeze(config, COLUMNS[column].readout)
  return tuple(config.frozen)


def _frozen(settings, column):
  return _frozen_of(settings.tier, column, settings.data_dir)


def _identity(config):
  held = config_lib.to_json(config)
  del held['data_dir']
  return held


def _held(path, config):
  """What was found of a cell before, if it had the same config."""
  try:
    with open(path, encoding='utf-8') as file:
      held = json.load(file)
  except (FileNotFoundError, ValueError):
    return None
  return held if held.pop('config') == _identity(config) else None


def _write(path, content):
  """Whole or not at all, wherever the process ends."""
  with open(f'{path}.new', 'w', encoding='utf-8') as file:
    json.dump(content, file)
  os.replace(f'{path}.new', path)


def _facts(config, search_examples):
  """Why there is no run; or what a step costs, and the units."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Of weights that stay exact.
    try:
      made = build.make(config)
      step = _Step(made)
      reference = None
      if config.rule != 'backprop' or config.frozen:
        # On the same model; a rule's own (see `_SPECIAL`) where it has one.
        plain = config.copy_and_resolve_references()
        plain.rule, plain.rule_args, plain.frozen = 'backprop', {}, ()
        plain.feedback_optimizer, plain.feedback_learning_rate = '', 0.
        plain.mirror_first = 0
        reference = _Step(build.make(plain))
    except Exception as error:  # pylint: disable=broad-except
      return {'none': _said(error)}
  if reference is None:
    reference = step
    times = [(t, t) for t in (step.seconds() for _ in range(_ROUNDS))]
  else:
    times = [(step.seconds(), reference.seconds()) for _ in range(_ROUNDS)]
  dataset, learner, *_ = made
  examples = len(dataset.train.labels)
  return {
      'examples': examples,
      'search_examples': min(search_examples or examples, examples),
      'units': _sizes(learner), 'cost': {
          'milliseconds': round(1e3 * statistics.median(t for t, _ in times), 3),
          'time_ratio': round(statistics.median(a / b for a, b in times), 3),
          'memory_mib': round(step.memory / 2**20, 3),
          'memory_ratio': round(step.memory / reference.memory, 3)}}


def _refused(config):
  """('refused', the sentence), or a failure; None. Nothing is compiled."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      _, learner, feed, _, _ = build.make(config)
      jax.eval_shape(
          lambda: learner.step(learner.init(), feed.fixed_batch))
    except Exception as error:  # pylint: disable=broad-except
      return _said(error)
  return None


def _said(error):
  """What an error means: a rule refuses in one sentence; all else is a bug."""
  *_, last = traceback.extract_tb(error.__traceback__)
  own = os.path.dirname(bpjax.__file__) in last.filename
  first, *more = str(error).splitlines() or ['']
  if isinstance(error, ValueError) and own and not more:
    return 'refused', first
  return 'failed', f'{type(error).__name__}: {first[:200]}'


class _Step:
  """A compiled step of a run, and what it needs."""

  def __init__(self, made):
    _, learner, feed, _, _ = made
    self._batch = feed.fixed_batch
    self._state = jax.jit(learner.init)()
    self._run = jax.jit(learner.step, donate_argnums=0).lower(
        self._state, self._batch).compile(compiler_options=_COMPILED)
    held = self._run.memory_analysis()
    # At most, of parameters, feedback, the optimiser's state, and temporaries.
    self.memory = (
        held.temp_size_in_bytes + held.argument_size_in_bytes
        + held.output_size_in_bytes - held.alias_size_in_bytes)
    self.seconds()

  def seconds(self) -> float:
    """Of a step, the mean of a few: the processor's own time where it is one.

    On a machine that others use, the time on the clock says next to nothing.
    """
    clock = (time.process_time if jax.default_backend() == 'cpu'
             else time.perf_counter)
    begin = clock()
    for _ in range(_STEPS):
      self._state, loss = self._run(self._state, self._batch)
    jax.block_until_ready((self._state, loss))
    return (clock() - begin) / _STEPS


def _sizes(learner):
  """Hidden unit -> numbers that it puts out for an example."""
  infos = {}

  def trace():
    x = learner._nothing()  # pylint: disable=protected-access
    variables = learner.net.init(jax.random.key(0), x)
    infos.update(learner.rule.infos(learner.net, variables, x))

  jax.eval_shape(trace)
  return {name: math.prod(info.out.shape[1:]) for name, info in infos.items()
          if not info.is_output}


def _record(settings, run, column, units):
  """What the results hold of a finished run."""
  summary = workdir_lib.read_summary(run.folder)
  whole = reproduction.record(run)
  lines = [m for m in workdir_lib.read_metrics(run.folder)
           if m['split'] == 'alignment']
  first = min((m['step'] for m in lines), default=0)
  begin = {m['unit']: m for m in lines if m['step'] == first}
  record = {
      'tier': settings.tier, 'column': column, 'row': run.row.name,
      'run': os.path.basename(run.folder),
      **{name: whole[name] for name in (
          'seed', 'rule', 'epochs', 'steps', 'test_accuracy', 'train_accuracy',
          'wall_time', 'device_kind', 'git_commit', 'data_source')},
      'learning_rate': run.config.learning_rate,
      'optimizer': run.config.optimizer,
      'alignment': aligned(whole['alignment'], units),
      'alignment_before': aligned(begin, units)['mean']}
  if summary.get('test_bits_per_character') is not None:
    record['bits_per_character'] = round(summary['test_bits_per_character'], 4)
  if COLUMNS[column].growth and run.config.seed == 0:
    record['growth'] = largest_growth(run, COLUMNS[column].growth)
  return record


def aligned(
    measured: Mapping[str, Mapping[str, float | None]],
    units: Mapping[str, int]) -> dict[str, Any]:
  """Alignment with backprop over hidden units, and its floor.

  Args:
    measured: unit -> its `bpjax.Alignment`; None where there is no signal.
    units: hidden unit -> numbers that it puts out for an example.

  Returns:
    'mean' of the teaching signals' cosines over the hidden units that have one
    (None: no unit has), 'measured' and 'units', how many have one of how many,
    and 'floor', the standard deviation of the cosine of a random direction,
    1 / sqrt(d), averaged over the same units.
  """
  found = {
      name: measured[name]['teaching'] for name in units
      if name in measured and measured[name].get('teaching') is not None}
  floors = [1 / math.sqrt(units[name]) for name in found]
  return {
      'mean': round(statistics.fmean(found.values()), 4) if found else None,
      'measured': len(found), 'units': len(units),
      'floor': round(statistics.fmean(floors), 4) if found else None}


def largest_growth(
    run: reproduction.Run, blocks: tuple[str, ...]) -> float | None:
  """The largest growth of the residual stream from block to block.

  Args:
    run: a finished run; what was found is kept in its folder.
    blocks: globs of the residual blocks.

  Returns:
    The largest of `bpjax.growth`, on a training batch with the last weights; None
    where the run has no checkpoint.
  """
  path = os.path.join(run.folder, 'growth.json')
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)['growth']
  except (FileNotFoundError, ValueError):
    pass
  _, learner, feed, _, like = build.make(run.config)
  with workdir_lib.Workdir(run.folder) as folder, checkpoint.Checkpoints(
      folder.checkpoints, 1, warn=folder.warn,
      identity=folder.identity) as kept:
    restored = kept.restore(like, folder.recorded_before)
  found = None
  if restored is not None:
    _, state = restored
    batch = feed.fixed_batch
    measure = jax.jit(bpjax.growth(learner.net, blocks))
    values = measure(
        {'params': state.params, **state.model_state},
        learner.task.inputs(batch))
    found = round(float(max(map(float, values.values()))), 4)
  _write(path, {'growth': found})
  return found


# Statistics.


class Paired(NamedTuple):
  """Two rows compared seed by seed.

  Attributes:
    difference: mean of the differences, in points of accuracy.
    p: of a two-sided paired t-test; None for fewer than two common seeds.
    n: common seeds.
  """
  difference: float
  p: float | None
  n: int


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
  r"""A paired t-test over the seeds that two rows share.

  .. math::
    t = \frac{\bar d}{s_d / \sqrt n}, \qquad p = P(|T_{n-1}| > |t|)

  Args:
    one: seed -> accuracy.
    other: the same of another row.

  Returns:
    The comparison of `one` minus `other`; None without a common seed.

  Example:
    >>> paired({0: 3., 1: 4.}, {0: 1., 1: 1.}).difference
    2.5
  """
  seeds = sorted(set(one) & set(other))
  if not seeds:
    return None
  d = np.array([one[s] - other[s] for s in seeds])
  mean = float(d.mean())
  if len(seeds) < 2:
    return Paired(mean, None, 1)
  error = float(d.std(ddof=1)) / math.sqrt(len(seeds))
  if error == 0:
    return Paired(mean, 1. if mean == 0 else 0., len(seeds))
  p = 2 * float(special.stdtr(len(seeds) - 1, -abs(mean / error)))
  return Paired(mean, p, len(seeds))


def verdict(row: str, against: Paired | None) -> str:
  """What a row's comparison with the control says.

  Returns:
    'control'; 'better than frozen': a positive difference, with p below `LEVEL`;
    'no better than frozen'; 'not tested' with fewer than two seeds.
  """
  if row == FROZEN:
    return 'control'
  if against is None or against.p is None:
    return 'not tested'
  if against.difference > 0 and against.p < LEVEL:
    return 'better than frozen'
  return 'no better than frozen'


def table(
    results: Mapping[str, Any], tier: str, column: str) -> list[dict[str, Any]]:
  """The rows of a column, the highest accuracy first, and then the empty ones.

  Args:
    results: the content of a file of results.
    tier: name of the tier.
    column: name of the column.

  Returns:
    For each cell, what the file holds of it; and of one that was run `mean` and
    `std` of the test accuracy in %, `n`, `below` and `frozen` (`Paired`, against
    the next row and the control), `verdict`, `runs`, `alignment`, `floor`,
    `aligned_units` and `growth`.
  """
  here = lambda entry: (entry['tier'], entry['column']) == (tier, column)
  cells = [dict(c) for c in results['cells'] if here(c)]
  runs = [r for r in results['runs'] if here(r)]
  accuracies = {}
  for run in runs:
    accuracies.setdefault(run['row'], {})[run['seed']] = (
        100 * run['test_accuracy'])
  done = [c for c in cells if c['row'] in accuracies]
  for own in done:
    values = list(accuracies[own['row']].values())
    own['runs'] = [r for r in runs if r['row'] == own['row']]
    own['mean'], own['n'] = statistics.fmean(values), len(values)
    own['std'] = statistics.stdev(values) if len(values) > 1 else None
    own['frozen'] = paired(
        accuracies[own['row']], accuracies.get(FROZEN, {}))
    own['verdict'] = verdict(own['row'], own['frozen'])
    measured = [r['alignment'] for r in own['runs']]
    # Nothing learns in the control's hidden layers.
    found = [m for m in measured
             if m['mean'] is not None and own['row'] != FROZEN]
    own['alignment'] = _mean(m['mean'] for m in found)
    own['floor'] = _mean(m['floor'] for m in found)
    own['aligned_units'] = (
        max(m['measured'] for m in measured), measured[0]['units'])
    own['growth'] = next(
        (r['growth'] for r in own['runs'] if r.get('growth')), None)
  done.sort(key=lambda c: -c['mean'])
  for own, other in zip(done, [*done[1:], None]):
    own['below'] = None if other is None else paired(
        accuracies[own['row']], accuracies[other['row']])
  return done + [c for c in cells if c['row'] not in accuracies]


def _mean(values):
  values = list(values)
  return statistics.fmean(values) if values else None


def tiers_of(results: Mapping[str, Any], column: str) -> list[str]:
  """The tiers in which a column has runs, the largest first."""
  found = {r['tier'] for r in results['runs'] if r['column'] == column}
  return [t for t in reversed(TIERS) if t in found]


def merged(
    held: Mapping[str, Any] | None, cells: Iterable[Mapping[str, Any]],
    runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
  """Cells and runs of a file with new ones in the place of the same cells."""
  cells, runs = list(cells), list(runs)
  key = lambda e: (e['tier'], e['column'], e['row'])
  new = {key(c) for c in cells if c['status'] != 'missing'}
  old = held or {'cells': [], 'runs': []}
  kept = [c for c in old['cells'] if key(c) not in new]
  known = {key(c) for c in kept}
  order = lambda e: (
      list(TIERS).index(e['tier']), list(COLUMNS).index(e['column']), e['row'],
      e.get('seed', 0))
  return {
      'cells': sorted(
          kept + [c for c in cells if key(c) not in known], key=order),
      'runs': sorted(
          [r for r in old['runs'] if key(r) not in new] + runs, key=order)}


def missing(results: Mapping[str, Any], tier: str) -> list[tuple[str, str]]:
  """The cells of a tier that no results say anything of."""
  found = {(c['column'], c['row']) for c in results['cells']
           if c['tier'] == tier and c['status'] != 'missing'}
  return [
      (column, row) for column in TIERS[tier].columns
      for row in (TIERS[tier].rows or rows()) if (column, row) not in found]
