"""Memory of a step against depth, for every rule; and what drawing B again costs.

  python benchmarks/memory_depth.py [--depths=2,8,32] [--rules=LABEL,...] [--output=FILE.json]

Residual blocks (LayerNorm, Dense, relu, Dense) of width 128, batch 512: XLA's own
analysis of a compiled step with SGD and donated parameters, in MiB, and how much
of it a block adds, between the two largest depths. Then the times of a step at
the second depth, as ratios to backprop's, and what `stored=False` saves of
arguments and costs in time.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
from absl import flags
import bpjax
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

# Before jax starts its threads.
import timing

_DEPTHS = flags.DEFINE_list('depths', ['2', '8', '32'], 'Numbers of blocks.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds; the median is taken.')
_RULES = flags.DEFINE_list('rules', [], 'Labels of `rules()`; none: all.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_WIDTH, _BATCH = 128, 512
_LOSS = bpjax.losses.softmax_cross_entropy


class Block(nn.Module):
  """A residual block."""

  @nn.compact
  def __call__(self, x):
    y = nn.relu(nn.Dense(_WIDTH)(nn.LayerNorm()(x)))
    return x + nn.Dense(_WIDTH)(y)


class Net(nn.Module):
  """Blocks between a first layer and a readout."""
  depth: int

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(_WIDTH)(x)
    for i in range(self.depth):
      x = Block(name=f'block_{i}')(x)
    return nn.Dense(10)(x)


def rules() -> dict:
  """Label -> rule."""
  own, local = bpjax.rules, lambda rule: bpjax.local(rule, ['block_*'])
  return {
      'backprop': own.backprop(),
      'feedback_alignment': own.feedback_alignment(),
      'feedback_alignment stored=False': own.feedback_alignment(stored=False),
      'direct_feedback_alignment': own.direct_feedback_alignment(),
      'direct_feedback_alignment stored=False':
          own.direct_feedback_alignment(stored=False),
      'direct_random_target_projection': own.direct_random_target_projection(),
      'kolen_pollack': own.kolen_pollack(),
      'sign_symmetry': own.sign_symmetry(),
      'weight_mirror': own.weight_mirror(),
      'forward_gradient': own.forward_gradient(),
      'forward_gradient recompute': own.forward_gradient(recompute=True),
      'forward_gradient rademacher':
          own.forward_gradient(directions='rademacher'),
      'forward_gradient rademacher recompute':
          own.forward_gradient(directions='rademacher', recompute=True),
      'local backprop': local(own.backprop()),
      'local direct_feedback_alignment':
          local(own.direct_feedback_alignment()),
      'local forward_gradient recompute':
          local(own.forward_gradient(recompute=True)),
  }


def step_of(rule, depth: int, abstract: bool):
  """(step, carry, feedback) of a rule; arrays as shapes where `abstract`."""
  net = bpjax.from_linen(Net(depth))
  x = jax.random.normal(jax.random.key(3), (_BATCH, _WIDTH))
  y = jnp.arange(_BATCH) % 10
  made = jax.eval_shape if abstract else lambda f, *args: jax.jit(f)(*args)
  variables = made(net.init, jax.random.key(0), x)
  draw = lambda key: rule.init(key, net, variables, x)
  feedback = (jax.eval_shape(draw, jax.random.key(1)) if abstract
              else draw(jax.random.key(1)))
  learn, tx = rule.value_and_grad(net, _LOSS), optax.sgd(.01)

  def step(carry, feedback, x, y):
    params, key = carry
    key, now = jax.random.split(key)
    (value, _), (grads, _) = learn(
        {'params': params}, feedback, x, y, key=now)
    updates, _ = tx.update(grads, tx.init(params), params)
    return (optax.apply_updates(params, updates), key), value

  return step, (variables['params'], jax.random.key(5)), feedback, x, y


def memory(rule, depth: int) -> tuple[float, float]:
  """Temporaries, and the arguments that are feedback, in MiB."""
  step, carry, feedback, x, y = step_of(rule, depth, True)
  compiled = jax.jit(step, donate_argnums=0).lower(
      carry, feedback, x, y).compile()
  size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(feedback))
  return compiled.memory_analysis().temp_size_in_bytes / 2**20, size / 2**20


def main(argv: list[str]) -> None:
  depths = sorted(map(int, _DEPTHS.value))
  few, many = depths[-2:]
  rows, steps = [], {}
  chosen = _RULES.value or rules()
  for label, rule in rules().items():
    if label not in chosen and label != 'backprop':
      continue
    found = [memory(rule, depth) for depth in depths]
    temporaries = [mib for mib, _ in found]
    rows.append({
        'rule': label, 'temporaries_mib': dict(zip(depths, temporaries)),
        'mib_a_block': (temporaries[-1] - temporaries[-2]) / (many - few),
        'feedback_mib': found[-1][1]})
    print(label, *(f'{mib:.2f}' for mib in temporaries), flush=True)

    def make(rule=rule):
      step, *given = step_of(rule, few, False)

      def whole(carry):  # Nothing is a constant: XLA would draw from keys.
        own, value = step(*carry)
        return (own, *carry[1:]), value

      return timing.Compiled(whole, tuple(given))

    steps[label] = make
  times = timing.measure(
      steps, _ROUNDS.value, lambda name, step: 'backprop', each=1)
  table = rich.table.Table(
      'rule', *(f'{d} blocks' for d in depths), 'MiB a block', 'of backprop',
      'feedback', f'time at {few}',
      'processor time', title=f'Temporaries of a step, MiB, on {timing.measurement.machine()}')
  for row, time in zip(rows, times):
    row['share'] = row['mib_a_block'] / rows[0]['mib_a_block']
    row |= {k: time[k] for k in (
        'milliseconds', 'ratio', 'cpu_milliseconds', 'cpu_ratio')}
    table.add_row(
        row['rule'], *(f'{m:.1f}' for m in row['temporaries_mib'].values()),
        f'{row["mib_a_block"]:.3f}', f'{row["share"]:.1%}',
        f'{row["feedback_mib"]:.2f}', f'{row["ratio"]:.2f}',
        f'{row["cpu_ratio"]:.2f}')
  rich.console.Console(width=120).print(table)
  if _OUTPUT.value:
    timing.write(
        _OUTPUT.value, 'memory_depth.py', _ROUNDS.value, {'blocks': rows})


if __name__ == '__main__':
  measurement.run(main)
