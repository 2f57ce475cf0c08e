r"""Shuffled labels and alignment: claim 9 of docs/dynamics.md.

  python scripts/dynamics_labels.py [--output=...] [--read=results/dynamics_labels.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428). The network of `scripts/dynamics_mlp.py` (four
layers, 100 hidden neurons each, relu, one F for all) learns CIFAR-10 by direct
feedback alignment with a fraction p of the labels, train and test, replaced by
uniform ones. The more labels are, the later weight alignment grows: the output has
nothing to say but that all classes are equally probable, and its errors correlate.

Measured for each p: the first epoch at which the total weight alignment is twice its
value after one epoch; also that at which it passes .1, and at which the training
error is a tenth below its chance level.
Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

import math

from absl import flags
import bpjax
from bpjax.theory import alignment
import dynamics
from experiments import measurement
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

_DATASET = flags.DEFINE_string('dataset', 'cifar10', 'A TFDS set, or digits.')
_EXAMPLES = flags.DEFINE_integer('train_examples', 1000, 'Of the set.', 64)
_EPOCHS = flags.DEFINE_integer('epochs', 100, 'Of training.', 1)
_SEEDS = flags.DEFINE_integer('seeds', 2, 'Networks of each p.', 2)
_SHUFFLED = flags.DEFINE_list(
    'shuffled', ['0', '.1', '.2', '.5', '.9'], 'Fractions p.')
_SIDE = flags.DEFINE_integer('side', 14, 'Of the images.', 1)

LAYERS, WIDTH, RATE, BATCH, PASSES = 4, 100, 1e-3, 32, .1
LOSS = bpjax.losses.softmax_cross_entropy


def shuffled(key, labels, p: float) -> jax.Array:
  """Labels of which a fraction p is replaced by uniform ones."""
  choose, draw = jax.random.split(key)
  return jnp.where(
      jax.random.uniform(choose, labels.shape) < p,
      jax.random.randint(draw, labels.shape, 0, 10), labels)


def measure() -> dict:
  """The curves of every p, means over seeds."""
  try:
    fractions = [float(p) for p in _SHUFFLED.value]
  except ValueError as error:
    raise measurement.FlagError(
        f'`shuffled` must be numbers, such as 0,.5: {error}.') from error
  if not all(0 <= p <= 1 for p in fractions):
    raise measurement.FlagError(
        f'`shuffled` must lie in [0, 1], got {fractions}.')
  train, test = dynamics.images(_DATASET.value, _EXAMPLES.value, _SIDE.value)
  seeds = _SEEDS.value
  keys = jax.random.split(jax.random.key(3), seeds)
  y, y_test = (jnp.stack([
      shuffled(jax.random.fold_in(key, i), labels, p)
      for p in fractions for key in keys])
               for i, labels in enumerate((train[1], test[1])))
  net, names = dynamics.mlp(LAYERS, WIDTH, 10, 'relu')
  rule = bpjax.rules.direct_feedback_alignment()
  trainer = dynamics.Trainer(
      net, rule, LOSS, train[0], y, seeds=len(y), rate=RATE, batch=BATCH,
      each=True)

  def weights(params, feedback):
    matrices, feedback = alignment.chain(params, feedback, names)
    return alignment.weight_alignment(
        matrices, [f * WIDTH**.5 for f in feedback]).total

  def gradients(params, feedback, x, y):
    return dynamics.gradient_alignment(
        net, LOSS, rule, names, params, feedback, x[:256], y[:256]).total

  def error(params, x, y):
    output = net.apply({'params': params}, x)
    return jnp.mean(jnp.argmax(output, -1) != y)

  epochs = dynamics.log_spaced(_EPOCHS.value, 40)
  curves = {}
  for epoch in epochs:
    trainer.advance(epoch)
    for name, values in (
        ('wa', trainer.measure(weights, trainer.feedback)),
        ('ga', trainer.measure_each(
            gradients, y, trainer.feedback, train[0])),
        ('train_error', trainer.measure_each(error, y, train[0])),
        # One function serves both splits: jit tells them apart by shape.
        ('test_error', trainer.measure_each(error, y_test, test[0]))):
      curves.setdefault(name, []).append(
          values.reshape(len(fractions), seeds).mean(1))
  return {
      'dataset': _DATASET.value, 'train_examples': _EXAMPLES.value,
      'seeds': seeds, 'epochs': epochs, 'rows': [
          {'p': p, **{k: [float(v[i]) for v in values]
                      for k, values in curves.items()}}
          for i, p in enumerate(fractions)]}


def passes(epochs, curve, level: float) -> float:
  """The epoch, interpolated, at which a curve passes a level; infinite if never."""
  above = np.flatnonzero(np.array(curve) >= level)
  if not above.size:
    return math.inf
  i = above[0]
  if not i:
    return float(epochs[0])
  part = (level - curve[i - 1]) / (curve[i] - curve[i - 1])
  return float(epochs[i - 1] + part * (epochs[i] - epochs[i - 1]))


def judge(record: dict) -> list[dynamics.Claim]:
  """The table, and what must hold."""
  epochs, rows = record['epochs'], record['rows']
  table = measurement.table(
      f'{record["dataset"]}, {record["train_examples"]:,} examples, '
      f'{record["seeds"]} seeds, {epochs[-1]} epochs', 'p', 'WA, epoch 1',
      'twice that at', f'{PASSES} at', 'WA, end', 'GA, end', 'fits from',
      'error, train / test')
  doubled, passed = [], []
  for row in rows:
    # From epoch 1 on: at epoch 0 it is a random number about 0.
    first = row['wa'][1]
    doubled.append(passes(epochs[1:], row['wa'][1:], 2 * first))
    passed.append(passes(epochs, row['wa'], PASSES))
    fits = passes(epochs, [-e for e in row['train_error']], -.8)
    table.add_row(
        f'{row["p"]:g}', f'{first:.3f}', f'{doubled[-1]:.1f}',
        f'{passed[-1]:.1f}', f'{row["wa"][-1]:.3f}', f'{row["ga"][-1]:.3f}',
        f'{fits:.1f}',
        f'{row["train_error"][-1]:.3f} / {row["test_error"][-1]:.3f}')
  measurement.show(table)
  claims = []
  for name, found in (('is twice its value after one', doubled),
                      (f'passes {PASSES}', passed)):
    for (a, b), (low, high) in zip(
        zip(rows, rows[1:]), zip(found, found[1:])):
      claims.append(dynamics.Claim(
          9, f'epoch at which WA {name}: p = {b["p"]:g} over p = {a["p"]:g}',
          high / low if low < math.inf else math.nan, 1.))
  return claims


def draw(record: dict, path: str) -> None:
  """Weight alignment, gradient alignment and error over epochs."""
  figure, axes = plt.subplots(
      1, 3, figsize=(12, 3.6), layout='constrained')
  for i, row in enumerate(record['rows']):
    for axis, name in zip(axes, ('wa', 'ga', 'train_error')):
      axis.semilogx(record['epochs'][1:], row[name][1:], color=f'C{i}',
                    label=f'p = {row["p"]:g}')
  for axis, label in zip(axes, (
      'weight alignment', 'gradient alignment', 'training error')):
    axis.set(xlabel='epoch', ylabel=label)
    axis.grid(alpha=.25)
  axes[0].legend(fontsize='small')
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_labels', measure, judge, draw)
