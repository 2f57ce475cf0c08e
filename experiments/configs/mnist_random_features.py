"""The control of the MNIST table: a readout on frozen random features.

The network of mnist_mlp.py with the hidden layers as they were drawn: what a
rule has to beat to show that it trains anything but the readout.

  python -m experiments.main \
      --config=experiments/configs/mnist_random_features.py --workdir=runs/frozen

About 15 s on one CPU core.
"""

from experiments.configs import mnist_mlp


def get_config():
  config = mnist_mlp.get_config()
  config.rule = 'backprop'
  config.frozen = ('Dense_0', 'Dense_1')
  return config
