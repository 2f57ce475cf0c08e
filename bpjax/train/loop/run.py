"""One run: what a config asks for, made ready and trained.

`setup` refuses whatever cannot work, and compiles; `start` finds the last whole
checkpoint, or begins; `train` goes on from there to the end. The result depends
on the config alone: not on where a run was interrupted, nor on how its steps
are cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import time
from typing import Any

from bpjax.train import data as data_lib
from bpjax.train import hosts as hosts_lib
from bpjax.train.data import feed as feed_lib
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import build
from bpjax.train.loop import devices
from bpjax.train.loop import optimizer
from bpjax.train.loop import progress as progress_lib
from bpjax.train.loop import step as step_lib
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np

_MOST_STEPS = 100  # Per call, so that the bar moves and signals are heard.
_SECONDS_PER_CALL = 1.  # At most, where a step takes less: likewise.
_CPU_FLOPS_PER_CALL = 2e10  # Under a second on one core.
class NonFiniteError(Exception):
  """A loss, a weight or feedback became infinite or NaN."""


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


def setup(
    config: ml_collections.ConfigDict, folder: workdir_lib.Workdir,
    given: build.Given = build.Given(), hosts: hosts_lib.Hosts = hosts_lib.Hosts()
) -> Run:
  """Makes everything ready, and refuses whatever cannot work.

  Raises:
    ValueError: with one sentence that says what to change.
  """
  dataset, learner, feed, batch, like = build.make(config, given)
  most, programs = _compile(config, learner, feed, like)
  return Run(
      config, folder, dataset, learner, feed, batch, like, learner.units(),
      most, programs, hosts)


def start(
    run: Run, checkpoints: checkpoint.Checkpoints, stopper: progress_lib.Stopper
) -> tuple[step_lib.TrainState, int]:
  """The state to go on from and its step: the last whole checkpoint's, or new.

  A checkpoint counts on the lines of the metrics before it. Those of its own
  step and after it, which the run is going to write again, are removed.

  Raises:
    ValueError: if there are checkpoints, but none that can be used.
  """
  with stopper.reading():
    restored = checkpoints.restore(run.like, run.folder.recorded_before)
  if restored is not None:
    step, state = restored
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
