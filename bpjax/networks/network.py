"""A model as a network of units: its trace, what is known of it, and its runs.

A subclass says how the model is called (`_call`); everything else is read off
the trace of that call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
import functools
from typing import Any

from bpjax import base
from bpjax import drawing
from bpjax import inputs as inputs_lib
from bpjax import paths
from bpjax.engines import reduction as reduction_lib
from bpjax.networks import flow as flow_lib
from bpjax.networks import names as names_lib
from bpjax.networks import run as run_lib
from bpjax.networks import segments
from bpjax.networks import survey as survey_lib
from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
import jax.numpy as jnp

_OWN = ('params', *base.COLLECTIONS)
BOUNDARY, ENTER = trace_lib.BOUNDARY, trace_lib.ENTER
LEAVE, LAYER, HEAD = trace_lib.LEAVE, trace_lib.LAYER, trace_lib.HEAD


def mark(kind: str, name: str, value: Any) -> Any:
  """`value`, whose arrays have a name in the trace."""
  if kind == LEAVE:
    unit_lib.check_block(name, value)
  label = f'{trace_lib.MARK}{kind}{name}'
  is_float = lambda leaf: hasattr(leaf, 'dtype') and jnp.issubdtype(
      leaf.dtype, jnp.inexact)
  return jax.tree.map(
      lambda leaf: checkpoint_name(leaf, label) if is_float(leaf) else leaf,
      value)


class Notes:
  """What a model's modules tell while the model is traced.

  Attributes:
    modules: path -> class name, of every module that was called.
    batch_coupled: the modules that normalise over the batch.
    wants: `(kind, path, module) -> bool`: which values of modules get a mark.
  """

  def __init__(self, wants: Callable[[str, str, Any], bool]):
    self.modules: dict[str, str] = {}
    self.batch_coupled: dict[str, bool] = {}
    self.wants = wants

  def called(
      self, name: str, module: Any, call: Callable[..., Any], args: Any,
      kwargs: Any) -> Any:
    """What `call` makes of a module's arguments, with the marks asked for."""
    for kind, mark_kind in ((LAYER, HEAD), (ENTER, ENTER)):
      if self.wants(kind, name, module):
        args, kwargs = mark(mark_kind, name, (args, kwargs))
    out = call(*args, **kwargs)
    for kind in (LAYER, BOUNDARY, LEAVE):
      if self.wants(kind, name, module):
        out = mark(kind, name, out)
    return out


@dataclasses.dataclass(eq=False)
class Traced:
  """One trace of a network, for inputs of one shape.

  Attributes:
    plan: its plan.
    flow: which units read which.
    output: shapes and dtypes of the output.
    axes: on which axis of each output its examples lie.
    error: of its error, as rules that project it read it: examples first.
    error_parts: what that is made of: the errors of outputs, by number, and of
      the pre-activations of readouts, by name.
    structure: of (output, state).
    notes: what its modules said.
    entries: unit -> what is read off the trace.
    points: unit or other module -> the parameters that meet data there.
    exact: parameter -> the operations in which it keeps its exact derivative.
    found: where it has derivatives.
    mixed: unit -> why it has no segment of its own, where it was to have one.
    operations: the primitives of the trace, in inner jaxprs, too.
    has_key: whether its last input is a key.
    draws: whether the model draws from that.
  """
  plan: trace_lib.Plan
  flow: flow_lib.Flow
  output: Any
  axes: tuple[int, ...]
  error: Any
  error_parts: tuple[int | str, ...]
  structure: Any
  notes: Notes
  entries: Mapping[str, names_lib.Entry]
  points: Mapping[str, tuple[str, ...]]
  exact: Mapping[str, tuple[str, ...]]
  found: flow_lib.Derivatives
  mixed: Mapping[str, str]
  operations: frozenset[str]
  has_key: bool
  draws: bool


class Network:
  """A model seen as units. What `from_linen` and the others return."""
  cuts: Any = None  # Where gradients stop, see `bpjax.local.view`.

  def __init__(
      self, boundaries: Sequence[str] = (),
      chosen: Callable[[Any], bool] = lambda module: False,
      mask: str = 'mask'):
    self.boundaries, self.mask = tuple(boundaries), mask
    self.views: dict[Any, Any] = {}  # Of `bpjax.local`: what cuts it -> the result.
    self._surveys: dict[Any, survey_lib.Survey] = {}
    self._latest: survey_lib.Survey | None = None
    self._is_chosen = chosen
    self.flags: Mapping[str, Any] = {}
    self._own: Mapping[str, segments.Policy] = {}
    self._owning: dict[Any, Network] = {}
    self._traces: dict[Any, Traced] = {}

  @property
  def units(self) -> survey_lib.Units:
    """Name -> unit, in the order of the calls.

    A unit has `info` and its pure functions (`bpjax.Unit`): what
    `rule.backward` takes. `net.units.exact` lists the parameters that meet data
    outside of all units (gains of norms, embeddings that are added): there a
    credit rule leaves them on their exact gradient, unless it teaches by targets,
    which do not train the gains inside a unit (`rule.units(net, variables, x)`
    says which). Known once the network has seen an input's shape (`init`).
    """
    if self._latest is None:
      raise ValueError(
          '`net.units` is not known before the network has seen an input; call '
          '`net.init(key, x)` or `rule.init` first.')
    return self._latest.units

  def real(self, x: Any) -> base.Array | None:
    """Which positions of the input are real, bool `[batch, positions]`, or None."""
    return inputs_lib.mask(x, self.mask)

  def survey(self, variables: Mapping[str, Any], x: Any) -> survey_lib.Survey:
    """What is known of the units for inputs of this shape; traced once."""
    leaves, structure = jax.tree.flatten((variables, x))
    cache_key = (structure, tuple(map(jax.typeof, leaves)))
    if cache_key not in self._surveys:
      self._surveys[cache_key] = self._take(variables, x)
    self._latest = self._surveys[cache_key]
    return self._latest

  def _call(
      self, params: base.Tree, state: Mapping[str, base.Tree], x: Any,
      key: base.Key | None, train: bool, notes: Notes
  ) -> tuple[Any, dict[str, base.Tree]]:
    """The model as a pure function: its output and its new state."""
    raise NotImplementedError

  def traced(
      self, variables: Mapping[str, Any], x: Any, has_key: bool = True,
      train: bool = True, wants: Callable[[str, str, Any], bool] | None = None
  ) -> Traced:
    """The trace for inputs of this shape; made once.

    Without a key it is the one with a key, unless that draws from it: then the
    model says what it does without.
    """
    if not has_key:
      traced = self.traced(variables, x, True, train, wants)
      if not traced.draws:
        return traced
    state = {c: v for c, v in variables.items() if c not in _OWN}
    args = (variables['params'], state, x)
    leaves, structure = jax.tree.flatten(args)
    cache_key = (
        structure, tuple(map(jax.typeof, leaves)), has_key, train, wants,
        tuple(self._own.items()))
    if cache_key not in self._traces:
      self._traces[cache_key] = self._trace(*args, has_key, train, wants)
    return self._traces[cache_key]

  def owning(self, own: Mapping[str, segments.Policy]) -> Network:
    """The network whose units own what follows their affine operation.

    Args:
      own: unit -> how it owns that, see `segments.Policy`.
    """
    key = tuple(own.items())
    if key not in self._owning:
      net = copy.copy(self)
      net._own, net._surveys = dict(own), {}  # pylint: disable=protected-access
      net.views = {}
      self._owning[key] = net
    return self._owning[key] if own else self

  def _trace(self, params, state, x, has_key, train, wants):
    chosen: dict[str, bool] = {}

    def wanted(kind, name, module):
      if kind == LAYER:
        if self._is_chosen(module):
          chosen[name] = True
        return name in chosen
      if kind == BOUNDARY:
        return any(paths.is_module(glob, name) for glob in self.boundaries)
      return wants is not None and wants(kind, name, module)

    def trace(x):
      notes = Notes(wanted)
      key = jax.random.key(0) if has_key else None
      jaxpr, shape = jax.make_jaxpr(
          lambda *args: self._call(*args, train, notes), return_shape=True)(
              params, state, x, key)
      alive, _ = partial_eval.dce_jaxpr(
          jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
      return ClosedJaxpr(alive, jaxpr.consts), shape, notes

    closed, shape, notes = trace(x)
    flat = trace_lib.Flattener()
    size = _batch(x, shape[0])
    larger = functools.cache(lambda: trace(_twice(x, size)))
    grown = _Growth(closed, lambda: larger()[0], size, flat)
    names = paths.leaf_names(params)
    for name in names:
      if names.count(name) > 1:
        raise ValueError(
            f'two parameters have the path `{name}`, since keys are joined with '
            '`/`; rename one of them.')
    kinds = [trace_lib.View((name,)) for name in names]
    kinds += [trace_lib.CONST] * len(jax.tree.leaves(state))
    kinds += [trace_lib.DATA] * len(jax.tree.leaves(x))
    kinds += [trace_lib.CONST] * has_key
    sizes = dict(zip(names, map(jnp.size, jax.tree.leaves(params))))
    plan = trace_lib.Analysis(grown, flat, sizes).plan(closed, kinds)
    entries = names_lib.name_units(plan, sizes, tuple(chosen))
    points = names_lib.name_contacts(plan, entries)
    names_lib.place(plan)
    outputs = jax.tree.leaves(shape[0])
    marked = {name: segments.Policy(segments.MARK)
              for name in chosen if name in entries}
    mixed = segments.own(
        plan, {**self._own, **marked}, len(outputs))
    flow_lib.note_stacked(plan)
    found = flow_lib.derivatives(plan, len(outputs))
    flow = flow_lib.follow(plan, len(outputs))
    parts = survey_lib.error_parts(plan, flow, entries)
    axes = _example_axes(outputs, size, larger)
    error = jax.eval_shape(
        lambda o: reduction_lib.errors_together(
            o, size, survey_lib.axes_of_parts(parts, axes)),
        [outputs[p] if isinstance(p, int) else survey_lib.pre_of(entries[p])
         for p in parts])
    if len(parts) == 1 and parts[0] == 0 and not axes[0]:
      error = outputs[0]  # With its place on the mesh.
    return Traced(
        plan, flow, shape[0], axes, error, parts, jax.tree.structure(shape), notes,
        entries, points, survey_lib.exact_by(plan, names, len(outputs), found), found,
        mixed, frozenset(trace_lib.operations(closed.jaxpr)), has_key,
        has_key and any(
            closed.jaxpr.invars[-1] in eqn.invars for eqn in closed.eqns))

  def _take(self, variables, x):
    return survey_lib.take(self, self.traced(variables, x), variables, self.cuts)

  def alike(self, variables: Mapping[str, Any], x: Any) -> Mapping[Any, int]:
    """How many calls of units compute the same, by `TraceUnit.program`."""
    traced = self.traced(variables, x)
    return unit_lib.alike(traced.plan, traced.entries)

  def draw_feedback(
      self, key: base.Key, variables: Mapping[str, Any], x: Any,
      params: base.Tree,
      drawers: Mapping[str, tuple[Callable[..., base.Tree], base.UnitInfo] | None]
  ) -> dict[str, Any]:
    """Feedback nested as the parameters are, unit by unit.

    A unit of which a loop takes a slice a turn gets feedback for every slice.
    What lies inside the view of some weights besides them (the gain of a weight
    norm) is copied.

    Args:
      key: a random key.
      variables: the network's variables; only their shapes matter.
      x: an input; only its shape matters.
      params: the parameters, which are copied from.
      drawers: unit -> (`(key, info, params of one slice) -> feedback`, its info),
        or None.
    """
    traced = self.traced(variables, x)
    drawn = drawing.drawn_together(key, {
        name: drawing.Drawer(
            *drawer, self.survey(variables, x).units[name].info.params,
            _turns(traced.entries.get(names_lib.leader(name))))
        for name, drawer in drawers.items() if drawer is not None})
    feedback = {}
    for name in drawers:
      own, entry = drawn.get(name), traced.entries.get(name)
      if own is None:
        continue
      if entry is None or not isinstance(own, Mapping):
        # Where the name is a parameter's, or that of other uses, too.
        shared = entry is not None and name in entry.principal or any(
            other.startswith(f'{name}/#') for other in drawers)
        _put(feedback, f'{name}/{paths.BARE}' if shared else name, own)
        continue
      weights = {entry.relative(leaf) for leaf in entry.principal}
      for leaf, value in zip(paths.leaf_names(own), jax.tree.leaves(own)):
        around = entry.base if leaf in weights else _beside(entry)
        _put(feedback, f'{around}/{leaf}' if around else leaf, value)
      if weights & set(paths.leaf_names(own)):
        for leaf in entry.others:
          _put(feedback, leaf, paths.subtree(params, leaf))
    return feedback

  def run(
      self, variables: Mapping[str, Any], x: Any,
      visit: Callable[[Call], Any], key: base.Key | None,
      mutable: Sequence[str], owners: bool = False, cuts: Any = None,
      train: bool = True) -> tuple[Any, dict[str, Any]]:
    """Runs the model; `visit` answers for every unit's call.

    Args:
      variables: all collections, those of the engine included.
      x: the input or the tuple of inputs.
      visit: takes a `Call` and returns the unit's output.
      key: for the model's random streams and the rule's, or None.
      mutable: the collections to return.
      owners: visit all places at which parameters meet data, gains and shifts of
        norms included, and no boundaries.
      cuts: where gradients stop, see `bpjax.local.view`.
      train: False for evaluation mode.

    Returns:
      The model's output, and the mutable collections.
    """
    model_key, rule_key = (None, None) if key is None else jax.random.split(key)
    wants = None if cuts is None else cuts.wants
    traced = self.traced(variables, x, key is not None, train, wants)
    state = {c: v for c, v in variables.items() if c not in _OWN}
    feedback = variables.get(base.FEEDBACK, {})
    held = {
        name: paths.subtree(feedback, name) for name, _ in traced.plan.calls}
    # Several units may share a module, and so a part of the feedback.
    weights = {leaf for e in traced.entries.values()
               for leaf in (*e.principal, *e.others)}
    held |= {
        name: _held(feedback, e, weights) for name, e in traced.entries.items()}
    flow = run_lib.Flow(
        held, _given(variables), tokens=dict(variables.get(base.TOKENS, {})),
        key=rule_key)

    def answer(step, env, flow):
      if step.how == 'mark':
        return _pass_mark(step, env, flow, visit, owners, cuts)
      if step.how == 'contact' and not owners:
        return run_lib.evaluate(step.eqns, env, step.out)
      return visit(Call(step, traced.entries.get(step.name), env, flow))

    values = jax.tree.leaves((variables['params'], state, x))
    if traced.has_key:  # One that is not read stands in for one not given.
      values.append(jax.random.key(0) if model_key is None else model_key)
    names = paths.leaf_names(variables['params'])
    twins = [_twin(feedback, name) for name in names]
    twins += [None] * (len(values) - len(twins))
    outs, _ = run_lib.Runner(answer).run(traced.plan, values, twins, flow)
    output, state = jax.tree.unflatten(traced.structure, outs)
    collections = {
        **state, **_collected(flow.kept), base.TOKENS: flow.tokens}
    return output, {c: collections.get(c, {}) for c in mutable}


class Call:
  """One call of one unit, inside the running model."""

  def __init__(self, step, entry, env, flow):
    self.name, self.index = step.name, step.index
    self.step, self.reads_stacked = step, step.reads_stacked
    self.inputs = tuple(env.read(step.inputs))
    self.unit = unit_lib.TraceUnit(step, entry)
    self.params = self.unit.named(env.read(step.params))
    self._weights_twin = None
    if step.weights is not None:
      self._weights_twin, = env.twins([step.weights])
    self._flow = flow

  def taught_inputs(self) -> tuple[Any, ...]:
    """The inputs, without derivatives to parameters inside the segment."""
    return tuple(
        jax.lax.stop_gradient(value) if v in self.step.untrained else value
        for v, value in zip(self.step.inputs, self.inputs))

  def original(self) -> Any:
    """The unit's output by its own equations."""
    return self.unit(self.params, self.inputs)[1]

  def feedback(self) -> Any:
    """What the rule keeps at the unit; weights as the unit itself sees them."""
    held = self._flow.held.get(self.name)
    if self._weights_twin is None:
      return held
    twin = paths.nest({self.unit.weights_name: self._weights_twin})
    return twin if held is None else _merged(twin, held)

  def read(self, collection: str, name: str | None = None) -> Any | None:
    """This call's part of a collection, or None."""
    if collection == base.FEEDBACK:
      return self.feedback()
    return self._flow.given.get((collection, self.name, f'{name}_{self.index}'))

  def write(self, collection: str, value: Any, name: str) -> None:
    """Keeps `value` as this call's part of a collection."""
    self._flow.kept[collection, self.name, f'{name}_{self.index}'] = value

  def token(self, block: str) -> Any | None:
    """The token of a block, see `run.Flow`; None: there is none."""
    return self._flow.tokens.get(block)

  def hand_on(self, block: str, token: Any) -> None:
    """Gives the token of a block to the calls that come later."""
    self._flow.tokens[block] = token

  def key(self) -> base.Key:
    """A random key of this call's own."""
    key = self._flow.next_key()
    if key is None:
      raise ValueError(
          f'the rule draws random numbers at unit `{self.name}`; pass '
          '`key=jax.random.key(...)`.')
    return key

  def has_key(self) -> bool:
    return self._flow.key is not None


class BoundaryCall(Call):
  """What a module has put out, as a call of a unit without parameters."""

  def __init__(self, module, step, value, flow):  # pylint: disable=super-init-not-called
    unit_lib.check_boundary(module, value)
    self.name, self.index = unit_lib.boundary_name(module), step.index
    self.reads_stacked = step.reads_stacked
    self.inputs, self.params = (value,), {}
    self.unit = unit_lib.Boundary()
    self._weights_twin, self._flow = None, flow

  def taught_inputs(self):
    return self.inputs

  def original(self):
    return self.inputs[0]


def _turns(entry):
  """The lengths of the loops that hand out slices of a unit's weights."""
  if entry is None:
    return ()
  return tuple(length for _, length in entry.step.view.loops)


def _merged(a, b):
  """Two nested dicts in one."""
  if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
    return b
  return {k: _merged(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k))
          for k in {**a, **b}}


def _twin(feedback, name):
  """The feedback that has the place of a parameter, or None."""
  found = paths.subtree(feedback, name)
  return None if isinstance(found, Mapping) else found


def _beside(entry):
  """Where a rule keeps what is not in the place of the unit's parameters."""
  return f'{entry.name}#' if entry.name in entry.principal else entry.name


def _held(feedback, entry, weights):
  """What a rule keeps at a unit besides weights in the place of parameters."""
  if entry.name in entry.principal:
    part = paths.subtree(feedback, _beside(entry))
    if part is not None:
      return part
  part = paths.of_unit(feedback, entry.name)
  if not isinstance(part, Mapping):
    return None if entry.name in entry.principal and not isinstance(
        paths.subtree(feedback, entry.name), Mapping) else part
  own = {entry.relative(leaf) for leaf in weights
         if paths.is_inside(leaf, entry.base)}
  rest = {
      name: leaf for name, leaf in zip(
          paths.leaf_names(part), jax.tree.leaves(part))
      if name not in own and not name.startswith('#')}
  return paths.nest(rest) or None


def _put(tree, name, value):
  """Sets what lies at a path; what is there already stays (tied weights)."""
  *around, last = name.split('/')
  for part in around:
    tree = tree.setdefault(part, {})
  tree.setdefault(last, value)


def _given(variables):
  """The engine's collections, by call."""
  given = {}
  for collection in base.COLLECTIONS:
    if collection in (base.FEEDBACK, base.TOKENS) or (
        collection not in variables):
      continue
    tree = variables[collection]
    for name, leaf in zip(paths.leaf_names(tree), jax.tree.leaves(tree)):
      unit, _, own = name.rpartition('/')
      given[collection, unit, own] = leaf
  return given


def _collected(kept):
  """What calls have left, as collections."""
  collections = {}
  for (collection, unit, name), value in kept.items():
    path = f'{unit}/{name}' if unit else name
    collections.setdefault(collection, {})[path] = value
  return {c: paths.nest(leaves) for c, leaves in collections.items()}


def _pass_mark(step, env, flow, visit, owners, cuts):
  """What a marked value becomes."""
  value, = env.read(step.inputs)
  if step.name.startswith(BOUNDARY):
    if owners:
      return value
    module = step.name.removeprefix(BOUNDARY)
    return visit(BoundaryCall(module, step, value, flow))
  if cuts is None or step.name.startswith(LAYER):
    return value
  if step.name.startswith(ENTER):
    name = step.name.removeprefix(ENTER)
    return jax.lax.stop_gradient(value) if cuts.enter(name) else value
  name = step.name.removeprefix(LEAVE)
  stops = cuts.leave(name)
  if stops is None:
    return value
  flow.kept[base.BLOCKS, name, 'output'] = value
  return cuts.onward(name, value) if stops else value


def _twice(x, size):
  """`x` with twice the batch, as shapes."""

  def double(leaf):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != size:
      return leaf
    return jax.ShapeDtypeStruct((2 * size, *shape[1:]), leaf.dtype)

  return jax.tree.map(double, x)


def _batch(x, output):
  """The number of examples: the size of the first axis of the first input of
  whose size an output has a row each, or of the first input."""
  first = lambda tree: [
      jnp.shape(leaf)[0] for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)]
  sizes, rows = first(x), first(output)
  return next((n for n in sizes if n in rows), sizes[0] if sizes else None)


def _example_axes(outputs, size, larger):
  """On which axis of each output its examples lie; the first where none is clear.

  It is the one that grows with the batch. Asked only where another one than the
  first may be meant: those of an ensemble are often `[members, batch, ...]`.
  """
  first = (0,) * len(outputs)
  shapes = list(map(jnp.shape, outputs))
  if not any(size in shape[1:] for shape in shapes):
    return first
  try:
    grown = list(map(jnp.shape, jax.tree.leaves(larger()[1][0])))
  except Exception:  # pylint: disable=broad-except
    return first  # A batch size that the model holds in its code.
  axes = [[i for i, (a, b) in enumerate(zip(*pair)) if a != b]
          for pair in zip(shapes, grown)]
  return tuple(own[0] if len(own) == 1 else 0 for own in axes)


class _Growth:
  """The variables that grow with the batch, found when one is asked for."""

  def __init__(self, closed, larger, size, flat):
    self._closed, self._larger, self._size = closed, larger, size
    self._flat = flat
    self._found = None

  def __contains__(self, variable):
    if self._found is None:
      try:
        self._found = trace_lib.grown(
            self._closed, self._larger(), self._flat) or ()
      except Exception:  # pylint: disable=broad-except
        # A batch size that the model holds in its code: no other one fits.
        self._found = ()
    if self._found == ():
      return variable.aval.shape[:1] == (self._size,)
    return variable in self._found


