"""Where the examples of a batch lie in an array, and how to bring them first."""

from __future__ import annotations

from bpjax import base
import jax.numpy as jnp

# (axis, stride, count): example i is where the index of that axis, divided by
# the stride and modulo the count, is i.
Place = tuple[int, int, int]


def first_place(shape: tuple[int, ...]) -> Place:
  """Where examples lie that have the first axis to themselves."""
  return 0, 1, shape[0]


def first(x: base.Array, place: Place | None) -> base.Array:
  """`x` as `[batch, ...]`, with the axes around the examples' in their order.

  Args:
    x: an array.
    place: where its examples lie; None: on the first axis.

  Example:
    >>> import jax.numpy as jnp
    >>> folded = jnp.zeros((3 * 5, 4))  # Three examples of five tokens.
    >>> first(folded, (0, 5, 3)).shape
    (3, 5, 4)
  """
  if place is None or place == first_place(x.shape):
    return x
  axis, parts, own = _parts(x.shape, place)
  x = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1:])
  return jnp.moveaxis(x, axis + own, 0)


def back(
    x: base.Array, shape: tuple[int, ...], place: Place | None) -> base.Array:
  """The inverse of `first`, for an array that had this shape.

  Or that would have it, with as many examples as `place` says.
  """
  if place is None or place == first_place(shape):
    return x
  axis, stride, count = place
  place = (axis, stride, len(x))
  shape = (*shape[:axis], shape[axis] // count * len(x), *shape[axis + 1:])
  axis, parts, own = _parts(shape, place)
  return jnp.moveaxis(x, 0, axis + own).reshape(shape)


def _parts(shape, place):
  """The axis, what it is split into, and which of those parts counts examples."""
  axis, stride, count = place
  parts = [shape[axis] // (stride * count), count, stride]
  kept = [n for i, n in enumerate(parts) if n > 1 or i == 1]
  return axis, kept, int(parts[0] > 1)


def only_real(
    x: base.Array, mask: base.Array | None, place: Place | None = None
) -> base.Array:
  """`x` with zeros at the positions that a mask hides.

  Args:
    x: an array.
    mask: bool `[batch, positions]`, True at real positions; None: all are.
    place: where the examples of `x` lie. An array without such positions, next
      to its examples and before its features, stays as it is.

  Example:
    >>> import jax.numpy as jnp
    >>> only_real(jnp.ones((1, 2, 1)), jnp.array([[True, False]])).tolist()
    [[[1.0], [0.0]]]
  """
  if mask is None:
    return x
  whole = first(x, place)
  if whole.ndim < 3 or whole.shape[:2] != mask.shape:
    return x
  own = mask.reshape(*mask.shape, *(1,) * (whole.ndim - 2))
  return back(jnp.where(own, whole, 0), x.shape, place)


def without_mean(
    x: base.Array, mask: base.Array | None, place: Place | None) -> base.Array:
  """Values without their mean over the real examples, position by position.

  Args:
    x: an array.
    mask: bool `[batch, positions]`, True at real ones, or None.
    place: where its examples lie; None: on the first axis.

  Example:
    >>> without_mean(jnp.array([[1.], [3.]]), None, None).tolist()
    [[-1.0], [1.0]]
  """
  whole = first(x, place)
  count = len(whole)
  if mask is not None and whole.shape[:2] == mask.shape:
    count = jnp.maximum(mask.sum(0), 1).reshape(-1, *(1,) * (whole.ndim - 2))
  left = back(whole - whole.sum(0) / count, x.shape, place)
  return only_real(left.astype(x.dtype), mask, place)
