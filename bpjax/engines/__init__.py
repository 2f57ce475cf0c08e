"""Engines: how a network is trained, with a rule of one unit or as a whole."""

from bpjax.engines.base import Base
from bpjax.engines.credit import Rule as UnitRule

__all__ = ('Base', 'UnitRule')
