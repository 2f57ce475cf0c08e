"""Local representation alignment with error synapses, LRA-E.

Biologically motivated algorithms for propagating local target representations,
Ororbia and Mali, AAAI 2019 (https://arxiv.org/abs/1805.11703).
"""

import dataclasses

from bpjax.engines import credit
from bpjax.rules.recursive_local_representation_alignment import (
  recursive_local_representation_alignment as recursive,
)


def local_representation_alignment(
    beta: float = .1, gamma: float = 1., update: str = 'transpose',
    scale: float = 1., l2_share: float = 1., radius: float = 0.,
    direct_update: str = 'fixed'
) -> credit.Rule:
  r"""LRA-E: each unit is taught by the error of the unit above, unit by unit.

  .. math::
    d_l = e_{l+1} E_{l+1}^T, \quad t_l = \phi_l(a_l - \beta d_l), \quad
    e_l = h_l - t_l, \quad \Delta W_l = h_{l-1}^T e_l, \quad
    \Delta E_l = \gamma \Delta W_l

  The chain among the wirings of `recursive_local_representation_alignment`. In
  the limit of a small beta, with E = W, the updates are those of backprop times
  :math:`\beta` for every unit between them and the output; their sizes differ
  from layer to layer, which suits Adam and not SGD. The paper prints the update
  of E with the other sign, which would turn E away from W; the authors' program
  has this one.

  Where units are no chain, since they branch or a norm or a residual lies between
  two of them, errors go down the graph of the model as gradients do: E is kept at
  every unit that has anything to send, :math:`d_l` is the sum of what arrives, and
  what lies between has its exact derivative.

  Tried: MNIST, two layers of 256 tanh units, 5 epochs, batch 128, Adam 2e-3 with
  a cosine: 98.0% test accuracy (one seed).

  Args:
    beta: step of the pre-activation.
    gamma: strength of the update of E.
    update: of E: 'transpose' (that of W), 'eq6', 'dx' or 'fixed'.
    scale: factor on the standard deviation of the first E, `1/sqrt(fan-in)`:
      with the scale of W it does best.
    l2_share: alpha in :math:`e = \alpha (h-t) + (1-\alpha)\,sign(h-t)`.
    radius: the norm above which each update is scaled down to it; 0: none.
    direct_update: of an E that stands for no weights, to or from a unit that
      attends: 'fixed', 'eq6' or 'dx' (the derivative of the local loss).

  Returns:
    A rule; `feedback` is `{'kernel': E}` in the shape of the weights at each
    unit that teaches another.

  Raises:
    ValueError: as in `recursive_local_representation_alignment`.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.local_representation_alignment(beta=.1)
  """
  rule = recursive(
      'chain', beta=beta, gamma=gamma, update=update, scale=scale,
      l2_share=l2_share, radius=radius, direct_update=direct_update)
  return dataclasses.replace(rule, name='local_representation_alignment')
