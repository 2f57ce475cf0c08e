"""SST-2: is a sentence of a film review positive? A small encoder, from scratch.

  python -m experiments.main --config=experiments/configs/sst2.py \
      --workdir=runs/sst2 --config.rule=kolen_pollack \
      --config.model_args.depth=2

Recursive deep models for semantic compositionality over a sentiment treebank,
Socher et al., EMNLP 2013, as in GLUE (https://arxiv.org/abs/1804.07461). Read
from --config.data_dir or TFDS_DATA_DIR. The published test split has no labels:
`test` is the validation split of 872 sentences, and settings are chosen on 5,000
of the 67,349 training examples, most of which are phrases.

Sentiment is decided by words: with the blocks frozen,
--config.frozen="('block_*',)", nothing is lost: accuracy on the 872 sentences, one
seed, 80.5% with backprop and 80.6% with frozen blocks. For claims about
transformers see listops.py and associative_recall.py.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'glue/sst2'
  config.validation = 5000
  config.length = 32
  config.model = 'bert_encoder'
  config.model_args.depth = 2
  config.model_args.width = 64
  config.model_args.heads = 4
  config.model_args.hidden = 128
  config.model_args.dropout = .1
  config.epochs = 2
  config.batch_size = 64
  config.optimizer = 'adamw'
  config.learning_rate = 1e-3
  config.schedule = 'cosine'
  config.weight_decay = .01
  return config
