"""A pipeline whose depth grows with the devices: counted work, and step times on a GPU.

  python benchmarks/weak_scaling.py [--output=FILE.json]
      [--workloads=mlp,w1,...] [--peak=float32=67,bfloat16=989]

On 1, 2, 4 and 8 CPU devices with a block each (two dense layers of width 256 and
tanh; 16 inputs, batch 128 in 8 microbatches, 16 classes), a step with SGD under backprop, direct
feedback, direct rec-LRA and local losses, the last of these also as 8 steps without a
flush. No time is taken: XLA counts the operations and the bytes of collectives of the
program that each device runs, and the schedule is simulated with a backward pass of
as many operations, in those of a forward pass, as XLA counts for a block.

  ticks            turns of a stage in a step, forward and back
  GFLOP            of a device in a step, those of turns without a microbatch too, and
                   of what the first or the last device does alone
  useful           share of them that the step has on one device, by devices
  bytes            of the results of collectives, on a device in a step
  time             of the simulated step, in forward passes of a microbatch, F
  utilisation      share of it in which a stage works

Where there is a GPU, step times follow on it: `mlp` (32 layers of width 1024, batch
128) and the workloads of step_time.py, in float32 and bfloat16, in turns in one
process, with the share of the card's peak that `--peak` gives in TFLOP/s; operations
are those that XLA counts on a CPU for the same step.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import json
import os
import sys

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') +
    ' --xla_force_host_platform_device_count=8')

from absl import flags
from absl import logging
import bpjax
import counting
from experiments import measurement
import jax
import jax.numpy as jnp
import optax
import rich.table
import timing
import workloads

_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_ROUNDS = flags.DEFINE_integer('rounds', 30, 'Rounds; the median is taken.')
_WORKLOADS = flags.DEFINE_list(
    'workloads', None, 'Of step times; default: all on a GPU, else none.')
_PEAK = flags.DEFINE_list(
    'peak', [], 'Peak of the card, `dtype=TFLOP/s`; none: no share of it.')
_WIDTH, _BATCH, _CLASSES, _MICROBATCHES, _STEPS = 256, 128, 16, 8, 8
_INPUTS = 16  # Few, since every device of a pipeline computes the first layer.
_LOSS = bpjax.losses.softmax_cross_entropy
_DTYPES = ('float32', 'bfloat16')
# What the direct rule has to have units with their nonlinearity for.
_LAYERS = ('recursive_local_representation_alignment',)


def rules() -> dict:
  """Label -> (rule, boundaries, kind of schedule)."""
  own = bpjax.rules
  local = bpjax.local(own.backprop(), ['block_*'])
  return {
      'backprop': (own.backprop(), (), 'backprop'),
      'direct feedback': (
          own.direct_feedback_alignment(), ('block_*',), 'direct'),
      'direct rec-LRA': (
          own.recursive_local_representation_alignment(), (), 'direct'),
      'local losses': (local, (), 'local'),
      'local losses, no flush': (local, (), 'stream'),
  }


def _setup(rule, boundaries, depth):
  net = bpjax.from_linen(
      counting.Chain(depth, _WIDTH, _CLASSES, layers=2), boundaries=boundaries)
  x, y = jnp.ones((_BATCH, _INPUTS)), jnp.arange(_BATCH) % _CLASSES
  return net, net.init(jax.random.key(0), x), x, y


def _moved(tree, grads):
  return jax.tree.map(lambda a, g: a - .01 * g, tree, grads)


def alone(rule, boundaries, depth: int) -> tuple[float, float]:
  """GFLOP of a forward pass and of a step on one device."""
  net, variables, x, y = _setup(rule, boundaries, depth)
  feedback = rule.init(jax.random.key(1), net, variables, x)
  learn = rule.value_and_grad(net, _LOSS)

  def step(params, feedback, x, y):
    (value, _), (grads, held) = learn({'params': params}, feedback, x, y)
    if 'heads' in feedback:
      held = _moved(feedback['heads'], held['heads'])
    return value, _moved(params, grads), held

  count = lambda function, *given: jax.jit(function).lower(
      *given).compile().cost_analysis()['flops'] / 1e9
  return (count(net.apply, variables, x),
          count(step, variables['params'], feedback, x, y))


def piped(rule, boundaries, kind: str, stages: int, ahead: float) -> dict:
  """What a device of a pipeline does in a step.

  Args:
    rule: the rule.
    boundaries: how blocks end.
    kind: of schedule.
    stages: the number of devices.
    ahead: GFLOP of a batch's forward pass through a block.
  """
  net, variables, x, y = _setup(rule, boundaries, stages)
  pipeline = bpjax.pipeline(
      rule, net, blocks=['block_*'], microbatches=_MICROBATCHES)
  mesh = jax.make_mesh(
      (stages,), ('layers',), devices=jax.devices('cpu')[:stages])
  with jax.set_mesh(mesh):
    held = pipeline.init(jax.random.key(1), variables, x)
    if kind == 'stream':
      tx = optax.sgd(.01)
      state = pipeline.init_optimizer(tx, *held)
      again = lambda a: jnp.broadcast_to(a, (_STEPS, *a.shape))
      compiled = jax.jit(pipeline.steps(_LOSS, tx)).lower(
          *held, state, again(x), again(y)).compile()
    else:
      learn = pipeline.value_and_grad(_LOSS)

      def step(variables, feedback, x, y):
        values, (grads, fed) = learn(variables, feedback, x, y)
        heads = _moved(feedback['heads'], fed['heads']) if (
            'heads' in feedback) else fed
        return values, _moved(variables['params'], grads), heads

      compiled = jax.jit(step).lower(*held, x, y).compile()
  found = counting.collectives(compiled.as_text())
  flops = compiled.cost_analysis()['flops'] / 1e9
  size = sum(size for _, size in found.values())
  filled = _MICROBATCHES + stages - 1
  if kind == 'stream':
    # XLA counts the loop's body once; turns without a microbatch go forward alone.
    empty = (stages - 1) / _STEPS
    filled = _MICROBATCHES + empty
    flops = flops * _MICROBATCHES + empty * ahead / _MICROBATCHES
    size *= filled
  back = filled if kind == 'backprop' else _MICROBATCHES
  return {'ticks': filled + back, 'gflop_a_device': flops, 'bytes_a_device': size,
          'collectives': {k: n for k, (n, _) in found.items()}}


def counted() -> list[dict]:
  """The rows of the table."""
  rows = []
  for label, (rule, boundaries, kind) in rules().items():
    works = {depth: alone(rule, boundaries, depth) for depth in (1, 2, 4, 8)}
    ahead, step = ((b - a) / 4 for a, b in zip(works[4], works[8]))
    back = step / ahead - 1
    for stages in (1, 2, 4, 8):
      row = piped(rule, boundaries, kind, stages, ahead)
      turns = _STEPS if kind == 'stream' else 1
      count = _MICROBATCHES * turns
      end = counting.simulate(kind, stages, count, 1., back)
      rows.append({
          'rule': label, 'devices': stages, **row,
          'useful': works[stages][1] / stages / row['gflop_a_device'],
          'backward_in_forward': back, 'time_in_forward': end / turns,
          'utilisation': count * (1 + back) / end})
      print(rows[-1], flush=True)
  return rows


def _timed_rules(name):
  """Label -> rule, of the step times."""
  own = bpjax.rules
  found = {
      'backprop': own.backprop(),
      'feedback_alignment': own.feedback_alignment(),
      'direct_feedback_alignment': own.direct_feedback_alignment(),
      'kolen_pollack': own.kolen_pollack()}
  if name not in ('w3', 'w4'):  # Norms and skips have no targets.
    found['recursive_local_representation_alignment'] = (
        own.recursive_local_representation_alignment())
  if name != 'w3':  # Its BatchNorm joins the examples.
    widths = workloads.MODELS[name] or ((),)
    blocks = [f'Dense_{i}' for i in range(len(widths[0]))] or ['block_*']
    found['LG-FG-A'] = bpjax.variant(
        'LG-FG-A', blocks, grouped=False, placement='block')
  return found


def timed(peaks: dict[str, float]) -> list[dict]:
  """Step times of every workload, dtype and rule on the default device."""
  rows = []
  for name in _WORKLOADS.value:
    steps, gflop = {}, {}
    for label, rule in _timed_rules(name).items():
      for dtype in _DTYPES:
        def build(label=label, rule=rule, dtype=dtype):
          model, x, y = workloads.workload(
              name, 'layer' if label in _LAYERS else 'affine')
          return workloads.rule_step(model, x, y, rule, dtype=dtype)

        with jax.default_device(jax.devices('cpu')[0]):
          step, carry = build()
          gflop[label, dtype] = jax.jit(step).lower(
              carry).compile().cost_analysis()['flops'] / 1e9
        steps[label, dtype] = lambda build=build: timing.Compiled(*build())
    for row in timing.measure(
        steps, _ROUNDS.value, lambda key, step: ('backprop', key[1]), each=10):
      label, dtype = row['rule']
      work, seconds = gflop[label, dtype], row['milliseconds'] / 1e3
      rows.append({
          'workload': name, 'rule': label, 'dtype': dtype, 'gflop': work,
          'milliseconds': row['milliseconds'], 'ratio': row['ratio'],
          'of_peak': work / 1e3 / seconds / peaks[dtype]
                     if dtype in peaks else None})
      print(rows[-1], flush=True)
  return rows


def _peaks():
  try:
    found = {k: float(v) for k, v in (p.split('=') for p in _PEAK.value)}
  except ValueError:
    found = {'': 0.}
  if not set(found) <= set(_DTYPES):
    print('error: `peak` must be dtype=TFLOP/s, such as '
          f'--peak=float32=67,bfloat16=989, got {",".join(_PEAK.value)!r}.',
          file=sys.stderr)
    sys.exit(2)
  return found


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.ERROR)  # jax looks for accelerators aloud.
  peaks, on_gpu = _peaks(), jax.default_backend() != 'cpu'
  if _WORKLOADS.value is None:
    flags.FLAGS.workloads = list(workloads.MODELS) if on_gpu else []
  unknown = set(_WORKLOADS.value) - set(workloads.MODELS)
  if unknown:
    print(f'error: unknown workload {sorted(unknown)[0]!r}; known: '
          f'{", ".join(workloads.MODELS)}', file=sys.stderr)
    sys.exit(2)
  with jax.default_device(jax.devices('cpu')[0]):
    rows = counted()
  table = rich.table.Table(
      'rule', 'devices', 'ticks', 'GFLOP a device', 'useful', 'bytes a device',
      'backward', 'time', 'utilisation')
  for row in rows:
    table.add_row(
        row['rule'], str(row['devices']), f'{row["ticks"]:.2f}',
        f'{row["gflop_a_device"]:.4f}', f'{row["useful"]:.1%}',
        f'{row["bytes_a_device"]:,.0f}', f'{row["backward_in_forward"]:.2f} F',
        f'{row["time_in_forward"]:.1f} F',
        f'{row["utilisation"]:.1%}')
  measurement.show(table, 110)
  times = timed(peaks)
  if not times:
    print('no step times: there is no GPU here')
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
      json.dump({
          'command': ' '.join(
              ['python benchmarks/weak_scaling.py', *sys.argv[1:]]),
          'jax': jax.__version__, 'rows': rows,
          'accelerator': measurement.machine() if times and on_gpu else None,
          'rounds_of_times': _ROUNDS.value if times else None,
          'step_times': times}, file, indent=1)
      file.write('\n')


if __name__ == '__main__':
  measurement.run(main)
