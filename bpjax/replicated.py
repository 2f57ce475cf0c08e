"""A loss for every patch and every channel group of a block, fused.

A block puts out features x [batch, patches, groups, channels / groups]. Its
local loss reads them pooled,

  z[b] = concat_g (1 / P) sum_p x[b, p, g],    l[b] = loss(z[b], head, y[b]),

and the replicated loss l[b, p, g] has that same value for every patch p and
group g, but sees only x[b, p, g] move: all other patches and groups count as
constants. What the sum of all copies sends back is what the one pooled loss
does. Going forward they differ: a random perturbation is multiplied with the
change of *its* patch and group alone, which has far less variance.

  Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
  ICLR 2023 (https://arxiv.org/abs/2210.03310), equations 4 and 5.

The copies are never made. With e[b] = d l[b] / d z[b], [batch, channels],

  d l[b, p, g] = <dx[b, p, g], e[b, g]> / P + d l[b] / d head . d head,

which is one rule for both directions: jax transposes it, so that reverse mode
is exact for cotangents c[b, p, g] that differ, too,

  dx[b, p, g] = c[b, p, g] e[b, g] / P,
  d head = sum_b (sum_pg c[b, p, g]) d l[b] / d head,

and nothing is larger than x itself. (The authors' reverse rule reads one
cotangent of each example and takes the others to be equal.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import blocks
from bpjax import losses as losses_lib
import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

# Where losses are: name -> whether one for each (patch, group).
PLACEMENTS = {
    'block': (False, False), 'block+patch': (True, False),
    'block+group': (False, True), 'block+patch+group': (True, True)}
HEAD_SCALES = ('mean', 'sum')
NEGATIVES = ('other', 'both')

Head = Mapping[str, base.Array]
PooledLoss = Callable[..., base.Array]


def cross_entropy(
    x: base.Array, head: Head, labels: base.Array, *,
    placement: str = 'block+patch+group', head_scale: str = 'mean'
) -> base.Array:
  """Softmax cross-entropy of a linear head, one for each patch and group.

  Args:
    x: a block's output `[batch, patches, groups, channels / groups]`.
    head: `{'kernel': [channels, classes], 'bias': [classes]}`; the bias may be
      left out.
    labels: integers `[batch]`, or probabilities `[batch, classes]`.
    placement: as in `replicate`.
    head_scale: as in `replicate`.

  Returns:
    Losses in nats, `[batch, patches, groups]` (1 for an axis that `placement`
    does not separate). All losses of an example are equal.

  Raises:
    ValueError: if the shapes do not fit, or for an unknown option.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 9, 4, 8))
    >>> head = {'kernel': jnp.zeros((32, 10)), 'bias': jnp.zeros(10)}
    >>> cross_entropy(x, head, jnp.array([3, 1])).shape
    (2, 9, 4)
  """
  _check(x, head)
  return replicate(
      _cross_entropy, x, head, labels, placement=placement,
      head_scale=head_scale)


def info_nce(
    x: base.Array, head: Head, other: base.Array, *, temperature: float = .5,
    negatives: str = 'other', placement: str = 'block+patch+group',
    head_scale: str = 'mean'
) -> base.Array:
  """The contrastive loss of one view, one for each patch and group.

  With u the projection z W (+ b) of the pooled features, of length 1, and v
  that of the other view of the same images,

    l[b] = -log (exp(u[b].v[b] / T) / sum_j exp(u[b].v[j] / T)).

  Only u[b] moves: the other view, and every other example in the denominator,
  are constants. For both directions call it twice, with the views swapped.

  Args:
    x: one view, `[batch, patches, groups, channels / groups]`.
    head: `{'kernel': [channels, dim]}`, with a `'bias'` `[dim]` or without.
    other: the other view in the shape of `x`; a constant, in every mode.
    temperature: T; .5 in the paper.
    negatives: 'other' (the other view's examples: InfoNCE) or 'both' (also the
      other examples of the same view: SimCLR).
    placement: as in `replicate`.
    head_scale: as in `replicate`. The head's gradient is through u alone.

  Returns:
    Losses in nats, `[batch, patches, groups]`, as `cross_entropy` does.

  Raises:
    ValueError: if the shapes do not fit, for an unknown option, or a
      temperature that is not positive.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.arange(96.).reshape(2, 3, 4, 4)
    >>> info_nce(x, {'kernel': jnp.eye(16)}, x).shape
    (2, 3, 4)
  """
  arguments.choice('negatives', negatives, NEGATIVES)
  if not temperature > 0:
    raise ValueError(f'`temperature` must be positive, got {temperature}.')
  _check(x, head)
  if other.shape != x.shape:
    raise ValueError(
        f'`other` must have the shape of `x`, {x.shape}, got {other.shape}; it '
        'is the other view of the same images.')
  views = (other, x) if negatives == 'both' else (other,)
  constants = jax.lax.stop_gradient(jnp.concatenate([
      gathered(direction(_affine(_pool(v), head))) for v in views]))
  return replicate(
      _info_nce, x, head, constants, temperature,
      placement=placement, head_scale=head_scale)


def replicate(
    loss: PooledLoss, x: base.Array, head: Head, *targets: Any,
    placement: str = 'block+patch+group', head_scale: str = 'mean'
) -> base.Array:
  """Any loss of pooled features, one for each patch and group.

  Works under `jax.jvp`, `jax.linearize`, `jax.grad` and `jax.vjp`, compiled or
  not, for any tangents and cotangents. First derivatives only: the second ones
  would be those of the pooled loss.

  Args:
    loss: `(z, head, *targets) -> losses [batch]` of pooled features `z`
      `[batch, channels]`; the loss of an example may depend on no other row of
      `z`. A function that closes over no array that is being traced.
    x: a block's output `[batch, patches, groups, channels / groups]`; see
      `group` for outputs in other shapes.
    head: the parameters that `loss` takes; any tree of arrays of floats.
    *targets: constants, whatever is differentiated.
    placement: 'block' (one loss), 'block+patch', 'block+group', or
      'block+patch+group' (the paper's). What is not separated moves together.
    head_scale: the head is in every copy, so that its gradient is the ordinary
      one times their number. 'mean' divides by it, in forward mode, too: the
      sum of all losses then has the gradient of one pooled loss, for `x` and
      head alike. 'sum' leaves it, which is the true derivative.

  Returns:
    Losses `[batch, patches, groups]`, with 1 for an axis that is not separated.

  Raises:
    ValueError: if `x` has another number of axes, or for an unknown option.

  Example:
    >>> import jax.numpy as jnp
    >>> def squared(z, head, y):
    ...   return .5 * ((z @ head['kernel'] - y) ** 2).sum(-1)
    >>> x, head = jnp.ones((2, 9, 4, 8)), {'kernel': jnp.ones((32, 3))}
    >>> replicate(squared, x, head, jnp.ones((2, 3)), placement='block').shape
    (2, 1, 1)
  """
  arguments.choice('placement', placement, tuple(PLACEMENTS))
  arguments.choice('head_scale', head_scale, HEAD_SCALES)
  _check_features(x)
  patch, group_ = PLACEMENTS[placement]
  shape = (x.shape[1] if patch else 1, x.shape[2] if group_ else 1)
  scale = 1 / math.prod(shape) if head_scale == 'mean' else 1.
  return _replicated(loss, shape, scale, x, head, targets)


def group(x: base.Array, groups: int) -> base.Array:
  """A block's output as patches and channel groups.

  Args:
    x: `[batch, ..., channels]`: all axes between are patches.
    groups: how many groups of neighbouring channels.

  Returns:
    `[batch, patches, groups, channels / groups]`.

  Raises:
    ValueError: if `groups` does not divide the channels.

  Example:
    >>> import jax.numpy as jnp
    >>> group(jnp.ones((2, 3, 3, 32)), 4).shape
    (2, 9, 4, 8)
  """
  if x.ndim < 2:
    raise ValueError(
        f'`x` must be features [batch, ..., channels], got shape {x.shape}.')
  blocks.check_sizes('groups', groups)
  blocks.check_divides('groups', groups, 'channels', x.shape[-1])
  return x.reshape(
      x.shape[0], math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups)


def direction(x: base.Array) -> base.Array:
  """`x` `[batch, dim]` divided by the length of each row; 0 stays 0.

  Example:
    >>> import jax.numpy as jnp
    >>> direction(jnp.array([[0., 4.], [0., 0.]])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
  """
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def contrast(
    directions: base.Array, constants: base.Array, temperature: float
) -> base.Array:
  """InfoNCE of directions whose own partners are rows of the same number.

  Args:
    directions: of one view, `[batch, dim]`.
    constants: of the other view, `[batch, dim]`, or `[2 batch, dim]` with those
      of the same view behind them, of which none is a negative of itself.
    temperature: what cosines are divided by.

  Returns:
    Losses in nats, `[batch]`.

  Example:
    >>> import jax.numpy as jnp
    >>> round(float(contrast(jnp.eye(2), jnp.eye(2), 1.)[0]), 4)
    0.3133
  """
  logits = directions @ constants.T / temperature
  is_own = jnp.eye(*logits.shape, dtype=bool)
  positive = jnp.sum(jnp.where(is_own, logits, 0), axis=-1)
  # An example is no negative of itself, where its own view is among them.
  is_itself = jnp.eye(*logits.shape, k=len(directions), dtype=bool)
  logits = jnp.where(is_itself, -jnp.inf, logits)
  return jax.nn.logsumexp(logits, axis=-1) - positive


def gathered(x: base.Array) -> base.Array:
  """`x`, whole on every device where its sharding is explicit.

  Example:
    >>> import jax.numpy as jnp
    >>> gathered(jnp.ones(2)).tolist()
    [1.0, 1.0]
  """
  mesh = jax.typeof(x).sharding.mesh
  if jax.sharding.AxisType.Explicit not in mesh.axis_types:
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _replicated(loss, shape, scale, x, head, targets):
  del scale
  return _copies(loss(_pool(x), head, *targets), shape)


def _replicated_jvp(loss, shape, scale, primals, tangents):
  x, head, targets = primals
  dx, dhead, _ = tangents
  z = _pool(x)
  values, pull = jax.vjp(lambda z: loss(z, head, *targets), z)
  change = jnp.zeros((x.shape[0], *shape), values.dtype)
  if not isinstance(dx, SymbolicZero):
    error, = pull(jnp.ones_like(values))
    error = error.reshape(x.shape[0], 1, *x.shape[2:]) / x.shape[1]
    # What is not separated moves together: its changes add up.
    together = tuple(i for i in (1, 2) if shape[i - 1] != x.shape[i])
    own = jnp.sum(jnp.sum(dx * error, axis=-1), axis=together, keepdims=True)
    change += own.astype(values.dtype)
  if not all(isinstance(d, SymbolicZero) for d in jax.tree.leaves(dhead)):
    dhead = jax.tree.map(
        lambda d: jnp.zeros(d.shape, d.dtype)
        if isinstance(d, SymbolicZero) else d, dhead)
    _, through = jax.jvp(lambda h: loss(z, h, *targets), (head,), (dhead,))
    change += _copies(scale * through, shape)
  return _copies(values, shape), change


_replicated.defjvp(_replicated_jvp, symbolic_zeros=True)


def _copies(values, shape):
  return jnp.broadcast_to(values[:, None, None], (values.shape[0], *shape))


def _pool(x):
  return jnp.mean(x, axis=1).reshape(x.shape[0], -1)


def _affine(z, head):
  out = z @ head['kernel']
  return out + head['bias'] if 'bias' in head else out


def _cross_entropy(z, head, labels):
  return losses_lib.softmax_cross_entropy(_affine(z, head), labels)


def _info_nce(z, head, constants, temperature):
  return contrast(direction(_affine(z, head)), constants, temperature)


def _check_features(x):
  if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
        '`x` must be features [batch, patches, groups, channels / groups], got '
        f'{x.dtype}{list(x.shape)}; `bpjax.replicated.group` brings others '
        'into this shape.')


def _check(x, head):
  """Raises for features and a linear head that do not fit."""
  _check_features(x)
  channels = x.shape[2] * x.shape[3]
  if 'kernel' not in head:
    raise ValueError(
        f"`head` must hold a 'kernel' [{channels}, outputs], got "
        f'{sorted(head)}.')
  kernel = head['kernel']
  if kernel.ndim != 2 or kernel.shape[0] != channels:
    raise ValueError(
        f"`head['kernel']` must have shape [{channels}, outputs], the channels "
        f'of all groups of `x`, got {list(kernel.shape)}.')
  if 'bias' in head and head['bias'].shape != kernel.shape[1:]:
    raise ValueError(
        f"`head['bias']` must have shape {list(kernel.shape[1:])}, as many as "
        f"`head['kernel']` has outputs, got {list(head['bias'].shape)}.")
