"""Flax linen models as networks of units, with the model left as it is.

`nn.intercept_methods` hands every call of a unit to an engine. All that the
engines know of Flax is the `Network` and the `Call` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import contextlib
import inspect
import itertools
from typing import Any

from bpjax import base
from bpjax import nn as bpjax_nn
from bpjax import paths
from bpjax import survey as survey_lib
from bpjax import unit as unit_lib
import flax
import flax.linen as nn
from flax.linen import linear
import jax

_AFFINE = (
    nn.Dense, nn.DenseGeneral, linear._Conv, nn.ConvTranspose, nn.Einsum,  # pylint: disable=protected-access
    nn.Embed)
_NORMS = (
    nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm)
_TRACE_IDS = itertools.count()


def from_linen(
    model: nn.Module,
    *,
    is_unit: Callable[[nn.Module], bool] | None = None,
    train_args: Mapping[str, Any] | None = None,
    eval_args: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ('dropout',),
    boundaries: Sequence[str] = (),
    norm_gain_transport: str = 'exact',
) -> Network:
  """Makes a network of units out of any Flax linen model, which stays as it is.

  A unit is an affine operation (`Dense`, `DenseGeneral`, `Conv`, `ConvLocal`,
  `ConvTranspose`, `Einsum`, `Embed`, or a subclass), a `bpjax.nn.Layer`, or a
  module that `is_unit` chooses. Everything between units keeps its exact derivative.

  Args:
    model: the module.
    is_unit: chooses modules that are units together with their nonlinearity;
      each must hold exactly one affine operation, and no BatchNorm or dropout.
    train_args: keyword arguments of the model's call in training. Default:
      `{'train': True}` for a model whose call takes `train`, else none.
    eval_args: the same for evaluation and initialisation; default
      `{'train': False}` or none.
    rngs: names of the random streams that the model draws from in training.
    boundaries: globs for modules, such as `stage_*/block_*`, whose outputs are
      units, too: `stage_1/block_0/boundary`, the identity without parameters.
      A rule that brings the error there directly replaces all that arrives, so
      that skip connections carry nothing past it; others pass it on.
    norm_gain_transport: how an error passes the gain of a norm (BatchNorm,
      LayerNorm, GroupNorm, RMSNorm, InstanceNorm), which is a diagonal weight.
      'exact': times the gain itself, a mild transport of weights, in every
      rule; 'feedback_diag': times a fixed diagonal of ones, at which gains
      begin. The gain's own gradient is exact in both.

  Returns:
    A `Network`.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
    >>> net = bpjax.from_linen(model)
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> list(net.units)
    ['layers_0', 'layers_2']
  """
  if not isinstance(model, nn.Module):
    raise ValueError(
        f'`model` must be a flax.linen.Module, got {type(model).__name__}; '
        'pass an instance such as `MLP()`, not a class or a function.')
  takes_train = 'train' in inspect.signature(type(model).__call__).parameters
  if train_args is None:
    train_args = {'train': True} if takes_train else {}
  if eval_args is None:
    eval_args = {'train': False} if takes_train else {}
  return Network(
      model, is_unit, dict(train_args), dict(eval_args), tuple(rngs),
      tuple(boundaries), norm_gain_transport)


class Network(survey_lib.Network):
  """A model seen as units. Made by `from_linen`."""

  def __init__(
      self, model, is_unit, train_args, eval_args, rngs, boundaries,
      norm_gain_transport):
    super().__init__(boundaries)
    unit_lib.check_gain_transport(norm_gain_transport)
    self._transports_gain = norm_gain_transport == 'exact'
    self.model = model
    self._chosen = is_unit or (lambda module: False)
    self._is_unit = lambda m: isinstance(m, bpjax_nn.Layer) or self._chosen(m)
    self._train_args = train_args
    self._eval_args = eval_args
    self._rngs = rngs

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """Initialises the model.

    Args:
      key: a random key.
      x: the input array `[batch, ...]`, or a tuple of the model's inputs.

    Returns:
      The variables: `params` and the model's own collections.
    """
    inputs = unit_lib.as_inputs(x)
    variables = dict(self.model.init(key, *inputs, **self._eval_args))
    variables.setdefault('params', {})
    self.survey(variables, x)
    return variables

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's output in evaluation mode, for `x` as in `init`."""
    inputs = unit_lib.as_inputs(x)
    return self.model.apply(variables, *inputs, **self._eval_args)

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
    """Runs the model in training mode; `visit` answers for every unit's call.

    Args:
      variables: all collections, those of the engine included.
      x: the input or the tuple of inputs.
      visit: takes a `Call` and returns the unit's output.
      key: for the model's random streams and the rule's, or None.
      mutable: the collections to return.
      owners: visit every leaf module that owns parameters, norms included,
        instead of the units; but a module that `is_unit` chose as a whole.
      watch: is told the name of every module that normalises over the batch.
      train: False for evaluation mode.
      cuts: where gradients stop: `cuts.enter(path)` says whether what a module
        reads is detached, and `cuts.leave(path, module)` whether what it puts
        out is; None for a module that is no block. What blocks put out is kept
        as `output` in the collection `blocks`; `cuts.kept(path)` says when, and
        `cuts.onward(path, out)` is what goes on in place of what is detached.

    Returns:
      The model's output, and the mutable collections.
    """
    rngs = {}
    if key is not None:
      names = ('rule', 'params', *self._rngs)
      rngs = dict(zip(names, jax.random.split(key, len(names))))
    # A new name each time: `nn.jit` would otherwise answer from a trace that
    # another interceptor, or none, has seen.
    fresh = f'_bpjax_{next(_TRACE_IDS)}'
    interceptor = _Interceptor(
        self._chosen if owners else self._is_unit, self.boundaries, visit,
        owners, watch, self._transports_gain, cuts)
    arguments = self._train_args if train else self._eval_args
    try:
      with nn.intercept_methods(interceptor):
        output, collections = self.model.apply(
            variables, *unit_lib.as_inputs(x), **arguments, rngs=rngs,
            mutable=[*mutable, fresh])
    except flax.errors.InvalidRngError as error:
      raise ValueError(
          f'the model or the rule draws random numbers ({error}); pass '
          '`key=jax.random.key(...)`, and name the stream in '
          '`from_linen(..., rngs=...)`.') from error
    return output, dict(collections)


class _Interceptor:
  """Hands the calls of units to `visit`, and passes all others on."""

  def __init__(
      self, is_unit, boundaries, visit, owners, watch, transports_gain, cuts):
    self._transports_gain = transports_gain
    self._cuts = cuts
    self._is_unit = is_unit
    self._boundaries = boundaries
    self._visit = visit
    self._owners = owners
    self._watch = watch
    self._counts = {}  # (id(root scope), path) -> (root scope, calls so far)
    self._suspended = False

  def __call__(self, next_fun, args, kwargs, context):
    module = context.module
    if (self._suspended or context.method_name != '__call__'
        or module.scope is None or module.is_initializing()):
      return next_fun(*args, **kwargs)
    if self._cuts is None:
      return self._called(next_fun, args, kwargs, module)
    name = '/'.join(module.scope.path)
    if self._cuts.enter(name):
      args, kwargs = unit_lib.detached((args, kwargs))
    out = self._called(next_fun, args, kwargs, module)
    stops = self._cuts.leave(name, module)
    if stops is None:
      return out
    before = module.variables.get('blocks', {}).get('output')
    lists = module.scope.is_mutable_collection('blocks')
    unit_lib.check_block(name, out, before, lists)
    module.put_variable('blocks', 'output', out)
    self._cuts.kept(name)
    return self._cuts.onward(name, out) if stops else out

  def _called(self, next_fun, args, kwargs, module):
    """What one module puts out, under the engine."""
    if (self._watch is not None and isinstance(module, nn.BatchNorm)
        and unit_lib.uses_the_batch(module, args, kwargs)):
      self._watch('/'.join(module.scope.path))
    plain = _is_owner(module) if self._owners else isinstance(module, _AFFINE)
    if plain or self._is_unit(module):
      return self._visit(Call(
          module, next_fun, args, kwargs, self._index(module), self._suspend,
          self._owners))
    if (isinstance(module, _NORMS) and module.use_scale
        and not self._owners and not self._transports_gain):
      out = self._fixed_gain(module, args, kwargs)
    else:
      out = next_fun(*args, **kwargs)
    name = '/'.join(module.scope.path)
    if not self._owners and any(
        paths.is_module(glob, name) for glob in self._boundaries):
      return self._visit(BoundaryCall(module, name, out, self._index(module)))
    return out

  def _fixed_gain(self, module, args, kwargs):
    """What a norm puts out; its gain stays out of what is sent below."""
    unit_lib.check_features_last(module, '/'.join(module.scope.path))
    flags = {'use_scale': False}
    if hasattr(module, 'use_bias'):
      flags['use_bias'] = False
    params = nn.meta.unbox(module.variables['params'])
    bare = module.clone(parent=module.scope, name=None, **flags)
    with self._suspend():
      x = bare(*args, **kwargs)
    return unit_lib.gain(x, params['scale'], params.get('bias'))

  def _index(self, module):
    """How often this module was called before."""
    # The scope itself is a new one in every call of a compact method, and the
    # path the same in every trace of a lifted function.
    key = (id(module.scope.root), module.scope.path)
    _, index = self._counts.get(key, (None, 0))
    self._counts[key] = (module.scope.root, index + 1)
    return index

  @contextlib.contextmanager
  def _suspend(self):
    before, self._suspended = self._suspended, True
    try:
      yield
    finally:
      self._suspended = before


class Call:
  """One call of one unit, inside the running model."""

  def __init__(self, module, next_fun, args, kwargs, index, suspend, owners):
    self.name = '/'.join(module.scope.path)
    inputs, arguments = unit_lib.take_apart(next_fun, args, kwargs)
    held = {} if isinstance(module, _AFFINE) or owners else _constants(module)
    constants, structure = jax.tree.flatten(held)
    self.inputs = (*inputs, *constants)
    self.params = nn.meta.unbox(module.variables.get('params', {}))
    self._module = module
    self._next_fun = next_fun
    self._arguments = arguments
    self._index = index
    self._suspend = suspend
    self.unit = None
    if not owners:
      self.unit = LinenUnit(module, arguments, suspend, structure)

  def original(self) -> Any:
    """Runs the module as the model wrote it."""
    args, kwargs = self._arguments(self.inputs)
    with self._suspend():
      return self._next_fun(*args, **kwargs)

  def can_hold(self, collection: str) -> bool:
    """Whether a variable of this collection can be kept at the unit."""
    return self._module.scope.is_mutable_collection(collection)

  def read(self, collection: str, name: str | None = None) -> Any | None:
    """This unit's part of a collection, or None."""
    stored = self._stored(collection)
    if not stored:
      return None
    if name is not None:
      return stored.get(f'{name}_{self._index}')
    stored = dict(stored)
    return stored[unit_lib.BARE] if set(stored) == {unit_lib.BARE} else stored

  def write(self, collection: str, value: Any, name: str | None = None):
    """Keeps `value` as this unit's part of a collection, or of this call."""
    if name is not None:
      value = {f'{name}_{self._index}': value}
    elif not isinstance(value, Mapping):
      value = {unit_lib.BARE: value}
    self._keep(collection, value)

  def _stored(self, collection):
    return self._module.variables.get(collection)

  def _keep(self, collection, values):
    for k, v in values.items():
      self._module.put_variable(collection, k, v)

  def key(self) -> base.Key:
    """A random key of this call's own."""
    return self._module.make_rng('rule')

  def has_key(self) -> bool:
    return self._module.has_rng('rule')


class BoundaryCall(Call):
  """What a module has put out, as a call of a unit without parameters."""

  def __init__(self, module, name, out, index):  # pylint: disable=super-init-not-called
    unit_lib.check_boundary(name, out)
    self.name = unit_lib.boundary_name(name)
    self.inputs = (out,)
    self.params = {}
    self.unit = unit_lib.Boundary()
    self._module = module
    self._index = index

  def original(self):
    return self.inputs[0]

  def _stored(self, collection):
    around = self._module.variables.get(collection, {})
    return around.get(base.BOUNDARY.lower())

  def _keep(self, collection, values):
    before = self._stored(collection) or {}
    self._module.put_variable(
        collection, base.BOUNDARY.lower(), {**before, **values})


class LinenUnit(unit_lib.PureUnit):
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, module, arguments, suspend, constants):
    self._module = module.clone(parent=None, name=None)
    self._arguments = arguments
    self._constants = constants  # Their structure; they are the last inputs.
    self._suspend = suspend
    self.affine_module = self._module
    self.owns_activation = not isinstance(module, _AFFINE)
    state = sorted(
        set(module.variables)
        - {'params', *base.COLLECTIONS, *base.CONSTANTS})
    if self.owns_activation and state:
      raise ValueError(
          f'`is_unit` chose `{"/".join(module.scope.path)}`, which holds '
          f'{state} (BatchNorm does): a unit is a pure function of its '
          'parameters and inputs; use LayerNorm or GroupNorm, or keep the norm '
          'outside the unit.')

  def _apply(self, params, inputs, replacement=None):
    args, kwargs = self._arguments(inputs)
    first = len(inputs) - self._constants.num_leaves
    variables = {
        'params': params,
        **jax.tree.unflatten(self._constants, inputs[first:])}
    seen = []

    def intercept(next_fun, args, kwargs, context):
      if (not isinstance(context.module, _AFFINE)
          or context.method_name != '__call__'):
        return next_fun(*args, **kwargs)
      seen.append((context.module, next_fun(*args, **kwargs)))
      return seen[-1][1] if replacement is None else replacement

    with self._suspend():
      if not self.owns_activation:
        out = self._module.apply(variables, *args, **kwargs)
        return out, out
      with nn.intercept_methods(intercept):
        out = self._module.apply(variables, *args, **kwargs)
    if len(seen) != 1:
      raise ValueError(
          f'`is_unit` chose `{type(self._module).__name__}`, which calls '
          f'{len(seen)} affine operations; a unit has exactly one: choose the '
          'smaller modules inside it.')
    self.affine_module = seen[0][0].clone(parent=None, name=None)
    return out, seen[0][1]


def _constants(module):
  """The collections of a module that never change."""
  return {
      c: nn.meta.unbox(module.variables[c])
      for c in base.CONSTANTS if c in module.variables}


def _is_owner(module):
  """Whether a module has parameters, and none inside modules of its own."""
  params = module.variables.get('params', {})
  return bool(params) and not any(
      isinstance(p, Mapping) for p in params.values())
