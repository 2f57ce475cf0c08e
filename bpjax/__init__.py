"""bpjax: learning rules that replace backprop, for any Flax or JAX model.

What is named here is imported where it is first used, so that `bpjax.train` can
read a command line and refuse it without loading JAX.
"""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
  from bpjax import engines
  from bpjax import losses
  from bpjax import models
  from bpjax import nn
  from bpjax import paths
  from bpjax import replicated
  from bpjax import rules
  from bpjax import testing
  from bpjax import theory
  from bpjax import train
  from bpjax import transformer
  from bpjax.alignment import alignment
  from bpjax.alignment import growth
  from bpjax.base import Activations
  from bpjax.base import Alignment
  from bpjax.base import Aux
  from bpjax.base import BoundUnit
  from bpjax.base import Credit
  from bpjax.base import Delta
  from bpjax.base import Signal
  from bpjax.base import Unit
  from bpjax.base import UnitInfo
  from bpjax.bottleneck import bottleneck
  from bpjax.inputs import Inputs
  from bpjax.local import losses as local_losses
  from bpjax.local import variants
  from bpjax.local.engine import local
  from bpjax.local.variants import variant
  from bpjax.networks.function import from_function
  from bpjax.networks.linen import from_linen
  from bpjax.networks.nnx import from_nnx
  from bpjax.optimizer import optimizer
  from bpjax.pipeline import pipeline

# Where each name comes from; a module stands for itself.
_HOMES = {
    'Activations': 'bpjax.base', 'Alignment': 'bpjax.base',
    'Aux': 'bpjax.base', 'BoundUnit': 'bpjax.base', 'Credit': 'bpjax.base',
    'Delta': 'bpjax.base', 'Inputs': 'bpjax.inputs', 'Signal': 'bpjax.base',
    'Unit': 'bpjax.base', 'UnitInfo': 'bpjax.base',
    'alignment': 'bpjax.alignment', 'bottleneck': 'bpjax.bottleneck',
    'from_function': 'bpjax.networks.function',
    'from_linen': 'bpjax.networks.linen', 'from_nnx': 'bpjax.networks.nnx',
    'growth': 'bpjax.alignment', 'local': 'bpjax.local.engine',
    'optimizer': 'bpjax.optimizer', 'pipeline': 'bpjax.pipeline',
    'variant': 'bpjax.local.variants',
}
_MODULES = {
    'local_losses': 'bpjax.local.losses', 'variants': 'bpjax.local.variants',
} | {name: f'bpjax.{name}' for name in (
    'engines', 'losses', 'models', 'nn', 'paths', 'replicated', 'rules',
    'testing', 'theory', 'train', 'transformer')}

__all__ = (
    'Activations',
    'Alignment',
    'Aux',
    'BoundUnit',
    'Credit',
    'Delta',
    'Inputs',
    'Signal',
    'Unit',
    'UnitInfo',
    'alignment',
    'bottleneck',
    'engines',
    'from_function',
    'from_linen',
    'from_nnx',
    'growth',
    'local',
    'local_losses',
    'losses',
    'models',
    'nn',
    'optimizer',
    'paths',
    'pipeline',
    'replicated',
    'rules',
    'testing',
    'theory',
    'train',
    'transformer',
    'variant',
    'variants',
)
__version__ = '0.1.0'


def __getattr__(name: str):
  if name in _MODULES:
    value = importlib.import_module(_MODULES[name])
  elif name in _HOMES:
    value = getattr(importlib.import_module(_HOMES[name]), name)
  else:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  globals()[name] = value
  return value


def __dir__():
  return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
  """A module whose functions stand before submodules of the same name.

  Importing `bpjax.alignment` would put that module in the place of the function
  `bpjax.alignment`.
  """

  def __setattr__(self, name, value):
    if not (isinstance(value, types.ModuleType) and name in _HOMES):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
