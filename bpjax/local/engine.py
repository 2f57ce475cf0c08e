"""The local engine: each block of a model learns from a loss of its own.

Any rule of the credit or of the perturbation engine trains the blocks. Gradients
stop between them; a block's loss is computed outside the model, from what the
block puts out, and its error enters the model there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax.engines import credit
from bpjax.engines import perturbation
from bpjax.engines import reduction as reduction_lib
from bpjax.local import located
from bpjax.local import losses as local_losses
from bpjax.local import view as view_lib
from bpjax.networks import examples
from bpjax.networks import network
from bpjax.networks import reach as reach_lib
import jax
import jax.numpy as jnp

_STOPS = ('output', 'overlap', 'branch', 'none')
_PLACEMENTS = ('block', 'patch', 'group')
_READOUTS = ('detached', 'joined')


def local(
    rule: Any, blocks: view_lib.Blocks, *,
    loss: local_losses.LocalLoss | None = None, placement: str = 'block',
    groups: int = 1, grouped: bool = False, stop: str = 'output',
    stop_every: int = 1, stop_remainder: int = -1,
    branches: Sequence[str] = (), readout: str = 'detached',
    head_scale: float = 1.) -> Local:
  r"""Trains each block of a model on its own loss, with any rule.

  .. math::
    \ell_i = loss(h_i W_i + b_i,\ y), \qquad
    \Delta\theta_i = rule\Big(\frac{\partial \ell_i}{\partial h_i}\Big)

  for the output h_i of block i. Heads learn from their exact gradient. What runs
  before the first block, or between two, learns with the block that follows;
  what follows the last block is the readout, which learns from the loss of the
  model's output. The value that `learn` returns is that loss.

  The losses of each patch and channel group (Scaling forward gradient with local
  losses, Ren, Kornblith, Liao and Hinton, ICLR 2023,
  https://arxiv.org/abs/2210.03310) have the value of the block's, and each
  differs in the entries of h_i that it sends a gradient to. Their gradients add
  up to that of the block's loss: rules that send errors do not see the
  difference, and no copy is ever made. A perturbation of one patch and group is
  multiplied by the change of the losses that it can reach alone, found from the
  trace of the model (`bpjax.networks.reach`): less variance, the same mean. Heads
  get the mean of the copies' gradients, which is that of one loss.

  Ports (direct feedback alignment) read the error of their own block's
  prediction, `[batch, classes]` under the default loss.

  Args:
    rule: a rule of the credit or the perturbation engine.
    blocks: globs for the paths of the modules that are blocks, such as
      `['block_*']`, or what chooses a module: `lambda m: isinstance(m, Block)`.
    loss: a local loss; default `bpjax.local_losses.prediction()`.
    placement: 'block'; 'patch', a loss for every position as well; or 'group',
      one for every position and channel group.
    groups: the number of groups of neighbouring channels.
    grouped: whether blocks put out an axis for groups, `[batch, ..., groups,
      channels]`; `groups` is taken from there then.
    stop: where gradients stop. 'output': after blocks; 'overlap': after every
      second block, in two passes whose updates add up, so that a block learns
      from its own loss twice and from that of the next one; 'branch': at the
      inputs of `branches`, so that skip connections still carry the gradient;
      'none'.
    stop_every: under 'output', i blocks between two stops.
    stop_remainder: the gradient stops after block i where i modulo `stop_every`
      is this; -1: the last of each `stop_every`.
    branches: globs for the modules at whose inputs residual branches begin.
    readout: 'detached': the readout sends no error to the last block; 'joined':
      it is the last block's head, which has no other.
    head_scale: factor on the updates of heads.

  Returns:
    A rule with feedback `{'rule': ..., 'heads': {block: head}}`; heads are
    trainable.

  Raises:
    ValueError: for a value out of range; when the network is known, for several
      outputs, a glob without a module, a block that is named twice, lies in
      another, is called twice or has no trainable unit, and groups that do not
      divide its channels.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Sequential(
    ...     [nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
    >>> net = bpjax.from_linen(model)
    >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
    >>> variables = net.init(jax.random.key(0), x)
    >>> rule = bpjax.local(bpjax.rules.backprop(), ['layers_0', 'layers_2'])
    >>> feedback = rule.init(jax.random.key(1), net, variables, x)
    >>> sorted(feedback['heads'])
    ['layers_0', 'layers_2']
    >>> learn = jax.jit(
    ...     rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy))
    >>> (value, aux), (grads, feedback_grads) = learn(variables, feedback, x, y)
  """
  if not isinstance(rule, (credit.Rule, perturbation.Rule)):
    raise ValueError(
        '`rule` must be of the credit or the perturbation engine, such as '
        f'bpjax.rules.backprop(), got {getattr(rule, "name", rule)!r}.')
  if loss is not None and not isinstance(loss, local_losses.LocalLoss):
    raise ValueError(
        '`loss` must be a local loss, such as bpjax.local_losses.prediction('
        f'loss=...), got {getattr(loss, "__name__", loss)!r}; that of the '
        "model's output goes to `value_and_grad`.")
  if not callable(blocks):
    blocks = arguments.patterns('blocks', blocks)
    twice = sorted({b for b in blocks if blocks.count(b) > 1})
    if twice or not blocks:
      raise ValueError(
          '`blocks` needs at least one glob, and each once, got '
          f'{", ".join(twice) + " twice" if twice else "none"}.')
  for name, value, known in (
      ('stop', stop, _STOPS), ('placement', placement, _PLACEMENTS),
      ('readout', readout, _READOUTS)):
    arguments.choice(name, value, known)
  for name, value in (('groups', groups), ('stop_every', stop_every)):
    arguments.whole(name, value)
  arguments.flag('grouped', grouped)
  arguments.whole('stop_remainder', stop_remainder, least=-1)
  branches = arguments.patterns('branches', branches)
  if not -1 <= stop_remainder < stop_every or stop_remainder != int(
      stop_remainder):
    raise ValueError(
        f'`stop_remainder` must be -1 or one of 0 to {stop_every - 1}, below '
        f'`stop_every`, got {stop_remainder}.')
  if stop != 'output' and stop_every != 1:
    raise ValueError(
        f"`stop_every` needs `stop='output'`, got {stop!r}; leave it at 1.")
  if (stop == 'branch') != bool(branches):
    raise ValueError(
        "`branches` and `stop='branch'` need each other, got "
        f'{list(branches)} and {stop!r}; name the modules at which residual '
        "branches begin, `branches=['block_*/norm_0']`.")
  if stop == 'branch' and getattr(rule, 'epsilon', 0):
    raise ValueError(
        "`epsilon` must be 0 with `stop='branch'`, got "
        f'{rule.epsilon}: a difference does not stop inside a block.')
  if loss is not None and loss.differentiable_only and getattr(
      rule, 'epsilon', 0):
    raise ValueError(
        f'`epsilon` must be 0 with the {loss.name} loss, got {rule.epsilon}: a '
        "difference of one example's loss is not its part of the gradient.")
  if getattr(rule, 'noise', None):
    raise ValueError(
        f'`noise` must be None in a rule of local losses, got {rule.noise!r}: '
        'it compares estimators on one loss of the whole model.')
  arguments.number('head_scale', head_scale, least=0)
  return Local(
      rule, blocks, loss or local_losses.prediction(), placement, int(groups),
      grouped, stop, int(stop_every), int(stop_remainder), tuple(branches),
      readout, head_scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Local:
  """A rule that trains blocks on losses of their own. Made by `local`."""
  rule: Any
  blocks: view_lib.Blocks
  loss: local_losses.LocalLoss
  placement: str
  groups: int
  grouped: bool
  stop: str
  stop_every: int
  stop_remainder: int
  branches: tuple[str, ...]
  readout: str
  head_scale: float

  @property
  def name(self) -> str:
    """The name of the rule that trains the blocks, and that they are local."""
    return f'local_{self.rule.name}'

  def views(self, net: network.Network) -> tuple[view_lib.View, ...]:
    """The network cut into blocks; once for every pass."""
    if self not in net.views:
      if self.stop == 'overlap':
        stops = [lambda i: i % 2 == 0, lambda i: i % 2 == 1]
      elif self.stop == 'output':
        stops = [lambda i: i % self.stop_every == (
            self.stop_remainder % self.stop_every)]
      else:
        stops = [lambda i: False]
      net.views[self] = tuple(self._cut(net, s) for s in stops)
    return net.views[self]

  def _cut(self, net, stop):
    """A view with stops between blocks, and the readout as it is asked for."""
    detached = self.readout == 'detached'
    return view_lib.View(
        net, self.blocks,
        lambda i, count: detached if i == count - 1 else stop(i),
        self.branches, self._error)

  def _error(self, block, names, features, output):
    """The shape of a block's prediction; None for one without a loss."""
    if self.readout == 'joined' and block == names[-1]:
      return None
    located.check(block, features, self.groups, self.grouped)
    if not hasattr(output, 'shape'):
      raise ValueError(
          'local losses need a model with one output array, got '
          f'{type(output).__name__}; return the array alone.')
    features = located.flat_shape(features, self.grouped)
    return jax.eval_shape(
        lambda: self.loss.predict(
            self.loss.init(jax.random.key(0), features, output),
            jnp.zeros(features.shape, features.dtype)))

  def _with_heads(self, view):
    return view.names[:-1] if self.readout == 'joined' else view.names

  def init(
      self, key: base.Key, net: network.Network,
      variables: Mapping[str, Any], x: Any) -> dict[str, Any]:
    """Draws the heads, and the rule's own feedback.

    Args:
      key: a random key; the same key gives the same feedback.
      net: the network.
      variables: its variables.
      x: an input, or a tuple of inputs (only the shapes matter).

    Returns:
      `{'rule': the rule's feedback, 'heads': {block: head}}`.

    Raises:
      ValueError: if the blocks or the rule do not fit the network.
    """
    arguments.key('key', key)
    arguments.network(net)
    arguments.step(variables, x, None)
    rule_key, head_key = jax.random.split(key)
    view, *rest = self.views(net)
    if rest:  # A unit hands an error down in one pass and not in the other.
      view = self._cut(net, lambda i: False)
    survey = view.survey(variables, x)
    heads = {}
    for i, name in enumerate(self._with_heads(view)):
      features = located.flat_shape(view.outputs[name], self.grouped)
      heads[name] = self.loss.init(
          jax.random.fold_in(head_key, i), features,
          survey.output[view_lib.OUTPUT])
    return {'rule': self.rule.init(rule_key, view, variables, x),
            'heads': heads}

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""
    self.rule.check(survey)

  def trainable(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools: heads learn; the rest as the rule says."""
    return {'rule': self.rule.trainable(feedback['rule']),
            'heads': jax.tree.map(lambda _: True, feedback['heads'])}

  def mirrored(self, feedback: base.Tree) -> base.Tree:
    """A tree of bools: which feedback learns from noise."""
    return {'rule': self.rule.mirrored(feedback['rule']),
            'heads': jax.tree.map(lambda _: False, feedback['heads'])}

  def units(self, net, variables, x) -> dict[str, str]:
    """Unit -> the rule that trains it; also the parameters without a unit."""
    return self.rule.units(self.views(net)[0], variables, x)

  def infos(self, net, variables, x) -> dict[str, base.UnitInfo]:
    """Unit -> what is known of it, its block among it."""
    return self.rule.infos(self.views(net)[0], variables, x)

  def predict(self, net: network.Network) -> Callable[..., Any]:
    """`(variables, x) -> output` in evaluation mode."""
    return self.rule.predict(net)

  def bind(self, net: network.Network) -> Callable[..., Any]:
    """Raises: losses inside the model are no function of its output."""
    raise ValueError(
        f'`bind` needs one loss of the output, and `{self.name}` has one for '
        'each block; use `rule.value_and_grad(net, loss)`.')

  def value_and_grad(
      self, net: network.Network, loss: base.Loss, *,
      reduction: str | Mapping[str, str] = 'mean') -> Callable[..., Any]:
    """As `bpjax.engines.credit.Rule.value_and_grad`.

    Args:
      net: the network.
      loss: `(output, y) -> per-example losses [batch, ...]`; also that of the
        blocks' predictions, unless their local loss has its own.
      reduction: 'mean', 'sum', or path pattern -> one of them; a head has the
        path of its block.

    Returns:
      `learn(variables, feedback, x, y, key=None) -> ((value, aux), (grads,
      feedback_grads))`; `value` is the mean loss of the model's output.

    Raises:
      ValueError: before any computation, if the rule cannot train the network.
    """
    arguments.network(net)
    arguments.loss(loss)
    reduction_lib.check(reduction)

    def learn(variables, feedback, x, y, key=None):
      arguments.step(variables, x, key)
      self._check_feedback(net, variables, x, feedback)
      passes = [
          self._pass(view, loss, variables, feedback, x, y, key, reduction, i)
          for i, view in enumerate(self.views(net))]
      (value, aux, _, heads, count), *_ = passes
      updates = [p[2] for p in passes]
      grads, rule_grads = jax.tree.map(lambda *g: sum(g[1:], g[0]), *updates)
      heads = {  # The same in every pass.
          name: jax.tree.map(lambda g: self.head_scale * g, head)
          for name, head in heads.items()}
      grads, rule_grads, heads = reduction_lib.apply(
          reduction, (grads, rule_grads, heads), count)
      own = feedback['rule'] if aux.feedback is None else aux.feedback
      aux = aux._replace(feedback=feedback if own is feedback['rule'] else {
          **feedback, 'rule': own})
      return (value, aux), (grads, {'rule': rule_grads, 'heads': heads})

    return learn

  def _pass(self, view, loss, variables, feedback, x, y, key, reduction, i):
    """Value, aux, summed updates, those of the heads, and number of losses."""
    losses = self._losses(i, view, feedback, loss, x, y)
    if isinstance(self.rule, credit.Rule):
      value, aux, grads, count = self.rule.differentiate(
          view, losses.of_output, variables, feedback['rule'], x, y, key,
          reduction=reduction, settle=losses.settle_ports)
      updates = grads[:2]
    else:
      value, aux, grads, count, _ = self.rule.differentiate(
          view, variables, x, key, losses)
      updates = grads, jax.tree.map(jnp.zeros_like, feedback['rule'])
    aux = aux._replace(output=aux.output[view_lib.OUTPUT])
    return value, aux, updates, losses.heads, count

  def _check_feedback(self, net, variables, x, feedback):
    """Raises a ValueError unless there is a head for each block, and no other."""
    view = self.views(net)[0]
    view.survey(variables, x)
    if not isinstance(feedback, Mapping) or {*feedback} != {'rule', 'heads'} or (
        not isinstance(feedback['heads'], Mapping)
        or {*feedback['heads']} != {*self._with_heads(view)}):
      raise ValueError(
          "`feedback` must have 'rule', and under 'heads' one for each of the "
          f'blocks {", ".join(self._with_heads(view))}; pass what `rule.init` '
          'returned for this network.')

  def _losses(self, i, view, feedback, loss, x, y):
    # A readout that is alone has one loss to learn from, in the first pass.
    again = i > 0 and self.readout == 'detached'
    return Losses(
        self, feedback['heads'], loss, y, 0. if again else 1., view.real(x))

  def signals(self, net, loss, variables, feedback, x, y, key):
    """As `bpjax.engines.credit.Rule.signals`; of several passes, the sum."""
    answers = []
    for i, view in enumerate(self.views(net)):
      losses = self._losses(i, view, feedback, loss, x, y)
      how = (dict(settle=losses.settle_ports)
             if isinstance(self.rule, credit.Rule) else dict(judge=losses))
      answers.append(self.rule.signals(
          view, losses.of_output, variables, feedback['rule'], x, y, key,
          **how))
    return jax.tree.map(lambda *a: sum(a[1:], a[0]), *answers)

  def weight_targets(self, units, params, feedback):
    """Unit -> the weights that its own should align with, block by block."""
    targets = {}
    for block in dict.fromkeys(info.block for info in units.values()):
      own = {n: info for n, info in units.items() if info.block == block}
      targets |= self.rule.weight_targets(own, params, feedback['rule'])
    return targets


class Losses(located.Judge):
  """The losses of one step: those of the blocks and that of the output.

  Attributes:
    heads: block -> the summed gradient of its head, once `settle` was called.
  """

  def __init__(self, local, heads, loss, y, of_output=1., mask=None):
    super().__init__(local.placement, local.groups, local.grouped)
    self._mask = mask
    self._local, self._params = local, heads
    self._loss, self._y, self._share = loss, y, of_output
    self.heads = {}

  def of_output(self, outputs: Any, y: Any = None) -> base.Array:
    """The losses of the model's output."""
    y = self._y if y is None else y
    return self._loss(outputs[view_lib.OUTPUT], y)

  def measure(self, outputs: Any) -> Any:
    """What the blocks with a loss put out, and the output."""
    blocks = {n: outputs['blocks'][n] for n in self._params}
    return {**outputs, 'blocks': blocks}

  def blocks(self) -> dict[str, Any]:
    """Block -> `shape -> axes`: of its output, those that losses lie on."""
    return {n: lambda shape: self.kept(reach_lib.identity(shape))
            for n in self._params}

  def held(self, net: view_lib.View, measured: Any) -> view_lib.View:
    """A difference does not stop where a gradient does: what goes on is held."""
    return net.going_on_from(measured['blocks'])

  def settle(self, outputs: Any) -> tuple[base.Array, Any]:
    """The losses of the output, and the error of each measured array."""
    losses, errors, _ = self._differentiate(outputs)
    self.errors = errors
    return losses, errors

  def settle_ports(self, outputs: Any) -> tuple[base.Array, Any, Any]:
    """The same for the credit engine, and block -> the error of its output."""
    losses, errors, own = self._differentiate(outputs)
    return losses, errors, own.__getitem__

  def of_block(self, name: str, features: base.Array) -> base.Array:
    """The losses of a block, [batch, ...]."""
    prediction = self._local.loss.predict(
        self._params[name], self.flat(features))
    return self._local.loss.loss(prediction, self._y, self._loss)

  def flat(self, features: base.Array) -> base.Array:
    """What a head reads: of the positions that are real alone.

    Where it takes the mean over all, they are weighed to make it that over those.
    """
    features, mask = super().flat(features), self._mask
    if mask is None or features.ndim < 3 or features.shape[:2] != mask.shape:
      return features
    features = examples.only_real(features, mask)
    if not self._local.loss.pooled:
      return features
    count = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(features.dtype)
    return features * (mask.shape[1] / count).reshape(
        -1, *(1,) * (features.ndim - 1))

  def _differentiate(self, outputs):
    """Losses, errors of what blocks put out, errors of their predictions."""
    output = outputs[view_lib.OUTPUT]
    losses, pull = jax.vjp(lambda o: self._loss(o, self._y), output)
    reduction_lib.check_losses(losses, output)
    error, = pull(jnp.full_like(losses, self._share))
    errors = {n: jnp.zeros_like(h) for n, h in outputs['blocks'].items()}
    own, self.heads = {view_lib.LAST: error}, {}
    for name, head in self._params.items():
      prediction, pull_head = jax.vjp(
          lambda head, h: self._local.loss.predict(head, self.flat(h)), head,
          outputs['blocks'][name])
      block, pull_loss = jax.vjp(
          lambda p: self._local.loss.loss(p, self._y, self._loss), prediction)
      reduction_lib.check_losses(block, output)
      # The engine divides by the number of the output's losses.
      weight = losses.size / block.size
      own[name], = pull_loss(jnp.full_like(block, weight))
      self.heads[name], errors[name] = pull_head(own[name])
    return losses, {'blocks': errors, view_lib.OUTPUT: error}, own
