"""When each stage of a pipeline would be done, from measured times of one block.

  python benchmarks/schedule.py [--output=FILE.json]

Measured on this machine: F, the forward pass of a block (4 dense layers of width
512, a microbatch of 128), and what its backward pass takes under backprop, under
direct feedback with a projection at every layer (nothing is sent on) and
with a local loss. Then simulated, stage by stage and microbatch by microbatch, for
2 to 64 stages: a stage does one thing at a time, messages take no time.
"""

from __future__ import annotations

import json
import sys

from absl import flags
import bpjax
import counting
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import rich.console
import rich.table

# Before jax starts its threads.
import timing

_ROUNDS = flags.DEFINE_integer('rounds', 40, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_LAYERS, _WIDTH, _BATCH, _CLASSES = 4, 512, 128, 10


class Stack(nn.Module):
  """The layers of a block; a readout makes them a model."""

  @nn.compact
  def __call__(self, x):
    for _ in range(_LAYERS):
      x = nn.tanh(nn.Dense(_WIDTH)(x))
    return nn.Dense(_CLASSES)(x)


def measured() -> dict[str, float]:
  """Milliseconds: 'forward', and backward passes as whole steps without it."""
  net = bpjax.from_linen(Stack())
  x = jax.random.normal(jax.random.key(0), (_BATCH, _WIDTH))
  y = jnp.arange(_BATCH) % _CLASSES
  variables = net.init(jax.random.key(1), x)

  def forward(carry):
    variables, x = carry
    return (variables, x + 1e-6 * net.apply(variables, x).mean()), 0.

  steps = {'forward': lambda: timing.Compiled(forward, (variables, x))}
  for label, rule in (
      ('backprop', bpjax.rules.backprop()),
      ('direct', bpjax.rules.direct_feedback_alignment())):
    feedback = rule.init(jax.random.key(2), net, variables, x)
    learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)

    def step(carry, learn=learn):
      variables, feedback, x = carry
      _, (grads, _) = learn(variables, feedback, x, y)
      move = lambda p, g: p - 1e-3 * g
      params = jax.tree.map(move, variables['params'], grads)
      return ({'params': params}, feedback, x), 0.

    steps[label] = lambda step=step, feedback=feedback: timing.Compiled(
        step, (variables, feedback, x))
  rows = timing.measure(steps, _ROUNDS.value, lambda name, step: 'forward')
  times = {row['rule']: row['milliseconds'] for row in rows}
  return {'forward': times['forward'],
          **{k: times[k] - times['forward'] for k in ('backprop', 'direct')}}


def main(argv: list[str]) -> None:
  times = measured()
  unit = times['forward']
  ratios = {k: times[k] / unit for k in ('backprop', 'direct')}
  # A local loss goes back through its own block as backprop does.
  kinds = {'backprop': ratios['backprop'], 'direct': ratios['direct'],
           'local': ratios['backprop']}
  print(f'F = {unit:.2f} ms; backward passes: backprop '
        f'{ratios["backprop"]:.2f} F, direct {ratios["direct"]:.2f} F '
        f'({timing.measurement.machine()})')
  table = rich.table.Table(
      'stages', 'microbatches', *kinds, 'direct / backprop', 'by formula')
  rows = []
  for stages in (2, 4, 8, 16, 32, 64):
    for count in (1, stages, 4 * stages):
      ends = {k: counting.simulate(k, stages, count, 1., b) for k, b in kinds.items()}
      ratio = ends['direct'] / ends['backprop']
      formula = (2 * count + stages - 1) / (3 * (count + stages - 1))
      rows.append({'stages': stages, 'microbatches': count, **ends,
                   'ratio': ratio, 'formula': formula})
      table.add_row(
          str(stages), str(count), *(f'{e:.1f} F' for e in ends.values()),
          f'{ratio:.3f}', f'{formula:.3f}')
  rich.console.Console(width=100).print(table)
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
      json.dump({'command': ' '.join(['python benchmarks/schedule.py', *sys.argv[1:]]),
                 'machine': timing.measurement.machine(), 'milliseconds': times,
                 'backward_in_forward': ratios, 'rows': rows}, file, indent=1)


if __name__ == '__main__':
  measurement.run(main)
