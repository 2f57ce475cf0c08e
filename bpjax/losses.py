"""Per-example losses, [batch, ...]: what `rule.value_and_grad` takes.

Any function of `(output, y)` that returns one loss an example serves as well.
"""

from bpjax import arguments
from bpjax import base
import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(output: base.Array, y: base.Array) -> base.Array:
  """Softmax cross-entropy in nats.

  Args:
    output: logits `[batch, ..., classes]`.
    y: integer labels `[batch, ...]`, or probabilities in the shape of `output`.

  Returns:
    Losses `[batch, ...]`.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).shape
    (2,)
  """
  output, y = _arrays(output, y)
  if jnp.issubdtype(y.dtype, jnp.integer):
    if y.shape != output.shape[:-1]:
      raise ValueError(
          f'integer labels `y` must have shape {output.shape[:-1]}, the shape '
          f'of `output` without its classes, got {y.shape}.')
    arguments.labels(y, output.shape[-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(output, y)
  if y.shape != output.shape:
    raise ValueError(
        f'probabilities `y` must have the shape of `output`, {output.shape}, '
        f'got {y.shape}.')
  return optax.losses.softmax_cross_entropy(output, y)


def sigmoid_cross_entropy(output: base.Array, y: base.Array) -> base.Array:
  """Cross-entropy of independent sigmoid outputs, in nats, summed over them.

  Args:
    output: logits `[batch, ..., classes]`.
    y: integer labels `[batch, ...]`, or probabilities in the shape of `output`.

  Returns:
    Losses `[batch, ...]`; the error is `sigmoid(output) - y`.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> sigmoid_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).shape
    (2,)
  """
  output, y = _arrays(output, y)
  if jnp.issubdtype(y.dtype, jnp.integer) and y.shape == output.shape[:-1]:
    arguments.labels(y, output.shape[-1])
    y = jax.nn.one_hot(y, output.shape[-1], dtype=output.dtype)
  if y.shape != output.shape:
    raise ValueError(
        f'`y` must be integer labels of shape {output.shape[:-1]} or '
        f'probabilities in the shape of `output`, {output.shape}, got '
        f'{y.dtype} of shape {y.shape}.')
  return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(output, y), axis=-1)


def squared_error(output: base.Array, y: base.Array) -> base.Array:
  """Half the squared distance, summed over all axes but the first.

  Args:
    output: `[batch, ...]`.
    y: targets in the same shape.

  Returns:
    Losses `[batch]`; the error is `output - y`.

  Raises:
    ValueError: if the shapes differ (broadcasting would hide a mistake).

  Example:
    >>> import jax.numpy as jnp
    >>> squared_error(jnp.ones((2, 4)), jnp.zeros((2, 4)))
    Array([2., 2.], dtype=float32)
  """
  output, y = _arrays(output, y)
  if y.shape != output.shape:
    raise ValueError(
        f'targets `y` must have the shape of `output`, {output.shape}, got '
        f'{y.shape}.')
  return .5 * jnp.sum(jnp.square(output - y), axis=tuple(range(1, y.ndim)))


def _arrays(output, y):
  """Output and labels as arrays of floats, and of floats or whole numbers."""
  if not hasattr(output, 'dtype') or not jnp.issubdtype(
      output.dtype, jnp.floating):
    got = getattr(output, 'dtype', type(output).__name__)
    raise ValueError(
        f'`output` must be one array of floating-point numbers, got {got}; '
        'write the loss of several outputs yourself.')
  y = arguments.targets(y)
  if not jnp.issubdtype(y.dtype, jnp.integer) and not jnp.issubdtype(
      y.dtype, jnp.floating):
    raise ValueError(
        f'`y` must be whole numbers or floating-point numbers, got {y.dtype}.')
  return output, y
