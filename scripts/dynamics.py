"""What the scripts on the dynamics of feedback alignment share.

Claims with bounds, the way a script becomes a program, and the training of many
networks of one shape at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import io
import json
import math
import pathlib
from typing import Any, NamedTuple

from absl import flags
import bpjax
from bpjax.theory import alignment
from bpjax.train import data as data_lib
from experiments import measurement
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

Record = dict[str, Any]


class Claim(NamedTuple):
  """A number that a statement of the theory bounds.

  Attributes:
    row: of the statement, by the numbers of `docs/dynamics.md`.
    text: what the number is.
    value: the number.
    low: the least that it may be.
    high: the most.
  """
  row: int
  text: str
  value: float
  low: float = -math.inf
  high: float = math.inf

  @property
  def holds(self) -> bool:
    """Whether the number is a number within its bounds."""
    return bool(self.low <= self.value <= self.high)

  @property
  def bound(self) -> str:
    """The bounds, as they are printed."""
    if self.low == self.high:
      return f'= {self.low:g}'
    return ', '.join([
        *([f'>= {self.low:.4g}'] if self.low > -math.inf else []),
        *([f'<= {self.high:.4g}'] if self.high < math.inf else [])])


def main(
    name: str, measure: Callable[[], Record],
    judge: Callable[[Record], list[Claim]],
    draw: Callable[[Record, str], None]) -> None:
  """Runs a script: measure, or read what was; claims, plot, exit code.

  Exits with 1 if a claim does not hold, and with 2 for flags that make no sense.

  Args:
    name: of the script, without '.py'.
    measure: makes the record, JSON's types alone.
    judge: the claims of a record; prints its tables.
    draw: `(record, path of the plot)`.
  """
  read = flags.DEFINE_string(
      'read', '', 'A file of results to judge and draw, in place of measuring.')

  def run(picture):
    record = _read(read.value) if read.value else measure()
    claims = judge(record)
    table = measurement.table('What the theory says', 'claim', 'measured',
                              'bound', 'holds')
    for c in claims:
      table.add_row(f'{c.row}. {c.text}', f'{c.value:.4g}', c.bound,
                    'yes' if c.holds else 'NO')
    measurement.show(table)
    draw(record, picture)
    rows = [{
        'claim': c.row, 'text': c.text, 'bound': c.bound,
        'value': float(c.value) if math.isfinite(c.value) else None,
        'holds': c.holds
    } for c in claims]
    wrong = [f'{c.row}. {c.text}: {c.value:.4g}, not {c.bound}'
             for c in claims if not c.holds]
    return {'claims': rows, **record}, wrong

  measurement.main(name, run)


def _read(path):
  """The record of a file that a script wrote."""
  try:
    record = json.loads(pathlib.Path(path).read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise measurement.FlagError(
        f'`read` must be a file that --output wrote, got {path!r}: {error}'
    ) from error
  record.pop('claims', None)
  return record  # With the command and the versions that measured it.


def save(figure, path: str) -> None:
  """Writes a figure as a PNG of 64 colours: small enough for a page."""
  drawn = io.BytesIO()
  figure.savefig(drawn, dpi=70)
  plt.close(figure)
  Image.open(drawn).convert('RGB').quantize(64).save(path, 'PNG', optimize=True)


def log_spaced(last: int, count: int = 25) -> list[int]:
  """Whole numbers from 0 to `last`, about `count` of them, evenly in log."""
  return sorted({0, *np.geomspace(1, last, count).round().astype(int).tolist()})


def images(
    name: str, train_examples: int, side: int, test_examples: int = 2000
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Images as the released code has them: resized, one mean and one deviation.

  Args:
    name: of the data set.
    train_examples: how many of the training examples.
    side: of the images, by averages (bilinear, antialiased).
    test_examples: how many of the test examples.

  Returns:
    (x [examples, side, side, channels], labels) for train and test.

  Raises:
    measurement.FlagError: if the data set is not there.
  """
  try:
    dataset = data_lib.load(name, train_examples=train_examples)
  except ValueError as error:
    raise measurement.FlagError(str(error)) from error
  splits = []
  for split, count in ((dataset.train, train_examples),
                       (dataset.test, test_examples)):
    x = jnp.asarray(split.images[:count], jnp.float32)
    x = jax.image.resize(
        x, (len(x), side, side, x.shape[3]), 'linear', antialias=True)
    splits.append((x, jnp.asarray(split.labels[:count])))
  mean, std = splits[0][0].mean(), splits[0][0].std()
  return tuple(((x - mean) / std, y) for x, y in splits)


def mlp(
    layers: int, width: int, outputs: int, activation: str
) -> tuple[Any, list[str]]:
  """A network without biases, as in the released code, and its layers' names."""
  act = {'relu': nn.relu, 'tanh': nn.tanh}[activation]
  # PyTorch's: uniform, of variance 1 / (3 fan-in).
  init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  dense = functools.partial(nn.Dense, use_bias=False, kernel_init=init)
  parts = [lambda x: x.reshape(len(x), -1)]
  for _ in range(layers - 1):
    parts += [dense(width), act]
  names = [f'layers_{2 * i + 1}' for i in range(layers)]
  return bpjax.from_linen(nn.Sequential([*parts, dense(outputs)])), names


def uniform_feedback(key: Any, feedback: Mapping[str, Any]) -> dict[str, Any]:
  """Feedback of the released code: uniform in [-1, 1], over the root of width.

  Args:
    key: a random key: one for all networks that shall share their feedback.
    feedback: of `rule.init`, for its shapes: [C, *what the unit reads].
  """
  leaves, structure = jax.tree.flatten(feedback)
  return jax.tree.unflatten(structure, [
      jax.random.uniform(k, l.shape, l.dtype, -1, 1)
      / math.sqrt(math.prod(l.shape[1:]))
      for k, l in zip(jax.random.split(key, len(leaves)), leaves)])


class Trainer:
  """Trains networks of one shape from different initial weights, all at once.

  Plain SGD on losses summed over a batch, as in the released code.

  Attributes:
    net: the network.
    rule: direct feedback alignment, or backprop.
    feedback: of the rule, one for all networks.
    params: of the networks, each leaf [networks, ...].
    epoch: how many are done.
  """

  def __init__(
      self, net, rule, loss, x, y, *, seeds: int, rate: float, batch: int,
      each: bool = False):
    """Draws initial weights and feedback.

    Args:
      net: the network.
      rule: how it is trained.
      loss: of the examples.
      x: inputs [examples, ...].
      y: targets [examples, ...].
      seeds: how many networks; the feedback is the same for all.
      rate: of the summed loss.
      batch: examples of a step; what is left of an epoch is not used.
      each: whether `y` has a first axis more, with targets for each network.
    """
    self.net, self.rule, self.loss, self.epoch = net, rule, loss, 0
    self._x, self._y, self._each = x, y, 0 if each else None
    self._keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    variables = jax.jit(jax.vmap(net.init, (0, None)))(self._keys, x[:1])
    self.params = variables['params']
    one = jax.tree.map(lambda p: p[0], variables)
    self.feedback = uniform_feedback(
        jax.random.key(1000), rule.init(jax.random.key(0), net, one, x[:1]))
    learn, steps = rule.value_and_grad(net, loss), len(x) // batch

    def train(params, key, y, feedback, x, first, last):
      def epoch(i, params):
        order = jax.random.permutation(jax.random.fold_in(key, i), len(x))
        order = order[:steps * batch].reshape(steps, batch)

        def step(params, chosen):
          _, (grads, _) = learn(
              {'params': params}, feedback, x[chosen], y[chosen])
          # Gradients are means, the code's rate is for sums.
          return jax.tree.map(
              lambda p, g: p - rate * batch * g, params, grads), None

        return jax.lax.scan(step, params, order)[0]

      return jax.lax.fori_loop(first, last, epoch, params)

    self._train = jax.jit(jax.vmap(
        train, (0, 0, self._each, None, None, None, None)), donate_argnums=0)
    self._measures = {}

  def advance(self, epoch: int) -> None:
    """Trains until so many epochs are done."""
    self.params = self._train(
        self.params, self._keys, self._y, self.feedback, self._x, self.epoch,
        epoch)
    self.epoch = epoch

  def measure(self, function: Callable[..., Any], *args: Any) -> Any:
    """`function(params of one network, *args)` for all networks, as numpy."""
    return self._measure(function, None, None, *args)

  def measure_each(
      self, function: Callable[..., Any], of_each: Any, *args: Any) -> Any:
    """The same with a last argument that each network has its own of."""
    return self._measure(function, 0, of_each, *args)

  def _measure(self, function, axis, of_each, *args):
    if function not in self._measures:
      call = lambda params, of_each, *args: function(
          params, *args, *([] if axis is None else [of_each]))
      self._measures[function] = jax.jit(jax.vmap(
          call, (0, axis, *(None for _ in args))))
    return jax.tree.map(
        lambda a: np.asarray(a, float),
        self._measures[function](self.params, of_each, *args))


def gradient_alignment(
    net, loss, rule, names: Sequence[str], params, feedback, x, y
) -> alignment.GradientAlignment:
  """Of the hidden layers of a chain, on one batch; pure."""
  variables = {'params': params}
  signals = [
      r.signals(net, loss, variables, f, x, y, None)[1]
      for r, f in ((rule, feedback), (bpjax.rules.backprop(), {}))]
  taught, exact = (
      [jax.tree.leaves(bpjax.paths.subtree(s, name))[0].reshape(len(x), -1)
       for name in names[:-1]] for s in signals)
  return alignment.gradient_alignment(taught, exact)
