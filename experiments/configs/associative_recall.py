"""Associative recall: the value that came with a key, a task of structure.

  python -m experiments.main --config=experiments/configs/associative_recall.py \
      --workdir=runs/recall --config.rule=kolen_pollack

The examples are generated, see `bpjax.train.data.generated.associative_recall`; several
keys are asked in each row, of a causal model. The control keeps the blocks as they
are drawn: --config.frozen="('block_*',)". Test accuracy after the two epochs, one
seed: 100.0% with backprop, 25.3% with frozen blocks, which catch up when they are
trained for ten (99.98%); chance is 6.25%.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'associative_recall'
  config.dataset_args.pairs = 8
  config.dataset_args.queries = 8
  config.dataset_args.keys = 16
  config.dataset_args.values = 16
  config.dataset_args.train = 20_000
  config.model = 'gpt'
  config.model_args.depth = 2
  config.model_args.width = 64
  config.model_args.heads = 4
  config.model_args.hidden = 128
  config.model_args.norm = 'pre'
  config.model_args.dropout = 0.
  config.epochs = 2
  config.batch_size = 64
  config.optimizer = 'adamw'
  config.learning_rate = 2e-3
  config.schedule = 'cosine'
  config.warmup_epochs = .5
  config.weight_decay = .01
  return config
