"""What a rule that trains a network as a whole needs besides the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax.engines import checks
from bpjax.engines import reduction as reduction_lib
from bpjax.networks import segments
import jax
import jax.numpy as jnp

_OWN = ('params', *base.COLLECTIONS)


class Base(feedback_lib.NoFeedback):
  """A rule without feedback that trains a network as a whole.

  A subclass has a `name` and `differentiate`; it is a rule then, for
  `bpjax.testing.check_rule` and wherever a whole network is trained. With a
  `segment`, as of `bpjax.engines.credit.Rule`, units own what follows their affine
  operation.

  Example:
    >>> import bpjax, jax, jax.numpy as jnp
    >>> class Spsa(bpjax.engines.Base):  # Two losses, one random direction.
    ...   name = 'spsa'
    ...   def differentiate(self, net, loss, variables, feedback, x, y, key):
    ...     params, rest = variables['params'], dict(variables)
    ...     leaves, tree = jax.tree.flatten(params)
    ...     keys = jax.random.split(key, len(leaves))
    ...     v = jax.tree.unflatten(tree, [
    ...         jax.random.rademacher(k, p.shape, p.dtype)
    ...         for k, p in zip(keys, leaves)])
    ...     def losses(step):
    ...       moved = jax.tree.map(lambda p, d: p + step * d, params, v)
    ...       run = self.recorded(net, {**rest, 'params': moved}, x, key)
    ...       return loss(run[0], y), run
    ...     (a, run), (b, _) = losses(1e-3), losses(-1e-3)
    ...     grads = jax.tree.map(lambda d: jnp.sum(a - b) / 2e-3 * d, v)
    ...     return jnp.mean(a), bpjax.Aux(run[0], run[1]), grads, a.size
  """
  name: str
  segment: str | None = None
  _no_bind = 'trains the network as a whole'

  def differentiate(
      self, net: base.Network, loss: base.Loss, variables: Mapping[str, Any],
      feedback: base.Tree, x: Any, y: Any, key: base.Key | None
  ) -> tuple[base.Array, base.Aux, base.Tree, int]:
    """One step's learning.

    Returns:
      The mean loss; an `Aux`; the updates, nested as `variables['params']`,
      gradient-signed and summed over examples; the number of losses.
    """
    raise NotImplementedError

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    checks.check_any_unit(survey, self.name)

  def check_feedback(
      self, net: base.Network, variables: Mapping[str, Any], x: Any,
      feedback: base.Tree) -> None:
    """Raises a ValueError for feedback that `init` does not return."""
    del net, variables, x
    arguments.no_feedback(self.name, feedback)

  def init(
      self, key: base.Key, net: base.Network, variables: Mapping[str, Any],
      x: Any) -> dict[str, Any]:
    """The rule's feedback: none, {}. Checks that it can train the network."""
    arguments.key('key', key)
    arguments.network(net)
    arguments.step(variables, x, None)
    self.check(self.seen_by(net, variables, x).survey(variables, x))
    return {}

  def seen_by(
      self, net: base.Network, variables: Mapping[str, Any], x: Any
  ) -> base.Network:
    """The network whose units own as much as `segment` says."""
    if self.segment is None:
      return net
    return net.owning(dict.fromkeys(
        net.survey(variables, x).units, segments.Policy(self.segment)))

  def infos(self, net, variables, x) -> Mapping[str, base.UnitInfo]:
    """Unit -> what is known of it before any data."""
    return self.seen_by(net, variables, x).survey(variables, x).units.infos

  def units(self, net, variables, x) -> dict[str, str]:
    """Unit, or parameter outside of all units -> the rule that trains it."""
    units = self.seen_by(net, variables, x).survey(variables, x).units
    trained = [n for n, i in units.infos.items() if i.kind != base.BOUNDARY]
    return dict.fromkeys((*trained, *units.exact), self.name)

  def predict(self, net: base.Network) -> Callable[..., Any]:
    """`(variables, x) -> output` in evaluation mode."""
    return net.apply

  def bind(self, net: base.Network) -> Callable[..., Any]:
    """Raises: no function's reverse derivative is this rule."""
    raise ValueError(
        f'`bind` needs a rule that is linear in the error, and `{self.name}` '
        f'{self._no_bind}; use `rule.value_and_grad(net, loss)`.')

  def value_and_grad(
      self, net: base.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """As `bpjax.engines.credit.Rule.value_and_grad`."""
    arguments.network(net)
    arguments.loss(loss)
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      arguments.step(variables, x, key)
      self.check_feedback(net, variables, x, feedback)
      self.check(self.seen_by(net, variables, x).survey(variables, x))
      value, aux, grads, count = self.differentiate(
          net, loss, variables, feedback, x, y, key)
      grads, = reduction_lib.apply(reduction, (grads,), count)
      aux = aux._replace(feedback=feedback)
      return (value, aux), (grads, jax.tree.map(jnp.zeros_like, feedback))

    return learn

  def signals(self, net, loss, variables, feedback, x, y, key):
    """The mean updates; no teaching signals, as units are sent none."""
    _, _, grads, count = self.differentiate(
        net, loss, variables, feedback, x, y, key)
    return jax.tree.map(lambda g: g / count, grads), {}

  def recorded(
      self, net: base.Network, variables: Mapping[str, Any], x: Any,
      key: base.Key | None = None
  ) -> tuple[Any, dict[str, base.Tree], dict[str, Any]]:
    """Runs the model in training mode and keeps what every unit puts out.

    Returns:
      The model's output; its new state; and unit -> `{'call_0': output}`,
      nested as the parameters are, with an axis for the turns of a loop in front.
    """
    state = [c for c in variables if c not in _OWN]

    def visit(call):
      out = call.original()
      call.write(base.PROBES, out, 'call')
      return out

    output, collections = net.run(
        variables, x, visit, key, [*state, base.PROBES])
    return output, {c: collections[c] for c in state}, collections[base.PROBES]
