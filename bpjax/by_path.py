"""Different rules for different units of one network."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from bpjax import arguments
from bpjax import paths
from bpjax.engines import credit
from bpjax.networks import names


@dataclasses.dataclass(frozen=True)
class _ByPath(credit.Rule):
  """Different rules for different units. Made by `by_path`."""
  rules: tuple[tuple[str, credit.Rule], ...] = ()

  def rule_for(self, unit):
    unit = names.leader(unit)
    for pattern, rule in self.rules:
      if paths.matches(pattern, unit):
        return pattern, rule.rule_for(unit)[1]
    raise ValueError(
        f'no pattern of `by_path` matches unit `{unit}`; got '
        f'{[p for p, _ in self.rules]}: add for example '
        "`'*': bpjax.rules.backprop()` as the last one.")

  def check_names(self, units):
    for pattern, rule in self.rules:
      own = [name for name in units if paths.matches(pattern, name)]
      if not own:
        raise ValueError(
            f'pattern `{pattern}` of `by_path` matches no unit; '
            f'{paths.nearest(pattern, units)}.')
      rule.check_names(own)


def by_path(rules: Mapping[str, credit.Rule]) -> credit.Rule:
  """Gives different units different rules.

  The rule of a unit decides what the unit does with the signal that reaches it,
  and what it *sends below*. What it is taught by is decided by the rules above
  it: for direct feedback alignment up to layer 3, give the rule to layer 4, too,
  since it is layer 4 that hands its error down.

  Args:
    rules: pattern -> rule (of the credit engine). A pattern is a glob or a
      regular expression on the unit's path, or on that of a module around it;
      the first that matches wins, and every unit needs one.

  Returns:
    A rule.

  Raises:
    ValueError: for a rule of another engine; when the network is known, for a
      unit without a pattern and for a pattern without a unit.

  Example:
    >>> import bpjax
    >>> rule = bpjax.rules.by_path({
    ...     'Dense_0': bpjax.rules.backprop(),
    ...     '*': bpjax.rules.feedback_alignment()})
  """
  if not isinstance(rules, Mapping):
    raise ValueError(
        '`by_path` needs a mapping from path patterns to rules, got '
        f'{type(rules).__name__}.')
  if not rules:
    raise ValueError('`by_path` needs at least one pattern, got none.')
  arguments.patterns('by_path', rules)
  for pattern, rule in rules.items():
    if not isinstance(rule, credit.Rule):
      raise ValueError(
          f'`by_path` combines rules of the credit engine; `{pattern}` got '
          f'{getattr(rule, "name", rule)!r}, which is none.')
  return _ByPath(
      name='by_path', backward=None, rules=tuple(rules.items()),
      linear=all(rule.linear for rule in rules.values()))
