"""CIFAR-10, three convolutions and two dense layers, by direct feedback.

  python -m experiments.main --config=experiments/configs/launay_cnn.py:norm \
      --workdir=runs/launay_cnn

Principled training of neural networks with direct feedback alignment, Launay,
Poli and Krzakala, 2019, Table 4 (https://arxiv.org/abs/1906.04554): the
network `launay_cnn`. What follows the colon is a row of the table that
`scripts/launay_table4.py` makes, and after another colon the preset, `paper`
or `code`, as in launay_mlp.py: `norm:code`. They differ in how the weights
begin.

CIFAR-10 is read from --config.data_dir or TFDS_DATA_DIR. Test accuracy in the
paper: 62.65% with row norm.
"""

from experiments.configs import launay_mlp

# Row -> arguments of the model; {} where only the rule's differ.
ROWS = {
    'norm': {},
    'no_norm': {},
    'batch_norm': {'batch_norm': True},
    'dropout_.5': {'input_dropout': .1, 'dropout': .5},
    'dropout_.1': {'input_dropout': .1, 'dropout': .1},
}


def get_config(row_and_preset: str = 'norm'):
  row, _, preset = row_and_preset.partition(':')
  if row not in ROWS or preset not in ('', 'paper', 'code'):
    raise ValueError(
        f'the row must be one of {", ".join(ROWS)}, followed by :paper or '
        f':code, got {row_and_preset!r}.')
  config = launay_mlp.get_config(f'tanh_norm:{preset}')
  config.rule_args.normalise = row != 'no_norm'
  config.model = 'launay_cnn'
  config.model_args.update(ROWS[row])
  return config
