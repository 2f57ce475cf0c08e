"""CIFAR-10 by recursive LRA, backprop and others, one row a network and a rule.

  python -m experiments.main \
      --config=experiments/configs/reclra_cifar.py:presnet_rlra \
      --workdir=runs/reclra

Backpropagation-free deep learning with recursive local representation
alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023, Table 2 (an earlier
version: https://arxiv.org/abs/2002.03911), which `scripts/reclra_table2.py`
makes. What follows the colon is a row, NETWORK_RULE: cnn, pcnn (with
pseudo-convolutions), cresnet or presnet (ResNet-18 with 64 maps, convolutions
or pseudo-convolutions); bp, wm, rlra, and for cnn also tp, fa and dfa. After
another colon the preset, `paper` or `trial`.

From the text: 5,000 training images held out, global contrast normalisation and
ZCA whitening, a rate of 1e-2 that falls to 1e-5 polynomially after a warm-up of
40, 64 maps, skips of 2. The text leaves open, so that these are choices here:
what 40 counts (epochs), how many epochs there are (150; the best ones in its
table are 104 to 138), the power (1) and the batch size (128), the optimiser
(momentum .9 with BatchNorm; Adam in the CNN without, at a tenth of the rate),
the CNN (`bpjax.models.ororbia_cnn`), the deviation of the noise maps (.1) and
the rules' own settings. Preset `trial` is one epoch with 40 steps of warm-up.

CIFAR-10 is read from --config.data_dir or TFDS_DATA_DIR; whitening it takes a
minute of one CPU core and 1 GiB, once, and a file of 369 MB in the cache.
"""

from bpjax.train import config as config_lib

_TARGETS = 'recursive_local_representation_alignment'
# Network -> the model and its arguments.
NETWORKS = {
    'cnn': ('ororbia_cnn', {}),
    'pcnn': ('ororbia_cnn', {'conv': 'perturbative'}),
    'cresnet': ('resnet18', {'stem': 'cifar', 'widths': (64,) * 4}),
    'presnet': ('resnet18', {
        'stem': 'cifar', 'widths': (64,) * 4, 'conv': 'perturbative'}),
}
# Rule -> its name and arguments.
RULES = {
    'bp': ('backprop', {}),
    'wm': ('weight_mirror', {}),
    'rlra': (_TARGETS, {'wiring': 'chain_in_gap', 'gap': 2}),
    'tp': ('difference_target_propagation', {'inverse': 'relu'}),
    'fa': ('feedback_alignment', {}),
    'dfa': ('direct_feedback_alignment', {}),
}
# In a residual network the outputs of blocks get targets, straight from the
# error, and the inside of a block is trained by backprop from there.
BLOCKS = (('*/boundary', _TARGETS, {'wiring': 'direct'}),)
ROWS = ('cnn_tp', 'cnn_fa', 'cnn_dfa', *(
    f'{network}_{rule}'
    for network in NETWORKS for rule in ('bp', 'wm', 'rlra')))
_STEPS_PER_EPOCH = 45_000 // 128


def get_config(row_and_preset: str = 'cnn_rlra'):
  row, _, preset = row_and_preset.partition(':')
  if row not in ROWS or preset not in ('', 'paper', 'trial'):
    raise ValueError(
        f'the row must be one of {", ".join(ROWS)}, followed by :paper or '
        f':trial, got {row_and_preset!r}.')
  network, rule = row.split('_')
  residual = network.endswith('resnet')
  config = config_lib.default()
  config.rule, config.rule_args = RULES[rule]
  config.model, config.model_args = NETWORKS[network]
  if residual and rule == 'rlra':
    config.rule, config.rule_args = RULES['bp']
    config.rule_by_path = BLOCKS
    config.boundaries = ('stage_*/block_*',)
  if not residual and rule not in ('rlra', 'tp'):
    config.model_args.units = 'affine'
  if rule == 'wm':  # Its feedback has a rate of its own.
    config.feedback_optimizer = 'sgd'
    config.feedback_learning_rate = 1.
  config.dataset = 'cifar10'
  config.validation = 5000
  config.preprocessing = 'gcn_zca'
  config.batch_size = 128
  config.optimizer = 'momentum' if residual else 'adam'
  config.learning_rate = 1e-2 if residual else 1e-3
  config.final_learning_rate = 1e-5
  config.schedule = 'polynomial'
  config.epochs, config.warmup_epochs = 150, 40.
  if preset == 'trial':
    config.epochs, config.warmup_epochs = 1, 40 / _STEPS_PER_EPOCH
  config.keep_checkpoints = 1
  return config
