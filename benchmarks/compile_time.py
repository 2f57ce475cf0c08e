"""What it takes before the first step: tracing, compiling, drawing feedback.

  python benchmarks/compile_time.py [--rounds=3] [--output=FILE.json]

`encoder` has 12 layers (width 256, 4 heads, 64 tokens, batch 16); `jitted` calls
one jitted Dense layer 24 times, each with weights of its own. `grad` is
`jax.value_and_grad` of the model, without this library. Everything is made anew,
with empty caches, in every round; medians, in seconds, on one core. A ratio is
(tracing + lowering + compiling) to that of `grad` in the same round; `init` is
drawing the feedback, compiled and run, in a network that has been traced.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import statistics
import time

from absl import flags
from absl import logging
import bpjax
import encoder
from experiments import measurement
import jax
import jax.numpy as jnp

# Before jax starts its threads.
import timing

_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_LOSS = bpjax.losses.softmax_cross_entropy
_RULES = ('backprop', 'feedback_alignment', 'direct_feedback_alignment')


@jax.jit
def _layer(params, x):
  return jnp.tanh(x @ params['w'] + params['b'])


def _jitted(params, x, train=False):
  del train
  for name in sorted(params['layers']):
    x = _layer(params['layers'][name], x)
  return x @ params['out']


def workload(name):
  """(apply, network maker, variables, x, y)."""
  if name == 'encoder':
    model = encoder.Encoder(layers=12)
    x = jnp.ones((16, 64), int)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = lambda params, x: model.apply({'params': params}, x)
    return (apply, lambda: bpjax.from_linen(model), variables, x,
            jnp.zeros(16, int))
  layers = {f'layer_{i:02}': {'w': jnp.eye(64), 'b': jnp.zeros(64)}
            for i in range(24)}
  params = {'layers': layers, 'out': jnp.ones((64, 10))}
  return (_jitted, lambda: bpjax.from_function(_jitted), {'params': params},
          jnp.ones((16, 64)), jnp.zeros(16, int))


def stages(function, *args):
  """Seconds of tracing, of lowering and of compiling."""
  times = [time.perf_counter()]
  traced = jax.jit(function).trace(*args)
  times.append(time.perf_counter())
  lowered = traced.lower()
  times.append(time.perf_counter())
  lowered.compile()
  times.append(time.perf_counter())
  return [b - a for a, b in zip(times, times[1:])]


def one_round(name):
  """Row -> trace, lower, compile, init."""
  apply, make, variables, x, y = workload(name)
  jax.clear_caches()
  plain = jax.value_and_grad(lambda p: _LOSS(apply(p, x), y).mean())
  result = {'grad': [*stages(plain, variables['params']), 0.]}
  for kind in _RULES:
    rule, net = bpjax.rules.get(kind)(), make()
    net.survey(variables, x)
    jax.clear_caches()
    begin = time.perf_counter()
    feedback = jax.block_until_ready(
        rule.init(jax.random.key(1), net, variables, x))
    init = time.perf_counter() - begin
    jax.clear_caches()
    learn = rule.value_and_grad(make(), _LOSS)  # A network not yet traced.
    result[kind] = [*stages(learn, variables, feedback, x, y), init]
  return result


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  results = {}
  for name in ('encoder', 'jitted'):
    rounds = [one_round(name) for _ in range(_ROUNDS.value)]
    results[name] = {}
    for row in rounds[0]:
      parts = [statistics.median(r[row][i] for r in rounds) for i in range(4)]
      ratio = statistics.median(
          sum(r[row][:3]) / sum(r['grad'][:3]) for r in rounds)
      results[name][row] = dict(
          zip(('trace', 'lower', 'compile', 'init'), parts), ratio=ratio)
      print(f'{name:8} {row:26} trace {parts[0]:.2f}  lower {parts[1]:.2f}  '
            f'compile {parts[2]:.2f}  ratio {ratio:.2f}  init {parts[3]:.2f}')
  if _OUTPUT.value:
    timing.write(_OUTPUT.value, 'compile_time.py', _ROUNDS.value, results)


if __name__ == '__main__':
  measurement.run(main)
