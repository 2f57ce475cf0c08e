"""The contract of a learning rule as one check, for authors of new rules."""

from __future__ import annotations

from typing import Any

from bpjax import losses
from bpjax.networks import linen
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
  is not trainable gets no update; 'sum' is 'mean' times the batch; the loss
  halves with Adam; and, where there are several devices, a batch sharded over
  all of them gives the same updates.

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
  out = rule.predict(net)(variables, x)
  _expect(out.shape == (len(x), 3), '`predict` returns the output')
  _check_learns(rule, learn, variables, feedback, x, y, learning_rate)
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
  mask = {'params': jax.tree.map(lambda _: True, variables['params']),
          'feedback': rule.trainable(feedback)}
  tx = optax.masked(optax.adam(learning_rate), mask)

  def step(carry, key):
    variables, trees, state = carry
    (value, aux), grads = learn(
        {**variables, 'params': trees['params']}, trees['feedback'], x, y,
        key=key)
    grads = dict(zip(('params', 'feedback'), grads))
    updates, state = tx.update(grads, state, trees)
    # What the rule itself keeps by example (particles) starts anew.
    variables = {c: aux.model_state.get(c, v) for c, v in variables.items()}
    return (variables, optax.apply_updates(trees, updates), state), value

  trees = {'params': variables['params'], 'feedback': feedback}
  keys = jax.random.split(jax.random.key(3), _STEPS)
  _, values = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
      (variables, trees, tx.init(trees)))
  _expect(bool(jnp.all(jnp.isfinite(values))), 'the loss stays finite')
  _expect(bool(values[-10:].mean() < .5 * values[0]),
          f'the loss halves in {_STEPS} steps of Adam, from {values[0]:.3f} '
          f'(it got to {values[-10:].mean():.3f})')


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


