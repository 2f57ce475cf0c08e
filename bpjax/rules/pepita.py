"""PEPITA: the error is added to the input, and a second pass is compared.

Error-driven input modulation: solving the credit assignment problem without a
backward pass, Dellaferrera and Kreiman, ICML 2022
(https://arxiv.org/abs/2201.11665).
"""

from __future__ import annotations

import math

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax import paths
from bpjax.engines import base as engine
from bpjax.engines import checks
from bpjax.engines import reduction
from bpjax.networks import examples
from bpjax.networks import segments
import jax
import jax.numpy as jnp

_PROJECTION = '_projection'


def pepita(scale: float = .05) -> engine.Base:
  r"""PEPITA: each unit learns from how the error in the input changed it.

  .. math::
    \Delta W_l = (h_{l-1}^{err})^T (h_l - h_l^{err}), \qquad
    \Delta W_L = (h_{L-1}^{err})^T e, \qquad x^{err} = x + e F^T

  :math:`h` is what units put out on the input itself, :math:`h^{err}` on the
  input that the error e of the readout's pre-activation was added to through a
  fixed random F, and there is no backward pass. A unit's output includes its
  nonlinearity, found in the trace.

  What fails: deep networks (the authors train up to three hidden layers); an F
  so large that the second pass has little to do with the first.

  Args:
    scale: factor on the standard deviation of F, :math:`\sqrt{2 / n_{in}}`.

  Returns:
    A rule; its feedback is F, fixed, of shape `[n_out, *features of the input]`.

  Raises:
    ValueError: if `scale` is not positive; for a model whose input is not one
      array of floats, or that has parameters outside of its units.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.pepita(scale=.1)
  """
  arguments.number('scale', scale, above=0)
  return _Pepita(scale)


class _Pepita(engine.Base):
  """The rule."""
  name = 'pepita'
  segment = segments.SHAPE

  def __init__(self, scale):
    self._scale = scale

  def check(self, survey):
    super().check(survey)
    checks.check_affine_alone(survey, self.name)
    checks.check_real(survey.units.infos, self.name)

  def init(self, key, net, variables, x):
    super().init(key, net, variables, x)
    return {_PROJECTION: self._projection(key, net, variables, x)}

  def _projection(self, key, net, variables, x):
    """F, `[n_out, *features of the input]`."""
    if not (hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)):
      raise ValueError(
          f'rule `{self.name}` adds the error to the input, and needs one array '
          'of floats there; embed whole numbers before the model.')
    infos = self.seen_by(net, variables, x).survey(variables, x).units.infos
    n_out = sum(
        math.prod(info.pre.shape) // len(x) for info in infos.values()
        if info.is_output)
    std = self._scale * math.sqrt(2 / math.prod(x.shape[1:]))
    return std * feedback_lib.normal(key, (n_out, *x.shape[1:]), x.dtype)

  def check_feedback(self, net, variables, x, feedback):
    wanted = jax.eval_shape(
        lambda: self._projection(jax.random.key(0), net, variables, x))
    given = feedback.get(_PROJECTION) if isinstance(feedback, dict) else None
    if getattr(given, 'shape', None) != wanted.shape or len(feedback) > 1:
      raise ValueError(
          f'`feedback` of rule `{self.name}` must be what `rule.init` returned '
          f'for this network, one array of shape {wanted.shape}.')

  def differentiate(self, net, loss, variables, feedback, x, y, key):
    net = self.seen_by(net, variables, x)
    survey = net.survey(variables, x)
    infos = survey.units.infos
    readouts = {n: info for n, info in infos.items() if info.is_output}
    taps = paths.nest({
        f'{name}/tap_0': jnp.zeros(info.pre.shape, info.pre.dtype)
        for name, info in readouts.items()})

    def first_pass(taps):
      """The output, and what units put out; `taps` are added in readouts."""

      def visit(call):
        out = call.original()
        if call.name in readouts:
          pre = call.unit.affine(call.params, call.inputs)
          out = call.unit.activation(
              call.params, pre + call.read(base.TAPS, 'tap'), call.inputs)
        call.write(base.PROBES, out, 'call')
        return out

      state = [c for c in variables if c != 'params']
      output, kept = net.run(
          {**variables, base.TAPS: taps}, x, visit, key, [*state, base.PROBES])
      return loss(output, y), (output, kept)

    losses, pull, (output, state) = jax.vjp(first_pass, taps, has_aux=True)
    reduction.check_losses(losses, output, survey.axes)
    errors, = pull(jnp.ones_like(losses))
    outs = state.pop(base.PROBES)
    error = jnp.concatenate([
        examples.first(e, readouts[name.rpartition('/')[0]].examples).reshape(
            len(x), -1) for name, e in paths.leaves(errors).items()], axis=1)
    changed = x + jnp.tensordot(
        error, feedback[_PROJECTION], 1).astype(x.dtype)

    def agreement(params):
      """What has the updates for its gradient: a product at every unit."""

      def visit(call):
        out = call.original()
        if infos[call.name].kind == base.BOUNDARY:
          return out
        delta = call.read(base.TAPS, 'tap')
        if delta is None:
          delta = call.read(base.PROBES, 'call') - out
        pre = call.unit.affine(call.params, jax.lax.stop_gradient(call.inputs))
        call.write(
            base.TERMS, jnp.sum(jax.lax.stop_gradient(delta) * pre), 'call')
        return jax.lax.stop_gradient(out)

      _, kept = net.run(
          {**variables, 'params': params, base.PROBES: outs, base.TAPS: errors},
          changed, visit, key, [base.TERMS])
      return sum(jnp.sum(term) for term in jax.tree.leaves(kept[base.TERMS]))

    grads = reduction.with_whole(
        jax.grad(agreement, allow_int=True)(variables['params']),
        variables['params'])
    return jnp.mean(losses), base.Aux(output, state), grads, losses.size
