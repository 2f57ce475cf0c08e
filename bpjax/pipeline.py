"""Layers on devices: equal blocks spread over a mesh axis, as a pipeline.

GPipe: efficient training of giant neural networks using pipeline parallelism,
Huang et al., 2019 (https://arxiv.org/abs/1811.06965), for rules that need no
pass back through the blocks: Parallel training of deep networks with local
updates, Laskin et al., 2020 (https://arxiv.org/abs/2012.03837).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax import stream
from bpjax.engines import credit
from bpjax.local import engine as local_lib
from bpjax.networks import network
from bpjax.networks import run as run_lib
import jax
from jax.extend.core import Jaxpr
from jax.extend.core import Literal
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np
import optax


def pipeline(
    rule: Any, net: network.Network, *, blocks: Sequence[str],
    axis: str = 'layers', microbatches: int = 1) -> Pipeline:
  """Trains equal blocks of a model, each on a device of its own.

  The blocks' parameters are stacked and spread over the mesh axis `axis`, several
  to a device where there are more. Each microbatch goes forward from stage to
  stage (`ppermute`). On the way back it depends on the rule, which is read off
  its trace: where no block's update depends on what the next block sends
  (direct feedback alignment with boundaries at the blocks,
  `from_linen(model, boundaries=['block_*'])`; direct recursive LRA; random
  targets), the error of the output is broadcast once, and all stages learn at
  the same time; under `bpjax.local` each learns from its own loss, with nothing
  broadcast, and `Pipeline.steps` takes many steps without a flush between them;
  else messages go back from stage to stage, as under backprop.

  What comes before the blocks and after them runs on every stage, and counts on
  the first and on the last.

  Args:
    rule: a rule of the credit engine whose units read no error but their own and
      the output's, or `bpjax.local` of one, with the same blocks.
    net: the network.
    blocks: globs for the paths of the blocks, such as `['block_*']`.
    axis: the axis of the mesh, which `jax.set_mesh` makes current.
    microbatches: M, into how many parts a batch is cut.

  Returns:
    A `Pipeline`.

  Raises:
    ValueError: for another rule, and for several microbatches with a local loss
      in which examples meet; when the network is known, for blocks that
      are not equal or not a chain, for a state (BatchNorm) or random numbers
      (dropout) in the model, and for sizes that do not divide.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp
    >>> model = nn.Sequential(
    ...     [nn.Dense(8), nn.tanh, nn.Dense(8), nn.Dense(8), nn.Dense(3)])
    >>> net = bpjax.from_linen(model)
    >>> x, y = jnp.ones((4, 5)), jnp.zeros(4, int)
    >>> piped = bpjax.pipeline(
    ...     bpjax.rules.backprop(), net, blocks=['layers_[23]'], microbatches=2)
    >>> with jax.set_mesh(jax.make_mesh((1,), ('layers',))):
    ...   variables, feedback = piped.init(
    ...       jax.random.key(0), net.init(jax.random.key(1), x), x)
    ...   learn = jax.jit(piped.value_and_grad(
    ...       bpjax.losses.softmax_cross_entropy))
    ...   values, (grads, _) = learn(variables, feedback, x, y)
    >>> piped.unstack(grads)['layers_3']['kernel'].shape
    (8, 8)
  """
  own = rule.rule if isinstance(rule, local_lib.Local) else rule
  if not isinstance(own, credit.Rule):
    raise ValueError(
        '`rule` of a pipeline must be of the credit engine, or `bpjax.local` of '
        f'one, got {getattr(rule, "name", rule)!r}.')
  if own is not rule and (
      rule.stop, rule.stop_every, rule.readout, rule.grouped) != (
          'output', 1, 'detached', False):
    raise ValueError(
        "local losses of a pipeline need stop='output', stop_every=1, "
        "readout='detached' and grouped=False: each stage learns alone.")
  if own is not rule and microbatches > 1 and rule.loss.differentiable_only:
    # Of a part of the batch it would be another loss, without a word.
    raise ValueError(
        f'`microbatches` must be 1 with the {rule.loss.name} loss, in which '
        f'examples have a part in the losses of others, got {microbatches}; use '
        'bpjax.local_losses.prediction() with more.')
  if own.stochastic or own.counts or own.advance is not None:
    raise ValueError(
        f'`rule` of a pipeline must keep nothing but feedback and draw nothing, '
        f'and `{own.name}` does.')
  blocks = (blocks,) if isinstance(blocks, str) else tuple(blocks)
  return Pipeline(rule, own, net, blocks, axis, int(microbatches))


@dataclasses.dataclass(eq=False)
class Pipeline:
  """A rule for a model whose blocks lie on devices. Made by `pipeline`."""
  rule: Any
  own: credit.Rule
  net: network.Network
  blocks: tuple[str, ...]
  axis: str
  microbatches: int
  _parts: _Parts | None = None
  _learns: Any = None  # Feedback, as it is held -> whether it is trainable.

  @property
  def is_local(self) -> bool:
    return self.rule is not self.own

  def init(
      self, key: base.Key, variables: Any, x: Any) -> tuple[Any, Any]:
    """Variables and feedback as the pipeline holds them, on their devices.

    Args:
      key: a random key, for the feedback that `rule.init` draws.
      variables: the network's variables.
      x: an input of the whole batch; only the shape matters.

    Returns:
      `{'first', 'blocks', 'last'}` of parameters, as `{'params': ...}`, and of
      feedback. Every array has a new first axis, spread over the mesh axis: one
      entry a block, or one a stage for what is around the blocks.
    """
    stages = self._stages()
    feedback = self.rule.init(key, self.net, variables, x)
    if set(variables) != {'params'}:
      raise ValueError(
          'a pipeline needs a model without a state, got the collections '
          f'{sorted(set(variables) - {"params"})}; use a norm over single '
          'examples, such as LayerNorm.')
    self._parts = parts = _Parts.find(self, variables, x)
    if len(parts.names) % stages:
      raise ValueError(
          f'the {len(parts.names)} blocks must divide by the {stages} devices '
          f'of the axis `{self.axis}`.')
    whole, feedback = feedback, feedback['rule'] if self.is_local else feedback
    held = {'rule': self._stacked(feedback, stages)}
    learns = self._stacked(
        jax.tree.map(np.array, self.own.trainable(feedback)), stages)
    self._learns = jax.tree.map(lambda a: bool(a.all()), learns)
    if self._learns != jax.tree.map(lambda a: bool(a.any()), learns):
      raise ValueError(
          'the blocks of a pipeline must be equal, and some feedback learns in '
          'one of them alone; give all of them the same rule.')
    if self.is_local:
      held['heads'] = jax.tree.map(
          lambda *a: jnp.stack(a), *[whole['heads'][n] for n in parts.names])
    params = self._stacked(variables['params'], stages)
    mesh = jax.sharding.get_mesh()
    return jax.device_put(
        ({'params': params}, held), jax.NamedSharding(mesh, jax.P(self.axis)))

  def _stages(self):
    mesh = jax.sharding.get_abstract_mesh()
    if self.axis not in mesh.axis_names:
      raise ValueError(
          f'`axis` {self.axis!r} is none of the current mesh, '
          f'{mesh.axis_names}; call within `with jax.set_mesh(jax.make_mesh('
          f"(n,), ('{self.axis}',)))`.")
    return mesh.shape[self.axis]

  def _stacked(self, tree, stages):
    """A tree nested as the parameters, by its place in the pipeline."""
    leaves = dict(zip(paths.leaf_names(tree), jax.tree.leaves(tree)))
    places = self._parts.places(leaves)
    repeat = lambda a: jnp.broadcast_to(a, (stages, *a.shape))
    rows = [{name.removeprefix(f'{block}/'): leaves[name]
             for name in leaves if places[name] == block}
            for block in self._parts.names]
    shapes = [{n: (a.shape, a.dtype) for n, a in row.items()} for row in rows]
    if any(shape != shapes[0] for shape in shapes):
      raise ValueError(
          'the blocks of a pipeline must be equal, in what the rule keeps there '
          'as well; ' + (
              'leave out what learns before the first one, which hands its '
              'error on to it.' if self.is_local else
              'put a layer that learns before the first one.'))
    return {
        'first': {n: repeat(leaves[n]) for n in leaves if places[n] == 'first'},
        'blocks': {
            n: jnp.stack([row[n] for row in rows]) for n in rows[0]},
        'last': {n: repeat(leaves[n]) for n in leaves if places[n] == 'last'}}

  def unstack(self, tree: Any) -> Any:
    """Parameters, updates or feedback, nested as the model's own, in numpy."""
    tree = jax.device_get(tree)
    if set(tree) == {'params'}:
      return {'params': self.unstack(tree['params'])}
    if 'rule' in tree:
      own = self.unstack(tree['rule'])
      return own if 'heads' not in tree else {'rule': own, 'heads': {
          name: jax.tree.map(lambda a: a[i], tree['heads'])  # pylint: disable=cell-var-from-loop
          for i, name in enumerate(self._parts.names)}}
    leaves = {n: a[0] for n, a in tree['first'].items()}
    leaves |= {n: a[-1] for n, a in tree['last'].items()}
    leaves |= {f'{block}/{n}': a[i] for n, a in tree['blocks'].items()
               for i, block in enumerate(self._parts.names)}
    return paths.nest(leaves)

  def value_and_grad(self, loss: base.Loss) -> Callable[..., Any]:
    """The step, to be called under `jax.jit`.

    Args:
      loss: `(output, y) -> per-example losses [batch, ...]`.

    Returns:
      `learn(variables, feedback, x, y) -> (values, (grads, feedback_grads))`,
      with what `init` returned. `values` is `[stages]`: the mean loss on the last
      stage, and zeros: a scalar would have every stage wait for the last.
      Updates are divided by the number of losses.
    """

    def learn(variables, feedback, x, y):
      if self._parts is None:
        raise ValueError('call `init` first: the pipeline has no blocks yet.')
      size, = {a.shape[0] for a in jax.tree.leaves((x, y))}
      if size % self.microbatches:
        raise ValueError(
            f'`microbatches` must divide the batch of {size}, got '
            f'{self.microbatches}.')
      x, y = jax.tree.map(lambda a: a.reshape(
          self.microbatches, size // self.microbatches, *a.shape[1:]), (x, y))
      along, whole = jax.P(self.axis), jax.P()
      step = jax.shard_map(
          functools.partial(self._step, loss, self._stages()),
          in_specs=(along, along, whole, whole), out_specs=along,
          axis_names={self.axis}, check_vma=False)
      return step(variables['params'], feedback, x, y)

    return learn

  def init_optimizer(
      self, tx: optax.GradientTransformation, variables: Any, feedback: Any
  ) -> Any:
    """The state of an optimiser, each stage's on its own device.

    Args:
      tx: an optax transformation, as `steps` takes it.
      variables: what `init` returned.
      feedback: what `init` returned with them.

    Returns:
      A state for what comes before the blocks, one for the blocks and one for
      what follows them, whose arrays have a new first axis, as those of `init`.

    Raises:
      ValueError: for a `tx` that joins arrays, and before `init` was called.
    """
    return stream.init_optimizer(self, tx, variables, feedback)

  def steps(
      self, loss: base.Loss, tx: optax.GradientTransformation
  ) -> Callable[..., Any]:
    """Many steps with no flush between them, for a rule of `bpjax.local`.

    The T M microbatches of T steps follow each other through the S stages as one
    stream, which takes T M + S - 1 ticks, where T calls of `value_and_grad` take
    T (M + S - 1). In a tick a stage takes one microbatch forward, hands it on,
    and learns from it by its own loss; after the last microbatch of a step it
    takes the optimiser's step for what it holds. So a microbatch of step t meets,
    at every stage, the parameters that steps 0 to t - 1 have made, all of them
    and no others: the result is that of the same steps one after the other, and
    no gradient is stale. There are as many versions of the parameters at the same
    time as stages have got to different steps, and one of each block.

    Args:
      loss: `(output, y) -> per-example losses [batch, ...]`.
      tx: an optax transformation, for parameters, heads and what else of the
        feedback is trainable; fixed feedback stays as it is. It sees the arrays
        of one block at a time, and has to work on each array alone.

    Returns:
      `learn(variables, feedback, state, x, y) -> (values, (variables, feedback,
      state))`, to be called under `jax.jit`, with what `init` and
      `init_optimizer` returned and the batches of T steps: x and y are `[T,
      batch, ...]`. `values` is `[stages, T]`: the mean loss of each step on the
      last stage, and zeros. The pipeline is empty when `learn` returns.

    Raises:
      ValueError: for a rule without local losses, which has to wait for errors
        of later stages; when called, for a `tx` that joins arrays (a clip by the
        global norm, say), for shapes that do not fit, and before `init` was
        called.

    Example:
      >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(8) for _ in range(4)]))
      >>> x, y = jnp.ones((3, 4, 5)), jnp.zeros((3, 4), int)  # Three steps.
      >>> blocks = ['layers_[12]']
      >>> piped = bpjax.pipeline(
      ...     bpjax.local(bpjax.rules.backprop(), blocks), net, blocks=blocks,
      ...     microbatches=2)
      >>> tx = optax.adam(1e-3)
      >>> with jax.set_mesh(jax.make_mesh((1,), ('layers',))):
      ...   variables, feedback = piped.init(
      ...       jax.random.key(0), net.init(jax.random.key(1), x[0]), x[0])
      ...   state = piped.init_optimizer(tx, variables, feedback)
      ...   learn = jax.jit(piped.steps(bpjax.losses.softmax_cross_entropy, tx))
      ...   values, (variables, feedback, state) = learn(
      ...       variables, feedback, state, x, y)
      >>> values.shape
      (1, 3)
    """
    return stream.steps(self, loss, tx)

  def _step(self, loss, stages, params, feedback, x, y):
    """What one stage does: `shard_map` calls it on each."""
    count = self.microbatches
    stage = jax.lax.axis_index(self.axis)
    is_first, is_last = stage == 0, stage == stages - 1
    held = feedback['rule']
    one = lambda tree, place: jax.tree.map(lambda a: a[0], tree[place])
    at = lambda tree, m: jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, m, 0, False), tree)
    of_block = [jax.tree.map(lambda a: a[j], (params['blocks'], held['blocks']))  # pylint: disable=cell-var-from-loop
                for j in range(jax.tree.leaves(params['blocks'])[0].shape[0])]
    first, block, last = self._parts.pieces

    with jax.named_scope('forward'):
      entered = [first.vjp(self, one(params, 'first'), one(held, 'first'),
                           at(x, m), at(y, m)) for m in range(count)]
      ticks, received = [], jnp.zeros_like(entered[0].out)
      for tick in range(count + stages - 1):
        h = jnp.where(is_first, entered[min(tick, count - 1)].out, received)
        labels = at(y, jnp.clip(tick - stage, 0, count - 1))
        runs = []
        for own in of_block:
          runs.append(block.vjp(self, *own, h, labels))
          h = runs[-1].out
        ticks.append(runs)
        if tick < count + stages - 2:
          received = jax.lax.ppermute(
              h, self.axis, [(i, i + 1) for i in range(stages - 1)])
      left = [last.vjp(self, one(params, 'last'), one(held, 'last'),
                       ticks[stages - 1 + m][-1].out, at(y, m))
              for m in range(count)]
      settled = [credit.settled(loss, at(y, m), run.out)[:2]
                 for m, run in enumerate(left)]
    losses = jnp.stack([own for own, _ in settled])
    errors = jnp.stack([error for _, error in settled])
    kept = _Kept(ticks)  # A stage's microbatch m is that of its tick stage + m.

    with jax.named_scope('backward'):
      heads = [run.pull(error, error) for run, (_, error) in zip(left, settled)]
      reads = not self.is_local and any(
          self.own.port(info) for info in self._parts.told.values())
      if reads:  # The only thing that all stages are told.
        errors = jax.lax.psum(jnp.where(is_last, errors, 0), self.axis)

      def learn(m, message):
        """A stage's updates for microbatch m, and its message."""
        grads = []
        for j, run in reversed(list(enumerate(kept.at(stage + m)))):
          error, head = errors[m] if isinstance(m, int) else at(errors, m), {}
          if self.is_local:
            own = jax.tree.map(lambda a: a[j], feedback['heads'])  # pylint: disable=cell-var-from-loop
            message, error, head = self._own_error(
                loss, own, run.out, at(y, m), losses[0].size)
          *own, message = run.pull(message, error)
          grads.insert(0, (*own, head))
        return jax.tree.map(lambda *a: jnp.stack(a), *grads), message

      nothing = jnp.zeros_like(received)
      sent, grads = [], []
      if self.is_local or not _reads(
          lambda message: learn(0, message), nothing):
        for m in range(count):
          own, message = learn(m, nothing)
          grads.append(own)
          sent.append(message)
      else:
        for tick in range(count + stages - 1):
          m = tick - (stages - 1 - stage)
          message = jnp.where(
              is_last, heads[min(tick, count - 1)][2], nothing)
          own, out = learn(jnp.clip(m, 0, count - 1), message)
          real = (m >= 0) & (m < count)
          grads.append(jax.tree.map(lambda g: jnp.where(real, g, 0), own))
          if tick >= stages - 1:  # The first stage's.
            sent.append(out)
          if tick < count + stages - 2:
            nothing = jax.lax.ppermute(
                out, self.axis, [(i + 1, i) for i in range(stages - 1)])
      begun = [run.pull(message, errors[m])
               for m, (run, message) in enumerate(zip(entered, sent))]

      total = lambda parts: jax.tree.map(
          lambda *g: sum(g[1:], g[0]) / losses.size, *parts)
      around = lambda parts, here: [jax.tree.map(
          lambda g: jnp.where(here, g, 0)[None], part)
                                    for part in total([p[:2] for p in parts])]
      (firsts, firsts_held), (lasts, lasts_held) = (
          around(begun, is_first), around(heads, is_last))
      blocks, blocks_held, head_grads = total(grads)
    updates = {'rule': {
        'first': firsts_held, 'blocks': blocks_held, 'last': lasts_held}}
    if self.is_local:
      updates['heads'] = jax.tree.map(
          lambda g: self.rule.head_scale * g, head_grads)
    value = jnp.where(is_last, jnp.mean(losses), 0)[None]
    return value, (
        {'first': firsts, 'blocks': blocks, 'last': lasts}, updates)

  def _own_error(self, loss, head, out, y, size):
    """Of a block's loss: its errors at the output and prediction; the head's."""
    prediction, pull_head = jax.vjp(self.rule.loss.predict, head, out)
    losses, pull = jax.vjp(
        lambda p: self.rule.loss.loss(p, y, loss), prediction)
    error, = pull(jnp.full_like(losses, size / losses.size))
    head, message = pull_head(error)
    return message, error, head


class _Parts:
  """What a model is cut into.

  Attributes:
    names: the blocks, in their order.
    pieces: what comes before them; the first block; what comes after.
    told: unit -> what is known of it in the whole model.
  """

  def __init__(self, names, pieces, told):
    self.names, self.pieces, self.told = names, pieces, told

  @classmethod
  def find(cls, piped, variables, x):
    """Cuts a model at its blocks."""
    names = []

    def wants(kind, name, module):
      del module
      return kind in (network.ENTER, network.LEAVE) and any(
          paths.is_module(glob, name) for glob in piped.blocks)

    size = jax.tree.leaves(x)[0].shape[0]
    if size % piped.microbatches:
      raise ValueError(
          f'`microbatches` must divide the batch of {size}, got '
          f'{piped.microbatches}.')
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        (size // piped.microbatches, *a.shape[1:]), a.dtype), x)
    traced = piped.net.traced(variables, x, wants=wants)
    flat = traced.plan.jaxpr
    enters, leaves = {}, {}
    for step, around in traced.plan.walk():
      for kind, found in ((network.ENTER, enters), (network.LEAVE, leaves)):
        if step.how == 'mark' and step.name.startswith(kind):
          name = step.name.removeprefix(kind)
          if around or name in found:
            raise ValueError(
                f'block `{name}` of a pipeline must be called once, outside of '
                'loops, and take one array.')
          found[name] = step
    names = list(leaves)
    if not names or len(traced.plan.jaxpr.outvars) != 1:
      raise ValueError(
          '`blocks` must choose modules that the model calls, of a model with '
          f'one output; {paths.nearest(piped.blocks[0], traced.notes.modules)}.')
    params = dict(zip(paths.leaf_names(variables['params']), flat.invars))
    given = flat.invars[len(params):]
    cut = functools.partial(_cut, flat, params)
    first = cut(None, enters[names[0]].eqn.invars[0], 'what precedes them',
                given[:len(jax.tree.leaves(x))])
    own = [cut(enters[n].out, leaves[n].eqn.invars[0], f'block `{n}`')
           for n in names]
    last = cut(leaves[names[-1]].out, flat.outvars[0], 'what follows them')
    for before, name in zip(names, names[1:]):
      if enters[name].eqn.invars[0] is not leaves[before].out:
        raise ValueError(
            f'block `{name}` must read what `{before}` puts out, and nothing '
            'else lie between them.')
    programs = {str(part.jaxpr).replace(n, '') for n, part in zip(names, own)}
    if len(programs) > 1:
      raise ValueError(
          f'the blocks of a pipeline must be equal, and {", ".join(names)} are '
          f'{len(programs)} different programs.')
    # Inside of `shard_map` nothing lies on the axes that are seen outside.
    bare = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    infos = {
        n: dataclasses.replace(
            info, net_output=jax.tree.map(bare, info.net_output))
        for n, info in piped.rule.infos(piped.net, variables, x).items()}
    told = piped.own._told(infos)  # pylint: disable=protected-access
    survey = piped.net.survey(variables, x)
    if survey.error_parts != (0,) or any(
        piped.own.port(info) not in (None, 'output') for info in told.values()):
      raise ValueError(
          'a pipeline needs a model that ends in its readout, and units that '
          "read no other unit's error; leave out what follows the last layer.")
    pieces = [_Piece(part, told) for part in (first, own[0], last)]
    pieces[1].name = names[0]
    return cls(names, pieces, told)

  def places(self, leaves):
    """Name -> 'first', a block, or 'last'."""
    after = {unit for unit in self.pieces[2].params}
    units = [n for n in self.told if any(
        paths.is_inside(p, n) for p in after)]

    def place(name):
      inside = [b for b in self.names if paths.is_inside(name, b)]
      if inside:
        return inside[0]
      is_last = name in after or any(paths.is_inside(name, u) for u in units)
      return 'last' if is_last else 'first'

    return {name: place(name) for name in leaves}


@dataclasses.dataclass
class _Part:
  """Some equations of a trace, as a function of parameters and one input."""
  jaxpr: Jaxpr
  params: dict[str, Any]
  inputs: Sequence[Any]
  consts: dict[Any, Any]

  def __call__(self, params, x):
    env = {**self.consts, **{v: params[n] for n, v in self.params.items()}}
    env.update(zip(self.inputs, jax.tree.leaves(x)))
    out, = self.jaxpr.outvars
    if out in env:
      return env[out]
    return run_lib.evaluate(self.jaxpr.eqns, env, out)


def _cut(flat, params, start, out, what, given=()):
  """The equations that lead from `start`, or what is given, to `out`."""
  needed, eqns = {out}, []
  for eqn in reversed(flat.eqns):
    if start not in eqn.outvars and needed.intersection(eqn.outvars):
      eqns.insert(0, eqn)
      needed.update(v for v in eqn.invars if not isinstance(v, Literal))
  made = {v for eqn in eqns for v in eqn.outvars}
  own = {n: v for n, v in params.items() if v in needed}
  inputs = [start] if start is not None else list(given)
  rest = needed - made - {*own.values(), *inputs, *flat.consts}
  if rest:
    raise ValueError(
        f'in a pipeline {what} must read parameters and the array before it '
        'alone: no other input, no random numbers.')
  jaxpr = Jaxpr((), [*own.values(), *inputs], [out], eqns)
  return _Part(jaxpr, own, inputs, flat.consts)


class _Piece(network.Network):
  """A part of a model as a network, whose units are those of the whole."""
  name = ''

  def __init__(self, part, told):
    super().__init__()
    self._part, self._told = part, told
    self.params = part.params

  def _call(self, params, state, x, key, train, notes):
    names = paths.leaf_names(params)
    return self._part(dict(zip(names, jax.tree.leaves(params))), x), {}

  def vjp(self, piped, params, feedback, x, y):
    """A run of this part, with the rule for its derivative."""
    around = lambda tree: paths.nest({
        f'{self.name}/{n}' if self.name else n: a for n, a in tree.items()})
    rule = piped.own
    entries = self.traced({'params': around(params)}, x).entries
    seen = self.owning(rule.segments(entries))
    visit = functools.partial(
        rule.visit, infos=self._told, shared={}, told=(y, None, None))

    def forward(params, feedback, x):
      out, state = seen.run({
          'params': around(params), base.FEEDBACK: around(feedback),
          base.TOKENS: rule.tokens(self._told)}, x, visit, None, [base.TOKENS])
      return out, state[base.TOKENS]

    (out, tokens), pull = jax.vjp(forward, params, feedback, x)
    return _Run(out, tokens, pull)


class _Run:
  """What a piece puts out, and its derivative."""

  def __init__(self, out, tokens, pull):
    self.out, self._tokens, self._pull = out, tokens, pull

  def pull(self, message, error):
    """Updates of parameters and feedback, and the message to the input."""
    grads = self._pull((message, jax.tree.map(lambda _: error, self._tokens)))
    return jax.tree.map(
        lambda g: g if g.dtype != jax.dtypes.float0
        else jnp.zeros(g.shape), grads)


class _Kept:
  """What the runs of all ticks have kept, to be read by number."""

  def __init__(self, ticks):
    flat = [jax.tree.flatten([(r.out, r._tokens, r._pull) for r in runs])
            for runs in ticks]
    self._structure = flat[0][1]
    self._leaves = [
        same[0] if all(a is same[0] for a in same) else jnp.stack(same)
        for same in zip(*[leaves for leaves, _ in flat], strict=True)]
    self._stacked = [
        any(a is not same[0] for a in same)
        for same in zip(*[leaves for leaves, _ in flat])]

  def at(self, tick):
    """The runs of a tick."""
    return [_Run(*run) for run in jax.tree.unflatten(self._structure, [
        jax.lax.dynamic_index_in_dim(a, tick, 0, False) if stacked else a
        for a, stacked in zip(self._leaves, self._stacked)])]


def _reads(function, x):
  """Whether what a function returns depends on its argument."""
  closed = jax.make_jaxpr(function)(x)
  _, used = partial_eval.dce_jaxpr(
      closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return used[0]
