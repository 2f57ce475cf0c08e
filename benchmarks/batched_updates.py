"""Whether the updates of equal layers are faster as one batched product.

  python benchmarks/batched_updates.py [--output=FILE.json]

A step of direct feedback alignment and SGD on a tanh MLP of equal layers in float32, in
plain JAX. The forward pass goes layer by layer always. Of the updates:

  in turn    layer by layer, a projected error, a product for the weights and a sum for
             the biases each
  weights    the errors layer by layer; activations and errors are stacked for one batched
             product for all weights, which are arrays of their own, as in models
  batched    one projection of the error and one sum for all biases besides
  stacked    the same with the weights of all layers in one array, for which a model
             would have to be written

On one core, in turns in one process. A ratio is the median over rounds of the
processor's time over that of `in turn` in the same round, with its quartiles.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import itertools
import statistics
import time

from absl import flags
from experiments import measurement
import jax
import jax.numpy as jnp

# Before jax starts its threads.
import timing

_ROUNDS = flags.DEFINE_integer('rounds', 40, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_LAYERS = flags.DEFINE_list('layers', ['8', '16', '32'], 'Numbers of layers.')
_WIDTHS = flags.DEFINE_list('widths', ['64', '128', '256', '512'], 'Widths.')
_BATCHES = flags.DEFINE_list('batches', ['32', '128', '256'], 'Batch sizes.')
_CLASSES, _RATE = 10, .01


def _carry(layers, width, batch):
  keys = jax.random.split(jax.random.key(0), 4)
  return {
      'w': jax.random.normal(keys[0], (layers, width, width)) / width**.5,
      'b': jnp.zeros((layers, width)),
      'readout': jax.random.normal(keys[1], (width, _CLASSES)) / width**.5,
      'feedback': jax.random.normal(keys[2], (layers, _CLASSES, width)),
      'x': jax.random.normal(keys[3], (batch, width))}


def _forward(w, b, x):
  """The inputs of every layer, and the output of the last."""
  inputs = [x]
  for own, bias in zip(w, b):
    inputs.append(jnp.tanh(inputs[-1] @ own + bias))
  return inputs


def _error(carry, h):
  y = jnp.arange(len(h)) % _CLASSES
  return (jax.nn.softmax(h @ carry['readout']) - jax.nn.one_hot(
      y, _CLASSES)) / len(h)


def in_turn(carry, inputs, error):
  """Weights and biases after a step, layer by layer."""
  w, b = [], []
  for i, (own, bias) in enumerate(zip(carry['w'], carry['b'])):
    delta = (error @ carry['feedback'][i]) * (1 - inputs[i + 1]**2)
    w.append(own - _RATE * inputs[i].T @ delta)
    b.append(bias - _RATE * delta.sum(0))
  return w, b


def weights(carry, inputs, error):
  """The same, with one product for the weights of all layers."""
  deltas = [(error @ own) * (1 - h**2)
            for own, h in zip(carry['feedback'], inputs[1:])]
  grads = jnp.einsum('lni,lno->lio', jnp.stack(inputs[:-1]), jnp.stack(deltas))
  move = lambda a, g: a - _RATE * g
  return (list(map(move, carry['w'], grads)),
          list(map(move, carry['b'], [d.sum(0) for d in deltas])))


def batched(carry, inputs, error):
  """The same, of all layers together."""
  h = jnp.stack(inputs)
  delta = jnp.einsum('nc,lcw->lnw', error, carry['feedback']) * (1 - h[1:]**2)
  grads = jnp.einsum('lni,lno->lio', h[:-1], delta), delta.sum(1)
  held = carry['w'], carry['b']
  if isinstance(held[0], list):
    grads = jax.tree.map(list, grads)
  return jax.tree.map(lambda a, g: a - _RATE * g, held, grads)


def steps(layers: int, width: int, batch: int) -> dict:
  """Name -> what makes a step."""
  held = _carry(layers, width, batch)
  apart = held | {k: list(held[k]) for k in ('w', 'b')}

  def make(update, held):
    def step(held):
      inputs = _forward(held['w'], held['b'], held['x'])
      error = _error(held, inputs[-1])
      w, b = update(held, inputs, error)
      readout = held['readout'] - _RATE * inputs[-1].T @ error
      return {**held, 'w': w, 'b': b, 'readout': readout}, error.sum()

    return lambda: timing.Compiled(step, held)

  return {'in turn': make(in_turn, apart), 'weights': make(weights, apart),
          'batched': make(batched, apart),
          'stacked': make(batched, held)}


def ratios(made: dict, rounds: int) -> dict:
  """Of each: median milliseconds, and quartiles of its ratio to the first."""
  running = {name: make() for name, make in made.items()}
  first, *others = running
  begin = time.perf_counter()
  running[first].advance(3)
  each = max(1, int(.02 / ((time.perf_counter() - begin) / 3)))
  times = {name: [] for name in running}
  for i in range(rounds):
    for name in list(running)[::1 if i % 2 else -1]:
      begin = time.process_time()
      running[name].advance(each)
      times[name].append((time.process_time() - begin) / each)
  row = {f'{n}_milliseconds': 1e3 * statistics.median(t)
         for n, t in times.items()}
  for name in others:
    low, middle, high = statistics.quantiles(
        [b / a for a, b in zip(times[first], times[name])], n=4)
    row |= {name: middle, f'{name}_low': low, f'{name}_high': high}
  return row


def main(argv: list[str]) -> None:
  rows = []
  table = measurement.table(
      f'processor time over that in turn, on {measurement.machine()}',
      'layers', 'width', 'batch', 'weights', 'quartiles', 'batched',
      'quartiles', 'stacked', 'quartiles')
  sizes = [list(map(int, f.value)) for f in (_LAYERS, _WIDTHS, _BATCHES)]
  for size in itertools.product(*sizes):
    row = dict(zip(('layers', 'width', 'batch'), size))
    row |= ratios(steps(*size), _ROUNDS.value)
    rows.append(row)
    print(row, flush=True)
    table.add_row(*map(str, size), *(
        text for n in ('weights', 'batched', 'stacked') for text in (
            f'{row[n]:.2f}', f'{row[f"{n}_low"]:.2f} to {row[f"{n}_high"]:.2f}')))
  measurement.show(table)
  if _OUTPUT.value:
    timing.write(
        _OUTPUT.value, 'batched_updates.py', _ROUNDS.value, {'mlp': rows})


if __name__ == '__main__':
  measurement.run(main)
