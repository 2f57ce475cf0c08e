"""Models of the experiments, found by file: module = function = name."""

import importlib
import pkgutil

from bpjax import paths

_NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))
for _name in _NAMES:
  globals()[_name] = getattr(
      importlib.import_module(f'{__name__}.{_name}'), _name)

__all__ = (*_NAMES, 'get', 'names')


def names() -> tuple[str, ...]:
  """The names of all models."""
  return _NAMES


def get(name: str):
  """The function that makes the model called `name`.

  Args:
    name: one of `names()`.

  Returns:
    The function; it takes `num_classes` and the model's own arguments, and
    returns a `flax.linen.Module` from images `[batch, height, width, channels]`
    to logits `[batch, num_classes]`.

  Raises:
    ValueError: for an unknown name, with the nearest ones.

  Example:
    >>> model = get('mlp')(num_classes=10, widths=(64, 64))
  """
  if not isinstance(name, str) or name not in _NAMES:
    raise ValueError(
        f'`model` must be the name of a model, got {name!r}; '
        f'{paths.nearest(name, _NAMES)}.')
  return globals()[name]
