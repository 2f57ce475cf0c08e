"""Data: sets by name or path, their splits, their order and their batches."""

from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import Tokens
from bpjax.train.data.sets import Dataset
from bpjax.train.data.sets import from_arrays
from bpjax.train.data.sets import load
from bpjax.train.data.sets import normalise
from bpjax.train.data.sets import Split
from bpjax.train.data.streaming import epoch_order
from bpjax.train.data.streaming import ImageStream
from bpjax.train.data.streaming import Stream

__all__ = (
    'Asked',
    'Dataset',
    'ImageStream',
    'Split',
    'Stream',
    'Tokens',
    'epoch_order',
    'from_arrays',
    'load',
    'normalise',
)
