"""How close a rule's learning is to backprop, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax import paths
from bpjax.networks import examples
from bpjax.networks import network
from bpjax.rules.backprop import backprop
import jax
import jax.numpy as jnp


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
    gradients, exact = backprop().signals(net, loss, variables, {}, x, y, key)
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
    return result

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
