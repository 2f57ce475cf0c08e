"""The replicated loss, fused against naive: Figure 5 of Ren et al., 2023.

  python scripts/local_fg_memory.py [--groups=1,2,4,8,16,32,64] [--rounds=5]

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310); the figure is an image, without
numbers. A block's output [N, P, G, C/G] has a loss for each of P patches and G
groups. `bpjax.replicated.cross_entropy` takes them all from one pooled loss; the
naive form, by their definition, makes a copy of the pooled features for each, in
which that patch and group alone moves: [N, P, G, C].

Memory is XLA's analysis of the compiled function: temporaries, beside arguments
and results. Time is a median over rounds, in which all take turns. 'jvp' is the
change of the losses along a change of the output, 'grad' the gradient of their
sum for output and head.

`bpjax.local` does not need either: it multiplies the change of a block's output
with the error of one loss, and sums it in each patch and group. With --step, the
temporaries of its whole step on M/8/16 are printed for each placement of the
losses.

Exits with 1 unless fused has fewer temporaries than naive wherever G > 1, and
they do not grow with G, by more than --tolerance.
"""

from __future__ import annotations

import statistics
import time

from absl import flags
import bpjax
from bpjax.models.local_mixer import NormedLayer
from experiments import measurement
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

# name -> (examples, patches, channels, groups): blocks of the paper's models.
SHAPES = {
    'M/1/16': (128, 1, 512, 16), 'M/8/16': (32, 64, 512, 16),
    'L/8/64': (4, 64, 2048, 64)}
MODES = ('jvp', 'grad')
FORMS = ('fused', 'naive')

_SHAPES = flags.DEFINE_list('shapes', list(SHAPES), 'Blocks of the models.')
_GROUPS = flags.DEFINE_list(
    'groups', ['1', '2', '4', '8', '16', '32', '64'],
    'Numbers of groups of the sweep.')
_SWEEP = flags.DEFINE_list(
    'sweep', ['8', '64', '512'],
    'Examples, patches and channels of the sweep over groups.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Of which times are a median.', 1)
_TOLERANCE = flags.DEFINE_float(
    'tolerance', .02, 'Relative growth with G that is none.', 0.)
_STEP = flags.DEFINE_bool('step', False, "Also bpjax.local's step on M/8/16.")

_LOSS = bpjax.losses.softmax_cross_entropy


def naive(x: jax.Array, head, labels: jax.Array) -> jax.Array:
  """The losses [batch, patches, groups] by their definition, with copies.

  Args:
    x: a block's output [batch, patches, groups, channels of a group].
    head: {'kernel': [channels, classes], 'bias': [classes]}.
    labels: integers [batch].
  """
  batch, patches, groups, _ = x.shape
  fixed = jax.lax.stop_gradient(x)
  # The pooled features as constants, and what its own patch and group moves.
  own = jnp.where(
      jnp.eye(groups, dtype=bool)[:, :, None],
      ((x - fixed) / patches)[:, :, None], 0)
  copies = fixed.mean(axis=1)[:, None, None] + own
  logits = (copies.reshape(batch, patches, groups, -1) @ head['kernel']
            + head['bias'])
  return _LOSS(
      logits, jnp.broadcast_to(labels[:, None, None], logits.shape[:-1]))


def function(form: str, mode: str):
  """What is compiled: `(x, dx, head, labels) -> derivative`."""
  def fused(x, head, labels):
    # The naive sum has the gradient of the head once for every copy.
    return bpjax.replicated.cross_entropy(x, head, labels, head_scale='sum')

  losses = {'fused': fused, 'naive': naive}[form]

  def jvp(x, dx, head, labels):
    return jax.jvp(lambda x: losses(x, head, labels), (x,), (dx,))[1]

  def grad(x, dx, head, labels):
    del dx
    return jax.grad(
        lambda x, head: losses(x, head, labels).sum(), (0, 1))(x, head)

  return {'jvp': jvp, 'grad': grad}[mode]


def inputs(examples: int, patches: int, channels: int, groups: int):
  """Arguments of `function`, random."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (examples, patches, groups, channels // groups)
  kernel = .1 * jax.random.normal(keys[2], (channels, 10))
  return (jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape),
          {'kernel': kernel, 'bias': jnp.zeros(10)}, jnp.arange(examples) % 10)


def measure(shape: tuple[int, int, int, int], rounds: int) -> list[dict]:
  """Memory and time of both forms and modes for one shape; they have to agree.

  Args:
    shape: examples, patches, channels, groups.
    rounds: of which times are a median.

  Raises:
    AssertionError: if a derivative is not the same in both forms.
  """
  arguments = inputs(*shape)
  compiled = {
      (form, mode): jax.jit(function(form, mode)).lower(*arguments).compile()
      for mode in MODES for form in FORMS}
  for mode in MODES:
    for a, b in zip(*(jax.tree.leaves(compiled[form, mode](*arguments))
                      for form in FORMS)):
      assert jnp.allclose(a, b, rtol=1e-3, atol=1e-3 * jnp.abs(b).max()), mode
  times = {key: [] for key in compiled}
  for _ in range(rounds):
    for key, run in compiled.items():
      # Not timed: the other form before has emptied the caches.
      jax.block_until_ready(run(*arguments))
      begin = time.perf_counter()
      jax.block_until_ready(run(*arguments))
      times[key].append(time.perf_counter() - begin)
  return [
      {'shape': list(shape), 'groups': shape[3], 'mode': mode, 'form': form,
       'temporaries_mib': run.memory_analysis().temp_size_in_bytes / 2**20,
       'milliseconds': 1e3 * statistics.median(times[form, mode])}
      for (form, mode), run in compiled.items()]


def step_temporaries(batch: int = 32) -> list[dict]:
  """XLA temporaries of a step of `bpjax.local` on M/8/16; compiles only."""
  net = bpjax.from_linen(
      bpjax.models.local_mixer(10, 'm/8/16'),
      is_unit=lambda m: isinstance(m, NormedLayer))
  x = jnp.zeros((batch, 32, 32, 3))
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  rows = []
  for name in ('LG-BP', 'LG-FG-A'):
    for placement in ('block', 'patch', 'group'):
      rule = bpjax.variant(name, placement=placement)
      feedback = jax.eval_shape(
          lambda key, v: rule.init(key, net, v, x),  # pylint: disable=cell-var-from-loop
          jax.random.key(1), variables)
      learn = jax.jit(rule.value_and_grad(net, _LOSS))
      memory = learn.lower(
          variables, feedback, x, jnp.zeros(batch, int), jax.random.key(2)
      ).compile().memory_analysis()
      rows.append({'rule': name, 'placement': placement,
                   'temporaries_mib': memory.temp_size_in_bytes / 2**20})
  return rows


def pairs(rows: list[dict]):
  """(fused, naive) of each shape and mode."""
  for row in rows:
    if row['form'] == 'fused':
      yield row, next(
          r for r in rows if r['form'] == 'naive' and all(
              r[k] == row[k] for k in ('shape', 'mode')))


def out_of_bounds(models: list[dict], sweep: list[dict], tolerance: float):
  """What does not hold, a sentence each."""
  wrong = [
      f'{fused["mode"]}, {fused["shape"]}: fused has '
      f'{fused["temporaries_mib"]:.2f} MiB of temporaries, naive '
      f'{naive_["temporaries_mib"]:.2f}'
      for fused, naive_ in pairs(models + sweep) if fused['groups'] > 1
      and fused['temporaries_mib'] >= naive_['temporaries_mib']]
  for mode in MODES:
    fused = sorted(
        (r for r in sweep if (r['form'], r['mode']) == ('fused', mode)),
        key=lambda r: r['groups'])
    first, last = fused[0], max(fused, key=lambda r: r['temporaries_mib'])
    if last['temporaries_mib'] > (1 + tolerance) * first['temporaries_mib']:
      wrong.append(
          f'{mode}: the temporaries of fused grow with G, from '
          f'{first["temporaries_mib"]:.3f} MiB at {first["groups"]} to '
          f'{last["temporaries_mib"]:.3f} at {last["groups"]}')
  return wrong


def show(title: str, rows: list[dict], names: dict[str, str]) -> None:
  """A table: one row for each shape and mode."""
  table = measurement.table(
      title, 'block', 'N', 'P', 'C', 'G', 'mode', 'fused, MiB', 'naive, MiB',
      'fused, ms', 'naive, ms', 'time, ratio')
  for fused, naive_ in pairs(rows):
    table.add_row(
        names.get(str(fused['shape']), ''), *map(str, fused['shape']),
        fused['mode'], f'{fused["temporaries_mib"]:.2f}',
        f'{naive_["temporaries_mib"]:.2f}', f'{fused["milliseconds"]:.2f}',
        f'{naive_["milliseconds"]:.2f}',
        f'{naive_["milliseconds"] / fused["milliseconds"]:.0f}')
  measurement.show(table)


def draw(sweep: list[dict], path: str) -> None:
  """Memory and time over the number of groups."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
  for axis, field, label in (
      (axes[0], 'temporaries_mib', 'temporaries, MiB'),
      (axes[1], 'milliseconds', 'time, ms')):
    for i, form in enumerate(FORMS):
      for mode, style in zip(MODES, ('-o', '--s')):
        rows = sorted((r for r in sweep if (r['form'], r['mode']) == (
            form, mode)), key=lambda r: r['groups'])
        axis.plot([r['groups'] for r in rows], [r[field] for r in rows], style,
                  color=f'C{i}', label=f'{form}, {mode}')
    axis.set(xscale='log', yscale='log', xlabel='channel groups', ylabel=label)
    axis.set_xticks(sorted({r['groups'] for r in sweep}))
    axis.xaxis.set_major_formatter('{x:g}')
    axis.minorticks_off()
    axis.grid(alpha=.25)
    axis.legend()
  n, p, c, _ = sweep[0]['shape']
  figure.suptitle(
      f'The replicated loss: {n} examples, {p} patches, {c} channels')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _checked_flags():
  """The shapes of the models and those of the sweep."""
  for name in _SHAPES.value:
    if name not in SHAPES:
      raise measurement.FlagError(
          f'`shapes` has no {name!r}; known: {", ".join(SHAPES)}.')
  groups = measurement.numbers('groups', _GROUPS.value)
  sizes = measurement.numbers('sweep', _SWEEP.value)
  if len(sizes) != 3:
    raise measurement.FlagError(
        '`sweep` must be examples, patches and channels, such as '
        f'--sweep=8,64,512, got {",".join(_SWEEP.value)!r}.')
  for g in groups:
    if sizes[2] % g:
      raise measurement.FlagError(
          f'`groups` must divide the channels, {sizes[2]}, got {g}.')
  return ({name: SHAPES[name] for name in _SHAPES.value},
          [(*sizes, g) for g in groups])


def _measure(picture):
  named, swept = _checked_flags()
  models, sweep = (
      [row for shape in shapes for row in measure(shape, _ROUNDS.value)]
      for shapes in (named.values(), swept))
  where = jax.devices()[0].device_kind
  if models:
    show(f"Blocks of the paper's models, on {where}", models,
         {str(list(shape)): name for name, shape in named.items()})
  show('Over the number of groups', sweep, {})
  draw(sweep, picture)
  record = {'models': models, 'sweep': sweep}
  print('bpjax.local makes no copies in any placement: it sums error times '
        'change in each patch and group.')
  if _STEP.value:
    record['step'] = step_temporaries()
    table = measurement.table(
        'A step of bpjax.local, M/8/16, 32 examples', 'rule', 'losses at',
        'temporaries, MiB')
    for row in record['step']:
      table.add_row(row['rule'], row['placement'],
                    f'{row["temporaries_mib"]:.1f}')
    measurement.show(table)
  return record, out_of_bounds(models, sweep, _TOLERANCE.value)


if __name__ == '__main__':
  measurement.main('local_fg_memory', _measure)
