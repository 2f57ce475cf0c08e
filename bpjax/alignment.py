"""How close a rule's learning is to backprop, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax import paths
from bpjax.local import view as view_lib
from bpjax.networks import examples
from bpjax.networks import network
from bpjax.rules.backprop import backprop
import jax
import jax.numpy as jnp

# Of the largest gradient of a unit: cosines with less are withheld.
_FLOOR = 1e-7


def alignment(
    net: network.Network, loss: base.Loss, rule: Any
) -> Callable[..., dict[str, base.Alignment]]:
  r"""Measures a rule against backprop on one batch.

  The teaching signal of a unit is what arrives at its output in place of
  :math:`\partial \ell_n / \partial h_n`; for perturbations, the perturbation
  times the change of the loss. Its cosine is taken example by example, as in
  Launay, Poli and Krzakala (https://arxiv.org/abs/1906.04554). Both passes use
  the same random key, so the same dropout masks. Under a rule that composes
  several, weights align with what each unit's own rule names.

  Args:
    net: the network.
    loss: `(output, y) -> per-example losses`.
    rule: the rule.

  Returns:
    `measure(variables, feedback, x, y, key=None) -> {unit: Alignment}`, to be
    called under `jax.jit`.

  Where backprop's own gradient of a unit is less than 1e-7 of the largest among
  the units', its cosines are NaN: they would be those of rounding. `growth` tells
  whether the residual stream is what made it vanish.

  An example without a signal, the rule's or backprop's, is left out of the mean;
  where no example has one, the cosine is NaN.

  Raises:
    ValueError: if the rule cannot train the network.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]))
    >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
    >>> variables = net.init(jax.random.key(0), x)
    >>> rule = bpjax.rules.feedback_alignment()
    >>> feedback = rule.init(jax.random.key(1), net, variables, x)
    >>> measure = jax.jit(
    ...     bpjax.alignment(net, bpjax.losses.softmax_cross_entropy, rule))
    >>> print(f"{measure(variables, feedback, x, y)['layers_2'].update:.3f}")
    1.000
  """

  arguments.network(net)
  arguments.loss(loss)
  arguments.rule(rule)

  def measure(variables, feedback, x, y, key=None):
    arguments.step(variables, x, key)
    units = rule.infos(net, variables, x)
    params = variables['params']
    updates, signals = rule.signals(net, loss, variables, feedback, x, y, key)
    seen_by = getattr(rule, 'seen_by', None)
    # Where units own their nonlinearity, both are taken behind it.
    seen = net if seen_by is None else seen_by(net, variables, x)
    gradients, exact = backprop().signals(seen, loss, variables, {}, x, y, key)
    targets = rule.weight_targets(units, params, feedback)
    trained = rule.units(net, variables, x)
    result = {}
    for name, info in units.items():
      own = paths.subtree(params, name)
      rows = _rows(paths.subtree(exact, name), info)
      taught = paths.subtree(signals, name)
      if taught:
        cosines = jax.vmap(feedback_lib.cosine)(_rows(taught, info), rows)
      else:  # No signal: the gradient itself, or none, as under weight noise.
        is_exact = trained.get(name, 'exact').startswith('exact')
        cosines = jnp.array([1. if is_exact else jnp.nan])
      weight = jnp.nan
      if name in targets:
        weight = feedback_lib.cosine(
            _restrict(own, targets[name]), targets[name])
      update, norm = jnp.nan, jnp.linalg.norm(rows) / len(rows)
      if own is not None:  # A boundary has no parameters.
        update = feedback_lib.cosine(
            paths.subtree(updates, name), paths.subtree(gradients, name))
        norm = feedback_lib.norm(paths.subtree(gradients, name))
      result[name] = base.Alignment(
          teaching=jnp.nanmean(cosines), teaching_std=jnp.nanstd(cosines),
          update=jnp.asarray(update), weight=jnp.asarray(weight),
          backprop_norm=norm)
    return _withheld(result)

  return measure


def _withheld(found):
  """Without cosines with gradients that are next to nothing.

  Signals of boundaries are compared among themselves: they are no gradients of
  parameters.
  """
  kinds = lambda name: name.endswith(f'/{base.BOUNDARY.lower()}')
  largest = {
      kind: jnp.max(jnp.array([
          a.backprop_norm for n, a in found.items() if kinds(n) == kind] or [0.]))
      for kind in (False, True)}

  def hide(name, own):
    low = own.backprop_norm < _FLOOR * largest[kinds(name)]
    return own._replace(**{
        field: jnp.where(low, jnp.nan, getattr(own, field))
        for field in ('teaching', 'teaching_std', 'update')})

  return {name: hide(name, own) for name, own in found.items()}


def growth(
    net: network.Network, blocks: Sequence[str] = ('block_*',)
) -> Callable[..., dict[str, base.Array]]:
  r"""Measures how the residual stream grows from block to block.

  .. math::
    \frac{\|h_{l+1}\|}{\|h_l\|}

  with the norm over the batch. Healthy networks stay below 5; under direct
  feedback a pre-norm network may come to 100 and more, and then the norm behind
  the last block leaves next to nothing of backprop's own gradient. Blocks are
  compared with each other: where the first one outgrows the embedding and the
  others follow it, as they may under direct feedback to a few blocks, the ratios
  stay small; then the norm of backprop's gradient, which `alignment` gives, tells.

  Args:
    net: the network.
    blocks: globs for the modules that are blocks.

  Returns:
    `measure(variables, x, key=None) -> {block: ratio}` for every block but the
    first, in training mode, to be called under `jax.jit`.

  Raises:
    ValueError: when called, for a glob without a module.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(4), nn.Dense(4)]))
    >>> x = jnp.ones((2, 4))
    >>> variables = net.init(jax.random.key(0), x)
    >>> list(bpjax.growth(net, ['layers_*'])(variables, x))
    ['layers_1']
  """
  view = view_lib.View(
      net, blocks, lambda i, count: False, (), lambda *block: None)

  def measure(variables, x, key=None):
    view.survey(variables, x)
    state = [c for c in variables if c != 'params']
    output, _ = view.run(
        variables, x, lambda call: call.original(), key, state)
    norms = {n: jnp.linalg.norm(jnp.ravel(h).astype(
        jnp.promote_types(h.dtype, jnp.float32)))
             for n, h in output['blocks'].items()}
    return {n: norms[n] / norms[before]
            for before, n in zip(norms, list(norms)[1:])}

  return measure


def _rows(signals: Mapping[str, base.Array], info: base.UnitInfo) -> base.Array:
  """One row an example (and a layer, under `nn.scan`), all calls side by side."""


  def rows(signal):
    shape = signal.shape[signal.ndim - len(info.out.shape):]
    place = info.examples if shape == info.out.shape else None
    calls = signal.reshape(-1, *shape)
    whole = jax.vmap(lambda s: examples.first(s, place))(calls)
    return whole.reshape(whole.shape[0] * whole.shape[1], -1)

  return jnp.concatenate(list(map(rows, signals.values())), axis=1)


def _restrict(params, like):
  """The entries of `params` that `like` has."""
  if not isinstance(like, Mapping):
    return params
  return {k: _restrict(params[k], v) for k, v in like.items()}
