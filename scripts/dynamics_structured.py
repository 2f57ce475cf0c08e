r"""Structure in the feedback of convolutions: claim 11 of docs/dynamics.md.

  python scripts/dynamics_structured.py [--output=...] \
      [--read=results/dynamics_structured.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428), name structured feedback as what could let
convolutions align. `direct_feedback_alignment(structure=...)` on the three
convolutions of `dynamics_conv.py` (3 x 3; 16, 32 and 32 channels; strides 1, 2,
2), with tanh and a readout that is a convolution of the size of the map, so that
every unit reads positions. For every structure: the bound, how much of F_l
F_{l-1}^T any convolution can hold (`bpjax.theory.convolution`); the weight
alignment that training reaches; the cosine of the teaching signals with backprop
(`bpjax.alignment`), a mean over the three convolutions; and test accuracy. The
rate of each row is chosen from --rates by the accuracy on validation examples,
with a seed that is not measured. Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

from absl import flags
import bpjax
from bpjax import projection
from bpjax.theory import convolution
import dynamics
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

_DATASET = flags.DEFINE_string('dataset', 'cifar10', 'A TFDS set, or digits.')
_EXAMPLES = flags.DEFINE_integer('train_examples', 4000, 'To train on.', 100)
_VALIDATION = flags.DEFINE_integer('validation', 2000, 'To choose with.', 1)
_EPOCHS = flags.DEFINE_integer('epochs', 10, 'Of training.', 1)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Networks a row.', 2)
_SIDE = flags.DEFINE_integer('side', 16, 'Of the images.', 4)
_RATES = flags.DEFINE_list('rates', ['.03', '.1', '.3'], 'Candidates, of SGD.')

CHANNELS, STRIDES, BATCH = (16, 32, 32), (1, 2, 2), 50
LOSS = bpjax.losses.softmax_cross_entropy
NAMES = [f'layers_{2 * i}' for i in range(len(CHANNELS) + 1)]
_DIRECT = bpjax.rules.direct_feedback_alignment
RULES = {
    'dense': _DIRECT(),
    'low rank, 2': _DIRECT(structure='low_rank', rank=2),
    'low rank, 5': _DIRECT(structure='low_rank', rank=5),
    'channel': _DIRECT(structure='channel'),
    'pyramid': _DIRECT(structure='pyramid'),
    'backprop': bpjax.rules.backprop()}
_SEARCH_SEED = 1000


def network():
  """Three convolutions and a readout that reads all positions."""
  top = _SIDE.value
  parts = []
  for channels, stride in zip(CHANNELS, STRIDES):
    parts += [nn.Conv(channels, (3, 3), (stride, stride)), nn.tanh]
    top = -(-top // stride)
  return bpjax.from_linen(nn.Sequential(
      [*parts, nn.Conv(10, (top, top), padding='VALID'),
       lambda x: x.reshape(len(x), -1)]))


def matrices(net, rule, variables, feedback, x) -> list[jax.Array]:
  """F of each convolution as maps, [10, height, width, channels]."""
  infos = rule.infos(net, variables, x)
  shapes = {name: projection.feedback_shape(infos[name]) for name in NAMES[1:]}
  return [projection.whole(s, feedback[name]) for name, s in shapes.items()]


def aligned(params, maps) -> list[list[float]]:
  """[cosine, bound] of the convolutions above the first."""
  return [
      [float(n) for n in convolution.target_alignment(
          params[name]['kernel'], up, down, strides=(stride, stride))]
      for name, down, up, stride in zip(NAMES[1:], maps, maps[1:], STRIDES[1:])]


def train(name, rate, seed, x, y):
  """(rule, network, params, feedback) after all epochs; a cosine to 0."""
  net, rule = network(), RULES[name]
  variables = jax.jit(net.init)(jax.random.key(seed), x[:BATCH])
  feedback = rule.init(jax.random.key(seed + 1), net, variables, x[:BATCH])
  learn = rule.value_and_grad(net, LOSS)

  # A step at a time: XLA's fast convolutions for CPUs do not exist in loops.
  @jax.jit
  def step(params, feedback, x, y, rate):
    _, (grads, _) = learn({'params': params}, feedback, x, y)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)

  params, draw = variables['params'], np.random.default_rng(seed)
  steps = len(x) // BATCH
  for epoch in range(_EPOCHS.value):
    order = draw.permutation(len(x))
    for i in range(steps):
      done = (epoch + i / steps) / _EPOCHS.value
      chosen = order[i * BATCH:(i + 1) * BATCH]
      params = step(params, feedback, x[chosen], y[chosen],
                    rate * .5 * (1 + np.cos(np.pi * done)))
  return net, rule, params, feedback


def accuracy(net, params, x, y) -> float:
  """In percent."""
  output = jax.jit(net.apply)({'params': params}, x)
  return 100 * float(jnp.mean(jnp.argmax(output, -1) == y))


def measure() -> dict:
  """A row a structure."""
  try:
    rates = [float(r) for r in _RATES.value]
  except ValueError:
    raise measurement.FlagError(
        f'`rates` must be numbers, such as --rates=.1,.3, got '
        f'{",".join(_RATES.value)!r}.') from None
  (x, y), test = dynamics.images(
      _DATASET.value, _EXAMPLES.value + _VALIDATION.value, _SIDE.value)
  held_out = x[_EXAMPLES.value:], y[_EXAMPLES.value:]
  x, y = x[:_EXAMPLES.value], y[:_EXAMPLES.value]
  rows = []
  for name in RULES:

    def judged(rate, name=name):
      net, _, params, _ = train(name, rate, _SEARCH_SEED, x, y)
      return accuracy(net, params, *held_out)

    validation = {rate: judged(rate) for rate in rates}
    rate = max(validation, key=validation.get)
    row = {'row': name, 'rate': rate, 'validation': list(validation.values()),
           'accuracy': [], 'teaching': [], 'wa': [], 'bound': []}
    for seed in range(_SEEDS.value):
      net, rule, params, feedback = train(name, rate, seed, x, y)
      row['accuracy'].append(accuracy(net, params, *test))
      if name == 'backprop':
        continue
      variables = {'params': params}
      found = jax.jit(bpjax.alignment(net, LOSS, rule))(
          variables, feedback, held_out[0][:500], held_out[1][:500])
      row['teaching'].append([float(found[n].teaching) for n in NAMES[:-1]])
      both = aligned(params, matrices(net, rule, variables, feedback, x[:BATCH]))
      row['wa'].append([wa for wa, _ in both])
      row['bound'].append([bound for _, bound in both])
    print(f'trained: {name}, rate {rate:g}, {np.mean(row["accuracy"]):.1f}%',
          flush=True)
    rows.append(row)
  return {'dataset': _DATASET.value, 'train_examples': len(x),
          'epochs': _EPOCHS.value, 'rates': rates, 'rows': rows}


def judge(record: dict) -> list[dynamics.Claim]:
  """The table, and what must hold."""
  seeds = len(record['rows'][0]['accuracy'])
  table = measurement.table(
      f'{record["dataset"]}, {record["train_examples"]:,} examples, '
      f'{record["epochs"]} epochs, {seeds} seeds', 'feedback', 'rate',
      'bound 2', 'bound 3', 'WA 2', 'WA 3', 'teaching 1', 'teaching 2',
      'teaching 3', 'test accuracy')
  for row in record['rows']:
    cells = [f'{n:.3f}' for kind in ('bound', 'wa', 'teaching')
             for n in (np.mean(row[kind], 0) if row[kind] else [])]
    error = np.std(row['accuracy'], ddof=1) / seeds**.5
    table.add_row(row['row'], f'{row["rate"]:g}', *(cells or [''] * 7),
                  f'{np.mean(row["accuracy"]):.1f} ({error:.1f})')
  measurement.show(table)
  rows = [row for row in record['rows'] if row['bound']]
  claims = [
      dynamics.Claim(
          11, f'{row["row"]}: largest |WA| over its bound',
          float(np.max(np.abs(row['wa']) / np.array(row['bound']))), high=1.)
      for row in rows]
  mean = lambda kind: [np.mean(row[kind]) for row in rows]
  for kind, text in (('wa', 'weight alignment'), ('teaching', 'teaching'),
                     ('accuracy', 'test accuracy')):
    rank = stats.spearmanr(mean('bound'), mean(kind))[0]
    claims.append(dynamics.Claim(
        11, f'rank correlation of the bound with {text}, {len(rows)} structures',
        float(rank), low=.5))
  return claims


def draw(record: dict, path: str) -> None:
  """Alignment and accuracy against the bound."""
  figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout='constrained')
  for row in record['rows']:
    if not row['bound']:
      axes[2].axhline(np.mean(row['accuracy']), color='.5', ls=':',
                      label=row['row'])
      continue
    for axis, kind in zip(axes, ('wa', 'teaching', 'accuracy')):
      values = [np.mean(v) for v in row[kind]]
      axis.errorbar(np.mean(row['bound']), np.mean(values),
                    np.std(values, ddof=1) / len(values)**.5, fmt='o',
                    capsize=3, label=row['row'])
  for axis, label in zip(axes, (
      'weight alignment', "teaching, cosine to backprop's", 'test accuracy, %')):
    axis.set(xscale='log', xlabel='bound, mean of two convolutions', ylabel=label)
    axis.grid(alpha=.25)
  axes[2].legend(fontsize='small')
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_structured', measure, judge, draw)
