"""What is computed: the train state, the step, evaluation and alignment.

Pure functions of arrays, to be compiled by the trainer; nothing here knows of
files, time or signals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import bpjax
from bpjax import paths
from bpjax.train import data as data_lib
from bpjax.train.loop import optimizer
from bpjax.train.loop import tasks
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax


class TrainState(NamedTuple):
  """All that a run is, after some steps. Arrays only.

  Random keys and the order of the data are functions of the seed and `step`.

  Attributes:
    step: number of steps taken, [].
    params: the model's parameters.
    feedback: the rule's own weights; {} for a rule without any.
    opt_state: the optimiser's state.
    model_state: the model's other collections, such as `batch_stats`.
    window: training results since the last line of the metrics; they live here,
      so that a resumed run goes on with them.
    particles: states of a rule that settles, one row a training example; {} for
      a run that does not keep them.
    ema: an exponential moving average of the parameters; {} for a run without.
  """
  step: jax.Array
  params: Any
  feedback: Any
  opt_state: Any
  model_state: Any
  window: tasks.Sums
  particles: Any
  ema: Any


def empty_window() -> tasks.Sums:
  """A window without steps."""
  return tasks.Sums(
      np.float32(0), np.int32(0), np.float32(0), np.float32(0), {})


@dataclasses.dataclass(frozen=True)
class Learner:
  """A network, a rule and an optimiser, as functions of a train state.

  Attributes:
    net: the network.
    rule: the rule that trains it.
    loss: `(output, labels) -> per-example losses`, on integer labels.
    reduction: path pattern -> 'mean' or 'sum'.
    tx: optimiser of `{'params', 'feedback'}` (see `optimizer.build`).
    task: what the model reads of a batch.
    like: shapes and dtypes of a batch.
    seed: of everything random.
    mesh: the devices; a batch is split over its axis `data`.
    mirror_every: feedback that learns from noise does so at every n-th step.
    mirror_first: steps of it alone before the first one.
    examples: number of training examples whose particles are kept; 0: of none.
    input_noise: standard deviation of the noise that a step adds to its inputs.
    augment: `(key, images in [0, 1]) -> images [views * batch, ...]`, or None.
    views: how many of each image there are then, one after the other.
    measured: the loss of evaluation; None: the same.
    metrics: name -> `(output, labels) -> a number an example`, of evaluation.
    ema: decay of the average of the parameters that is evaluated; 0: none.
    log_prior: what the readout's bias begins at, `[classes]`; None: 0.
    dtype: of the computation; parameters, feedback and the optimiser's state are
      kept in single precision whatever it is.
  """
  net: Any
  rule: Any
  loss: Callable[[jax.Array, jax.Array], jax.Array]
  reduction: Mapping[str, str]
  tx: optax.GradientTransformation
  task: tasks.Task
  like: Any
  seed: int
  mesh: jax.sharding.Mesh
  mirror_every: int = 1
  mirror_first: int = 0
  examples: int = 0
  input_noise: float = 0.
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  views: int = 1
  dtype: str = 'float32'
  measured: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  metrics: Mapping[str, Callable[..., jax.Array]] = dataclasses.field(
      default_factory=dict)
  ema: float = 0.
  log_prior: np.ndarray | None = None

  def init(self) -> TrainState:
    """The state before the first step, and before `mirror`."""
    key, feedback_key, *_ = self._keys()
    x = self._nothing()
    variables = self.net.init(key, x)
    if self.log_prior is not None:
      variables = {**variables, 'params': self._with_prior(variables, x)}
    feedback = self.rule.init(feedback_key, self.net, variables, x)
    model_state = {c: v for c, v in variables.items() if c != 'params'}
    params = variables['params']
    learned = {
        'params': params,
        'feedback': optimizer.trained(self.rule.trainable(feedback), feedback)}
    mirrors = any(jax.tree.leaves(self.rule.mirrored(feedback)))
    if not mirrors and (self.mirror_every, self.mirror_first) != (1, 0):
      raise ValueError(
          f'`mirror_every` and `mirror_first` need a rule that mirrors, and '
          f'{self.rule.name!r} does not; leave them at 1 and 0.')
    return TrainState(
        jnp.int32(0), params, feedback, self.tx.init(learned), model_state,
        jax.tree.map(jnp.asarray, empty_window()),
        self._particles(variables, x),
        # A copy: both are donated.
        jax.tree.map(jnp.copy, params) if self.ema else {})

  def _with_prior(self, variables, x):
    """The parameters with the classes' log frequencies for the readout's bias."""
    units = self.net.survey(variables, x).units
    prior = jnp.asarray(self.log_prior)
    biases = [
        f'{name}/{leaf}' for name, unit in units.items() if unit.info.is_output
        for leaf, shape in paths.leaves(unit.info.params).items()
        if leaf.endswith('bias') and shape.shape == prior.shape]
    if len(biases) != 1:
      raise ValueError(
          '`prior_bias` needs one readout with a bias for each of the '
          f'{len(prior)} classes, and the model has {len(biases)}; leave it False.')
    return paths.map_with_name(
        lambda name, leaf: prior.astype(leaf.dtype) if name in biases else leaf,
        variables['params'])

  def _particles(self, variables, x):
    """States of 0 for every training example, where they are kept."""
    if not self.examples:
      return {}
    if not hasattr(self.rule, 'particles'):
      raise ValueError(
          f'`particles` needs a rule that settles, and {self.rule.name!r} does '
          'not; leave it False.')
    return jax.tree.map(
        lambda s: jnp.zeros((self.examples, *s.shape[1:]), s.dtype),
        self.rule.particles(self.net, variables, x))

  def mirror(
      self, state: TrainState, first: jax.Array, count: jax.Array
  ) -> TrainState:
    """Steps `first` to `first + count` of the mirrored feedback alone.

    There are `mirror_first` of them before the first step of training.
    """
    return jax.lax.fori_loop(
        first, first + count, lambda i, s: self._mirror(s, i), state)

  def _mirror(self, state: TrainState, i: jax.Array) -> TrainState:
    """One step of the mirrored feedback alone: no data, no other update."""
    # Keys below 0: those from 0 on belong to the steps of training.
    after, _ = self.step(state._replace(step=-1 - i), self._zeros())
    feedback = jax.tree.map(
        lambda mirrored, new, old: new if mirrored else old,
        self.rule.mirrored(state.feedback), after.feedback, state.feedback)
    return state._replace(feedback=feedback)

  def units(self) -> dict[str, str]:
    """Unit -> name of the rule that trains it, without computing anything."""
    units = {}

    def trace():
      x = self._nothing()
      variables = self.net.init(jax.random.key(0), x)
      units.update(self.rule.units(self.net, variables, x))

    jax.eval_shape(trace)
    return units

  def steps(
      self, state: TrainState, data: Mapping[str, jax.Array], first: jax.Array,
      count: jax.Array, most: int) -> tuple[TrainState, jax.Array]:
    """Several steps in one dispatch.

    The number of steps is an argument of one compiled loop, not a shape: where
    a run is cut into calls changes neither the compiled code nor the result.

    Args:
      state: the train state.
      data: `rows` of a whole split with `order` `[batches, batch]`, or of batches
        `[batches, batch, ...]`.
      first: the first batch, [].
      count: the number of steps, at most `most`, [].
      most: 1 compiles no loop at all.

    Returns:
      The new state, and the steps' losses `[most]` (zeros after `count`).
    """
    if most == 1:
      state, loss = self.step(state, *self._batch(data, first))
      return state, loss[None]

    def body(i, carry):
      state, losses = carry
      state, loss = self.step(state, *self._batch(data, first + i))
      return state, losses.at[i].set(loss)

    losses = jnp.zeros(most, jnp.float32)
    return jax.lax.fori_loop(0, count, body, (state, losses))

  def step(
      self, state: TrainState, batch: Any, index: jax.Array | None = None
  ) -> tuple[TrainState, jax.Array]:
    """One step on one batch; returns the new state and the mean loss, [].

    `index` `[batch]` says which training examples these are.
    """
    learn = self.rule.value_and_grad(
        self.net, self.loss, reduction=self.reduction)
    _, _, key, _, noise_key, augment_key = self._keys()
    batch = self._augmented(
        jax.random.fold_in(augment_key, state.step), batch)
    x = self._inputs(batch)
    if self.input_noise:
      x += self.input_noise * jax.random.normal(
          jax.random.fold_in(noise_key, state.step), x.shape, x.dtype)
    params, x, given = self._cast((state.params, x, state.feedback))
    variables = {'params': params, **state.model_state}
    particles = state.particles
    if self.examples:
      variables['particles'] = jax.tree.map(lambda s: s[index], particles)
    (loss, aux), grads = learn(
        variables, given, x, batch.labels,
        key=jax.random.fold_in(key, state.step))
    grads, feedback_grads = _as_before(grads, (state.params, state.feedback))
    # What the rule left alone stays as exact as it was.
    advanced = jax.tree.map(
        lambda new, cast, old: old if new is cast else new.astype(old.dtype),
        aux.feedback, given, state.feedback)
    if self.examples:
      particles = jax.tree.map(
          lambda all, new: all.at[index].set(new), particles,
          aux.model_state['particles'])
    trainable = self.rule.trainable(state.feedback)
    pick = functools.partial(optimizer.trained, trainable)
    learned = {'params': state.params, 'feedback': pick(state.feedback)}
    updates, opt_state = self.tx.update(
        {'params': grads, 'feedback': pick(feedback_grads)}, state.opt_state,
        learned)
    learned = optax.apply_updates(learned, updates)
    loss = loss.astype(jnp.float32)
    window = jax.tree.map(
        jnp.add, state.window, tasks.sums(loss, aux.output, batch))
    feedback = self._mirrored_now(state, optimizer.merged(
        trainable, learned['feedback'], advanced))
    model_state = {
        c: aux.model_state.get(c, v) for c, v in state.model_state.items()}
    state = TrainState(
        state.step + 1, learned['params'], feedback, opt_state,
        _as_before(model_state, state.model_state), window, particles,
        self._averaged(state, learned['params']))
    return state, loss

  def _averaged(self, state, params):
    """The moving average; from the first steps on an average of what was."""
    if not self.ema:
      return {}
    # optax.ema debiases; here the average begins at the first parameters, and
    # its memory grows to 1 / (1 - decay) steps.
    count = state.step.astype(jnp.float32) + 1
    decay = jnp.minimum(self.ema, count / (count + 9))
    return optax.incremental_update(params, state.ema, 1 - decay)

  def _mirrored_now(self, state, feedback):
    """The new feedback, or the old where it learns at other steps only."""
    if self.mirror_every == 1:
      return feedback
    now = state.step % self.mirror_every == 0
    return jax.tree.map(
        lambda mirrors, new, old: jnp.where(now, new, old) if mirrors else new,
        self.rule.mirrored(feedback), feedback, state.feedback)

  def evaluate(
      self, params: Any, model_state: Any, batch: Any, mask: jax.Array
  ) -> tasks.Sums:
    """The results of a batch, where `mask` `[batch]` is true."""
    predict = self.rule.predict(self.net)
    params, x = self._cast((params, self._inputs(batch)))
    output = predict({'params': params, **model_state}, x)
    loss = self.measured or self.loss
    return tasks.sums(
        loss(output, batch.labels), output, batch, mask, self.metrics)

  def align(self, state: TrainState, batch: Any) -> dict[str, Any]:
    """Alignment with backprop on one batch: unit -> `bpjax.Alignment`."""
    align = bpjax.alignment(self.net, self.loss, self.rule)
    _, _, _, key, _, augment_key = self._keys()
    # Views of its own that stay the same, as the batch does.
    batch = self._augmented(augment_key, batch)
    params, feedback, x = self._cast(
        (state.params, state.feedback, self._inputs(batch)))
    return align(
        {'params': params, **state.model_state}, feedback, x, batch.labels,
        key=jax.random.fold_in(key, state.step))

  def _keys(self):
    # The first ones do not depend on how many there are.
    return jax.random.split(jax.random.key(self.seed), 6)

  def _batch(self, data, i):
    if 'order' not in data:
      return jax.tree.map(lambda x: x[i], data['rows']), None
    index = self._split(data['order'][i])
    return jax.tree.map(lambda x: x[index], data['rows']), index

  def _augmented(self, key, batch):
    """The rows of a training step, where images are changed in it."""
    if self.augment is None:
      return batch
    images = self._split(data_lib.normalise(batch.images, 0., 1.))
    return batch._replace(
        images=self.augment(key, images),
        labels=self._split(jnp.tile(batch.labels, self.views)))

  def _inputs(self, batch):
    return jax.tree.map(self._split, self.task.inputs(batch))

  def _zeros(self):
    """A batch that says nothing."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.like)

  def _nothing(self):
    """Inputs of the right shapes."""
    return self.task.inputs(self._zeros())

  def _cast(self, tree):
    """The tree with its floats in the dtype of the computation."""
    return jax.tree.map(
        lambda x: x.astype(self.dtype)
        if x.dtype == jnp.float32 else x, tree)

  def _split(self, x):
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(self.mesh, PartitionSpec('data')))


def evaluated(state: TrainState) -> Any:
  """The parameters that are evaluated: the average, where there is one."""
  return state.ema or state.params


def is_finite(state: TrainState) -> jax.Array:
  """Whether every number of a state is finite, []."""
  floats = [
      x for x in jax.tree.leaves(state)
      if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def _as_before(new, old):
  """`new` in the dtypes of `old`."""
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)
