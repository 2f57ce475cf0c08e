"""LocalMixer and eleven ways to train it, which differ in one field: `rule`.

  python -m experiments.main \
      --config=experiments/configs/local_mixer.py:LG-FG-A:m/1/16:mnist \
      --workdir=runs/local_mixer

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310), Table 3. What follows the first
colon is a variant (`bpjax.variants.names()`), then a size of
`bpjax.models.local_mixer`, then the data set, whose images the patches have to
divide. No augmentation; 2,000 training examples are for validation.

The paper gives settings for ImageNet alone. Here: Adam with a cosine, batches of
128, the same rate for all. After a third colon, another rate: an index into
`CANDIDATES`, which `scripts/local_fg_search.py` tried for every variant, or
'chosen' for the one whose validation accuracy was best (`CHOSEN`).

Data are read from --config.data_dir or TFDS_DATA_DIR.
"""

import bpjax
from bpjax.models.local_mixer import SIZES
from bpjax.train import config as config_lib

# Learning rates of Adam that were tried, the same for all variants.
CANDIDATES = (1e-3, 3e-3, 1e-2)
_DEFAULT = 0  # Of all variants.
# SIZE:DATASET -> variant -> index of its best; results/local_fg_search.json.
CHOSEN = {
    'm/1/16:mnist': {
        'BP': 2, 'L-BP': 1, 'LG-BP': 1, 'FA': 1, 'L-FA': 2, 'LG-FA': 2,
        'DFA': 1, 'FG-W': 2, 'FG-A': 0, 'LG-FG-W': 1, 'LG-FG-A': 0},
}
EPOCHS = {'mnist': 30, 'cifar10': 2}


def get_config(what: str = 'LG-FG-A:m/1/16:mnist'):
  """The config of `VARIANT:SIZE:DATASET`, or with `:CANDIDATE` behind."""
  variant, size, dataset, rate = (*what.split(':'), '', '', '')[:4]
  if (variant not in bpjax.variants.names() or size not in SIZES or not dataset
      or what.count(':') > 3):
    raise ValueError(
        'the config must be VARIANT:SIZE:DATASET[:RATE], with a variant of '
        f'{", ".join(bpjax.variants.names())} and a size of '
        f'{", ".join(SIZES)}, got {what!r}.')
  config = config_lib.default()
  config.rule = variant
  config.model = 'local_mixer'
  config.model_args = {'size': size}
  config.units = ('block_*/*',)  # With their norms: noise comes after these.
  config.dataset = dataset
  config.validation = 2000
  config.epochs = EPOCHS.get(dataset, 10)
  config.batch_size = 128
  config.optimizer = 'adam'
  config.learning_rate = CANDIDATES[candidate(variant, size, dataset, rate)]
  config.schedule = 'cosine'
  config.keep_checkpoints = 1
  return config


def candidate(variant: str, size: str, dataset: str, which: str) -> int:
  """The index of a rate: '' for that of all, 'chosen', or a number as text."""
  if which == 'chosen':
    # One size's choice serves the others on the same data.
    of_data = {k.partition(':')[2]: v for k, v in CHOSEN.items()}
    found = CHOSEN.get(f'{size}:{dataset}', of_data.get(dataset, {}))
    return found.get(variant, _DEFAULT)
  if which and which not in map(str, range(len(CANDIDATES))):
    raise ValueError(
        "what follows the data set must be 'chosen' or a number below "
        f'{len(CANDIDATES)}, got {which!r}.')
  return int(which or _DEFAULT)
