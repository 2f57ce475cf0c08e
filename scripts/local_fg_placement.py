r"""Where the losses are: Figure 6 of Ren et al., 2023, trained.

  python scripts/local_fg_placement.py [--dataset=mnist] [--epochs=2] \
      [--seeds=0]

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310). Local forward gradient (LG-FG-A:
noise on activations, gradients that stop after each block) with a loss for each
block, for each block and patch, and for each block, patch and channel group. All
have the same mean, which is the gradient of LG-BP, backprop of the same losses,
the last row. The figure is an image, without numbers.

By default a LocalMixer with fewer channels than the paper's, on 20,000 images;
M/8/16 on all of CIFAR-10 is

  python scripts/local_fg_placement.py --dataset=cifar10 --patches=8 \
      --channels=512 --groups=16 --blocks=4 --epochs=200 --train_examples=0

Adam with a cosine to 0, where the paper has SGD with momentum: one learning rate
then serves all rows, whose updates differ in norm by more than ten times. (SGD at
a rate of .03 learned nothing from losses of blocks alone: 89% error after two
epochs of 20,000 images.) The readout learns from the loss of the output alone.
Data are read from TFDS_DATA_DIR.

Also prints the cosine of updates, one draw each, with the gradient, at the
initial weights: the mean over the kernels in the blocks. (Biases can have
gradients that are larger by far, see scripts/local_fg_variance.py.)

Exits with 1 unless each further division has a higher cosine, and a test error
that is at most --tolerance percentage points above that without it.
"""

from __future__ import annotations

import functools
import time

from absl import flags
import bpjax
from bpjax.models.local_mixer import NormedLayer
from bpjax.train import data as data_lib
from experiments import measurement
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

# row -> (rule, placement)
ROWS = {
    'block': ('forward_gradient', 'block'),
    'block + patch': ('forward_gradient', 'patch'),
    'block + patch + group': ('forward_gradient', 'group'),
    'LG-BP': ('backprop', 'block'),
}

_ROWS = flags.DEFINE_list('rows', list(ROWS), 'Which to train.')
_DATASET = flags.DEFINE_string('dataset', 'mnist', 'A set of images.')
_TRAIN = flags.DEFINE_integer(
    'train_examples', 20_000, 'Only so many of them; 0: all.', 0)
_EPOCHS = flags.DEFINE_integer('epochs', 2, 'Of each run.', 1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Images of a step.', 1)
_RATE = flags.DEFINE_float('learning_rate', .001, 'At the start.', 0.)
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Of weights, order and noise.')
_BLOCKS = flags.DEFINE_integer('blocks', 2, 'Of the LocalMixer.', 1)
_PATCHES = flags.DEFINE_integer('patches', 4, 'On each side of an image.', 1)
_CHANNELS = flags.DEFINE_integer('channels', 128, 'Of the LocalMixer.', 1)
_GROUPS = flags.DEFINE_integer('groups', 8, 'Of these channels.', 1)
_COSINES = flags.DEFINE_integer('cosines', 50, 'Draws, for the cosine.', 2)
_TOLERANCE = flags.DEFINE_float(
    'tolerance', .5, 'Percentage points of test error.', 0.)

_LOSS = bpjax.losses.softmax_cross_entropy


class Run:
  """One row with one seed, trained epoch by epoch.

  Args:
    row: a name of ROWS.
    dataset: images and labels.
    seed: of weights, order and noise.
  """

  def __init__(self, row: str, dataset: data_lib.Dataset, seed: int):
    rule, placement = ROWS[row]
    self._dataset = dataset
    # As in the paper, noise comes in after the norm of a layer.
    self._net = bpjax.from_linen(
        bpjax.models.local_mixer(
            dataset.num_classes, blocks=_BLOCKS.value, patches=_PATCHES.value,
            channels=_CHANNELS.value, groups=_GROUPS.value),
        is_unit=lambda m: isinstance(m, NormedLayer))
    self._make = functools.partial(
        bpjax.local, blocks=['block_*'], placement=placement, grouped=True)
    self._rule = self._make(bpjax.rules.get(rule)())
    self._learn = self._rule.value_and_grad(self._net, _LOSS)
    keys = jax.random.split(jax.random.key(seed), 3)
    x = self._images(dataset.train.images[:1])
    variables = jax.jit(self._net.init)(keys[0], x)
    feedback = self._rule.init(keys[1], self._net, variables, x)
    self._steps = len(dataset.train.labels) // _BATCH.value
    self._optimizer = optax.adam(optax.cosine_decay_schedule(
        _RATE.value, self._steps * _EPOCHS.value))
    learned = variables['params'], feedback
    self._carry = learned, self._optimizer.init(learned)
    self._key = keys[2]
    self._order = np.random.default_rng(seed)
    self._step = jax.jit(self._one_step, donate_argnums=0)
    self._predict = jax.jit(
        lambda params, x: jnp.argmax(
            self._net.apply({'params': params}, self._images(x)), -1))

  def _images(self, images):
    return data_lib.normalise(
        jnp.asarray(images), self._dataset.mean, self._dataset.std)

  def _one_step(self, carry, images, y, key):
    (params, feedback), state = carry
    _, grads = self._learn(
        {'params': params}, feedback, self._images(images), y, key=key)
    updates, state = self._optimizer.update(grads, state, (params, feedback))
    return optax.apply_updates((params, feedback), updates), state

  def epoch(self) -> float:
    """Trains an epoch; returns the test error, %."""
    train = self._dataset.train
    order = self._order.permutation(len(train.labels))
    for i in range(self._steps):
      chosen = order[i * _BATCH.value:(i + 1) * _BATCH.value]
      self._key, key = jax.random.split(self._key)
      self._carry = self._step(
          self._carry, train.images[chosen], train.labels[chosen], key)
    return self._error(self._dataset.test)

  def _error(self, split, batch=1000):
    params = self._carry[0][0]
    found = [self._predict(params, split.images[i:i + batch])
             for i in range(0, len(split.labels), batch)]
    return 100 * float(np.mean(np.concatenate(found) != split.labels))

  def cosines(self, draws: int) -> np.ndarray:
    """Of updates, one draw each, with their mean: over kernels, [draws]."""
    (params, feedback), _ = self._carry
    train = self._dataset.train
    x, y = self._images(train.images[:_BATCH.value]), jnp.asarray(
        train.labels[:_BATCH.value])
    exact = self._make(bpjax.rules.backprop()).value_and_grad(self._net, _LOSS)

    def kernels(learn, arguments, key=None):
      grads = learn({'params': arguments[0]}, *arguments[1:], key=key)[1][0]
      return [g for name, g in zip(
          bpjax.paths.leaf_names(grads), jax.tree.leaves(grads))
              if name.startswith('block_') and name.endswith('kernel')]

    @jax.jit
    def run(arguments, keys):
      gradient = kernels(exact, arguments)

      def one(key):
        update = kernels(self._learn, arguments, key)
        return sum(
            jnp.vdot(u, g) / (jnp.linalg.norm(u) * jnp.linalg.norm(g))
            for u, g in zip(update, gradient)) / len(gradient)

      return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(1), draws)
    return np.asarray(run((params, feedback, x, y), keys), float)


def train(dataset: data_lib.Dataset, seeds: list[int]) -> list[dict]:
  """Every row with every seed."""
  runs = []
  for row in _ROWS.value:
    for seed in seeds:
      run = Run(row, dataset, seed)
      noisy = ROWS[row][0] != 'backprop'
      found = run.cosines(_COSINES.value) if noisy else np.ones(2)
      begin = time.perf_counter()
      errors = []
      for _ in range(_EPOCHS.value):
        errors.append(run.epoch())
        print(f'{row}, seed {seed}, epoch {len(errors)}: test error '
              f'{errors[-1]:.2f}%', flush=True)
      runs.append({
          'row': row, 'seed': seed, 'test_error_by_epoch': errors,
          'cosine': found.mean(),
          'cosine_standard_error': found.std(ddof=1) / len(found)**.5,
          'seconds': time.perf_counter() - begin})
  return runs


def _mean(runs, row, value):
  """Over seeds."""
  return float(np.mean([value(r) for r in runs if r['row'] == row]))


def out_of_bounds(runs: list[dict], tolerance: float) -> list[str]:
  """What does not hold, a sentence each."""
  cosine = lambda row: _mean(runs, row, lambda r: r['cosine'])
  error = lambda row: _mean(runs, row, lambda r: r['test_error_by_epoch'][-1])
  rows = [r for r in ROWS if r in _ROWS.value and r != 'LG-BP']
  wrong = []
  for before, after in zip(rows, rows[1:]):
    if cosine(after) <= cosine(before):
      wrong.append(
          f'losses at {after} have a cosine of {cosine(after):.4f}, not above '
          f'{cosine(before):.4f} at {before}')
    if error(after) > error(before) + tolerance:
      wrong.append(
          f'losses at {after} have a test error of {error(after):.2f}%, that is '
          f'above {error(before):.2f}% at {before} by more than {tolerance}')
  return wrong


def show(runs: list[dict]) -> None:
  """A row for each placement, means over seeds."""
  epochs = sorted({1, (_EPOCHS.value + 1) // 2, _EPOCHS.value})
  table = measurement.table(
      f'{_DATASET.value}, {_BLOCKS.value} blocks, {_PATCHES.value}x'
      f'{_PATCHES.value} patches, {_CHANNELS.value} channels, {_GROUPS.value} '
      'groups', 'losses at', 'cosine at the start',
      *(f'test error, %, epoch {e}' for e in epochs))
  for row in _ROWS.value:
    table.add_row(
        row, f'{_mean(runs, row, lambda r: r["cosine"]):.4f} ± '
        f'{_mean(runs, row, lambda r: r["cosine_standard_error"]):.4f}',
        *(f'{_mean(runs, row, lambda r: r["test_error_by_epoch"][e - 1]):.2f}'  # pylint: disable=cell-var-from-loop
          for e in epochs))
  measurement.show(table)


def draw(runs: list[dict], path: str) -> None:
  """Test error over epochs."""
  figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
  for i, row in enumerate(ROWS):
    for run in (r for r in runs if r['row'] == row):
      errors = run['test_error_by_epoch']
      axis.plot(
          range(1, len(errors) + 1), errors, 'k--' if row == 'LG-BP' else '-o',
          **({} if row == 'LG-BP' else {'color': f'C{i}'}),
          label=row if run['seed'] == runs[0]['seed'] else None)
  axis.set(xlabel='epoch', ylabel='test error, %',
           title=f'{_DATASET.value}: local forward gradient, losses at')
  axis.xaxis.get_major_locator().set_params(integer=True)
  axis.grid(alpha=.25)
  axis.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _loaded():
  """The data set, with flags that fit it."""
  for row in _ROWS.value:
    if row not in ROWS:
      raise measurement.FlagError(
          f'`rows` has no {row!r}; known: {", ".join(ROWS)}.')
  if _CHANNELS.value % _GROUPS.value:
    raise measurement.FlagError(
        f'`groups` must divide the channels, {_CHANNELS.value}, got '
        f'{_GROUPS.value}.')
  try:
    dataset = data_lib.load(
        _DATASET.value, train_examples=_TRAIN.value or None)
  except ValueError as error:
    raise measurement.FlagError(str(error)) from error
  if isinstance(dataset.train, data_lib.Stream):
    raise measurement.FlagError(
        f'`dataset` must fit into memory, got {_DATASET.value!r}; this script '
        'has no stream.')
  for size in dataset.image_shape[:2]:
    if size % _PATCHES.value:
      raise measurement.FlagError(
          f"`patches` must divide the image's side, {size}, got "
          f'{_PATCHES.value}.')
  if _BATCH.value > len(dataset.train.labels):
    raise measurement.FlagError(
        f'`batch` must be at most {len(dataset.train.labels)}, the training '
        f'examples, got {_BATCH.value}.')
  return dataset


def _measure(picture):
  seeds = measurement.numbers('seeds', _SEEDS.value, 0)
  runs = train(_loaded(), seeds)
  show(runs)
  draw(runs, picture)
  record = {
      'dataset': _DATASET.value, 'epochs': _EPOCHS.value,
      'learning_rate': _RATE.value, 'batch': _BATCH.value, 'runs': runs}
  return record, out_of_bounds(runs, _TOLERANCE.value)


if __name__ == '__main__':
  measurement.main('local_fg_placement', _measure)
