"""ListOps: nested lists of digits reduced to one digit, a task of structure.

  python -m experiments.main --config=experiments/configs/listops.py \
      --workdir=runs/listops --config.rule=kolen_pollack

The examples are generated, see `bpjax.train.data.generated.listops`; ten classes of
one size. The control keeps the blocks as they are drawn:
--config.frozen="('block_*',)". After the forty epochs, one seed, test accuracy: 93.6%
with backprop, 58.0% with frozen blocks; backprop is above them at every epoch, and
at 79.6% after the twelfth. A step takes some 12 ms on an idle core.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'listops'
  config.dataset_args.depth = 2
  config.dataset_args.train = 100_000
  config.dataset_args.arguments = 4
  config.length = 24
  config.model = 'bert_encoder'
  config.model_args.depth = 2
  config.model_args.width = 64
  config.model_args.heads = 4
  config.model_args.hidden = 128
  config.model_args.dropout = 0.
  config.epochs = 40
  config.batch_size = 64
  config.optimizer = 'adamw'
  config.learning_rate = 2e-3
  config.schedule = 'cosine'
  config.warmup_epochs = .5
  config.weight_decay = .01
  return config
