"""One run: what a config asks for, made ready and trained.

`setup` refuses whatever cannot work, and compiles; `start` finds the last whole
checkpoint, or begins; `train` goes on from there to the end. The result depends
on the config alone: not on where a run was interrupted, nor on how its steps
are cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import bpjax
from bpjax import paths
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train import hosts as hosts_lib
from bpjax.train import named
from bpjax.train.data import augment as augment_lib
from bpjax.train.data import feed as feed_lib
from bpjax.train.data import generated
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import devices
from bpjax.train.loop import optimizer
from bpjax.train.loop import progress as progress_lib
from bpjax.train.loop import step as step_lib
from bpjax.train.loop import tasks
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np

_MOST_STEPS = 100  # Per call, so that the bar moves and signals are heard.
_SECONDS_PER_CALL = 1.  # At most, where a step takes less: likewise.
_CPU_FLOPS_PER_CALL = 2e10  # Under a second on one core.
# Fields that mean nothing for the other kind of data.
_OF_IMAGES = (
    'preprocessing', 'augment', 'input_noise', 'pixel_mean', 'pixel_std',
    'image_size')
_OF_TEXTS = ('tokenizer', 'vocabulary', 'length', 'text_features')


class NonFiniteError(Exception):
  """A loss, a weight or feedback became infinite or NaN."""


class Given(NamedTuple):
  """What a caller hands over as it is, in place of what the config names.

  Attributes:
    net: the network.
    rule: the rule.
    loss: `(output, labels) -> per-example losses`.
    dataset: the data.
    metrics: name -> `(output, labels) -> a number an example`.
  """
  net: Any = None
  rule: Any = None
  loss: Callable[..., Any] | None = None
  dataset: data_lib.Dataset | None = None
  metrics: Mapping[str, Callable[..., Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is ready to be trained.

  Attributes:
    config: what was asked for.
    folder: where the results go.
    dataset: the data.
    learner: the network, the rule and the optimiser.
    feed: the training batches.
    alignment_batch: rows on which alignment is measured.
    like: shapes, dtypes and shardings of the train state.
    units: unit -> name of the rule that trains it.
    most: largest number of steps in one call.
    programs: the compiled `steps`, `evaluate` and (where asked for) `align`.
    hosts: the processes that train it together.
  """
  config: ml_collections.ConfigDict
  folder: workdir_lib.Workdir
  dataset: data_lib.Dataset
  learner: step_lib.Learner
  feed: feed_lib.Feed
  alignment_batch: Any
  like: step_lib.TrainState
  units: dict[str, str]
  most: int
  programs: dict[str, Any]
  hosts: hosts_lib.Hosts = hosts_lib.Hosts()

  @property
  def total_steps(self) -> int:
    """The number of steps of the whole run."""
    return self.config.epochs * self.feed.steps_per_epoch

  def reports(self, step: int) -> list[str]:
    """The kinds of lines that the metrics hold of a step, in their order."""
    every = self.config.alignment_every
    ends = step > 0 and step % self.feed.steps_per_epoch == 0
    kinds = {
        'train': ends or step > 0 and self.is_due('log_every', step),
        'alignment': every and (
            step % every == 0 or step == self.total_steps),
        'validation': ends and self.dataset.validation is not None,
        'test': ends,
    }
    return [kind for kind, due in kinds.items() if due]

  def is_due(self, field: str, step: int) -> bool:
    """Whether `step` is a multiple of config[field], or ends an epoch if 0."""
    return step % (self.config[field] or self.feed.steps_per_epoch) == 0

  def next_call(self, step: int) -> int:
    """The number of steps from `step` to the end of one call."""
    every = [self.config[f] for f in (
        'log_every', 'alignment_every', 'checkpoint_every')]
    every.append(self.feed.steps_per_epoch)
    return min(self.most, *(n - step % n for n in every if n))


def make(
    config: ml_collections.ConfigDict, given: Given = Given()
) -> tuple[Any, ...]:
  """The data, the learner, the batches and the shapes of the train state.

  Nothing is compiled: what a run refuses, it refuses here.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  config_lib.check(config)
  rule = given.rule or _rule(config)
  if config.bottleneck:
    rule = bpjax.bottleneck(rule, dict(config.bottleneck), config.seed)
  if given.net is None and not named.is_code(config.model):
    # Before the data are read, which may take long.
    config_lib.arguments(
        bpjax.models.get(config.model), config, 'model_args')
  mesh = devices.make_mesh(config.mesh.to_dict(), config.batch_size)
  dataset = _held_out(given.dataset, config) or load(config)
  task = _task(config, dataset)
  feed = feed_lib.make(dataset.train, config.batch_size, config.seed, mesh)
  net = given.net or _net(config, task)
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), feed.fixed_batch)
  outputs = _check_labels(config, net, dataset, task, like)
  _check_units(net, config.units)
  loss = given.loss or _loss(config)
  learner = step_lib.Learner(
      net=net, rule=rule,
      loss=tasks.loss_function(
          loss, outputs, config.label_smoothing, config.class_weights),
      measured=tasks.loss_function(loss, outputs),
      metrics=(
          _metrics(config) if given.metrics is None else given.metrics),
      reduction=_reduction(config),
      tx=optimizer.build(config, feed.steps_per_epoch), task=task, like=like,
      seed=config.seed, mesh=mesh, dtype=config.dtype,
      mirror_every=config.mirror_every, mirror_first=config.mirror_first,
      examples=_particles(config, dataset), input_noise=config.input_noise,
      ema=config.ema, augment=_augment(config),
      views=2 if config.augment == 'contrastive' else 1)
  known = ('loss', 'accuracy', *learner.metrics)
  if (config.early_stopping or config.keep_best) and (
      config.monitor not in known):
    raise ValueError(
        f'`monitor` must be one of {", ".join(known)}, got {config.monitor!r}.')
  like = _placed(jax.eval_shape(learner.init), learner, config)
  batch = _alignment_batch(config, dataset, feed, mesh)
  return dataset, learner, feed, batch, like


def load(config: ml_collections.ConfigDict) -> data_lib.Dataset:
  """The data set that a config asks for.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  if config.dataset in generated.names():
    config_lib.arguments(generated.get(config.dataset), config, 'dataset_args')
  return data_lib.load(
      config.dataset, config.data_dir or None, validation=config.validation,
      seed=config.seed, train_examples=config.train_examples or None,
      image_size=config.image_size, preprocessing=config.preprocessing,
      zca_epsilon=config.zca_epsilon, tokenizer=config.tokenizer,
      vocabulary=config.vocabulary, length=config.length,
      text_features=config.text_features,
      dataset_args=config.dataset_args.to_dict())


def setup(
    config: ml_collections.ConfigDict, folder: workdir_lib.Workdir,
    given: Given = Given(), hosts: hosts_lib.Hosts = hosts_lib.Hosts()) -> Run:
  """Makes everything ready, and refuses whatever cannot work.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  dataset, learner, feed, batch, like = make(config, given)
  most, programs = _compile(config, learner, feed, like)
  return Run(
      config, folder, dataset, learner, feed, batch, like, learner.units(),
      most, programs, hosts)


def start(
    run: Run, checkpoints: checkpoint.Checkpoints, cut: bool = True
) -> tuple[step_lib.TrainState, int]:
  """The state to go on from and its step: the last whole checkpoint's, or new.

  A checkpoint counts on the lines of the metrics before it. Those of its own
  step and after it, which the run is going to write again, are removed, unless
  `cut` is False: of a finished run.

  Raises:
    ValueError: if there are checkpoints, but none that can be used.
  """
  restored = checkpoints.restore(run.like, run.folder.recorded_before)
  if restored is not None:
    step, state = restored
    if not cut:
      return state, step
    run.folder.cut_metrics(step)
    run.folder.log(f'going on from step {step} of {run.total_steps}')
    return state, step
  run.folder.cut_metrics(0)
  state = run.programs['init']()
  step, pace = 0, _Pace()
  while step < run.config.mirror_first:
    pace.agree(run.hosts)
    count = pace.limit(run.config.mirror_first - step)
    with pace.of(count):
      state = jax.block_until_ready(run.programs['mirror'](
          state, np.int32(step), np.int32(count)))
    step += count
  return state, 0


def train(
    run: Run, checkpoints: checkpoint.Checkpoints, state: step_lib.TrainState,
    step: int, stopper: progress_lib.Stopper
) -> tuple[step_lib.TrainState, list[float]]:
  """Trains to the end.

  Args:
    run: from `setup`.
    checkpoints: where to save.
    state: from `start`; it is donated.
    step: from `start`.
    stopper: says whether a signal came.

  Returns:
    The last state, and the seconds per step of every call but the first.

  Raises:
    NonFiniteError: if a loss or a weight is not finite; that state is not
      saved.
    Interrupted: when a signal asked for it; the state is saved.
    DiskError: if the metrics, the log or a checkpoint cannot be written.
  """
  seconds, pace, begin = [], _Pace(), step

  def check():
    run.hosts.agree(stopper)
    stopper.check()

  with stopper.deferring(), _written(checkpoints), progress_lib.Progress(
      run.folder.console, run.total_steps, step,
      run.config.batch_size) as progress:
    while True:
      pace.agree(run.hosts, stopper)
      # What is saved is the state before its report: whoever goes on from there
      # makes the report again, so that a report may be broken off.
      saved = step == begin
      ends = step % run.feed.steps_per_epoch == 0
      if not saved and (
          stopper.asked or step == run.total_steps
          or ends and run.config.early_stopping
          or run.is_due('checkpoint_every', step)):
        _save(run, checkpoints, state, step)
        saved = True
      try:
        stopper.check()
        state = _report(run, state, step, progress.speed(), check)
        stops = _judge(run, state, step)
      except progress_lib.Interrupted:
        if not saved:
          _save(run, checkpoints, state, step)
        raise
      if step == run.total_steps or stops:
        return state, seconds[1:] or seconds
      count = pace.limit(run.next_call(step))
      with pace.of(count):
        state = _advance(run, state, step, count)
      seconds.append(pace.seconds)
      step += count
      progress.advance(count)


def checkpoints(run: Run) -> checkpoint.Checkpoints:
  """Those of a run, to be used as a context manager."""
  return checkpoint.Checkpoints(
      run.folder.checkpoints, run.config.keep_checkpoints,
      warn=run.folder.warn, identity=run.folder.identity, hosts=run.hosts)


def best_checkpoints(run: Run) -> checkpoint.Checkpoints:
  """The one of the best epoch, likewise."""
  return checkpoint.Checkpoints(
      run.folder.best, keep=1, warn=run.folder.warn,
      identity=run.folder.identity, hosts=run.hosts)


def best(
    run: Run, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Step, epoch and value of the best epoch by `monitor`; None without one.

  Of equal ones the first. A value that is no number is never the best.
  """
  name = run.config.monitor
  known = [line for line in lines if line['split'] == 'validation'
           and line.get(name) is not None]
  if not known:
    return None
  choose = min if name == 'loss' else max
  line = choose(known, key=lambda line: line[name])
  return {'step': line['step'], 'epoch': line['epoch'], name: line[name]}


def _judge(run, state, step):
  """Keeps the best epoch; whether the run is to end here."""
  patience = run.config.early_stopping
  if 'validation' not in run.reports(step) or not (
      patience or run.config.keep_best):
    return False
  found = run.hosts.first(lambda: best(run, run.folder.metrics()))
  if found is None:
    return False
  if found['step'] == step and run.config.keep_best:
    with best_checkpoints(run) as keeper:
      if not run.hosts.first(lambda: keeper.holds(step)):
        keeper.save(step, state)
  epochs = (step - found['step']) // run.feed.steps_per_epoch
  if patience and epochs >= patience and step < run.total_steps:
    run.folder.log(
        f'stopped early: no better {run.config.monitor} of the validation '
        f'examples in {epochs} epochs; the best was {found[run.config.monitor]:.4f} '
        f'after epoch {found["epoch"]}')
    return True
  return False


@contextlib.contextmanager
def _written(checkpoints):
  """Waits for what is being saved, also where training ends otherwise."""
  try:
    yield
  finally:
    checkpoints.wait()


def _save(run, checkpoints, state, step):
  _check_finite(run, state, step)
  checkpoints.save(step, state, run.folder.recorded)


class _Pace:
  """How many steps go into one call, so that signals are heard in time.

  Attributes:
    seconds: of a step, when it was last measured.
  """

  def __init__(self):
    self.seconds = _SECONDS_PER_CALL

  def agree(
      self, hosts: hosts_lib.Hosts,
      stopper: progress_lib.Stopper | None = None) -> None:
    """All processes take as many steps as the slowest can, and stop together."""
    self.seconds = hosts.agree(stopper, self.seconds)

  def limit(self, most: int) -> int:
    """The number of steps of the next call, at most `most`."""
    return int(np.clip(_SECONDS_PER_CALL / self.seconds, 1, most))

  @contextlib.contextmanager
  def of(self, count: int) -> Iterator[None]:
    """Measures a call of `count` steps."""
    begin = time.perf_counter()
    yield
    self.seconds = max(time.perf_counter() - begin, 1e-9) / count


def evaluate(
    run: Run, state: step_lib.TrainState, split: Any,
    check: Callable[[], None] = lambda: None) -> dict[str, float]:
  """What the task measures on a whole split, its last examples included.

  `check` is called after every batch, and may raise.
  """
  batches = feed_lib.eval_batches(
      split, run.config.eval_batch_size, run.learner.mesh)
  sums = []
  for batch in batches:
    sums.append(run.programs['evaluate'](
        step_lib.evaluated(state), state.model_state, *batch))
    jax.block_until_ready(sums[-2:][0])  # One more is under way.
    check()
  total = jax.tree.map(
      lambda *x: np.sum(np.asarray(x, np.float64)), *jax.device_get(sums))
  return run.learner.task.metrics(total)


def _held_out(dataset, config):
  """A data set that was handed over, as `validation` and the like ask."""
  if dataset is None:
    return None
  return data_lib.sets.held_out(
      data_lib.sets.checked(dataset.name, dataset), config.validation,
      config.train_examples or None)


def _rule(config):
  """The rule of the config, or rules by path with it for what is left."""
  if config.rule in bpjax.variants.names():
    return _variant(config)
  if not named.is_code(config.rule) and config.rule not in bpjax.rules.names():
    known = [*bpjax.rules.names(), *bpjax.variants.names()]
    raise ValueError(
        '`rule` must be the name of a learning rule or of a variant, got '
        f'{config.rule!r}; {paths.nearest(config.rule, known)}; or '
        f'{named.HOW}.')
  if config.augment == 'contrastive':
    raise ValueError(
        "`augment` must not be 'contrastive' with a rule that learns labels, "
        f'got {config.rule!r}; take one of {", ".join(bpjax.variants.names())}.')
  rule = _made_rule(
      'rule', config.rule, config.rule_args.to_dict(), 'rule_args')
  if not config.rule_by_path:
    return rule
  rules = {}  # The first that matches a unit wins.
  for pattern, name, given in config.rule_by_path:
    rules[pattern] = _made_rule(
        f'rule_by_path[{pattern!r}]', name, given, f'rule_by_path[{pattern!r}]')
  rules.setdefault('*', rule)
  return bpjax.rules.by_path(rules)


def _made_rule(field, name, given, where):
  """A rule by name, or one of the user's own."""
  if not named.is_code(name):
    make = bpjax.rules.get(name)
    return make(**config_lib.checked(make, given, where))
  make = named.find(field, name)
  if callable(make):
    config_lib.checked(make, given, where)
  rule = named.called(field, name, make, **given)
  if not hasattr(rule, 'value_and_grad'):
    raise ValueError(
        f'`{field}` {name!r} must return a rule, such as '
        f'`bpjax.engines.Base`, got {type(rule).__name__}.')
  return rule


def _variant(config):
  """The variant that `config.rule` names."""
  if config.rule_by_path:
    raise ValueError(
        '`rule_by_path` must be empty with a variant, which trains the whole '
        f'network, got {config.rule!r}; choose a rule, or leave it out.')
  given = config_lib.arguments(bpjax.variant, config, 'rule_args')
  for name in ('name', 'loss'):
    if name in given:
      raise ValueError(
          f'`rule_args.{name}` must be left out, got {given[name]!r}: `rule` '
          'is the name, and `augment` chooses the loss.')
  if config.augment == 'contrastive':
    given['loss'] = bpjax.local_losses.contrastive(
        config.contrastive_dim, config.contrastive_temperature)
  return bpjax.variant(config.rule, **given)


def _augment(config):
  """What a step does to its images, or None."""
  if not config.augment:
    return None
  if named.is_code(config.augment):
    function = named.find('augment', config.augment)
    return functools.partial(
        function, **config_lib.arguments(function, config, 'augment_args'))
  make = augment_lib.AUGMENTS[config.augment]
  return make(**config_lib.arguments(make, config, 'augment_args'))


def _loss(config):
  """The name of a loss, or one of the user's own."""
  if named.is_code(config.loss):
    return named.find('loss', config.loss)
  return config.loss


def _metrics(config):
  """Name -> a number an example, of the user's own."""
  return {text.rpartition(':')[2]: named.find(f'metrics[{i}]', text)
          for i, text in enumerate(config.metrics)}


def _task(config, dataset):
  """What is asked on the data set; refuses fields that others have."""
  others = _OF_TEXTS if dataset.asked is None else _OF_IMAGES
  default = config_lib.default()
  for field in others:
    if config[field] != default[field]:
      kind = 'images' if dataset.asked is None else 'texts'
      raise ValueError(
          f'`{field}` means nothing for `dataset` {dataset.name!r}, which is one '
          f'of {kind}, got {config[field]!r}; leave it out.')
  for field in ('early_stopping', 'keep_best'):
    if config[field] and dataset.validation is None:
      raise ValueError(
          f'`{field}` needs validation examples, and `dataset` '
          f'{dataset.name!r} has none; set `validation`.')
  if config.schedule == 'plateau' and dataset.validation is None:
    raise ValueError(
        "`schedule='plateau'` needs validation examples, and `dataset` "
        f'{dataset.name!r} has none; set `validation`.')
  if dataset.asked is not None:
    if config.class_weights:
      raise ValueError(
          '`class_weights` are of images, and `dataset` '
          f'{dataset.name!r} is one of texts; leave them out.')
    if dataset.asked.each_token and config.loss == 'squared_error':
      raise ValueError(
          "`loss` must not be 'squared_error' where every token is predicted; "
          "use 'cross_entropy'.")
    return tasks.Text(dataset.asked)
  if config.augment in augment_lib.AUGMENTS and len(dataset.image_shape) != 3:
    raise ValueError(
        f'`augment` {config.augment!r} is of images, and `dataset` '
        f'{dataset.name!r} holds rows of numbers; leave it out.')
  if config.class_weights and len(config.class_weights) != dataset.num_classes:
    raise ValueError(
        f'`class_weights` must hold one number for each of the '
        f'{dataset.num_classes} classes, got {len(config.class_weights)}.')
  return tasks.Images(
      dataset.num_classes, dataset.image_shape, _pixels(config, 'pixel_mean', dataset.mean),
      _pixels(config, 'pixel_std', dataset.std))


def _net(config, task):
  """The network of the model that the config names."""
  own = named.is_code(config.model)
  make = (
      named.find('model', config.model) if own
      else bpjax.models.get(config.model))
  if not callable(make):
    raise ValueError(
        f'`model` {config.model!r} must be a class, or a function that makes a '
        f'model, got {type(make).__name__}.')
  given = config_lib.arguments(make, config, 'model_args')
  facts = dict(task.facts)
  if own:
    facts['rngs'] = nnx.Rngs(config.seed)
  known = config_lib.parameters(make)
  arguments = {k: v for k, v in facts.items() if k in known} | given
  model = (
      named.called('model', config.model, make, **arguments) if own
      else make(**arguments))
  options = {'boundaries': config.boundaries}
  if isinstance(model, nnx.Module):
    if config.units:
      raise ValueError(
          '`units` chooses modules of linen models, and `model` '
          f'{config.model!r} is one of NNX; leave it empty, or return '
          '`bpjax.from_nnx(model, is_unit=...)`.')
    return bpjax.from_nnx(model, **options)
  if isinstance(model, nn.Module):
    reads = (
        'tokens' if 'tokens' in bpjax.inputs.names(model.__call__)
        else 'images')
    if reads != task.reads and not own:
      raise ValueError(
          f'`model` {config.model!r} reads {reads}, and `dataset` '
          f'{config.dataset!r} is one of {task.reads}; choose another of the '
          'two.')
    return bpjax.from_linen(
        model, is_unit=functools.partial(_is_unit, tuple(config.units)),
        **options)
  if hasattr(model, 'apply') and hasattr(model, 'survey'):
    return model
  raise ValueError(
      f'`model` {config.model!r} must make a linen or NNX module, or a network '
      f'of `bpjax.from_function`, got {type(model).__name__}.')


def _is_unit(globs, module):
  """Whether a module is a unit as a whole."""
  path = '/'.join(module.scope.path)
  return any(paths.is_module(glob, path) for glob in globs)


def _check_units(net, globs):
  """Raises ValueError for a glob of `units` without a module."""
  for glob in globs:
    if not any(paths.is_module(glob, unit) for unit in net.units):
      raise ValueError(
          f'`units` has the glob {glob!r}, which fits no module; the units are: '
          f'{", ".join(net.units)}.')


def _pixels(config, field, measured):
  """A number a channel: as the config says, or as it was measured."""
  given = np.asarray(config[field] or measured, np.float32)
  if len(given) not in (1, len(measured)):
    raise ValueError(
        f'`{field}` must hold one number, or one for each of the '
        f'{len(measured)} channels, got {config[field]!r}.')
  return np.broadcast_to(given, measured.shape)


def _particles(config, dataset):
  """The number of training examples whose states are kept."""
  if not config.particles:
    return 0
  if isinstance(dataset.train, data_lib.Stream):
    raise ValueError(
        f'`particles` keeps a state for each example, and {config.dataset!r} is '
        'streamed in an order of its own; leave it False.')
  return feed_lib.length(dataset.train)


def _alignment_batch(config, dataset, feed, mesh):
  """The one batch, the same throughout the run, of the split that is asked."""
  if config.alignment_split == 'train':
    return feed.fixed_batch
  split = getattr(dataset, config.alignment_split)
  if split is None or feed_lib.length(split) < config.batch_size:
    raise ValueError(
        f'`alignment_split` is {config.alignment_split!r}, which holds no whole '
        f'batch of {config.batch_size}; choose another split, or set '
        '`validation`.')
  rows, _ = next(feed_lib.eval_batches(split, config.batch_size, mesh))
  return rows


def _reduction(config):
  """Pattern -> 'mean' or 'sum'; the first that matches wins."""
  by_path = dict(config.reduction_by_path)
  by_path.setdefault('*', config.reduction)
  return by_path


def _check_labels(config, net, dataset, task, like):
  """The number of the model's outputs, which every label has to be below."""
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  run = lambda: jax.eval_shape(lambda: net.apply(
      net.init(jax.random.key(0), task.inputs(zeros())), task.inputs(zeros())))
  output = (
      named.called('model', config.model, run) if named.is_code(config.model)
      else run())
  if not hasattr(output, 'shape'):
    raise ValueError(
        f'`model` {config.model!r} must return one array of outputs, got '
        f'{type(output).__name__}; return the logits alone.')
  if output.shape[:-1] != like.labels.shape:
    kinds = {1: 'one answer an example', 2: 'one answer a token'}
    wanted, got = (
        kinds.get(n, f'answers of {n} axes')
        for n in (like.labels.ndim, output.ndim - 1))
    unlabelled = ', a set without labels,' if like.labels.ndim > 1 else ''
    raise ValueError(
        f'`dataset` {dataset.name!r}{unlabelled} asks for {wanted}, and `model` '
        f'{config.model!r} gives {got}; choose another of the two.')
  for split in (dataset.train, dataset.validation, dataset.test):
    if split is None:
      continue
    highest = (
        dataset.num_classes - 1 if isinstance(split, data_lib.Stream)
        else int(np.max(split.labels)))
    if highest >= output.shape[-1]:
      raise ValueError(
          f'labels of `dataset` {dataset.name!r} must be below the '
          f"{output.shape[-1]} outputs of the model, got {highest}; give the "
          f'model {dataset.num_classes} outputs.')
  return output.shape[-1]


def _placed(shapes, learner, config):
  """The state's shapes with their places on the devices."""
  learned = {'params': shapes.params, 'feedback': shapes.feedback}
  places = devices.shardings(learner.mesh, config.sharding, learned, shapes)
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, places)


def _compile(config, learner, feed, like):
  """Compiles what a run calls, so that nothing is refused or traced later."""
  batch = NamedSharding(learner.mesh, PartitionSpec('data'))
  everywhere = NamedSharding(learner.mesh, PartitionSpec())
  places = jax.tree.map(lambda x: x.sharding, like)
  data, first = feed.fetch(0, 0, 1)

  def lower(most):
    return jax.jit(
        functools.partial(learner.steps, most=most), donate_argnums=0,
        out_shardings=(places, everywhere)).lower(like, data, first, first)

  most = _most_steps(config, feed, lower)
  size = feed_lib.eval_batch_size(config.eval_batch_size, learner.mesh)

  def rows(n):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (n, *x.shape[1:]), x.dtype, sharding=batch), learner.like)

  mask = jax.ShapeDtypeStruct((size,), np.bool_, sharding=batch)
  programs = {
      'init': jax.jit(learner.init, out_shardings=places).lower().compile(),
      'steps': lower(most).compile(),
      'evaluate': jax.jit(learner.evaluate).lower(
          step_lib.evaluated(like), like.model_state, rows(size), mask).compile(),
      'is_finite': jax.jit(step_lib.is_finite).lower(like).compile(),
  }
  if config.mirror_first:
    programs['mirror'] = jax.jit(
        learner.mirror, donate_argnums=0, out_shardings=places).lower(
            like, first, first).compile()
  if config.alignment_every:
    programs['align'] = jax.jit(
        learner.align, out_shardings=everywhere).lower(
            like, rows(config.batch_size)).compile()
  return most, programs


def _most_steps(config, feed, lower):
  """The largest number of steps of one call; a function of the config alone."""
  if feed.streams:
    return 1
  if config.steps_per_call:
    return config.steps_per_call
  if jax.default_backend() != 'cpu':
    return _MOST_STEPS
  # XLA's CPU compiler has a fast convolution only outside loops: a small
  # convolutional net took 8 ms a step alone and 260 ms inside a loop.
  step = lower(1)
  if 'stablehlo.convolution' in step.as_text():
    return 1
  flops = max(step.cost_analysis()['flops'], 1.)
  return int(np.clip(_CPU_FLOPS_PER_CALL / flops, 1, _MOST_STEPS))


def _advance(run, state, step, count):
  """The state after `count` more steps."""
  data, first = run.feed.fetch(*divmod(step, run.feed.steps_per_epoch), count)
  state, losses = run.programs['steps'](state, data, first, np.int32(count))
  losses = np.asarray(losses)[:count]
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise NonFiniteError(
        f'the loss of rule `{run.config.rule}` is {losses[bad[0]]} at step '
        f'{step + bad[0] + 1}; the last good checkpoint is kept: try a smaller '
        '`learning_rate`, or `clip_norm`.')
  return state


def _report(run, state, step, speed, check):
  """Writes the lines of `step`; a window that was written begins anew."""
  lines, kinds = [], run.reports(step)
  if 'train' in kinds:
    lines.append(_line(run, step, 'train', **run.learner.task.metrics(
        jax.device_get(state.window))))
    state = state._replace(window=devices.put(
        step_lib.empty_window(), jax.tree.map(
            lambda x: x.sharding, run.like.window)))
  if 'alignment' in kinds:
    lines += _alignment(run, state, step)
  for name in ('validation', 'test'):
    if name in kinds:
      measured = evaluate(run, state, getattr(run.dataset, name), check)
      lines.append(_line(run, step, name, **measured))
      if name == 'validation' and run.config.schedule == 'plateau':
        state = state._replace(opt_state=devices.put(
            optimizer.after_epoch(
                run.config, state.opt_state, measured['loss']),
            jax.tree.map(lambda x: x.sharding, run.like.opt_state)))
  if lines:
    run.folder.record(lines)
  for line in lines:
    if 'loss' in line:
      numbers = ' '.join(
          f'{name.replace("_", " ")} {value:.4f}'
          for name, value in line.items() if isinstance(value, float))
      run.folder.log(
          f'step {step}/{run.total_steps} epoch {line["epoch"]} '
          f'{line["split"]} {numbers}' + (f' ({speed})' if speed else ''))
  return state


def _line(run, step, split, **values):
  epoch = -(-step // run.feed.steps_per_epoch)
  numbers = {k: v if v is None else float(v) for k, v in values.items()}
  return {'step': step, 'epoch': epoch, 'split': split, **numbers}


def _alignment(run, state, step):
  units = jax.device_get(
      run.programs['align'](state, run.alignment_batch))
  return [
      _line(run, step, 'alignment', **values._asdict()) | {'unit': unit}
      for unit, values in units.items()]


def _check_finite(run, state, step):
  if not run.programs['is_finite'](state):
    raise NonFiniteError(
        f'a weight that rule `{run.config.rule}` trains is not finite after '
        f'step {step}; the last good checkpoint is kept: try a smaller '
        '`learning_rate`, or `clip_norm`.')
