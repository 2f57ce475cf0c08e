r"""Deep linear networks: claims 4 and 5 of docs/dynamics.md.

  python scripts/dynamics_linear.py [--output=...] [--read=results/dynamics_linear.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428). Linear networks under direct feedback alignment
from zero weights, one Gaussian input a step, y = M x, in float64:

  4. the recursion of the alignment matrices A_l (`bpjax.theory.linear`) against
     training with whole weights, for 1 and 10 outputs and 3 and 5 layers;
  5. one output: W_l is along F_l F_{l-1}^T, and the teaching signals of each layer
     along its gradient. Ten outputs: singular values of M from balanced to a ratio of 100;
     weight alignment against the condition number of A_l, and against its value
     for wide layers, tr A / (sqrt(C) |A|). With A_l = 1 set by hand, the gradient
     alignment over the width, and for F with orthonormal columns.

Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

from absl import flags
from bpjax.theory import alignment
from bpjax.theory import linear
import dynamics
from experiments import measurement
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

jax.config.update('jax_enable_x64', True)

_WIDTH = flags.DEFINE_integer('width', 1000, 'Of hidden layers, claim 5.', 20)
_STEPS = flags.DEFINE_integer('steps', 5000, 'Examples of a run.', 10)

INPUTS, RATE = 20, .003
RATIOS = (1, 2, 5, 10, 20, 50, 100)


def draw_run(seed, layers, width, outputs, ratio=1., orthonormal=False):
  """x, y and F_1 to F_{L-1}, of columns of length about 1."""
  draw = np.random.default_rng(seed)
  columns = [draw.standard_normal((width, outputs)) for _ in range(layers - 1)]
  feedback = [np.linalg.qr(f)[0] if orthonormal else f / width**.5
              for f in columns]
  x = draw.standard_normal((_STEPS.value, INPUTS))
  left, right = (np.linalg.qr(draw.standard_normal((n, outputs)))[0]
                 for n in (outputs, INPUTS))
  teacher = left @ np.diag(np.geomspace(1, 1 / ratio, outputs)) @ right.T
  return jnp.array(x), jnp.array(x @ teacher.T), list(map(jnp.array, feedback))


def gradients(weights, feedback, errors) -> alignment.GradientAlignment:
  """The gradient alignment of the hidden layers, for errors [batch, C]."""
  exact, teaching = [], errors
  for w in weights[:0:-1]:
    teaching = teaching @ w
    exact.insert(0, teaching)
  return alignment.gradient_alignment(
      [errors @ f.T for f in feedback], exact)


def some_errors(outputs):
  """Errors to measure gradient alignment with."""
  return jnp.array(np.random.default_rng(9).standard_normal((100, outputs)))


def recursion() -> list[dict]:
  """Claim 4: the largest difference of weights, over the largest weight."""
  rows = []
  for outputs in (1, 10):
    for layers in (3, 5):
      x, y, feedback = draw_run(outputs, layers, 50, outputs)
      matrices = jax.jit(linear.alignment_matrices)(x, y, feedback, RATE)
      last = linear.weights([a[-1] for a in matrices], feedback)
      trained = jax.jit(linear.train)(x, y, feedback, RATE)
      rows.append({
          'outputs': outputs, 'layers': layers,
          'difference': max(float(abs(a - b).max() / abs(b).max())
                            for a, b in zip(last, trained)),
          'weight_alignment': alignment.weight_alignment(
              trained, feedback).layers.tolist(),
          'gradient_alignment': gradients(
              trained, feedback, some_errors(outputs)).layers.tolist()})
  return rows


def conditioning() -> list[dict]:
  """Claim 5: alignment of the layers above the first, four layers, C = 10."""
  rows = []
  for ratio in RATIOS:
    for seed in range(3):
      x, y, feedback = draw_run(seed, 4, _WIDTH.value, 10, ratio)
      matrices = [a[-1] for a in jax.jit(linear.alignment_matrices)(
          x, y, feedback, RATE)]
      weights = linear.weights(matrices, feedback)
      found = alignment.weight_alignment(weights, feedback).layers
      rows.append({
          'ratio': ratio, 'seed': seed,
          'condition': [float(linear.condition_number(a))
                        for a in matrices[1:]],
          'predicted': [float(linear.predicted_alignment(a))
                        for a in matrices[1:]],
          'weight_alignment': found.tolist(),
          'gradient_alignment': float(gradients(
              weights, feedback, some_errors(10)).total)})
  return rows


def strong() -> list[dict]:
  """Gradient alignment with A_l = 1 for every layer, over the width."""
  rows = []
  for width, orthonormal in (
      (30, False), (100, False), (300, False), (1000, False), (30, True)):
    _, _, feedback = draw_run(3, 4, width, 10, orthonormal=orthonormal)
    weights = linear.weights(
        [jnp.ones((10, INPUTS)), *[jnp.eye(10)] * 3], feedback)
    rows.append({
        'width': width, 'orthonormal': orthonormal,
        'gradient_alignment': float(
            gradients(weights, feedback, some_errors(10)).total)})
  return rows


def measure() -> dict:
  """All of it."""
  return {'width': _WIDTH.value, 'steps': _STEPS.value,
          'recursion': recursion(), 'conditioning': conditioning(),
          'strong': strong()}


def judge(record: dict) -> list[dynamics.Claim]:
  """Tables, and what must hold."""
  claims = []
  for row in record['recursion']:
    name = f'C = {row["outputs"]}, {row["layers"]} layers'
    claims.append(dynamics.Claim(
        4, f'{name}: recursion against weights, largest relative difference',
        row['difference'], high=1e-12))
    if row['outputs'] == 1:
      # Signs of A_l are those of the teacher: |cosine| is what is 1.
      claims += [
          dynamics.Claim(5, f'{name}: 1 - |weight alignment|, largest', 1 - float(
              np.abs(row['weight_alignment']).min()), high=1e-9),
          dynamics.Claim(5, f'{name}: 1 - gradient alignment, least layer',
                         1 - min(row['gradient_alignment']), high=1e-9)]
  table = measurement.table(
      f'Ten outputs, four layers of {record["width"]}, means of three seeds',
      "ratio of M's singular values", 'cond A_2', 'A_3', 'A_4', 'WA 2', '3',
      '4', 'predicted 2', '3', '4', 'GA')
  rows = record['conditioning']
  for ratio in dict.fromkeys(r['ratio'] for r in rows):
    mean = lambda k: np.mean([r[k] for r in rows if r['ratio'] == ratio], axis=0)
    table.add_row(
        f'{ratio:g}', *(f'{v:.1f}' for v in mean('condition')),
        *(f'{v:.3f}' for v in mean('weight_alignment')),
        *(f'{v:.3f}' for v in mean('predicted')),
        f'{mean("gradient_alignment"):.3f}')
  measurement.show(table)
  flat = lambda k: np.ravel([r[k] for r in rows])
  ranks = lambda v: v.argsort().argsort()
  claims += [
      dynamics.Claim(
          5, 'rank correlation of weight alignment and cond(A), C = 10',
          float(np.corrcoef(ranks(flat('condition')),
                            ranks(flat('weight_alignment')))[0, 1]),
          high=-.8),
      dynamics.Claim(
          5, 'largest |weight alignment - tr A / (sqrt(C) |A|)|', float(np.abs(
              flat('weight_alignment') - flat('predicted')).max()), high=.02),
      *(dynamics.Claim(
          5, 'A_l = 1, orthonormal F: gradient alignment',
          r['gradient_alignment'], 1 - 1e-9)
        for r in record['strong'] if r['orthonormal']),
      *(dynamics.Claim(
          5, f'A_l = 1, random F, width {r["width"]}: gradient alignment',
          r['gradient_alignment'], .95)
        for r in record['strong'] if r['width'] == 1000)]
  print('gradient alignment with A_l = 1: ' + ', '.join(
      f'width {r["width"]}{" orthonormal" if r["orthonormal"] else ""} '
      f'{r["gradient_alignment"]:.3f}' for r in record['strong']))
  return claims


def draw(record: dict, path: str) -> None:
  """Weight alignment over the condition number, and over the prediction."""
  figure, axes = plt.subplots(
      1, 3, figsize=(12, 3.6), layout='constrained')
  rows = record['conditioning']
  for layer in range(3):
    of = lambda k: [r[k][layer] for r in rows]
    axes[0].semilogx(of('condition'), of('weight_alignment'), 'o', ms=4,
                     label=f'layer {layer + 2}')
    axes[1].plot(of('predicted'), of('weight_alignment'), 'o', ms=4)
  axes[1].plot([0, 1], [0, 1], color='0.6', lw=.8)
  axes[2].semilogx([r['ratio'] for r in rows],
                   [r['gradient_alignment'] for r in rows], 'o', ms=4)
  for axis, x, y in zip(axes, (
      r'condition number of $A_l$', r'tr A / ($\sqrt{C}$ |A|)',
      "ratio of the teacher's singular values"), (
          'weight alignment', 'weight alignment', 'gradient alignment')):
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=.25)
  axes[0].legend()
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_linear', measure, judge, draw)
