"""One run: what a config asks for, made ready and trained.

`setup` refuses whatever cannot work, and compiles; `start` finds the last whole
checkpoint, or begins; `train` goes on from there to the end. The result depends
on the config alone: not on where a run was interrupted, nor on how its steps
are cut into calls.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import bpjax
from bpjax import paths
from experiments import augment as augment_lib
from experiments import checkpoint
from experiments import config as config_lib
from experiments import data as data_lib
from experiments import devices
from experiments import feed as feed_lib
from experiments import optimizer
from experiments import progress as progress_lib
from experiments import step as step_lib
from experiments import workdir as workdir_lib
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np

_MOST_STEPS = 100  # Per call, so that the bar moves and signals are heard.
_CPU_FLOPS_PER_CALL = 2e10  # Under a second on one core.


class NonFiniteError(Exception):
  """A loss or a weight became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is ready to be trained.

  Attributes:
    config: what was asked for.
    folder: where the results go.
    dataset: the data.
    learner: the network, the rule and the optimiser.
    feed: the training batches.
    alignment_batch: images and labels on which alignment is measured.
    like: shapes, dtypes and shardings of the train state.
    units: unit -> name of the rule that trains it.
    most: largest number of steps in one call.
    programs: the compiled `steps`, `evaluate` and (where asked for) `align`.
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

  @property
  def total_steps(self) -> int:
    """The number of steps of the whole run."""
    return self.config.epochs * self.feed.steps_per_epoch

  def is_due(self, field: str, step: int) -> bool:
    """Whether `step` is a multiple of config[field], or ends an epoch if 0."""
    return step % (self.config[field] or self.feed.steps_per_epoch) == 0

  def next_call(self, step: int) -> int:
    """The number of steps from `step` to the end of one call."""
    every = [self.config[f] for f in (
        'log_every', 'alignment_every', 'checkpoint_every')]
    every.append(self.feed.steps_per_epoch)
    return min(self.most, *(n - step % n for n in every if n))


def make(config: ml_collections.ConfigDict) -> tuple[Any, ...]:
  """The data, the learner, the batches and the shapes of the train state.

  Nothing is compiled: what a run refuses, it refuses here.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  config_lib.check(config)
  rule = _rule(config)
  if config.bottleneck:
    rule = bpjax.bottleneck(rule, dict(config.bottleneck), config.seed)
  make_model = bpjax.models.get(config.model)
  model_args = config_lib.arguments(make_model, config, 'model_args')
  mesh = devices.make_mesh(config.mesh.to_dict(), config.batch_size)
  dataset = data_lib.load(
      config.dataset, config.data_dir or None, validation=config.validation,
      seed=config.seed, train_examples=config.train_examples or None,
      preprocessing=config.preprocessing, zca_epsilon=config.zca_epsilon)
  feed = feed_lib.make(dataset.train, config.batch_size, config.seed, mesh)
  net = bpjax.from_linen(
      make_model(**{'num_classes': dataset.num_classes} | model_args),
      is_unit=functools.partial(_is_unit, tuple(config.units)),
      boundaries=config.boundaries)
  outputs = _check_labels(net, dataset, config.batch_size)
  _check_units(net, config.units)
  learner = step_lib.Learner(
      net=net, rule=rule, loss=step_lib.loss_function(config.loss, outputs),
      reduction=_reduction(config),
      tx=optimizer.build(config, feed.steps_per_epoch),
      input_shape=(config.batch_size, *dataset.image_shape),
      mean=_pixels(config, 'pixel_mean', dataset.mean),
      std=_pixels(config, 'pixel_std', dataset.std), seed=config.seed,
      mesh=mesh,
      mirror_every=config.mirror_every, mirror_first=config.mirror_first,
      examples=_particles(config, dataset), input_noise=config.input_noise,
      augment=_augment(config),
      views=2 if config.augment == 'contrastive' else 1)
  like = _placed(jax.eval_shape(learner.init), learner, config)
  batch = _alignment_batch(config, dataset, feed, mesh)
  return dataset, learner, feed, batch, like


def setup(
    config: ml_collections.ConfigDict, folder: workdir_lib.Workdir) -> Run:
  """Makes everything ready, and refuses whatever cannot work.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  dataset, learner, feed, batch, like = make(config)
  most, programs = _compile(config, learner, feed, like)
  return Run(
      config, folder, dataset, learner, feed, batch, like, learner.units(),
      most, programs)


def start(
    run: Run, checkpoints: checkpoint.Checkpoints
) -> tuple[step_lib.TrainState, int]:
  """The state to go on from and its step: the last whole checkpoint's, or new.

  Lines of the metrics that the run is going to write again are removed.

  Raises:
    ValueError: if there are checkpoints, but none that can be used.
  """
  restored = checkpoints.restore(run.like)
  if restored is not None:
    step, state = restored
    run.folder.cut_metrics(step)
    run.folder.log(f'going on from step {step} of {run.total_steps}')
    return state, step
  run.folder.cut_metrics(-1)
  state = run.programs['init']()
  if run.config.alignment_every:
    run.folder.record(_alignment(run, state, 0))
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
    stopper: says whether a signal came; its signals are to be deferred.

  Returns:
    The last state, and the seconds per step of every call but the first.

  Raises:
    NonFiniteError: if a loss or a weight is not finite; that state is not
      saved.
    Interrupted: when a signal asked for it; the state is saved.
  """
  seconds = []
  with progress_lib.Progress(
      run.folder.console, run.total_steps, step,
      run.config.batch_size) as progress:
    while step < run.total_steps:
      count = run.next_call(step)
      state, elapsed = _advance(run, state, step, count)
      seconds.append(elapsed / count)
      step += count
      progress.advance(count)
      state = _report(run, state, step, progress.speed())
      asked = stopper.asked
      if (asked or step == run.total_steps
          or run.is_due('checkpoint_every', step)):
        _check_finite(run, state, step)
        checkpoints.save(step, state)
      if asked:
        raise asked
  return state, seconds[1:] or seconds


def evaluate(
    run: Run, state: step_lib.TrainState, split: Any) -> tuple[float, float]:
  """Mean loss and accuracy over a whole split, its last examples included."""
  batches = feed_lib.eval_batches(
      split, run.config.eval_batch_size, run.learner.mesh)
  sums = [
      run.programs['evaluate'](state.params, state.model_state, *batch)
      for batch in batches]
  loss, correct = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
  count = feed_lib.length(split)
  return float(loss / count), float(correct / count)


def _rule(config):
  """The rule of the config, or rules by path with it for what is left."""
  if config.rule in bpjax.variants.names():
    return _variant(config)
  if config.rule not in bpjax.rules.names():
    known = [*bpjax.rules.names(), *bpjax.variants.names()]
    raise ValueError(
        '`rule` must be the name of a learning rule or of a variant, got '
        f'{config.rule!r}; {paths.nearest(config.rule, known)}.')
  if config.augment == 'contrastive':
    raise ValueError(
        "`augment` must not be 'contrastive' with a rule that learns labels, "
        f'got {config.rule!r}; take one of {", ".join(bpjax.variants.names())}.')
  make = bpjax.rules.get(config.rule)
  rule = make(**config_lib.arguments(make, config, 'rule_args'))
  if not config.rule_by_path:
    return rule
  rules = {}  # The first that matches a unit wins.
  for pattern, name, given in config.rule_by_path:
    make = bpjax.rules.get(name)
    rules[pattern] = make(
        **config_lib.checked(make, given, f'rule_by_path[{pattern!r}]'))
  rules.setdefault('*', rule)
  return bpjax.rules.by_path(rules)


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
  make = augment_lib.AUGMENTS[config.augment]
  return make(**config_lib.arguments(make, config, 'augment_args'))


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
  images, labels, _ = next(
      feed_lib.eval_batches(split, config.batch_size, mesh))
  return images, labels


def _reduction(config):
  """Pattern -> 'mean' or 'sum'; the first that matches wins."""
  by_path = dict(config.reduction_by_path)
  by_path.setdefault('*', config.reduction)
  return by_path


def _check_labels(net, dataset, batch_size):
  """The number of the model's outputs, which every label has to be below."""
  x = jax.ShapeDtypeStruct((batch_size, *dataset.image_shape), np.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  output = jax.eval_shape(net.apply, variables, x)
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
  pixels = feed.fixed_batch[0].dtype
  size = feed_lib.eval_batch_size(config.eval_batch_size, learner.mesh)
  shape = lambda n, dtype, *rest: jax.ShapeDtypeStruct(
      (n, *rest), dtype, sharding=batch)
  image = learner.input_shape[1:]
  programs = {
      'init': jax.jit(learner.init, out_shardings=places),
      'steps': lower(most).compile(),
      'evaluate': jax.jit(learner.evaluate).lower(
          like.params, like.model_state, shape(size, pixels, *image),
          shape(size, np.int32), shape(size, np.bool_)).compile(),
      'is_finite': jax.jit(step_lib.is_finite).lower(like).compile(),
  }
  if config.alignment_every:
    n = config.batch_size
    programs['align'] = jax.jit(
        learner.align, out_shardings=everywhere).lower(
            like, shape(n, pixels, *image), shape(n, np.int32)).compile()
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
  """Takes `count` steps; returns the state and the seconds that it took."""
  begin = time.perf_counter()
  data, first = run.feed.fetch(*divmod(step, run.feed.steps_per_epoch), count)
  state, losses = run.programs['steps'](state, data, first, np.int32(count))
  losses = np.asarray(losses)[:count]
  elapsed = time.perf_counter() - begin
  bad = np.flatnonzero(~np.isfinite(losses))
  if bad.size:
    raise NonFiniteError(
        f'the loss of rule `{run.config.rule}` is {losses[bad[0]]} at step '
        f'{step + bad[0] + 1}; the last good checkpoint is kept: try a smaller '
        '`learning_rate`, or `clip_norm`.')
  return state, elapsed


def _report(run, state, step, speed):
  """Writes the lines of `step`; a window that was written begins anew."""
  lines = []
  epoch_ends = step % run.feed.steps_per_epoch == 0
  if epoch_ends or run.is_due('log_every', step):
    window = jax.device_get(state.window)
    examples = (
        window.steps * run.config.batch_size * run.learner.views)
    lines.append(_line(
        run, step, 'train', loss=window.loss / window.steps,
        accuracy=window.correct / examples))
    state = state._replace(window=jax.device_put(
        step_lib.empty_window(), jax.tree.map(
            lambda x: x.sharding, run.like.window)))
  every = run.config.alignment_every
  if every and (step % every == 0 or step == run.total_steps):
    lines += _alignment(run, state, step)
  if epoch_ends:
    for name in ('validation', 'test'):
      split = getattr(run.dataset, name)
      if split is not None:
        loss, accuracy = evaluate(run, state, split)
        lines.append(_line(run, step, name, loss=loss, accuracy=accuracy))
  if lines:
    run.folder.record(lines)
  for line in lines:
    if 'loss' in line:
      run.folder.log(
          f'step {step}/{run.total_steps} epoch {line["epoch"]} '
          f'{line["split"]} loss {line["loss"]:.4f} accuracy '
          f'{line["accuracy"]:.4f} ({speed})')
  return state


def _line(run, step, split, **values):
  epoch = -(-step // run.feed.steps_per_epoch)
  numbers = {k: v if v is None else float(v) for k, v in values.items()}
  return {'step': step, 'epoch': epoch, 'split': split, **numbers}


def _alignment(run, state, step):
  units = jax.device_get(
      run.programs['align'](state, *run.alignment_batch))
  return [
      _line(run, step, 'alignment', **values._asdict()) | {'unit': unit}
      for unit, values in units.items()]


def _check_finite(run, state, step):
  if not run.programs['is_finite'](state):
    raise NonFiniteError(
        f'a weight that rule `{run.config.rule}` trains is not finite after '
        f'step {step}; the last good checkpoint is kept: try a smaller '
        '`learning_rate`, or `clip_norm`.')
