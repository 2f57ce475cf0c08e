"""What is known of a network before any data: traced, never computed."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax.networks import unit as unit_lib
import jax


class Units(dict[str, base.Unit]):
  """Name -> unit, in the order of the calls; printed as a table.

  Attributes:
    exact_by: path of a parameter -> the operations outside of all units in
      which it takes part: there it keeps its exact derivative under every rule
      of the credit engine.
    exact: those paths.
    flags: the arguments by which the model is told that it is training.
  """

  def __init__(
      self, units: Mapping[str, base.Unit],
      exact_by: Mapping[str, tuple[str, ...]],
      flags: Mapping[str, Any] | None = None):
    super().__init__(units)
    self.exact_by = dict(exact_by)
    self.exact = tuple(exact_by)
    self.flags = dict(flags or {})

  def __repr__(self):
    rows = [('unit', 'operation', 'input -> output', 'parameters')]
    for name, info in self.infos.items():
      params = ', '.join(
          f'{leaf} {value.shape}' for leaf, value in zip(
              paths.leaf_names(info.params), jax.tree.leaves(info.params)))
      kind = info.kind
      if info.operation not in ('', kind):
        kind = f'{kind} ({info.operation})'
      rows.append((name or '(root)', kind,
                   f'{info.inputs[0].shape} -> {info.out.shape}', params))
    lines = _aligned(rows)
    if self.exact_by:
      lines += ['', *_aligned([
          ('exact derivative', 'in these operations, outside of all units'),
          *((n, ', '.join(by)) for n, by in self.exact_by.items())])]
    if self.flags:
      flags = ', '.join(f'{k}={v!r}' for k, v in self.flags.items())
      lines += ['', f'in training the model is called with {flags}']
    return '\n'.join(lines)

  @property
  def infos(self) -> dict[str, base.UnitInfo]:
    """Name -> what is known of the unit."""
    return {name: unit.info for name, unit in self.items()}


def _aligned(rows):
  """Rows as lines whose columns are beneath each other."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


@dataclasses.dataclass(frozen=True)
class Survey:
  """What is known of a network for inputs of one shape.

  Attributes:
    units: the units of the model, and what keeps its exact derivative.
    output: shape and dtype of the model's output.
    error_parts: the errors that a rule projects: of outputs, by number, and of
      the pre-activations of readouts, by name.
    lifted: the units inside a scan, a loop, a conditional or a vmap.
    blocked: the units that the output depends on and that no error can reach,
      since a derivative on the way is zero everywhere.
    batch_coupled: the modules that normalise over the batch in training.
    used: the units that the output depends on.
    detached: whether a `stop_gradient` keeps errors from a part of the model.
    mixed: unit -> why what follows it is not its own, where a rule asked for it.
    loops: whether a derivative would have to pass a `while_loop`.
    untrained: parameter -> the unit whose segment it takes part in.
    exact_sizes: parameter -> its size, of those that only take part in
      operations outside of all units.
    told: the rules that have warned of those.
    feedback_shapes: rule -> the shapes of what it keeps here, once known.
  """
  units: Units
  output: Any
  error_parts: tuple[int | str, ...]
  lifted: tuple[str, ...]
  blocked: tuple[str, ...]
  batch_coupled: tuple[str, ...]
  used: tuple[str, ...]
  detached: bool
  mixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  loops: bool = False
  untrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
  exact_sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  told: list[str] = dataclasses.field(default_factory=list)
  feedback_shapes: dict[Any, Any] = dataclasses.field(default_factory=dict)


class Network:
  """What the networks of every Flax API share: one survey a shape."""

  def __init__(self, boundaries: tuple[str, ...] = ()):
    self.boundaries = boundaries
    self._surveys = {}
    self._latest = None
    self.views = {}  # Of `bpjax.local`: what cuts the network -> the result.

  @property
  def units(self) -> Units:
    """Name -> unit, in the order of the calls.

    A unit has `info` and its pure functions (`bpjax.Unit`): what
    `rule.backward` takes. `net.units.exact` lists the parameters that meet data
    outside of all units (gains of norms, embeddings that are added): there a
    credit rule leaves them on their exact gradient. Known once the network has seen an input's shape (`init`).
    """
    if self._latest is None:
      raise ValueError(
          '`net.units` is not known before the network has seen an input; call '
          '`net.init(key, x)` or `rule.init` first.')
    return self._latest.units

  def survey(self, variables: Mapping[str, Any], x: Any) -> Survey:
    """What is known of the units for inputs of this shape; traced once."""
    leaves, structure = jax.tree.flatten((variables, x))
    cache_key = (structure, tuple(map(jax.typeof, leaves)))
    if cache_key not in self._surveys:
      self._surveys[cache_key] = self._take(variables, x)
    self._latest = self._surveys[cache_key]
    return self._latest

  def _take(self, variables, x):
    raise NotImplementedError


def check_boundaries(globs, order, boundaries):
  """Raises for a glob without a module, and where the output would be cut."""
  modules = [name.rpartition('/')[0] for name in boundaries]
  for glob in globs:
    if not any(paths.is_module(glob, module) for module in modules):
      inside = [n.rpartition('/')[0] for n in order if '/' in n]
      raise ValueError(
          f'`boundaries` has the glob {glob!r}, which fits no module that the '
          f'model calls; {paths.nearest(glob, dict.fromkeys(inside))}.')
  if modules and order[-1] == unit_lib.boundary_name(modules[-1]):
    raise ValueError(
        f'module `{modules[-1]}` of `boundaries` must be followed by a unit, '
        'since the output unit is taught by the exact error; leave it out.')
