"""Which unit's error teaches which unit, for rules that wire units freely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bpjax import arguments
from bpjax import base
from bpjax import paths
from bpjax.networks import examples
from bpjax.networks import names

KINDS = ('direct', 'chain', 'chain_in_gap', 'meta')
OUTPUT = 'output'


def check(wiring: str | Mapping[str, str], gap: int) -> None:
  """Raises a ValueError for what no wiring can be."""
  if not isinstance(wiring, Mapping) and wiring not in KINDS or (
      isinstance(wiring, Mapping) and not all(
          isinstance(name, str) for pair in wiring.items() for name in pair)):
    raise ValueError(
        f'`wiring` must be one of {", ".join(KINDS)} or a mapping from units '
        f'to their sources, got {wiring!r}.')
  arguments.whole('gap', gap)


class Wiring:
  """The wires of a network, from what is known of its units.

  Attributes:
    wiring: one of `KINDS`, or unit -> the unit that teaches it, or 'output'.
    gap: the number of units in a gap, for 'chain_in_gap' and 'meta'.
    all_direct: whether every wire is a matrix of its own.
  """

  def __init__(
      self, wiring: str | Mapping[str, str], gap: int, all_direct: bool):
    self.wiring, self.gap, self.all_direct = wiring, gap, all_direct
    # By what all units of a network know of it: whether it is no chain.
    self._graphs: dict[tuple[int, int], tuple[base.UnitInfo, bool]] = {}

  def _top_of(self, unit, order):
    """The index of the unit at the top of this one's gap."""
    i = order.index(unit)
    return min(-(-(i + 1) // self.gap) * self.gap, len(order)) - 1

  def source_of(self, unit: str, outs: Sequence[str]) -> str | None:
    """The unit whose error teaches `unit`; None for the last unit."""
    order = tuple(outs)
    # A boundary of no rule's, or a unit that is told its error as it is.
    if unit == order[-1] or unit not in order:
      return None
    if not isinstance(self.wiring, str):
      source = self.wiring.get(unit)
      return order[-1] if source == OUTPUT else source
    i, top = order.index(unit), self._top_of(unit, order)
    return order[{
        'direct': -1, 'chain': i + 1,
        'chain_in_gap': -1 if i == top else i + 1,
        'meta': -1 if i == top else top}[self.wiring]]

  def is_top(self, info: base.UnitInfo) -> bool:
    """Whether a unit learns by its own exact error."""
    if self.by_graph(info):
      return info.is_output
    return self.source_of(info.name, tuple(info.outs)) is None

  def by_graph(self, info: base.UnitInfo) -> bool:
    """Whether a chain's errors go down the model's graph, as gradients do.

    So they do where units are no chain: where they branch, or something that no
    unit owns, a norm or a residual, lies between two of them.

    Args:
      info: of any unit.
    """
    if self.wiring != 'chain' or self.all_direct or not (
        info.all_readers.keys() <= info.outs.keys()):
      return False
    key = id(info.outs), id(info.all_readers)
    if key not in self._graphs:  # The info is kept, so that ids stay its own.
      order = tuple(info.outs)
      self._graphs[key] = info, not all(
          after in info.all_readers[name] or self.is_direct(name, info)
          for name, after in zip(order, order[1:]))
    return self._graphs[key][1]

  def is_direct(self, unit: str, info: base.UnitInfo) -> bool:
    """Whether a unit's wire is a matrix of its own, whoever reads the unit.

    Args:
      unit: the unit.
      info: of this one, or of another of its rule.
    """
    order = tuple(info.outs)
    if self.wiring in ('chain_in_gap', 'meta') and (
        order.index(unit) == self._top_of(unit, order)):
      return True
    source = self.source_of(unit, order)
    return (self.wiring == 'direct' or self.all_direct
            or _reshapes(unit, info) or _reshapes(source, info))

  def is_carried(self, unit: str, info: base.UnitInfo) -> bool:
    """Whether the reader's error has the shape of this unit's output.

    Then the reader hands it down as it is to a unit with a matrix of its own.
    """
    if self.by_graph(info):
      return _reshapes(unit, info)
    source = self.source_of(unit, tuple(info.outs))
    if source != names.leader(source):  # Its readers are several.
      return False
    return (self.wiring != 'direct' and not self.all_direct
            and (_reshapes(unit, info) or _reshapes(source, info))
            and info.outs[source].shape == info.outs[unit].shape)

  def is_neighbour(self, info: base.UnitInfo) -> bool:
    """Whether the error comes from a unit that reads this one's output."""
    if self.by_graph(info):
      return not info.is_output
    return (self.source_of(info.name, tuple(info.outs)) in info.readers
            and (not self.is_direct(info.name, info)
                 or self.is_carried(info.name, info)))

  def below(self, info: base.UnitInfo) -> str | None:
    """The unit that this one reads, if that gets its error from this one."""
    below = info.reads[0] if info.reads else None
    taught = below is not None and (
        self.source_of(below, tuple(info.outs)) == (info.joint or info.name))
    return below if taught else None

  def teaches_below(self, info: base.UnitInfo) -> bool:
    """Whether this unit's feedback brings its error to the unit that it reads."""
    if self.by_graph(info):
      return info.sends and info.kind != base.JOINT
    below = self.below(info)
    return below is not None and not self.is_direct(below, info)

  def hands_down(self, info: base.UnitInfo) -> bool:
    """Whether the unit that it reads brings this unit's error to itself."""
    if self.by_graph(info):
      return False
    below = self.below(info)
    return (below is not None and not info.joint
            and self.is_carried(below, info))

  def port(self, info: base.UnitInfo) -> str | None:
    """What a unit reads directly: 'output', a unit, or None."""
    if self.by_graph(info):
      return None
    outs = tuple(info.outs)
    source = self.source_of(info.name, outs)
    if source is None or self.is_neighbour(info):
      return None
    return OUTPUT if source == outs[-1] else source

  def check_units(self, units: Mapping[str, base.UnitInfo]) -> None:
    """Raises a ValueError for units that cannot be wired so."""
    if not isinstance(self.wiring, str):
      for order in dict.fromkeys(tuple(info.outs) for info in units.values()):
        _check_sources(self.wiring, order)
    for info in units.values():
      self._check_unit(info, units)

  def _check_unit(self, info, units):
    name = info.name
    outs = tuple(info.outs)  # Of its block, where blocks have their own losses.
    source = self.source_of(name, outs)
    below = info.reads[0] if info.reads else None
    if below is not None and below not in outs and info.kind not in (
        base.BOUNDARY, base.JOINT) and (
            below not in units or not units[below].joint):
      raise ValueError(
          f'unit `{below}` gets no error from `{name}`, which tells its own '
          'targets alone to units of its own rule; give both the same rule, or '
          'end the block of the former in a boundary '
          '(`from_linen(boundaries=...)`).')
    if source is None or self.is_top(info) or info.kind == base.BOUNDARY:
      return
    if info.pre.shape[:-1] != info.out.shape[:-1]:
      raise ValueError(
          f'unit `{name}` must put out the positions of its affine operation, '
          f'{info.pre.shape}, got {info.out.shape}; keep pooling outside.')
    next_one = outs[outs.index(name) + 1]
    if (isinstance(self.wiring, str) and source == next_one
        and not self.is_neighbour(info) and not self.is_direct(name, info)
        and not (source in units and units[source].kind == base.BOUNDARY)):
      raise ValueError(
          f'a target of unit `{name}` cannot come from `{source}`: between '
          'them lies something that no unit owns, a norm or a residual; put '
          'it into a unit, as bpjax.nn.Layer does with `skip`, or give a '
          f"mapping that wires `{name}` to 'output'.")
    above = units.get(source)
    if self.port(info) == source and above is not None and above.examples not in (
        None, examples.first_place(above.out.shape)):
      raise ValueError(
          f'unit `{name}` cannot read the error of `{source}`, which has its '
          "examples on another axis than the first; wire it to 'output'.")


def _reshapes(unit, info):
  """Whether a unit puts out another shape than its affine operation.

  As attention does, on queries, keys and values in one.
  """
  pre = info.pres.get(unit)
  return pre is not None and pre.shape != info.outs[unit].shape


def _check_sources(wiring, order):
  """Raises for a unit without a source, and for names that are no units."""
  for name in (*wiring, *wiring.values()):
    if name not in (*order, OUTPUT):
      raise ValueError(
          f'`wiring` names `{name}`, which is no unit; '
          f'{paths.nearest(name, [*order, OUTPUT])}.')
  for name in order[:-1]:
    if name not in wiring:
      raise ValueError(
          f"`wiring` must give every hidden unit a source, and has none for "
          f"`{name}`; wire it to 'output' or to a unit.")
  for name in order[:-1]:
    seen = [name]
    while seen[-1] in wiring:
      source = wiring[seen[-1]]
      if source in seen:
        raise ValueError(
            f'`wiring` never reaches the output from unit `{name}`: it goes '
            f"round in {' -> '.join([*seen, source])}; wire one of them to "
            "'output'.")
      seen.append(source)
