"""MNIST, 784-500-10 with sigmoids: the network of the weight mirror's authors.

  python -m experiments.main \
      --config=experiments/configs/akrout_mnist.py:weight_mirror \
      --workdir=runs/akrout

Deep learning without weight transport, Akrout, Wilson, Humphreys, Lillicrap and
Tweed, NeurIPS 2019 (https://arxiv.org/abs/1904.05391). What follows the colon
is a row of the table that `scripts/akrout_mnist.py` makes. Rates, batch and
epochs are those of the authors' code; pixels in [0, 1]. W and B are normal with
variance 1 / (fan-in + fan-out).

The authors' mirror has no decay, so that B grows without bound; here, the decay
equals the rate and B comes to W itself. With a rate of .001 the noise in B is at
2.5 degrees of W: sqrt(rate * 500 / (2 * 128)). The row `weight_mirror_code` has
the mirror of their program: uniform noise, sigmoids, biases on, no decay.
"""

import math

from bpjax.train import config as config_lib

ROWS = {
    'backprop': .2, 'feedback_alignment': .2, 'weight_mirror': .05,
    'kolen_pollack': .3, 'weight_mirror_code': .05}
_FAN_IN, _FAN_OUT = 500, 10  # Of the only matrix that sends anything.


def get_config(row: str = 'backprop'):
  if row not in ROWS:
    raise ValueError(f'the row must be one of {", ".join(ROWS)}, got {row!r}.')
  config = config_lib.default()
  config.rule = row.removesuffix('_code')
  config.dataset = 'mnist'
  config.pixel_mean, config.pixel_std = (0.,), (1.,)
  config.model = 'mlp'
  config.model_args = {
      'widths': (500,), 'activation': 'sigmoid', 'init': 'fan_sum'}
  config.loss = 'sigmoid_cross_entropy'
  config.epochs = 400
  config.batch_size = 128
  config.optimizer = 'sgd'
  config.learning_rate = ROWS[row]
  config.alignment_every = config.checkpoint_every = 10 * 468
  if row != 'backprop':
    config.rule_args.scale = math.sqrt(_FAN_IN / (_FAN_IN + _FAN_OUT))
  if row == 'weight_mirror':
    config.rule_args.rate = config.rule_args.decay = .001
  if row == 'weight_mirror_code':
    config.rule_args.update({
        'decay': 0., 'sigma': .1, 'noise': 'uniform', 'activation': 'sigmoid',
        'bias': True})
  if config.rule == 'weight_mirror':
    config.feedback_optimizer = 'sgd'
    config.feedback_learning_rate = 1.
    config.mirror_first = 468
  return config
