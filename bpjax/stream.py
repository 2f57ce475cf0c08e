"""Steps of a pipeline without a flush between them, for local losses.

Parallel training of deep networks with local updates, Laskin et al., 2020
(https://arxiv.org/abs/2012.03837): a stage that learns from a loss of its own
needs nothing from the stages after it, and so goes on with the next batch while
they still work on this one.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import paths
from bpjax.engines import credit
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import optax

_PARTS = ('first', 'blocks', 'last')


def init_optimizer(
    piped: Any, tx: optax.GradientTransformation, variables: Any,
    feedback: Any) -> Any:
  """The state of `Pipeline.init_optimizer`, on the stages' devices."""
  _check_parts(piped)
  own = _learning(piped, variables['params'], feedback)
  _check_optimizer(tx, own)
  state = {part: jax.vmap(tx.init)(tree) for part, tree in own.items()}
  mesh = jax.sharding.get_mesh()
  return jax.device_put(state, jax.NamedSharding(mesh, jax.P(piped.axis)))


def steps(
    piped: Any, loss: base.Loss, tx: optax.GradientTransformation
) -> Callable[..., Any]:
  """The function of `Pipeline.steps`."""
  arguments.loss(loss)
  if not piped.is_local:
    raise ValueError(
        f'`steps` needs local losses, since under `{piped.own.name}` a stage '
        'waits for an error from the stages after it; use `bpjax.local(rule, '
        'blocks)`, or `value_and_grad`, whose steps end with a flush.')

  def learn(variables, feedback, state, x, y):
    _check_parts(piped)
    _check_optimizer(tx, _learning(piped, variables['params'], feedback))
    count = piped.microbatches
    sizes = {a.shape[:2] for a in jax.tree.leaves((x, y))}
    if len(sizes) != 1 or len(size := sizes.pop()) != 2:
      raise ValueError(
          '`x` and `y` must be [steps, batch, ...] alike, got '
          f'{", ".join(str(a.shape) for a in jax.tree.leaves((x, y)))}.')
    if size[1] % count:
      raise ValueError(
          f'`microbatches` must divide the batch of {size[1]}, got {count}.')
    x, y = jax.tree.map(lambda a: a.reshape(
        size[0] * count, size[1] // count, *a.shape[2:]), (x, y))
    along, whole = jax.P(piped.axis), jax.P()
    run = jax.shard_map(
        functools.partial(_run, piped, loss, tx, piped._stages(), size[0]),
        in_specs=(along, along, along, whole, whole), out_specs=along,
        axis_names={piped.axis}, check_vma=False)
    values, (params, feedback, state) = run(
        variables['params'], feedback, state, x, y)
    return values, ({'params': params}, feedback, state)

  return learn


def _run(piped, loss, tx, stages, total, params, feedback, state, x, y):
  """What one stage does: `shard_map` calls it on each.

  One tick takes a microbatch through the stage's blocks, hands it on, and learns
  from it. Stage s is at microbatch `tick - s` of all the steps'.
  """
  count = piped.microbatches
  stage = jax.lax.axis_index(piped.axis)
  is_first, is_last = stage == 0, stage == stages - 1
  number = total * count
  first, block, last = piped._parts.pieces
  one = lambda tree, place: jax.tree.map(lambda a: a[0], tree[place])
  around = lambda held, place: (
      one(held[0], place), one(held[1]['rule'], place))

  def read(i):
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, False), (x, y))

  def enter(held, i):
    return first.vjp(piped, *around(held, 'first'), *read(i))

  def advance(held, received, i):
    """What this stage makes of a microbatch: the run of each block."""
    entered = enter(held, i)
    h, runs = jnp.where(is_first, entered.out, received), []
    for j in range(jax.tree.leaves(held[0]['blocks'])[0].shape[0]):
      own = jax.tree.map(
          lambda a: a[j], (held[0]['blocks'], held[1]['rule']['blocks']))  # pylint: disable=cell-var-from-loop
      runs.append(block.vjp(piped, *own, h, read(i)[1]))
      h = runs[-1].out
    return entered, runs

  def answer(held, entered, runs, i):
    """The sum of a microbatch's losses, on the last stage, and its updates."""
    labels = read(i)[1]

    def end():
      left = last.vjp(piped, *around(held, 'last'), runs[-1].out, labels)
      losses, error, _ = credit.settled(loss, labels, left.out)
      return jnp.sum(losses), left.pull(error, error)[:2]

    def begin(pull):
      *own, message = pull()
      return tuple(own), entered.pull(message, _zeros(out))[:2]

    def only_own(pull):
      return pull()[:2], _zeros(jax.eval_shape(lambda: begin(pull))[1])

    value, lasts = _only_where(is_last, end)
    grads, firsts = [], None
    for j, run in enumerate(runs):
      head = jax.tree.map(lambda a: a[j], held[1]['heads'])  # pylint: disable=cell-var-from-loop
      message, error, head = piped._own_error(loss, head, run.out, labels, size)
      pull = functools.partial(run.pull, message, error)
      if j == 0:  # What comes before the blocks learns with the first of all.
        own, firsts = jax.lax.cond(
            is_first, lambda: begin(pull), lambda: only_own(pull))  # pylint: disable=cell-var-from-loop
      else:
        own = pull()[:2]
      grads.append((*own, head))
    blocks, blocks_held, heads = jax.tree.map(lambda *a: jnp.stack(a), *grads)
    heads = jax.tree.map(lambda g: piped.rule.head_scale * g, heads)
    firsts, lasts = jax.tree.map(lambda a: a[None], (firsts, lasts))
    return value, (
        {'first': firsts[0], 'blocks': blocks, 'last': lasts[0]},
        {'rule': {'first': firsts[1], 'blocks': blocks_held, 'last': lasts[1]},
         'heads': heads})

  def outputs(held):
    _, runs = advance(held, _zeros(hop), 0)
    left = last.vjp(
        piped, *around(held, 'last'), runs[-1].out, read(0)[1])
    return left.out, credit.settled(loss, read(0)[1], left.out)[0]

  held = params, feedback
  hop = jax.eval_shape(lambda held: enter(held, 0).out, held)
  out, losses = jax.eval_shape(outputs, held)
  size = losses.size
  # Of what no rule learns, the keys of feedback say, gradients have other dtypes.
  grads = jax.eval_shape(
      lambda held: answer(held, *advance(held, _zeros(hop), 0), 0)[1], held)

  def learn(held, state, grads):
    """The optimiser's step, of what this stage holds alone."""
    grads = jax.tree.map(lambda g: g / (count * size), grads)
    own, taught = _learning(piped, *held), _learning(piped, *grads)
    moved, kept = {}, {}
    for part, tree in own.items():
      updates, kept[part] = jax.vmap(tx.update)(taught[part], state[part], tree)
      moved[part] = jax.vmap(optax.apply_updates)(tree, updates)
    return _replaced(piped, held, moved), kept

  def tick(carry, now):
    held, state, summed, received = carry
    with jax.named_scope('forward'):
      i = jnp.clip(now - stage, 0, number - 1)
      entered, runs = advance(held, received, i)
      # Sent before the stage learns, so that the next one need not wait for it.
      received = jax.lax.ppermute(
          runs[-1].out, piped.axis, [(i, i + 1) for i in range(stages - 1)])

    def active():
      with jax.named_scope('backward'):
        value, grads = answer(held, entered, runs, i)
        if count == 1:
          return (*learn(held, state, grads), summed, value)
        m = i % count
        added = jax.tree.map(
            lambda s, g: jnp.where(m == 0, g, s + g), summed, grads)
        moved = jax.lax.cond(
            m == count - 1, lambda: learn(held, state, added),
            lambda: (held, state))
        return (*moved, added, value)

    # Before its first microbatch and after its last one a stage learns nothing.
    *carry, value = jax.lax.cond(
        (now >= stage) & (now < stage + number), active,
        lambda: (held, state, summed, jnp.zeros((), losses.dtype)))
    return (*carry, received), value

  summed = () if count == 1 else _zeros(grads)
  (held, state, _, _), values = jax.lax.scan(
      tick, (held, state, summed, _zeros(hop)), jnp.arange(number + stages - 1))
  values = values[stages - 1:].reshape(total, count).sum(1) / (count * size)
  return jnp.where(is_last, values, 0)[None], (*held, state)


def _only_where(here, function):
  """What a function returns, or zeros, without its computation."""
  shapes = jax.eval_shape(function)
  return jax.lax.cond(here, function, lambda: _zeros(shapes))


def _zeros(shapes):
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _learning(piped, params, feedback):
  """Part -> what an optimiser may touch there; no part without any."""
  parts = {}
  for part in _PARTS:
    tree = {'params': params[part], 'feedback': {
        n: a for n, a in feedback['rule'][part].items()
        if piped._learns[part][n]}}
    if part == 'blocks':
      tree['heads'] = feedback['heads']
    if jax.tree.leaves(tree):
      parts[part] = tree
  return parts


def _replaced(piped, held, moved):
  """Parameters and feedback with what an optimiser has moved."""
  params, feedback = held
  rule = {part: {**feedback['rule'][part],
                 **moved.get(part, {}).get('feedback', {})} for part in _PARTS}
  return ({part: moved[part]['params'] if part in moved else params[part]
           for part in _PARTS},
          {'rule': rule, 'heads': moved['blocks']['heads']})


def _check_parts(piped):
  if piped._parts is None:
    raise ValueError('call `init` first: the pipeline has no blocks yet.')


def _check_optimizer(tx, own):
  """Raises a ValueError unless each update depends on its own gradient alone."""
  if not hasattr(tx, 'update') or not hasattr(tx, 'init'):
    raise ValueError(
        '`tx` must be an optax transformation, such as optax.adam(1e-3), got '
        f'{type(tx).__name__}.')
  trees = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), own)
  names, structure = paths.leaf_names(trees), jax.tree.structure(trees)
  state = jax.eval_shape(tx.init, trees)
  closed = jax.make_jaxpr(lambda grads, state, params: jax.tree.leaves(
      tx.update(jax.tree.unflatten(structure, grads), state, params)[0]))(
          jax.tree.leaves(trees), state, trees)
  for i, name in enumerate(names):
    _, used = partial_eval.dce_jaxpr(
        closed.jaxpr, [j == i for j in range(len(names))])
    for j, other in enumerate(names):
      if used[j] and j != i:
        raise ValueError(
            '`tx` must work on each array alone, since a stage knows its own '
            f'block only, and its update of `{name}` reads the gradient of '
            f'`{other}`; leave out what joins arrays, such as '
            'optax.clip_by_global_norm, or use optax.clip_by_block_rms.')
