"""What a trained network gets right, class by class, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bpjax.train import data as data_lib
from bpjax.train import restore as restore_lib
from bpjax.train.data import prepared
from bpjax.train.loop import tasks
import numpy as np

BINS = 15  # Of the calibration, as Guo et al. have them.


def evaluate(
    run: restore_lib.Restored, split: str = 'test', dataset: str = ''
) -> dict[str, Any]:
  """Measures a trained network on a split.

  Args:
    run: from `bpjax.train.restore.restore`.
    split: 'train', 'validation' or 'test'.
    dataset: another data set, of the same classes; '': the run's own.

  Returns:
    A dict for JSON: `examples`, `loss`, `accuracy` and what else the task
    measures; of a task with a class for every example `classes`, `confusion`
    (a row a true class, a column a predicted one), `per_class` (precision,
    recall, F1 and support), `calibration` (`expected_calibration_error` over 15
    bins of confidence: On calibration of modern neural networks, Guo et al.,
    2017, arXiv 1706.04599; `brier_score`; and the bins).

  Raises:
    ValueError: if there is no such split, or the other set has other classes
      or shapes.
  """
  metrics = prepared.require('sklearn.metrics', 'evaluating')
  rows = _rows(run, split, dataset)
  sums, labels, logs = [], [], []
  loss = run.learner.measured or run.learner.loss
  for batch, outputs, log in run.over(rows):
    sums.append(tasks.sums(
        loss(outputs, batch.labels), outputs, batch,
        np.ones(len(batch.labels), bool), run.learner.metrics))
    labels.append(batch.labels)
    logs.append(log)
  total = tasks.Sums(*(
      {n: sum(float(s.more[n]) for s in sums) for n in sums[0].more}
      if field == 'more' else sum(float(getattr(s, field)) for s in sums)
      for field in tasks.Sums._fields))
  result = {
      'workdir': run.workdir, 'step': run.step, 'rule': run.config.rule,
      'dataset': dataset or run.config.dataset, 'split': split,
      'examples': sum(map(len, labels)),
      **run.learner.task.metrics(total)}
  if np.ndim(labels[0]) > 1:
    return result
  truth, log = np.concatenate(labels), np.concatenate(logs)
  guess, count = log.argmax(1), log.shape[1]
  names = (*run.classes, *map(str, range(len(run.classes), count)))
  scores = metrics.precision_recall_fscore_support(
      truth, guess, labels=range(count), zero_division=0)
  return result | {
      'classes': list(names),
      'confusion': metrics.confusion_matrix(
          truth, guess, labels=range(count)).tolist(),
      'per_class': [
          dict(zip(('class', 'precision', 'recall', 'f1', 'support'),
                   (names[i], *map(float, row[:3]), int(row[3]))))
          for i, row in enumerate(zip(*scores))],
      'calibration': calibration(np.exp(log), truth)}


def calibration(
    probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """How far confidence is from accuracy.

  Args:
    probabilities: `[n, classes]`.
    labels: integers `[n]`.

  Example:
    >>> import numpy as np
    >>> sure = np.array([[1., 0.], [1., 0.]])
    >>> calibration(sure, np.array([0, 1]))['expected_calibration_error']
    0.5
  """
  confidence = probabilities.max(1)
  right = probabilities.argmax(1) == labels
  bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
  bins = []
  for i in range(BINS):
    here = bin_of == i
    bins.append({
        'from': i / BINS, 'to': (i + 1) / BINS, 'count': int(here.sum()),
        'confidence': float(confidence[here].mean()) if here.any() else None,
        'accuracy': float(right[here].mean()) if here.any() else None})
  gap = sum(b['count'] * abs(b['confidence'] - b['accuracy'])
            for b in bins if b['count'])
  target = np.eye(probabilities.shape[1])[labels]
  return {
      'expected_calibration_error': gap / len(labels),
      'brier_score': float(((probabilities - target) ** 2).sum(1).mean()),
      'mean_confidence': float(confidence.mean()), 'bins': bins}


def table(result: dict[str, Any]) -> str:
  """The result as text: a line of numbers, and a line a class."""
  numbers = ', '.join(
      f'{k.replace("_", " ")} {v:.4f}' for k, v in result.items()
      if isinstance(v, float))
  lines = [f'{result["examples"]} {result["split"]} examples of '
           f'{result["dataset"]}: {numbers}']
  if 'per_class' not in result:
    return lines[0]
  found = result['calibration']
  lines += [
      f'calibration error {found["expected_calibration_error"]:.4f}, Brier '
      f'score {found["brier_score"]:.4f}, mean confidence '
      f'{found["mean_confidence"]:.4f}', '']
  rows = [('class', 'precision', 'recall', 'F1', 'examples',
           'most often taken for')]
  for i, entry in enumerate(result['per_class']):
    wrong = np.array(result['confusion'][i])
    wrong[i] = 0
    rows.append((
        entry['class'], *(f'{entry[k]:.3f}' for k in (
            'precision', 'recall', 'f1')), str(entry['support']),
        f'{result["classes"][wrong.argmax()]} ({wrong.max()})'
        if wrong.any() else '-'))
  return '\n'.join(lines + _aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ['  '.join(
      cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows]


def _rows(run, split, dataset):
  if split not in ('train', 'validation', 'test'):
    raise ValueError(
        f"`split` must be 'train', 'validation' or 'test', got {split!r}.")
  found = run.dataset
  if dataset:
    found = data_lib.load(
        dataset, run.config.data_dir or None,
        image_size=(
            run.dataset.image_shape[0] if len(run.dataset.image_shape) == 3
            else 0),
        preprocessing=run.config.preprocessing,
        zca_epsilon=run.config.zca_epsilon, length=run.config.length,
        trained_tokenizer=run.dataset.tokenizer)
    for name in ('num_classes', 'image_shape', 'classes'):
      ours, theirs = getattr(run.dataset, name), getattr(found, name)
      if ours != theirs and (name != 'classes' or ours and theirs):
        raise ValueError(
            f'`dataset` {dataset!r} must have the {name} of the run, {ours}, '
            f'got {theirs}; give another.')
  rows = getattr(found, split)
  if rows is None:
    raise ValueError(
        f'`split` {split!r} is empty: the run set no examples apart; choose '
        'train or test.')
  return rows
