"""bpjax: learning rules that replace backprop, for any Flax or JAX model."""

from bpjax import engines
from bpjax import losses
from bpjax import models
from bpjax import nn
from bpjax import paths
from bpjax import replicated
from bpjax import rules
from bpjax import testing
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
    'transformer',
    'variant',
    'variants',
)
__version__ = '0.1.0'
