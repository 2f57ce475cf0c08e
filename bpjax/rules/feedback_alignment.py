"""Feedback alignment: fixed random weights carry the error back.

Random synaptic feedback weights support error backpropagation for deep
learning, Lillicrap, Cownden, Tweed and Akerman, Nature Communications 2016
(https://arxiv.org/abs/1411.0247).
"""

from bpjax import base
from bpjax import credit
from bpjax import feedback as feedback_lib


def feedback_alignment(scale: float = 1.) -> credit.Rule:
  r"""Feedback alignment: as backprop, with fixed random B in place of W.

  .. math::
    \delta_l = (\delta_{l+1} B_{l+1}^T) \odot \phi'_l(a_l), \qquad
    \Delta W_l = h_{l-1}^T \delta_l

  :math:`W_l` is the unit's `params['kernel']` and :math:`B_l` its
  `feedback['kernel']`, in the same shape, so that B = W is backprop. The output
  layer's own update is exact. Activations and norms keep their exact VJP, norm
  scales included.

  Tried: Adam or AdamW, learning rate 1e-3, no decay; B with the standard
  deviation of W, `1 / sqrt(fan-in)`. Scaling B scales every lower update by the
  same factor: no matter to Adam, but to SGD. What fails: deep convolutional
  nets and transformers of more than about two layers learn far less than with
  backprop.

  Args:
    scale: factor on the standard deviation of B.

  Returns:
    A rule; `feedback` is `{'kernel': B}` at each unit with something trainable
    below it. Fixed: keep it from the optimiser with `rule.trainable`.

  Raises:
    ValueError: if `scale` is not positive.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.feedback_alignment(scale=.5)
  """
  if scale <= 0:
    raise ValueError(f'`scale` must be positive, got {scale}.')

  def init_unit(key, info, params):
    return feedback_lib.draw(key, info, params, scale)

  def backward(unit, params, feedback, activations, signal):
    delta = unit.delta(params, activations, signal.teaching)
    messages = (
        unit.inputs_vjp(params, feedback, activations, delta) if feedback
        else (None,) * len(activations.inputs))
    return base.Credit(
        params=unit.params_vjp(params, activations, delta), inputs=messages)

  def weight_target(units, params, feedback):
    del units, params
    return feedback

  return credit.Rule(
      name='feedback_alignment', init_unit=init_unit, backward=backward,
      weight_target=weight_target)
