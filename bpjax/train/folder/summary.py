"""What a finished run says of itself: the content of `summary.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import bpjax
from bpjax.train import data as data_lib
from bpjax.train.loop import run as run_lib
from bpjax.train.loop import step as step_lib
import jax
import numpy as np

_STREAMED_TRAIN_EXAMPLES = 10_000  # Of a stream, for `train_accuracy`.
_PACKAGES = (
    'bpjax', 'flax', 'grain', 'jax', 'jaxlib', 'ml_collections', 'numpy',
    'optax', 'orbax-checkpoint', 'scikit-learn', 'tensorflow-datasets',
    'tokenizers')


def summarise(
    run: run_lib.Run, state: step_lib.TrainState, seconds: list[float],
    wall_time: float) -> dict[str, Any]:
  """What `summary.json` holds. Times are in seconds, of this process."""
  split = run.dataset.train
  if isinstance(split, data_lib.Stream):
    split = split.select(np.arange(min(len(split), _STREAMED_TRAIN_EXAMPLES)))
  measured = run_lib.evaluate(run, state, split)
  first_loss = run_lib.evaluate(run, run.programs['init'](), split)['loss']
  steps = int(state.step)  # Fewer than all where it was stopped early.
  lines = run.folder.metrics()
  last = [m for m in lines if m['step'] == steps]
  results = {f'train_{name}': value for name, value in measured.items()} | {
      'first_train_loss': first_loss,
      # Also where one of them is not a number.
      'diverged': not measured['loss'] <= first_loss}
  for name in ('test', 'validation'):
    line = next((m for m in last if m['split'] == name), {})
    for value in measured:
      results[f'{name}_{value}'] = line.get(value)
  device = run.learner.mesh.devices.flat[0]
  return dict(sorted(results.items(), reverse=True)) | {
      'rule': run.config.rule, 'seed': run.config.seed,
      'epochs': run.config.epochs, 'steps': steps,
      'best': run_lib.best(run, lines),
      'parameter_count': _count(state.params),
      'feedback_count': _count(state.feedback),
      'median_step_time': float(np.median(seconds)) if seconds else None,
      'wall_time': wall_time,
      'units': run.units,
      'alignment': {
          m['unit']: {k: m.get(k) for k in bpjax.Alignment._fields}
          for m in last if m['split'] == 'alignment'},
      'data_source': run.dataset.source,
      'device_kind': device.device_kind, 'device_count': jax.device_count(),
      'versions': versions(), 'git_commit': _git_commit(),
  }


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def versions() -> dict[str, str | None]:
  """Versions of Python and of the packages that a result depends on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


def _git_commit():
  """The commit of this program, or None outside git."""
  try:
    found = subprocess.run(
        ['git', 'rev-parse', '--verify', 'HEAD'], capture_output=True,
        cwd=os.path.dirname(os.path.abspath(__file__)), text=True, timeout=10,
        check=False)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return found.stdout.strip() or None if found.returncode == 0 else None
