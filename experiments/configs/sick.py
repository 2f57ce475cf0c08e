"""SICK: does a sentence follow from another, contradict it, or neither?

  python -m experiments.main --config=experiments/configs/sick.py \
      --workdir=runs/sick --config.rule=feedback_alignment

Pairs of sentences with the three labels of MNLI, which `--config.dataset=
glue/mnli` reads in the same way where it is prepared. A SICK cure for the
evaluation of compositional distributional semantic models, Marelli et al., LREC
2014. Read from --config.data_dir or TFDS_DATA_DIR. Settings are chosen on 1,000
of the training pairs; the most frequent label makes up 56.4% of the test pairs.
"""

from experiments.configs import sst2


def get_config():
  config = sst2.get_config()
  config.dataset = 'sick'
  config.validation = 1000
  config.length = 48
  config.epochs = 8
  return config
