"""bpjax: learning rules that replace backprop, for any Flax model."""

from bpjax import local_losses
from bpjax import losses
from bpjax import models
from bpjax import nn
from bpjax import paths
from bpjax import replicated
from bpjax import rules
from bpjax import testing
from bpjax import variants
from bpjax.alignment import alignment
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
from bpjax.local import local
from bpjax.networks.function import from_function
from bpjax.networks.linen import from_linen
from bpjax.networks.nnx import from_nnx
from bpjax.optimizer import optimizer
from bpjax.variants import variant

__version__ = '0.1.0'
