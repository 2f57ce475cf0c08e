"""A network as `bpjax.local` sees it: cut into blocks, which put out as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
from typing import Any

from bpjax import base
from bpjax import paths
from bpjax import survey as survey_lib
import jax

OUTPUT = 'output'  # In place of a block, for what follows the last one.
Blocks = Sequence[str] | Callable[[Any], bool]


class View(survey_lib.Network):
  """A network whose output is `{'blocks': {block: array}, 'output': output}`.

  Attributes:
    names: the paths of the blocks, in the order in which they end; known once
      the network has been surveyed.
    outputs: block -> shape and dtype of what it puts out.
  """

  def __init__(
      self, net: survey_lib.Network, blocks: Blocks,
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
    super().__init__(net.boundaries)
    self._net, self._blocks, self._stops = net, blocks, stops
    self._enters, self._error = tuple(enters), error
    self.names, self.outputs, self._order = None, {}, ()
    self._given = {}

  def run(
      self, variables: Mapping[str, Any], x: Any, visit: Callable[[Any], Any],
      key: base.Key | None, mutable: Sequence[str], owners: bool = False,
      watch: Callable[[str], None] | None = None, cuts: Any = None
  ) -> tuple[Any, dict[str, Any]]:
    """As the network's `run`; the outputs of blocks are part of the output."""
    if cuts is None:
      count = len(self.names)
      cuts = _Cuts(
          {n: self._stops(i, count) for i, n in enumerate(self.names)},
          self._enters, self._given)
    mutable = [*dict.fromkeys([*mutable, 'blocks'])]
    output, collections = self._net.run(
        variables, x, visit, key, mutable, owners, watch, cuts)
    kept = collections.pop('blocks', {})
    outputs = {n: paths.subtree(kept, n)['output'] for n in cuts.order}
    return {'blocks': outputs, OUTPUT: output}, collections

  def going_on_from(self, given: Mapping[str, base.Array]) -> View:
    """The view whose stops hand on these arrays, whatever blocks put out."""
    view = copy.copy(self)
    view._given = given  # pylint: disable=protected-access
    return view

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's own output in evaluation mode."""
    return self._net.apply(variables, x)

  def _take(self, variables, x):
    known = self._net.survey(variables, x)
    self._find(variables, x, [
        n for n, i in known.units.infos.items() if i.kind != base.BOUNDARY])
    survey = super()._take(variables, x)
    units = survey.units
    block_of = self._block_of(units, survey.output)
    errors = {b: e for b, e in self._errors(survey.output).items() if e}
    for name, unit in units.items():
      block = block_of[name]
      near = lambda other: block_of.get(other) == block  # pylint: disable=cell-var-from-loop
      info = unit.info
      unit.info = dataclasses.replace(
          info, block=block, net_output=errors[block],
          reads=tuple(r if near(r) else None for r in info.reads),
          readers=tuple(filter(near, info.readers)),
          outs={n: out for n, out in info.outs.items() if near(n)})
    blocked = () if known.detached else tuple(
        n for n in survey.used if not units[n].info.taught)
    return dataclasses.replace(survey, blocked=blocked)

  def _find(self, variables, x, units):
    """The names of the blocks and the order of everything; checked."""
    seen, order = {}, []
    finder = _Finder(self._blocks, self._enters, seen, order)

    def visit(call):
      order.append(call.name)
      return call.original()

    def trace(variables, x):
      state = [c for c in variables if c != 'params']
      return self._net.run(
          variables, x, visit, jax.random.key(0), [*state, *base.COLLECTIONS],
          False, None, finder)[0]

    jax.eval_shape(trace, dict(variables), x)
    self.names = tuple(finder.order)
    self._order = tuple(order)
    _check(self._blocks, self._enters, self.names, seen, units, order)

  def _errors(self, outputs):
    errors = {
        name: self._error(
            name, self.names, outputs['blocks'][name], outputs[OUTPUT])
        for name in self.names}
    self.outputs = outputs['blocks']
    return {**errors, OUTPUT: outputs[OUTPUT]}

  def _block_of(self, units, outputs):
    """Unit -> the first block with a loss that ends after it, or 'output'."""
    errors = self._errors(outputs)
    ends = [(i, item.name) for i, item in enumerate(self._order)
            if isinstance(item, _End) and errors[item.name] is not None]
    last = {item: i for i, item in enumerate(self._order)
            if isinstance(item, str)}
    return {
        name: next((b for i, b in ends if i > last[name]), OUTPUT)
        for name in units}


@dataclasses.dataclass(frozen=True)
class _End:
  """In the order of the calls: the end of a block."""
  name: str


class _Cuts:
  """Where gradients stop, once the blocks are known."""

  def __init__(self, stops, enters, given):
    self._stops, self._enters, self._given = stops, enters, given
    self.order = tuple(stops)

  def enter(self, name):
    return any(paths.is_module(glob, name) for glob in self._enters)

  def leave(self, name, module):
    del module
    return self._stops.get(name)

  def kept(self, name):
    """Nothing to note: the order is known."""

  def onward(self, name, out):
    """What goes on from a stop."""
    return jax.lax.stop_gradient(self._given.get(name, out))


class _Finder(_Cuts):
  """Finds the blocks: notes every module, and when blocks end."""

  def __init__(self, blocks, enters, seen, events):
    super().__init__({}, enters, {})
    self._blocks, self._seen, self._events = blocks, seen, events
    self.order = []

  def leave(self, name, module):
    if callable(self._blocks):
      fits = 1 if self._blocks(module) else 0
    else:
      fits = sum(paths.is_module(glob, name) for glob in self._blocks)
    self._seen[name] = fits
    return False if fits else None

  def kept(self, name):
    self.order.append(name)
    self._events.append(_End(name))


def _check(blocks, enters, names, seen, units, order):
  """Raises a ValueError for blocks that cannot each have a loss of their own."""
  known = [name for name in seen if name]
  for kind, globs in (('blocks', blocks), ('branches', enters)):
    for glob in () if callable(globs) else globs:
      called = names if kind == 'blocks' else seen
      if not any(paths.is_module(glob, name) for name in called):
        raise ValueError(
            f'`{kind}` has the glob {glob!r}, which fits no module that the '
            f'model calls; {paths.nearest(glob, known)}.')
  if not names:
    raise ValueError(
        '`blocks` chooses no module that the model calls; return True for some '
        f'of: {", ".join(known)}.')
  for name in names:
    inside = lambda other: other == name or other.startswith(name + '/')  # pylint: disable=cell-var-from-loop
    if seen[name] > 1:
      raise ValueError(
          f'`blocks` names `{name}` {seen[name]} times, and a block has one '
          'loss; leave one of the globs out.')
    around = [other for other in names if other != name and inside(other)]
    if around or not name:
      raise ValueError(
          f'`blocks` must not overlap, and `{name or "the model itself"}` holds '
          f'{around or "everything"}; name modules beside each other.')
  before = []
  for item in order:
    if isinstance(item, str):
      before.append(item)
      continue
    if not any(unit in before for unit in units):
      raise ValueError(
          f'block `{item.name}` must have a trainable unit that its loss can '
          'teach, and there is none in it or between it and the block before; '
          f'the units are: {", ".join(units)}.')
    before = []
