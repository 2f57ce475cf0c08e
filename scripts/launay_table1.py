"""The memory of direct feedback on VGG-16: Table 1 of Launay et al., 2019.

  python scripts/launay_table1.py

Principled training of neural networks with direct feedback alignment, Launay,
Poli and Krzakala, 2019 (https://arxiv.org/abs/1906.04554). The feedback of a
layer projects the error of e = 1,000 classes, in float32. Independent matrices
cost e * 4 bytes for every entry of every layer; one shared matrix, of which all
layers read slices, costs that for the largest layer alone. Sparse ones, in which
a neuron reads one entry of the error, cost 6 bytes in place of e * 4: a value and
where it stands. There are two ways of counting a layer's entries, and both are printed:

  paper   the output of each of the 15 hidden layers, before any pooling;
  here    what this program holds: the feedback enters at the next unit's
          input, which is after the pooling, so five of the convolutions need a
          quarter.

The shapes are those of `bpjax.models.vgg16` at 224x224, from `jax.eval_shape`:
nothing of that size is allocated. The bytes of the second count are those of
the rule's own feedback (`rule.init`), and the same arithmetic is checked on
`bpjax.models.launay_cnn` by allocating it.

The published numbers are whole gigabytes (1e9 bytes), 55 and 13. Exits with 1
if the paper's count is further from them than --tolerance, or if any feedback
has other bytes than predicted.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

from absl import flags
import bpjax
from experiments import measurement
import jax
import jax.numpy as jnp
import rich.console
import rich.table

_TOLERANCE = flags.DEFINE_float(
    'tolerance', .02,
    'Largest relative difference from the published numbers.', lower_bound=0.)

PUBLISHED = {'independent': 55e9, 'shared': 13e9}
# Arguments of the rule, for each way to keep the feedback.
KINDS = {
    'independent': {}, 'shared': {'shared': True},
    'independent, sparse': {'connections': 1},
    'shared, sparse': {'shared': True, 'connections': 1},
}
_BYTES = 4  # Of a float32.
_ENTRY_BYTES = 2  # Of the index of an entry of the error.


class Layer(NamedTuple):
  """The sizes of one hidden layer, in entries for one example.

  Attributes:
    name: of its unit.
    output: its output, before any pooling.
    read: what the next unit reads of it.
  """
  name: str
  output: int
  read: int


def trace(model, image):
  """The network, its variables and its input, as shapes: nothing is allocated.

  Args:
    model: a chain of units, one reading the other.
    image: `(height, width, channels)`.

  Returns:
    The network, and the shapes of its variables and of its input.
  """
  net = bpjax.from_linen(model)
  x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
  return net, jax.eval_shape(net.init, jax.random.key(0), x), x


def hidden_layers(net) -> list[Layer]:
  """The hidden layers of a chain of units, in the order of the calls."""
  units = list(net.units.infos.values())
  return [
      Layer(unit.name, math.prod(unit.out.shape[1:]),
            math.prod(reader.inputs[0].shape[1:]))
      for unit, reader in zip(units, units[1:])]


def predicted_bytes(
    sizes: list[int], errors: int, shared: bool = False, connections: int = 0
) -> int:
  """The bytes of feedback for layers of these sizes.

  Args:
    sizes: entries of each layer.
    errors: entries of the error, e.
    shared: whether all layers read one matrix.
    connections: how many entries of the error a neuron reads; 0: all.

  Example:
    >>> predicted_bytes([3, 2], 10, shared=True)
    120
  """
  neurons = max(sizes) if shared else sum(sizes)
  if connections:
    return neurons * connections * (_BYTES + _ENTRY_BYTES)
  return neurons * errors * _BYTES


def feedback_bytes(net, variables, x, kind: str, allocate: bool) -> int:
  """The bytes of the rule's own feedback, allocated or as shapes."""
  rule = bpjax.rules.direct_feedback_alignment(**KINDS[kind])

  def init(key, variables, x):
    return rule.init(key, net, variables, x)

  make = init if allocate else lambda *args: jax.eval_shape(init, *args)
  feedback = make(jax.random.key(1), variables, x)
  return sum(leaf.size * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(feedback))


def check_small() -> list[str]:
  """Allocates the feedback of a small network; returns what is wrong."""
  wrong = []
  net, shapes, x = trace(bpjax.models.launay_cnn(10), (32, 32, 3))
  sizes = [layer.read for layer in hidden_layers(net)]
  variables, x = jax.tree.map(
      lambda a: jnp.zeros(a.shape, a.dtype), (shapes, x))
  for kind, arguments in KINDS.items():
    predicted = predicted_bytes(sizes, 10, **arguments)
    held = feedback_bytes(net, variables, x, kind, allocate=True)
    print(f'launay_cnn, {kind}: {held:,} bytes allocated, '
          f'{predicted:,} predicted')
    if held != predicted:
      wrong.append(
          f'launay_cnn, {kind}: {held:,} bytes in place of {predicted:,}')
  return wrong


def print_layers(layers: list[Layer], console: rich.console.Console) -> None:
  """One row for each hidden layer: its entries by both counts."""
  table = rich.table.Table(
      'layer', _right('output (paper)'), _right("next unit's input (here)"),
      title='VGG-16 at 224x224: entries of the hidden layers')
  for layer in layers:
    table.add_row(layer.name, f'{layer.output:,}', f'{layer.read:,}')
  table.add_row(
      'sum', *(f'{sum(sizes):,}' for sizes in list(zip(*layers))[1:]),
      style='bold')
  console.print(table)


def check_vgg16(tolerance: float, console: rich.console.Console) -> list[str]:
  """Prints the table of VGG-16; returns what is wrong."""
  wrong = []
  net, variables, x = trace(bpjax.models.vgg16(1000), (224, 224, 3))
  layers = hidden_layers(net)
  print_layers(layers, console)
  table = rich.table.Table(
      'feedback', _right('paper'), _right("paper's count, ours"),
      _right('difference'), _right('held by this program'),
      title='Table 1: feedback of VGG-16, 1,000 classes, float32')
  for kind, arguments in KINDS.items():
    published = PUBLISHED.get(kind)
    counted = predicted_bytes([a.output for a in layers], 1000, **arguments)
    held = feedback_bytes(net, variables, x, kind, allocate=False)
    predicted = predicted_bytes([a.read for a in layers], 1000, **arguments)
    difference = counted / published - 1 if published else 0.
    table.add_row(
        kind, f'{published / 1e9:.0f} GB' if published else '-', _size(counted),
        f'{100 * difference:+.1f}%' if published else '-', _size(held))
    if abs(difference) > tolerance:
      wrong.append(
          f'{kind}: {counted / 1e9:.2f} GB by the paper\'s count, which is '
          f'{100 * abs(difference):.1f}% from its {published / 1e9:.0f} GB')
    if held != predicted:
      wrong.append(f'{kind}: {held:,} bytes in place of {predicted:,}')
  console.print(table)
  return wrong


def _size(count):
  return f'{count / 1e9:.2f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'


def _right(header):
  return rich.table.Column(header, justify='right')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    print(f'error: unknown argument {argv[1]!r}; see --help', file=sys.stderr)
    sys.exit(2)
  # Shapes and a few kilobytes: no accelerator needs to be woken for them.
  jax.config.update('jax_platforms', 'cpu')
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=100)
  wrong = check_vgg16(_TOLERANCE.value, console) + check_small()
  for line in wrong:
    print(f'outside: {line}', file=sys.stderr)
  if wrong:
    sys.exit(1)
  print(f'within {100 * _TOLERANCE.value:g}% of the published numbers')


if __name__ == '__main__':
  measurement.run(main)
