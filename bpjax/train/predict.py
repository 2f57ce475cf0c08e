"""The classes of files, as a trained network sees them."""

from __future__ import annotations

from collections.abc import Sequence
import csv
import pathlib
from typing import Any

from bpjax.train import restore as restore_lib
from bpjax.train.data import own
from bpjax.train.data import preprocessing
from bpjax.train.data import tokenizer as tokenizer_lib
from bpjax.train.data.decoded import Split
from bpjax.train.data.rows import Tokens
import numpy as np


def predict(
    run: restore_lib.Restored, files: Sequence[str], top: int = 1
) -> list[dict[str, Any]]:
  """The most probable classes of images, texts or rows of a table.

  Files are read as the run's data were: images are scaled to its size and by
  its moments, texts go through its tokeniser.

  Args:
    run: from `bpjax.train.restore.restore`.
    files: of images, of texts (.txt, one a line, the two texts of a pair with a
      tab between them), or tables (.csv, .npz) with the columns of the run's.
    top: how many classes of each.

  Returns:
    A dict for each example and each of its classes: `file`, `line` (from 1 on;
    None of an image), `class` and `probability`.

  Raises:
    ValueError: for a file that cannot be read, or a run that has no classes.

  Example:
    >>> predict(restore('runs/digits'), ['seven.png'])
    [{'file': 'seven.png', 'line': None, 'class': '7', 'probability': 0.98}]
  """
  if not files:
    raise ValueError('`files` must name one file at least, got none.')
  if run.dataset.asked is not None and run.dataset.asked.each_token:
    raise ValueError(
        f'{run.workdir} holds the run of a language, which has no classes to '
        'predict; choose one of images or of texts with labels.')
  if not 1 <= top <= run.dataset.num_classes:
    raise ValueError(
        f'`top` must be between 1 and the {run.dataset.num_classes} classes, '
        f'got {top}.')
  read = _images if run.dataset.asked is None else _texts
  if len(run.dataset.image_shape) == 1:
    read = _numbers
  names, rows = read(run, files)
  answers = []
  count = len(run.classes)
  logs = np.concatenate([log for *_, log in run.over(rows)])
  for (file, line), log in zip(names, logs):
    for i in np.argsort(-log, kind='stable')[:top]:
      answers.append({
          'file': file, 'line': line,
          'class': run.classes[i] if i < count else str(i),
          'probability': float(np.exp(log[i]))})
  return answers


def _images(run, files):
  shape = run.dataset.image_shape
  images = []
  for file in files:
    if not pathlib.Path(file).is_file():
      raise ValueError(f'{file!r} is no file; give the path of an image.')
    with own.open_image(pathlib.Path(file)) as image:
      images.append(own.to_array(image, *shape))
  split = Split(np.stack(images), np.zeros(len(images), np.int32))
  if run.config.preprocessing:
    # Whitened by the training images, which have to be read as they were.
    from bpjax.train.loop import build

    config = run.config.copy_and_resolve_references()
    config.preprocessing = ''
    raw = build.load(config)
    *_, split = preprocessing.apply(
        run.config.preprocessing, run.config.zca_epsilon,
        (raw.train, raw.validation, split), 'predicted', None)
  elif run.dataset.train.images.dtype != np.uint8:
    raise ValueError(
        f'{run.workdir} was trained on arrays of floats, and images hold bytes; '
        'save the images to predict in an .npz file and call '
        '`bpjax.train.restore`.')
  return [(file, None) for file in files], split


def _texts(run, files):
  columns = 2 if run.dataset.asked.pairs else 1
  names, texts = [], [[] for _ in range(columns)]
  for file in files:
    try:
      lines = pathlib.Path(file).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(
          f'{file!r} must be a text file in UTF-8, and cannot be read '
          f'({getattr(error, "strerror", None) or error}).') from error
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      parts = line.split('\t') if columns == 2 else [line]
      if len(parts) != columns:
        raise ValueError(
            f'line {number} of {file!r} must hold two texts with a tab between '
            f'them, got {len(parts)}.')
      names.append((file, number))
      for column, part in zip(texts, parts):
        column.append(part)
  if not names:
    raise ValueError(f'{files[0]!r} holds no text; write one a line.')
  made = tokenizer_lib.load(run.dataset.tokenizer)
  tokens, ends = tokenizer_lib.rows(made, texts)
  return names, Tokens(tokens, ends, np.zeros(len(names), np.int32))


def _numbers(run, files):
  size = run.dataset.image_shape[-1]
  names, rows = [], []
  for file in files:
    try:
      with open(file, encoding='utf-8-sig', newline='') as lines:
        table = [row for row in csv.reader(lines) if row]
      values = np.array(table[1:], np.float32)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
      raise ValueError(
          f'{file!r} must be a table of numbers with a header, and cannot be '
          f'read ({getattr(error, "strerror", None) or error}).') from error
    if values.ndim != 2 or values.shape[1] != size or not (
        np.isfinite(values).all()):
      raise ValueError(
          f'{file!r} must have {size} columns of finite numbers, those that the '
          'run was trained on without that of the classes, got '
          f'{list(values.shape)}.')
    rows.append(values)
    names += [(file, i) for i in range(1, len(values) + 1)]
  return names, Split(np.concatenate(rows), np.zeros(len(names), np.int32))
