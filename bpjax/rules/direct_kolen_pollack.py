"""Direct Kolen-Pollack: direct feedback that learns from what it teaches.

Learning the connections in direct feedback alignment, Webster, Choi and Ahn,
2021; Accelerated predictive coding networks via direct Kolen-Pollack feedback
alignment, Casnici, Lefebvre, Dauwels and Frenkel, 2026
(https://arxiv.org/abs/2602.15571).
"""

from bpjax import projection
from bpjax.engines import credit
from bpjax.rules.direct_feedback_alignment import direct_feedback_alignment
import jax


def direct_kolen_pollack(scale: float = 1.) -> credit.Rule:
  r"""Direct Kolen-Pollack: B is trained by its layer's activity and the error.

  .. math::
    \delta_l = (e B_l^T) \odot \phi'_l(a_l), \qquad
    \Delta W_l = h_{l-1}^T \delta_l, \qquad \Delta B_l = h_l^T e

  :math:`B_l` moves as a readout of layer l would, which is what it stands for.
  At the last hidden layer it gets the very update of the readout, and with a
  decay of both their difference shrinks as under Kolen-Pollack. The rule carries
  no decay of its own: give one optimiser with decay both trees.

  As in direct feedback alignment, :math:`B_l` is kept at the unit that *reads*
  layer l, `feedback[unit]` of shape `[n_out, *its input]`.

  Args:
    scale: factor on the standard deviation of the first B, `1/sqrt(n_out)`.

  Returns:
    A rule; all of its feedback is trainable.

  Raises:
    ValueError: if `scale` is not positive; for a unit that is called twice.

  Example:
    >>> import bpjax, optax
    >>> rule = bpjax.rules.direct_kolen_pollack()
    >>> tx = optax.adamw(1e-3, weight_decay=1e-2)  # Over (params, feedback).
  """
  direct = direct_feedback_alignment(scale=scale)

  def backward(unit, params, feedback, activations, signal):
    aligned = direct.backward(unit, params, feedback, activations, signal)
    if feedback is None:
      return aligned
    h = activations.inputs[projection.read_input(unit.info)]
    # The message is linear in B, and pulled along h its derivative is e h^T:
    # summed over positions wherever one B serves them all.
    _, pull = jax.vjp(
        lambda b: projection.project(
            unit.info, signal.error, b, h, signal.mask), feedback)
    return aligned._replace(feedback=pull(h)[0])

  return credit.Rule(
      name='direct_kolen_pollack', init_unit=direct.init_unit, backward=backward,
      port=direct.port, learns_feedback=True, linear=True,
      weight_target=direct.weight_target)
