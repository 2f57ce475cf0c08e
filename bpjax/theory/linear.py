r"""Deep linear networks under direct feedback alignment, from zero weights.

With :math:`\Delta W_l = -\eta F_l e h_{l-1}^T`, one example a step, and all
weights zero at first, every weight matrix keeps a form of its own (weak weight
alignment; columns, F_l of shape [n_l, C] and F_L = 1):

.. math::
  W_1 = F_1 A_1, \qquad W_l = F_l A_l F_{l-1}^T, \qquad W_L = A_L F_{L-1}^T

The alignment matrices A_l, [C, n_0] for l = 1 and [C, C] above, follow a closed
recursion, see `alignment_matrices`. If they are proportional to the identity,
alignment is strong: :math:`W_l \propto F_l F_{l-1}^T`, and direct feedback points
along the gradient. Refinetti et al., 2021 (https://arxiv.org/abs/2011.12428).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


def alignment_matrices(
    x: Array, y: Array, feedback: Sequence[Array], rate: float
) -> tuple[Array, ...]:
  r"""The alignment matrices after every step, without any weights.

  .. math::
    c_1 = A_1 x, \quad c_l = A_l (F_{l-1}^T F_{l-1}) c_{l-1}, \quad
    e = c_L - y

  .. math::
    A_1 \leftarrow A_1 - \eta e x^T, \qquad A_l \leftarrow A_l - \eta e
    c_{l-1}^T

  so that the hidden layers are :math:`h_l = F_l c_l` and the output is
  :math:`c_L`.

  Args:
    x: inputs [steps, n_0], one a step.
    y: targets [steps, C].
    feedback: F_1, ..., F_{L-1}, each [n_l, C].
    rate: the learning rate eta.

  Returns:
    A_1, ..., A_L after each step: [steps, C, n_0], then [steps, C, C].

  Example:
    >>> f = [jnp.ones((3, 1)), jnp.ones((2, 1))]
    >>> a = alignment_matrices(jnp.ones((4, 5)), jnp.ones((4, 1)), f, .1)
    >>> [m.shape for m in a]
    [(4, 1, 5), (4, 1, 1), (4, 1, 1)]
  """
  _check(y, feedback)
  grams = [f.T @ f for f in feedback]

  def step(matrices, example):
    x, y = example
    read = [x]  # What each A is applied to, up to the Gram matrix.
    for a, gram in zip(matrices, [jnp.eye(len(x), dtype=x.dtype), *grams]):
      read.append(a @ gram @ read[-1])
    error = read.pop() - y
    new = tuple(
        a - rate * jnp.outer(error, c) for a, c in zip(matrices, read))
    return new, new

  classes = y.shape[1]
  start = (jnp.zeros((classes, x.shape[1]), x.dtype), *(
      jnp.zeros((classes, classes), x.dtype) for _ in feedback))
  return lax.scan(step, start, (x, y))[1]


def weights(
    matrices: Sequence[Array], feedback: Sequence[Array]) -> tuple[Array, ...]:
  """The weights W_1, ..., W_L that alignment matrices A_1, ..., A_L stand for.

  Args:
    matrices: A_1 [C, n_0], then A_l [C, C].
    feedback: F_1, ..., F_{L-1}, each [n_l, C].

  Returns:
    W_l, each [n_l, n_{l-1}].

  Example:
    >>> f = [2 * jnp.eye(3, 2)]
    >>> [w.shape for w in weights([jnp.ones((2, 5)), jnp.eye(2)], f)]
    [(3, 5), (2, 3)]
  """
  classes = len(matrices[0])
  above = [*feedback, jnp.eye(classes, dtype=matrices[0].dtype)]
  first, *others = matrices
  return (above[0] @ first, *(
      up @ a @ f.T for up, a, f in zip(above[1:], others, feedback)))


def train(
    x: Array, y: Array, feedback: Sequence[Array], rate: float
) -> tuple[Array, ...]:
  """Direct feedback alignment itself, with whole weights, from zero.

  Args:
    x: inputs [steps, n_0], one a step.
    y: targets [steps, C].
    feedback: F_1, ..., F_{L-1}, each [n_l, C].
    rate: the learning rate.

  Returns:
    The final weights W_l, each [n_l, n_{l-1}].

  Example:
    >>> x, y, f = jnp.eye(3), jnp.ones((3, 2)), [jnp.ones((4, 2))]
    >>> recursion = alignment_matrices(x, y, f, .1)
    >>> found = weights([a[-1] for a in recursion], f)
    >>> print(all(map(jnp.allclose, train(x, y, f, .1), found)))
    True
  """
  _check(y, feedback)

  def step(weights, example):
    x, y = example
    hidden = [x]
    for w in weights:
      hidden.append(w @ hidden[-1])
    error = hidden.pop() - y
    taught = [*(f @ error for f in feedback), error]
    return tuple(w - rate * jnp.outer(d, h) for w, d, h in zip(
        weights, taught, hidden)), None

  sizes = [x.shape[1], *(len(f) for f in feedback), y.shape[1]]
  start = tuple(
      jnp.zeros((n, m), x.dtype) for m, n in zip(sizes, sizes[1:]))
  return lax.scan(step, start, (x, y))[0]


def predicted_alignment(matrix: Array) -> Array:
  r"""The weight alignment that an alignment matrix gives to wide layers.

  With :math:`F_l^T F_l \propto 1`, as for random feedback of many rows, the
  cosine of :math:`F_l A F_{l-1}^T` and :math:`F_l F_{l-1}^T` is that of A and the
  identity:

  .. math:: \frac{\mathrm{tr} A}{\sqrt C \|A\|_F}

  Args:
    matrix: A [C, C].

  Returns:
    A cosine; 1 for A proportional to the identity.

  Example:
    >>> print(f'{predicted_alignment(jnp.diag(jnp.array([1., 0.]))):.3f}')
    0.707
  """
  return jnp.trace(matrix) / (
      jnp.sqrt(len(matrix)) * jnp.linalg.norm(matrix))


def condition_number(matrix: Array) -> Array:
  """The largest singular value over the smallest; 1 for strong alignment.

  Example:
    >>> print(f'{condition_number(jnp.diag(jnp.array([4., 2.]))):.1f}')
    2.0
  """
  values = jnp.linalg.svd(matrix, compute_uv=False)
  return values[0] / values[-1]


def _check(y, feedback):
  if not feedback or any(f.shape[1:] != y.shape[1:] for f in feedback):
    raise ValueError(
        '`feedback` must hold a matrix [n_l, C] for each hidden layer, with C = '
        f'{y.shape[1]} as the targets have, got '
        f'{[tuple(f.shape) for f in feedback]}.')
