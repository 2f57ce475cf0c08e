r"""How far weights and teaching signals of direct feedback are aligned.

Matrices are columns', as in the papers: W_l [n_l, n_{l-1}] and F_l [n_l, C]. Flax
keeps :math:`W_l^T` as a kernel, and `direct_feedback_alignment` keeps
:math:`F_l^T` at the unit that reads layer l; `chain` takes both from their trees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bpjax import feedback as feedback_lib
from bpjax import paths
import jax
import jax.numpy as jnp

Array = jax.Array


class WeightAlignment(NamedTuple):
  """Cosines of weights with what direct feedback aligns them with.

  Attributes:
    layers: [L - 1], of layers 2 to L.
    total: of all these layers side by side.
  """
  layers: Array
  total: Array


class GradientAlignment(NamedTuple):
  """Cosines of teaching signals with backprop's, means over examples.

  Attributes:
    layers: [L - 1], of each hidden layer.
    total: of all hidden layers side by side.
    lower: the same without the last hidden layer, as the released code of
      Refinetti et al. has it: in a network of three layers, layer 1 alone. NaN
      where there is one hidden layer.
  """
  layers: Array
  total: Array
  lower: Array


def chain(
    params: Mapping[str, Any], feedback: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[Array], list[Array]]:
  """The matrices of a chain of dense layers, from trees of the framework.

  Args:
    params: a network's parameters, with a `kernel` [n_{l-1}, n_l] each.
    feedback: of `direct_feedback_alignment`: [C, n_{l-1}] at each layer but the
      first.
    names: of the layers 1 to L, from the bottom.

  Returns:
    W_1, ..., W_L, each [n_l, n_{l-1}], and F_1, ..., F_{L-1}, each [n_l, C].

  Example:
    >>> params = {'a': {'kernel': jnp.ones((5, 3))}, 'b': {'kernel': jnp.ones((3, 2))}}
    >>> weights, feedback = chain(params, {'b': jnp.ones((2, 3))}, ['a', 'b'])
    >>> [w.shape for w in weights], [f.shape for f in feedback]
    ([(3, 5), (2, 3)], [(3, 2)])
  """
  weights = [paths.subtree(params, name)['kernel'].T for name in names]
  return weights, [paths.subtree(feedback, name).T for name in names[1:]]


def weight_alignment(
    weights: Sequence[Array], feedback: Sequence[Array]) -> WeightAlignment:
  r"""Cosines of weights with :math:`F_l F_{l-1}^T`, and :math:`F_{L-1}^T` on top.

  Align, then memorise, Refinetti et al., 2021
  (https://arxiv.org/abs/2011.12428): strong alignment is a cosine of 1. The first
  layer has no such target and is left out.

  Args:
    weights: W_1, ..., W_L.
    feedback: F_1, ..., F_{L-1}.

  Returns:
    The cosines.

  Raises:
    ValueError: if shapes do not fit.

  Example:
    >>> f = jnp.array([[1., 0.], [0., 1.], [1., 1.]])
    >>> found = weight_alignment([jnp.ones((3, 4)), 3 * f.T], [f])
    >>> print(f'{found.total:.3f}')
    1.000
  """
  above = [*feedback[1:], jnp.eye(len(weights[-1]))]
  targets = [up @ f.T for up, f in zip(above, feedback)]
  if [w.shape for w in weights[1:]] != [t.shape for t in targets]:
    raise ValueError(
        '`feedback` must hold F_l [n_l, C] for every layer but the last, of '
        f'weights {[tuple(w.shape) for w in weights]}, got '
        f'{[tuple(f.shape) for f in feedback]}.')
  return WeightAlignment(
      jnp.stack(list(map(feedback_lib.cosine, weights[1:], targets))),
      feedback_lib.cosine(list(weights[1:]), targets))


def gradient_alignment(
    taught: Sequence[Array], exact: Sequence[Array]) -> GradientAlignment:
  """Cosines of teaching signals with the gradient, example by example.

  Args:
    taught: of each hidden layer from the bottom, [batch, n_l], at
      pre-activations.
    exact: the same of backprop.

  Returns:
    Means over the batch, by both definitions that are in use.

  Raises:
    ValueError: if shapes differ.

  Example:
    >>> a, b = jnp.array([[1., 0.]]), jnp.array([[0., 2.]])
    >>> found = gradient_alignment([a, b], [a, -b])
    >>> print(found.layers, f'{found.total:.2f} {found.lower:.0f}')
    [ 1. -1.] -0.60 1
  """
  if not taught or [t.shape for t in taught] != [e.shape for e in exact]:
    raise ValueError(
        '`taught` and `exact` must have the same shapes [batch, n_l], got '
        f'{[tuple(t.shape) for t in taught]} and '
        f'{[tuple(e.shape) for e in exact]}.')

  def mean(first, last):
    return jnp.nanmean(jax.vmap(feedback_lib.cosine)(
        list(taught[first:last]), list(exact[first:last])))

  count = len(taught)
  return GradientAlignment(
      jnp.stack([mean(l, l + 1) for l in range(count)]), mean(0, count),
      mean(0, count - 1) if count > 1 else jnp.asarray(jnp.nan))


def similarity(trees: Any) -> Array:
  """The mean cosine over all pairs of networks, weights flattened.

  Args:
    trees: parameters, each leaf [networks, ...].

  Returns:
    A scalar; for ten networks a mean over 45 pairs.

  Example:
    >>> print(similarity({'w': jnp.array([[1., 0.], [1., 0.], [0., 1.]])}))
    0.33333334
  """
  rows = jnp.concatenate(
      [l.reshape(len(l), -1) for l in jax.tree.leaves(trees)], axis=1)
  rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
  count = len(rows)
  return (jnp.sum(rows.sum(0)**2) - count) / (count * (count - 1))
