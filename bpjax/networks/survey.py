"""What is known of a network before any data: traced, never computed."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax.networks import flow as flow_lib
from bpjax.networks import names as names_lib
from bpjax.networks import reach as reach_lib
from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib
import jax
from jax.extend.core import Literal
import jax.numpy as jnp


class Units(dict[str, base.Unit]):
  """Name -> unit, in the order of the calls; printed as a table.

  Attributes:
    exact_by: path of a parameter -> the operations outside of all units in
      which it takes part: there it keeps its exact derivative under every rule
      of the credit engine.
    exact: those paths.
    flags: the arguments by which the model is told that it is training.
  """

  def __init__(
      self, units: Mapping[str, base.Unit],
      exact_by: Mapping[str, tuple[str, ...]],
      flags: Mapping[str, Any] | None = None):
    super().__init__(units)
    self.exact_by = dict(exact_by)
    self.exact = tuple(exact_by)
    self.flags = dict(flags or {})

  def __repr__(self):
    rows = [('unit', 'operation', 'input -> output', 'parameters')]
    for name, info in self.infos.items():
      params = ', '.join(
          f'{leaf} {value.shape}' for leaf, value in zip(
              paths.leaf_names(info.params), jax.tree.leaves(info.params)))
      kind = info.kind
      if info.operation not in ('', kind):
        kind = f'{kind} ({info.operation})'
      rows.append((name or '(root)', kind,
                   f'{info.inputs[0].shape} -> {info.out.shape}', params))
    lines = _aligned(rows)
    if self.exact_by:
      lines += ['', *_aligned([
          ('exact derivative', 'in these operations, outside of all units'),
          *((n, ', '.join(by)) for n, by in self.exact_by.items())])]
    if self.flags:
      flags = ', '.join(f'{k}={v!r}' for k, v in self.flags.items())
      lines += ['', f'in training the model is called with {flags}']
    return '\n'.join(lines)

  @property
  def infos(self) -> dict[str, base.UnitInfo]:
    """Name -> what is known of the unit."""
    return {name: unit.info for name, unit in self.items()}


def _aligned(rows):
  """Rows as lines whose columns are beneath each other."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


@dataclasses.dataclass(frozen=True)
class Survey:
  """What is known of a network for inputs of one shape.

  Attributes:
    units: the units of the model, and what keeps its exact derivative.
    output: shape and dtype of the model's output.
    axes: on which axis of each output its examples lie.
    error_parts: the errors that a rule projects: of outputs, by number, and of
      the pre-activations of readouts, by name.
    lifted: the units inside a scan, a loop, a conditional or a vmap.
    blocked: the units that the output depends on and that no error can reach,
      since a derivative on the way is zero everywhere.
    batch_coupled: the modules that normalise over the batch in training.
    used: the units that the output depends on.
    detached: whether a `stop_gradient` keeps errors from a part of the model.
    mixed: unit -> why what follows it is not its own, where a rule asked for it.
    loops: whether a derivative would have to pass a `while_loop`.
    untrained: parameter -> the unit whose segment it takes part in.
    exact_sizes: parameter -> its size, of those that only take part in
      operations outside of all units.
    told: the rules that have warned of those.
    feedback_shapes: rule -> the shapes of what it keeps here, once known.
  """
  units: Units
  output: Any
  axes: tuple[int, ...]
  error_parts: tuple[int | str, ...]
  lifted: tuple[str, ...]
  blocked: tuple[str, ...]
  batch_coupled: tuple[str, ...]
  used: tuple[str, ...]
  detached: bool
  mixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  loops: bool = False
  untrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
  exact_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  told: list[str] = dataclasses.field(default_factory=list)
  feedback_shapes: dict[Any, Any] = dataclasses.field(default_factory=dict)


def take(net, traced, variables, cuts=None):
  """What rules ask of a network before any data, read off its trace."""
  flow = traced.flow
  around = {}
  order = []
  for step, outside in traced.plan.walk():
    name = flow_lib.visited(step)
    if name is not None:
      order.append((name, step))
      around.setdefault(name, set()).update(s.how for s in outside)
  names = list(dict.fromkeys(name for name, _ in order))
  found = traced.found if cuts is None else flow_lib.derivatives(
      traced.plan, len(jax.tree.leaves(traced.output)), cuts)
  units = {}
  outs = {}
  examples = _examples(traced)
  for name in names:
    calls = [step for n, step in order if n == name]
    entry = traced.entries.get(name)
    unit = unit_lib.Boundary()
    main = calls[0] if entry is None else entry.step
    if entry is not None or main.members:
      unit = unit_lib.TraceUnit(main, entry)
    unit.info = _info(name, unit, main, entry, traced, variables, calls, flow,
                      found, examples, units)
    units[name] = unit
    if (entry is not None or main.members) and not main.joint:
      outs[name] = unit.info.out
  pres = {name: unit.info.pre for name, unit in units.items()}
  shared = {n: unit.info.joint for n, unit in units.items() if unit.info.joint}
  for unit in units.values():
    info = unit.info
    readers = [info.joint] if info.joint else dict.fromkeys(
        shared.get(n, n) for n in info.readers)
    unit.info = dataclasses.replace(
        info, outs=outs, pres=pres, readers=tuple(readers))
  all_readers = {n: unit.info.readers for n, unit in units.items()
                 if not unit.info.joint}
  for unit in units.values():
    unit.info = dataclasses.replace(unit.info, all_readers=all_readers)
  boundaries = [n for n in names if n not in traced.entries]
  owned = {leaf for e in traced.entries.values()
           for leaf in (*e.principal, *e.others, *e.biases)}
  # How many parameters the view is made of in which one has part.
  inside = {leaf: len((*e.principal, *e.others)) for e in traced.entries.values()
            for leaf in (*e.principal, *e.others)}
  exact_sizes = {
      leaf: jnp.size(paths.subtree(variables['params'], leaf))
      for leaf, by in traced.exact.items()
      if leaf not in owned or inside.get(leaf, 1) > 1 and set(
          by) & set(trace_lib.PRODUCTS)}
  check_boundaries(net.boundaries, names, boundaries)
  return Survey(
      units=Units(units, traced.exact, net.flags), output=traced.output,
      axes=traced.axes,
      error_parts=traced.error_parts,
      lifted=tuple(n for n in names if around[n] & {'scan', 'cond'}),
      blocked=() if 'stop_gradient' in traced.operations else tuple(
          n for n in names if n in flow.used
          and n not in found.taught),
      batch_coupled=tuple(traced.notes.batch_coupled),
      used=tuple(n for n in names if n in flow.used), mixed=traced.mixed,
      loops=found.loops, untrained={
          leaf: step.name for step, _ in traced.plan.walk()
          for view in step.untrained.values() for leaf in view.leaves},
      exact_sizes=exact_sizes, detached='stop_gradient' in traced.operations)


def _info(name, unit, step, entry, traced, variables, calls, flow,
          found, examples, units):
  shape = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
  inputs = tuple(map(shape, step.inputs))
  kind, operation, params, summed = base.BOUNDARY, '', {}, None
  by_example = False
  positionwise, features = len(inputs[0].shape) == 3, 1
  if not positionwise:
    features = len(inputs[0].shape) - 1
  if entry is not None:
    own = names_lib.module_of(entry.principal)
    operation = step.operation
    kind = traced.notes.modules.get(own, operation)
    params = _unit_params(entry, step, variables['params'])
    positionwise, features, summed = _contraction(step)
  elif step.members:
    kind, operation = base.JOINT, step.operation
    positionwise, features = _of_members(
        [units[m].info for m in step.members], step, inputs)
  out = shape(step.out)
  pre = shape(step.pre or step.out)
  given, made = examples.get((name, step.index), ((None,) * len(inputs), None))
  as_kept = True
  if entry is not None:
    by_example = _by_example(step, given[0])
    as_kept = _as_kept(step, traced.plan) and not any(
        other is not entry and set(other.principal) & set(entry.principal)
        for other in traced.entries.values())
  return base.UnitInfo(
      given_examples=given, examples=made, by_example=by_example,
      joint=step.joint,
      weights_as_kept=as_kept,
      name=name, kind=kind, operation=operation, inputs=inputs, pre=pre, out=out,
      params=params,
      net_output=traced.error, is_output=name in flow.readouts,
      sends=name in found.sends, taught=name in found.taught,
      calls=len(calls), positionwise=positionwise, feature_axes=features,
      summed_axes=summed, owns_activation=unit.owns_activation,
      reads=tuple(flow.reads.get((name, i)) for i in range(len(inputs))),
      readers=tuple(dict.fromkeys(
          n for (n, i), source in flow.reads.items()
          if i == 0 and source == name)))


def _examples(traced):
  """(unit, call) -> where examples lie in its inputs, and in its output.

  Followed only where something does not have them on its first axis.
  """
  outputs = list(map(_shape, jax.tree.leaves(traced.output)))
  size = next((o.shape[axis] for o, axis in zip(outputs, traced.axes)
               if o.ndim), None)
  calls = [s for s, _ in traced.plan.walk() if s.how == 'unit']
  shapes = [v.aval.shape for s in calls for v in (*s.inputs[:1], s.out)]
  # Of two axes of that size, either may be the examples'.
  if all(s[:1] == (size,) and size not in s[1:] for s in shapes):
    return {}
  outs = [{str(i): reach_lib.identity(o.shape)[axis:axis + 1]}
          if o.shape[axis:axis + 1] == (size,) else {}
          for i, (o, axis) in enumerate(zip(outputs, traced.axes))]
  outs += [{}] * (len(traced.plan.jaxpr.outvars) - len(outs))
  found = reach_lib.follow(traced.plan, outs, values=True)

  def place(reached):
    digits = {axes[0] for axes in reached.values() if axes}
    (digit, *more), = digits if len(digits) == 1 and () not in digits else [
        (None,)]
    if more or digit is None or digit[1] is None or digit[1][0] < 0:
      return None
    return *digit[1], digit[0]

  return {call: (tuple(map(place, found.given[call])), place(reached))
          for call, reached in found.places.items() if call in found.given}


def _shape(leaf):
  return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def exact_by(plan, names, outputs, found):
  """Parameter -> the operations in which it keeps its exact derivative."""
  operations = {name: {} for name in names}

  def note(ctx, own, atom, operation):
    kind = own.kind(atom)
    if isinstance(kind, trace_lib.View) and found.is_active(ctx, atom):
      for leaf in kind.leaves:
        operations[leaf][operation] = True

  def visit(own, ctx):
    for step in own.steps:
      eqn, name = step.eqn, step.eqn.primitive.name
      for i, inner in enumerate(step.inner):
        inside = flow_lib.context(ctx, eqn, i)
        visit(inner, inside)
        outs = inner.jaxpr.outvars if step.how == 'cond' else (
            inner.jaxpr.outvars[eqn.params['num_carry']:]
            if step.how == 'scan' else ())
        for v in outs:
          note(inside, inner, v, f'{step.how} output')
      if step.how == 'scan':
        inner, = step.inner
        for outer, v in zip(eqn.invars, inner.jaxpr.invars):
          if not isinstance(inner.kind(v), trace_lib.View):
            note(ctx, own, outer, 'scan carry')
      made = eqn.outvars if step.out is None else [step.out]
      if not any(found.is_reached(ctx, v) for v in made):
        continue
      if step.how == 'contact':
        for e in step.eqns:
          for v in e.invars:
            if not isinstance(v, Literal) and v in step.params:
              note(ctx, own, v, e.primitive.name)
      elif step.how == 'unit':  # A view in the place of data: a learned query.
        for v in step.inputs:
          if v not in step.tail_inputs:
            note(ctx, own, v, name)
      elif step.how == 'bind':
        views = [v for v in eqn.invars if found.is_active(ctx, v)
                 and isinstance(own.kind(v), trace_lib.View)]
        if not step.views or name in trace_lib.PRODUCTS and len(views) > 1:
          for v in views:
            note(ctx, own, v, name)

  visit(plan, ())
  for v in plan.jaxpr.outvars[:outputs]:
    note((), plan, v, 'output')
  return {name: tuple(by) for name, by in operations.items() if by}


def error_parts(plan, flow, entries):
  """The errors that rules which project the output's error take together.

  The error of a readout is that of its pre-activation, whatever the model makes
  of it: one that ends in probabilities learns as one that ends in logits.
  """
  in_bodies = {
      s.name for s, around in plan.walk() if around and s.how == 'unit'}
  parts = []
  for i, out in enumerate(flow.outs):
    own = [out] if isinstance(out, str) else sorted(out)
    simple = [name for name in own if name in entries and (
        entries[name].calls == 1 and name not in in_bodies)]
    passed = isinstance(out, str) and not (simple and entries[out].step.tail)
    if passed or not own or simple != own or not flow.readouts.issuperset(own):
      parts.append(i)
    else:
      parts += own
  return tuple(dict.fromkeys(parts))


def axes_of_parts(parts, axes):
  """On which axis of each of `error_parts` its examples lie."""
  return tuple(axes[p] if isinstance(p, int) else 0 for p in parts)


def pre_of(entry):
  aval = (entry.step.pre or entry.step.out).aval
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _unit_params(entry, step, params):
  """Shapes of a unit's parameters, of one slice where loops hand those out."""
  loops = {}
  for view in step.params.values():
    for leaf in view.leaves:
      loops[leaf] = tuple(length for _, length in view.loops)
  shapes = {}
  for leaf in (*entry.principal, *entry.biases):
    value = paths.subtree(params, leaf)
    lengths = loops.get(leaf, ())
    size = value.shape
    if lengths and size[:len(lengths)] == lengths:
      size = size[len(lengths):]
    name = entry.relative(leaf)
    if leaf in entry.biases:
      name = unit_lib.bias_name(name)
    shapes[name] = jax.ShapeDtypeStruct(size, value.dtype)
  return paths.nest(shapes)


def _as_kept(step, plan):
  """Whether a unit's weights are a parameter itself, but for its dtype."""
  around, = (a for s, a in plan.walk() if s is step)
  plans = [plan]
  for outer in around:
    plans.append(next(
        p for p in outer.inner if (step.name, step.index) in p.calls))
  variable = step.weights
  for own, outer in zip(reversed(plans), (*reversed(around), None)):
    makers = {v: eqn for eqn in own.jaxpr.eqns for v in eqn.outvars}
    while variable in makers:
      eqn = makers[variable]
      if eqn.primitive.name not in ('convert_element_type', 'copy'):
        return False
      variable, = eqn.invars
    if variable not in own.jaxpr.invars:
      return False
    if outer is not None:
      place = list(own.jaxpr.invars).index(variable)
      variable = outer.eqn.invars[place + (outer.how == 'cond')]
  return True


def _by_example(step, place):
  """Whether a product pairs each example with weights of its own."""
  if step.operation != 'dot_general':
    return step.operation.startswith('ragged_dot')
  _, batch = step.eqn.params['dimension_numbers']
  side = list(step.eqn.invars[:2]).index(step.weights)
  return (place[0] if place else 0) in batch[1 - side]


def _of_members(infos, step, inputs):
  """Whether units that share a segment treat positions alike, and what their
  features are, as of the one unit that they are together."""
  positions = {
      len(i.inputs[0].shape) - i.feature_axes for i in infos if i.positionwise}
  pre = step.pre or step.out
  if (len(positions) == 1 and all(i.positionwise for i in infos)
      and max(positions) < pre.aval.ndim):
    return True, len(inputs[0].shape) - min(positions)
  return False, len(inputs[0].shape) - 1


def _contraction(step):
  """Whether a product treats positions alike, its feature axes, and what of the
  weights is summed over, counted from their last axis."""
  x, = step.inputs[:1]
  ndim = len(x.aval.shape)
  if step.operation != 'dot_general':
    return False, ndim - 1, None
  contracting, batch = step.eqn.params['dimension_numbers']
  side = list(step.eqn.invars[:2]).index(step.weights)
  mine = step.weights.aval.ndim
  summed = tuple(axis - mine for axis in contracting[side])
  read = sorted(contracting[1 - side])
  trailing = read == list(range(ndim - len(read), ndim)) and not batch[0]
  return trailing, len(read) if trailing else ndim - 1, summed


def check_boundaries(globs, order, boundaries):
  """Raises for a glob without a module, and where the output would be cut."""
  modules = [name.rpartition('/')[0] for name in boundaries]
  for glob in globs:
    if not any(paths.is_module(glob, module) for module in modules):
      inside = [n.rpartition('/')[0] for n in order if '/' in n]
      raise ValueError(
          f'`boundaries` has the glob {glob!r}, which fits no module that the '
          f'model calls; {paths.nearest(glob, dict.fromkeys(inside))}.')
  if modules and order[-1] == unit_lib.boundary_name(modules[-1]):
    raise ValueError(
        f'module `{modules[-1]}` of `boundaries` must be followed by a unit, '
        'since the output unit is taught by the exact error; leave it out.')
