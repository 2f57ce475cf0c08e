"""What units and contacts are called, and what each is made of."""

from __future__ import annotations

import dataclasses

from bpjax import paths
from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib


@dataclasses.dataclass(eq=False)
class Entry:
  """A unit of a trace.

  Attributes:
    name: its name.
    base: the path under which the names of its parameters begin.
    step: its first call that has something to send, else its first.
    calls: how many calls the trace has.
    principal: the paths of the parameters that are its weights.
    others: those of gains and the like inside the view of the weights.
    biases: those of its biases.
  """
  name: str
  base: str
  step: trace_lib.Step
  calls: int
  principal: tuple[str, ...]
  others: tuple[str, ...] = ()
  biases: tuple[str, ...] = ()

  def relative(self, leaf: str) -> str:
    """The name of a parameter inside the unit."""
    return leaf[len(self.base) + 1:] if self.base else leaf


def name_units(plan, sizes, chosen):
  """Unit -> entry; every step of a unit gets its name and index."""
  groups = {}
  for step, _ in plan.walk():
    if step.how == 'unit':
      largest = max(sizes[leaf] for leaf in step.view.leaves)
      principal = tuple(l for l in step.view.leaves if sizes[l] == largest)
      key = (principal, _signature(step))
      groups.setdefault(key, []).append(step)
  modules = {name: {} for name in chosen}
  for principal, _ in groups:
    module = module_of(principal, chosen)
    modules.setdefault(module, dict.fromkeys(()))[principal] = None
  for module in chosen:
    if len(modules[module]) != 1:
      raise ValueError(
          f'`is_unit` chose `{module}`, which calls {len(modules[module])} '
          'affine operations, and a unit has exactly one; choose other modules, '
          'inside it or around it.')
  entries, numbers, used = {}, {}, set()
  for (principal, _), steps in groups.items():
    module = module_of(principal, chosen)
    base_path, first = module, module
    alone = len(modules[module]) == 1 and (
        module or principal[0] in ('kernel', 'embedding')) and not any(
            other != module and paths.is_inside(other, module)
            for other in modules if module)
    if not alone and (len(principal) == 1 or not module):
      first = principal[0]
    name = first
    if name in used:
      numbers[first] = numbers.get(first, 0) + 1
      name = f'{first}/#{numbers[first]}' if first else f'#{numbers[first]}'
    used.add(name)
    main = next((s for s in steps if s.operation != 'lookup'), steps[0])
    entry = Entry(
        name, base_path, main, len(steps), principal,
        tuple(sorted({leaf for s in steps for leaf in s.view.leaves
                      if leaf not in principal})),
        tuple(dict.fromkeys(
            leaf for s in steps for v, view in s.params.items()
            if v is not s.weights for leaf in view.leaves)))
    entries[name] = entry
    for index, step in enumerate(steps):
      step.name, step.index = name, index
  order = dict.fromkeys(
      step.name for step, _ in plan.walk() if step.how == 'unit')
  return {name: entries[name] for name in order}


def name_contacts(plan, entries):
  """Name -> parameters, of all that is visited; contacts get their names."""
  points = {
      name: (*e.principal, *e.others, *e.biases) for name, e in entries.items()}
  counts = {}
  for step, _ in plan.walk():
    if step.how != 'contact':
      if step.how == 'mark' or step.how == 'bind' and step.name:
        step.index = counts.setdefault(step.name, 0)
        counts[step.name] += 1
      continue
    leaves = tuple(dict.fromkeys(
        leaf for view in step.params.values() for leaf in view.leaves))
    module = module_of(leaves)
    step.name = module if len(leaves) > 1 and module else leaves[0]
    if step.name in entries:
      step.name = leaves[0]
    if step.name in entries:  # A weight that meets data in both ways.
      step.name = f'{leaves[0]}/contact'
    step.index = counts.setdefault(step.name, 0)
    counts[step.name] += 1
    points[step.name] = tuple(
        dict.fromkeys((*points.get(step.name, ()), *leaves)))
  return points


def place(plan):
  """Notes in every plan what is visited inside, and which loops slice what."""
  for step in plan.steps:
    for inner in step.inner:
      place(inner)
      plan.calls |= inner.calls
      plan.loops |= inner.loops
    if step.how in ('unit', 'contact', 'mark'):
      name = step.name
      if step.how == 'mark' and name.startswith(trace_lib.BOUNDARY):
        name = unit_lib.boundary_name(name.removeprefix(trace_lib.BOUNDARY))
      plan.calls.add((name, step.index))
    if step.members:
      plan.loops[step.name] = plan.loops[step.members[0]]
    elif step.how == 'unit':
      plan.loops[step.name] = tuple(loop for loop, _ in step.view.loops)


_AND = ' + '  # Between the names of units that share a segment.


def joint_name(members):
  """What owns a segment that units share: `attention/query + key + value`."""
  around = module_of(members)
  first = len(around) + 1 if around else 0
  own = _AND.join(name[first:] for name in members)
  return f'{around}/{own}' if around else own


def leader(name):
  """The first of the units that share a segment; the name of any other unit."""
  return name.partition(_AND)[0]


def _signature(step):
  """What tells two ways of using one weight apart."""
  eqn, shape = step.eqn, step.weights.aval.shape
  p = eqn.params
  side = list(eqn.invars[:2]).index(step.weights)
  if 'dimension_numbers' not in p or step.operation == 'lookup':
    return step.operation, shape, step.view.turns
  numbers = p['dimension_numbers']
  if step.operation == 'dot_general':
    (contracting, batch) = numbers
    numbers = (contracting[side], batch[side])
  return step.operation, shape, step.view.turns, str(numbers)


def module_of(principal, chosen=()):
  """The deepest module around some parameters, or a chosen one around it."""
  parts = [leaf.split('/')[:-1] for leaf in principal]
  common = []
  for level in zip(*parts):
    if len(set(level)) > 1:
      break
    common.append(level[0])
  name = '/'.join(common)
  for module in chosen:
    if paths.is_inside(name, module):
      return module
  return name
