"""Step time and memory of local losses on LocalMixer, against backprop.

  python benchmarks/local_mixer.py [--workloads=s/1/1,m/1/16,m/8/16] \
      [--output=FILE.json]
  BPJAX_CORE=0,1 python benchmarks/local_mixer.py

Every variant of `bpjax.variants` on the sizes of Scaling forward gradient with
local losses, Ren, Kornblith, Liao and Hinton, ICLR 2023
(https://arxiv.org/abs/2210.03310): s/1/1 and m/1/16 on MNIST's images, batch
128; m/8/16 on CIFAR-10's, batch 32. A step is forward, backward and SGD, with
donated buffers; `plain` is `jax.value_and_grad` of the model, without this
library. All run interleaved in one process; a ratio is the median over rounds of
(time of the variant in a round) / (time of BP in the same round). Memory is
XLA's own analysis of the compiled step: what it needs beside its arguments and
results.
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import functools
import sys

from absl import flags
from absl import logging
import bpjax
from bpjax.models.local_mixer import NormedLayer
from experiments import measurement
import jax
import jax.numpy as jnp
import optax

# Before jax starts its threads.
import timing

_IMAGES = {
    's/1/1': (128, 28, 28, 1), 'm/1/16': (128, 28, 28, 1),
    'm/8/16': (32, 32, 32, 3)}
_EACH = {'s/1/1': 5, 'm/1/16': 5, 'm/8/16': 1}  # Steps in a round.
_LOSS = bpjax.losses.softmax_cross_entropy
_WORKLOADS = flags.DEFINE_list('workloads', list(_IMAGES), 'Which to run.')
_ROUNDS = flags.DEFINE_integer('rounds', 20, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')
_VARIANTS = flags.DEFINE_list(
    'variants', list(bpjax.variants.names()), 'Which to run beside BP.')


def plain_step(model, x, y):
  """(step, first carry) of jax.value_and_grad and SGD."""
  tx = optax.sgd(.01)
  params = model.init(jax.random.key(0), x)

  def step(carry):
    params, state = carry
    value, grads = jax.value_and_grad(
        lambda p: _LOSS(model.apply(p, x), y).mean())(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  return step, (params, tx.init(params))


def rule_step(model, x, y, rule):
  """(step, first carry) of a rule and SGD."""
  tx = optax.sgd(.01)
  net = bpjax.from_linen(
      model, is_unit=lambda m: isinstance(m, NormedLayer))
  variables = net.init(jax.random.key(0), x)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  learn = rule.value_and_grad(net, _LOSS)
  trainable = rule.trainable(feedback)
  learned = lambda f: jax.tree.map(lambda t, f: f if t else None, trainable, f)

  def step(carry):
    params, own, state, key = carry
    key, now = jax.random.split(key)
    whole = jax.tree.map(
        lambda t, own, f: own if t else f, trainable, own, feedback)
    (value, _), grads = learn({'params': params}, whole, x, y, key=now)
    tree = params, own
    updates, state = tx.update((grads[0], learned(grads[1])), state, tree)
    params, own = optax.apply_updates(tree, updates)
    return (params, own, state, key), value

  own = learned(feedback)
  carry = (variables['params'], own, tx.init((variables['params'], own)),
           jax.random.key(5))
  return step, carry


def _steps(size):
  """Name -> what makes a step."""
  model = bpjax.models.local_mixer(10, size)
  x = jax.random.normal(jax.random.key(1), _IMAGES[size])
  y = jnp.arange(len(x)) % 10
  rules = {'BP': bpjax.variant('BP')}
  for name in _VARIANTS.value:
    rules.setdefault(name, bpjax.variant(name))
  if 'LG-FG-A' in rules:
    rules['LG-FG-A gaussian'] = bpjax.variant('LG-FG-A', directions='gaussian')

  def make(rule):
    return timing.Compiled(*rule_step(model, x, y, rule))

  def plain():
    return timing.Compiled(*plain_step(model, x, y))

  return {'plain': plain} | {
      name: functools.partial(make, rule) for name, rule in rules.items()}


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # jax looks for accelerators aloud.
  for given, known in (
      (_WORKLOADS.value, _IMAGES),
      (_VARIANTS.value, bpjax.variants.names())):
    unknown = [name for name in given if name not in known]
    if unknown:
      print(f'error: {unknown[0]!r} is not known; known: {", ".join(known)}.',
            file=sys.stderr)
      sys.exit(2)
  results = {}
  for size in _WORKLOADS.value:
    results[size] = timing.measure(
        _steps(size), _ROUNDS.value, lambda *_: 'BP', each=_EACH[size])
    timing.show(size, results[size])
  if _OUTPUT.value:
    timing.write(_OUTPUT.value, 'local_mixer.py', _ROUNDS.value, results)


if __name__ == '__main__':
  measurement.run(main)
