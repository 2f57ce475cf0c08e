"""MNIST, 784-256x5-10 with relu, batch 128: the network that is timed.

The same shape as the first workload of benchmarks/step_time.py, so that the
median step time of `summary.json` can be held against the bare step there.

  python -m experiments.main --config=experiments/configs/mnist_w1.py \
      --workdir=runs/w1

MNIST is read from --config.data_dir or TFDS_DATA_DIR. About 9 s on one CPU
core. Test accuracy with backprop after its one epoch, seed 0: 96.7%.
"""

from bpjax.train import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset = 'mnist'
  config.model = 'mlp'
  config.model_args.widths = (256,) * 5
  config.model_args.activation = 'relu'
  config.epochs = 1
  config.batch_size = 128
  config.learning_rate = 1e-3
  return config
