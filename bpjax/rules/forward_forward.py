"""Forward-Forward: each layer tells right labels from wrong ones.

The forward-forward algorithm: some preliminary investigations, Hinton, 2022
(https://arxiv.org/abs/2212.13345).
"""

from __future__ import annotations

import math

from bpjax import arguments
from bpjax import base
from bpjax.engines import base as engine
from bpjax.engines import checks
from bpjax.engines import reduction
from bpjax.networks import segments
import jax
import jax.numpy as jnp


def forward_forward(
    threshold: float = .5, label_scale: float = 1.) -> engine.Base:
  r"""Forward-Forward: goodness high for right labels, low for wrong ones.

  .. math::
    g_l = \overline{h_l^2}, \qquad h_l = \phi_l(W_l \hat h_{l-1} + b_l), \qquad
    \hat h = h / \sqrt{\overline{h^2}}, \qquad
    E = \sum_l \log(1 + e^{\theta - g_l^+}) + \log(1 + e^{g_l^- - \theta})

  The label is added to the first entries of the input (the paper puts it in
  their place; on MNIST they are black): the right one in the positive pass,
  another one in the negative pass. Each hidden unit learns to
  tell them apart by the mean square of what it puts out, from its own input
  alone, whose length is taken out so that it cannot be told from the unit
  below. The output unit is a readout, trained by the loss on a third pass with a
  label that is undecided (1 / classes); so is `predict`.

  What fails: a label that drowns in the input; a threshold that outputs cannot
  reach (tanh at 1 or above). Expect less than
  backprop by points on MNIST, and a few times its epochs.

  Args:
    threshold: :math:`\theta`; the paper leaves it open, and sums squares where
      this takes their mean.
    label_scale: what is added to the entry of the label.

  Returns:
    A rule without feedback.

  Raises:
    ValueError: for a value out of range; for targets that are not labels; for a
      model whose input is not one array of floats with an entry a class, or that
      has parameters outside of its units.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.forward_forward(threshold=1.)
  """
  for name, value in (('threshold', threshold), ('label_scale', label_scale)):
    arguments.number(name, value, above=0)
  return _ForwardForward(threshold, label_scale)


class _ForwardForward(engine.Base):
  """The rule."""
  name = 'forward_forward'
  segment = segments.SHAPE

  def __init__(self, threshold, label_scale):
    self._threshold, self._label_scale = threshold, label_scale

  def check(self, survey):
    super().check(survey)
    checks.check_affine_alone(survey, self.name)
    checks.check_real(survey.units.infos, self.name)

  def init(self, key, net, variables, x):
    survey = self.seen_by(net, variables, x).survey(variables, x)
    classes = _classes(survey)
    if not (hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)
            and math.prod(x.shape[1:]) >= classes):
      raise ValueError(
          f'rule `{self.name}` adds the label to the first {classes} entries '
          'of the input, which must be one array of floats with as many.')
    return super().init(key, net, variables, x)

  def predict(self, net):

    def predict(variables, x):
      seen = self.seen_by(net, variables, x)
      return self._run(seen, variables, x, None, None, train=False)[0]

    return predict

  def differentiate(self, net, loss, variables, feedback, x, y, key):
    net = self.seen_by(net, variables, x)
    survey = net.survey(variables, x)
    classes = _classes(survey)
    kind = getattr(y, 'dtype', None)
    if kind is None or not jnp.issubdtype(kind, jnp.integer) or (
        y.shape != x.shape[:1]):
      got = type(y).__name__ if kind is None else f'{kind} {y.shape}'
      raise ValueError(
          f'rule `{self.name}` adds labels to the input: targets must be '
          f'whole numbers of shape {x.shape[:1]}, got {got}.')
    if key is None:
      raise ValueError(
          f'`key` is needed: rule `{self.name}` draws wrong labels; pass '
          '`key=jax.random.key(...)`.')
    key, own_key = jax.random.split(key)
    wrong = (y + jax.random.randint(own_key, y.shape, 1, classes)) % classes

    def total(params):
      """All layers' losses: no derivative crosses from one to another."""
      own = {**variables, 'params': params}
      output, state, _ = self._run(net, own, x, None, key)
      losses = loss(output, y)
      reduction.check_losses(losses, output, survey.axes)
      right, = self._run(net, own, x, y, key)[2:]
      other, = self._run(net, own, x, wrong, key)[2:]
      terms = jax.tree.map(
          lambda a, b: jnp.mean(jax.nn.softplus(self._threshold - a))
          + jnp.mean(jax.nn.softplus(b - self._threshold)), right, other)
      separation = sum(jax.tree.leaves(terms)) * losses.size
      return jnp.sum(losses) + separation, (losses, output, state)

    grads, (losses, output, state) = jax.grad(
        total, has_aux=True, allow_int=True)(variables['params'])
    grads = reduction.with_whole(grads, variables['params'])
    return jnp.mean(losses), base.Aux(output, state), grads, losses.size

  def _run(self, net, variables, x, labels, key, train=True):
    """One pass: the output, the state, and each hidden unit's goodness."""
    survey = net.survey(variables, x)
    infos, classes = survey.units.infos, _classes(survey)
    state = [c for c in variables if c != 'params']

    def visit(call):
      info = infos[call.name]
      if info.kind == base.BOUNDARY:
        return call.original()
      inputs = jax.lax.stop_gradient(call.inputs)
      if info.sends:  # It reads other units.
        inputs = tuple(map(_length_taken_out, inputs))
      _, out = call.unit(call.params, inputs)
      if not info.is_output:
        call.write(base.TERMS, jnp.mean(out**2, axis=-1), 'goodness')
      return out

    x = _with_label(x, labels, classes, self._label_scale)
    output, kept = net.run(
        variables, x, visit, key, [*state, base.TERMS], train=train)
    return output, {c: kept[c] for c in state}, kept[base.TERMS]


def _classes(survey):
  """The width of the first output that can be logits: not a scalar, nor a value."""
  shapes = list(map(jnp.shape, jax.tree.leaves(survey.output)))
  widths = [shape[-1] for shape in shapes if len(shape) > 1 and shape[-1] > 1]
  if not widths:
    raise ValueError(
        'rule `forward_forward` needs logits, [batch, classes], among the '
        f'outputs, got {", ".join(map(str, shapes))}.')
  return widths[0]


def _with_label(x, labels, classes, scale):
  """`x` with the label in its first entries, or with none of any more."""
  said = jnp.full((len(x), classes), 1 / classes, x.dtype)
  if labels is not None:
    said = jax.nn.one_hot(labels, classes, dtype=x.dtype)
  flat = x.reshape(len(x), -1)
  return flat.at[:, :classes].add(scale * said).reshape(x.shape)


def _length_taken_out(h):
  """A hidden vector at a mean square of 1."""
  if not jnp.issubdtype(h.dtype, jnp.inexact):
    return h
  return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-8)
