"""Direct random target projection: the label itself teaches every hidden layer.

Learning without feedback: fixed random learning signals allow for feedforward
training of deep neural networks, Frenkel, Lefebvre and Bol, Frontiers in
Neuroscience 2021 (https://arxiv.org/abs/1909.01311).
"""

import math

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax import projection
from bpjax.engines import credit
import jax
import jax.numpy as jnp


def direct_random_target_projection(scale: float = 1.) -> credit.Rule:
  r"""Hidden layers are taught by a fixed random projection of the target.

  .. math::
    \delta_l = (y^* B_l^T) \odot \phi'_l(a_l), \qquad
    \Delta W_l = h_{l-1}^T \delta_l

  :math:`y^*` is the one-hot label, or the target as given where it has the
  output's shape (squared error, probabilities). It is known before the forward
  pass ends, so that a layer can learn as soon as it has been computed. As in
  direct feedback alignment, :math:`B_l` is kept at the unit that *reads* layer l,
  `feedback[unit]` of shape `[n_out, *its input]`. The output unit's own update
  is exact, by the loss that is trained.

  What fails: the signal does not shrink as the error does, so that hidden layers
  saturate; use tanh or another bounded activation, and expect less than of
  direct feedback alignment.

  Args:
    scale: factor on the standard deviation of B, `1/sqrt(n_out)`.

  Returns:
    A rule; its feedback is fixed.

  Raises:
    ValueError: if `scale` is not positive, or the target is neither labels nor
      in the shape of the output.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.direct_random_target_projection(scale=.5)
  """
  arguments.number('scale', scale, above=0)

  def init_unit(key, info, params):
    if not projection.sends(info):
      return None
    shape = projection.feedback_shape(info)
    return scale / math.sqrt(shape[0]) * feedback_lib.normal(
        key, shape, projection.dtype(params, info))

  def backward(unit, feedback, signal):
    target = _like_output(signal.target, unit.info.net_output)
    return base.Credit(
        unit.grad(unit.delta(signal.teaching)),
        projection.messages(unit, target, feedback, signal.mask))

  return credit.Rule(
      name='direct_random_target_projection', init_unit=init_unit,
      backward=backward)


def _like_output(target, output):
  """The target in the shape of the output: labels become one-hot."""
  shape = getattr(target, 'shape', None)
  if shape == output.shape:
    return jnp.asarray(target, output.dtype)
  if shape == output.shape[:-1] and jnp.issubdtype(target.dtype, jnp.integer):
    return jax.nn.one_hot(target, output.shape[-1], dtype=output.dtype)
  raise ValueError(
      '`direct_random_target_projection` needs labels of shape '
      f'{output.shape[:-1]} or targets of the shape of the output, '
      f'{output.shape}, got {shape}.')
