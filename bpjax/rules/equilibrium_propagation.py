"""Equilibrium propagation: a network that settles, and is nudged.

Equilibrium propagation: bridging the gap between energy-based models and
backpropagation, Scellier and Bengio, Frontiers in Computational Neuroscience 2017
(https://arxiv.org/abs/1602.05179).
"""

import functools

from bpjax import arguments
from bpjax import base
from bpjax.engines import settling
import jax
import jax.numpy as jnp

_NUDGES = ('random', 'positive', 'symmetric')
_READOUTS = ('linear', 'clip')


def equilibrium_propagation(
    beta: float = .5, free_steps: int = 20, nudged_steps: int = 4,
    step_size: float = .5, nudge: str = 'random', readout: str = 'linear'
) -> settling.Rule:
  r"""Equilibrium propagation: learning from how a nudge moves a fixed point.

  .. math::
    E = \tfrac12 \sum_l \|s_l\|^2 - \sum_l \rho(s_l) \cdot
    (\rho(s_{l-1}) W_l + b_l), \qquad
    s_l \leftarrow s_l - \epsilon\, \partial (E + \beta C) / \partial s_l

  The states s of all units, with the input held, first settle freely
  (:math:`\beta = 0`), then with the loss C pulling at the output. The updates are
  :math:`(\partial E^\beta - \partial E^0) / \beta` for every parameter, norms'
  included: those of W are contrasts of :math:`\rho(s_{l-1})^T \rho(s_l)`. The
  same weights act upwards and downwards.

  A unit without a nonlinearity of its own has :math:`\rho(s) = s`, and s is kept
  in [0, 1], as in the paper; one that owns it (`bpjax.nn.Layer`) has that for
  :math:`\rho`, and s is free. The authors' program has the squared distance
  without a half for C: twice the beta here.

  Tried: MNIST with pixels in [0, 1], one layer of 500, squared error, readout
  'clip', 10 epochs, batch 128, SGD .05 with a cosine: 94.5% test accuracy (three
  seeds). Adam did far worse there (78% after two epochs, where SGD .1 had 92%), and
  SGD .2 diverged on Fashion-MNIST.

  In the limit of a small beta and long phases this is the gradient of the loss at
  the free fixed point; with one nudge the error is of the order of beta, with two
  ('symmetric') of its square. What fails: few steps in deep networks, since a
  nudge travels one unit a step; a beta of -1/2 or less.

  Args:
    beta: strength of the nudge.
    free_steps: steps of the free phase; the paper's 20, 150 and 500 with one,
      two and three hidden layers.
    nudged_steps: steps of the nudged phase; the paper's 4, 6 and 8.
    step_size: epsilon of the dynamics; the paper's .5.
    nudge: 'random' draws the sign of beta for every batch, as the paper does;
      'positive'; or 'symmetric' contrasts both signs, for one more phase.
    readout: 'linear' leaves the output's state free, for any loss; 'clip' keeps
      it in [0, 1], the paper's, for squared errors.

  Returns:
    A rule without feedback. `aux.model_state['particles']` holds the states at
    the end of the free phase, one row an example: given back in `variables` with
    the same examples, the next free phase goes on from there. `rule.predict`
    settles from `rule.particles`: 0, or 1 for a unit whose activation has no
    slope at 0 (relu), which would never leave it.

  Raises:
    ValueError: for a value out of range; for a network that normalises over the
      batch.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.equilibrium_propagation(nudge='symmetric')
  """
  for name, value in (('free_steps', free_steps), ('nudged_steps', nudged_steps)):
    arguments.whole(name, value)
  for name, value in (('beta', beta), ('step_size', step_size)):
    arguments.number(name, value, above=0)
  for name, value, known in (
      ('nudge', nudge, _NUDGES), ('readout', readout, _READOUTS)):
    arguments.choice(name, value, known)
  return settling.Rule(
      'equilibrium_propagation', _energy, _rest,
      functools.partial(_within, readout == 'clip'), int(free_steps),
      int(nudged_steps), step_size, beta, nudge)


def _energy(
    unit: base.BoundUnit, state: base.Array) -> tuple[base.Array, base.Array]:
  rate = unit.activation(state)  # A state within [0, 1] is its own rate.
  return .5 * state**2 - unit.pre * rate, rate


def _rest(unit: base.BoundUnit) -> base.Array:
  """0; but 1 where the activation has no slope there, and s would stay."""
  state = jnp.zeros_like(unit.pre)
  if not unit.info.owns_activation:
    return state
  out, pull = jax.vjp(unit.activation, state)
  # In any direction; a norm's slopes add up to 0.
  slope, = pull(jax.random.normal(jax.random.key(0), out.shape, out.dtype))
  alive = jnp.any(slope != 0) & jnp.all(jnp.isfinite(slope))
  return jnp.where(alive, state, 1)


def _within(
    clip_readout: bool, info: base.UnitInfo, state: base.Array) -> base.Array:
  bounded = not info.owns_activation and (not info.is_output or clip_readout)
  return jnp.clip(state, 0, 1) if bounded else state
