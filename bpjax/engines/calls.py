"""Equal calls of a model are traced once, and stay calls of one function.

Twelve layers of one shape are twelve times the same equations, and a rule that
answers for one of their units answers alike for the others, unless it asks what
tells them apart. So an info that remembers what is read of it goes with the first
through the whole of its program; units that would answer the same share that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from bpjax import base
import jax

_FEW = 3  # Fewer calls are sooner traced one by one.


class Kept:
  """The functions of units in one trace of a model.

  Args:
    alike: `TraceUnit.program` -> how many calls have it.
  """

  def __init__(self, alike: Mapping[Hashable, int]):
    self._alike = alike
    self._functions: dict[Hashable, list[tuple[Mapping[str, Any], Any]]] = {}

  def find(
      self, unit: Any, info: base.UnitInfo,
      make: Callable[[base.UnitInfo], Callable[..., Any]], args: tuple[Any, ...],
      more: tuple[Any, ...]) -> Callable[..., Any]:
    """The function of a unit, `make(info)`; of equal ones the same.

    Args:
      unit: the unit.
      info: what is known of it.
      make: makes the function, which reads of the unit only its program and info.
      args: what it will be called with.
      more: what else it depends on.
    """
    program = unit.program()
    if self._alike[program] < _FEW:
      return make(info)
    members = self._functions.setdefault((program, *more), [])
    for read, function in members:
      if all(getattr(info, name) == value for name, value in read.items()):
        return function
    recorded, read = base.recorded(info)
    function = jax.jit(make(recorded))
    # All of it, the way back too, so that everything has been read.
    jax.eval_shape(lambda *args: _there_and_back(function, args), *args)
    members.append((read, function))
    return function


def _there_and_back(function, args):
  out, pull = jax.vjp(function, *args)
  return out, pull(out)
