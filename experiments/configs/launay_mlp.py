"""CIFAR-10, 3072-800-800-800-10: the practices of direct feedback, one a row.

  python -m experiments.main \
      --config=experiments/configs/launay_mlp.py:tanh_norm \
      --workdir=runs/launay

Principled training of neural networks with direct feedback alignment, Launay,
Poli and Krzakala, 2019, Table 2 (https://arxiv.org/abs/1906.04554). What follows
the colon is a row of the table that `scripts/launay_table2.py` makes, and after
another colon the preset: `tanh_norm:code`.

Preset `paper`: the text's, weights by He's rule. Preset `code`: the same rows with
the initial weights of the authors' program, PyTorch's uniform ones, and two more
rows with the slopes of its leaky units, .5 and .1 where the text has -.5 and .01.
Both: SGD, 50 epochs, no augmentation, one shared matrix, and the program's
reduction, of which the text says nothing: a sum over the batch in the hidden
layers, a mean in the readout. (With a mean everywhere, 6 epochs reach 25%.)
Alignment is measured at each epoch's end on the first 128 test images.
"""

from bpjax.train import config as config_lib

# Row -> arguments of the model; {} where only the rule's differ.
ROWS = {
    'tanh_norm': {},
    'tanh_no_norm': {},
    'tanh_batch_norm': {'batch_norm': True},
    'abs_norm': {'activation': 'abs'},
    'relu_norm': {'activation': 'relu'},
    'leaky_steep_norm': {'activation': 'leaky_relu(-.5)'},
    'leaky_flat_norm': {'activation': 'leaky_relu(.01)'},
    'tanh_norm_dropout_.5': {'input_dropout': .1, 'dropout': .5},
    'tanh_norm_dropout_.1': {'input_dropout': .1, 'dropout': .1},
}
CODE_ROWS = ROWS | {
    'leaky_half_norm': {'activation': 'leaky_relu(.5)'},
    'leaky_tenth_norm': {'activation': 'leaky_relu(.1)'},
}
_SLOW = ('abs_norm', 'leaky_steep_norm')  # At 1e-4, says the text.


def get_config(row_and_preset: str = 'tanh_norm'):
  row, _, preset = row_and_preset.partition(':')
  preset = preset or 'paper'
  rows = {'paper': ROWS, 'code': CODE_ROWS}.get(preset, {})
  if row not in rows:
    raise ValueError(
        f'the row must be one of {", ".join(CODE_ROWS)}, followed by :code, or '
        f'by :paper but for the last two, got {row_and_preset!r}.')
  config = config_lib.default()
  config.rule = 'direct_feedback_alignment'
  config.rule_args.shared = True
  config.rule_args.normalise = row != 'tanh_no_norm'
  config.dataset = 'cifar10'
  config.pixel_mean = (.4914, .4822, .4465)
  config.pixel_std = (.2023, .1994, .2010)
  config.model = 'launay_mlp'
  config.model_args = {
      'activation': 'tanh', 'init': 'he' if preset == 'paper' else 'torch',
      **rows[row]}
  config.epochs = 50
  config.batch_size = 128
  config.optimizer = 'sgd'
  config.learning_rate = 1e-4 if row in _SLOW else 5e-4
  config.reduction_by_path = (('readout', 'mean'), ('*', 'sum'))
  config.alignment_every = 390
  config.alignment_split = 'test'
  config.checkpoint_every = 10 * 390
  config.keep_checkpoints = 1
  return config
