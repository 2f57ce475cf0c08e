"""MNIST and Fashion-MNIST, eight layers of 256: recursive LRA against backprop.

  python -m experiments.main \
      --config=experiments/configs/reclra_deep.py:recursive:sigmoid:mnist \
      --workdir=runs/reclra_deep

Backpropagation-free deep learning with recursive local representation
alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023 (an earlier version:
https://arxiv.org/abs/2002.03911), Figure 2, which `scripts/reclra_fig2.py`
draws: 'backprop' or 'recursive', then 'sigmoid' or 'tanh', then the data set.
Gaussian initial weights, of variance 1 / (fan-in + fan-out), 100 epochs. The
paper gives no rate; Adam at 1e-3 here, for both.
"""

from bpjax.train import config as config_lib

RULES = ('backprop', 'recursive')
ACTIVATIONS = ('sigmoid', 'tanh')
DATASETS = ('mnist', 'fashion_mnist')


def get_config(what: str = 'recursive:sigmoid:mnist'):
  parts = what.split(':')
  known = (RULES, ACTIVATIONS, DATASETS)
  if len(parts) != 3 or any(p not in k for p, k in zip(parts, known)):
    raise ValueError(
        'the config must be RULE:ACTIVATION:DATASET, such as '
        f'recursive:sigmoid:mnist, got {what!r}.')
  rule, activation, dataset = parts
  config = config_lib.default()
  if rule == 'recursive':
    config.rule = 'recursive_local_representation_alignment'
    config.rule_args = {'wiring': 'direct'}
  config.dataset = dataset
  config.validation = 2000
  config.model = 'mlp'
  config.model_args = {
      'widths': (256,) * 8, 'activation': activation, 'units': 'layer',
      'init': 'fan_sum'}
  config.epochs = 100
  config.batch_size = 128
  config.optimizer = 'adam'
  config.learning_rate = 1e-3
  config.keep_checkpoints = 1
  return config
