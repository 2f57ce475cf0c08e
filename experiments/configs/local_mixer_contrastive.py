"""LocalMixer without labels: two views of each image, in eleven ways.

  python -m experiments.main \
      --config=experiments/configs/local_mixer_contrastive.py:LG-FG-A \
      --workdir=runs/local_mixer_contrastive

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310), Table 4, which
`scripts/local_fg_contrastive.py` makes. What follows the colon is a variant
(`bpjax.variants.names()`), then a preset: `full` or `small`. Configs of a preset
differ in one field, `rule`.

Full: LocalMixer M/8/16 on CIFAR-10, crops of at least .08 of an image, flips,
jitter, blur and solarisation, a projection to 128 at temperature .5; LARS with
momentum .9, its rate 1 for 256 images, linear in the batch (the released code has
.1 on ImageNet), L2 of 1e-4 of all kernels (there not of heads and readout), 10
epochs of warm-up and a cosine. Each view has noise of its own (there the same).
The readout learns the labels from what the network puts out, at the same time, by
momentum with a rate of .01 (there for an epoch after each epoch); no error goes
back from it. The paper's epochs for CIFAR-10 are not public: 400 here, on a GPU.
Small: 2,000 images, 64 channels, 2 blocks, 16 patches, 3 epochs of Adam (LARS
needs more steps), in a minute on one CPU core.
"""

import bpjax
from bpjax.train import config as config_lib

PRESETS = ('full', 'small')


def get_config(variant_and_preset: str = 'LG-FG-A'):
  variant, _, preset = variant_and_preset.partition(':')
  if (variant not in bpjax.variants.names()
      or preset not in ('', *PRESETS)):
    raise ValueError(
        f'the variant must be one of {", ".join(bpjax.variants.names())}, '
        f'followed by :full or :small, got {variant_and_preset!r}.')
  config = config_lib.default()
  config.rule = variant
  config.rule_args = {'last': 'block_3'}
  config.model = 'local_mixer'
  config.model_args = {'size': 'm/8/16'}
  config.units = ('block_*/*',)
  config.dataset = 'cifar10'
  config.augment = 'contrastive'
  config.augment_args = {'area': .08}
  config.epochs, config.warmup_epochs = 400, 10.
  config.batch_size = 128
  config.optimizer = 'lars'
  config.learning_rate = 1. * config.batch_size / 256
  config.schedule = 'cosine'
  config.l2 = 1e-4
  config.optimizer_by_path = (('readout', 'momentum', .01),)
  config.keep_checkpoints = 1
  if preset == 'small':
    config.rule_args.last = 'block_1'
    config.model_args.update({
        'blocks': 2, 'patches': 4, 'channels': 64, 'groups': 8})
    config.train_examples = 2000
    config.epochs, config.warmup_epochs = 3, 0.
    config.optimizer, config.learning_rate = 'adam', 1e-3
  return config
