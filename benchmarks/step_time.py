"""Step time and memory of each rule against plain backprop.

  python benchmarks/step_time.py [--workloads=w1,w2] [--output=FILE.json]

A step is forward, backward and SGD, with donated buffers. `plain` is
`jax.value_and_grad` of the model and the same optimiser, without this library;
every other row is a rule through `rule.value_and_grad`. All run interleaved in
one process on one core; a ratio is the median over rounds of (time of the rule
in a round) / (time of `plain` in the same round). Memory is XLA's own analysis
of the compiled step: what it needs beside its arguments and results.

w1: 784-256x5-10 relu, batch 128. w2: 3072-800x3-10 tanh, batch 128.
"""

from __future__ import annotations

import os

# One core, as the figures of other libraries: before jax starts its threads.
_CORE = int(os.environ.get('BPJAX_CORE', '0'))
if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {_CORE})
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false')

# pylint: disable=g-import-not-at-top
import json
import platform
import statistics
import sys
import time

from absl import app
from absl import flags
from absl import logging
import bpjax
import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

_WORKLOADS = flags.DEFINE_list('workloads', ['w1', 'w2'], 'Which to run.')
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')

_LOSS = bpjax.losses.softmax_cross_entropy
_MODELS = {
    'w1': ((256,) * 5, 'relu', 784),
    'w2': ((800,) * 3, 'tanh', 3072),
}
_RULES = {
    'backprop': {},
    'feedback_alignment': {},
    'kolen_pollack': {},
    'sign_symmetry': {},
    'weight_mirror': {},
    'direct_feedback_alignment': {},
    'direct_feedback_alignment shared': {'shared': True},
    'forward_gradient gaussian': {},
    'forward_gradient rademacher': {'directions': 'rademacher'},
}


def workload(name: str):
  """The model, an input batch and labels."""
  widths, activation, inputs = _MODELS[name]
  model = bpjax.models.mlp(10, widths=widths, activation=activation)
  x = jax.random.normal(jax.random.key(1), (128, inputs))
  return model, x, jnp.arange(128) % 10


def plain_step(model, x, y):
  """(step, first carry) of jax.value_and_grad and SGD."""
  tx = optax.sgd(.01)
  params = model.init(jax.random.key(0), x)['params']

  def step(carry):
    params, state, key = carry
    loss = lambda p: _LOSS(model.apply({'params': p}, x, train=True), y).mean()
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state, key), value

  return step, (params, tx.init(params), jax.random.key(5))


def rule_step(model, x, y, rule):
  """The same of a rule; fixed feedback is an argument beside the carry."""
  tx = optax.sgd(.01)
  net = bpjax.from_linen(model)
  variables = net.init(jax.random.key(0), x)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  learn = rule.value_and_grad(net, _LOSS)
  free = all(jax.tree.leaves(rule.trainable(feedback)))
  learned = (variables['params'], feedback if free else {})

  def step(carry):
    (params, trained), state, key = carry
    now = key
    if rule.name == 'forward_gradient':
      key, now = jax.random.split(key)
    (value, _), (grads, feedback_grads) = learn(
        {'params': params}, trained if free else feedback, x, y, key=now)
    grads = (grads, feedback_grads if free else {})
    updates, state = tx.update(grads, state, (params, trained))
    learned = optax.apply_updates((params, trained), updates)
    return (learned, state, key), value

  return step, (learned, tx.init(learned), jax.random.key(5))


def measure(steps: dict, rounds: int) -> list[dict]:
  """Compiles each step, runs them in turns, and sums up."""
  running = {}
  for name, (step, carry) in steps.items():
    carry = jax.tree.map(jnp.copy, carry)  # Donated; others start from it, too.
    compiled = jax.jit(step, donate_argnums=0).lower(carry).compile()
    carry, _ = jax.block_until_ready(compiled(carry))
    running[name] = [compiled, carry, []]
  for _ in range(rounds):
    for entry in running.values():
      begin = time.perf_counter()
      for _ in range(3):
        entry[1], _ = entry[0](entry[1])
      jax.block_until_ready(entry[1])
      entry[2].append((time.perf_counter() - begin) / 3)
  plain = running['plain'][2]
  return [{
      'rule': name,
      'milliseconds': 1e3 * statistics.median(times),
      'ratio': statistics.median(a / b for a, b in zip(times, plain)),
      'temporaries_mib':
          compiled.memory_analysis().temp_size_in_bytes / 2**20,
      'gflop': compiled.cost_analysis()['flops'] / 1e9,
  } for name, (compiled, _, times) in running.items()]


def machine() -> str:
  """The processor's name, and how much of it is used."""
  if jax.default_backend() != 'cpu':
    return jax.devices()[0].device_kind
  name = platform.processor() or platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      name = next((line.split(':')[1].strip() for line in file
                   if line.startswith('model name')), name)
  return f'{name}, one core'


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.ERROR)  # jax looks for accelerators aloud.
  unknown = set(_WORKLOADS.value) - set(_MODELS)
  if unknown:
    print(f'error: unknown workload {sorted(unknown)[0]!r}; known: '
          f'{", ".join(_MODELS)}', file=sys.stderr)
    sys.exit(2)
  console = rich.console.Console(width=100)
  results = {}
  for name in _WORKLOADS.value:
    model, x, y = workload(name)
    steps = {'plain': plain_step(model, x, y)}
    for label, arguments in _RULES.items():
      rule = bpjax.rules.get(label.split()[0])(**arguments)
      steps[label] = rule_step(model, x, y, rule)
    results[name] = measure(steps, _ROUNDS.value)
    table = rich.table.Table(
        'step', 'ms', 'ratio to plain', 'temporaries, MiB', 'GFLOP',
        title=f'{name} on {machine()}, jax {jax.__version__}')
    for row in results[name]:
      table.add_row(
          row['rule'], f'{row["milliseconds"]:.2f}', f'{row["ratio"]:.3f}',
          f'{row["temporaries_mib"]:.2f}', f'{row["gflop"]:.3f}')
    console.print(table)
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
      json.dump({
          'command': ' '.join(['python benchmarks/step_time.py', *argv[1:]]),
          'machine': machine(), 'jax': jax.__version__,
          'rounds': _ROUNDS.value, 'workloads': results}, file, indent=1)


if __name__ == '__main__':
  app.run(main)
