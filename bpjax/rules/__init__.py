"""Every learning rule, found by its file: module = function = name.

A new rule is a new file here. Those of the library are imported by name, so that
editors and type checkers see them.
"""

from collections.abc import Callable
import importlib
import pkgutil
from typing import Any

from bpjax import paths
from bpjax.by_path import by_path
from bpjax.rules.backprop import backprop
from bpjax.rules.difference_target_propagation import (
  difference_target_propagation,
)
from bpjax.rules.direct_difference_target_propagation import (
  direct_difference_target_propagation,
)
from bpjax.rules.direct_feedback_alignment import direct_feedback_alignment
from bpjax.rules.direct_kolen_pollack import direct_kolen_pollack
from bpjax.rules.direct_random_target_projection import (
  direct_random_target_projection,
)
from bpjax.rules.equilibrium_propagation import equilibrium_propagation
from bpjax.rules.feedback_alignment import feedback_alignment
from bpjax.rules.forward_forward import forward_forward
from bpjax.rules.forward_gradient import forward_gradient
from bpjax.rules.kolen_pollack import kolen_pollack
from bpjax.rules.local_representation_alignment import (
  local_representation_alignment,
)
from bpjax.rules.pepita import pepita
from bpjax.rules.predictive_coding import predictive_coding
from bpjax.rules.recursive_local_representation_alignment import (
  recursive_local_representation_alignment,
)
from bpjax.rules.sign_symmetry import sign_symmetry
from bpjax.rules.spsa import spsa
from bpjax.rules.target_propagation import target_propagation
from bpjax.rules.weight_mirror import weight_mirror

_LIBRARY = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))
_NAMES = _LIBRARY
_REGISTERED: dict[str, Callable[..., Any]] = {}  # From elsewhere.
for _name in _NAMES:
  if not callable(globals().get(_name)):  # A file that is new.
    globals()[_name] = getattr(
        importlib.import_module(f'{__name__}.{_name}'), _name)

__all__ = (
    'backprop',
    'by_path',
    'difference_target_propagation',
    'direct_difference_target_propagation',
    'direct_feedback_alignment',
    'direct_kolen_pollack',
    'direct_random_target_projection',
    'equilibrium_propagation',
    'feedback_alignment',
    'forward_forward',
    'forward_gradient',
    'get',
    'kolen_pollack',
    'local_representation_alignment',
    'names',
    'pepita',
    'predictive_coding',
    'recursive_local_representation_alignment',
    'register',
    'sign_symmetry',
    'spsa',
    'target_propagation',
    'weight_mirror',
)


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
  if not isinstance(name, str) or name not in _NAMES:
    raise ValueError(
        f'`rule` must be the name of a learning rule, got {name!r}; '
        f'{paths.nearest(name, _NAMES)}.')
  return globals()[name]


def register(name: str, make: Callable[..., Any]) -> None:
  """Gives a rule from elsewhere a name, in this process.

  Configs know it by that name, and `names()` has it behind the library's.

  Args:
    name: an identifier that no other rule has; the same `make` may be given
      twice.
    make: makes the rule; configs give it `rule_args`.

  Raises:
    ValueError: for a name that is none or is taken, or a `make` that cannot be
      called.

  Example:
    >>> register('halved', lambda: get('feedback_alignment')(scale=.5))
    >>> get('halved')().name
    'feedback_alignment'
  """
  global _NAMES
  if not isinstance(name, str) or not name.isidentifier():
    raise ValueError(
        f'`name` must be a name such as my_rule, got {name!r}; use letters, '
        'digits and _.')
  if not callable(make):
    raise ValueError(
        f'`make` must be a function that returns a rule, got {make!r}.')
  if name in globals() and name not in _REGISTERED:
    raise ValueError(
        f'`name` must be new, and {name!r} is taken; choose another.')
  _REGISTERED[name] = globals()[name] = make
  _NAMES = (*_LIBRARY, *sorted(_REGISTERED))
