"""Characters of Shakespeare's plays, predicted from those before them.

  python -m experiments.main --config=experiments/configs/tiny_shakespeare.py \
      --workdir=runs/shakespeare --config.rule=kolen_pollack

Karpathy's 40,000 lines, split 90 / 5 / 5 by characters; read from
--config.data_dir or TFDS_DATA_DIR. Another text by --config.dataset=FILE.txt, byte
pairs in place of characters by --config.tokenizer=bpe: bits a character compare.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'tiny_shakespeare'
  config.length = 128
  config.model = 'gpt'
  config.model_args.depth = 2
  config.model_args.width = 96
  config.model_args.heads = 4
  config.model_args.norm = 'pre'
  config.model_args.dropout = 0.
  config.epochs = 8
  config.batch_size = 32
  config.eval_batch_size = 100
  config.optimizer = 'adamw'
  config.learning_rate = 2e-3
  config.schedule = 'cosine'
  config.warmup_steps = 100
  config.weight_decay = .01
  config.clip_norm = 1.
  return config
