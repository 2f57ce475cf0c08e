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
from bpjax import paths
from bpjax.engines import reduction as reduction_lib
from bpjax.networks import flow as flow_lib
from bpjax.networks import reach as reach_lib
from bpjax.networks import run as run_lib
from bpjax.networks import segments
from bpjax.networks import survey as survey_lib
from bpjax.networks import trace as trace_lib
from bpjax.networks import unit as unit_lib
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal
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


@dataclasses.dataclass(eq=False)
class Traced:
  """One trace of a network, for inputs of one shape.

  Attributes:
    plan: its plan.
    flow: which units read which.
    output: shapes and dtypes of the output.
    error: of its error, as rules that project it read it.
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
  error: Any
  error_parts: tuple[int | str, ...]
  structure: Any
  notes: Notes
  entries: Mapping[str, Entry]
  points: Mapping[str, tuple[str, ...]]
  exact: Mapping[str, tuple[str, ...]]
  found: flow_lib.Derivatives
  mixed: Mapping[str, str]
  operations: frozenset[str]
  has_key: bool
  draws: bool


class Network(survey_lib.Network):
  """A model seen as units. What `from_linen` and the others return."""
  cuts: Any = None  # Where gradients stop, see `bpjax.local.view`.

  def __init__(
      self, boundaries: Sequence[str] = (),
      chosen: Callable[[Any], bool] = lambda module: False):
    super().__init__(tuple(boundaries))
    self._is_chosen = chosen
    self.flags: Mapping[str, Any] = {}
    self._own: Mapping[str, str] = {}
    self._owning: dict[Any, Network] = {}
    self._traces: dict[Any, Traced] = {}

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

  def owning(self, own: Mapping[str, str]) -> Network:
    """The network whose units own what follows their affine operation.

    Args:
      own: unit -> how far its segment goes, see `segments`.
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
    grown = _Growth(closed, lambda: trace(_twice(x))[0], _batch(x), flat)
    names = paths.leaf_names(params)
    kinds = [trace_lib.View((name,)) for name in names]
    kinds += [trace_lib.CONST] * len(jax.tree.leaves(state))
    kinds += [trace_lib.DATA] * len(jax.tree.leaves(x))
    kinds += [trace_lib.CONST] * has_key
    sizes = dict(zip(names, map(jnp.size, jax.tree.leaves(params))))
    plan = trace_lib.Analysis(grown, flat, sizes).plan(closed, kinds)
    entries = _name_units(plan, sizes, tuple(chosen))
    points = _name_contacts(plan, entries)
    _place(plan)
    outputs = jax.tree.leaves(shape[0])
    marked = {name: segments.MARK for name in chosen if name in entries}
    mixed = segments.own(
        plan, {**self._own, **marked}, len(outputs))
    found = flow_lib.derivatives(plan, len(outputs))
    flow = flow_lib.follow(plan, len(outputs))
    parts = _error_parts(plan, flow, entries)
    error = jax.eval_shape(
        lambda o: reduction_lib.errors_together(o, _batch(x)),
        [_pre(entries[p]) if isinstance(p, str) else outputs[p] for p in parts])
    if len(parts) == 1 and parts[0] == 0:
      error = outputs[0]  # With its place on the mesh.
    return Traced(
        plan, flow, shape[0], error, parts, jax.tree.structure(shape), notes, entries, points,
        _exact(plan, names, len(outputs), found), found, mixed,
        frozenset(trace_lib.operations(closed.jaxpr)), has_key,
        has_key and any(
            closed.jaxpr.invars[-1] in eqn.invars for eqn in closed.eqns))

  def _take(self, variables, x):
    return _survey(self, self.traced(variables, x), variables, self.cuts)

  def draw_feedback(
      self, key: base.Key, variables: Mapping[str, Any], x: Any,
      params: base.Tree,
      drawers: Mapping[str, Callable[[base.Key, base.Tree], base.Tree] | None]
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
      drawers: unit -> `(key, params of one slice) -> feedback`, or None.
    """
    traced = self.traced(variables, x)
    drawn = _drawn_together(key, {
        name: (draw, self.survey(variables, x).units[name].info.params,
               traced.entries.get(name))
        for name, draw in drawers.items() if draw is not None})
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
        around = entry.base if leaf in weights else name
        _put(feedback, f'{around}/{leaf}' if around else leaf, value)
      if weights & set(paths.leaf_names(own)):
        for leaf in entry.others:
          _put(feedback, leaf, paths.subtree(params, leaf))
    return feedback

  def run(
      self, variables: Mapping[str, Any], x: Any,
      visit: Callable[[Call], Any], key: base.Key | None,
      mutable: Sequence[str], owners: bool = False,
      watch: Callable[[str], None] | None = None, cuts: Any = None,
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
      watch: is told the name of every module that normalises over the batch.
      cuts: where gradients stop, see `bpjax.local.view`.
      train: False for evaluation mode.

    Returns:
      The model's output, and the mutable collections.
    """
    model_key, rule_key = (None, None) if key is None else jax.random.split(key)
    wants = None if cuts is None else cuts.wants
    traced = self.traced(variables, x, key is not None, train, wants)
    for name in traced.notes.batch_coupled if watch is not None else ():
      watch(name)
    state = {c: v for c, v in variables.items() if c not in _OWN}
    feedback = variables.get(base.FEEDBACK, {})
    held = {
        name: paths.subtree(feedback, name) for name, _ in traced.plan.calls}
    held |= {name: _held(feedback, e) for name, e in traced.entries.items()}
    flow = run_lib.Flow(held, _given(variables), key=rule_key)

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
    collections = {**state, **_collected(flow.kept)}
    return output, {c: collections.get(c, {}) for c in mutable}


class Call:
  """One call of one unit, inside the running model."""

  def __init__(self, step, entry, env, flow):
    self.name, self.index = step.name, step.index
    self.step = step
    self.inputs = tuple(env.read(step.inputs))
    self.unit = TraceUnit(step, entry)
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

  def __init__(self, module, index, value, flow):  # pylint: disable=super-init-not-called
    unit_lib.check_boundary(module, value)
    self.name, self.index = unit_lib.boundary_name(module), index
    self.inputs, self.params = (value,), {}
    self.unit = unit_lib.Boundary()
    self._weights_twin, self._flow = None, flow

  def taught_inputs(self):
    return self.inputs

  def original(self):
    return self.inputs[0]


class TraceUnit(unit_lib.PureUnit):
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, step: trace_lib.Step, entry: Entry | None):
    self.step = step
    self.owns_activation = bool(step.tail)
    self._names = _param_names(step, entry)
    self.weights_name = self._names.get(step.weights)

  def named(self, values: Sequence[Any]) -> base.Tree:
    """The unit's parameters by name, from their values in order."""
    return paths.nest(dict(zip(self._names.values(), values)))

  def _apply(self, params, inputs, replacement=None):
    step = self.step
    env = {v: _at(params, name) for v, name in self._names.items()}
    env.update(zip(step.inputs, inputs))
    if not step.tail:
      out = run_lib.evaluate(step.eqns, env, step.out)
      return out, out
    pre = replacement
    if pre is None:
      pre = run_lib.evaluate(step.eqns, env, step.pre)
    return run_lib.evaluate(step.tail, {**env, step.pre: pre}, step.out), pre

  def affine(self, params, inputs):
    # The segment is left out, not only its result.
    step = self.step
    size = step.inputs[0].aval.shape[0]
    if (step.has_head or self.info and self.info.by_example) and (
        inputs[0].shape[0] != size):
      return self._in_parts(params, inputs, size)
    env = {v: _at(params, name) for v, name in self._names.items()}
    env.update(zip(step.inputs, inputs))
    return run_lib.evaluate(step.eqns, env, step.pre or step.out)

  def _in_parts(self, params, inputs, size):
    """`affine` for another batch size than that of the trace.

    What a module does to its input may have the size in its equations, and
    examples may have weights of their own. Whole numbers stay as they are.
    """
    count = inputs[0].shape[0]
    parts = -(-count // size)
    cut = {i: jnp.resize(x, (parts, size, *x.shape[1:]))
           for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)}

    def one(part):
      own = tuple(part.get(i, x) for i, x in enumerate(inputs))
      return self.affine(params, own)

    # Ragged products cannot be batched.
    loop = jax.lax.map if self.info.by_example else lambda f, xs: jax.vmap(f)(xs)
    out = loop(one, cut)
    return out.reshape(-1, *out.shape[2:])[:count]


def _drawn_together(key, drawers):
  """Unit -> what its `(draw, shapes, entry)` draws; the same programs at once.

  To compile one draw of many weights takes a fraction of many draws' time.
  """
  programs = {}
  for i, (name, (draw, shapes, entry)) in enumerate(drawers.items()):
    lengths = () if entry is None else tuple(
        length for _, length in entry.step.view.loops)
    one = functools.partial(_slices, draw, shapes, lengths)
    closed, out = jax.make_jaxpr(one, return_shape=True)(key)
    same = (str(closed.jaxpr), jax.tree.structure(out),
            *([] if not closed.consts else [name]))
    programs.setdefault(same, (one, []))[1].append((i, name))

  def draw_all(key):
    # One after the other: XLA compiles a loop's body once.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        jnp.arange(len(drawers)))
    return [jax.lax.map(one, keys[jnp.array([i for i, _ in members])])
            for one, members in programs.values()]

  drawn = {}
  stacks = jax.jit(draw_all)(key)
  for together, (_, members) in zip(stacks, programs.values()):
    for i, (_, name) in enumerate(members):
      drawn[name] = jax.tree.map(lambda a: _row(a, i), together)  # pylint: disable=cell-var-from-loop
  return drawn


@jax.jit
def _row(stack, i):
  """One of several; compiled once a shape, and not once a row."""
  return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def _slices(draw, shapes, lengths, key):
  """What is drawn for every slice that loops hand out."""
  one = lambda key: draw(key, shapes)
  for _ in lengths:
    one = jax.vmap(one)
  return one(jax.random.split(key, lengths) if lengths else key)


def _param_names(step, entry):
  """Variable -> the name of what it is made of, inside the unit."""
  names, taken = {}, set()
  for variable, view in step.params.items():
    leaves = view.leaves
    if entry is not None and variable is step.weights:
      leaves = entry.principal
    name = leaves[0] if entry is None else entry.relative(leaves[0])
    if entry is not None and variable is not step.weights:
      name = _bias_name(name)
    while name in taken:
      name += '_again'
    taken.add(name)
    names[variable] = name
  return names


def _bias_name(name):
  """Biases are called so for rules, whatever the model calls them."""
  around = name.rpartition('/')[0]
  return f'{around}/bias' if around else 'bias'


def _at(tree, name):
  for part in name.split('/'):
    tree = tree[part]
  return tree


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


def _held(feedback, entry):
  """What a rule keeps at a unit besides weights in the place of its own."""
  part = paths.of_unit(feedback, entry.name)
  if not isinstance(part, Mapping):
    return None if entry.name in entry.principal and not isinstance(
        paths.subtree(feedback, entry.name), Mapping) else part
  own = {entry.relative(leaf) for leaf in (*entry.principal, *entry.others)}
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
    if collection == base.FEEDBACK or collection not in variables:
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
    return visit(BoundaryCall(module, step.index, value, flow))
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


def _twice(x):
  """`x` with twice the batch, as shapes."""
  size = _batch(x)

  def double(leaf):
    shape = jnp.shape(leaf)
    if not shape or shape[0] != size:
      return leaf
    return jax.ShapeDtypeStruct((2 * size, *shape[1:]), leaf.dtype)

  return jax.tree.map(double, x)


def _batch(x):
  """The number of examples: the size of the first axis of the first array."""
  return next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(x)
               if jnp.ndim(leaf)), None)


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


def _name_units(plan, sizes, chosen):
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
    module = _module(principal, chosen)
    modules.setdefault(module, dict.fromkeys(()))[principal] = None
  for module in chosen:
    if len(modules[module]) != 1:
      raise ValueError(
          f'`is_unit` chose `{module}`, which calls {len(modules[module])} '
          'affine operations, and a unit has exactly one; choose other modules, '
          'inside it or around it.')
  entries, numbers, used = {}, {}, set()
  for (principal, _), steps in groups.items():
    module = _module(principal, chosen)
    base_path, first = module, module
    alone = len(modules[module]) == 1 and (
        module or principal[0] in ('kernel', 'embedding'))
    if not alone and len(principal) == 1:
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


def _module(principal, chosen=()):
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


def _name_contacts(plan, entries):
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
    module = _module(leaves)
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


def _place(plan):
  """Notes in every plan what is visited inside, and which loops slice what."""
  for step in plan.steps:
    for inner in step.inner:
      _place(inner)
      plan.calls |= inner.calls
      plan.loops |= inner.loops
    if step.how in ('unit', 'contact', 'mark'):
      name = step.name
      if step.how == 'mark' and name.startswith(BOUNDARY):
        name = unit_lib.boundary_name(name.removeprefix(BOUNDARY))
      plan.calls.add((name, step.index))
    if step.how == 'unit':
      plan.loops[step.name] = tuple(loop for loop, _ in step.view.loops)


def _exact(plan, names, outputs, found):
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


def _survey(net, traced, variables, cuts=None):
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
    unit = unit_lib.Boundary() if entry is None else TraceUnit(entry.step, entry)
    main = calls[0] if entry is None else entry.step
    unit.info = _info(name, unit, main, entry, traced, variables, calls, flow,
                      found, examples)
    units[name] = unit
    if entry is not None:
      outs[name] = unit.info.out
  for unit in units.values():
    unit.info = dataclasses.replace(unit.info, outs=outs)
  boundaries = [n for n in names if n not in traced.entries]
  owned = {leaf for e in traced.entries.values()
           for leaf in (*e.principal, *e.others, *e.biases)}
  exact_sizes = {
      leaf: paths.subtree(variables['params'], leaf).size
      for leaf in traced.exact if leaf not in owned}
  survey_lib.check_boundaries(net.boundaries, names, boundaries)
  return survey_lib.Survey(
      units=survey_lib.Units(units, traced.exact, net.flags), output=traced.output,
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
          found, examples):
  shape = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
  inputs = tuple(map(shape, step.inputs))
  kind, operation, params, summed = base.BOUNDARY, '', {}, None
  by_example = False
  positionwise, features = len(inputs[0].shape) == 3, 1
  if not positionwise:
    features = len(inputs[0].shape) - 1
  if entry is not None:
    own = _module(entry.principal)
    operation = step.operation
    kind = traced.notes.modules.get(own, operation)
    params = _unit_params(entry, step, variables['params'])
    positionwise, features, summed = _contraction(step)
  out = shape(step.out)
  pre = shape(step.pre or step.out)
  given, made = examples.get((name, step.index), ((None,) * len(inputs), None))
  if entry is not None:
    by_example = _by_example(step, given[0])
  return base.UnitInfo(
      given_examples=given, examples=made, by_example=by_example,
      name=name, kind=kind, operation=operation, inputs=inputs, pre=pre, out=out, params=params,
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
  size = next((o.shape[0] for o in jax.tree.leaves(traced.output)
               if jnp.ndim(o)), None)
  calls = [s for s, _ in traced.plan.walk() if s.how == 'unit']
  if all(v.aval.shape[:1] == (size,) for s in calls
         for v in (*s.inputs[:1], s.out)):
    return {}
  outs = [{str(i): reach_lib.identity(o.shape)[:1]}
          if o.shape[:1] == (size,) else {}
          for i, o in enumerate(map(_shape, jax.tree.leaves(traced.output)))]
  outs += [{}] * (len(traced.plan.jaxpr.outvars) - len(outs))
  found = reach_lib.follow(traced.plan, outs, values=True)

  def place(reached):
    digits = {axes[0] for axes in reached.values() if axes}
    (digit, *more), = digits if len(digits) == 1 else [(None,)]
    if more or digit is None or digit[1] is None or digit[1][0] < 0:
      return None
    return *digit[1], digit[0]

  return {call: (tuple(map(place, found.given[call])), place(reached))
          for call, reached in found.places.items() if call in found.given}


def _shape(leaf):
  return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _error_parts(plan, flow, entries):
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


def _pre(entry):
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
      name = _bias_name(name)
    shapes[name] = jax.ShapeDtypeStruct(size, value.dtype)
  return paths.nest(shapes)


def _by_example(step, place):
  """Whether a product pairs each example with weights of its own."""
  if step.operation != 'dot_general':
    return step.operation.startswith('ragged_dot')
  _, batch = step.eqn.params['dimension_numbers']
  side = list(step.eqn.invars[:2]).index(step.weights)
  return (place[0] if place else 0) in batch[1 - side]


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
