"""Any function of parameters and data as a network of units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import inputs as inputs_lib
from bpjax.networks import network

STATE = 'state'  # The collection of a function's state.


def from_function(
    apply: Callable[..., Any], *, state: bool = False, mask: str = 'mask'
) -> Network:
  """Makes a network of units out of any pure function of parameters and data.

  Units are the products, convolutions and lookups in which one operand is made
  of parameters alone. A unit is called by the path of its parameter, or of the
  dict that holds it: `{'hidden': {'w': ..., 'b': ...}}` gives `hidden`.

  Args:
    apply: `apply(params, *inputs) -> output`, or with `state` `apply(params,
      state, *inputs) -> (output, state)`. An argument called `key` is passed by
      keyword, a random key or None; so are `train`, `training` and
      `is_training` (whether this is training) and `deterministic` (the
      opposite).
    state: whether the function takes and returns a state.
    mask: as in `bpjax.from_linen`.

  Returns:
    A `Network`. Its variables are `{'params': params}`, with a state `{'params':
    params, 'state': state}`, both nested dicts, lists or other pytrees.

  Raises:
    ValueError: if `apply` cannot be called.

  Example:
    >>> import bpjax, jax, jax.numpy as jnp
    >>> def mlp(params, x):
    ...   h = jnp.tanh(x @ params['hidden']['w'] + params['hidden']['b'])
    ...   return h @ params['out']['w']
    >>> params = {'hidden': {'w': jnp.ones((4, 8)), 'b': jnp.zeros(8)},
    ...           'out': {'w': jnp.ones((8, 3))}}
    >>> net = bpjax.from_function(mlp)
    >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
    >>> rule = bpjax.rules.feedback_alignment()
    >>> feedback = rule.init(jax.random.key(0), net, {'params': params}, x)
    >>> list(net.units)
    ['hidden', 'out']
  """
  arguments.flag('state', state)
  if not callable(apply) or isinstance(apply, type):
    raise ValueError(
        f'`apply` must be a function, got {type(apply).__name__}; pass '
        '`lambda params, x: ...`.')
  return Network(apply, state, mask)


class Network(network.Network):
  """A function seen as units. Made by `from_function`."""

  def __init__(self, apply: Callable[..., Any], state: bool, mask: str):
    super().__init__(mask=mask)
    self._apply, self._has_state = apply, state
    self.flags = inputs_lib.flags(apply)
    self._takes_key = 'key' in inputs_lib.names(apply)

  def init(self, key: base.Key, x: Any) -> dict[str, Any]:
    """Raises: a function's parameters are the user's own."""
    raise ValueError(
        'a network of `from_function` has no parameters of its own; pass '
        "`{'params': params}` wherever `variables` are asked for.")

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The function's output in evaluation mode."""
    output, _ = self._called(
        variables['params'], {STATE: variables.get(STATE)}, x, None, False)
    return output

  def _call(self, params, state, x, key, train, notes):
    del notes
    return self._called(params, state, x, key, train)

  def _called(self, params, state, x, key, train):
    keywords = self.flags if train else inputs_lib.opposite(self.flags)
    if self._takes_key:
      keywords = {**keywords, 'key': key}
    if not self._has_state:
      apply = functools.partial(self._apply, params)
      return inputs_lib.call(apply, x, **keywords), dict(state)
    apply = functools.partial(self._apply, params, state[STATE])
    output, new = inputs_lib.call(apply, x, **keywords)
    return output, {**state, STATE: new}
