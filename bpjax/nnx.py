"""Flax NNX modules as networks of units, with the module left as it is.

A run merges a copy of the module with the given variables. In that copy each
unit's class is a subclass whose calls go to the engine; what the engine keeps
at a unit is an `nnx.Variable` of the unit's, so that lifted transforms
(`nnx.remat`) carry it as they carry the unit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import itertools
from typing import Any

from bpjax import base
from bpjax import nn as bpjax_nn
from bpjax import paths
from bpjax import survey as survey_lib
from bpjax import unit as unit_lib
from flax import nnx
import jax
import jax.numpy as jnp

_AFFINE = (
    nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose, nnx.Einsum,
    nnx.Embed)
_NORMS = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm)
_RUN_IDS = itertools.count()
_RUNS: dict[int, Any] = {}  # Who watches the modules of a run that goes on.


class Feedback(nnx.Variable):
  """A rule's feedback weights."""


class Port(nnx.Variable):
  """The zeros that an error comes back through."""


class Noise(nnx.Variable):
  """What is added to module outputs, and those outputs."""


class Probe(nnx.Variable):
  """Zeros at unit outputs, whose cotangents are the teaching signals."""


class Tap(nnx.Variable):
  """The zeros whose cotangents are errors of units."""


class Particle(nnx.Variable):
  """The state of a unit that settles."""


class BlockOutput(nnx.Variable):
  """What a block of `bpjax.local` has put out."""


_KEPT = dict(zip(
    base.COLLECTIONS,
    (Feedback, Port, Noise, Probe, Tap, Particle, BlockOutput),
    strict=True))


def from_nnx(
    module: nnx.Module, *, is_unit: Callable[[nnx.Module], bool] | None = None,
    boundaries: Sequence[str] = (), norm_gain_transport: str = 'exact'
) -> Network:
  """Makes a network of units out of any Flax NNX module, which stays as it is.

  A unit is an affine operation (`Linear`, `LinearGeneral`, `Conv`,
  `ConvTranspose`, `Einsum`, `Embed`, or a subclass), a `bpjax.nn.NnxLayer`, or
  a module that `is_unit` chooses. Everything between units keeps its exact
  derivative. Training runs after `module.train()` and evaluation after
  `module.eval()`, on copies. `nnx.remat` is transparent; units inside
  `nnx.scan`, `nnx.vmap`, `nnx.cond` or `nnx.jit` are refused.

  Args:
    module: the built module; `net.init` returns the values that it holds.
    is_unit: chooses modules that are units together with their nonlinearity;
      each must hold exactly one affine operation, and no BatchNorm or dropout.
    boundaries: globs for modules, such as `blocks/*`, whose outputs are units,
      too, as in `from_linen`.
    norm_gain_transport: 'exact' or 'feedback_diag', as in `from_linen`.

  Returns:
    A `Network`, for every rule as `from_linen`'s. Names are attribute paths
    joined with `/`, lists by index: `layers/0/kernel`.

  Raises:
    ValueError: for anything but a module, for one with parameters that two
      modules share, and for a unit that keeps state.

  Example:
    >>> import bpjax, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...     nnx.Linear(4, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs))
    >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
    >>> net = bpjax.from_nnx(model)
    >>> rule = bpjax.rules.feedback_alignment()
    >>> feedback = rule.init(
    ...     jax.random.key(1), net, net.init(jax.random.key(0), x), x)
    >>> learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, feedback, x, y):
    ...   variables = net.from_state(nnx.state(model))
    ...   (value, aux), (grads, _) = learn(variables, feedback, x, y)
    ...   optimizer.update(model, net.to_state({'params': grads}))
    ...   nnx.update(model, net.to_state(aux.model_state))  # Batch statistics.
    ...   return value
    >>> before = step(model, optimizer, feedback, x, y)
    >>> bool(step(model, optimizer, feedback, x, y) < before)
    True
  """
  if not isinstance(module, nnx.Module):
    raise ValueError(
        f'`module` must be a flax.nnx.Module, got {type(module).__name__}; '
        'pass a built one such as `MLP(rngs=nnx.Rngs(0))`, and a linen module '
        'to `from_linen`.')
  chosen = is_unit or (lambda module: False)
  return Network(
      module, lambda m: isinstance(m, bpjax_nn.NnxLayer) or chosen(m),
      tuple(boundaries), norm_gain_transport)


class Network(survey_lib.Network):
  """A module seen as units. Made by `from_nnx`."""

  def __init__(self, module, is_unit, boundaries, norm_gain_transport):
    super().__init__(boundaries)
    unit_lib.check_gain_transport(norm_gain_transport)
    self.transports_gain = norm_gain_transport == 'exact'
    self.module = module
    self._graphdef, state = nnx.split(module)
    self._leaves = dict(nnx.to_flat_state(state))
    self._collections = {
        path: _collection(leaf) for path, leaf in self._leaves.items()}
    self._paths = {_name(path): path for path in self._leaves}
    _check_shared(module)
    params = [n.split('/') for n, path in self._paths.items()
              if self._collections[path] == 'params']
    self.templates, self._owners = {}, set()
    outer_first = sorted(
        _modules(module).items(), key=lambda item: len(item[1].path))
    for name, part in outer_first:
      self._paths[name] = part.path
      if not any(_inside(name, chosen) for chosen in self.templates):
        if isinstance(part.node, _AFFINE) or is_unit(part.node):
          self.templates[name] = _Template(name, part.node)
      depth = len(part.path)
      own = [p[depth:] for p in params if p[:depth] == _split(name)]
      if own and all(len(rest) == 1 for rest in own):
        self._owners.add(name)
    whole = [n for n, t in self.templates.items() if t.owns_activation]
    self._owners = {*whole, *(
        n for n in self._owners if not any(_inside(n, w) for w in whole))}
    self._bounded = [
        name for name in _modules(module)
        if not any(name == t or _inside(name, t) for t in self.templates)
        and any(paths.is_module(glob, name) for glob in boundaries)]
    self._chosen = [
        *self.templates, *map(unit_lib.boundary_name, self._bounded)]

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """The variables that the module holds at this moment.

    Args:
      key: not used, as an NNX module is built with random keys of its own; here
        so that code for both Flax APIs can be the same.
      x: the input array `[batch, ...]`, or a tuple of the module's inputs.

    Returns:
      The variables: `params` (every `nnx.Param`) and the module's other
      collections, such as `batch_stats`, as nested dicts of arrays. Random
      states are left out: a step's key takes their place.

    Raises:
      ValueError: for a unit inside a transform that cannot be supported.
    """
    del key
    variables = jax.tree.map(
        lambda a: a.copy(), self.from_state(nnx.state(self.module)))
    self.survey(variables, x)
    return variables

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The module's output in evaluation mode, for `x` as in `init`."""
    module = self._bind(variables)
    module.eval()
    return module(*unit_lib.as_inputs(x))

  def survey(self, variables: Mapping[str, Any], x: Any) -> survey_lib.Survey:
    """What is known of the units for inputs of this shape; traced once."""
    survey = super().survey(variables, x)
    for unit in (*survey.lifted, *survey.jitted):
      raise ValueError(_lifted(unit))
    return survey

  def from_state(self, state: nnx.State) -> dict[str, Any]:
    """From `nnx.State`, as `nnx.state` and `nnx.split` give it, to variables.

    Args:
      state: values of the module, all or some, or feedback as `to_state` made
        it.

    Returns:
      Collection name -> nested dict of arrays, without random states.

    Raises:
      ValueError: for a value that the module does not have.
    """
    result = {'params': {}}
    for path, leaf in nnx.to_flat_state(state):
      if isinstance(leaf, Feedback):
        _put(result, ('feedback', *path), leaf.get_value())
      elif path not in self._collections:
        raise ValueError(
            f'`state` has `{_name(path)}`, which the module of `from_nnx` does '
            'not have; pass the state of a module of the same structure.')
      elif self._collections[path] is not None:
        _put(result, (self._collections[path], *path), leaf.get_value())
    return result

  def to_state(self, variables: Mapping[str, Any]) -> nnx.State:
    """The inverse of `from_state`: for `nnx.update` and `nnx.Optimizer`.

    Args:
      variables: collection name -> nested dict; `{'params': grads}`, say,
        `aux.model_state`, or `{'feedback': feedback}`.

    Returns:
      The state. Its leaves are of the module's own types of `nnx.Variable`
      (`nnx.Param`, ...), those of feedback `bpjax.nnx.Feedback`.

    Raises:
      ValueError: for a value that the module does not have, and for parameters
        and feedback together (feedback has the paths of what it stands for).
    """
    flat = {}
    for collection, tree in variables.items():
      for name, value in zip(paths.leaf_names(tree), jax.tree.leaves(tree)):
        path = self._paths.get(name)
        if collection == 'feedback':
          path, leaf = self._feedback_path(name), Feedback(value)
        elif path is None or self._collections.get(path) != collection:
          raise ValueError(
              f'`variables` has `{name}` in `{collection}`, which the module '
              'of `from_nnx` does not have there; pass trees nested as those '
              'of `net.init`.')
        else:
          leaf = self._leaves[path].replace(value)
        if path in flat:
          raise ValueError(
              f'`variables` has `{name}` both as a parameter and as feedback, '
              'and a state holds one value a path; make two states of them.')
        flat[path] = leaf
    return nnx.from_flat_state(flat)

  def run(
      self,
      variables: Mapping[str, Any],
      x: Any,
      visit: Callable[[Call], Any],
      key: base.Key | None,
      mutable: Sequence[str],
      owners: bool = False,
      watch: Callable[[str], None] | None = None,
      cuts: Any = None,
      train: bool = True,
  ) -> tuple[Any, dict[str, Any]]:
    """Runs the module in training mode; `visit` answers for every unit's call.

    Args:
      variables: all collections, those of the engine included.
      x: the input or the tuple of inputs.
      visit: takes a `Call` and returns the unit's output.
      key: for the module's random streams and the rule's, or None.
      mutable: the collections to return.
      owners: visit every leaf module that owns parameters, norms included,
        instead of the units; but a module that `is_unit` chose as a whole.
      watch: is told the name of every module that normalises over the batch.
      train: False for evaluation mode.
      cuts: where gradients stop, as for a linen network.

    Returns:
      The module's output, and the mutable collections.
    """
    rule_key, model_key = (
        (None, None) if key is None else jax.random.split(key))
    module = self._bind(variables, model_key)
    _ = module.train() if train else module.eval()
    modules = {n: part.node for n, part in _modules(module).items()}
    own = set(modules)
    modules |= {unit_lib.boundary_name(n): modules[n] for n in self._bounded}
    chosen = self._owners if owners else self._chosen
    for collection in base.COLLECTIONS:
      for name in chosen:
        part = paths.subtree(variables.get(collection, {}), name)
        if part is not None:
          setattr(modules[name], _slot(collection), _KEPT[collection](part))
    watched = {
        n: modules[n] for n in own if n in chosen or n in self._bounded
        or isinstance(modules[n], _NORMS) or _is_cut(cuts, n, modules[n])}
    run = _Run(self, visit, rule_key, chosen, owners, watch, cuts)
    with contextlib.ExitStack() as stack:
      stack.enter_context(_watching(watched, run))
      if key is None:
        stack.enter_context(_watching(_streams(module), _NoKey()))
      output = module(*unit_lib.as_inputs(x))
    names = dict.fromkeys([*chosen, *(n for _, n in run.written)])
    kept = _gather(modules, names, run.written)
    state = self.from_state(_without_kept(module, self._collections))
    return output, {c: {**state, **kept}.get(c, {}) for c in mutable}

  def _bind(self, variables, key=None):
    """A copy of the module that holds `variables`."""
    leaves = dict(self._leaves)
    for i, (path, leaf) in enumerate(leaves.items()):
      collection = self._collections[path]
      if collection is not None:
        value = paths.subtree(variables.get(collection, {}), _name(path))
        if value is None:
          raise ValueError(
              f'`variables` lacks `{_name(path)}` in `{collection}`; pass what '
              '`net.init` returned, or `net.from_state(nnx.state(module))`.')
        leaves[path] = leaf.replace(value)
      elif isinstance(leaf, nnx.RngKey) and key is not None:
        fresh = jax.random.fold_in(key, i)
        shape = leaf.get_value().shape
        leaves[path] = leaf.replace(
            jax.random.split(fresh, shape) if shape else fresh)
    return nnx.merge(self._graphdef, nnx.from_flat_state(leaves), copy=True)

  def _feedback_path(self, name):
    """The path of a feedback leaf: that of its unit, then the leaf's own."""
    parts = name.split('/')
    for i in range(len(parts), 0, -1):
      prefix = '/'.join(parts[:i])
      if prefix in self._paths:
        return (*self._paths[prefix], *parts[i:])
    return tuple(parts)


class _Run:
  """Hands the calls of units to `visit`, and passes all others on."""

  def __init__(self, net, visit, key, chosen, owners, watch, cuts):
    self.net = net
    self._cuts = cuts
    self.rule_key = key
    self.owners = owners
    self.written = set()
    self._visit = visit
    self._order = {name: i for i, name in enumerate(chosen)}
    self._watch = watch
    self._counts = dict.fromkeys(chosen, 0)
    self._suspended = False

  def called(self, module, original, args, kwargs):
    name = module.bpjax_name
    if self._suspended:
      return original(*args, **kwargs)
    if self._cuts is None:
      return self._called(module, original, args, kwargs)
    if self._cuts.enter(name):
      args, kwargs = unit_lib.detached((args, kwargs))
    out = self._called(module, original, args, kwargs)
    stops = self._cuts.leave(name, module)
    if stops is None:
      return out
    kept = getattr(module, _slot('blocks'), None)
    unit_lib.check_block(name, out, kept, True)
    setattr(module, _slot('blocks'), BlockOutput({'output': out}))
    self.written.add(('blocks', name))
    self._cuts.kept(name)
    return self._cuts.onward(name, out) if stops else out

  def _called(self, module, original, args, kwargs):
    """What one module puts out, under the engine."""
    name = module.bpjax_name
    if (self._watch is not None and isinstance(module, nnx.BatchNorm)
        and unit_lib.uses_the_batch(module, args, kwargs)):
      self._watch(name)
    if name in self._order:
      return self._visit(
          Call(self, module, original, args, kwargs, self._index(name)))
    if (isinstance(module, _NORMS) and module.scale is not None
        and not self.owners and not self.net.transports_gain):
      out = _fixed_gain(module, original, args, kwargs)
    else:
      out = original(*args, **kwargs)
    boundary = unit_lib.boundary_name(name)
    if boundary in self._order:
      return self._visit(
          BoundaryCall(self, module, out, self._index(boundary)))
    return out

  def _index(self, name):
    """How often this unit was called before."""
    self._counts[name] += 1
    return self._counts[name] - 1

  def key_of(self, name, index):
    key = jax.random.fold_in(self.rule_key, self._order[name])
    return jax.random.fold_in(key, index)

  @contextlib.contextmanager
  def suspend(self):
    before, self._suspended = self._suspended, True
    try:
      yield
    finally:
      self._suspended = before


class _NoKey:
  """What a random stream answers in a step without a key."""

  def called(self, stream, original, args, kwargs):
    del original, args, kwargs
    raise ValueError(
        f'the module draws random numbers (stream `{stream.tag}`); pass '
        '`key=jax.random.key(...)`.')


class Call:
  """One call of one unit, inside the running module."""

  def __init__(self, run, module, original, args, kwargs, index):
    self.name = module.bpjax_name
    self.inputs, self._arguments = unit_lib.take_apart(original, args, kwargs)
    self.params = _params(module)
    self._run = run
    self._module = module
    self._original = original
    self._index = index
    self.unit = None
    if not run.owners:
      template = run.net.templates[self.name]
      template.check(self.params)
      self.unit = NnxUnit(template, self._arguments)

  def original(self) -> Any:
    """Runs the module as it was written."""
    args, kwargs = self._arguments(self.inputs)
    with self._run.suspend():
      return self._original(*args, **kwargs)

  def can_hold(self, collection: str) -> bool:
    """Whether a variable of this collection can be kept at the unit."""
    return collection in _KEPT

  def read(self, collection: str, name: str | None = None) -> Any | None:
    """This unit's part of a collection, or None."""
    stored = getattr(self._module, _slot(collection), None)
    if stored is None:
      return None
    stored = stored.get_value()
    if name is not None:
      return stored.get(f'{name}_{self._index}')
    return (stored[unit_lib.BARE] if set(stored) == {unit_lib.BARE}
            else dict(stored))

  def write(self, collection: str, value: Any, name: str | None = None):
    """Keeps `value` as this unit's part of a collection, or of this call."""
    if name is not None:
      value = {f'{name}_{self._index}': value}
    elif not isinstance(value, Mapping):
      value = {unit_lib.BARE: value}
    stored = getattr(self._module, _slot(collection), None)
    self._run.written.add((collection, self.name))
    if stored is None:
      setattr(self._module, _slot(collection), _KEPT[collection](dict(value)))
    else:
      stored.set_value({**stored.get_value(), **value})

  def key(self) -> base.Key:
    """A random key of this call's own."""
    if self._run.rule_key is None:
      raise ValueError(
          f'the rule draws random numbers at unit `{self.name}`; pass '
          '`key=jax.random.key(...)`.')
    return self._run.key_of(self.name, self._index)

  def has_key(self) -> bool:
    return self._run.rule_key is not None


class BoundaryCall(Call):
  """What a module has put out, as a call of a unit without parameters."""

  def __init__(self, run, module, out, index):  # pylint: disable=super-init-not-called
    unit_lib.check_boundary(module.bpjax_name, out)
    self.name = unit_lib.boundary_name(module.bpjax_name)
    self.inputs = (out,)
    self.params = {}
    self.unit = unit_lib.Boundary()
    self._run = run
    self._module = module
    self._index = index

  def original(self):
    return self.inputs[0]


class _Template:
  """A unit's module without its arrays, to be merged with given parameters."""

  def __init__(self, name, module):
    self.name = name
    self.module = module
    self.owns_activation = not isinstance(module, _AFFINE)
    self._graphdef, state = nnx.split(module)
    self._leaves = dict(nnx.to_flat_state(state))
    self._shapes = _shapes(_params(module))
    kept = sorted({
        type(leaf).__name__ for leaf in self._leaves.values()
        if not isinstance(leaf, nnx.Param)})
    if kept:
      raise ValueError(
          f'unit `{name}` holds {kept} beside its parameters (BatchNorm and '
          'Dropout do): a unit is a pure function of its parameters and '
          'inputs; keep them outside the unit.')

  def check(self, params):
    """Raises unless the parameters are whole: no part of a stack."""
    if _shapes(params) != self._shapes:
      raise ValueError(_lifted(self.name))

  def merge(self, params):
    leaves = {path: leaf.replace(paths.subtree(params, _name(path)))
              for path, leaf in self._leaves.items()}
    return nnx.merge(self._graphdef, nnx.from_flat_state(leaves), copy=True)


class NnxUnit(unit_lib.PureUnit):
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, template, arguments):
    self._template = template
    self._arguments = arguments
    self.affine_module = template.module
    self.owns_activation = template.owns_activation

  def _apply(self, params, inputs, replacement=None):
    args, kwargs = self._arguments(inputs)
    module = self._template.merge(params)
    if not self.owns_activation:
      out = module(*args, **kwargs)
      return out, out
    splitter = _Splitter(replacement)
    affine = {name: part.node for name, part in _modules(module).items()
              if isinstance(part.node, _AFFINE)}
    with _watching(affine, splitter):
      out = module(*args, **kwargs)
    if len(splitter.seen) != 1:
      raise ValueError(
          f'`is_unit` chose `{self._template.name}`, which calls '
          f'{len(splitter.seen)} affine operations; a unit has exactly one: '
          'choose the smaller modules inside it.')
    (name, pre), = splitter.seen
    self.affine_module = _modules(self._template.module)[name].node
    return out, pre


class _Splitter:
  """Takes down what the affine operation of a unit puts out, or replaces it."""

  def __init__(self, replacement):
    self.seen = []
    self._replacement = replacement

  def called(self, module, original, args, kwargs):
    out = original(*args, **kwargs)
    self.seen.append((module.bpjax_name, out))
    return out if self._replacement is None else self._replacement


@functools.cache
def _watched(cls):
  """A subclass of `cls` whose calls go to the run that watches them."""

  def call(self, *args, **kwargs):
    original = functools.partial(cls.__call__, self)
    return _RUNS[self.bpjax_run].called(self, original, args, kwargs)

  return type(cls)(cls.__name__, (cls,), {
      '__call__': call, '__module__': cls.__module__, '__doc__': cls.__doc__})


@contextlib.contextmanager
def _watching(nodes, run):
  """Sends the calls of these nodes, which are copies, to `run`."""
  # A number of its own for each run is part of the graph, so that no lifted
  # transform answers from a trace that another run has made.
  run_id = next(_RUN_IDS)
  _RUNS[run_id] = run
  for name, node in nodes.items():
    node.__class__ = _watched(type(node))
    node.bpjax_run, node.bpjax_name = run_id, name
  try:
    yield
  finally:
    del _RUNS[run_id]


class _Part:
  """A module inside another."""

  def __init__(self, path, node):
    self.path = path
    self.node = node


def _modules(module):
  """Name -> module, for the module itself and all inside it."""
  return {_name(path): _Part(path, node)
          for path, node in nnx.iter_graph(module, graph=True)
          if isinstance(node, nnx.Module)}


def _streams(module):
  return {_name(path): node for path, node in nnx.iter_graph(module, graph=True)
          if isinstance(node, nnx.RngStream)}


def _is_cut(cuts, name, module):
  return cuts is not None and (
      cuts.enter(name) or cuts.leave(name, module) is not None)


def _check_shared(module):
  """Raises for a parameter that two modules hold."""
  holders = {}
  for name, part in _modules(module).items():
    for attribute, value in vars(part.node).items():
      if isinstance(value, nnx.Param):
        here = f'{name}/{attribute}'.lstrip('/')
        first = holders.setdefault(id(value), here)
        if first != here:
          raise ValueError(
              f'parameter `{here}` is `{first}` as well, and a unit owns its '
              'parameters alone; share the module that holds it, or give each '
              'a parameter of its own.')


def _collection(leaf):
  """The collection of a leaf; None for what is no part of the variables."""
  if not isinstance(leaf, nnx.Variable) or isinstance(
      leaf, (nnx.RngState, nnx.Intermediate)):
    return None
  if isinstance(leaf, nnx.Param):
    return 'params'
  for cls, name in ((nnx.BatchStat, 'batch_stats'), (nnx.Cache, 'cache')):
    if isinstance(leaf, cls):
      return name
  return type(leaf).__name__


def _params(module):
  params = {}
  for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    _put(params, path, leaf.get_value())
  return params


def _fixed_gain(module, original, args, kwargs):
  """What a norm puts out; its gain stays out of what is sent below."""
  unit_lib.check_features_last(module, module.bpjax_name)
  bias = getattr(module, 'bias', None)
  held = [(v, v.get_value()) for v in (module.scale, bias) if v is not None]
  (_, scale), *shift = held
  try:
    for variable, neutral in zip((v for v, _ in held), (1, 0)):
      variable.set_value(jnp.full_like(variable.get_value(), neutral))
    x = original(*args, **kwargs)
  finally:
    for variable, value in held:
      variable.set_value(value)
  return unit_lib.gain(x, scale, shift[0][1] if shift else None)


def _gather(modules, chosen, written):
  """The collections that the engine kept at the modules."""
  kept = {}
  for collection in base.COLLECTIONS:
    for name in chosen:
      variable = getattr(modules[name], _slot(collection), None)
      if variable is not None:
        _put(kept, (collection, *_split(name)), variable.get_value())
      elif (collection, name) in written:
        raise ValueError(_lifted(name))
  return kept


def _without_kept(module, collections):
  return nnx.from_flat_state({
      path: leaf for path, leaf in nnx.to_flat_state(nnx.state(module))
      if path in collections})


def _lifted(unit):
  return (
      f'unit `{unit}` is inside a transform that hides it from the rule '
      '(`nnx.scan`, `nnx.vmap`, `nnx.cond`, `nnx.jit`, a loop, or one without '
      '`graph_updates`); call the layers in a Python loop over an `nnx.List`: '
      '`nnx.remat` may stay.')


def _slot(collection):
  return f'bpjax_{collection}'


def _name(path):
  return '/'.join(map(str, path))


def _split(name):
  return name.split('/') if name else []


def _inside(name, around):
  return around == '' or name.startswith(around + '/')


def _shapes(params):
  return jax.tree.map(lambda p: tuple(p.shape), params)


def _put(tree, path, value):
  """Sets `tree[path]`, with the keys as strings; merges at an empty path."""
  if not path:
    tree.update(value)
    return
  *around, last = map(str, path)
  for key in around:
    tree = tree.setdefault(key, {})
  tree[last] = value
