r"""Convolutions cannot align: claim 10 of docs/dynamics.md.

  python scripts/dynamics_conv.py [--output=...] [--read=results/dynamics_conv.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428). Direct feedback alignment aligns W_l with F_l
F_{l-1}^T. A convolution is a matrix phi(W) of few entries, local and shared, so
cos(phi(W_l), F_l F_{l-1}^T) is bounded by the part of the target that is itself a
convolution: see `bpjax.theory.convolution`. Measured on CIFAR-10, 16 x 16: that
bound, what three 3 x 3 convolutions (16, 32 with stride 2, 32 with stride 2; relu) reach
in training, and beside it the weight alignment of four dense layers of 100, trained by
the same rule on the same examples for as many steps. The readout over the convolutions
is dense: it has no such bound.
Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

import math

from absl import flags
import bpjax
from bpjax.theory import alignment
from bpjax.theory import convolution
import dynamics
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

_DATASET = flags.DEFINE_string('dataset', 'cifar10', 'A TFDS set, or digits.')
_EXAMPLES = flags.DEFINE_integer('train_examples', 1000, 'Of the set.', 64)
_EPOCHS = flags.DEFINE_integer('epochs', 100, 'Of training.', 1)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Networks of each kind.', 2)
_SIDE = flags.DEFINE_integer('side', 16, 'Of the images.', 4)

CHANNELS, STRIDES = (16, 32, 32), (1, 2, 2)
RATE, BATCH = 1e-3, 32
LOSS = bpjax.losses.softmax_cross_entropy
CONVS = [f'layers_{2 * i}' for i in range(len(CHANNELS))]
READOUT = f'layers_{2 * len(CHANNELS) + 1}'


def network():
  """Three convolutions and a readout, without biases."""
  init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  parts = []
  for channels, stride in zip(CHANNELS, STRIDES):
    parts += [nn.Conv(channels, (3, 3), (stride, stride), use_bias=False,
                      kernel_init=init), nn.relu]
  parts += [lambda x: x.reshape(len(x), -1),
            nn.Dense(10, use_bias=False, kernel_init=init)]
  return bpjax.from_linen(nn.Sequential(parts))


def convolutions(params, feedback) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Name -> alignment and bound, of the convolutions above the first."""
  readers = [*CONVS[1:], READOUT]
  top = _SIDE.value // math.prod(STRIDES)
  maps = [feedback[name] for name in readers]
  maps[-1] = maps[-1].reshape(-1, top, top, CHANNELS[-1])
  return {
      name: convolution.target_alignment(
          params[name]['kernel'], up, down, strides=(stride, stride))
      for name, down, up, stride in zip(
          CONVS[1:], maps, maps[1:], STRIDES[1:])}


def train_convolutions(x, y) -> list[dict]:
  """A row a layer above the first: alignment over training, and its bound."""
  net, rule = network(), bpjax.rules.direct_feedback_alignment()
  learn = rule.value_and_grad(net, LOSS)

  # A step at a time: XLA's fast convolutions for CPUs do not exist in loops.
  @jax.jit
  def step(params, feedback, x, y):
    _, (grads, _) = learn({'params': params}, feedback, x, y)
    return jax.tree.map(lambda p, g: p - RATE * BATCH * g, params, grads)

  @jax.jit
  def look(params, feedback, x, y):
    readout = alignment.weight_alignment(
        [jnp.zeros(()), params[READOUT]['kernel'].T], [feedback[READOUT].T])
    signals = dynamics.gradient_alignment(
        net, LOSS, rule, [*CONVS, READOUT], params, feedback, x[:256], y[:256])
    accuracy = jnp.mean(jnp.argmax(net.apply({'params': params}, x), -1) == y)
    return convolutions(params, feedback), readout.total, signals, accuracy

  runs = []
  for seed in range(_SEEDS.value):
    variables = jax.jit(net.init)(jax.random.key(seed), x[:1])
    params = variables['params']
    # One F for all seeds.
    feedback = dynamics.uniform_feedback(
        jax.random.key(1000), rule.init(
            jax.random.key(0), net, variables, x[:1]))
    draw = np.random.default_rng(seed)
    found = [look(params, feedback, x, y)]
    for _ in range(_EPOCHS.value):
      order = draw.permutation(len(x))
      for i in range(len(x) // BATCH):
        chosen = order[i * BATCH:(i + 1) * BATCH]
        params = step(params, feedback, x[chosen], y[chosen])
      found.append(look(params, feedback, x, y))
    runs.append(found)
  over = lambda pick: np.array(
      [[float(pick(f)) for f in run] for run in runs]).mean(0).tolist()
  accuracy = over(lambda f: f[3])
  rows = []
  for i, name in enumerate(CONVS[1:], 1):
    entries = math.prod(
        jax.eval_shape(net.init, jax.random.key(0), x[:1])['params'][name][
            'kernel'].shape)
    sizes = [CHANNELS[j] * (_SIDE.value // math.prod(STRIDES[:j + 1]))**2
             for j in (i - 1, i)]
    rows.append({
        'layer': f'convolution {i + 1}', 'sizes': sizes, 'entries': entries,
        'estimate': (entries / math.prod(sizes))**.5,
        'bound': float(runs[0][0][0][name][1]),
        'wa': over(lambda f: f[0][name][0]),
        'ga': over(lambda f: f[2].layers[i]), 'accuracy': accuracy})
  rows.append({
      'layer': 'readout over convolutions', 'bound': 1.,
      'wa': over(lambda f: f[1]), 'ga': [1.] * len(accuracy),
      'accuracy': accuracy})
  return rows


def train_dense(x, y) -> list[dict]:
  """The same for four dense layers."""
  net, names = dynamics.mlp(4, 100, 10, 'relu')
  rule = bpjax.rules.direct_feedback_alignment()
  trainer = dynamics.Trainer(
      net, rule, LOSS, x, y, seeds=_SEEDS.value, rate=RATE, batch=BATCH)

  def look(params, feedback, x, y):
    wa = alignment.weight_alignment(*alignment.chain(params, feedback, names))
    ga = dynamics.gradient_alignment(
        net, LOSS, rule, names, params, feedback, x[:256], y[:256])
    accuracy = jnp.mean(jnp.argmax(net.apply({'params': params}, x), -1) == y)
    return wa.layers, ga.layers, accuracy

  found = []
  for epoch in range(_EPOCHS.value + 1):
    trainer.advance(epoch)
    found.append([a.mean(0) for a in trainer.measure(
        look, trainer.feedback, x, y)])
  return [{
      'layer': f'dense {l + 2}', 'bound': 1.,
      'wa': [float(f[0][l]) for f in found],
      'ga': [float(f[1][l + 1]) if l < 2 else 1. for f in found],
      'accuracy': [float(f[2]) for f in found]} for l in range(3)]


def measure() -> dict:
  """Rows of both networks."""
  (x, y), _ = dynamics.images(_DATASET.value, _EXAMPLES.value, _SIDE.value)
  return {
      'dataset': _DATASET.value, 'train_examples': _EXAMPLES.value,
      'seeds': _SEEDS.value, 'epochs': _EPOCHS.value,
      'convolutional': train_convolutions(x, y), 'dense': train_dense(x, y)}


def judge(record: dict) -> list[dynamics.Claim]:
  """The table, and what must hold."""
  table = measurement.table(
      f'{record["dataset"]}, {record["train_examples"]:,} examples, '
      f'{record["epochs"]} epochs, {record["seeds"]} seeds', 'layer', 'kernel '
      'entries', 'matrix', 'bound', 'root of entries / matrix', 'WA, peak',
      'WA, end', 'GA, end', 'train accuracy')
  for row in record['convolutional'] + record['dense']:
    table.add_row(
        row['layer'],
        *([f'{row["entries"]:,}', 'x'.join(map(str, row['sizes'][::-1])),
           f'{row["bound"]:.4f}', f'{row["estimate"]:.4f}']
          if 'entries' in row else [''] * 4),
        f'{max(row["wa"]):.4f}', f'{row["wa"][-1]:.4f}', f'{row["ga"][-1]:.3f}',
        f'{row["accuracy"][-1]:.3f}')
  measurement.show(table)
  claims = []
  hidden = min(max(r['wa']) for r in record['dense'][:2])
  for row in record['convolutional'][:-1]:
    largest = float(np.abs(row['wa']).max())
    claims += [
        dynamics.Claim(10, f'{row["layer"]}: largest |WA| over its bound',
                       largest / row['bound'], high=1.),
        dynamics.Claim(
            10, f'{row["layer"]}: bound over root of entries / matrix',
            row['bound'] / row['estimate'], .8, 1.25),
        dynamics.Claim(
            10, f'{row["layer"]}: largest |WA| over the least dense peak',
            largest / hidden, high=.1)]
  return claims


def draw(record: dict, path: str) -> None:
  """Weight alignment with its bounds, and gradient alignment."""
  figure, axes = plt.subplots(
      1, 2, figsize=(9, 3.8), layout='constrained')
  for style, rows in (('-', record['convolutional'][:-1]),
                      ('--', record['dense'])):
    for i, row in enumerate(rows):
      line, = axes[0].plot(
          np.abs(row['wa']), style, color=f'C{i}', label=row['layer'])
      if row['bound'] < 1:
        axes[0].axhline(row['bound'], color=line.get_color(), ls=':')
      if min(row['ga']) < 1:
        axes[1].plot(row['ga'], style, color=f'C{i}', label=row['layer'])
  axes[0].set(yscale='log', xlabel='epoch', ylabel='|weight alignment|',
              title='dotted: the most that any kernel can have')
  axes[1].set(xlabel='epoch', ylabel='gradient alignment')
  axes[0].legend(fontsize='small')
  for axis in axes:
    axis.grid(alpha=.25)
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_conv', measure, judge, draw)
