"""Flax NNX modules as networks of units, with the module left as it is.

A trace merges a copy of the module with the given variables. In that copy, the
classes of modules that are to be marked (boundaries, blocks) are subclasses whose
calls are watched; the units are found in the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import itertools
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import inputs as inputs_lib
from bpjax import nn as bpjax_nn
from bpjax import paths
from bpjax.networks import network
from bpjax.networks import unit as unit_lib
from flax import nnx
import jax
import jax.numpy as jnp

_NORMS = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm)
_RUN_IDS = itertools.count()
_RUNS: dict[int, Any] = {}  # Who watches the modules of a trace that goes on.


class Feedback(nnx.Variable):
  """A rule's feedback weights."""


def from_nnx(
    module: nnx.Module, *, is_unit: Callable[[nnx.Module], bool] | None = None,
    boundaries: Sequence[str] = (), norm_gain_transport: str = 'exact',
    mask: str = 'mask') -> Network:
  """Makes a network of units out of any Flax NNX module, which stays as it is.

  A unit is an affine operation (`Linear`, `LinearGeneral`, `Conv`,
  `ConvTranspose`, `Einsum`, `Embed`, or a subclass), a `bpjax.nn.NnxLayer`, or
  a module that `is_unit` chooses. Everything between units keeps its exact
  derivative. Training runs after `module.train()` and evaluation after
  `module.eval()`, on copies.

  Args:
    module: the built module; `net.init` returns the values that it holds.
    is_unit: chooses modules that are units together with their nonlinearity;
      each must hold exactly one affine operation, and no BatchNorm or dropout.
    boundaries: globs for modules, such as `blocks/*`, whose outputs are units,
      too, as in `from_linen`.
    norm_gain_transport: 'exact' or 'feedback_diag', as in `from_linen`.
    mask: as in `from_linen`.

  Returns:
    A `Network`, for every rule as `from_linen`'s. Names are attribute paths
    joined with `/`, lists by index: `layers/0/kernel`.

  Raises:
    ValueError: for anything but a module.

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
  boundaries = arguments.patterns('boundaries', boundaries)
  arguments.is_unit(is_unit)
  chosen = is_unit or (lambda module: False)
  return Network(
      module, lambda m: isinstance(m, bpjax_nn.NnxLayer) or chosen(m),
      tuple(boundaries), norm_gain_transport, mask)


class Network(network.Network):
  """A module seen as units. Made by `from_nnx`."""

  def __init__(self, module, is_unit, boundaries, norm_gain_transport, mask):
    unit_lib.check_gain_transport(norm_gain_transport)
    super().__init__(boundaries, is_unit, mask)
    self._transports_gain = norm_gain_transport == 'exact'
    self.module = module
    self.flags = inputs_lib.flags(type(module).__call__)
    self._takes_rngs = 'rngs' in inputs_lib.names(type(module).__call__)
    self._graphdef, state = nnx.split(module)
    self._leaves = dict(nnx.to_flat_state(state))
    self._collections = {
        path: _collection(leaf) for path, leaf in self._leaves.items()}
    self._paths = {_name(path): path for path in self._leaves}
    self._paths |= {name: path for name, (path, _) in _modules(module).items()}
    # The user's own modules: what chooses some may ask which one it is.
    self._nodes = {name: node for name, (_, node) in _modules(module).items()}

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """The variables that the module holds at this moment.

    Args:
      key: not used, as an NNX module is built with random keys of its own; here
        so that code for both Flax APIs can be the same.
      x: the input array `[batch, ...]`, a tuple of several, or `bpjax.Inputs`.

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
    return inputs_lib.call(
        module, x, **inputs_lib.opposite(self.flags))

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
      (`nnx.Param`, ...), those of feedback `bpjax.networks.nnx.Feedback`.

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

  def _call(self, params, state, x, key, train, notes):
    module = self._bind({'params': params, **state}, key)
    _ = module.train() if train else module.eval()
    modules = {name: node for name, (_, node) in _modules(module).items()}
    notes.modules.update((n, type(m).__name__) for n, m in modules.items())
    kinds = (
        network.LAYER, network.BOUNDARY, network.ENTER, network.LEAVE)
    watched = {
        name: node for name, node in modules.items()
        if isinstance(node, nnx.BatchNorm)
        or isinstance(node, _NORMS) and not self._transports_gain
        or any([notes.wants(kind, name, self._nodes[name]) for kind in kinds])}
    with contextlib.ExitStack() as stack:
      stack.enter_context(
          _watching(watched, _Watcher(notes, self._transports_gain, self._nodes)))
      if key is None:
        stack.enter_context(_watching(_streams(module), _NoKey()))
      flags = self.flags if train else inputs_lib.opposite(self.flags)
      if self._takes_rngs and key is not None:
        flags = {**flags, 'rngs': nnx.Rngs(jax.random.fold_in(key, len(self._leaves)))}
      output = inputs_lib.call(module, x, **flags)
    new = self.from_state(nnx.from_flat_state({
        path: leaf for path, leaf in nnx.to_flat_state(nnx.state(module))
        if path in self._collections}))
    return output, {c: new[c] for c in state}

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


class _Watcher:
  """Marks what is asked for, and notes what normalises over the batch."""

  def __init__(self, notes, transports_gain, nodes):
    self._notes, self._transports_gain = notes, transports_gain
    self._nodes = nodes

  def called(self, module, original, args, kwargs):
    name = module.bpjax_name
    if isinstance(module, nnx.BatchNorm) and unit_lib.uses_the_batch(
        module, args, kwargs):
      self._notes.batch_coupled[name] = True
    call = original
    if (isinstance(module, _NORMS) and module.scale is not None
        and not self._transports_gain):
      call = lambda *args, **kwargs: _fixed_gain(module, original, args, kwargs)
    return self._notes.called(name, self._nodes[name], call, args, kwargs)


class _NoKey:
  """What a random stream answers in a step without a key."""

  def called(self, stream, original, args, kwargs):
    del original, args, kwargs
    raise ValueError(
        f'the module draws random numbers (stream `{stream.tag}`); pass '
        '`key=jax.random.key(...)`.')


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


def _modules(module):
  """Name -> (path, module), for the module itself and all inside it."""
  return {_name(path): (path, node)
          for path, node in nnx.iter_graph(module, graph=True)
          if isinstance(node, nnx.Module)}


def _streams(module):
  return {_name(path): node for path, node in nnx.iter_graph(module, graph=True)
          if isinstance(node, nnx.RngStream)}


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


def _name(path):
  return '/'.join(map(str, path))


def _put(tree, path, value):
  """Sets `tree[path]`, with the keys as strings; merges at an empty path."""
  if not path:
    tree.update(value)
    return
  *around, last = map(str, path)
  for key in around:
    tree = tree.setdefault(key, {})
  tree[last] = value
