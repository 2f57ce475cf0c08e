"""Predictive coding: hidden states settle between prediction and loss.

An approximation of the error backpropagation algorithm in a predictive coding
network with local Hebbian synaptic plasticity, Whittington and Bogacz, Neural
Computation 2017; Predictive coding approximates backprop along arbitrary
computation graphs, Millidge, Tschantz and Buckley, 2020
(https://arxiv.org/abs/2006.04182).
"""

from bpjax import arguments
from bpjax import base
from bpjax.engines import settling
import jax.numpy as jnp


def predictive_coding(steps: int = 20, step_size: float = .1) -> settling.Rule:
  r"""Predictive coding: errors of prediction teach, once states have settled.

  .. math::
    E = \sum_{l<L} \tfrac12 \|s_l - \phi_l(s_{l-1} W_l + b_l)\|^2 +
    \ell(\phi_L(s_{L-1} W_L + b_L), y), \qquad
    s_l \leftarrow s_l - \epsilon\, \partial E / \partial s_l

  The states s of the hidden units begin at the model's own forward pass, where
  every error of prediction is 0; the loss pulls at the last one. After `steps`
  steps the updates are :math:`\partial E / \partial W_l`, which need the unit's
  own error and input alone. Whatever lies outside of units learns from E too.

  What is left of E's gradient when the loss pulls weakly is backprop's: errors
  of prediction settle to the gradient at the states. What fails: fewer steps
  than layers, since an error travels one unit a step (the lowest units get
  nothing); step sizes of 1 or more, which oscillate.

  Args:
    steps: steps of the states; at least the number of units.
    step_size: epsilon of the dynamics.

  Returns:
    A rule without feedback; `rule.predict` is the model's forward pass.

  Raises:
    ValueError: for a value out of range; for a network that normalises over the
      batch.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.predictive_coding(steps=10)
  """
  arguments.whole('steps', steps)
  arguments.number('step_size', step_size, above=0)
  return settling.Rule(
      'predictive_coding', _energy, lambda unit: unit.out,
      lambda info, state: state, free_steps=0, nudged_steps=int(steps),
      step_size=step_size, beta=1., nudge='positive')


def _energy(
    unit: base.BoundUnit, state: base.Array) -> tuple[base.Array, base.Array]:
  prediction = unit.activation(unit.pre)
  if unit.info.is_output:  # The loss is its energy; it has no state.
    return jnp.zeros_like(state), prediction
  return .5 * (state - prediction)**2, state
