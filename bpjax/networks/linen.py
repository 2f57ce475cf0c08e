"""Flax linen models as networks of units, with the model left as it is.

A thin interceptor tells which modules are called, and marks the outputs of those
that are named (boundaries, blocks); the units are found in the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any

from bpjax import arguments as arguments_lib
from bpjax import base
from bpjax import inputs as inputs_lib
from bpjax import nn as bpjax_nn
from bpjax.networks import network
from bpjax.networks import unit as unit_lib
import flax
import flax.linen as nn
import jax

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
    mask: str = 'mask',
) -> Network:
  """Makes a network of units out of any Flax linen model, which stays as it is.

  A unit is a product, convolution or lookup in which one operand is made of
  parameters alone (all that `Dense`, `Conv`, `Einsum`, `Embed` and the like do,
  and raw parameters, tied and transposed ones), with its biases; a
  `bpjax.nn.Layer`; or a module that `is_unit` chooses. Everything between units
  keeps its exact derivative, and `print(net.units)` lists the parameters in it.

  Args:
    model: the module.
    is_unit: chooses modules that are units together with their nonlinearity;
      each must hold exactly one affine operation, and no BatchNorm or dropout.
    train_args: keyword arguments of the model's call in training. Default: the
      flags among `train`, `training`, `is_training` (True) and `deterministic`
      (False) that the call takes; `print(net.units)` says which.
    eval_args: the same for evaluation and initialisation; default: those flags
      the other way round.
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
    mask: the keyword argument of the call, `bpjax.Inputs(tokens, mask=...)`, that
      tells which positions are real, `[batch, positions]`, not 0 at those: what
      rules make beside exact derivatives (projected errors, targets, noise)
      leaves the others out. A model that takes no such argument has no mask.

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
  boundaries = arguments_lib.patterns('boundaries', boundaries)
  rngs = arguments_lib.patterns('rngs', rngs)
  arguments_lib.is_unit(is_unit)
  for name, given in (('train_args', train_args), ('eval_args', eval_args)):
    if given is not None and not isinstance(given, Mapping):
      raise ValueError(
          f"`{name}` must be keyword arguments, such as {{'train': True}}, got "
          f'{given!r}.')
  found = inputs_lib.flags(type(model).__call__)
  if train_args is None:
    train_args = found
  if eval_args is None:
    eval_args = inputs_lib.opposite(found)
  return Network(
      model, is_unit, dict(train_args), dict(eval_args), tuple(rngs),
      tuple(boundaries), norm_gain_transport, mask)


class Network(network.Network):
  """A linen model seen as units. Made by `from_linen`."""

  def __init__(
      self, model, is_unit, train_args, eval_args, rngs, boundaries,
      norm_gain_transport, mask):
    unit_lib.check_gain_transport(norm_gain_transport)
    chosen = is_unit or (lambda module: False)
    super().__init__(
        boundaries, lambda m: isinstance(m, bpjax_nn.Layer) or chosen(m),
        mask)
    self.model = model
    self._transports_gain = norm_gain_transport == 'exact'
    self._train_args, self._eval_args = train_args, eval_args
    self.flags = train_args
    self._rngs = rngs

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """Initialises the model.

    Args:
      key: a random key.
      x: the input array `[batch, ...]`, a tuple of several, or `bpjax.Inputs`.

    Returns:
      The variables: `params` and the model's own collections.
    """
    arguments_lib.key('key', key)
    arguments_lib.batch(x)
    variables = dict(inputs_lib.call(
        functools.partial(self.model.init, key), x, **self._eval_args))
    variables.setdefault('params', {})
    self.survey(variables, x)
    return variables

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's output in evaluation mode, for `x` as in `init`."""
    apply = functools.partial(self.model.apply, variables)
    return inputs_lib.call(apply, x, **self._eval_args)

  def _call(self, params, state, x, key, train, notes):
    rngs = {}
    if key is not None:
      names = ('params', *self._rngs)
      rngs = dict(zip(names, jax.random.split(key, len(names))))
    # A new name each time: `nn.jit` would otherwise answer from a trace without
    # marks, or with others.
    fresh = f'_bpjax_{next(_TRACE_IDS)}'
    arguments = self._train_args if train else self._eval_args
    watcher = _Watcher(notes, self._transports_gain)
    try:
      with nn.intercept_methods(watcher):
        apply = functools.partial(
            self.model.apply, {'params': params, **state}, rngs=rngs,
            mutable=[*state, fresh])
        output, collections = inputs_lib.call(apply, x, **arguments)
    except flax.errors.InvalidRngError as error:
      raise ValueError(
          f'the model or the rule draws random numbers ({error}); pass '
          '`key=jax.random.key(...)`, and name the stream in '
          '`from_linen(..., rngs=...)`.') from error
    return output, {c: v for c, v in collections.items() if c in state}


class _Watcher:
  """Tells which modules are called, and marks what is asked for."""

  def __init__(self, notes, transports_gain):
    self._notes, self._transports_gain = notes, transports_gain

  def __call__(self, next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or module.scope is None:
      return next_fun(*args, **kwargs)
    name = '/'.join(module.scope.path)
    self._notes.modules[name] = type(module).__name__
    if isinstance(module, nn.BatchNorm) and unit_lib.uses_the_batch(
        module, args, kwargs):
      self._notes.batch_coupled[name] = True
    if (isinstance(module, _NORMS) and module.use_scale
        and not self._transports_gain):
      next_fun = lambda *args, **kwargs: _fixed_gain(module, args, kwargs)
    return self._notes.called(name, module, next_fun, args, kwargs)


def _fixed_gain(module, args, kwargs):
  """What a norm puts out; its gain stays out of what is sent below."""
  unit_lib.check_features_last(module, '/'.join(module.scope.path))
  flags = {'use_scale': False}
  if hasattr(module, 'use_bias'):
    flags['use_bias'] = False
  params = nn.meta.unbox(module.variables['params'])
  bare = module.clone(parent=module.scope, name=None, **flags)
  with nn.intercept_methods(lambda f, a, k, c: f(*a, **k)):
    x = bare(*args, **kwargs)
  return unit_lib.gain(x, params['scale'], params.get('bias'))
