"""What units of every Flax API share: VJPs, and how a call is taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import inspect
from typing import Any

from bpjax import base
import jax
import jax.numpy as jnp

BARE = 'value'  # Name of the variable that holds a collection's bare array.


class PureUnit:
  """The VJPs of a unit, from its pure functions. See `base.Unit`.

  Attributes:
    info: what is known of the unit, once its network has been surveyed.
    affine_module: its affine operation.
    owns_activation: whether anything follows that operation inside the unit.
  """
  info: base.UnitInfo | None = None
  affine_module: Any
  owns_activation: bool

  def _apply(self, params, inputs, replacement=None):
    """The unit's output, and that of its affine operation.

    `replacement` takes the place of the latter, for what follows it.
    """
    raise NotImplementedError

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


def take_apart(
    function: Callable[..., Any], args: tuple[Any, ...],
    kwargs: Mapping[str, Any]
) -> tuple[tuple[base.Array, ...], Callable[..., Any]]:
  """The arrays among a call's arguments, and how to put others in their place.

  Args:
    function: what is called; its signature gives the arguments their order.
    args: the positional arguments.
    kwargs: the keyword arguments.

  Returns:
    The arrays, and `arguments(arrays) -> (args, kwargs)`, which holds none.
  """
  bound = inspect.signature(function).bind(*args, **kwargs)
  leaves, structure = jax.tree.flatten((bound.args, bound.kwargs))
  slots = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
  inputs = tuple(jnp.asarray(leaves[i]) for i in slots)
  rest = [None if _is_array(leaf) else leaf for leaf in leaves]

  def arguments(inputs):
    filled = list(rest)
    for slot, value in zip(slots, inputs):
      filled[slot] = value
    return jax.tree.unflatten(structure, filled)

  return inputs, arguments


def uses_the_batch(
    norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
  """Whether this call of a BatchNorm normalises over the batch."""
  given = kwargs.get(
      'use_running_average', args[1] if len(args) > 1 else None)
  return not (norm.use_running_average if given is None else given)


def pack(tree: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
  """Public form of a per-unit tree -> Flax collection.

  A unit whose part is a bare array has no name for it in public; Flax needs
  one. It is a bare array where `params` holds a module.
  """
  if not isinstance(tree, Mapping):
    return {BARE: tree} if isinstance(params, Mapping) else tree
  if not isinstance(params, Mapping):
    return dict(tree)
  return {k: pack(v, params.get(k, {})) for k, v in tree.items()}


def unpack(tree: Any) -> Any:
  """Flax collection -> public form; the inverse of `pack`."""
  if not isinstance(tree, Mapping):
    return tree
  if set(tree) == {BARE}:
    return tree[BARE]
  return {k: unpack(v) for k, v in tree.items()}


def _is_array(leaf):
  return isinstance(leaf, (jax.Array, jax.core.Tracer)) or (
      hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'))


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
