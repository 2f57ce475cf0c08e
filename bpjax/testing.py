"""The contract of a learning rule as one check, for authors of new rules."""

from __future__ import annotations

import functools
from typing import Any

from bpjax import feedback as feedback_lib
from bpjax import losses
from bpjax import paths
from bpjax.networks import linen
from bpjax.optimizer import optimizer
from bpjax.rules.backprop import backprop
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

_STEPS = 150


def check_rule(
    rule: Any, *, model: nn.Module | None = None, net: Any | None = None,
    learning_rate: float = 1e-2) -> None:
  """Checks that a rule keeps the contract, on a small classification task.

  Structure, shape and dtype of updates and feedback; initialisation under
  `jax.eval_shape` and by key; determinism; no second compilation; feedback that
  is not trainable gets no update; 'sum' is 'mean' times the batch; a rule that
  says it is linear in the error is; the loss halves within 150 steps of Adam; on
  points too many to know by heart it falls further than with hidden layers that
  stay as they are; with the weights for feedback, where it has their shapes,
  updates point along the gradient; convolutions, boundaries, integer inputs,
  `remat`, `scan` and a batch of one work or are refused by a ValueError (without
  `model` and `net`); and, where there are several devices, a batch sharded over
  all of them gives the same updates. It takes half a minute, and returns nothing
  where all of that holds.

  Args:
    rule: the rule, such as `my_rule()`.
    model: a module from `[batch, 8]` to `[batch, 3]`; default a small
      perceptron with tanh.
    net: a network in place of a model, such as `bpjax.from_nnx(module)`.
    learning_rate: of Adam, on the task.

  Raises:
    AssertionError: saying which part of the contract is broken.

  Example:
    >>> import bpjax
    >>> bpjax.testing.check_rule(bpjax.rules.feedback_alignment())
  """
  x, y = _task(jax.random.key(11))
  given = model is not None or net is not None
  if net is None:
    net = linen.from_linen(
        model or nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(12), nn.tanh,
                                nn.Dense(3)]))
  variables = net.init(jax.random.key(0), x)
  feedback = _check_init(rule, net, variables, x)
  traces = []
  uncompiled = rule.value_and_grad(net, losses.softmax_cross_entropy)

  @jax.jit
  def learn(*args, **kwargs):
    traces.append(1)
    return uncompiled(*args, **kwargs)

  call = lambda key: learn(variables, feedback, x, y, key=jax.random.key(key))

  (value, aux), (grads, feedback_grads) = call(2)
  _expect(value.shape == (), 'the value is a scalar')
  _expect(aux.output.shape == (len(x), 3), '`aux.output` is the output')
  _check_like(grads, variables['params'], '`grads`', "`variables['params']`")
  _check_like(feedback_grads, feedback, '`feedback_grads`', '`feedback`')
  _expect(_same(call(2), call(2)), 'the same key gives the same updates')
  _expect(len(traces) == 1, 'a second call does not compile again')
  _check_fixed(rule, feedback, feedback_grads)

  total = jax.jit(rule.value_and_grad(
      net, losses.softmax_cross_entropy, reduction='sum'))(
          variables, feedback, x, y, key=jax.random.key(2))[1][0]
  _expect(
      _close(total, jax.tree.map(lambda g: g * len(x), grads), 1e-4),
      "'sum' is 'mean' times the batch size")
  if _same(call(2)[1][0], call(3)[1][0]):  # Without noise.
    doubled = learn(
        variables, feedback, jnp.concatenate([x, x]), jnp.concatenate([y, y]),
        key=jax.random.key(2))[1][0]
    _expect(
        _close(doubled, grads, 1e-4),
        'updates are summed over examples, and the engine takes the mean: a batch '
        'that has every example twice gives the same mean')
  out = rule.predict(net)(variables, x)
  _expect(out.shape == (len(x), 3), '`predict` returns the output')
  _check_linear(rule, net, variables, feedback, x)
  _check_learns(rule, learn, variables, feedback, x, y, learning_rate)
  _check_sign(rule, net, variables, feedback, x, y)
  _check_hidden(rule, net, variables, feedback, x)
  if not given:
    _check_models(rule)
  if len(jax.devices()) > 1:
    _check_devices(learn, variables, feedback, x, y, (grads, feedback_grads))


def _check_init(rule, net, variables, x):
  init = lambda key: rule.init(key, net, variables, x)
  feedback = init(jax.random.key(1))
  abstract = jax.eval_shape(init, jax.random.key(1))
  _check_like(abstract, feedback, '`eval_shape` of `init`', '`init`')
  _expect(_same(feedback, init(jax.random.key(1))),
          'the same key gives the same feedback')
  if jax.tree.leaves(feedback):
    _expect(not _same(feedback, init(jax.random.key(2))),
            'another key gives other feedback')
  return feedback


def _check_fixed(rule, feedback, feedback_grads):
  mask = rule.trainable(feedback)
  _expect(jax.tree.structure(mask) == jax.tree.structure(feedback),
          '`trainable` has the structure of the feedback')
  for free, update in zip(
      jax.tree.leaves(mask), jax.tree.leaves(feedback_grads)):
    _expect(isinstance(free, bool), '`trainable` is a tree of bools')
    _expect(free or not jnp.any(update), 'fixed feedback gets no update')


def _check_learns(rule, learn, variables, feedback, x, y, learning_rate):
  values = _trained(
      rule, learn, variables, feedback, x, y, learning_rate, _STEPS)(1.)
  _expect(bool(jnp.all(jnp.isfinite(values))), 'the loss stays finite')
  # Within, not after: a rule whose later steps are unstable (a free phase too short
  # for weights that have grown) ends where rounding puts it.
  least = values.reshape(-1, 10).mean(axis=1).min()
  _expect(bool(least < .5 * values[0]),
          f'the loss halves within {_STEPS} steps of Adam, from {values[0]:.3f} '
          f'(ten steps had {least:.3f})')


def _trained(
    rule, learn, variables, feedback, x, y, learning_rate, steps,
    hidden=lambda name: False):
  """`scale -> losses` of a training; `scale` is on updates of hidden layers."""
  tx = optimizer(optax.adam(learning_rate), rule, feedback)

  def step(scale, carry, key):
    variables, (params, feedback), state = carry
    (value, aux), (grads, feedback_grads) = learn(
        {**variables, 'params': params}, feedback, x, y, key=key)
    grads = paths.map_with_name(
        lambda name, g: scale * g if hidden(name) else g, grads)
    updates, state = tx.update(
        (grads, feedback_grads), state, (params, feedback))
    # What the rule itself keeps by example (particles) starts anew.
    variables = {c: aux.model_state.get(c, v) for c, v in variables.items()}
    trees = optax.apply_updates((params, aux.feedback), updates)
    return (variables, trees, state), value

  trees = variables['params'], feedback
  keys = jax.random.split(jax.random.key(3), steps)
  return jax.jit(lambda scale: jax.lax.scan(
      functools.partial(step, scale), (variables, trees, tx.init(trees)),
      keys)[1])


def _check_linear(rule, net, variables, feedback, x):
  """A loss that is the output times `y` has the error `y`."""
  if not getattr(rule, 'linear', False):
    return
  learn = jax.jit(rule.value_and_grad(
      net, lambda out, y: jnp.sum(out * y, axis=-1), reduction='sum'))
  updates = lambda y: learn(
      variables, feedback, x, y, key=jax.random.key(2))[1][0]
  a, b = jax.random.normal(jax.random.key(5), (2, len(x), 3))
  parts = jax.tree.map(lambda p, q: p - 3 * q, updates(a), updates(b))
  _expect(_close(updates(a - 3 * b), parts, 1e-3),
          'a rule that says `linear=True` is linear in the error')


def _check_hidden(rule, net, variables, feedback, x):
  """Hidden layers learn, and in the right direction."""
  readouts = [n for n, info in net.units.infos.items() if info.is_output]
  hidden = lambda name: not any(paths.is_inside(name, r) for r in readouts)
  if not any(map(hidden, paths.leaf_names(variables['params']))):
    return
  # Too many points for the readout to know by heart.
  x = jax.random.normal(jax.random.key(7), (512, *x.shape[1:]))
  y = (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 2] > 0)
  learn = rule.value_and_grad(net, losses.softmax_cross_entropy)
  train = _trained(
      rule, learn, variables, feedback, x, y, 1e-2, 2 * _STEPS, hidden)
  own, still = (float(train(scale)[-20:].mean()) for scale in (1., 0.))
  _expect(own < .98 * still,
          f'hidden layers learn in the right direction: the loss gets to '
          f'{own:.3f} with them, and to {still:.3f} where they stay as they are')


def _check_sign(rule, net, variables, feedback, x, y):
  """With the weights for feedback, hidden updates are like backprop's."""
  params = paths.leaves(variables['params'])
  given = paths.leaves(feedback)
  if not given or any(
      name not in params or params[name].shape != leaf.shape
      for name, leaf in given.items()):
    return
  same = paths.map_with_name(lambda name, _: params[name], feedback)
  updates = [
      jax.jit(r.value_and_grad(net, losses.softmax_cross_entropy))(
          variables, f, x, y, key=jax.random.key(2))[1][0]
      for r, f in ((rule, same), (backprop(), {}))]
  for name, a, b in zip(
      paths.leaf_names(updates[0]), *map(jax.tree.leaves, updates)):
    _expect(bool(feedback_lib.cosine(a, b) > 0),
            'updates have the right sign: with the weights for feedback, that '
            f'of `{name}` points along the gradient')


def _check_models(rule):
  """Other layers, transforms and a batch of one: they work, or are refused."""
  images = jax.random.normal(jax.random.key(6), (4, 6, 6, 2))
  tokens = jax.random.randint(jax.random.key(6), (4, 5), 0, 7)
  for what, model, x, boundaries in (
      ('a convolution', _Images(), images, ()),
      ('a boundary', _Images(), images, ('block',)),
      ('integer inputs, `remat` and `scan`', _Tokens(), tokens, ()),
      ('a batch of one', _Images(), images[:1], ())):
    net = linen.from_linen(model, boundaries=boundaries)
    variables = net.init(jax.random.key(0), x)
    try:
      feedback = rule.init(jax.random.key(1), net, variables, x)
    except ValueError:
      continue  # Refused.
    try:
      learn = jax.jit(rule.value_and_grad(net, losses.softmax_cross_entropy))
      _, (grads, feedback_grads) = learn(
          variables, feedback, x, jnp.arange(len(x)) % 3,
          key=jax.random.key(2))
    except Exception as error:
      raise AssertionError(
          f'the contract of a learning rule is broken: {what} works, or is '
          f'refused by `init` with a ValueError; got {type(error).__name__}: '
          f'{error}') from error
    _check_like(grads, variables['params'], '`grads`', "`variables['params']`")
    _check_like(feedback_grads, feedback, '`feedback_grads`', '`feedback`')
    _expect(all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)),
            f'updates are finite under {what}')


class _Block(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))


class _Images(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = _Block(name='block')(x)
    return nn.Dense(3)(nn.tanh(nn.Dense(6)(x.reshape(x.shape[0], -1))))


class _Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(nn.Dense(6)(x)), None


class _Tokens(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.Embed(7, 6)(x)
    x, _ = nn.remat(_Layer)(name='remat')(x)
    layers = nn.scan(_Layer, variable_axes={'params': 0},
                     split_rngs={'params': True}, length=2)
    x, _ = layers(name='scan')(x, None)
    return nn.Dense(3)(x.mean(1))


def _check_devices(learn, variables, feedback, x, y, expected):
  devices = jax.devices()
  mesh = jax.make_mesh(
      (len(devices),), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.NamedSharding(mesh, jax.P('data'))
  everywhere = jax.NamedSharding(mesh, jax.P())
  n = len(x) // len(devices) * len(devices)
  _expect(n == len(x), f'{len(x)} examples divide by {len(devices)} devices')
  x, y = jax.device_put((x, y), spread)
  variables, feedback = jax.device_put((variables, feedback), everywhere)
  _, updates = learn(variables, feedback, x, y, key=jax.random.key(2))
  _expect(_close(updates, expected, 1e-4),
          f'{len(devices)} devices give the updates of one')


def _task(key):
  """64 points in 8 dimensions, labelled by their distance to three centres."""
  keys = jax.random.split(key, 2)
  centres = 1.5 * jax.random.normal(keys[0], (3, 8))
  y = jnp.arange(64) % 3
  return centres[y] + jax.random.normal(keys[1], (64, 8)), y


def _check_like(tree, like, what, whose):
  _expect(jax.tree.structure(tree) == jax.tree.structure(like),
          f'{what} has the structure of {whose}')
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like)):
    _expect((a.shape, a.dtype) == (b.shape, b.dtype),
            f'{what} has the shapes and dtypes of {whose}')


def _same(a, b):
  return all(bool(jnp.array_equal(p, q)) for p, q in zip(
      jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _close(a, b, tolerance):
  return all(
      bool(jnp.allclose(p, q, tolerance, tolerance)) for p, q in zip(
          jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _expect(condition: bool, what: str):
  if not condition:
    raise AssertionError(f'the contract of a learning rule is broken: {what}.')


