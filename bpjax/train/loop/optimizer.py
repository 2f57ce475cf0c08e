"""The optimiser of a run: one optax transformation for all that learns."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

from bpjax import paths
import jax
import jax.numpy as jnp
import ml_collections
import optax


def build(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.GradientTransformation:
  """The transformation for a tree `{'params': ..., 'feedback': ...}`.

  The feedback in that tree is only what is trained (`trained`): fixed feedback
  costs an optimiser neither state nor time, and no decay can reach it.

  Args:
    config: the run's config.
    steps_per_epoch: to turn the config's epochs into steps.

  Returns:
    An optax transformation whose `update` needs the tree itself as well.

  Example:
    >>> tx = build(default(), steps_per_epoch=468)
  """
  batches = config.epochs * steps_per_epoch
  if batches < config.accumulate:
    raise ValueError(
        f'`accumulate` must be at most the {batches} batches of the run, got '
        f'{config.accumulate}.')
  if config.epochs * steps_per_epoch >= 2**31:
    raise ValueError(
        f'`epochs` must make fewer than 2**31 steps, got {config.epochs} of '
        f'{steps_per_epoch}.')
  tx = _optimizer(
      config.optimizer, config.learning_rate, config, steps_per_epoch)
  if config.optimizer_by_path:
    parts = {
        i: _optimizer(name, rate, config, steps_per_epoch)
        for i, (_, name, rate) in enumerate(config.optimizer_by_path)}
    patterns = tuple(pattern for pattern, *_ in config.optimizer_by_path)
    tx = optax.multi_transform(
        {-1: tx, **parts}, functools.partial(_first_match, patterns))
  if config.feedback_optimizer or config.feedback_schedule == 'epochs':
    rate = config.feedback_learning_rate or config.learning_rate
    other = _optimizer(
        config.feedback_optimizer or config.optimizer, rate, config,
        steps_per_epoch)
    if config.feedback_schedule == 'epochs':
      # Neither the moments nor the schedule of the one that waits goes on.
      feedbacks_turn = lambda step: step // steps_per_epoch % 2 == 0
      other = optax.conditionally_mask(other, feedbacks_turn)
      tx = optax.conditionally_mask(tx, lambda step: ~feedbacks_turn(step))
    tx = optax.multi_transform(
        {'params': tx, 'feedback': other}, _label_collections)
  if config.clip_norm:
    # Joint over both: clipped apart, W and B would move by different multiples
    # of one update, which breaks Kolen-Pollack's law.
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
  if config.frozen:
    tx = optax.multi_transform(
        {True: optax.set_to_zero(), False: tx},
        functools.partial(frozen, tuple(config.frozen)))
  if config.accumulate > 1:
    # Around both trees at once: W and B take the same steps.
    tx = optax.MultiSteps(tx, config.accumulate).gradient_transformation()

  def init(tree):
    _check_tree(config, tree)
    return tx.init(tree)

  return optax.GradientTransformationExtraArgs(init, tx.update)


def after_epoch(
    config: ml_collections.ConfigDict, opt_state: Any, loss: float) -> Any:
  """The optimiser's state once an epoch's validation loss is known.

  Under `schedule='plateau'` the rate falls where the loss did not; the state holds
  all that this needs, so that a resumed run goes on with it.

  Example:
    >>> state = state._replace(
    ...     opt_state=after_epoch(config, state.opt_state, .7))
  """
  plateau = _plateau(config)
  is_plateau = lambda s: isinstance(
      s, optax.contrib.ReduceLROnPlateauState)
  return jax.tree.map(
      lambda s: plateau.update(
          {}, jax.device_get(s), value=jnp.float32(loss))[1]
      if is_plateau(s) else s, opt_state, is_leaf=is_plateau)


def _plateau(config):
  return optax.contrib.reduce_on_plateau(
      config.plateau_factor, config.plateau_patience)


def _scale_by_plateau(config):
  """Multiplies updates by a scale that `after_epoch` alone changes."""
  def init(params):
    # No loss yet; a state that is not finite would stop the run.
    state = _plateau(config).init(params)
    return state._replace(
        best_value=jnp.full_like(state.best_value, jnp.finfo(jnp.float32).max))

  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: state.scale * u, updates), state

  return optax.GradientTransformation(init, update)


def frozen(patterns: tuple[str, ...], tree: Any) -> Any:
  """Which leaves of `{'params': ..., 'feedback': ...}` keep their values.

  Raises:
    ValueError: for a pattern that matches nothing.
  """
  _check_patterns('frozen', patterns, tree)
  return paths.map_with_name(
      lambda name, _: any(
          paths.matches(p, name.partition('/')[2]) for p in patterns), tree)


def _check_tree(config, tree):
  """Raises ValueError for what cannot be with these parameters and feedback."""
  if config.feedback_schedule == 'epochs' and not jax.tree.leaves(
      tree['feedback']):
    raise ValueError(
        "`feedback_schedule` must be 'together' with a rule whose feedback does "
        'not learn, since nothing would learn in every other epoch, got '
        "'epochs'.")
  # Heads and rules of local losses are reduced by the name of their block.
  kept = tree['feedback'] if isinstance(tree['feedback'], Mapping) else {}
  inner = {'feedback': {
      k: v for part in ('heads', 'rule')
      for k, v in (kept.get(part) or {}).items()}}
  patterns = tuple(pattern for pattern, _ in config.reduction_by_path)
  _check_patterns('reduction_by_path', patterns, (tree, inner))
  if config.frozen and all(jax.tree.leaves(frozen(tuple(config.frozen), tree))):
    raise ValueError(
        '`frozen` must leave something that learns, got '
        f'{tuple(config.frozen)!r}; name fewer parameters.')


def _check_patterns(field, patterns, tree):
  """Raises ValueError for a pattern that matches no leaf."""
  trees = tree if isinstance(tree, tuple) else (tree,)
  names = [name.partition('/')[2] for t in trees for name in paths.leaf_names(t)]
  for pattern in patterns:
    if not any(paths.matches(pattern, name) for name in names):
      raise ValueError(
          f'`{field}` has the pattern {pattern!r}, which matches no parameter; '
          f'{paths.nearest(pattern, names)}.')


def _first_match(patterns, tree):
  """For each leaf the number of the pattern that selects it; -1 for none."""
  _check_patterns('optimizer_by_path', patterns, tree)
  return paths.map_with_name(
      lambda name, _: next((
          i for i, pattern in enumerate(patterns)
          if paths.matches(pattern, name.partition('/')[2])), -1), tree)


def kernels(tree: Any) -> Any:
  """Which leaves are weights: those called `kernel`, not biases and scales.

  Example:
    >>> kernels({'kernel': 1., 'bias': 2.})
    {'bias': False, 'kernel': True}
  """
  return paths.map_with_name(
      lambda name, _: name.rpartition('/')[2] == 'kernel', tree)


def trained(trainable: Any, feedback: Any) -> Any:
  """The feedback that an optimiser may touch, with None for the rest.

  Example:
    >>> trained({'a': True, 'b': False}, {'a': 1., 'b': 2.})
    {'a': 1.0, 'b': None}
  """
  return jax.tree.map(lambda t, f: f if t else None, trainable, feedback)


def merged(trainable: Any, learned: Any, feedback: Any) -> Any:
  """The whole feedback again: `learned` where it is trained, else as it was."""
  return jax.tree.map(
      lambda t, new, old: new if t else old, trainable, learned, feedback)


def _label_collections(tree):
  return {c: jax.tree.map(lambda _: c, tree[c]) for c in tree}


def _optimizer(name, learning_rate, config, steps_per_epoch):
  rate = _schedule(config, learning_rate, steps_per_epoch)
  tx = _of_rate(name, rate, config)
  if config.schedule == 'plateau':
    tx = optax.chain(tx, _scale_by_plateau(config))
  if config.weight_decay and name != 'adamw':
    # Last in the chain, so after the learning rate: W <- W + step - decay * W.
    tx = optax.chain(tx, optax.add_decayed_weights(-config.weight_decay))
  return tx


def _of_rate(name, rate, config):
  l2 = optax.add_decayed_weights(config.l2, kernels)
  tx = {
      'adamw': lambda: optax.adamw(
          rate, b2=config.beta_2, weight_decay=config.weight_decay),
      'sgd': lambda: optax.sgd(rate),
      'momentum': lambda: optax.sgd(rate, config.momentum),
      'nesterov': lambda: optax.sgd(rate, config.momentum, nesterov=True),
      'adam': lambda: optax.adam(rate, b2=config.beta_2),
      'rmsprop': lambda: optax.rmsprop(rate),
      'lars': lambda: optax.lars(
          rate, trust_ratio_mask=kernels, momentum=config.momentum),
  }[name]()
  return optax.chain(l2, tx) if config.l2 else tx


def _schedule(config, peak, steps_per_epoch):
  turns = 2 if config.feedback_schedule == 'epochs' else 1
  turns *= config.accumulate  # It counts the optimiser's own steps.
  warmup = config.warmup_steps or round(
      config.warmup_epochs * steps_per_epoch / config.accumulate)
  rest = config.epochs * steps_per_epoch // turns - warmup
  if config.schedule == 'noam':
    return lambda step: peak * jnp.minimum(
        (step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))
  if rest <= 0:
    raise ValueError(
        f'`warmup_steps` must be less than the {warmup + rest} steps of the '
        f'run, got {warmup}.')
  # Another peak, that of the feedback, falls by the same factor.
  share = config.final_learning_rate / config.learning_rate
  after = {
      'constant': lambda: optax.constant_schedule(peak),
      'plateau': lambda: optax.constant_schedule(peak),
      'cosine': lambda: optax.cosine_decay_schedule(peak, rest, share),
      'linear': lambda: optax.linear_schedule(peak, share * peak, rest),
      'polynomial': lambda: optax.polynomial_schedule(
          peak, share * peak, config.schedule_power, rest),
  }[config.schedule]()
  if not warmup:
    return peak if config.schedule in ('constant', 'plateau') else after
  return optax.join_schedules(
      [optax.linear_schedule(0., peak, warmup), after], [warmup])
