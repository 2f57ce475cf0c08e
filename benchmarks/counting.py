"""What the benchmarks of several devices share: collectives, and a schedule."""

from __future__ import annotations

import collections
import re

import flax.linen as nn

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
         'collective-permute')
_SIZES = {'f64': 8, 'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1}


class Block(nn.Module):
  layers: int
  width: int

  @nn.compact
  def __call__(self, x):
    for _ in range(self.layers):
      x = nn.tanh(nn.Dense(self.width)(x))
    return x


class Chain(nn.Module):
  """A first layer, blocks and a readout."""
  blocks: int
  width: int
  classes: int
  layers: int = 1

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(self.width)(x))
    for i in range(self.blocks):
      x = Block(self.layers, self.width, name=f'block_{i}')(x)
    return nn.Dense(self.classes)(x)


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Kind -> number of collectives in a compiled program, and their bytes."""
  found = collections.defaultdict(lambda: (0, 0))
  for line in text.splitlines():
    match = re.search(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(', line)
    if match is None:
      continue
    size = 0
    for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
      entries = 1
      for n in filter(None, shape.split(',')):
        entries *= int(n)
      size += entries * _SIZES[kind]
    number, total = found[match[2]]
    found[match[2]] = number + 1, total + size
  return dict(found)


def simulate(kind: str, stages: int, count: int, forward: float,
             back: float) -> float:
  """The time at which the last stage is done.

  A stage does one thing at a time, messages take no time.

  Args:
    kind: 'backprop' (GPipe), 'direct' (an error for all), 'local', or 'stream'
      (local losses, and each microbatch is learned from before the next).
    stages: S.
    count: M, the number of microbatches.
    forward: of a microbatch through a stage.
    back: the same of its backward pass.

  Returns:
    The time, in the unit of `forward`.
  """
  done = [[0.] * count for _ in range(stages)]
  free = [0.] * stages
  for m in range(count):
    for s in range(stages):
      ready = max(free[s], done[s - 1][m] if s else 0.)
      free[s] = done[s][m] = ready + forward
      free[s] += back if kind == 'stream' else 0.
  if kind == 'stream':
    return max(free)
  if kind != 'backprop':
    known = max(done[-1]) if kind == 'direct' else 0.
    return max(max(own, known) + count * back for own in free)
  for m in range(count):
    ready = 0.
    for s in reversed(range(stages)):
      free[s] = ready = max(free[s], ready) + back
  return max(free)
