r"""The variance of forward gradients: Table 1 of Ren et al., 2023, measured.

  python scripts/local_fg_variance.py [--draws=60000] [--dataset=cifar10]

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310). A layer of fan-in p and fan-out q,
batches of N: V is the variance between examples of an entry of the gradient, S
the square of its mean, both averaged over entries. The variance of an entry of
the estimate, over batches and noise, by the paper's formulas:

  perturbed    noise of the batch          noise of each example
  weight       (pq+2)/N V + (pq+1) S       (pq+2)/N V + (pq+1)/N S
  activity     (q+2)/N V + (q+1) S         (q+2)/N V + (q+1)/N S

All four are `bpjax.rules.forward_gradient(perturb=..., noise=...)`. Examples are
drawn with replacement from a population of which V and S are known exactly. A
second table is of a whole network of three layers, all of them perturbed
together, on one batch; its formulas follow from the same fourth moment.

Figure 7 of the paper (an image, without numbers) shows that losses of more
channel groups help, down to about 8 channels a group. Here: the cosine between
the update of local forward gradient (activity noise, losses of each block, patch
and group) and the gradient by backprop of the same losses, one draw each, for
LocalMixers as they are initialised: of the kernel of each layer in the blocks,
and the mean over layers and draws. That of all parameters side by side is in the
table, too, but is no measure: a norm divides by the little that differs within a
blank patch, or a small group of rectified channels, so that the gradient of one
bias can be 10,000 times as large as all others, and decides it alone.

Exits with 1 if a variance is further than --tolerance from its formula, or the
cosine does not rise with each number of groups in the list that leaves at least
8 channels to each.
"""

from __future__ import annotations

import functools
import itertools

from absl import flags
import bpjax
from bpjax.models.local_mixer import NormedLayer
from bpjax.train import data as data_lib
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

_DRAWS = flags.DEFINE_integer('draws', 60_000, 'Estimates of each kind.', 500)
_TOLERANCE = flags.DEFINE_float(
    'tolerance', .03, 'Of measured over formula, around 1.', 0.)
_FAN_OUTS = flags.DEFINE_list('fan_outs', ['2', '8', '32'], 'q, at N = 8.')
_BATCHES = flags.DEFINE_list('batches', ['2', '8', '32'], 'N, at q = 8.')
_GROUPS = flags.DEFINE_list(
    'groups', ['1', '2', '4', '8', '16', '32'],
    'Numbers of channel groups, for the cosine.')
_CHANNELS = flags.DEFINE_integer('channels', 128, 'Of the LocalMixer.', 1)
_PATCHES = flags.DEFINE_integer('patches', 4, 'On each side of an image.', 1)
_BLOCKS = flags.DEFINE_integer('blocks', 2, 'Of the LocalMixer.', 1)
_BATCH = flags.DEFINE_integer('batch', 64, 'Images, for the cosine.', 1)
_COSINES = flags.DEFINE_integer('cosines', 50, 'Draws, for the cosine.', 2)
_DATASET = flags.DEFINE_string(
    'dataset', 'cifar10', "Of the images: 'digits', or a TFDS set.")

LOSS = bpjax.losses.softmax_cross_entropy
KINDS = tuple(itertools.product(('weight', 'activity'),
                                ('shared', 'independent')))
_FAN_IN, _POPULATION, _MIDDLE = 8, 64, 8
_CHUNK = 500  # Estimates at a time.
_FEW = 8  # Channels of a group, below which more groups need not help.


def formula(
    perturb: str, noise: str, p: int, q: int, n: int, v: float, s: float
) -> float:
  """The paper's Table 1: the mean variance of an entry of the estimate.

  Args:
    perturb: 'weight' or 'activity'.
    noise: 'shared' by the batch, or 'independent'.
    p: fan-in.
    q: fan-out.
    n: examples of a batch.
    v: variance between examples, a mean over entries.
    s: squared mean gradient, a mean over entries.

  Example:
    >>> formula('activity', 'independent', 3, 4, 2, 1., 1.)
    5.5
  """
  size = p * q if perturb == 'weight' else q
  return (size + 2) / n * v + (size + 1) * s / (
      n if noise == 'independent' else 1)


def moments(net, variables, xs, ys):
  """(mean gradient [p, q], V, S) of a population for one layer, exactly."""
  output = net.apply(variables, xs)
  errors = jax.grad(lambda o: LOSS(o, ys).sum())(output)
  each = np.einsum(
      'np,nq->npq', np.asarray(xs, float), np.asarray(errors, float))
  mean = each.mean(0)
  return mean, float(each.var(0).mean()), float(np.mean(mean**2))


def spread(learn, variables, sample, mean, draws: int) -> tuple[float, float]:
  """The squared distance of estimates from their mean, and its standard error.

  Args:
    learn: of a rule.
    variables: of the network.
    sample: `(key) -> (x, y)`, a batch.
    mean: the parameters' exact gradient, over all batches.
    draws: how many estimates.

  Returns:
    The sum over entries, a mean over estimates.
  """

  @jax.jit
  def run(variables, mean, keys):
    def one(key):
      pick, noise = jax.random.split(key)
      x, y = sample(pick)
      grads = learn(variables, {}, x, y, key=noise)[1][0]
      return sum(jax.tree.leaves(jax.tree.map(
          lambda g, m: jnp.sum((g - m) ** 2), grads, mean)))

    return jax.lax.map(one, keys, batch_size=_CHUNK)

  keys = jax.random.split(jax.random.key(1), draws)
  found = np.asarray(run(variables, mean, keys), float)
  return found.mean(), found.std(ddof=1) / draws**.5


def _estimator(perturb, noise):
  return bpjax.rules.forward_gradient(
      perturb, noise=noise, exact_readout=False)


def one_layer(fan_out: int, batch: int, draws: int) -> list[dict]:
  """The four estimators for one layer: measured, formula, and their ratio."""
  p, q = _FAN_IN, fan_out
  x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
  # Inputs of a mean that is not 0 and labels that are not uniform, so that S
  # has a part in the sum.
  xs = .7 + jax.random.normal(x_key, (_POPULATION, p))
  ys = jnp.minimum(
      jax.random.randint(y_key, (_POPULATION,), 0, 2 * q), q - 1)
  net = bpjax.from_linen(nn.Dense(q, use_bias=False))
  variables = jax.jit(net.init)(key, xs)
  mean, v, s = moments(net, variables, xs, ys)

  def sample(key):
    chosen = jax.random.randint(key, (batch,), 0, _POPULATION)
    return xs[chosen], ys[chosen]

  rows = []
  for perturb, noise in KINDS:
    learn = _estimator(perturb, noise).value_and_grad(net, LOSS)
    measured, error = spread(
        learn, variables, sample, {'kernel': jnp.asarray(mean)}, draws)
    expected = formula(perturb, noise, p, q, batch, v, s)
    rows.append({
        'perturb': perturb, 'noise': noise, 'p': p, 'q': q, 'N': batch, 'V': v,
        'S': s, 'measured': measured / (p * q), 'formula': expected,
        'ratio': measured / (p * q) / expected,
        'standard_error': error / (p * q) / expected})
  return rows


def network_formula(inputs, errors) -> dict[tuple[str, str], float]:
  """The four variances, summed over all entries of a network, for one batch.

  With h_n the inputs of a layer, 1 for its bias included, and d_n the errors at
  the outputs of all layers, side by side, G_n the gradient of an example:

    weight, shared: (entries + 1) |mean G|^2;
    weight, independent: (entries + 1) mean |G|^2 / N;
    activity, shared: q |mean h d^T|^2 + |mean G|^2 of each layer;
    activity, independent: (q mean |h d^T|^2 + mean |G|^2) / N of each.

  Args:
    inputs: of each layer, [N, p]; one more entry than its kernel has, of 1.
    errors: of each layer, [N, q].
  """
  count = len(errors[0])
  everywhere = np.concatenate(errors, axis=1)
  result = dict.fromkeys(KINDS, 0.)
  entries = 1 + sum(h.shape[1] * d.shape[1] for h, d in zip(inputs, errors))
  for h, d in zip(inputs, errors):
    each = np.einsum('np,nq->npq', h, d)
    joint = np.einsum('np,nq->npq', h, everywhere)
    together, apart = (
        lambda g: np.sum(g.mean(0)**2), lambda g: np.sum(g**2) / count**2)
    result['weight', 'shared'] += entries * together(each)
    result['weight', 'independent'] += entries * apart(each)
    for noise, total in (('shared', together), ('independent', apart)):
      result['activity', noise] += d.shape[1] * total(joint) + total(each)
  return result


def whole_network(draws: int, widths=(12, 8, 4), batch: int = 8) -> list[dict]:
  """The four estimators for all layers of a network at once."""
  layers = itertools.chain.from_iterable((nn.Dense(w), nn.tanh) for w in widths)
  net = bpjax.from_linen(nn.Sequential(list(layers)[:-1]))
  x = jax.random.normal(jax.random.key(2), (batch, 6))
  y = jnp.arange(batch) % widths[-1]
  variables = jax.jit(net.init)(jax.random.key(3), x)
  kernels = list(variables['params'].values())

  def forward(moved):
    hidden, inputs = x, []
    for i, (layer, m) in enumerate(zip(kernels, moved)):
      inputs.append(jnp.concatenate(
          [jnp.tanh(hidden) if i else hidden, jnp.ones((batch, 1))], axis=1))
      hidden = inputs[-1] @ jnp.vstack([layer['kernel'], layer['bias']]) + m
    return LOSS(hidden, y).sum(), inputs

  errors, inputs = jax.grad(forward, has_aux=True)(
      [jnp.zeros((batch, w)) for w in widths])
  as_numpy = lambda arrays: [np.asarray(a, float) for a in arrays]
  expected = network_formula(as_numpy(inputs), as_numpy(errors))
  exact = jax.jit(bpjax.rules.backprop().value_and_grad(net, LOSS))(
      variables, {}, x, y)[1][0]
  rows = []
  for kind in KINDS:
    learn = _estimator(*kind).value_and_grad(net, LOSS)
    measured, error = spread(
        learn, variables, lambda key: (x, y), exact, draws)
    rows.append({
        'perturb': kind[0], 'noise': kind[1], 'measured': measured,
        'formula': float(expected[kind]), 'ratio': measured / expected[kind],
        'standard_error': error / expected[kind]})
  return rows


def cosine(model, x, y, draws: int) -> np.ndarray:
  """Of local forward gradient's updates with their mean.

  Args:
    model: a LocalMixer.
    x: images [batch, height, width, channels].
    y: labels.
    draws: how many updates, one draw of noise each.

  Returns:
    [draws, 2]: the mean over the kernels of the blocks, and that of all
    parameters of the blocks side by side.
  """
  # As in the paper, noise comes in after the norm of a layer.
  net = bpjax.from_linen(
      model, is_unit=lambda m: isinstance(m, NormedLayer))
  local = functools.partial(
      bpjax.local, blocks=['block_*'], placement='group', grouped=True)
  rule, exact = (local(r()) for r in (
      bpjax.rules.forward_gradient, bpjax.rules.backprop))
  variables = jax.jit(net.init)(jax.random.key(0), x)
  feedback = rule.init(jax.random.key(1), net, variables, x)

  def blocks(rule, inputs, key=None):
    grads = rule.value_and_grad(net, LOSS)(*inputs, key=key)[1][0]
    return {k: g for k, g in grads.items() if k != 'readout'}

  @jax.jit
  def run(inputs, keys):
    gradient = blocks(exact, inputs)
    return jax.lax.map(
        lambda key: kernels_and_all(blocks(rule, inputs, key), gradient), keys)

  keys = jax.random.split(jax.random.key(2), draws)
  return np.asarray(run((variables, feedback, x, y), keys), float)


def kernels_and_all(a, b) -> jax.Array:
  """[2]: the mean cosine of two trees' kernels, and that of all of each."""
  products = {
      name: jnp.array([jnp.vdot(p, q), jnp.vdot(p, p), jnp.vdot(q, q)])
      for name, p, q in zip(
          bpjax.paths.leaf_names(a), jax.tree.leaves(a), jax.tree.leaves(b))}
  of = lambda pq: pq[0] / jnp.sqrt(pq[1] * pq[2])
  kernels = [of(v) for name, v in products.items() if name.endswith('kernel')]
  return jnp.stack([
      jnp.mean(jnp.stack(kernels)), of(sum(products.values()))])


def cosines(groups: list[int]) -> list[dict]:
  """The cosine for each number of groups."""
  for g in groups:
    if _CHANNELS.value % g:
      raise measurement.FlagError(
          f'`groups` must divide the channels, {_CHANNELS.value}, got {g}.')
  try:
    dataset = data_lib.load(_DATASET.value)
  except ValueError as error:
    raise measurement.FlagError(str(error)) from error
  for size in dataset.image_shape[:2]:
    if size % _PATCHES.value:
      raise measurement.FlagError(
          f"`patches` must divide the image's side, {size}, got "
          f'{_PATCHES.value}.')
  x = data_lib.normalise(
      dataset.train.images[:_BATCH.value], dataset.mean, dataset.std)
  y = dataset.train.labels[:_BATCH.value]
  rows = []
  for g in groups:
    model = bpjax.models.local_mixer(
        dataset.num_classes, blocks=_BLOCKS.value, patches=_PATCHES.value,
        channels=_CHANNELS.value, groups=g)
    found = cosine(model, jnp.asarray(x), jnp.asarray(y), _COSINES.value)
    mean, error = found.mean(0), found.std(0, ddof=1) / len(found)**.5
    rows.append({
        'groups': g, 'channels_a_group': _CHANNELS.value // g,
        'cosine': mean[0], 'standard_error': error[0],
        'cosine_of_all': mean[1], 'standard_error_of_all': error[1]})
  return rows


def out_of_bounds(layer, network, rising) -> list[str]:
  """What does not hold, a sentence each."""
  wrong = [
      f'{row["perturb"]}, {row["noise"]}'
      + (f', q={row["q"]}, N={row["N"]}' if 'q' in row else ', whole network')
      + f': {row["ratio"]:.4f} of the formula'
      for row in layer + network if abs(row['ratio'] - 1) > _TOLERANCE.value]
  rising = [r for r in rising if r['channels_a_group'] >= _FEW]
  return wrong + [
      f'the cosine with {b["groups"]} groups, {b["cosine"]:.4f}, is not above '
      f'that with {a["groups"]}, {a["cosine"]:.4f}'
      for a, b in zip(rising, rising[1:]) if b['cosine'] <= a['cosine']]


def show_layer(rows: list[dict]) -> None:
  """The paper's table."""
  table = measurement.table(
      f'Table 1: the variance of an entry, p = {_FAN_IN}', 'perturbed, noise',
      'q', 'N', 'V', 'S', 'measured', 'formula', 'measured / formula')
  for row in rows:
    table.add_row(
        f'{row["perturb"]}, {row["noise"]}', str(row['q']), str(row['N']),
        *(f'{row[k]:.3g}' for k in ('V', 'S', 'measured', 'formula')),
        _with_error(row, 'ratio'))
  measurement.show(table)


def show_network(rows: list[dict]) -> None:
  """That of a whole network."""
  table = measurement.table(
      'The same, summed over a network of three layers', 'perturbed, noise',
      'measured', 'formula', 'measured / formula')
  for row in rows:
    table.add_row(
        f'{row["perturb"]}, {row["noise"]}', f'{row["measured"]:.4g}',
        f'{row["formula"]:.4g}', _with_error(row, 'ratio'))
  measurement.show(table)


def show_cosines(rows: list[dict]) -> None:
  """Cosine over groups."""
  table = measurement.table(
      f'LocalMixer, {_BLOCKS.value} blocks, {_PATCHES.value}x{_PATCHES.value} '
      f'patches, {_CHANNELS.value} channels, {_DATASET.value}: update and '
      'gradient', 'groups', 'channels a group', 'cosine, kernels', 'of all')
  for row in rows:
    table.add_row(
        str(row['groups']), str(row['channels_a_group']),
        _with_error(row, 'cosine'),
        _with_error(row, 'cosine_of_all', '_of_all'))
  measurement.show(table)


def _with_error(row, field, which=''):
  return f'{row[field]:.4f} ± {row["standard_error" + which]:.4f}'


def draw(layer, rising, path: str) -> None:
  """Variance over q and over N, and the cosine over groups."""
  figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout='constrained')
  for axis, over, fixed in ((axes[0], 'q', 'N'), (axes[1], 'N', 'q')):
    for i, (perturb, noise) in enumerate(KINDS):
      rows = sorted(
          (r for r in layer if (r['perturb'], r['noise']) == (perturb, noise)
           and r[fixed] == _MIDDLE), key=lambda r: r[over])
      xs = [r[over] for r in rows]
      axis.plot(xs, [r['formula'] for r in rows], color=f'C{i}')
      axis.plot(xs, [r['measured'] for r in rows], 'o', color=f'C{i}',
                label=f'{perturb}, {noise}')
    _ticks(axis, xs)
    axis.set(yscale='log', xlabel={
        'q': 'fan-out q', 'N': 'batch N'}[over],
             ylabel='variance of an entry',
             title=f'p = {_FAN_IN}, {fixed} = {_MIDDLE}; lines: formula')
    axis.legend()
  axes[2].errorbar(
      [r['groups'] for r in rising], [r['cosine'] for r in rising],
      [2 * r['standard_error'] for r in rising], marker='o', capsize=3)
  _ticks(axes[2], [r['groups'] for r in rising])
  axes[2].set(xlabel='channel groups',
              ylabel='cosine of update and gradient',
              title=f'LocalMixer, {_CHANNELS.value} channels')
  for axis in axes:
    axis.grid(alpha=.25)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _ticks(axis, values):
  """A log axis with just these, written out."""
  axis.set_xscale('log')
  axis.set_xticks(values, [str(v) for v in values])
  axis.minorticks_off()


def _measure(picture):
  fan_outs, batches, groups = (
      measurement.numbers(f.name, f.value, lowest) for f, lowest in (
          (_FAN_OUTS, 2), (_BATCHES, 1), (_GROUPS, 1)))
  sizes = sorted({(q, _MIDDLE) for q in fan_outs} | {
      (_MIDDLE, n) for n in batches})
  rising = cosines(groups)  # First: it has flags that may not fit.
  show_cosines(rising)
  layer = [row for q, n in sizes for row in one_layer(q, n, _DRAWS.value)]
  show_layer(layer)
  network = whole_network(_DRAWS.value)
  show_network(network)
  draw(layer, rising, picture)
  record = {'one_layer': layer, 'whole_network': network, 'cosine': rising}
  return record, out_of_bounds(layer, network, rising)


if __name__ == '__main__':
  measurement.main('local_fg_variance', _measure)
