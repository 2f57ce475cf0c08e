"""Every learning rule, found by its file: module = function = name.

A new rule is a new file here; nothing else is edited.
"""

import importlib
import pkgutil

from bpjax import paths
from bpjax.by_path import by_path

_NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))
for _name in _NAMES:
  globals()[_name] = getattr(
      importlib.import_module(f'{__name__}.{_name}'), _name)

__all__ = (*_NAMES, 'by_path', 'get', 'names')


def names() -> tuple[str, ...]:
  """The names of all rules.

  Example:
    >>> 'backprop' in names()
    True
  """
  return _NAMES


def get(name: str):
  """The function that makes the rule called `name`.

  Args:
    name: one of `names()`.

  Returns:
    The function; call it with the rule's own arguments.

  Raises:
    ValueError: for an unknown name, with the nearest ones.

  Example:
    >>> rule = get('feedback_alignment')(scale=.5)
  """
  if name not in _NAMES:
    raise ValueError(
        f'`rule` must be the name of a learning rule, got {name!r}; '
        f'{paths.nearest(name, _NAMES)}.')
  return globals()[name]
