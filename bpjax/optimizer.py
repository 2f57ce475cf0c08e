"""One optimiser over parameters and feedback, which leaves fixed feedback alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import paths
import jax
import optax


def optimizer(
    tx: optax.GradientTransformation, rule: Any, feedback: base.Tree,
    frozen: Sequence[str] = ()) -> optax.GradientTransformation:
  """`tx` over `(params, feedback)`; feedback that does not learn stays as it is.

  A weight decay or a clip in `tx` acts on parameters and trainable feedback
  together, as Kolen-Pollack needs. It never touches fixed feedback, which AdamW
  would shrink though its gradient is zero.

  Args:
    tx: an optax transformation.
    rule: the rule.
    feedback: what `rule.init` returned (only its structure matters).
    frozen: path patterns of parameters, and of feedback, that stay as they are:
      `['block_*']` under backprop is the control of frozen blocks, in which
      what is around them learns alone (in configs: `config.frozen`).

  Returns:
    An optax transformation over pairs `(params, feedback)`, for updates `(grads,
    feedback_grads)` as `learn` returns them.

  Raises:
    ValueError: where it is used on anything but such a pair, and for a pattern of
      `frozen` that matches nothing.

  Example:
    >>> import bpjax, flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> net = bpjax.from_linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]))
    >>> x, y = jnp.ones((2, 4)), jnp.zeros(2, int)
    >>> variables = net.init(jax.random.key(0), x)
    >>> rule = bpjax.rules.feedback_alignment()
    >>> feedback = rule.init(jax.random.key(1), net, variables, x)
    >>> tx = bpjax.optimizer(optax.adamw(1e-3), rule, feedback)
    >>> trees = (variables['params'], feedback)
    >>> state = tx.init(trees)
    >>> learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
    >>> (value, aux), grads = learn(variables, feedback, x, y)
    >>> updates, state = tx.update(grads, state, trees)
    >>> params, feedback = optax.apply_updates(trees, updates)
  """
  if not hasattr(tx, 'update') or not hasattr(tx, 'init'):
    raise ValueError(
        '`tx` must be an optax transformation, such as optax.adam(1e-3), got '
        f'{type(tx).__name__}.')
  arguments.rule(rule)
  learns = rule.trainable(feedback)

  def free(name, leaf=None):
    del leaf
    return not any(paths.matches(pattern, name) for pattern in frozen)

  def mask(trees):
    if not isinstance(trees, tuple) or len(trees) != 2:
      raise ValueError(
          '`bpjax.optimizer` takes the pair `(params, feedback)`, got '
          f'{type(trees).__name__}.')
    params, given = trees
    names = paths.leaf_names(trees)
    for pattern in frozen:
      if not any(paths.matches(pattern, n.partition('/')[2]) for n in names):
        raise ValueError(
            f'`frozen` has the pattern {pattern!r}, which matches no parameter; '
            f'{paths.nearest(pattern, paths.leaf_names(params))}.')
    if jax.tree.structure(given) != jax.tree.structure(learns):
      raise ValueError(
          'the second of `(params, feedback)` must have the structure of the '
          'feedback that `bpjax.optimizer` was made with; pass what `rule.init` '
          'returned to both.')
    return paths.map_with_name(free, params), paths.map_with_name(
        lambda name, own: own and free(name), learns)

  def fixed(trees):
    params, given = mask(trees)
    return jax.tree.map(lambda own: not own, (params, given))

  return optax.chain(
      optax.masked(tx, mask), optax.masked(optax.set_to_zero(), fixed))
