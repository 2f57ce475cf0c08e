"""CIFAR-10, ResNet-20 with BatchNorm: backprop and five rules, one a row.

  python -m experiments.main --config=experiments/configs/resnet_cifar.py:usf \
      --workdir=runs/resnet

The rows of a table of BioTorch, Benchmarking the accuracy and robustness of
feedback alignment algorithms, Sanfiz and Akrout, 2021
(https://arxiv.org/abs/2108.13446), which `scripts/resnet_cifar.py` makes. As
in the authors' benchmark: SGD with momentum .9, batch 128, rate .1 (.001 for
direct feedback alignment). Theirs are 250 epochs with flips and crops and a
rate that falls tenfold at 100, 150 and 200; here, few epochs without, under a
cosine. Their decay is an L2 term of 1e-4 in the gradient, which shrinks
weights by 1e-4 times the rate / (1 - .9) a step; here, by half of that, its
mean over the cosine.

CIFAR-10 is read from --config.data_dir or TFDS_DATA_DIR. A step takes .5
to .8 s on one CPU core. Test error in their table, %: 8.63 with backprop.
"""

from bpjax.train import config as config_lib

# Row -> the rule, its arguments, and the learning rate.
ROWS = {
    'backprop': ('backprop', {}, .1),
    'feedback_alignment': ('feedback_alignment', {}, .1),
    'direct_feedback_alignment': ('direct_feedback_alignment', {}, .001),
    'usf': ('sign_symmetry', {'variant': 'uSF'}, .1),
    'brsf': ('sign_symmetry', {'variant': 'brSF'}, .1),
    'frsf': ('sign_symmetry', {'variant': 'frSF'}, .1),
}


def get_config(row: str = 'backprop'):
  if row not in ROWS:
    raise ValueError(f'the row must be one of {", ".join(ROWS)}, got {row!r}.')
  config = config_lib.default()
  config.rule, config.rule_args, config.learning_rate = ROWS[row]
  config.dataset = 'cifar10'
  config.model = 'resnet20'
  config.epochs = 5
  config.batch_size = 128
  config.optimizer = 'momentum'
  config.schedule = 'cosine'
  config.weight_decay = .5 * 1e-4 * config.learning_rate / (1 - config.momentum)
  config.alignment_every = 390
  config.alignment_split = 'test'
  config.keep_checkpoints = 1
  return config
