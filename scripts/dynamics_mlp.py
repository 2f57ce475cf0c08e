r"""Degeneracy breaking in deep networks: claims 6 and 7 of docs/dynamics.md.

  python scripts/dynamics_mlp.py [--output=...] [--read=results/dynamics_mlp.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428). Ten networks with initial weights of their own,
trained by direct feedback alignment with one F for all, and by backprop: four layers
of weights, 100 hidden neurons each, relu. As in the released code there are no
biases, images of 14 x 14, SGD of 1e-3 on summed cross-entropy in batches of 32, and
F is uniform in [-1, 1], divided by the root of the width where it projects. The
paper trains for 1,000 epochs on all images; here it is `--epochs` on
`--train_examples`.

Over training: the mean cosine of the flattened weights over all pairs of networks;
the weight alignment of each layer, cos(W_l, F_l F_{l-1}^T), and when it has its
maximum; gradient alignment of the hidden layers, side by side (GA) and without the
last (the released measure).

Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

from absl import flags
import bpjax
from bpjax.theory import alignment
import dynamics
from experiments import measurement
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

_DATASETS = flags.DEFINE_list('datasets', ['mnist', 'cifar10'], 'TFDS sets, or digits.')
_EXAMPLES = flags.DEFINE_integer('train_examples', 1000, 'Of each set.', 64)
_EPOCHS = flags.DEFINE_integer('epochs', 300, '1,000 in the paper.', 1)
_SEEDS = flags.DEFINE_integer('seeds', 10, 'Networks.', 2)
_SIDE = flags.DEFINE_integer('side', 14, 'Of the images.', 1)

LAYERS, WIDTH, RATE, BATCH = 4, 100, 1e-3, 32
LOSS = bpjax.losses.softmax_cross_entropy
RULES = {'dfa': bpjax.rules.direct_feedback_alignment,
         'bp': bpjax.rules.backprop}


def train(dataset: str, rule_name: str) -> dict:
  """The curves of all networks of a data set under a rule."""
  (x, y), (x_test, y_test) = dynamics.images(
      dataset, _EXAMPLES.value, _SIDE.value)
  net, names = dynamics.mlp(LAYERS, WIDTH, 10, 'relu')
  rule = RULES[rule_name]()
  trainer = dynamics.Trainer(
      net, rule, LOSS, x, y, seeds=_SEEDS.value, rate=RATE, batch=BATCH)

  def weights(params, feedback):
    matrices, feedback = alignment.chain(params, feedback, names)
    return alignment.weight_alignment(
        matrices, [f * WIDTH**.5 for f in feedback])

  def gradients(params, feedback, x, y):
    return dynamics.gradient_alignment(
        net, LOSS, rule, names, params, feedback, x, y)

  def error(params, x, y):
    output = net.apply({'params': params}, x)
    return jnp.mean(jnp.argmax(output, -1) != y)

  epochs = dynamics.log_spaced(_EPOCHS.value, 40)
  curves = {}
  for epoch in epochs:
    trainer.advance(epoch)
    found = {
        'similarity': float(alignment.similarity(trainer.params)),
        'train_error': trainer.measure(error, x, y).mean(),
        'test_error': trainer.measure(error, x_test, y_test).mean()}
    if trainer.feedback:
      wa = trainer.measure(weights, trainer.feedback)
      ga = trainer.measure(gradients, trainer.feedback, x[:256], y[:256])
      found |= {
          'wa': wa.layers.mean(0).tolist(), 'wa_total': wa.total.mean(),
          'ga': np.nanmean(ga.total), 'ga_lower': np.nanmean(ga.lower),
          'ga_layers': np.nanmean(ga.layers, axis=0).tolist(),
          'peaks': wa.layers.tolist()}
    for name, value in found.items():
      curves.setdefault(name, []).append(
          value if isinstance(value, list) else float(value))
  if 'peaks' in curves:  # [epochs, seeds, layers] -> the epoch for each seed.
    at = np.array(curves['peaks']).argmax(0)
    curves['peaks'] = np.array(epochs)[at].tolist()
  return {'dataset': dataset, 'rule': rule_name, 'epochs': epochs, **curves}


def measure() -> dict:
  """All data sets under both rules."""
  return {
      'train_examples': _EXAMPLES.value, 'seeds': _SEEDS.value,
      'runs': [train(d, r) for d in _DATASETS.value for r in RULES]}


def peak_epochs(run: dict) -> list[int]:
  """The epoch of each layer's largest mean weight alignment, from layer 2 up."""
  return [run['epochs'][i] for i in np.array(run['wa']).argmax(0)]


def judge(record: dict) -> list[dynamics.Claim]:
  """The table, and what must hold."""
  table = measurement.table(
      f'{record["seeds"]} networks, {record["train_examples"]:,} examples, '
      f'{record["runs"][0]["epochs"][-1]} epochs', 'data, rule',
      'cosine of weights', 'WA, peak of each layer', 'at epoch', 'WA, end',
      'GA', 'GA, lower', 'error, train / test')
  claims = []
  for run in record['runs']:
    dfa = run['rule'] == 'dfa'
    layers = np.array(run['wa']) if dfa else None
    table.add_row(
        f'{run["dataset"]}, {run["rule"]}', f'{run["similarity"][-1]:.3f}',
        *([' '.join(f'{v:.2f}' for v in layers.max(0)),
           ' '.join(map(str, peak_epochs(run))),
           ' '.join(f'{v:.2f}' for v in layers[-1]), f'{run["ga"][-1]:.2f}',
           f'{run["ga_lower"][-1]:.2f}'] if dfa else [''] * 5),
        f'{run["train_error"][-1]:.3f} / {run["test_error"][-1]:.3f}')
  measurement.show(table)
  of = {(r['dataset'], r['rule']): r for r in record['runs']}
  for dataset in dict.fromkeys(r['dataset'] for r in record['runs']):
    dfa, bp = of[dataset, 'dfa'], of[dataset, 'bp']
    peaks = peak_epochs(dfa)
    claims += [
        dynamics.Claim(6, f'{dataset}: mean cosine of weights, DFA',
                       dfa['similarity'][-1], .1),
        dynamics.Claim(6, f'{dataset}: the same, BP', bp['similarity'][-1],
                       -.02, .02),
        dynamics.Claim(6, f'{dataset}: total weight alignment, peak',
                       max(dfa['wa_total']), .2),
        # A peak at the end is none: the layers may all be rising still.
        dynamics.Claim(7, f'{dataset}: peak epoch of layer 2 over the last epoch',
                       peaks[0] / dfa['epochs'][-1], high=.999),
        dynamics.Claim(7, f'{dataset}: peak epoch of layer 3 over layer 2',
                       peaks[1] / max(peaks[0], 1), 1.001),
        dynamics.Claim(7, f'{dataset}: peak epoch of layer 4 over layer 3',
                       peaks[2] / max(peaks[1], 1), 1.001),
        dynamics.Claim(7, f'{dataset}: layer 2 falls after its peak',
                       dfa['wa'][-1][0] - np.max(dfa['wa'], axis=0)[0],
                       high=-.01)]
  return claims


def draw(record: dict, path: str) -> None:
  """Weight alignment, similarity and errors over epochs."""
  datasets = list(dict.fromkeys(r['dataset'] for r in record['runs']))
  figure, axes = plt.subplots(
      len(datasets), 3, figsize=(12, 3.3 * len(datasets)), squeeze=False,
      sharex=True, layout='constrained')
  for run in record['runs']:
    row = axes[datasets.index(run['dataset'])]
    epochs = run['epochs'][1:]
    color = {'dfa': 'C0', 'bp': 'C1'}[run['rule']]
    if run['rule'] == 'dfa':
      for i, curve in enumerate(np.array(run['wa'])[1:].T):
        row[0].semilogx(epochs, curve, color=f'C{i + 2}', label=f'layer {i + 2}')
        row[0].plot(epochs[curve.argmax()], curve.max(), 'o', color=f'C{i + 2}')
      row[0].semilogx(epochs, run['ga'][1:], 'k--', label='gradient alignment')
    row[1].semilogx(epochs, run['similarity'][1:], color=color,
                    label=run['rule'].upper())
    row[2].semilogx(epochs, run['train_error'][1:], color=color,
                    label=f'{run["rule"].upper()}, train')
    row[2].semilogx(epochs, run['test_error'][1:], ':', color=color,
                    label=f'{run["rule"].upper()}, test')
  for name, row in zip(datasets, axes):
    for axis, label in zip(row, (
        'weight alignment', 'mean cosine of weights', 'error')):
      axis.set_ylabel(label)
      axis.set_title(name, fontsize='medium')
      axis.grid(alpha=.25)
  for axis in axes[0]:
    axis.legend(fontsize='small')
  for axis in axes[-1]:
    axis.set_xlabel('epoch')
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_mlp', measure, judge, draw)
