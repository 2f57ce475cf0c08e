"""What the benchmarks share: compiled steps, run in turns on chosen cores.

Imported before jax, so that its threads start on these cores: BPJAX_CORE is one,
as in the figures of other libraries, or several, `BPJAX_CORE=0,1`.
"""

from __future__ import annotations

import os

_CORES = os.environ.get('BPJAX_CORE', '0').split(',')
if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, set(map(int, _CORES)))
if len(_CORES) == 1:
  os.environ['XLA_FLAGS'] = (
      os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false')

# pylint: disable=g-import-not-at-top
import json
import statistics
import sys
import time

from experiments import measurement
import jax
import jax.numpy as jnp
import rich.console
import rich.table


class Compiled:
  """A step of ours, compiled: takes itself further."""

  def __init__(self, step, carry):
    # Donated; others start from it, too.
    self._carry = jax.tree.map(jnp.copy, carry)
    compiled = jax.jit(step, donate_argnums=0).lower(self._carry).compile()
    self._run = compiled
    self.facts = {
        'temporaries_mib':
            compiled.memory_analysis().temp_size_in_bytes / 2**20,
        'gflop': compiled.cost_analysis()['flops'] / 1e9}
    self.advance(1)

  def advance(self, steps):
    """Takes steps and waits for the last."""
    for _ in range(steps):
      self._carry, _ = self._run(self._carry)
    jax.block_until_ready(self._carry)


def measure(steps: dict, rounds: int, reference, each: int = 3) -> list[dict]:
  """Makes each step, runs them in turns, and sums up.

  Args:
    steps: name -> what makes a step with `advance` and `facts`.
    rounds: how often each is run.
    reference: `(name, step) -> name` of the step that its time is divided by.
    each: steps in a round.

  Returns:
    A row for each step: 'rule', 'milliseconds' and 'ratio' (medians over the
    rounds; a ratio is taken within a round), 'cpu_milliseconds' and 'cpu_ratio'
    of the processor's time, which other programs change less, and the step's
    facts.
  """
  running = {name: (make(), [], []) for name, make in steps.items()}
  for _ in range(rounds):
    for step, times, cpu in running.values():
      begin, used = time.perf_counter(), time.process_time()
      step.advance(each)
      times.append((time.perf_counter() - begin) / each)
      cpu.append((time.process_time() - used) / each)

  def row(name, step, *own):
    found = {'rule': name}
    others = running[reference(name, step)][1:]
    for kind, times, other in zip(('', 'cpu_'), own, others):
      found[f'{kind}milliseconds'] = 1e3 * statistics.median(times)
      found[f'{kind}ratio'] = statistics.median(
          a / b for a, b in zip(times, other))
    return found | step.facts

  return [row(name, *entry) for name, entry in running.items()]


def show(title: str, rows: list[dict]) -> None:
  """Prints the rows of a workload."""
  table = rich.table.Table(
      'step', 'ms', 'ratio', 'temporaries, MiB', 'GFLOP',
      title=f'{title} on {measurement.machine()}, jax {jax.__version__}')
  for row in rows:
    table.add_row(
        row['rule'], f'{row["milliseconds"]:.2f}', f'{row["ratio"]:.3f}',
        *('-' if row[fact] is None else f'{row[fact]:.3f}'
          for fact in ('temporaries_mib', 'gflop')))
  rich.console.Console(width=100).print(table)


def write(path: str, script: str, rounds: int, results: dict) -> None:
  """Writes the results of every workload to a JSON file."""
  with open(path, 'w', encoding='utf-8') as file:
    json.dump({
        'command': ' '.join([f'python benchmarks/{script}', *sys.argv[1:]]),
        'machine': measurement.machine(), 'jax': jax.__version__, 'rounds': rounds,
        'workloads': results}, file, indent=1)
