"""A block's own losses: what `bpjax.local` trains each block on.

Training neural networks with local error signals, Nokland and Eidnes, ICML 2019
(https://arxiv.org/abs/1901.06656).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from bpjax import arguments
from bpjax import base
from bpjax import blocks
from bpjax import replicated
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LocalLoss:
  """A loss on what a block puts out. What the functions below return.

  Attributes:
    name: for messages.
    init: `(key, features, output) -> head`: the head's parameters, from the
      shapes of the block's output `[batch, ..., channels]` and of the model's;
      {} for none.
    predict: `(head, features) -> prediction`, whose error ports bring to units.
    loss: `(prediction, y, default) -> losses [batch, ...]`; `default` is the
      loss of the model's output.
    differentiable_only: whether finite differences of an example's loss are not
      its part of the gradient: where something that moves is held constant, as
      by a stop-gradient, or where examples have a part in each other's losses.
    pooled: whether it reads the mean over positions.
  """
  name: str
  init: Callable[[base.Key, Any, Any], base.Tree]
  predict: Callable[[base.Tree, base.Array], Any]
  loss: Callable[[Any, Any, base.Loss], base.Array]
  differentiable_only: bool = False
  pooled: bool = True


def prediction(
    scale: float = 1., pooled: bool = True, norm: bool = False,
    loss: base.Loss | None = None) -> LocalLoss:
  r"""A linear head that predicts what the model shall predict.

  .. math::
    \hat y = \frac1P \sum_p h_p W + b, \qquad \ell = loss(\hat y, y)

  The mean is over all positions, the axes between the first and the last.

  Args:
    scale: factor on the standard deviation of W, :math:`1/\sqrt{channels}`.
    pooled: whether positions are averaged; if not, each predicts on its own,
      for labels of each.
    norm: whether features are normalised to mean 0 and variance 1 over the
      channels, after pooling, without parameters.
    loss: `(prediction, y) -> losses`; default that of the model's output, such
      as `bpjax.losses.softmax_cross_entropy`.

  Returns:
    A `LocalLoss`; its head is `{'kernel': [channels, outputs], 'bias':
    [outputs]}`.

  Raises:
    ValueError: if `scale` is negative.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> local = prediction()
    >>> h, output = jnp.ones((2, 5, 5, 8)), jnp.ones((2, 3))
    >>> head = local.init(jax.random.key(0), h, output)
    >>> local.predict(head, h).shape
    (2, 3)
  """
  arguments.number('scale', scale, least=0)

  def init(key, features, output):
    fan_in, outputs = features.shape[-1], output.shape[-1]
    kernel = jax.random.normal(key, (fan_in, outputs), _dtype(features))
    return {'kernel': scale / math.sqrt(fan_in) * kernel,
            'bias': jnp.zeros(outputs, _dtype(features))}

  def predict(head, features):
    if pooled and features.ndim > 2:
      features = jnp.mean(features, axis=tuple(range(1, features.ndim - 1)))
    if norm:
      features = blocks.layer_norm(features)
    return features @ head['kernel'] + head['bias']

  return LocalLoss(
      'prediction', init, predict,
      lambda output, y, default: (loss or default)(output, y), pooled=pooled)


def similarity(
    classes: int, kernel: int = 3, scale: float = 1.) -> LocalLoss:
  r"""Similarity matching: examples of one class shall look alike.

  .. math::
    L = \| S(f(h)) - S(Y) \|_F^2 / N^2, \qquad
    S(Z)_{nm} = \frac{\tilde z_n \cdot \tilde z_m}{|\tilde z_n| |\tilde z_m|},
    \qquad \tilde z_n = z_n - \bar z_n

  Y are labels as one-hot vectors, N is the batch, and f a learnt convolution for
  images, of which z is the standard deviation over positions, or a learnt linear
  map otherwise. The loss of example n is that of its row, so that their mean is
  L; a row depends on all examples.

  Args:
    classes: number of classes.
    kernel: side of the convolution.
    scale: factor on the standard deviation of f's weights, `1/sqrt(fan-in)`.

  Returns:
    A `LocalLoss` for integer labels `[batch]`; its head is `{'kernel': [(side,
    side,) channels, channels]}`.

  Raises:
    ValueError: for fewer than two classes, or a `kernel` that is even.

  Example:
    >>> local = similarity(10)
  """
  arguments.whole('classes', classes, least=2)
  arguments.whole('kernel', kernel)
  arguments.number('scale', scale, least=0)
  if kernel % 2 == 0:
    raise ValueError(
        f'`kernel` must be a positive odd number, got {kernel}.')

  def init(key, features, output):
    del output
    channels = features.shape[-1]
    sides = (kernel, kernel) if len(features.shape) == 4 else ()
    shape = (*sides, channels, channels)
    std = scale / math.sqrt(math.prod(shape[:-1]))
    return {'kernel': std * jax.random.normal(key, shape, _dtype(features))}

  def predict(head, features):
    if features.ndim != 4:
      z = features @ head['kernel']
      return z.reshape(z.shape[0], -1)
    z = jax.lax.conv_general_dilated(
        features, head['kernel'], (1, 1), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return jnp.sqrt(jnp.var(z, axis=(1, 2)) + 1e-8)

  def loss(z, y, default):
    del default
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
      raise ValueError(
          'similarity matching compares classes: labels must be integers '
          f'[batch], got {y.dtype}{list(y.shape)}; use prediction() for others.')
    labels = jax.nn.one_hot(replicated.gathered(y), classes, dtype=z.dtype)
    difference = cosines(replicated.gathered(z)) - cosines(labels)
    return jnp.mean(jnp.square(difference), axis=1)

  return LocalLoss('similarity', init, predict, loss, differentiable_only=True)


def prediction_and_similarity(
    classes: int, share: float = .99, kernel: int = 3) -> LocalLoss:
  """Both together, 'predsim': `share` of similarity, the rest of prediction.

  Args:
    classes: number of classes.
    share: of similarity matching, in [0, 1]; the paper takes 0.99.
    kernel: as in `similarity`.

  Returns:
    A `LocalLoss`; its head has both heads. Two predictions have no single error
    for a port, so no rule with ports takes it.

  Raises:
    ValueError: for a value out of range.

  Example:
    >>> local = prediction_and_similarity(10)
  """
  arguments.number('share', share, least=0, most=1)
  parts = {'prediction': prediction(), 'similarity': similarity(classes, kernel)}

  def init(key, features, output):
    return {name: part.init(k, features, output) for (name, part), k in zip(
        parts.items(), jax.random.split(key))}

  def predict(head, features):
    return {n: part.predict(head[n], features) for n, part in parts.items()}

  def loss(predictions, y, default):
    apart = [p.loss(predictions[n], y, default) for n, p in parts.items()]
    return (1 - share) * apart[0] + share * apart[1]

  return LocalLoss(
      'prediction_and_similarity', init, predict, loss,
      differentiable_only=True)


def contrastive(
    dim: int = 128, temperature: float = .5, negatives: str = 'other',
    scale: float = 1.) -> LocalLoss:
  r"""Two views of an image shall look alike, and unlike those of others.

  The batch holds two views of each image: examples n and n + N / 2 are of the
  same one. With u the projection :math:`\bar h W` of the pooled features, of
  length 1, and v that of the other view of the same image,

  .. math::
    \ell_n = -\log \frac{\exp(u_n \cdot v_n / T)}
      {\sum_j \exp(u_n \cdot v_j / T)}

  in which only :math:`u_n` moves: the other view and all that is in the
  denominator are constants, as in `bpjax.replicated.info_nce`, so that the loss
  of an example depends on no other for any derivative. Labels are not read.

  Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
  ICLR 2023 (https://arxiv.org/abs/2210.03310); the loss is that of A simple
  framework for contrastive learning of visual representations, Chen, Kornblith,
  Norouzi and Hinton, ICML 2020 (https://arxiv.org/abs/2002.05709).

  Args:
    dim: of the projection; 128 in the paper.
    temperature: T; .5 in the paper.
    negatives: 'other' (the j are examples of the other view alone) or 'both'
      (those of the same view, but n itself, as well).
    scale: factor on the standard deviation of W, :math:`1/\sqrt{channels}`.

  Returns:
    A `LocalLoss`; its head is `{'kernel': [channels, dim]}`, its losses, in
    nats, are `[N]`.

  Raises:
    ValueError: for a value out of range; when traced, for an odd N.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> local = contrastive(dim=4)
    >>> h = jax.random.normal(jax.random.key(0), (6, 5, 5, 8))
    >>> head = local.init(jax.random.key(1), h, jnp.ones((6, 3)))
    >>> local.loss(local.predict(head, h), None, None).shape
    (6,)
  """
  blocks.check_sizes('dim', dim)
  arguments.choice('negatives', negatives, replicated.NEGATIVES)
  arguments.number('temperature', temperature, above=0)
  arguments.number('scale', scale, least=0)

  def init(key, features, output):
    del output
    channels = features.shape[-1]
    kernel = jax.random.normal(key, (channels, dim), _dtype(features))
    return {'kernel': scale / math.sqrt(channels) * kernel}

  def predict(head, features):
    if features.ndim > 2:
      features = jnp.mean(features, axis=tuple(range(1, features.ndim - 1)))
    return features @ head['kernel']

  def loss(projection, y, default):
    del y, default
    if len(projection) % 2:
      raise ValueError(
          'a contrastive loss needs a batch of two views, examples n and n + '
          f'N / 2 of one image, so an even number, got {len(projection)}.')
    u = replicated.direction(replicated.gathered(projection))
    views = jnp.split(u, 2)
    fixed = [jax.lax.stop_gradient(v) for v in views]
    both = lambda i: jnp.concatenate([fixed[1 - i], fixed[i]])
    return jnp.concatenate([
        replicated.contrast(
            v, both(i) if negatives == 'both' else fixed[1 - i], temperature)
        for i, v in enumerate(views)])

  return LocalLoss(
      'contrastive', init, predict, loss, differentiable_only=True)


def _dtype(features):
  """Of a head: as precise as parameters are, where the model computes in less."""
  return jnp.promote_types(features.dtype, jnp.float32)


def cosines(z: base.Array) -> base.Array:
  """Cosine similarities of rows, each centred on its own mean.

  Args:
    z: `[batch, features]`.

  Returns:
    `[batch, batch]`, in [-1, 1]; 0 for a row that is constant.

  Example:
    >>> import jax.numpy as jnp
    >>> cosines(jnp.array([[2., 0.], [0., 3.]])).tolist()[0][1] < -.999
    True
  """
  z = z - jnp.mean(z, axis=1, keepdims=True)
  square = jnp.sum(jnp.square(z), axis=1, keepdims=True)
  safe = jnp.where(square > 0, square, 1)
  z = jnp.where(square > 0, z * jax.lax.rsqrt(safe), 0)
  return z @ z.T
