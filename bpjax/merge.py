"""Several trained networks as one: means, barriers, matching of neurons.

Networks that learned from different initial weights cannot be averaged as a
rule: between them the loss rises. How far is the barrier. Matching permutes the
neurons of one network to those of another, which removes the symmetry that
backprop leaves open.

The role of permutation invariance in linear mode connectivity of neural
networks, Entezari, Sedghi, Saukh and Neyshabur, ICLR 2022
(https://arxiv.org/abs/2110.06296); Git re-basin: merging models modulo
permutation symmetries, Ainsworth, Hayase and Srinivasa, ICLR 2023
(https://arxiv.org/abs/2209.04836).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bpjax import base
from bpjax import paths
import jax
import jax.numpy as jnp
import numpy as np


def average(
    trees: Sequence[base.Tree], weights: Sequence[float] | None = None
) -> base.Tree:
  """The mean of networks, leaf by leaf: parameters, or whole variables.

  Args:
    trees: of one structure and of the same shapes.
    weights: one for each tree, such as its number of examples; their sum is
      divided by. None: all alike.

  Returns:
    A tree of the same structure.

  Raises:
    ValueError: for no trees, for trees that differ in structure or shapes, or
      weights that do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> average([{'w': jnp.zeros(2)}, {'w': jnp.ones(2)}], [3, 1])['w'].tolist()
    [0.25, 0.25]
  """
  if not trees:
    raise ValueError('`trees` must hold at least one network, got none.')
  shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
  if any(shape != shapes[0] for shape in shapes):
    raise ValueError(
        '`trees` must be networks of one architecture, and these differ in '
        'their names or shapes.')
  if weights is None:
    weights = [1.] * len(trees)
  if len(weights) != len(trees) or min(weights) < 0 or not sum(weights):
    raise ValueError(
        f'`weights` must be one for each of the {len(trees)} trees, none of '
        f'them negative and not all 0, got {list(weights)}.')
  shares = [weight / sum(weights) for weight in weights]
  return jax.tree.map(
      lambda *leaves: sum(s * leaf for s, leaf in zip(shares, leaves)), *trees)


def interpolation_barrier(
    loss: Callable[[base.Tree], base.Array], a: base.Tree, b: base.Tree,
    points: int = 11
) -> base.Array:
  r"""How far the loss rises between two networks, on the line from a to b.

  .. math::
    \max_t \; \ell((1-t) a + t b) - (1-t) \ell(a) - t \ell(b)

  as Entezari et al. define it; 0 at its least, since both ends count.

  Args:
    loss: of a tree, such as the mean over a test set.
    a: a network's parameters.
    b: another's.
    points: how many t, from 0 to 1, ends included.

  Returns:
    The barrier in the units of `loss`.

  Raises:
    ValueError: for fewer than three points, or as `average` does.

  Example:
    >>> import jax.numpy as jnp
    >>> valley = lambda w: (w ** 2 - 1) ** 2  # Minima at -1 and 1.
    >>> float(interpolation_barrier(valley, jnp.array(-1.), jnp.array(1.)))
    1.0
  """
  if points < 3:
    raise ValueError(f'`points` must be at least 3, got {points}.')
  shares = np.linspace(0, 1, points)
  losses = jnp.stack([loss(average([a, b], [1 - t, t])) for t in shares])
  return jnp.max(losses - (1 - shares) * losses[0] - shares * losses[-1])


def match_weights(
    params: base.Tree, reference: base.Tree, layers: Sequence[str],
    sign_flips: bool = False, seed: int = 0
) -> base.Tree:
  """The same network, its hidden neurons in the order of another's.

  Weight matching (Ainsworth et al., section 3.2): permutations that maximise the
  inner product with `reference`, one layer after another in random order until
  none changes; each is a linear assignment, solved exactly. Sums over biases,
  too.

  Args:
    params: of a chain of dense layers, with `kernel` [in, out] and perhaps
      `bias` [out] under each layer's name.
    reference: of a network of the same shapes.
    layers: the names from input to output, such as `['Dense_0', 'Dense_1']`.
    sign_flips: whether a neuron's sign may change as well, which leaves a
      network with an odd activation (tanh, erf) the same function, and no other.
    seed: of the order of layers.

  Returns:
    `params` with permuted hidden neurons: the same function.

  Raises:
    ValueError: if the layers are no chain of dense layers of equal shapes in
      both.

  Example:
    >>> import jax.numpy as jnp
    >>> net = {'a': {'kernel': jnp.array([[1., 2.]])},
    ...        'b': {'kernel': jnp.array([[3.], [4.]])}}
    >>> other = {'a': {'kernel': jnp.array([[2., 1.]])},
    ...          'b': {'kernel': jnp.array([[4.], [3.]])}}
    >>> match_weights(net, other, ['a', 'b'])['a']['kernel'].tolist()
    [[2.0, 1.0]]
  """
  from scipy import optimize  # Comes with jax; slow to import.

  own, wanted = _affine(params, layers), _affine(reference, layers)
  if [m.shape for m in own] != [m.shape for m in wanted]:
    raise ValueError(
        '`params` and `reference` must have the same shapes in all `layers`.')
  order = np.random.default_rng(seed)
  changed = True
  while changed:
    changed = False
    for i in order.permutation(len(own) - 1):
      # The bias is the last row of what goes in, and no neuron's.
      gain = (wanted[i].T @ own[i]
              + wanted[i + 1][:-1] @ own[i + 1][:-1].T)
      rows, chosen = optimize.linear_sum_assignment(
          np.abs(gain) if sign_flips else gain, maximize=True)
      signs = np.where(gain[rows, chosen] < 0, -1, 1) if sign_flips else 1
      better = np.sum(signs * gain[rows, chosen]) - np.trace(gain)
      if better > 1e-9 * np.abs(gain).sum():
        changed = True
        own[i] = own[i][:, chosen] * signs
        own[i + 1][:-1] = (own[i + 1][:-1][chosen].T * signs).T
  new = {}
  for name, whole in zip(layers, own):
    new |= {f'{name}/kernel': whole[:-1], f'{name}/bias': whole[-1]}
  return paths.map_with_name(
      lambda name, leaf: jnp.asarray(new[name], leaf.dtype)
      if name in new else leaf, params)


def _affine(params, layers):
  """Each layer as [in + 1, out] with its bias, or 0, as the last row."""
  stacked = []
  for name in layers:
    layer = paths.subtree(params, name)
    kernel = None if layer is None else layer.get('kernel')
    if kernel is None or jnp.ndim(kernel) != 2 or set(layer) - {'kernel', 'bias'}:
      raise ValueError(
          f'`layers` must name dense layers with a kernel [in, out], and '
          f'{name!r} is none.')
    kernel = np.asarray(kernel, np.float64)
    bias = np.asarray(layer.get('bias', np.zeros(kernel.shape[1])), np.float64)
    if stacked and stacked[-1].shape[1] != len(kernel):
      raise ValueError(
          f'`layers` must be a chain, and {name!r} reads {len(kernel)} neurons '
          f'after a layer of {stacked[-1].shape[1]}.')
    stacked.append(np.vstack([kernel, bias]))
  return stacked
