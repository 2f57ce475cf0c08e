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
from bpjax import unit as unit_lib
import flax
import flax.linen as nn
from flax.linen import linear
import jax

_AFFINE = (
    nn.Dense, nn.DenseGeneral, linear._Conv, nn.ConvTranspose, nn.Einsum,  # pylint: disable=protected-access
    nn.Embed)
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
  return Network(model, is_unit, dict(train_args), dict(eval_args), tuple(rngs))


class Network(survey_lib.Network):
  """A model seen as units. Made by `from_linen`."""

  def __init__(self, model, is_unit, train_args, eval_args, rngs):
    super().__init__()
    self.model = model
    self._is_unit = is_unit or (lambda module: False)
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
      watch: is told the name of every module that normalises over the batch.

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
            variables, *unit_lib.as_inputs(x), **self._train_args, rngs=rngs,
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
    if (self._watch is not None and isinstance(module, nn.BatchNorm)
        and unit_lib.uses_the_batch(module, args, kwargs)):
      self._watch('/'.join(module.scope.path))
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
    self.name = '/'.join(module.scope.path)
    self.inputs, arguments = unit_lib.take_apart(next_fun, args, kwargs)
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
    return stored[unit_lib.BARE] if set(stored) == {unit_lib.BARE} else stored

  def write(self, collection: str, value: Any, name: str | None = None):
    """Keeps `value` as this unit's part of a collection, or of this call."""
    if name is not None:
      value = {f'{name}_{self._index}': value}
    elif not isinstance(value, Mapping):
      value = {unit_lib.BARE: value}
    for k, v in value.items():
      self._module.put_variable(collection, k, v)

  def key(self) -> base.Key:
    """A random key of this call's own."""
    return self._module.make_rng('rule')

  def has_key(self) -> bool:
    return self._module.has_rng('rule')


class LinenUnit(unit_lib.PureUnit):
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, module, arguments, suspend):
    self._module = module.clone(parent=None, name=None)
    self._arguments = arguments
    self._suspend = suspend
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


def _is_owner(module):
  """Whether a module has parameters, and none inside modules of its own."""
  params = module.variables.get('params', {})
  return bool(params) and not any(
      isinstance(p, Mapping) for p in params.values())
