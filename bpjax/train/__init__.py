"""Training: the loop of the launchers, with its data, checkpoints and logs.

Needs the extra: `pip install 'bpjax[train]'`. `import bpjax` imports none of it,
and what is named here is imported where it is first used.
"""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
  from bpjax.train.data.sets import Dataset
  from bpjax.train.data.sets import load
  from bpjax.train.fit import dataset
  from bpjax.train.fit import fit
  from bpjax.train.fit import Fitted
  from bpjax.train.loop.run import NonFiniteError

_HOMES = {
    'Dataset': 'bpjax.train.data.sets', 'load': 'bpjax.train.data.sets',
    'dataset': 'bpjax.train.fit', 'fit': 'bpjax.train.fit',
    'Fitted': 'bpjax.train.fit', 'NonFiniteError': 'bpjax.train.loop.run',
}

__all__ = ('Dataset', 'Fitted', 'NonFiniteError', 'dataset', 'fit', 'load')


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  try:
    value = getattr(importlib.import_module(_HOMES[name]), name)
  except ModuleNotFoundError as error:
    raise ImportError(
        f'`bpjax.train.{name}` needs the Python package {error.name}; install '
        "the extra with `pip install 'bpjax[train]'`.") from error
  globals()[name] = value
  return value


class _Package(types.ModuleType):
  """The function `fit` stands before the submodule of that name."""

  def __setattr__(self, name, value):
    if not (isinstance(value, types.ModuleType) and name in _HOMES):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
