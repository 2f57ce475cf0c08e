"""Target propagation: learned inverses carry targets instead of gradients.

Difference target propagation, Lee, Zhang, Fischer and Bengio, ECML/PKDD 2015
(https://arxiv.org/abs/1412.7525), which describes this form, too.
"""

import math

from bpjax import activations as activations_lib
from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax.engines import checks
from bpjax.engines import credit
from bpjax.networks import examples
import jax
import jax.numpy as jnp

_TOPS = ('gradient', 'inverse')
_READOUTS = {'softmax': jax.nn.softmax, 'identity': lambda a: a}
_BIAS = 'inverse_bias'
_MATRIX = 'inverse_kernel'


def target_propagation(
    step: float = .1, sigma: float = .1, top: str = 'gradient',
    inverse: str = 'tanh', readout: str = 'softmax', scale: float = 1.
) -> credit.Rule:
  r"""Target propagation: each unit's target is what would have led to its
  reader's.

  .. math::
    t_{l-1} = g_l(t_l), \qquad g_l(u) = \bar\phi(u V_l^T + c_l), \qquad
    \Delta W_l \text{ descends } \|f_l(h_{l-1}) - t_l\|^2

  The inverse :math:`g_l` is kept at unit l and runs its operation backwards, as
  a message of feedback alignment does (for a convolution, a transposed one; to a
  unit that pools, its argument is repeated), with weights V in the shape of the
  unit's own and a bias, `feedback[l]['inverse_bias']`, for each of its input's
  features. It learns from noise around the activity, with the code held:

  .. math::
    \|g_l(f_l(h_{l-1} + \epsilon)) - (h_{l-1} + \epsilon)\|^2, \qquad
    \epsilon \sim N(0, \sigma^2)

  A unit whose features are not those of its operation, as attention on queries,
  keys and values in one, has a matrix of its own for V, position by position:
  `feedback[l]['inverse_kernel']`, `[its input's features, its own]`.

  The output unit learns by its exact gradient. An inverse that is not exact moves
  even targets that are reached already: `difference_target_propagation` takes
  that mistake out, and is recommended.

  Here and there the papers differ: one prints the target as a reconstruction of
  the activity, and the noise on the code; both are as in Lee et al. here. What
  lies between units must carry a target: a reshape, pooling or dropout does, a
  norm or a residual does not.

  Args:
    step: how far the first target lies from the activity, per unit of the
      per-example error. (Lee et al. take it on the mean of a batch of 100 with
      .327: .0033 here, together with RMSprop.)
    sigma: standard deviation of the noise of the inverses; Lee et al. .36.
    top: 'gradient' starts at the last hidden unit with a step down the loss,
      through the output unit's own weights; 'inverse' at the output,
      :math:`t_L = h_L - step\, e`, with a learned inverse: no weights are
      transported.
    inverse: the activation of the inverses, by name: that of the hidden units.
    readout: for 'inverse', what turns the output unit's output into
      :math:`h_L`: 'softmax' (with `step` 1 and cross-entropy, the target is
      one-hot) or 'identity'.
    scale: factor on the first V's standard deviation, 1/sqrt(what it sums over).

  Returns:
    A rule; all of its feedback is trainable.

  Raises:
    ValueError: for a value out of range; for a hidden unit whose output is not
      read by exactly one unit.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.target_propagation(step=.1)
  """
  return propagation(
      'target_propagation', step, sigma, top, inverse, readout, scale)


def propagation(
    name: str, step: float, sigma: float, top: str, inverse: str, readout: str,
    scale: float, difference: bool = False) -> credit.Rule:
  """The rule, with the inverse's own mistake taken out if `difference`.

  For the arguments, see `target_propagation`.
  """
  for key, value in (('step', step), ('sigma', sigma)):
    arguments.number(key, value, least=0)
  arguments.number('scale', scale, above=0)
  for key, value, known in (
      ('top', top, _TOPS), ('readout', readout, tuple(_READOUTS))):
    arguments.choice(key, value, known)
  phi = activations_lib.get(inverse, 'inverse')

  def has_inverse(info):
    # Of a lookup there is none: nothing below whole numbers has a target.
    return info.sends and (top == 'inverse' or not info.is_output) and (
        jnp.issubdtype(info.inputs[0].dtype, jnp.inexact))

  def reshapes(info):
    """Whether features of the unit are not those of its affine operation."""
    return (info.positionwise and info.feature_axes == 1
            and info.pre.shape[:-1] == info.out.shape[:-1]
            and info.pre.shape != info.out.shape)

  def check_units(units):
    checks.check_real(units, name)
    for unit, info in units.items():
      if info.kind == base.BOUNDARY or info.is_output:
        continue
      if len(info.readers) != 1:
        raise ValueError(
            f'the output of unit `{unit}` must be the input of one unit, to be '
            f'given a target by it, and {len(info.readers)} read it; put a norm, '
            'a nonlinearity or a residual that lies between into a unit '
            '(bpjax.nn.Layer).')
      if has_inverse(info) and len(info.pre.shape) != len(info.out.shape):
        raise ValueError(
            f'unit `{unit}` must put out as many axes as its affine operation, '
            f'{len(info.pre.shape)}, for an inverse to start from them, got '
            f'{len(info.out.shape)}; reshape outside of it.')

  def init_unit(key, info, params):
    if not has_inverse(info):
      return None
    if reshapes(info):
      shape = (*info.inputs[0].shape[-1:], *info.out.shape[-1:])
      x = info.inputs[0]
      weights = scale / math.sqrt(shape[1]) * feedback_lib.normal(
          key, shape, x.dtype)
      return {_MATRIX: weights, _BIAS: jnp.zeros(shape[:1], x.dtype)}
    # An inverse sums over what the unit puts out.
    gain = scale * math.sqrt(
        feedback_lib.fan_in(info, _kernel(params).shape) / _fan_out(info, params))
    weights = feedback_lib.draw(key, info, params, gain)
    x = info.inputs[0]
    features = x.shape[len(x.shape) - info.feature_axes:]
    if not info.positionwise and len(x.shape) > 2:
      features = x.shape[-1:]  # A bias for each channel of a map.
    return {**weights, _BIAS: jnp.zeros(features, x.dtype)}

  def backward(unit, params, feedback, activations, signal):
    info = unit.info
    x, out = activations.inputs[0], activations.out
    messages = [
        None if a is None or not info.sends else jnp.zeros(a.shape, a.dtype)
        for a in activations.inputs]
    mistake = 1. if info.is_output else 2.  # Of |f - t|^2, or the exact error.
    delta = unit.delta(params, activations, mistake * signal.teaching)
    updates = unit.params_vjp(params, activations, delta)
    if not has_inverse(info):
      if info.sends and info.is_output:
        sent = unit.inputs_vjp(params, params, activations, delta)
        messages = [None if m is None else step * m for m in sent]
      return base.Credit(updates, tuple(messages))

    def real(x):
      """`x` with zeros at positions that a mask hides."""
      return examples.only_real(x, signal.mask, info.place(0))

    def read(out):
      return _READOUTS[readout](out) if info.is_output else out

    def g(feedback, u):
      """The inverse of the unit."""
      if reshapes(info):
        return phi(u @ feedback[_MATRIX].T + feedback[_BIAS])
      if u.shape != activations.pre.shape:  # It pools.
        u = jax.image.resize(u, activations.pre.shape, 'nearest')
      weights = {k: v for k, v in feedback.items() if k != _BIAS}
      sent = unit.inputs_vjp(params, weights, activations, base.Delta(u))
      return phi(sent[0] + feedback[_BIAS])

    def inverse_loss(feedback):
      return jnp.sum(real(g(feedback, code) - noisy)**2)

    h = read(out)
    t = h - (step if info.is_output else 1) * signal.teaching
    messages[0] = real((g(feedback, h) if difference else x) - g(feedback, t))
    noisy, code = x, h
    if sigma:
      noisy = x + sigma * jax.random.normal(signal.key, x.shape, x.dtype)
      inputs = (noisy, *activations.inputs[1:])
      code = read(
          unit.activation(params, unit.affine(params, inputs), inputs))
    return base.Credit(
        updates, tuple(messages), feedback=jax.grad(inverse_loss)(feedback))

  return credit.Rule(
      name=name, backward=backward, init_unit=init_unit,
      check_units=check_units, learns_feedback=True, stochastic=sigma > 0,
      segment='rank')


def _kernel(params):
  """The weights of a unit."""
  return jax.tree.leaves(feedback_lib.stands_for(params))[0]


def _fan_out(info, params):
  """How many of a unit's outputs each of its inputs goes to."""
  kernel = _kernel(params)
  fan_in = feedback_lib.fan_in(info, kernel.shape)
  if info.positionwise:
    return kernel.size // fan_in
  return math.prod(kernel.shape[:-2]) * kernel.shape[-1]
