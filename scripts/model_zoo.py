r"""Every rule on every architecture of `tests/architectures.py`.

  python scripts/model_zoo.py [--architectures='nnx_*'] \
      [--rules='*_alignment'] [--output=results/model_zoo.json]

No model there was written for this library. For each pair the outcome is one of

  works      a step runs, its updates are finite, the lowest unit's is not 0;
  refused    a ValueError of one sentence, before any computation;
  fails      anything else, a wrong number included: a bug.

What is checked in float64, besides, of rules that work:

- Rules that send through feedback in the shape of the weights (and sign
  symmetry with magnitudes |W|): with B = W the updates are `jax.grad`; with the
  feedback that the rule draws, the lowest unit's update is another one.
- Forward gradient: the mean of its updates over all directions, which a sum
  along the axes gives exactly, is `jax.grad`. (Of a model that computes in
  float32 whatever it is given, to that precision.)

The largest relative deviation of each is in the table. A refusal is of the
mathematics where no program could do better (a target for units that are read
together, a network that settles under a norm over the batch, a label that is added
to whole numbers); the others are counted.

Exits with 1 if a pair fails, or more than --refusals kinds of refusal are not
of the mathematics. About 10 minutes on two cores.
"""

from __future__ import annotations

import collections
import fnmatch
import os
import re
import string
import time
import traceback
from typing import Any, NamedTuple
import warnings

# Compiling dominates the time of tiny models: leave out what LLVM does for
# speed.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true'])

# pylint: disable=wrong-import-position
from absl import flags
import bpjax
from experiments import measurement
import jax
import jax.numpy as jnp
import numpy as np
from tests import architectures as architectures_lib
from tests import expected
from tests import float64

_ARCHITECTURES = flags.DEFINE_list(
    'architectures', ['*'], 'Patterns of names, of those to run.')
_RULES = flags.DEFINE_list('rules', ['*'], 'Patterns of names.')
_REFUSALS = flags.DEFINE_integer(
    'refusals', 3, 'Kinds of refusal that need not be of the mathematics.', 0)
_TOLERANCE = flags.DEFINE_float(
    'tolerance', 1e-12, 'Largest relative deviation from `jax.grad`.', 0.)

# Rules that are backprop with other weights on the way down; the arguments are
# those with which B = W can be had.
TRANSPORTS = {
    'backprop': {}, 'feedback_alignment': {}, 'kolen_pollack': {},
    'weight_mirror': {}, 'sign_symmetry': {'variant': 'frSF'}}
# Where B = W cannot be had: the magnitudes |W| have another spectral norm than
# W, by which both are divided.
SCALED = {('spectral_norm', 'sign_symmetry')}
# Parts of the sentences that say what no program could do better.
MATHEMATICS = (
    'cannot give it a target of its own', 'normalises over the batch',
    'a derivative that is zero everywhere', 'needs labels of shape',
    'to be given a target by it', 'something that no unit owns',
    # What is added to the input has to have room in it, by these rules' definition.
    'adds the label to the', 'adds labels to the input', 'adds the error to the')
_KEY = jax.random.key(7)


class Case(NamedTuple):
  """An architecture in float64.

  Attributes:
    name: the key in `ARCHITECTURES`.
    net: the network.
    variables: the network's variables.
    x: the input, or a tuple of inputs.
    y: what the loss compares with.
    loss: one loss per example, or more.
    gradient: `jax.grad` of the mean loss by the parameters.
  """
  name: str
  net: Any
  variables: dict[str, Any]
  x: Any
  y: Any
  loss: Any
  gradient: Any


class Outcome(NamedTuple):
  """What came of a rule on an architecture.

  Attributes:
    kind: 'works', 'refused' or 'fails'.
    why: the sentence, if it does not work.
    deviation: the largest relative deviation from `jax.grad`, or None for a
      rule that is not to equal it.
  """
  kind: str
  why: str = ''
  deviation: float | None = None

  def __str__(self):
    return f'{self.kind}: {self.why}' if self.why else self.kind


def make_case(name: str) -> Case:
  """The architecture called `name`, with its gradient."""
  architecture = architectures_lib.ARCHITECTURES[name]
  net, variables = architectures_lib.network(architecture)
  variables, x, y = float64.doubles((variables, architecture.x, architecture.y))
  gradient = expected.gradient(net, architecture.loss, variables, x, y, _KEY)
  return Case(name, net, variables, x, y, architecture.loss, gradient)


def outcome(rule: str, case: Case) -> Outcome:
  """Runs a rule on an architecture, and checks what it gives."""
  try:
    wrong, deviation = check(rule, case)
    return Outcome('fails' if wrong else 'works', wrong, deviation)
  except Exception as error:  # pylint: disable=broad-except
    *_, last = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(bpjax.__file__) in last.filename
    if isinstance(error, ValueError) and own and '\n' not in str(error):
      return Outcome('refused', str(error))
    first, *_ = str(error).splitlines() or ['']
    return Outcome('fails', f'{type(error).__name__}: {first}')


def check(name: str, case: Case) -> tuple[str, float | None]:
  """What is wrong with a rule's updates, if anything; and their deviation."""
  rule = bpjax.rules.get(name)(**TRANSPORTS.get(name, {}))
  feedback = rule.init(jax.random.key(2), case.net, case.variables, case.x)
  learn = jax.jit(
      lambda variables, feedback: rule.value_and_grad(case.net, case.loss)(
          variables, feedback, case.x, case.y, key=_KEY)[1][0])
  drawn = learn(case.variables, feedback)
  lowest, gradient = _lowest(case)
  update = _of_unit(lowest, drawn)
  if not all(np.isfinite(u).all() for u in _floats(drawn)):
    return 'an update is not finite', None
  if not any(map(np.any, update)):
    return f'the update of `{lowest}` is 0', None
  if name == 'forward_gradient':
    mean = expected.mean_update(
        rule, case.net, case.loss, case.variables, case.x, case.y, _KEY)
    return _compared(mean, case.gradient, 1e-3 if _is_single(case) else None)
  if name not in TRANSPORTS or (case.name, name) in SCALED:
    return '', None
  if jax.tree.leaves(feedback) and deviation(update, gradient) < 1e-6:
    return f'`{lowest}` learns by the gradient, whatever the feedback', None
  return _compared(
      learn(case.variables, weights_for(rule, case, feedback)), case.gradient)


def weights_for(rule: Any, case: Case, feedback: Any) -> Any:
  """The feedback with which a rule sends down what backprop does."""
  of = jnp.abs if rule.name == 'sign_symmetry' else lambda weights: weights
  return jax.tree.unflatten(jax.tree.structure(feedback), [
      of(bpjax.paths.subtree(case.variables['params'], name))
      for name in bpjax.paths.leaf_names(feedback)])


def deviation(a: Any, b: Any) -> float:
  """The largest difference of two leaves, over the leaf's largest entry.

  A leaf of which the exact value is 0 (a key's bias) holds rounding alone: the
  largest entry of all, by a thousandth, is the least that is divided by.
  """
  pairs = list(zip(_floats(a), _floats(b), strict=True))
  largest = max((np.abs(q).max(initial=0) for _, q in pairs), default=0.)
  return max((
      float(np.abs(p - q).max(initial=0)
            / (max(np.abs(q).max(initial=0), 1e-3 * largest) or 1.))
      for p, q in pairs), default=0.)


def _compared(grads, gradient, tolerance=None):
  found = deviation(grads, gradient)
  wrong = not found <= (tolerance or _TOLERANCE.value)
  return f'{found:.1e} from `jax.grad`' if wrong else '', found


def _is_single(case):
  """Whether a model computes in float32 though it is given float64."""
  trace = jax.make_jaxpr(lambda v: case.net.apply(v, case.x))(case.variables)
  return 'f32[' in str(trace)


def _floats(tree):
  return [np.asarray(a) for a in jax.tree.leaves(tree)
          if jnp.issubdtype(a.dtype, jnp.inexact)]


def _lowest(case):
  """The first unit that the loss depends on, and its gradient."""
  for unit in case.net.units:
    gradient = _of_unit(unit, case.gradient)
    if any(map(np.any, gradient)):
      return unit, gradient
  raise ValueError('no unit has a gradient')


def _of_unit(unit, grads):
  """What a tree holds for the parameters of a unit."""
  module = unit.partition('/#')[0]
  return _floats([
      leaf for name, leaf in zip(
          bpjax.paths.leaf_names(grads), jax.tree.leaves(grads))
      if bpjax.paths.is_inside(name, module)])


def kind(sentence: str) -> str:
  """A sentence without the names and numbers in it."""
  named = re.sub(r'`[^`]*`(, `[^`]*`)*', '`_`', sentence)
  return re.sub(r'\d+', 'N', re.sub(r'\([^()]*\d[^()]*\)', '(_)', named))


def column(rule: str) -> str:
  """The initials of a rule.

  Example:
    >>> column('direct_feedback_alignment')
    'DFA'
  """
  initials = ''.join(word[0] for word in rule.split('_'))
  return initials.upper() if len(initials) > 1 else rule[:2].upper()


def show(found: dict[str, dict[str, Outcome]]) -> None:
  """The table: architectures by rules; a letter is a sentence below it."""
  letters = {}
  rules = list(next(iter(found.values())))
  table = measurement.table(
      '+ works; deviation: the largest from `jax.grad`', 'architecture',
      *map(column, rules), 'deviation')
  for name, row in found.items():
    cells = []
    for rule, result in row.items():
      label = (result.kind, kind(result.why))
      mark = letters.setdefault(label, _letter(len(letters))) if (
          result.why) else '+'
      cells.append(mark.upper() if result.kind == 'fails' else mark)
    worst = [r.deviation for r in row.values() if r.deviation is not None]
    table.add_row(name, *cells, f'{max(worst):.0e}' if worst else '')
  measurement.show(table)
  print(', '.join(f'{column(r)} {r}' for r in rules))
  for (outcome_kind, sentence), letter in letters.items():
    print(f'{letter}  {outcome_kind}: {sentence}')


def _letter(i):
  return string.ascii_lowercase[i] if i < 26 else f'a{_letter(i - 26)}'


def summary(found: dict[str, dict[str, Outcome]]) -> dict[str, Any]:
  """How many pairs work; how many are refused, by sentence; how many fail."""
  outcomes = [o for row in found.values() for o in row.values()]
  counts = collections.Counter(o.kind for o in outcomes)
  refused = collections.Counter(
      kind(o.why) for o in outcomes if o.kind == 'refused')
  proven = lambda sentence: any(part in sentence for part in MATHEMATICS)
  return {
      'works': counts['works'], 'refused': counts['refused'],
      'fails': counts['fails'],
      'refused_by_the_mathematics': {
          s: n for s, n in refused.items() if proven(s)},
      'refused_otherwise': {
          s: n for s, n in refused.items() if not proven(s)}}


def _chosen(names, patterns, flag):
  chosen = [n for n in names
            if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
  if not chosen:
    raise measurement.FlagError(
        f'`{flag}` must match a name, got {",".join(patterns)!r}; there are '
        f'{", ".join(names)}.')
  return chosen


def _measure(picture):
  del picture
  names = _chosen(
      architectures_lib.ARCHITECTURES, _ARCHITECTURES.value, 'architectures')
  rules = _chosen(bpjax.rules.names(), _RULES.value, 'rules')
  warnings.simplefilter('ignore')  # Of weights that stay exact.
  begin, found = time.time(), {}
  for name in names:
    case = make_case(name)
    found[name] = {rule: outcome(rule, case) for rule in rules}
    counts = collections.Counter(o.kind for o in found[name].values())
    print(f'{time.time() - begin:5.0f} s  {name}: {dict(counts)}', flush=True)
    jax.clear_caches()  # Hundreds of programs, none of which runs again.
  show(found)
  counts = summary(found)
  print(f'{counts["works"]} work, {counts["refused"]} are refused, '
        f'{counts["fails"]} fail')
  wrong = [
      f'{name}, {rule}: {result}' for name, row in found.items()
      for rule, result in row.items() if result.kind == 'fails']
  others = counts['refused_otherwise']
  if len(others) > _REFUSALS.value:
    wrong.append(f'{len(others)} kinds of refusal are not of the mathematics')
  deviations = [r.deviation for row in found.values() for r in row.values()
                if r.deviation is not None]
  return {
      'seconds': time.time() - begin, **counts,
      'largest_deviation': max(deviations, default=None),
      'outcomes': {
          name: {rule: str(result) for rule, result in row.items()}
          for name, row in found.items()}}, wrong


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_x64', True)
  measurement.main('model_zoo', _measure, plot=False)
