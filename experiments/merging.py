"""Networks trained side by side from different weights, then merged.

What `scripts/merge.py` trains and measures. Many small networks are trained in
one compiled loop, one after another: on one CPU core that took .77 of the time
of a `vmap` over them (784-128x3-10, batches of 100).
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import bpjax
from bpjax import feedback as feedback_lib
from bpjax import merge
from bpjax.train import data as data_lib
import jax
import jax.numpy as jnp
import numpy as np
import optax

LOSS = bpjax.losses.softmax_cross_entropy
Tree = Any


class Setting(NamedTuple):
  """How networks are trained.

  Attributes:
    rule: its name in `bpjax.rules`.
    rule_args: pairs of an argument of the rule and its value.
    feedback: 'same' for all networks of a group, or each its 'own'.
    start: initial weights, each network its 'own' or a 'common' one.
    trained: 'all' layers, or the 'readout' alone (random features).
    widths: of the hidden layers.
    rate: of SGD, at its start; a cosine brings it to 0.
    decay: L2, on all parameters, and on feedback that learns.
    epochs: over a network's own examples.
    batch: examples of a step.
    init_scale: factor on the initial kernels.
  """
  rule: str
  rule_args: tuple[tuple[str, Any], ...] = ()
  feedback: str = 'same'
  start: str = 'own'
  trained: str = 'all'
  widths: tuple[int, ...] = (128, 128, 128)
  rate: float = .1
  decay: float = 1e-3
  epochs: int = 10
  batch: int = 100
  init_scale: float = 1.


class Part(NamedTuple):
  """Examples: x float32 `[n, features]`, y int32 `[n]`."""
  x: jax.Array
  y: jax.Array


class Data(NamedTuple):
  """A set as flat, normalised arrays."""
  train: Part
  validation: Part
  test: Part
  source: str


class Group(NamedTuple):
  """Networks of one seed; every leaf with an axis of networks in front."""
  net: Any
  rule: Any
  params: Tree
  feedback: Tree


def load(name: str, examples: int, validation: int) -> Data:
  """A data set for MLPs.

  Args:
    name: 'digits', or a TFDS image set.
    examples: to train on; 0: all but those of validation.
    validation: held out of train.

  Example:
    >>> load('digits', 1000, 200).train.x.shape
    (1000, 64)
  """
  found = data_lib.load(
      name, validation=validation, train_examples=examples or None)

  def part(split):
    x = data_lib.normalise(split.images, found.mean, found.std)
    return Part(jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(split.labels))

  return Data(part(found.train), part(found.validation), part(found.test),
              found.source)


def split(y: np.ndarray, clients: int, kind: str, seed: int) -> list[np.ndarray]:
  """Which examples each client has; equal numbers, no example twice.

  Args:
    y: labels.
    clients: how many.
    kind: 'disjoint' (random parts), or 'skewed': sorted by label and cut into
      two shards for each client (Communication-efficient learning of deep
      networks from decentralized data, McMahan et al., 2017,
      https://arxiv.org/abs/1602.05629).
    seed: of the order and of who gets which shard.

  Example:
    >>> [len(part) for part in split(np.zeros(9), 4, 'disjoint', 0)]
    [2, 2, 2, 2]
  """
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(y))
  if kind == 'disjoint':
    size = len(y) // clients
    return list(order[:size * clients].reshape(clients, size))
  order = order[np.argsort(y[order], kind='stable')]
  size = len(y) // (2 * clients)
  shards = order[:2 * clients * size].reshape(2 * clients, size)
  dealt = rng.permutation(2 * clients).reshape(clients, 2)
  return [np.concatenate([shards[i] for i in own]) for own in dealt]


def begin(setting: Setting, data: Data, seed: int, networks: int) -> Group:
  """The networks of one seed before they learn.

  Equal seeds give equal initial weights under all rules, network by network.
  """
  net, rule = _made(setting.widths, setting.rule, setting.rule_args)
  start, draw = _drawn(net, rule, (setting.batch, data.train.x.shape[1]))
  root = jax.random.key(seed)

  def keys(kind, common):
    place = jnp.zeros(networks, int) if common else jnp.arange(networks)
    return jax.vmap(lambda i: jax.random.fold_in(root, 2 * i + kind))(place)

  params = bpjax.paths.map_with_name(
      lambda name, leaf: leaf * setting.init_scale
      if name.endswith('kernel') else leaf,
      start(keys(0, setting.start == 'common')))
  return Group(net, rule, params, draw(keys(1, setting.feedback == 'same')))


@functools.lru_cache
def _made(widths, rule, rule_args):
  """Network and rule; the same objects again, so that nothing compiles twice."""
  net = bpjax.from_linen(bpjax.models.mlp(10, widths=widths, activation='tanh'))
  return net, getattr(bpjax.rules, rule)(**dict(rule_args))


@functools.lru_cache
def _drawn(net, rule, shape):
  """`(keys) -> params` and `(keys) -> feedback`, compiled."""
  x = jnp.zeros(shape)
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
  return (
      jax.jit(jax.vmap(lambda key: net.init(key, x)['params'])),
      jax.jit(jax.vmap(lambda key: rule.init(key, net, zeros, x))))


def train(
    group: Group, setting: Setting, data: Data, seed: int,
    examples: Sequence[np.ndarray] | None = None,
    epochs: tuple[int, int] | None = None) -> Group:
  """Trains every network of a group.

  Args:
    group: the networks.
    setting: how.
    data: whose `train` is read.
    seed: of the order of examples, with the network's place and the epoch.
    examples: for each network which examples are its own, equally many; None:
      all, for all.
    epochs: from the first to before the second, of `setting.epochs`; None: all.

  Returns:
    The group with new parameters, and new feedback where that learns.
  """
  networks = len(jax.tree.leaves(group.params)[0])
  if examples is None:
    examples = [np.arange(len(data.train.y))] * networks
  first, last = epochs or (0, setting.epochs)
  steps = len(examples[0]) // setting.batch
  if not steps:
    raise ValueError(
        f'`batch` must be at most the {len(examples[0])} examples of a network, '
        f'got {setting.batch}.')

  def order(network, own):
    return [
        np.random.default_rng((seed, network, epoch)).permutation(own)[
            :steps * setting.batch].reshape(steps, setting.batch)
        for epoch in range(first, last)]

  orders = [np.concatenate(order(i, own)) for i, own in enumerate(examples)]
  done = np.arange(first * steps, last * steps) / (setting.epochs * steps)
  rates = setting.rate * .5 * (1 + np.cos(math.pi * done))
  params, feedback = _loop(group.net, group.rule, setting.trained)(
      group.params, group.feedback, np.stack(orders),
      rates.astype(np.float32), np.float32(setting.decay), data.train)
  return group._replace(params=params, feedback=feedback)


@functools.lru_cache
def _loop(net, rule, trained):
  """The compiled training of all networks of a group."""
  learn = rule.value_and_grad(net, LOSS)

  def fixed(trees):
    last = max(trees[0])  # Flax counts its layers: at most ten of them here.
    return jax.tree.map(lambda _: False, trees) if trained == 'all' else (
        {name: jax.tree.map(lambda _: name != last, layer)
         for name, layer in trees[0].items()},
        jax.tree.map(lambda _: False, trees[1]))

  def one(params, feedback, order, rates, decay, part):
    tx = bpjax.optimizer(
        optax.chain(optax.add_decayed_weights(decay),
                    optax.scale_by_learning_rate(lambda step: rates[step])),
        rule, feedback)
    tx = optax.chain(tx, optax.masked(optax.set_to_zero(), fixed))

    def step(carry, chosen):
      trees, state = carry
      _, grads = learn({'params': trees[0]}, trees[1],
                       part.x[chosen], part.y[chosen])
      updates, state = tx.update(grads, state, trees)
      return (optax.apply_updates(trees, updates), state), None

    trees = (params, feedback)
    return jax.lax.scan(step, (trees, tx.init(trees)), order)[0][0]

  @jax.jit
  def run(params, feedback, orders, rates, decay, part):
    return jax.lax.map(
        lambda own: one(*own, rates, decay, part), (params, feedback, orders))

  return run


def members(group: Group) -> list[Tree]:
  """The parameters of each network."""
  count = len(jax.tree.leaves(group.params)[0])
  return [jax.tree.map(lambda leaf: leaf[i], group.params)  # pylint: disable=cell-var-from-loop
          for i in range(count)]


def replaced(group: Group, params: Tree) -> Group:
  """The group with one network's parameters for all of its networks."""
  return group._replace(params=jax.tree.map(
      lambda all_, one: jnp.broadcast_to(one, all_.shape), group.params, params))


def accuracy(net: Any, params: Tree, part: Part) -> float:
  """Of one network, in percent."""
  return 100 * float(_judge(net)(params, part)[1])


@functools.lru_cache
def _judge(net):
  """`(params, part) -> (mean loss, accuracy, probabilities)`, compiled."""

  def judge(params, part):
    logits = net.apply({'params': params}, part.x)
    right = jnp.argmax(logits, axis=-1) == part.y
    return jnp.mean(LOSS(logits, part.y)), jnp.mean(right), jax.nn.softmax(logits)

  return jax.jit(judge)


def refitted(net: Any, params: Tree, train_part: Part, ridge: float = 1e-3) -> Tree:
  """The network with a new readout: ridge regression on its last features.

  Targets are the labels, one-hot; `ridge` is per example.
  """
  *hidden, last = sorted(params)
  features = _features(net, len(hidden))(params, train_part.x)
  features = np.asarray(features, np.float64)
  features = np.hstack([features, np.ones((len(features), 1))])
  targets = np.eye(params[last]['bias'].size)[np.asarray(train_part.y)]
  solved = np.linalg.solve(
      features.T @ features + ridge * len(features) * np.eye(features.shape[1]),
      features.T @ targets)
  return {**params, last: {
      'kernel': jnp.asarray(solved[:-1], jnp.float32),
      'bias': jnp.asarray(solved[-1], jnp.float32)}}


@functools.lru_cache
def _features(net, hidden):
  """`(params, x) -> ` what the readout reads."""

  def features(params, x):
    for i in range(hidden):
      layer = params[f'Dense_{i}']
      x = jnp.tanh(x @ layer['kernel'] + layer['bias'])
    return x

  del net
  return jax.jit(features)


def measure(
    group: Group, data: Data, sizes: Sequence[int] = (2, 4),
    controls: bool = True) -> dict[str, float]:
  """Accuracies in percent, alone and merged, on the test set.

  Args:
    group: trained networks.
    data: the set; validation examples serve the alignment.
    sizes: how many networks are averaged; those that the group has.
    controls: whether to match, refit, and measure barriers, too.

  Returns:
    'single': mean over networks. For each k of `sizes`, means over disjoint
    sets of k: 'mean_k', 'ensemble_k' (probabilities averaged), 'permuted_k' and
    'flipped_k' (neurons matched to those of the first network, without and
    with signs, then averaged), 'refit_k' (mean_k with a new readout); 'refit_1'
    of single networks. 'barrier': of the test loss in nats, between pairs;
    'cosine': of the kernels of pairs. 'weight_alignment' and
    'gradient_alignment': of the rule, means over networks and layers.
  """
  net, nets = group.net, members(group)
  judged = [_judge(net)(params, data.test) for params in nets]
  score = lambda networks: _mean(accuracy(net, p, data.test) for p in networks)
  mean = lambda networks: merge.average(list(networks))
  found = {'single': 100 * _mean(right for _, right, _ in judged)}
  matched = {}
  if controls:
    refit = lambda params: refitted(net, params, data.train)
    found['refit_1'] = score(map(refit, nets[:2]))
    for name, flips in (('permuted', False), ('flipped', True)):
      matched[name] = [nets[0], *(
          merge.match_weights(params, nets[0], sorted(params), sign_flips=flips)
          for params in nets[1:])]
  for k in (k for k in sizes if k <= len(nets)):
    sets = [slice(i, i + k) for i in range(0, len(nets) - k + 1, k)]
    merged = [mean(nets[own]) for own in sets]
    found[f'mean_{k}'] = score(merged)
    if not controls:
      continue
    for name, all_ in matched.items():
      found[f'{name}_{k}'] = score(mean(all_[own]) for own in sets)
    found[f'refit_{k}'] = score(map(refit, merged))
    found[f'ensemble_{k}'] = 100 * _mean(
        jnp.mean(jnp.argmax(sum(j[2] for j in judged[own]), -1) == data.test.y)
        for own in sets)
  pairs = [(nets[i], nets[i + 1]) for i in range(0, len(nets) - 1, 2)]
  if controls:
    loss = lambda params: _judge(net)(params, data.test)[0]
    found['barrier'] = _mean(
        merge.interpolation_barrier(loss, *pair, points=5) for pair in pairs)
  kernels = lambda params: {n: layer['kernel'] for n, layer in params.items()}
  found['cosine'] = _mean(
      feedback_lib.cosine(*map(kernels, pair)) for pair in pairs)
  few = Part(*(a[:500] for a in data.validation))
  for i in range(min(2, len(nets))):
    feedback = jax.tree.map(lambda leaf: leaf[i], group.feedback)  # pylint: disable=cell-var-from-loop
    aligned = _align(net, group.rule)({'params': nets[i]}, feedback, *few)
    for kind, name in (('weight', 'weight_alignment'),
                       ('teaching', 'gradient_alignment')):
      values = [float(getattr(a, kind)) for a in list(aligned.values())[:-1]]
      values = [v for v in values if math.isfinite(v)]
      if values:
        found.setdefault(name, []).append(np.mean(values))
  for name in ('weight_alignment', 'gradient_alignment'):
    if name in found:
      found[name] = _mean(found[name])
  return found


@functools.lru_cache
def _align(net, rule):
  return jax.jit(bpjax.alignment(net, LOSS, rule))


def _mean(values) -> float:
  return float(np.mean([float(v) for v in values]))
