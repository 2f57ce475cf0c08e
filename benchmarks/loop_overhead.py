"""What the training loop adds to the bare step.

  python benchmarks/loop_overhead.py [--rule=...] [--rounds=5]

Trains an epoch of MNIST (TFDS_DATA_DIR) on 784-256x5-10 with the launcher, in
turns with the same number of bare steps: `jax.jit` of the same rule, model and
optimiser on one batch that stays on the device. Prints the median time of a
step in the loop (gathering the batch, normalising, dispatching, fetching and
checking the losses) over that of a bare step, and the whole epoch (metrics,
evaluation on the test set and a checkpoint as well) over as many bare steps.
"""

from __future__ import annotations

import os

if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {int(os.environ.get('BPJAX_CORE', '0'))})
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false')

# pylint: disable=g-import-not-at-top
import statistics
import sys
import tempfile
import time

from absl import flags
from absl import logging
import bpjax
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
from experiments import measurement
from experiments.configs import mnist_w1
import jax
import jax.numpy as jnp
import optax

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Epochs of each kind.')
_RULE = flags.DEFINE_string('rule', 'backprop', 'The rule.')


def bare_step(run):
  """(compiled step, first carry) on one batch, without the launcher."""
  batch, learner = run.feed.fixed_batch, run.learner
  x, labels = learner.task.inputs(batch), batch.labels
  state = run.programs['init']()
  tx = optax.adam(run.config.learning_rate)
  learn = learner.rule.value_and_grad(
      learner.net, bpjax.losses.softmax_cross_entropy)

  def step(carry, feedback):
    params, opt_state, key = carry
    (value, _), (grads, _) = learn(
        {'params': params}, feedback, x, labels, key=key)
    updates, opt_state = tx.update(grads, opt_state, params)
    key = jax.random.fold_in(key, 0)
    return (optax.apply_updates(params, updates), opt_state, key), value

  carry = (state.params, tx.init(state.params), jax.random.key(0))
  carry = jax.tree.map(jnp.copy, carry)
  return jax.jit(step, donate_argnums=0), carry, state.feedback


def loop_epoch(config, folder):
  """Seconds of an epoch, and of its steps, with the launcher."""
  with workdir.Workdir(folder) as place, checkpoint.Checkpoints(
      place.checkpoints, 1, warn=print) as checkpoints:
    run = run_lib.setup(config, place)
    state, step = run_lib.start(run, checkpoints)
    begin = time.perf_counter()
    _, seconds = run_lib.train(
        run, checkpoints, state, step, progress.Stopper())
    return time.perf_counter() - begin, seconds, run


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  config = mnist_w1.get_config()
  config.rule = _RULE.value
  ratios, epochs = [], []
  bare = None
  try:
    with tempfile.TemporaryDirectory() as folder:
      for i in range(_ROUNDS.value):
        epoch, seconds, run = loop_epoch(config, os.path.join(folder, str(i)))
        if bare is None:
          bare, carry, feedback = bare_step(run)
          carry, _ = jax.block_until_ready(bare(carry, feedback))
        begin = time.perf_counter()
        for _ in range(run.total_steps):
          carry, value = bare(carry, feedback)
        jax.block_until_ready(value)
        step = (time.perf_counter() - begin) / run.total_steps
        ratios.append(statistics.median(seconds) / step)
        epochs.append(epoch / (step * run.total_steps))
        print(f'round {i}: bare step {1e3 * step:.2f} ms, step in the loop '
              f'{1e3 * statistics.median(seconds):.2f} ms', flush=True)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'{_RULE.value}: step in the loop / bare step '
        f'{statistics.median(ratios):.3f}; whole epoch / bare steps '
        f'{statistics.median(epochs):.3f} (medians of {len(ratios)})')


if __name__ == '__main__':
  measurement.run(main)
