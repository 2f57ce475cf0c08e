"""What every engine refuses in a network, before any computation."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any
import warnings

from bpjax import base
from bpjax import paths


def check_visible(survey: Any) -> None:
  """Raises for a unit inside `nn.jit`, where no rule can see it reliably."""
  for unit in survey.jitted:
    raise ValueError(
        f'unit `{unit}` is inside `nn.jit`, which keeps traces that a rule has '
        'not seen; use the module without `nn.jit`: the whole step is compiled '
        'anyway.')


def check_any_unit(survey: Any, rule: str) -> None:
  """Raises for a network without a unit, which would be trained by backprop."""
  if not survey.units:
    raise ValueError(
        f'rule `{rule}` finds no unit in this network (no Dense, Conv, Embed or '
        'other affine module that is called), and would train all of it by '
        'backprop; write its products as such modules, or use '
        'bpjax.rules.backprop() knowingly with one of them.')


def warn_of_transports(survey: Any, rule: str) -> None:
  """Warns of weights that keep backprop's derivative under the rule's name."""
  if survey.units.transports and rule != 'backprop':
    names = ', '.join(f'`{name}`' for name in survey.units.transports)
    warnings.warn(
        f'under rule `{rule}` these weights multiply data outside of any unit, '
        f'where they keep their exact derivative: {names}; see '
        '`print(net.units)`.', stacklevel=4)


def check_lists(survey: Any, collection: str, who: str) -> None:
  """Raises for an `nn.scan` that does not pass on a collection."""
  for unit, lacks in survey.lacks.items():
    if collection in lacks:
      raise ValueError(_unlisted(unit, collection, who))


def check_calls(survey: Any, kept: Any) -> None:
  """Raises for calls of one module that are told by one name.

  Args:
    survey: of the network.
    kept: a collection with an entry for each call of what is inside a unit.
  """
  for unit, info in survey.units.infos.items():
    owners = collections.Counter(
        name.rpartition('/')[0]
        for name in paths.leaf_names(paths.subtree(kept, unit) or {}))
    if any(count < info.calls for count in owners.values()):
      raise ValueError(
          f'unit `{unit}` is called {info.calls} times under `nn.remat`, which '
          'hides the calls from one another; use the module without it, or put '
          'all calls of it into one.')


def _unlisted(unit, collection, who):
  where = ("`split_rngs={..., 'rule': True}`" if collection == 'rule' else
           f"`variable_axes={{..., '{collection}': 0}}`")
  return (
      f'unit `{unit}` is inside an `nn.scan` (or another lifted transform) that '
      f'does not pass on `{collection}`, which {who} needs there; add {where} '
      "to it (where it broadcasts 'params', broadcast 'feedback', too).")


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
  needs = {
      'feedback': rule.keeps_feedback and info.sends,
      'ports': rule.port(info) is not None, 'rule': rule.stochastic}
  for collection in survey.lacks.get(name, ()):
    if needs.get(collection):
      raise ValueError(_unlisted(name, collection, f'rule `{label}`'))
  if info.calls > 1 and rule.port(info) is not None:
    raise ValueError(
        f'unit `{name}` is called {info.calls} times in one forward pass, and '
        f'rule `{label}` brings the error to each unit once; give each call a '
        'unit of its own, or this one another rule with `by_path`.')
  if rule.port(info) and not hasattr(info.net_output, 'shape'):
    raise ValueError(
        f'rule `{label}` projects the error of one output array, and the model '
        f'returns {type(info.net_output).__name__}; return the array alone.')
