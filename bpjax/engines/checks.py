"""What every engine refuses in a network, before any computation."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any
import warnings

from bpjax import base
from bpjax import paths
import jax
import jax.numpy as jnp


def check_any_unit(survey: Any, rule: str) -> None:
  """Raises for a network without a unit, which would be trained by backprop."""
  if not survey.units:
    raise ValueError(
        f'rule `{rule}` finds no unit in this network (no product, convolution '
        'or lookup of parameters with data), so that there is nothing to train '
        'by it; give the network a weight, or use `jax.grad`.')


def check_affine_alone(survey: Any, rule: str) -> None:
  """Raises for a parameter that is no part of a unit's affine operation."""
  for leaf in (*survey.units.exact, *survey.untrained):
    raise ValueError(
        f'rule `{rule}` trains the affine operations of units alone, and '
        f'parameter `{leaf}` of this network is part of none; use a model '
        'without it, or another rule.')


def check_real(units: Mapping[str, base.UnitInfo], rule: str) -> None:
  """Raises for complex numbers at a unit, for rules that cannot have them."""
  for name, info in units.items():
    for leaf in (info.pre, *info.inputs, *jax.tree.leaves(info.params)):
      if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f'rule `{rule}` needs real numbers, and unit `{name}` has complex '
            'ones; keep real and imaginary parts in parameters of their own.')


def check_loops(survey: Any, rule: str) -> None:
  """Raises for a loop that has no reverse derivative."""
  if survey.loops:
    raise ValueError(
        f'rule `{rule}` cannot send an error through the `while_loop` in this '
        'network, which has no reverse derivative; use `jax.lax.scan`, or '
        '`fori_loop` with a fixed number of steps.')


def warn_of_exact(survey: Any, rule: str) -> None:
  """Warns once where most of the weights keep backprop's derivative."""
  size = lambda tree: sum(math.prod(p.shape) for p in jax.tree.leaves(tree))
  in_units = sum(size(i.params) for i in survey.units.infos.values())
  exact = {n: s for n, s in survey.exact_sizes.items()}
  if rule == 'backprop' or survey.told or sum(exact.values()) <= in_units:
    return
  survey.told.append(rule)
  largest = sorted(exact, key=exact.get)[-3:]
  warnings.warn(
      f'under rule `{rule}` most of the weights keep their exact derivative, '
      f'such as {", ".join(f"`{name}`" for name in reversed(largest))}; see '
      '`print(net.units)`.', stacklevel=4)


def check_sources(sources: Mapping[str, str], survey: Any) -> None:
  """Raises for ports whose sources are unknown or run more than once.

  Args:
    sources: unit -> the unit whose error its port reads.
    survey: of the network.
  """
  for name, source in sources.items():
    if source not in survey.units:
      raise ValueError(
          f'unit `{name}` is wired to `{source}`, which is no unit; '
          f'{paths.nearest(source, survey.units)}.')
  for name in (*sources, *sources.values()):
    if name in survey.lifted or survey.units[name].info.calls > 1:
      raise ValueError(
          f'unit `{name}` is wired to another unit and runs more than once in '
          'a forward pass, or in a scan; give each call a unit of its own.')


def check_unit(
    name: str, info: base.UnitInfo, label: str, rule: Any, survey: Any) -> None:
  """Raises for a unit that a rule of the credit engine cannot handle."""
  if info.calls > 1 and rule.port(info) not in (None, 'output'):
    raise ValueError(
        f'unit `{name}` is called {info.calls} times in one forward pass, and '
        f'rule `{label}` brings the error to each unit once; give each call a '
        'unit of its own, or this one another rule with `by_path`.')
  if rule.port(info) and info.net_output is None:
    raise ValueError(
        f'rule `{label}` projects the error of the output, and the model returns '
        'no array of floats with a row an example; return one.')
