"""A network as `bpjax.local` sees it: cut into blocks, each with an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax.networks import flow as flow_lib
from bpjax.networks import network
import jax

OUTPUT = 'output'  # Beside the outputs of 'blocks', that of the model.
LAST = ''  # In place of a block, for what follows the last one.
Blocks = Sequence[str] | Callable[[Any], bool]


class View(network.Network):
  """A network whose output is `{'blocks': {block: array}, 'output': output}`.

  Attributes:
    names: the paths of the blocks, in the order in which they end; known once
      the network has been surveyed.
    outputs: block -> shape and dtype of what it puts out.
    cuts: where gradients stop.
  """

  def __init__(
      self, net: network.Network, blocks: Blocks,
      stops: Callable[[int, int], bool], enters: Sequence[str],
      error: Callable[[str, Sequence[str], Any, Any], Any]):
    """A view.

    Args:
      net: the network.
      blocks: globs for the blocks, or what chooses their modules.
      stops: `(i, count) -> whether` the gradient stops after block i.
      enters: globs for the modules that read their inputs detached.
      error: `(block, names, block output, output) -> shape` of the error that
        the ports of its units read; None for a block without a loss.
    """
    super().__init__(net.boundaries, mask=net.mask)
    self._net, self._stops, self._error = net, stops, error
    self._marks = _Marks(blocks, tuple(enters))
    self.names, self.outputs, self.cuts = None, {}, None

  def run(
      self, variables: Mapping[str, Any], x: Any, visit: Callable[[Any], Any],
      key: base.Key | None, mutable: Sequence[str], owners: bool = False,
      cuts: Any = None, train: bool = True) -> tuple[Any, dict[str, Any]]:
    """As the network's `run`; the outputs of blocks are part of the output."""
    output, collections = self._net.run(
        variables, x, visit, key, [*mutable, base.BLOCKS], owners=owners,
        cuts=cuts or self.cuts, train=train)
    kept = collections.pop(base.BLOCKS)
    outputs = {n: paths.subtree(kept, n)['output'] for n in self.names}
    return {'blocks': outputs, OUTPUT: output}, collections

  def traced(
      self, variables: Mapping[str, Any], x: Any, has_key: bool = True,
      train: bool = True, wants: Any = None) -> network.Traced:
    """The network's trace, with marks at blocks and branches."""
    return self._net.traced(
        variables, x, has_key, train, wants or self._marks.wants)

  def owning(self, own: Mapping[str, Any]) -> View:
    """As the network's `owning`."""
    key = tuple(own.items())
    if key not in self._owning:
      self._owning[key] = view = copy.copy(self)
      view._net, view._surveys = self._net.owning(own), {}  # pylint: disable=protected-access
    return self._owning[key] if own else self

  def going_on_from(self, given: Mapping[str, base.Array]) -> View:
    """The view whose stops hand on these arrays, whatever blocks put out."""
    view = copy.copy(self)
    view.cuts = dataclasses.replace(self.cuts, given=given)
    return view

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's own output in evaluation mode."""
    return self._net.apply(variables, x)

  def _take(self, variables, x):
    traced = self.traced(variables, x)
    order = self._find(traced)
    survey = super()._take(variables, x)
    errors = {
        name: self._error(name, self.names, out, traced.output)
        for name, out in self.outputs.items()}
    errors[LAST] = traced.error
    block_of = _blocks_of(order, errors)
    for name, unit in survey.units.items():
      block = block_of[name]
      near = lambda other: block_of.get(other) == block  # pylint: disable=cell-var-from-loop
      info = unit.info
      unit.info = dataclasses.replace(
          info, block=block, net_output=errors[block],
          reads=tuple(r if near(r) else None for r in info.reads),
          readers=tuple(filter(near, info.readers)),
          outs={n: out for n, out in info.outs.items() if near(n)})
    return dataclasses.replace(
        survey, output={'blocks': self.outputs, OUTPUT: traced.output})

  def _find(self, traced):
    """Finds the blocks; returns units and ends of blocks in their order."""
    order, outputs = [], {}
    for step, around in traced.plan.walk():
      kind, _, name = step.name.partition(':')
      unit = flow_lib.visited(step)
      if unit is not None:
        order.append(unit)
      elif step.how == 'mark' and f'{kind}:' == network.LEAVE:
        _check_call(name, around, outputs)
        order.append(_End(name))
        outputs[name] = step.out.aval
    self._marks.check(traced.notes.modules, outputs)
    _check_units(order, traced.entries)
    count = len(outputs)
    self.names, self.outputs = tuple(outputs), {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype)
        for name, a in outputs.items()}
    self.cuts = _Cuts(self._marks, {
        n: self._stops(i, count) for i, n in enumerate(self.names)})
    return order


@dataclasses.dataclass(frozen=True)
class _End:
  """In the order of the units: the end of a block."""
  name: str


def _blocks_of(order, errors):
  """Unit -> the first block with a loss that ends after it, or `LAST`."""
  ends = [(i, item.name) for i, item in enumerate(order)
          if isinstance(item, _End) and errors[item.name] is not None]
  last = {item: i for i, item in enumerate(order) if isinstance(item, str)}
  return {name: next((b for i, b in ends if i > end), LAST)
          for name, end in last.items()}


def _check_call(name, around, before):
  """Raises a ValueError for a block that a loop hides, or a second call."""
  if any(step.how in ('scan', 'cond') for step in around):
    raise ValueError(
        f'block `{name}` is inside a scan or a conditional, which hides what '
        'it puts out; call the layers in a Python loop, or name the module '
        'around them.')
  if name in before:
    raise ValueError(
        f'block `{name}` must be called once in a forward pass, got a second '
        'call; give each call a module of its own, or name one around both.')


def _check_units(order, units):
  """Raises a ValueError for a block whose loss would teach no unit."""
  before = []
  for item in order:
    if isinstance(item, str):
      before.append(item)
      continue
    if not any(name in units for name in before):
      raise ValueError(
          f'block `{item.name}` must have a trainable unit that its loss can '
          'teach, and there is none in it or between it and the block before; '
          f'the units are: {", ".join(units)}.')
    before = []


@dataclasses.dataclass(frozen=True, eq=False)
class _Cuts:
  """Where gradients stop; see `network.Network.run`."""
  marks: _Marks
  stops: Mapping[str, bool]
  given: Mapping[str, base.Array] = dataclasses.field(default_factory=dict)

  @property
  def wants(self):
    return self.marks.wants

  def enter(self, name):
    return self.marks.enters(name)

  def leave(self, name):
    return self.stops.get(name)

  def onward(self, name, out):
    """What goes on from a stop."""
    return jax.lax.stop_gradient(self.given.get(name, out))


class _Marks:
  """Which modules are marked: blocks, and what reads its inputs detached."""

  def __init__(self, blocks, enters):
    self._blocks, self._enters = blocks, enters

  def wants(self, kind, name, module):
    if kind == network.LEAVE:
      return bool(self._fits(name, module))
    return kind == network.ENTER and self.enters(name)

  def enters(self, name):
    return any(paths.is_module(glob, name) for glob in self._enters)

  def _fits(self, name, module=None):
    if callable(self._blocks):
      return int(self._blocks(module))
    return sum(paths.is_module(glob, name) for glob in self._blocks)

  def check(self, modules, names):
    """Raises a ValueError for blocks that cannot each have a loss."""
    known = [name for name in modules if name]
    for kind, globs in (('blocks', self._blocks), ('branches', self._enters)):
      for glob in () if callable(globs) else globs:
        called = names if kind == 'blocks' else modules
        if not any(paths.is_module(glob, name) for name in called):
          raise ValueError(
              f'`{kind}` has the glob {glob!r}, which fits no module that the '
              f'model calls; {paths.nearest(glob, known)}.')
    if not names:
      raise ValueError(
          '`blocks` chooses no module that the model calls; return True for '
          f'some of: {", ".join(known)}.')
    for name in names:
      inside = lambda other: other == name or other.startswith(name + '/')  # pylint: disable=cell-var-from-loop
      fits = 1 if callable(self._blocks) else self._fits(name)
      if fits > 1:
        raise ValueError(
            f'`blocks` names `{name}` {fits} times, and a block has one loss; '
            'leave one of the globs out.')
      around = [other for other in names if other != name and inside(other)]
      if around or not name:
        raise ValueError(
            f'`blocks` must not overlap, and `{name or "the model itself"}` '
            f'holds {around or "everything"}; name modules beside each other.')
