"""Weight mirror: feedback weights that learn the forward ones from noise.

Deep learning without weight transport, Akrout, Wilson, Humphreys, Lillicrap and
Tweed, NeurIPS 2019 (https://arxiv.org/abs/1904.05391).
"""

import functools

from bpjax import arguments
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax import paths
from bpjax.activations import get as activation_named
from bpjax.engines import credit
from bpjax.networks import examples
from bpjax.rules.feedback_alignment import feedback_alignment
import jax
import jax.numpy as jnp

_NOISE = ('normal', 'uniform')


def weight_mirror(
    rate: float = .01, decay: float = .01, sigma: float = 1.,
    samples: int = 128, activation: str = 'identity', noise: str = 'normal',
    bias: bool = False, scale: float = 1.) -> credit.Rule:
  r"""Weight mirror: feedback alignment whose B correlates noise with its echo.

  Engaged, the rule is feedback alignment with the present B. Mirroring, each
  unit alone is fed zero-mean noise x of variance :math:`\sigma^2`, with its bias
  off, and B moves towards W by the correlation with what comes out:

  .. math::
    y = \psi(x W), \qquad B \leftarrow (1 - \lambda) B + \eta\, x^T y / M

  In expectation :math:`x^T y / M = \sigma^2 W \mathrm{diag}(E\psi')`, so with
  the identity B comes to :math:`(\eta \sigma^2 / \lambda) W`, and to W itself
  with the defaults. The term depends on the key and on shapes, not on the data.
  In a convolution each tap of the kernel is divided by the number of positions
  that it sees, since padding hides some of them from the outer taps. Of weights
  that the data picks for each example (experts), the term is the mean over
  examples, so that those seldom picked move slowly.

  It is a term of `feedback_grads`, gradient-signed: the step above is SGD with
  learning rate 1 on the feedback, an optimiser of its own
  (`optax.multi_transform`, or the launcher's `feedback_optimizer='sgd'` with
  `feedback_learning_rate=1.`). A mirror-only step uses `feedback_grads` alone:
  under `jax.jit` the model's passes are then never run. When to mirror is the
  trainer's schedule.

  Tried: MNIST, two layers of 256 relu units, 5 epochs, batch 128, Adam 2e-3 with
  a cosine for W, SGD at 1 with the same cosine for B: 97.8% test accuracy, 98.2%
  after 1,000 steps of mirroring alone (backprop: 98.4%); alignment .998. At a
  constant rate of 1e-3, 95.9%. What fails: noise with a mean (B comes to a
  rank-one term), a nonlinearity with biases on (each unit gets a gain of its
  own), large rates with few samples (B is noisy).

  The authors' released code: `weight_mirror(decay=0., sigma=.1,
  noise='uniform', activation='sigmoid', bias=True)`: uniform noise
  .1 (u - 1/2), no growth control.

  Args:
    rate: :math:`\eta`.
    decay: :math:`\lambda`.
    sigma: standard deviation of normal noise; width of uniform noise.
    samples: number M of noise vectors (or images) a step.
    activation: :math:`\psi`, a name that `bpjax.activations.get` knows.
    noise: 'normal', or 'uniform' on `[-sigma/2, sigma/2]`.
    bias: leave the biases on.
    scale: factor on the standard deviation of the first B, `1/sqrt(fan-in)`.

  Returns:
    A rule; `feedback` is `{'kernel': B}` at each unit with something trainable
    below it, and all of it is trainable. `learn` needs a `key`.

  Raises:
    ValueError: for a value out of range.

  Example:
    >>> import bpjax, optax
    >>> rule = bpjax.rules.weight_mirror()
    >>> tx = optax.multi_transform(  # Over (params, feedback).
    ...     {'w': optax.adam(1e-3), 'b': optax.sgd(1.)}, ('w', 'b'))
  """
  for name, value in (('rate', rate), ('sigma', sigma), ('scale', scale)):
    arguments.number(name, value, above=0)
  arguments.number('decay', decay, least=0, below=1)
  arguments.whole('samples', samples)
  samples = int(samples)
  arguments.choice('noise', noise, _NOISE)
  arguments.flag('bias', bias)
  psi = activation_named(activation)
  alignment = feedback_alignment(scale)

  def draw(key, shape, dtype):
    if noise == 'normal':
      return sigma * jax.random.normal(key, shape, dtype)
    return sigma * (jax.random.uniform(key, shape, dtype) - .5)

  def mirror(unit, params, inputs, key):
    """x^T y / M, each weight's sum divided by the positions that it sees."""
    def filled(count, make):
      """`make(number, shape, dtype)` for each input, of `count` examples.

      Whole numbers, such as how many examples an expert has, stay.
      """
      made = []
      for i, x in enumerate(inputs):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
          made.append(x)
          continue
        place = unit.info.place(i)
        first = jax.eval_shape(functools.partial(examples.first, place=place), x)
        made.append(examples.back(
            make(i, (count, *first.shape[1:]), x.dtype), x.shape, place))
      return tuple(made)

    if not bias:
      params = paths.map_with_name(
          lambda name, p: (
              jnp.zeros_like(p) if name.rpartition('/')[2] == 'bias' else p),
          params)

    def correlation(x, y):
      seen = base.Activations(x, y, y)
      return feedback_lib.stands_for(
          unit.params_vjp(params, seen, base.Delta(y)))

    keys = jax.random.split(key, len(inputs))
    x = filled(samples, lambda i, *like: draw(keys[i], *like))
    y = psi(unit.affine(params, x))
    # Where the data picks the weights, each set has examples of its own.
    few = inputs[0].shape[0] if unit.info.by_example else 1
    ones = filled(few, lambda i, *like: jnp.ones(*like))
    positions = correlation(ones, jnp.ones_like(unit.affine(params, ones)))
    return jax.tree.map(
        lambda c, n: c * few / (samples * jnp.where(n == 0, 1, n)),
        correlation(x, y), positions)

  def backward(unit, params, feedback, activations, signal):
    aligned = alignment.backward(unit, params, feedback, activations, signal)
    if not feedback or not unit.info.sends:  # A lookup in a readout's weights.
      return aligned
    echo = mirror(unit, params, activations.inputs, signal.key)
    # The engine divides by the number of losses; this is no sum over examples.
    factor = signal.divisor
    if unit.info.by_example:
      factor = factor / len(activations.inputs[0])
    update = jax.tree.map(
        lambda b, c: factor * (decay * b - rate * c), feedback, echo)
    return aligned._replace(feedback=update)

  return credit.Rule(
      name='weight_mirror', init_unit=alignment.init_unit, backward=backward,
      learns_feedback=True, stochastic=True, mirrors=True,
      weight_target=alignment.weight_target)
