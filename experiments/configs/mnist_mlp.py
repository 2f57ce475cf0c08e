"""MNIST, 784-256-256-10 with relu, 5 epochs: the network of the README's table.

  python -m experiments.main --config=experiments/configs/mnist_mlp.py \
      --workdir=runs/mnist --config.rule=kolen_pollack

MNIST is read from --config.data_dir or TFDS_DATA_DIR. About 15 s on one CPU
core. The learning rate, one for all rules, is the best of 1e-3, 2e-3 and 4e-3 on
5,000 validation examples (two seeds). At a constant rate of 1e-3, without the
cosine, feedback alignment ends about a point lower, and no run is steady.

Test accuracy, %, mean of three seeds: see the README.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'mnist'
  config.model = 'mlp'
  config.model_args.widths = (256, 256)
  config.model_args.activation = 'relu'
  config.epochs = 5
  config.batch_size = 128
  config.learning_rate = 2e-3
  config.schedule = 'cosine'
  return config
