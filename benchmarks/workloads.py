"""The workloads of the benchmarks, and steps on them.

A step is forward, backward and SGD; it takes a carry to the next one.
"""

from __future__ import annotations

import bpjax
import jax
import jax.numpy as jnp
import optax

_LOSS = bpjax.losses.softmax_cross_entropy
MODELS = {  # Widths, activation, inputs.
    'mlp': ((1024,) * 32, 'relu', 1024),
    'w1': ((256,) * 5, 'relu', 784),
    'w2': ((800,) * 3, 'tanh', 3072),
    'w3': None,  # ResNet-20.
    'w4': None,  # `bert_encoder`.
}
_DRAWS = ('difference_target_propagation',
          'direct_difference_target_propagation', 'equilibrium_propagation',
          'forward_forward', 'forward_gradient', 'spsa', 'target_propagation')


def workload(name: str, units: str = 'affine'):
  """The model, an input batch and labels."""
  if name == 'w3':
    x = jax.random.normal(jax.random.key(1), (32, 32, 32, 3))
    return bpjax.models.resnet20(10), x, jnp.arange(32) % 10
  if name == 'w4':
    x = jax.random.randint(jax.random.key(1), (16, 64), 0, 1000)
    model = bpjax.models.bert_encoder(
        10, depth=4, width=256, vocabulary=1000, length=64, dropout=0.)
    return model, x, jnp.arange(16) % 10
  widths, activation, inputs = MODELS[name]
  model = bpjax.models.mlp(
      10, widths=widths, activation=activation, units=units)
  x = jax.random.normal(jax.random.key(1), (128, inputs))
  return model, x, jnp.arange(128) % 10


def plain_step(model, x, y):
  """(step, first carry) of jax.value_and_grad and SGD."""
  tx = optax.sgd(.01)
  own = dict(model.init(jax.random.key(0), x))
  params = own.pop('params')

  def step(carry):
    params, own, state, key = carry

    def loss(params):
      output, new = model.apply(
          {'params': params, **own}, x, train=True, mutable=list(own))
      return _LOSS(output, y).mean(), new

    (value, own), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), own, state, key), value

  return step, (params, own, tx.init(params), jax.random.key(5))


def rule_step(model, x, y, rule, boundaries=(), dtype='float32'):
  """The same of a rule; fixed feedback is an argument beside the carry.

  `dtype` is that of the computation; what learns is float32 always.
  """
  cast = lambda tree: jax.tree.map(
      lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, tree)
  tx = optax.sgd(.01)
  net = bpjax.from_linen(model, boundaries=boundaries)
  variables = net.init(jax.random.key(0), x)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  learn = rule.value_and_grad(net, _LOSS)
  free = all(jax.tree.leaves(rule.trainable(feedback)))
  own = dict(variables)
  learned = (own.pop('params'), feedback if free else {})

  def step(carry):
    (params, trained), own, state, key = carry
    now = key
    if rule.name.removeprefix('local_') in _DRAWS:
      key, now = jax.random.split(key)
    (value, aux), (grads, feedback_grads) = learn(
        cast({'params': params, **own}), cast(trained if free else feedback),
        cast(x), y, key=now)
    grads = (grads, feedback_grads if free else {})
    grads = jax.tree.map(lambda g, a: g.astype(a.dtype), grads, (params, trained))
    updates, state = tx.update(grads, state, (params, trained))
    learned = optax.apply_updates((params, trained), updates)
    own = jax.tree.map(
        lambda a, new: new.astype(a.dtype), own,
        {c: aux.model_state[c] for c in own})
    return (learned, own, state, key), value

  return step, (learned, own, tx.init(learned), jax.random.key(5))
