"""A run that was trained, read back from its folder.

What lies in a folder can make this program run no code: where the config names
code of the user's own, the caller has to say that it may be run.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import os
from typing import Any

from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train import named
from bpjax.train.data import feed as feed_lib
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import build
from bpjax.train.loop import step as step_lib
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

_CODE = ('rule', 'model', 'dataset', 'loss', 'augment')
_NOTHING = -30.  # The logarithm of a probability of 0, about.


@dataclasses.dataclass(frozen=True)
class Restored:
  """A trained network, with what is needed to use it.

  Attributes:
    workdir: the run's folder.
    config: what the run was told.
    dataset: its data.
    learner: the network, the rule and the task.
    step: of the checkpoint.
    variables: the trained variables of the network.
  """
  workdir: str
  config: ml_collections.ConfigDict
  dataset: data_lib.Dataset
  learner: step_lib.Learner
  step: int
  variables: Any

  @property
  def classes(self) -> tuple[str, ...]:
    """The names of the classes; their numbers where they have none."""
    return self.dataset.classes or tuple(
        map(str, range(self.dataset.num_classes)))

  def outputs(self, rows: Any) -> jax.Array:
    """What the network answers to rows of a split, `[n, ..., classes]`."""
    predict = self.learner.rule.predict(self.learner.net)
    return predict(self.variables, self.learner.task.inputs(rows))

  def log_probabilities(self, outputs: jax.Array) -> jax.Array:
    """The logarithms of the probabilities that outputs stand for.

    Under cross-entropy, and losses of the user's own, those of a softmax; under
    the losses of one-hot labels the outputs that they are trained to, scaled to
    a sum of 1.
    """
    outputs = outputs.astype(jnp.float32)
    if self.config.loss == 'sigmoid_cross_entropy':
      logs = jax.nn.log_sigmoid(outputs)
    elif self.config.loss == 'squared_error':
      logs = jnp.log(jnp.maximum(outputs, np.exp(_NOTHING)))
    else:
      return jax.nn.log_softmax(outputs)
    return logs - jax.nn.logsumexp(logs, axis=-1, keepdims=True)

  def over(self, split: Any) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Batches of rows of a split, their outputs and log probabilities."""
    def answer(rows):
      outputs = self.outputs(rows)
      return outputs, self.log_probabilities(outputs)

    answer = jax.jit(answer)
    for rows, mask in feed_lib.eval_batches(
        split, min(self.config.eval_batch_size, feed_lib.length(split)),
        self.learner.mesh):
      keep = np.asarray(mask)
      yield jax.tree.map(
          lambda x: np.asarray(x)[keep], (rows, *answer(rows)))


def restore(
    workdir: str, *, best: bool = False, trust_code: bool = False
) -> Restored:
  """Reads a run back, with the parameters of its last or its best checkpoint.

  Args:
    workdir: the run's folder.
    best: take the checkpoint of the best epoch, which `keep_best` keeps.
    trust_code: run the code that the config names.

  Raises:
    ValueError: if the folder holds no run, no checkpoint that can be used, or
      one that names code which may not be run; or if its data are not here.

  Example:
    >>> run = restore('runs/digits')
    >>> run.outputs(run.dataset.test).shape
    (360, 10)
  """
  config = _config(workdir, trust_code)
  dataset, learner, _, _, like = build.make(config)
  folder = os.path.join(workdir, 'best' if best else 'checkpoints')
  if not os.path.isdir(folder):
    raise ValueError(
        f'`workdir` {workdir!r} holds no {os.path.basename(folder)}; train '
        f'{"with `keep_best`" if best else "it"} first.')
  with checkpoint.Checkpoints(
      folder, keep=1, warn=_nothing,
      identity=workdir_lib.identity(workdir)) as checkpoints:
    found = checkpoints.peek(like)
  if found is None:
    raise ValueError(
        f'`workdir` {workdir!r} holds no checkpoint; train it first.')
  step, state = found
  return Restored(
      os.path.abspath(workdir), config, dataset, learner, step,
      {'params': step_lib.evaluated(state), **state.model_state})


def _nothing(message):
  del message


def _config(workdir, trust_code):
  """The config of the run in a folder, checked as one of a command line."""
  path = os.path.join(workdir, 'config.json')
  try:
    with open(path, encoding='utf-8') as file:
      held = json.load(file)
    if not isinstance(held, dict):
      raise ValueError('it holds no object')
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(
        f'`workdir` must be the folder of a run, and {path} cannot be read '
        f'({getattr(error, "strerror", None) or error}); give another.'
    ) from error
  config = config_lib.default()
  unknown = sorted(set(held) - set(config))
  if unknown:
    raise ValueError(
        f'{path} holds the field {unknown[0]!r}, which this version does not '
        'know; take the version that trained the run.')
  with config.ignore_type():
    for field, value in held.items():
      config[field] = value
  for field in ('model', 'loss'):
    if str(config[field]).startswith('fit:'):
      raise ValueError(
          f'`workdir` {workdir!r} was trained by `bpjax.train.fit`, so that '
          f'nothing there names its {field}; call `fit` again, which returns '
          'it.')
  config_lib.check(config)
  names = [config[f] for f in _CODE] + [name for _, name, _ in (
      config.rule_by_path)] + list(config.metrics)
  code = [name for name in names if named.is_code(name)]
  if code and not trust_code:
    raise ValueError(
        f'{path} names code, {code[0]!r}, and no code is run because a folder '
        'says so; if it is yours, add --trust_code.')
  return config
