"""The launcher's loop as a function, for notebooks and programs of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import signal
import threading
import time
from typing import Any

import bpjax
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train.data import sets
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import build
from bpjax.train.loop import launch
from bpjax.train.loop import progress
from bpjax.train.loop import step as step_lib
from flax import linen as nn
from flax import nnx
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What `fit` returns.

  Attributes:
    net: the network.
    variables: its trained variables, as `net.apply` takes them; the average of
      the parameters where there is one.
    feedback: the rule's own weights.
    summary: what `summary.json` holds: `summary['test_accuracy']`.
    metrics: the lines of `metrics.jsonl`.
    workdir: the folder.
    inputs: rows of a split -> what the network reads.
  """
  net: Any
  variables: Any
  feedback: Any
  summary: Mapping[str, Any]
  metrics: list[dict[str, Any]]
  workdir: str
  inputs: Callable[[Any], Any]

  def predict(self, images: Any) -> jax.Array:
    """Probabilities `[n, classes]` of images or rows, as the data set has them."""
    images = np.asarray(images)
    if images.ndim == 3:
      images = images[..., None]
    rows = data_lib.Split(images, np.zeros(len(images), np.int32))
    apply = jax.jit(lambda v, x: jax.nn.softmax(self.net.apply(v, x)))
    return apply(self.variables, self.inputs(rows))


def fit(
    net: Any, rule: Any, loss: Any = 'cross_entropy', dataset: Any = 'digits',
    *, workdir: str, metrics: Mapping[str, Callable[..., Any]] | None = None,
    quiet: bool = False, **fields: Any) -> Fitted:
  """Trains a network by a rule, as the launcher does.

  The folder holds what a launcher's does: metrics, log, checkpoints, summary.
  The same call goes on where an interrupted one was (Ctrl-C is a
  KeyboardInterrupt once the step is saved), and returns at once where it was
  finished.

  Args:
    net: a network of `from_linen`, `from_nnx` or `from_function`, or a linen or
      NNX module.
    rule: a rule, or the name of one.
    loss: 'cross_entropy', 'sigmoid_cross_entropy', 'squared_error', or a
      function of outputs `[batch, classes]` and labels `[batch]` that returns a
      loss for each example.
    dataset: a `bpjax.train.Dataset` (`bpjax.train.dataset` makes one of
      arrays), or what `--config.dataset` takes.
    workdir: the folder of the run.
    metrics: name -> a function of outputs and labels that returns a number for
      each example, measured beside loss and accuracy.
    quiet: print nothing.
    **fields: of a config, such as `epochs`, `batch_size`, `learning_rate`,
      `optimizer`, `seed`, `validation`, `ema`.

  Returns:
    A Fitted.

  Raises:
    ValueError: with one sentence, for what cannot work.
    NonFiniteError: if a loss or a weight is not finite.
    DiskError: if something cannot be written or read.

  Example:
    >>> import bpjax, tempfile
    >>> fitted = bpjax.train.fit(
    ...     bpjax.models.mlp(num_classes=10, widths=(32,)),
    ...     bpjax.rules.feedback_alignment(), dataset='digits', epochs=5,
    ...     learning_rate=.01, workdir=tempfile.mkdtemp(), quiet=True)
    >>> fitted.summary['test_accuracy'] > .8
    True
    >>> import numpy as np
    >>> fitted.predict(np.zeros((5, 8, 8), np.uint8)).shape
    (5, 10)
  """
  config = config_lib.default()
  for name in ('net', 'model', 'model_args', 'rule_args', 'units', 'boundaries'):
    if name in fields:
      raise ValueError(
          f'`{name}` must be left out of `fit`, which is handed the network and '
          'the rule as they are.')
  unknown = [name for name in fields if name not in config]
  if unknown:
    raise ValueError(
        f'`{unknown[0]}` is no argument of `fit` and no field of a config; '
        f'known: {", ".join(config)}.')
  with config.ignore_type():
    for name, value in fields.items():
      config[name] = value
  net, config.model = _network(net)
  if isinstance(rule, str):
    config.rule, rule = rule, None
  elif hasattr(rule, 'value_and_grad'):
    config.rule = rule.name
  else:
    raise ValueError(
        '`rule` must be a rule, such as `bpjax.rules.feedback_alignment()`, or '
        f'the name of one, got {type(rule).__name__}.')
  if callable(loss):
    config.loss, loss = 'fit:' + _name(loss), loss
  else:
    config.loss, loss = loss, None
  if isinstance(dataset, str):
    config.dataset, dataset = dataset, None
  elif isinstance(dataset, sets.Dataset):
    config.dataset = dataset.name
  else:
    raise ValueError(
        '`dataset` must be a `bpjax.train.Dataset` or the name of one, got '
        f'{type(dataset).__name__}; make it with `bpjax.train.dataset`.')
  given = build.Given(net, rule, loss, dataset, metrics or {})
  begin = time.perf_counter()
  with contextlib.ExitStack() as stack:
    stopper = stack.enter_context(_Asked())
    folder = stack.enter_context(workdir_lib.Workdir(workdir, quiet=quiet))
    finished = launch.finish(config, folder, stopper, begin, given)
    if finished is None:  # It was before.
      _, learner, _, _, like = build.make(config, given)
      found = stack.enter_context(checkpoint.Checkpoints(
          folder.checkpoints, config.keep_checkpoints, warn=folder.warn,
          identity=folder.identity)).peek(like)
      if found is None:
        raise ValueError(
            f'`workdir` {workdir!r} is finished and holds no checkpoint; choose '
            'another folder.')
      _, state = found
    else:
      learner, state = finished[0].learner, finished[1]
    summary = folder.summary()
    assert summary is not None
    return Fitted(
        learner.net,
        {'params': step_lib.evaluated(state), **state.model_state},
        state.feedback, summary, folder.metrics(), folder.path,
        learner.task.inputs)


def dataset(
    train: tuple[Any, Any], test: tuple[Any, Any],
    validation: tuple[Any, Any] | None = None, *, classes=(),
    name: str = 'arrays') -> data_lib.Dataset:
  """A Dataset of arrays; see `bpjax.train.data.from_arrays`.

  Example:
    >>> import bpjax, numpy as np
    >>> x, y = np.random.rand(90, 8, 8), np.arange(90) % 3
    >>> data = bpjax.train.dataset((x[:60], y[:60]), (x[60:], y[60:]))
    >>> data.num_classes, data.image_shape
    (3, (8, 8, 1))
  """
  return sets.from_arrays(train, test, validation, classes=classes, name=name)


def _network(net):
  """A network, and what the config says of it."""
  if isinstance(net, nnx.Module):
    return bpjax.from_nnx(net), f'fit:{type(net).__name__}'
  if isinstance(net, nn.Module):
    return bpjax.from_linen(net), f'fit:{type(net).__name__}'
  if hasattr(net, 'survey') and hasattr(net, 'apply'):
    module = getattr(net, 'module', None)
    return net, f'fit:{_name(net if module is None else type(module))}'
  raise ValueError(
      '`net` must be a network of `bpjax.from_linen`, `from_nnx` or '
      f'`from_function`, or a module, got {type(net).__name__}.')


def _name(value):
  name = getattr(value, '__name__', type(value).__name__)
  return name if name.isidentifier() else 'function'


class _Asked(progress.Stopper):
  """Ctrl-C alone, and without a thread that could end a notebook's process."""

  def __enter__(self):
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      self._handler = signal.signal(signal.SIGINT, self._ask)
    return self

  def __exit__(self, *error):
    if self._main:
      signal.signal(signal.SIGINT, self._handler)

  def _ask(self, number, frame):
    if self.asked is not None and not self._reading:
      raise KeyboardInterrupt
    super()._ask(number, frame)
