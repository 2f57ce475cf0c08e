"""What crosses devices in a step, for every rule beside backprop.

  python benchmarks/collectives.py [--rules=LABEL,...] [--output=FILE.json]

On eight CPU devices, read off the compiled step: how many collectives of a kind,
and the bytes of their results on one device. Two ways to split an MLP of
256x4 (batch 64, 16 classes): 'data' (8 parts of the batch), and 'data x model'
(2 parts of the batch, 4 of each kernel's columns and each matrix of feedback's
last axis). Then a transformer encoder (2 layers of width 64, 4 heads, 16 tokens),
with the batch alone over 8 devices, and with the presets of the launcher's
`sharding`: 'fsdp' on the same 8, 'tensor' on 2 parts of the batch and 4 of the
columns. Then the pipeline: 8 blocks on 8 devices, 4 microbatches, with what
the arithmetic of docs/scale.md asks for.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import json
import os
import sys

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') +
    ' --xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags
import bpjax
from bpjax.train.loop import devices
import counting
import encoder
from experiments import measurement
import jax
import jax.numpy as jnp
import rich.console
import rich.table

_RULES = flags.DEFINE_list('rules', [], 'Labels of `rules()`; none: all.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_LOSS = bpjax.losses.softmax_cross_entropy
_WIDTH, _BATCH, _CLASSES, _STAGES, _MICROBATCHES = 256, 64, 16, 8, 4
# Rules that teach attention as well.
_OF_ENCODERS = (
    'backprop', 'feedback_alignment', 'feedback_alignment stored=False',
    'direct_feedback_alignment', 'direct_feedback_alignment stored=False',
    'kolen_pollack')


def rules() -> dict:
  """Label -> (rule, how blocks end)."""
  own = bpjax.rules
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
      'recursive_local_representation_alignment':
          own.recursive_local_representation_alignment(),
      'forward_gradient': own.forward_gradient(),
      'local backprop': bpjax.local(own.backprop(), ['block_*']),
  }


def sharded(rule, model: int, preset: str | None = None) -> dict:
  """The collectives of a step on a mesh of data and model.

  Args:
    rule: the rule.
    model: devices along the axis `model`.
    preset: of the encoder's `sharding`, '' for none; None: the MLP.
  """
  if preset is None:
    net = bpjax.from_linen(counting.Chain(3, _WIDTH, _CLASSES))
    x = jnp.ones((_BATCH, _WIDTH))
    y = jnp.arange(_BATCH) % _CLASSES
  else:
    net = bpjax.from_linen(encoder.Encoder(2, 64, 4))
    x, y = jnp.zeros((_BATCH, 16), jnp.int32), jnp.arange(_BATCH) % 10
  variables = net.init(jax.random.key(0), x)
  feedback = rule.init(jax.random.key(1), net, variables, x)
  learn = rule.value_and_grad(net, _LOSS)
  mesh = jax.make_mesh(
      (8 // model, model), ('data', 'model'),
      axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def place(a):
    if preset is not None:
      spec = devices.PRESETS[preset](mesh, a.shape) if preset else ()
      return jax.NamedSharding(mesh, jax.P(*spec))
    columns = a.ndim == 2 and a.shape[-1] % model == 0 and model > 1
    return jax.NamedSharding(
        mesh, jax.P(None, 'model') if columns else jax.P())

  trees = jax.tree.map(place, (variables['params'], feedback))
  rows = jax.NamedSharding(mesh, jax.P('data'))

  def step(params, feedback, x, y, key):
    (_, aux), (grads, feedback_grads) = learn(
        {'params': params}, feedback, x, y, key=key)
    move = lambda p, g: p - .01 * g
    held = jax.tree.map(
        lambda free, f, g: move(f, g) if free else f,
        rule.trainable(feedback), feedback, feedback_grads)
    return jax.tree.map(move, params, grads), held

  return counting.collectives(jax.jit(
      step, in_shardings=(*trees, rows, rows, None), out_shardings=trees).lower(
          variables['params'], feedback, x, y, jax.random.key(2)
      ).compile().as_text())


def piped(rule, boundaries) -> dict[str, tuple[int, int]]:
  """Those of a step of the pipeline."""
  net = bpjax.from_linen(
      counting.Chain(_STAGES, _WIDTH, _CLASSES), boundaries=boundaries)
  x, y = jnp.ones((_BATCH, _WIDTH)), jnp.arange(_BATCH) % _CLASSES
  variables = net.init(jax.random.key(0), x)
  pipeline = bpjax.pipeline(
      rule, net, blocks=['block_*'], microbatches=_MICROBATCHES)
  with jax.set_mesh(jax.make_mesh((_STAGES,), ('layers',))):
    held = pipeline.init(jax.random.key(1), variables, x)
    return counting.collectives(jax.jit(pipeline.value_and_grad(_LOSS)).lower(
        *held, x, y).compile().as_text())


def main(argv: list[str]) -> None:
  results = {
      'data': {}, 'data x model': {}, 'encoder, data': {},
      'encoder, fsdp': {}, 'encoder, tensor': {}, 'pipeline': {}}
  chosen = _RULES.value or list(rules())
  for label, rule in rules().items():
    if label in chosen:
      results['data'][label] = sharded(rule, 1)
      results['data x model'][label] = sharded(rule, 4)
      print(label, results['data'][label], results['data x model'][label],
            flush=True)
    if label in chosen and label in _OF_ENCODERS:
      for title, preset, model in (
          ('data', '', 1), ('fsdp', 'fsdp', 1), ('tensor', 'tensor', 4)):
        results[f'encoder, {title}'][label] = sharded(rule, model, preset)
        print('encoder', title, results[f'encoder, {title}'][label], flush=True)
  hops = _MICROBATCHES + _STAGES - 2
  hop = 4 * _BATCH // _MICROBATCHES * _WIDTH
  own = bpjax.rules
  for label, rule, boundaries, back, told in (
      ('backprop', own.backprop(), (), True, 0),
      ('direct_feedback_alignment', own.direct_feedback_alignment(),
       ['block_*'], False, 4 * _BATCH * _CLASSES),
      ('recursive_local_representation_alignment',
       own.recursive_local_representation_alignment(), (), False,
       4 * _BATCH * _CLASSES),
      ('local backprop', bpjax.local(own.backprop(), ['block_*']), (), False,
       0)):
    if label not in chosen:
      continue
    found = piped(rule, boundaries)
    total = sum(size for _, size in found.values())
    asked = hops * hop * (1 + back) + told
    results['pipeline'][label] = {
        **found, 'bytes': total, 'bytes_asked': asked,
        'permutes_back': found['collective-permute'][0] - hops}
  for title, rows in results.items():
    table = rich.table.Table('rule', *counting.KINDS, title=title)
    for label, found in rows.items():
      table.add_row(label, *(
          '{} ({:,} B)'.format(*found[k]) if k in found else '-'
          for k in counting.KINDS))
    rich.console.Console(width=130).print(table)
  for label, row in results['pipeline'].items():
    print(f'{label}: {row["permutes_back"]} permutes back, {row["bytes"]:,} '
          f'bytes, {row["bytes"] / row["bytes_asked"]:.3f} of the arithmetic')
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'w', encoding='utf-8') as file:
      json.dump({'command': ' '.join(
          ['python benchmarks/collectives.py', *sys.argv[1:]]),
                 'jax': jax.__version__, 'devices': 8, **results}, file,
                indent=1)


if __name__ == '__main__':
  measurement.run(main)
