"""SICK: does a sentence follow from another, contradict it, or neither?

  python -m experiments.main --config=experiments/configs/sick.py \
      --workdir=runs/sick --config.rule=feedback_alignment

Pairs of sentences with the three labels of MNLI, which `--config.dataset=
glue/mnli` reads in the same way where it is prepared. A SICK cure for the
evaluation of compositional distributional semantic models, Marelli et al., LREC
2014. Read from --config.data_dir or TFDS_DATA_DIR. Settings are chosen on 1,000
of the training pairs; the most frequent label makes up 56.4% of the test pairs.
"""

from experiments import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'sick'
  config.validation = 1000
  config.length = 48
  config.model = 'bert_encoder'
  config.model_args.depth = 2
  config.model_args.width = 64
  config.model_args.heads = 4
  config.model_args.hidden = 128
  config.model_args.dropout = .1
  config.epochs = 8
  config.batch_size = 64
  config.optimizer = 'adamw'
  config.learning_rate = 1e-3
  config.schedule = 'cosine'
  config.weight_decay = .01
  return config
