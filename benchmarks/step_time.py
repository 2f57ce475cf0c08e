"""Step time and memory of each rule against plain backprop.

  python benchmarks/step_time.py [--workloads=w1,w2,w3,w4] [--output=FILE.json]

A step is forward, backward and SGD, with donated buffers. `plain` is
`jax.value_and_grad` of the model and the same optimiser, without this library;
every other row is a rule through `rule.value_and_grad`. All run interleaved in
one process on one core; a ratio is the median over rounds of (time of the rule
in a round) / (time of `plain` in the same round). Memory is XLA's own analysis
of the compiled step: what it needs beside its arguments and results.

w1: 784-256x5-10 relu, batch 128. w2: 3072-800x3-10 tanh, batch 128. w3:
ResNet-20, 32x32x3, batch 32, under the rules that train it in reasonable time.
w4: `bert_encoder` of 4 layers, width 256, 4 heads, 64 tokens, batch 16, without
dropout, under the same, and direct feedback to every block (`macro`) or three times
in each (`micro`), local representation alignment, and forward gradient with a loss
for every block (`LG-FG-A`).

Where PyTorch and BioTorch (Sanfiz and Akrout, 2021) are installed, their rows
follow, in the same rounds: `torch` is plain PyTorch, and the ratio of BioTorch's
rules is to that. PyTorch's CPU build, and then BioTorch alone, since what it
lists as its needs is more than its layers use:

  pip install torch && pip install --no-deps biotorch
"""

from __future__ import annotations

# pylint: disable=g-import-not-at-top
import functools
import importlib.util
import os
import sys

from absl import flags
from absl import logging
import bpjax
from experiments import measurement
import jax.numpy as jnp

# Before jax starts its threads.
import timing
import workloads

_WORKLOADS = flags.DEFINE_list(
    'workloads', ['w1', 'w2', 'w3', 'w4'], 'Which to run.')
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'Rounds; the median is taken.')
_OUTPUT = flags.DEFINE_string('output', None, 'A JSON file for the results.')

# Rules that need layers with their nonlinearity, which ResNet-20 has none of.
_TARGETS = (
    'difference_target_propagation', 'equilibrium_propagation',
    'local_representation_alignment',
    'recursive_local_representation_alignment', 'target_propagation')
# Rules that refuse norms or whole numbers, and one that would not learn there.
_WHOLE = ('forward_forward', 'pepita', 'predictive_coding', 'spsa')
# Beside them: 128 noise images a layer, a forward derivative of all, and a forward
# pass for each layer are minutes a round.
_NOT_W3 = (*_TARGETS, *_WHOLE, 'weight_mirror', 'forward_gradient',
           'direct_difference_target_propagation')
_BIOTORCH = ('fa', 'dfa', 'usf')
_RULES = {
    'backprop': {},
    'feedback_alignment': {},
    'kolen_pollack': {},
    'sign_symmetry': {},
    'weight_mirror': {},
    'direct_feedback_alignment': {},
    'direct_feedback_alignment shared': {'shared': True},
    'direct_random_target_projection': {},
    'forward_gradient gaussian': {},
    'forward_gradient rademacher': {'directions': 'rademacher'},
    'local_representation_alignment': {},
    'recursive_local_representation_alignment direct': {},
    'recursive_local_representation_alignment meta': {'wiring': 'meta'},
    'target_propagation': {},
    'difference_target_propagation': {},
    'difference_target_propagation without noise': {'sigma': 0.},
    'equilibrium_propagation': {},
    'predictive_coding': {},
    'direct_kolen_pollack': {},
    'direct_difference_target_propagation': {},
    'pepita': {},
    'forward_forward': {},
    'spsa': {},
}
_W4 = {
    'direct_feedback_alignment macro': (
        bpjax.rules.direct_feedback_alignment(placement='boundaries'),
        bpjax.transformer.points('macro')),
    'direct_feedback_alignment micro': (
        bpjax.rules.direct_feedback_alignment(placement='boundaries'),
        bpjax.transformer.points('micro')),
    'local_representation_alignment': (
        bpjax.rules.local_representation_alignment(), ()),
    'LG-FG-A': (bpjax.variant('LG-FG-A', grouped=False, placement='block'), ()),
}


class Torch:
  """A step of PyTorch: plain, or a rule of BioTorch's."""

  facts = {'temporaries_mib': None, 'gflop': None}

  def __init__(self, name, rule, x, y):
    import torch  # Only where it is asked for; see `has_biotorch`.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = jnp.moveaxis(x, -1, 1) if x.ndim == 4 else x
    self._x, self._y = (torch.tensor(a.tolist()) for a in (images, y))
    self._rule, self._loss = rule, torch.nn.CrossEntropyLoss()
    self._model = _torch_model(torch, name)
    if rule:
      from biotorch.module.biomodule import BioModule
      self._model = BioModule(
          self._model, mode=rule, copy_weights=False, output_dim=10)
    self._model.train()
    self._optimizer = torch.optim.SGD(
        [p for p in self._model.parameters() if p.requires_grad], lr=.01)
    self.advance(1)

  def advance(self, steps):
    for _ in range(steps):
      self._optimizer.zero_grad()
      # BioTorch's direct feedback takes the loss apart in its forward pass.
      output = (self._model(self._x, self._y, self._loss)
                if self._rule == 'dfa' else self._model(self._x))
      self._loss(output, self._y).backward()
      self._optimizer.step()


def _torch_model(torch, name):
  """The same architecture; ResNet-20 is BioTorch's own."""
  if name == 'w3':
    import biotorch
    # By its path: the package around it asks for torchvision.
    path = os.path.join(list(biotorch.__path__)[0], 'models', 'small_resnet.py')
    spec = importlib.util.spec_from_file_location('small_resnet', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.resnet20()
  widths, activation, inputs = workloads.MODELS[name]
  layers = []
  for width in widths:
    layers += [torch.nn.Linear(inputs, width), {
        'relu': torch.nn.ReLU, 'tanh': torch.nn.Tanh}[activation]()]
    inputs = width
  return torch.nn.Sequential(*layers, torch.nn.Linear(inputs, 10))


def has_biotorch() -> bool:
  """Whether PyTorch and BioTorch are installed."""
  return all(map(importlib.util.find_spec, ('torch', 'biotorch')))


def _reference(name, step):
  """What a row's time is divided by."""
  del name
  return 'torch' if isinstance(step, Torch) else 'plain'


def _ours(model, x, y, rule, boundaries=()):
  return timing.Compiled(*workloads.rule_step(model, x, y, rule, boundaries))


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.ERROR)  # jax looks for accelerators aloud.
  known = [name for name in workloads.MODELS if name != 'mlp']
  unknown = set(_WORKLOADS.value) - set(known)
  if unknown:
    print(f'error: unknown workload {sorted(unknown)[0]!r}; known: '
          f'{", ".join(known)}', file=sys.stderr)
    sys.exit(2)
  results = {}
  if not has_biotorch():
    print('without BioTorch, which is not installed; see --help')
  for name in _WORKLOADS.value:
    model, x, y = workloads.workload(name)
    steps = {'plain': lambda: timing.Compiled(
        *workloads.plain_step(model, x, y))}  # pylint: disable=cell-var-from-loop
    for label, arguments in _RULES.items():
      kind = label.split()[0]
      if kind in _NOT_W3 and name in ('w3', 'w4'):
        continue
      chosen = workloads.workload(name, 'layer')[0] if kind in _TARGETS else model
      rule = bpjax.rules.get(kind)(**arguments)
      steps[label] = functools.partial(_ours, chosen, x, y, rule)
    for label, (rule, boundaries) in _W4.items() if name == 'w4' else ():
      steps[label] = functools.partial(_ours, model, x, y, rule, boundaries)
    if has_biotorch() and name != 'w4':
      steps['torch'] = functools.partial(Torch, name, '', x, y)
      for kind in _BIOTORCH:
        steps[f'biotorch {kind}'] = functools.partial(Torch, name, kind, x, y)
    results[name] = timing.measure(steps, _ROUNDS.value, _reference)
    timing.show(name, results[name])
  if _OUTPUT.value:
    timing.write(_OUTPUT.value, 'step_time.py', _ROUNDS.value, results)


if __name__ == '__main__':
  measurement.run(main)
