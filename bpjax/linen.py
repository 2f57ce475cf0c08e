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
from bpjax import survey as survey_lib
import flax
import flax.linen as nn
from flax.linen import linear
import jax
import jax.numpy as jnp

_AFFINE = (
    nn.Dense, nn.DenseGeneral, linear._Conv, nn.ConvTranspose, nn.Einsum,  # pylint: disable=protected-access
    nn.Embed)
_BARE = 'value'  # Name of the variable that holds a collection's bare array.
_TRACE_IDS = itertools.count()


def from_linen(
    model: nn.Module,
    *,
    is_unit: Callable[[nn.Module], bool] | None = None,
    train_args: Mapping[str, Any] | None = None,
    eval_args: Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ('dropout',),
) -> Network:
  """Makes a network of units out of any Flax linen model, which stays as it is.

  A unit is an affine operation (`Dense`, `DenseGeneral`, `Conv`, `ConvLocal`,
  `ConvTranspose`, `Einsum`, `Embed`, or a subclass), or a module that `is_unit`
  chooses. Everything between units keeps its exact derivative.

  Args:
    model: the module.
    is_unit: chooses modules that are units together with their nonlinearity;
      each must hold exactly one affine operation, and no BatchNorm or dropout.
    train_args: keyword arguments of the model's call in training. Default:
      `{'train': True}` for a model whose call takes `train`, else none.
    eval_args: the same for evaluation and initialisation; default
      `{'train': False}` or none.
    rngs: names of the random streams that the model draws from in training.

  Returns:
    A `Network`.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]))
    >>> variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> list(net.units)
    ['layers_0', 'layers_2']
  """
  if not isinstance(model, nn.Module):
    raise ValueError(
        f'`model` must be a flax.linen.Module, got {type(model).__name__}; pass '
        'an instance such as `MLP()`, not a class or a function.')
  takes_train = 'train' in inspect.signature(type(model).__call__).parameters
  if train_args is None:
    train_args = {'train': True} if takes_train else {}
  if eval_args is None:
    eval_args = {'train': False} if takes_train else {}
  return Network(model, is_unit, dict(train_args), dict(eval_args), tuple(rngs))


class Network:
  """A model seen as units. Made by `from_linen`."""

  def __init__(self, model, is_unit, train_args, eval_args, rngs):
    self.model = model
    self._is_unit = is_unit or (lambda module: False)
    self._train_args = train_args
    self._eval_args = eval_args
    self._rngs = rngs
    self._surveys = {}
    self._latest = None

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """Initialises the model.

    Args:
      key: a random key.
      x: the input array `[batch, ...]`, or a tuple of the model's inputs.

    Returns:
      The variables: `params` and the model's own collections.
    """
    variables = dict(self.model.init(key, *as_inputs(x), **self._eval_args))
    variables.setdefault('params', {})
    self.survey(variables, x)
    return variables

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's output in evaluation mode, for `x` as in `init`."""
    return self.model.apply(variables, *as_inputs(x), **self._eval_args)

  @property
  def units(self) -> survey_lib.Units:
    """Name -> unit, in the order of the calls.

    A unit has `info` and its pure functions (`bpjax.Unit`): what
    `rule.backward` takes. `net.units.exact` lists the parameters that no unit owns (norm scales, raw
    `self.param`): a credit rule leaves them on their exact gradient.
    Known once the network has seen an input's shape (`init`).
    """
    if self._latest is None:
      raise ValueError(
          '`net.units` is not known before the network has seen an input; call '
          '`net.init(key, x)` first.')
    return self._latest.units

  def survey(self, variables: Mapping[str, Any], x: Any) -> survey_lib.Survey:
    """What is known of the units for inputs of this shape; traced once."""
    leaves, structure = jax.tree.flatten((variables, x))
    cache_key = (structure, tuple(map(jax.typeof, leaves)))
    if cache_key not in self._surveys:
      self._surveys[cache_key] = survey_lib.take(self, variables, x)
    self._latest = self._surveys[cache_key]
    return self._latest

  def run(
      self,
      variables: Mapping[str, Any],
      x: Any,
      visit: Callable[[Call], Any],
      key: base.Key | None,
      mutable: Sequence[str],
      owners: bool = False,
      watch: Callable[..., None] | None = None,
  ) -> tuple[Any, dict[str, Any]]:
    """Runs the model in training mode; `visit` answers for every unit's call.

    Args:
      variables: all collections, those of the engine included.
      x: the input or the tuple of inputs.
      visit: takes a `Call` and returns the unit's output.
      key: for the model's random streams and the rule's, or None.
      mutable: the collections to return.
      owners: visit every leaf module that owns parameters, norms included,
        instead of the units.
      watch: is told of every module's call, `(module, args, kwargs)`.

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
    interceptor = _Interceptor(self._is_unit, visit, owners, watch)
    try:
      with nn.intercept_methods(interceptor):
        output, collections = self.model.apply(
            variables, *as_inputs(x), **self._train_args, rngs=rngs,
            mutable=[*mutable, fresh])
    except flax.errors.InvalidRngError as error:
      raise ValueError(
          f'the model or the rule draws random numbers ({error}); pass '
          '`key=jax.random.key(...)`, and name the stream in '
          '`from_linen(..., rngs=...)`.') from error
    return output, dict(collections)


class _Interceptor:
  """Hands the calls of units to `visit`, and passes all others on."""

  def __init__(self, is_unit, visit, owners, watch):
    self._is_unit = is_unit
    self._visit = visit
    self._owners = owners
    self._watch = watch
    self._counts = {}  # id(scope) -> (scope, calls so far)
    self._suspended = False

  def __call__(self, next_fun, args, kwargs, context):
    module = context.module
    if (self._suspended or context.method_name != '__call__'
        or module.scope is None or module.is_initializing()):
      return next_fun(*args, **kwargs)
    if self._watch is not None:
      self._watch(module, args, kwargs)
    if self._owners:
      chosen = _is_owner(module)
    else:
      chosen = isinstance(module, _AFFINE) or self._is_unit(module)
    if not chosen:
      return next_fun(*args, **kwargs)
    scope = module.scope
    _, index = self._counts.get(id(scope), (scope, 0))
    self._counts[id(scope)] = (scope, index + 1)
    return self._visit(Call(
        module, next_fun, args, kwargs, index, self._suspend, self._owners))

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
    bound = inspect.signature(next_fun).bind(*args, **kwargs)
    leaves, structure = jax.tree.flatten((bound.args, bound.kwargs))
    slots = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def arguments(inputs):
      filled = list(leaves)
      for slot, value in zip(slots, inputs):
        filled[slot] = value
      return jax.tree.unflatten(structure, filled)

    self.name = '/'.join(module.scope.path)
    self.inputs = tuple(jnp.asarray(leaves[i]) for i in slots)
    leaves = [None if _is_array(leaf) else leaf for leaf in leaves]
    self.params = nn.meta.unbox(module.variables.get('params', {}))
    self._module = module
    self._next_fun = next_fun
    self._arguments = arguments
    self._index = index
    self._suspend = suspend
    self.unit = None if owners else LinenUnit(module, arguments, suspend)

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
    stored = self._module.variables.get(collection)
    if not stored:
      return None
    if name is not None:
      return stored.get(f'{name}_{self._index}')
    stored = dict(stored)
    return stored[_BARE] if set(stored) == {_BARE} else stored

  def write(self, collection: str, value: Any, name: str | None = None):
    """Keeps `value` as this unit's part of a collection, or of this call."""
    if name is not None:
      value = {f'{name}_{self._index}': value}
    elif not isinstance(value, Mapping):
      value = {_BARE: value}
    for k, v in value.items():
      self._module.put_variable(collection, k, v)

  def key(self) -> base.Key:
    """A random key of this call's own."""
    return self._module.make_rng('rule')

  def has_key(self) -> bool:
    return self._module.has_rng('rule')


class LinenUnit:
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, module, arguments, suspend):
    self._module = module.clone(parent=None, name=None)
    self._arguments = arguments
    self._suspend = suspend
    self.info: base.UnitInfo | None = None
    self.affine_module = self._module
    self.owns_activation = not isinstance(module, _AFFINE)
    state = sorted(set(module.variables) - {'params', *base.COLLECTIONS})
    if self.owns_activation and state:
      raise ValueError(
          f'`is_unit` chose `{"/".join(module.scope.path)}`, which holds '
          f'{state} (BatchNorm does): a unit is a pure function of its '
          'parameters and inputs; use LayerNorm or GroupNorm, or keep the norm '
          'outside the unit.')

  def _apply(self, params, inputs, replacement=None):
    """The module's output, and its affine child's; see `activation`."""
    args, kwargs = self._arguments(inputs)
    seen = []

    def intercept(next_fun, args, kwargs, context):
      if (not isinstance(context.module, _AFFINE)
          or context.method_name != '__call__'):
        return next_fun(*args, **kwargs)
      seen.append((context.module, next_fun(*args, **kwargs)))
      return seen[-1][1] if replacement is None else replacement

    with self._suspend():
      if not self.owns_activation:
        out = self._module.apply({'params': params}, *args, **kwargs)
        return out, out
      with nn.intercept_methods(intercept):
        out = self._module.apply({'params': params}, *args, **kwargs)
    if len(seen) != 1:
      raise ValueError(
          f'`is_unit` chose `{type(self._module).__name__}`, which calls '
          f'{len(seen)} affine operations; a unit has exactly one: choose the '
          'smaller modules inside it.')
    self.affine_module = seen[0][0].clone(parent=None, name=None)
    return out, seen[0][1]

  def affine(self, params, inputs):
    return self._apply(params, inputs)[1]

  def activation(self, params, pre, inputs):
    if not self.owns_activation:
      return pre
    return self._apply(params, inputs, pre)[0]

  def __call__(self, params, inputs):
    """Both outputs, `pre` and `out`."""
    out, pre = self._apply(params, inputs)
    return pre, out

  def delta(self, params, activations, teaching):
    if not self.owns_activation:
      return base.Delta(teaching)
    floats = _floats(activations.inputs)
    _, pull = jax.vjp(
        lambda p, pre, xs: self.activation(
            p, pre, _merge(activations.inputs, xs)),
        params, activations.pre, floats)
    params, pre, inputs = pull(teaching)
    return base.Delta(pre, params, _align(activations.inputs, inputs))

  def params_vjp(self, params, activations, delta):
    _, pull = jax.vjp(lambda p: self.affine(p, activations.inputs), params)
    own, = pull(delta.pre)
    if delta.params is None:
      return own
    return jax.tree.map(jnp.add, own, delta.params)

  def inputs_vjp(self, params, weights, activations, delta):
    params = _overlay(params, weights)
    floats = _floats(activations.inputs)
    _, pull = jax.vjp(
        lambda xs: self.affine(params, _merge(activations.inputs, xs)), floats)
    sent, = pull(delta.pre)
    sent = _align(activations.inputs, sent)
    if delta.inputs is None:
      return sent
    return tuple(
        None if a is None else a + b for a, b in zip(sent, delta.inputs))


def as_inputs(x: Any) -> tuple[Any, ...]:
  """The model's positional inputs: `x` itself, or the tuple that it is."""
  return x if isinstance(x, tuple) else (x,)


def pack(tree: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
  """Public form of a per-unit tree -> Flax collection.

  A unit whose part is a bare array has no name for it in public; Flax needs
  one. It is a bare array where `params` holds a module.
  """
  if not isinstance(tree, Mapping):
    return {_BARE: tree} if isinstance(params, Mapping) else tree
  if not isinstance(params, Mapping):
    return dict(tree)
  return {k: pack(v, params.get(k, {})) for k, v in tree.items()}


def unpack(tree: Any) -> Any:
  """Flax collection -> public form; the inverse of `pack`."""
  if not isinstance(tree, Mapping):
    return tree
  if set(tree) == {_BARE}:
    return tree[_BARE]
  return {k: unpack(v) for k, v in tree.items()}


def _is_array(leaf):
  return isinstance(leaf, (jax.Array, jax.core.Tracer)) or (
      hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'))


def _is_owner(module):
  """Whether a module has parameters, and none inside modules of its own."""
  params = module.variables.get('params', {})
  return bool(params) and not any(
      isinstance(p, Mapping) for p in params.values())


def _floats(inputs):
  return tuple(x for x in inputs if jnp.issubdtype(x.dtype, jnp.inexact))


def _merge(inputs, floats):
  floats = iter(floats)
  return tuple(
      next(floats) if jnp.issubdtype(x.dtype, jnp.inexact) else x
      for x in inputs)


def _align(inputs, floats):
  floats = iter(floats)
  return tuple(
      next(floats) if jnp.issubdtype(x.dtype, jnp.inexact) else None
      for x in inputs)


def _overlay(params, weights):
  """`params` with the entries that `weights` has put in their place."""
  if not isinstance(weights, Mapping):
    return weights
  return {
      k: _overlay(v, weights[k]) if k in weights else v
      for k, v in params.items()}
