"""What a config asks for, made: data, network, rule, loss, optimiser, batches.

Whatever cannot work is refused here, with one sentence, before anything is
compiled or written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import bpjax
from bpjax import paths
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train import named
from bpjax.train.data import augment as augment_lib
from bpjax.train.data import feed as feed_lib
from bpjax.train.data import generated
from bpjax.train.data import sets
from bpjax.train.loop import devices
from bpjax.train.loop import optimizer
from bpjax.train.loop import step as step_lib
from bpjax.train.loop import tasks
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

# Fields that mean nothing for the other kind of data.
_OF_IMAGES = (
    'preprocessing', 'augment', 'input_noise', 'pixel_mean', 'pixel_std',
    'image_size')
_OF_TEXTS = ('tokenizer', 'vocabulary', 'length', 'text_features')


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
      log_prior=_log_prior(dataset) if config.prior_bias else None,
      views=2 if config.augment == 'contrastive' else 1)
  known = ('loss', 'accuracy', *learner.metrics)
  if (config.early_stopping or config.keep_best) and (
      config.monitor not in known):
    raise ValueError(
        f'`monitor` must be one of {", ".join(known)}, got {config.monitor!r}.')
  like = _placed(jax.eval_shape(learner.init), learner, config)
  batch = _alignment_batch(config, dataset, feed, mesh)
  return dataset, learner, feed, batch, like


def _log_prior(dataset):
  """The logarithm of each class's share of the training examples.

  One more of each is counted, so that none is minus infinity.
  """
  labels = getattr(dataset.train, 'labels', None)
  if labels is None or np.ndim(labels) != 1:
    raise ValueError(
        '`prior_bias` needs a data set in memory with one label for each example, '
        f'and `dataset` {dataset.name!r} is none; leave it False.')
  counts = np.bincount(labels, minlength=dataset.num_classes) + 1.
  return np.log(counts / counts.sum())


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


def _held_out(dataset, config):
  """A data set that was handed over, as `validation` and the like ask."""
  if dataset is None:
    return None
  return sets.held_out(
      sets.checked(dataset.name, dataset), config.validation,
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
      dataset.num_classes, dataset.image_shape,
      _pixels(config, 'pixel_mean', dataset.mean),
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
