r"""A convolution as a dense matrix, and the convolution nearest to a matrix.

:math:`\phi` maps a kernel to the matrix of its convolution, :math:`\mathrm{vec}
(\mathrm{conv}(h, W)) = \phi(W)\, \mathrm{vec}(h)`: linear, local, and with equal
entries at all positions. Alignment would need :math:`\phi(W_l) \propto F_l
F_{l-1}^T`, a dense matrix of random entries, so :math:`\cos(\phi(W_l), F_l
F_{l-1}^T)` is at most the norm of the target's projection on the subspace of
convolutions, divided by its own: see `target_alignment`. Refinetti et al., 2021
(https://arxiv.org/abs/2011.12428); Finding the needle in the haystack with
convolutions, d'Ascoli et al., 2019 (https://arxiv.org/abs/1906.06766).

Maps are [height, width, channels], kernels [height, width, in, out], strides and
padding those of `jax.lax.conv_general_dilated`.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


def _convolve(kernel, x, strides, padding):
  """Of [batch, height, width, channels]."""
  return jax.lax.conv_general_dilated(
      x, kernel, strides, padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST)


def dense(
    kernel: Array, shape: Sequence[int], *, strides: Sequence[int] = (1, 1),
    padding: Padding = 'SAME') -> Array:
  r"""The matrix :math:`\phi(W)` of a convolution.

  Args:
    kernel: W [height, width, in, out].
    shape: of the input's map, (height, width, in).
    strides: of the convolution.
    padding: of the convolution.

  Returns:
    [outputs, inputs], maps flattened.

  Raises:
    ValueError: if kernel and map do not have the same channels.

  Example:
    >>> print(dense(jnp.array([1., 2.]).reshape(1, 2, 1, 1), (1, 3, 1),
    ...             padding='VALID'))
    [[1. 2. 0.]
     [0. 1. 2.]]
  """
  _check(kernel.shape, shape)
  size = math.prod(shape)
  columns = _convolve(
      kernel, jnp.eye(size, dtype=kernel.dtype).reshape(size, *shape), strides,
      padding)
  return columns.reshape(size, -1).T


def correlate(
    outputs: Array, inputs: Array, kernel_shape: Sequence[int], *,
    strides: Sequence[int] = (1, 1), padding: Padding = 'SAME') -> Array:
  r"""The adjoint of :math:`\phi`, of the matrix :math:`\sum_c o_c i_c^T`.

  Each entry is the sum of the matrix's entries that the kernel's entry stands
  for. The matrix itself is never made: it is the gradient of a convolution.

  Args:
    outputs: o [C, height, width, out].
    inputs: i [C, height, width, in].
    kernel_shape: (height, width, in, out).
    strides: of the convolution.
    padding: of the convolution.

  Returns:
    An array of `kernel_shape`.

  Raises:
    ValueError: if kernel and maps do not fit.

  Example:
    >>> correlate(jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)),
    ...           (1, 1, 1, 1)).item()
    4.0
  """
  _check(kernel_shape, inputs.shape[1:])
  convolve = functools.partial(
      _convolve, x=inputs, strides=strides, padding=padding)
  kernel = jax.ShapeDtypeStruct(tuple(kernel_shape), inputs.dtype)
  made = jax.eval_shape(convolve, kernel)
  if made.shape != outputs.shape:
    raise ValueError(
        f'`outputs` must have the shape {made.shape} of what the convolution '
        f'makes of `inputs`, got {outputs.shape}.')
  return jax.linear_transpose(convolve, kernel)(outputs)[0]


def uses(
    kernel_shape: Sequence[int], shape: Sequence[int], *,
    strides: Sequence[int] = (1, 1), padding: Padding = 'SAME') -> Array:
  """How many entries of the dense matrix each entry of a kernel stands for.

  Args:
    kernel_shape: (height, width, in, out).
    shape: of the input's map, (height, width, in).
    strides: of the convolution.
    padding: of the convolution.

  Returns:
    An array of `kernel_shape`, the same for all channels.

  Example:
    >>> print(uses((1, 3, 1, 1), (1, 5, 1)).ravel())
    [4. 5. 4.]
  """
  _check(kernel_shape, shape)
  plain = (*kernel_shape[:2], 1, 1)
  inputs = jnp.ones((1, *shape[:2], 1))
  outputs = jnp.ones_like(
      _convolve(jnp.zeros(plain), inputs, strides, padding))
  counts = correlate(
      outputs, inputs, plain, strides=strides, padding=padding)
  return jnp.broadcast_to(counts, kernel_shape)


def project(
    matrix: Array, kernel_shape: Sequence[int], shape: Sequence[int], *,
    strides: Sequence[int] = (1, 1), padding: Padding = 'SAME') -> Array:
  """The kernel whose convolution is nearest to a matrix, in Frobenius norm.

  Args:
    matrix: [outputs, inputs], maps flattened.
    kernel_shape: (height, width, in, out).
    shape: of the input's map, (height, width, in).
    strides: of the convolution.
    padding: of the convolution.

  Returns:
    The kernel: for each entry the mean of the matrix's entries that it stands
    for. Where it stands for none, 0.

  Raises:
    ValueError: if kernel, map and matrix do not fit.

  Example:
    >>> w = jnp.arange(12.).reshape(3, 1, 2, 2)
    >>> found = project(dense(w, (5, 4, 2)), w.shape, (5, 4, 2))
    >>> print(jnp.allclose(found, w))
    True
  """
  size = math.prod(shape)
  convolved = jax.eval_shape(
      lambda k, x: _convolve(k, x, strides, padding),
      jax.ShapeDtypeStruct(tuple(kernel_shape), matrix.dtype),
      jax.ShapeDtypeStruct((size, *shape), matrix.dtype)).shape
  if matrix.shape != (math.prod(convolved[1:]), size):
    raise ValueError(
        f'`matrix` must have shape {(math.prod(convolved[1:]), size)}, outputs '
        f'and inputs of the convolution, got {matrix.shape}.')
  inputs = jnp.eye(size, dtype=matrix.dtype).reshape(size, *shape)
  sums = correlate(
      matrix.T.reshape(convolved), inputs, kernel_shape, strides=strides,
      padding=padding)
  return sums / jnp.maximum(
      uses(kernel_shape, shape, strides=strides, padding=padding), 1)


def target_alignment(
    kernel: Array, outputs: Array, inputs: Array, *,
    strides: Sequence[int] = (1, 1), padding: Padding = 'SAME'
) -> tuple[Array, Array]:
  r"""The alignment of a convolution, and the most that any kernel can have.

  The target is :math:`M = F_l F_{l-1}^T`, that of direct feedback, of which no
  dense matrix is made. With P the projection on convolutions, the bound is

  .. math::
    \max_W \cos(\phi(W), M) = \frac{\|P M\|}{\|M\|},

  about :math:`\sqrt{\text{kernel entries} / (n_l n_{l-1})}` for independent
  random feedback.

  Args:
    kernel: W [height, width, in, out].
    outputs: F_l as maps, [C, height, width, out].
    inputs: F_{l-1} as maps, [C, height, width, in].
    strides: of the convolution.
    padding: of the convolution.

  Returns:
    :math:`\cos(\phi(W), M)`, and the bound.

  Example:
    >>> f, g = jnp.ones((1, 1, 2, 1)), jnp.array([1., -1.]).reshape(1, 1, 2, 1)
    >>> w = jnp.ones((1, 1, 1, 1))
    >>> [f'{t:.3f}' for t in target_alignment(w, f, f)]
    ['0.707', '0.707']
    >>> [f'{t:.3f}' for t in target_alignment(w, f, g)]
    ['0.000', '0.000']
  """
  sums = correlate(
      outputs, inputs, kernel.shape, strides=strides, padding=padding)
  counts = uses(
      kernel.shape, inputs.shape[1:], strides=strides, padding=padding)
  up, down = (f.reshape(len(f), -1) for f in (outputs, inputs))
  norm = jnp.sqrt(jnp.sum((up @ up.T) * (down @ down.T)))
  own = jnp.sqrt(jnp.sum(counts * kernel**2))
  return (jnp.vdot(kernel, sums) / (own * norm),
          jnp.sqrt(jnp.sum(sums**2 / jnp.maximum(counts, 1))) / norm)


def _check(kernel_shape: Sequence[int], shape: Any) -> None:
  if len(kernel_shape) != 4 or len(shape) != 3 or kernel_shape[2] != shape[2]:
    raise ValueError(
        '`kernel` must have shape (height, width, in, out) and its input (height, '
        f'width, in), got {tuple(kernel_shape)} and {tuple(shape)}.')
