"""Every field at its default: to start from with data or a model of your own.

python -m experiments.main --config=experiments/configs/plain.py \
    --workdir=runs/mine --config.dataset=PATH --config.model=FILE.py:CLASS
"""

from bpjax.train import config as config_lib


def get_config():
  """Every field at its default."""
  return config_lib.default()
