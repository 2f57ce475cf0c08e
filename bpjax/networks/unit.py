"""What units of every Flax API share: VJPs, and how a call is taken apart."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Mapping, Sequence
import functools
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax.networks import examples
from bpjax.networks import run as run_lib
from bpjax.networks import trace as trace_lib
import jax
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

GAIN_TRANSPORTS = ('exact', 'feedback_diag')
GAIN = '_gain'  # Name of the function whose message leaves a gain out.


class PureUnit:
  """The VJPs of a unit, from its pure functions. See `base.Unit`.

  Attributes:
    info: what is known of the unit, once its network has been surveyed.
    owns_activation: whether anything follows that operation inside the unit.
  """
  info: base.UnitInfo | None = None
  owns_activation: bool

  def _apply(self, params, inputs, replacement=None):
    """The unit's output, and that of its affine operation.

    `replacement` takes the place of the latter, for what follows it.
    """
    raise NotImplementedError

  def program(self) -> Hashable:
    """What the unit computes, see `TraceUnit.program`; None: nothing is alike."""

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


class Bound:
  """A unit with its parameters and activations. See `base.BoundUnit`."""

  def __init__(
      self, unit: PureUnit, params: base.Tree, activations: base.Activations):
    self._unit, self._activations = unit, activations
    self.info, self.params, self.affine = unit.info, params, unit.affine
    self.inputs, self.pre, self.out = activations

  def delta(self, teaching):
    return self._unit.delta(self.params, self._activations, teaching)

  def grad(self, delta):
    return self._unit.params_vjp(
        self.params, self._activations, _checked(delta, 'grad'))

  def send(self, delta, weights):
    return self._unit.inputs_vjp(
        self.params, weights, self._activations, _checked(delta, 'send'))

  def activation(self, pre):
    return self._unit.activation(self.params, pre, self.inputs)


def _checked(delta, name):
  if not isinstance(delta, base.Delta):
    raise TypeError(
        f'`unit.{name}` takes what `unit.delta(teaching)` returned, got '
        f'{type(delta).__name__}.')
  return delta


class Boundary(PureUnit):
  """The output of a module as a unit: the identity, without parameters."""
  owns_activation = False

  def _apply(self, params, inputs, replacement=None):
    return inputs[0], inputs[0]


# What computes the same for any number of examples.
_OF_ANY_SIZE = frozenset({
    'add', 'conv_general_dilated', 'convert_element_type', 'div', 'dot_general',
    'gather', 'mul', 'neg', 'ragged_dot', 'ragged_dot_general', 'sub',
    'transpose'})


class TraceUnit(PureUnit):
  """The pure functions of one unit; holds no arrays. See `base.Unit`."""

  def __init__(self, step: trace_lib.Step, entry: Any):
    self.step = step
    self.owns_activation = bool(step.tail)
    self._names = _param_names(step, entry)
    self.weights_name = self._names.get(step.weights)

  def program(self) -> Hashable:
    """What the unit computes: equal for units that do the same with other values."""
    step, numbers = self.step, {}
    number = lambda v: numbers.setdefault(v, len(numbers))

    def read(atom):
      if isinstance(atom, Literal):
        value = np.asarray(atom.val)
        return atom.aval, value.tobytes()
      return number(atom), atom.aval

    ends = tuple(map(read, (*self._names, *step.inputs)))
    equations = tuple(
        (eqn.primitive, tuple(map(read, eqn.invars)), tuple(map(read, eqn.outvars)),
         tuple((k, _hashable(v)) for k, v in sorted(eqn.params.items())))
        for eqn in (*step.eqns, *step.tail))
    return (
        tuple(self._names.values()), self.weights_name, ends, equations,
        len(step.tail), step.has_head, number(step.out), number(step.pre),
        tuple(map(number, step.tail_inputs)), tuple(map(number, step.untrained)))

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
    count, size = self._count(inputs), self._count([v.aval for v in step.inputs])
    if count != size and (
        self.info and self.info.by_example or self._holds_batch):
      return self._in_parts(params, inputs, count, size)
    env = {v: _at(params, name) for v, name in self._names.items()}
    env.update(zip(step.inputs, inputs))
    return run_lib.evaluate(step.eqns, env, step.pre or step.out)

  @functools.cached_property
  def _holds_batch(self):
    """Whether the number of examples is in the equations: in a reshape, say."""
    step = self.step
    if step.has_head:
      return True
    of_data = set(step.inputs)
    for eqn in step.eqns:
      if any(v in of_data for v in eqn.invars if not isinstance(v, Literal)):
        if eqn.primitive.name not in _OF_ANY_SIZE:
          return True
        of_data.update(eqn.outvars)
    return False

  def _places(self, count):
    """Where examples lie in each of so many inputs."""
    return [self.info.place(i) if self.info else None for i in range(count)]

  def _count(self, inputs):
    """The number of examples."""
    place = self._places(len(inputs))[0]
    if place is None:
      return inputs[0].shape[0]
    axis, _, own = place
    return own * inputs[0].shape[axis] // self.step.inputs[0].aval.shape[axis]

  def _in_parts(self, params, inputs, count, size):
    """`affine` for another number of examples than that of the trace.

    What lies around the product may have the number in its equations, and
    examples may have weights of their own. Whole numbers stay as they are.
    """
    parts = -(-count // size)
    places = self._places(len(inputs))
    shapes = [v.aval.shape for v in self.step.inputs]
    cut = {}
    for i, (x, place) in enumerate(zip(inputs, places)):
      if jnp.issubdtype(x.dtype, jnp.inexact):
        x = examples.first(x, place and (*place[:2], count))
        cut[i] = jnp.resize(x, (parts, size, *x.shape[1:]))

    def one(part):
      own = tuple(
          examples.back(part[i], shapes[i], places[i]) if i in part else x
          for i, x in enumerate(inputs))
      return examples.first(self.affine(params, own), made)

    made = self.info.examples if self.info else None
    # Ragged products cannot be batched.
    by_example = self.info and self.info.by_example
    loop = jax.lax.map if by_example else lambda f, xs: jax.vmap(f)(xs)
    out = loop(one, cut)
    out = out.reshape(-1, *out.shape[2:])[:count]
    return examples.back(out, (self.step.pre or self.step.out).aval.shape, made)


def alike(
    plan: trace_lib.Plan, entries: Mapping[str, Any]) -> Mapping[Hashable, int]:
  """How many calls of units compute the same, by `TraceUnit.program`."""
  return collections.Counter(
      TraceUnit(step, entries.get(step.name)).program()
      for step, _ in plan.walk() if step.how == 'unit')


def _hashable(value):
  """A parameter of an equation as a key: itself, or which object it is."""
  try:
    hash(value)
  except TypeError:
    return id(value)
  return value


def _param_names(step, entry):
  """Variable -> the name of what it is made of, inside the unit."""
  names, taken = {}, set()
  for variable, view in step.params.items():
    leaves = view.leaves
    if entry is not None and variable is step.weights:
      leaves = entry.principal
    name = leaves[0] if entry is None else entry.relative(leaves[0])
    if entry is not None and variable is not step.weights:
      name = bias_name(name)
    while name in taken:
      name += '_again'
    taken.add(name)
    names[variable] = name
  return names


def bias_name(name):
  """Biases are called so for rules, whatever the model calls them."""
  around = name.rpartition('/')[0]
  return f'{around}/bias' if around else 'bias'


def _at(tree, name):
  for part in name.split('/'):
    tree = tree[part]
  return tree


def boundary_name(module: str) -> str:
  """The name of the unit at the output of a module.

  Example:
    >>> boundary_name('stage_1/block_0')
    'stage_1/block_0/boundary'
  """
  return f'{module}/{base.BOUNDARY.lower()}'


def check_boundary(module: str, out: Any) -> None:
  """Raises a ValueError unless a module's output is one array of floats."""
  if not (_is_array(out) and jnp.issubdtype(out.dtype, jnp.inexact)):
    raise ValueError(
        f'module `{module}` of `boundaries` must return one array of floats, '
        f'got {type(out).__name__}; name a module inside or around it.')


def check_block(name: str, out: Any) -> None:
  """Raises a ValueError unless a block puts out one array of floats."""
  if not (_is_array(out) and jnp.issubdtype(out.dtype, jnp.inexact)):
    raise ValueError(
        f'block `{name}` must return one array of floats, got '
        f'{type(out).__name__}; name a module inside or around it.')


def uses_the_batch(
    norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
  """Whether this call of a BatchNorm normalises over the batch."""
  given = kwargs.get(
      'use_running_average', args[1] if len(args) > 1 else None)
  return not (norm.use_running_average if given is None else given)


def check_gain_transport(value: str) -> None:
  """Raises a ValueError for what `norm_gain_transport` cannot be."""
  if value not in GAIN_TRANSPORTS:
    raise ValueError(
        "`norm_gain_transport` must be 'exact' or 'feedback_diag', got "
        f'{value!r}.')


def check_features_last(norm: Any, name: str) -> None:
  """Raises a ValueError unless a norm has its features on the last axis."""
  axes = getattr(norm, 'feature_axes', getattr(norm, 'axis', -1))
  if axes not in (-1, (-1,), [-1]):
    raise ValueError(
        f"`norm_gain_transport='feedback_diag'` needs features on the last "
        f'axis, and norm `{name}` has them on {axes}.')


def gain(
    x: base.Array, scale: base.Array, bias: base.Array | None) -> base.Array:
  """A norm's gain and shift, whose message does not carry the gain.

  Args:
    x: what was normalised, `[batch, ..., features]`.
    scale: the gain, `[features]`.
    bias: the shift, `[features]`, or None.

  Returns:
    `scale * x + bias`. Its gradients with respect to `scale` and `bias` are
    exact; towards `x`, a gain of 1 stands in, at which gains begin.
  """
  out = _gain(x, scale.astype(x.dtype))
  return out if bias is None else out + bias.astype(x.dtype)


@jax.custom_vjp
def _gain(x, scale):
  return x * scale


def _gain_backward(residuals, teaching):
  x, = residuals
  axes = tuple(range(x.ndim - 1))
  return teaching, jnp.sum(teaching * x, axis=axes)


_gain.defvjp(lambda x, scale: (x * scale, (x,)), _gain_backward)


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
