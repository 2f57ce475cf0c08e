"""CIFAR-10 by a vision transformer: a rule and a depth a row.

  python -m experiments.main \
      --config=experiments/configs/vit_cifar.py:feedback_alignment:4 \
      --workdir=runs/vit

A pre-norm vision transformer of width 128 with patches of 4, without augmentation;
what follows the first colon is a rule of `experiments.transformers.RULES` and the
number of blocks. Read from --config.data_dir or TFDS_DATA_DIR.
"""

from bpjax.train import config as config_lib
from experiments import transformers


def get_config(what: str = 'backprop:4'):
  rule, _, depth = what.partition(':')
  if (rule not in transformers.RULES or not depth.isdecimal()
      or int(depth) < 1):
    raise ValueError(
        'the config must be RULE:DEPTH, with a rule of '
        f'{", ".join(transformers.RULES)} and a number of blocks, got {what!r}.')
  config = config_lib.default()
  config.dataset = 'cifar10'
  config.validation = 2000
  config.model = 'vit'
  config.model_args = {'depth': int(depth), 'width': 128, 'heads': 4}
  config.epochs = 30
  config.batch_size = 128
  config.eval_batch_size = 200
  config.optimizer = 'adamw'
  config.schedule = 'cosine'
  config.warmup_epochs = 1.
  config.keep_checkpoints = 1
  return transformers.configured(config, rule)
