"""What is known of a network before any data: traced, never computed."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax import unit as unit_lib
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var
from jax.interpreters import partial_eval
import jax.numpy as jnp

_MARK = 'bpjax:'
_MARK_INPUT = 'bpjax-input:'
# Shape, pooling, masks and constant factors, between units.
_TRANSPARENT = {
    'reshape', 'squeeze', 'expand_dims', 'transpose', 'broadcast_in_dim', 'copy',
    'convert_element_type', 'slice', 'pad', 'mul', 'div', 'select_n',
    'reduce_window_max', 'reduce_window_sum', 'reduce_sum', 'reduce_max'}
_POSITIONWISE = ('Dense', 'DenseGeneral', 'Linear', 'LinearGeneral')
_JITS = {'jit', 'pjit'}
_LOOPS = {'scan', 'while', 'cond'}


class Units(dict[str, base.Unit]):
  """Name -> unit, in the order of the calls.

  Attributes:
    exact: the paths of the parameters that no unit owns.
    transports: path of a parameter -> the operations outside of all units that
      multiply data by it (a tied readout, a raw kernel): they keep their exact
      derivative under every credit rule.
  """

  def __init__(
      self, units: Mapping[str, base.Unit], exact: tuple[str, ...],
      transports: Mapping[str, tuple[str, ...]] | None = None):
    super().__init__(units)
    self.exact = exact
    self.transports = dict(transports or {})

  def __repr__(self):
    rows = [
        f'{name or "(root)"}: {info.kind} {info.inputs[0].shape} -> '
        f'{info.out.shape}' for name, info in self.infos.items()]
    rows += [f'{name}: no unit, exact gradient' for name in self.exact]
    rows += [
        f'{name}: exact derivative in {", ".join(operations)}, outside of any '
        'unit' for name, operations in self.transports.items()]
    return '\n'.join(rows)

  @property
  def infos(self) -> dict[str, base.UnitInfo]:
    """Name -> what is known of the unit."""
    return {name: unit.info for name, unit in self.items()}


@dataclasses.dataclass(frozen=True)
class Survey:
  """The result of `take`.

  Attributes:
    units: the units of the model, and the parameters that none owns.
    output: shape and dtype of the model's output.
    lacks: unit -> the collections that cannot be kept there because the
      model's own `nn.scan` does not list them (`rule` stands for the random
      stream).
    jitted: the units inside a jit of the model's own.
    lifted: the units inside a scan, a loop, a conditional or a vmap.
    blocked: the units that the output depends on and that no error can reach,
      since a derivative on the way is zero everywhere.
    batch_coupled: the modules that normalise over the batch in training.
    used: the units that the output depends on.
    detached: whether a `stop_gradient` keeps errors from a part of the model.
  """
  units: Units
  output: Any
  lacks: Mapping[str, tuple[str, ...]]
  jitted: tuple[str, ...]
  lifted: tuple[str, ...]
  blocked: tuple[str, ...]
  batch_coupled: tuple[str, ...]
  used: tuple[str, ...]
  detached: bool


class Network:
  """What the networks of every Flax API share: one survey a shape."""

  def __init__(self, boundaries: tuple[str, ...] = ()):
    self.boundaries = boundaries
    self._surveys = {}
    self._latest = None
    self.views = {}  # Of `bpjax.local`: what cuts the network -> the result.

  @property
  def units(self) -> Units:
    """Name -> unit, in the order of the calls.

    A unit has `info` and its pure functions (`bpjax.Unit`): what
    `rule.backward` takes. `net.units.exact` lists the parameters that no unit
    owns (norm scales, raw `self.param`): a credit rule leaves them on their
    exact gradient. Known once the network has seen an input's shape (`init`).
    """
    if self._latest is None:
      raise ValueError(
          '`net.units` is not known before the network has seen an input; call '
          '`net.init(key, x)` first.')
    return self._latest.units

  def survey(self, variables: Mapping[str, Any], x: Any) -> Survey:
    """What is known of the units for inputs of this shape; traced once."""
    leaves, structure = jax.tree.flatten((variables, x))
    cache_key = (structure, tuple(map(jax.typeof, leaves)))
    if cache_key not in self._surveys:
      self._surveys[cache_key] = self._take(variables, x)
    self._latest = self._surveys[cache_key]
    return self._latest

  def _take(self, variables, x):
    return take(self, variables, x)


def take(net: Any, variables: Mapping[str, Any], x: Any) -> Survey:
  """Surveys a network for inputs of the shape of `x`.

  Args:
    net: the `Network`.
    variables: its variables (only shapes matter).
    x: its input.

  Returns:
    A `Survey`.

  Raises:
    ValueError: if the model has no batch axis, or a unit cannot be split.
  """
  notes = {}
  batch_coupled = {}

  def forward(variables, x, visit):
    state = [c for c in variables if c != 'params']
    output, _ = net.run(
        variables, x, visit, jax.random.key(0), [*state, *base.COLLECTIONS],
        watch=lambda name: batch_coupled.setdefault(name, True))
    return output

  def plain(variables, x):
    return forward(variables, x, lambda call: _note(call, notes))

  def taught(variables, x):
    def function(params):
      output = forward(
          {**variables, 'params': params}, x, lambda call: _tap(call, notes))
      return [o for o in jax.tree.leaves(output)
              if jnp.issubdtype(o.dtype, jnp.inexact)]
    outputs, pull = jax.vjp(function, variables['params'])
    pull([jnp.ones_like(o) for o in outputs])
    return outputs

  def without_units(variables, x):
    return forward(variables, x, lambda call: call.unit(
        unit_lib.detached(call.params), call.inputs)[1])

  jaxpr, output = jax.make_jaxpr(plain, return_shape=True)(variables, x)
  jax.eval_shape(taught, variables, x)
  marks = list(_marks(jaxpr.jaxpr))
  alive, _ = partial_eval.dce_jaxpr(
      jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  used = {name for name, _ in _marks(alive)}
  reads = {}
  _trace_reads(jaxpr.jaxpr, reads)
  detached = 'stop_gradient' in set(_primitives(jaxpr.jaxpr))

  order = list(dict.fromkeys(name for name, _ in marks))
  inside = lambda kinds: tuple(
      dict.fromkeys(name for name, around in marks if around & kinds))
  is_boundary = lambda name: isinstance(notes[name]['unit'], unit_lib.Boundary)
  last = next((n for n in reversed(order) if not is_boundary(n)), None)
  _check_boundaries(net.boundaries, order, filter(is_boundary, order))
  units = {}
  for name in order:
    calls = sum(n == name for n, _ in marks)
    units[name] = notes[name]['unit']
    units[name].info = dataclasses.replace(
        _info(name, notes[name], output, name == last, calls),
        owns_activation=units[name].owns_activation,
        reads=tuple(reads.get((name, i)) for i in range(
            len(notes[name]['inputs']))),
        readers=tuple(n for n in order if reads.get((n, 0)) == name),
        outs={n: notes[n]['out'] for n in order if not is_boundary(n)})
  owned = lambda path: any(
      name == '' or path.startswith(name + '/') for name in units)
  exact = tuple(
      p for p in paths.leaf_names(variables['params']) if not owned(p))
  found = {}
  given = [
      frozenset([name.removeprefix('params/')])
      if name.startswith('params/') else frozenset()
      for name in paths.leaf_names(variables)]
  given += [None] * len(jax.tree.leaves(x))
  _products(jax.make_jaxpr(without_units)(variables, x).jaxpr, given, found)
  transports = {name: tuple(operations) for name, operations in found.items()}
  return Survey(
      units=Units(units, exact, transports),
      output=output,
      lacks={n: notes[n]['lacks'] for n in units if notes[n]['lacks']},
      jitted=inside(_JITS),
      lifted=inside(_LOOPS) + tuple(n for n in units if 'vmap' in notes[n]),
      blocked=() if detached else tuple(
          n for n in units if n in used and not notes[n].get('taught')),
      batch_coupled=tuple(batch_coupled),
      used=tuple(n for n in units if n in used),
      detached=detached)


def _check_boundaries(globs, order, boundaries):
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


def _note(call, notes):
  """Runs a unit, writes down its shapes and marks it in the jaxpr."""
  unit = call.unit
  inputs = tuple(
      checkpoint_name(x, f'{_MARK_INPUT}{i}:{call.name}')
      for i, x in enumerate(call.inputs))
  pre, out = unit(call.params, inputs)
  lacks = [c for c in base.COLLECTIONS if not call.can_hold(c)]
  note = notes.setdefault(call.name, {})
  note |= {
      'unit': unit,
      'kind': type(unit.affine_module).__name__,
      'inputs': tuple(map(_shape, call.inputs)),
      'pre': _shape(pre), 'out': _shape(out),
      'params': jax.tree.map(_shape, call.params),
      'lacks': tuple(lacks + ([] if call.has_key() else ['rule'])),
  }
  out = _watch_vmap(out, note)
  return checkpoint_name(out, _MARK + call.name)


def _watch_vmap(x, note):
  """`x`; writes down whether it is an array of a vmap inside the model."""

  @jax.custom_batching.custom_vmap
  def identity(x):
    return x

  @identity.def_vmap
  def batched(axis_size, in_batched, x):  # pylint: disable=unused-variable
    del axis_size
    note['vmap'] = True
    return x, in_batched[0]

  return identity(x)


def _tap(call, notes):
  """Runs a unit and writes down what reaches it, and whether it may send."""
  note = notes[call.name]

  @jax.custom_vjp
  def tap(params, inputs):
    return call.unit(params, inputs)[1]

  def forward(params, inputs):
    leaves = jax.tree.leaves(inputs, is_leaf=lambda p: hasattr(p, 'perturbed'))
    note['sends'] = note.get('sends', False) or any(p.perturbed for p in leaves)
    strip = lambda tree: jax.tree.map(
        lambda p: p.value, tree, is_leaf=lambda p: hasattr(p, 'perturbed'))
    params, inputs = strip(params), strip(inputs)
    return tap(params, inputs), (params, inputs)

  def backward(residuals, teaching):
    del teaching
    note['taught'] = True
    return jax.tree.map(_zero_cotangent, residuals)

  tap.defvjp(forward, backward, symbolic_zeros=True)
  return tap(call.params, call.inputs)


def _info(name, note, output, is_output, calls):
  cls = note['kind']
  positionwise = any(
      c.__name__ in _POSITIONWISE
      for c in type(note['unit'].affine_module).__mro__)
  ndim = len(note['inputs'][0].shape)
  features = ndim - 1
  if cls == base.BOUNDARY:
    # [batch, positions, features] is a sequence; [batch, height, width,
    # channels] is a map, whose every entry is a feature of its own.
    positionwise, features = ndim == 3, 1 if ndim == 3 else features
  elif positionwise:
    features = _contracted_axes(note['unit'].affine_module, ndim)
  return base.UnitInfo(
      name=name, kind=cls, inputs=note['inputs'], pre=note['pre'],
      out=note['out'], params=note['params'], net_output=output,
      is_output=is_output, sends=note.get('sends', False),
      taught=note.get('taught', False), calls=calls,
      positionwise=positionwise, feature_axes=features,
      summed_axes=_summed_axes(note['unit'].affine_module))


def _summed_axes(module):
  """Of an Einsum's kernel; None for another module."""
  formula = getattr(module, 'einsum_str', None)
  if not formula or '->' not in formula:
    return None
  operands, result = formula.replace(' ', '').split('->')
  kernel = operands.rpartition(',')[2]
  return tuple(
      i - len(kernel) for i, letter in enumerate(kernel) if letter not in result)


def _contracted_axes(module, ndim):
  """How many trailing axes a dense operation contracts; all if not trailing."""
  axis = getattr(module, 'axis', -1)
  axes = axis if isinstance(axis, tuple) else (axis,)
  axes = sorted(a % ndim for a in axes)
  trailing = axes == list(range(ndim - len(axes), ndim))
  return len(axes) if trailing else ndim - 1


def _shape(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _zero_cotangent(x):
  return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None


def _inner(eqn):
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, 'jaxpr', item)
      if hasattr(item, 'eqns'):
        yield item


def _marks(jaxpr, around=frozenset()):
  """(unit, the primitives around it) for every call, in program order."""
  for eqn in jaxpr.eqns:
    name = eqn.params.get('name')
    if eqn.primitive.name == 'name' and str(name).startswith(_MARK):
      yield name.removeprefix(_MARK), around
    for inner in _inner(eqn):
      yield from _marks(inner, around | {eqn.primitive.name})


def _trace_reads(jaxpr, reads, given=()):
  """Follows units' outputs through operations that a message may pass.

  Notes (unit, input) -> the unit whose output it is. Returns the origin of each
  of the jaxpr's outputs, for those of its inputs.
  """
  origin = dict(zip(jaxpr.invars, given))
  of = lambda variables: [
      origin.get(v) if isinstance(v, Var) else None for v in variables]
  for eqn in jaxpr.eqns:
    name = str(eqn.params.get('name')) if eqn.primitive.name == 'name' else ''
    before = of(eqn.invars)
    after = [None] * len(eqn.outvars)
    known = [unit for unit in before if unit is not None]
    if name.startswith(_MARK):
      after = [name.removeprefix(_MARK)]
    elif name.startswith(_MARK_INPUT):
      index, _, unit = name.removeprefix(_MARK_INPUT).partition(':')
      reads[unit, int(index)] = before[0]
    elif eqn.primitive.name in _TRANSPARENT and len(known) == 1:
      after = known * len(after)
    inner = list(_inner(eqn))
    if len(inner) == 1 and len(inner[0].invars) == len(before):
      after = _trace_reads(inner[0], reads, before)
    else:
      for part in inner:
        _trace_reads(part, reads)
    origin.update(zip(eqn.outvars, after))
  return of(jaxpr.outvars)


def _primitives(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in _inner(eqn):
      yield from _primitives(inner)


_PRODUCTS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')


def _products(jaxpr, given, found):
  """Notes each product of data with what parameters alone make.

  `given` says of each input: the parameters that it is made of, a frozenset, or
  None where data went into it. Returns the same for the outputs.
  """
  known = dict(zip(jaxpr.invars, given))
  of = lambda v: (
      known.get(v, frozenset()) if isinstance(v, Var) else frozenset())
  for eqn in jaxpr.eqns:
    before = [of(v) for v in eqn.invars]
    if eqn.primitive.name in _PRODUCTS:
      for weights, data in (before[:2], before[1::-1]):
        for leaf in weights if weights and data is None else ():
          found.setdefault(leaf, {})[eqn.primitive.name] = True
    if eqn.primitive.name == 'stop_gradient':
      after = [None if b is None else frozenset() for b in before]
    else:
      joined = None if None in before else frozenset().union(*before)
      after = [joined] * len(eqn.outvars)
    parts = eqn.params.get('branches')
    inside = before[1:] if parts else before
    for part in parts or _inner(eqn):
      part = getattr(part, 'jaxpr', part)
      if len(part.invars) == len(inside):
        results = _products(part, inside, found)
        if eqn.primitive.name == 'scan':  # Until the carries change no more.
          first, count = eqn.params['num_consts'], eqn.params['num_carry']
          for _ in range(count):
            carries = [
                None if None in (a, b) else a | b
                for a, b in zip(inside[first:first + count], results[:count])]
            if carries == inside[first:first + count]:
              break
            inside = [*inside[:first], *carries, *inside[first + count:]]
            results = _products(part, inside, found)
        if len(results) == len(after) and not parts:
          after = results
    known.update(zip(eqn.outvars, after))
  return [of(v) for v in jaxpr.outvars]
