"""Draws what many units keep together: alike is traced, and compiled, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import functools
import math
from typing import Any, NamedTuple

from bpjax import base
import jax
from jax.extend import random as random_lib
from jax.extend.core import ClosedJaxpr
from jax.extend.core import jaxpr_as_fun
from jax.extend.core import JaxprEqn
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

_LARGEST = 2**16  # Entries that are drawn at a time.
_OVERHEAD = 2**11  # What it costs to begin a part, in entries.


@functools.partial(jax.jit, static_argnums=(1, 2))
def bpjax_normals(key: base.Key, count: int, dtype: str) -> base.Array:
  """`count` standard normal numbers; `drawn_together` finds it by its name."""
  return jax.random.normal(key, (count,), dtype)


class Drawer(NamedTuple):
  """How the feedback of a unit is drawn.

  Attributes:
    draw: `(key, info, params) -> feedback`, a rule's `init_unit`.
    info: the unit.
    params: shapes and dtypes of its parameters, of one slice.
    lengths: of the loops that hand out a slice a turn: each slice gets feedback of
      its own.
  """
  draw: Callable[[base.Key, base.UnitInfo, base.Tree], base.Tree]
  info: base.UnitInfo
  params: base.Tree
  lengths: tuple[int, ...] = ()

  def slices(self, key: base.Key) -> base.Tree:
    """What is drawn for every slice."""
    one = lambda key: self.draw(key, self.info, self.params)
    for _ in self.lengths:
      one = jax.vmap(one)
    return one(jax.random.split(key, self.lengths) if self.lengths else key)

  def draws_as(self, other: Drawer, read: Mapping[str, Any]) -> bool:
    """Whether it does what another does that has read these fields of its info."""
    return (
        self.draw is other.draw and self.lengths == other.lengths
        and self.params == other.params
        and all(getattr(self.info, name) == v for name, v in read.items()))


class _Program(NamedTuple):
  """What several units draw by.

  Attributes:
    closed: from a key to the leaves of what is drawn.
    structure: of their tree.
    draws: the equations of `bpjax_normals` in it, to be answered from outside.
    members: number and name of each unit.
  """
  closed: ClosedJaxpr
  structure: Any
  draws: tuple[JaxprEqn, ...]
  members: list[tuple[int, str]]

  def run(
      self, key: base.Key, answer: Callable[[JaxprEqn, base.Key], base.Array]
  ) -> list[base.Array]:
    """The leaves, with `answer` for each of `draws`, from its key."""
    jaxpr = self.closed.jaxpr
    env = dict(zip(jaxpr.constvars, self.closed.consts))
    env[jaxpr.invars[0]] = key
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for eqn in jaxpr.eqns:
      values = [read(v) for v in eqn.invars]
      if any(eqn is draw for draw in self.draws):
        outs = [answer(eqn, values[0])]
      else:
        outs = eqn.primitive.bind(
            *values, **eqn.primitive.get_bind_params(eqn.params))
        outs = outs if eqn.primitive.multiple_results else [outs]
      env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]

  def alone(self, key: base.Key) -> list[base.Array]:
    """The leaves, each drawn where it is wanted."""
    return jaxpr_as_fun(self.closed)(key)

  def of_keys(self) -> ClosedJaxpr:
    """From a key to the keys of `draws`, and nothing else."""
    jaxpr, needed = self.closed.jaxpr, {eqn.invars[0] for eqn in self.draws}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
      if needed.intersection(eqn.outvars):
        needed.update(v for v in eqn.invars if not isinstance(v, Literal))
        eqns.insert(0, eqn)
    # Without what else the drawing holds, since these are kept.
    consts = [(var, const) for var, const in zip(jaxpr.constvars, self.closed.consts)
              if var in needed]
    return ClosedJaxpr(jaxpr.replace(
        eqns=eqns, constvars=[var for var, _ in consts],
        outvars=[eqn.invars[0] for eqn in self.draws],
        debug_info=jaxpr.debug_info.with_unknown_names()),
        [const for _, const in consts])


def drawn_together(
    key: base.Key, drawers: Mapping[str, Drawer]) -> dict[str, base.Tree]:
  """Draws the feedback of many units; what is drawn alike is traced once.

  A drawer is traced with an info that remembers what was read of it: one that
  would read the same values is the same program, and so are those with equal
  programs. All normal numbers come from one loop over parts of equal size, in
  whatever shapes they are wanted, since to compile their drawing anew for each
  shape is what takes the time.

  Args:
    key: a random key; unit i draws with `jax.random.fold_in(first, i)`, where
      `first, _ = jax.random.split(key)`. The second is left to the caller.
    drawers: unit -> how its feedback is drawn.

  Returns:
    Unit -> what it draws, the same as if it were drawn alone.
  """
  programs = _programs(key, drawers)
  if isinstance(key, jax.core.Tracer):
    return _drawn_inside(key, programs, len(drawers))
  places, sizes = _places(programs)
  if not programs:
    return {}
  kinds = [_Keys(program) for program in programs]
  different = tuple(dict.fromkeys(kinds))
  keys, of_kinds = _all_keys(different, len(drawers), key)
  numbers = jax.jit(functools.partial(_all_numbers, programs, sizes))(
      [of_kinds[different.index(kind)] for kind in kinds])

  @functools.partial(jax.jit, static_argnums=0)
  def finish(alike, keys, numbers, units):
    def alone(program, i, own):
      own = iter(own)
      return program.run(
          keys[i], lambda eqn, key: _cut(eqn, numbers, next(own), sizes))

    return [alone(programs[p], *unit) for p, unit in zip(alike, units, strict=True)]

  # Programs of equally many units take turns: one compilation, a unit of each a turn.
  drawn, by_count = {}, {}
  for p, program in enumerate(programs):
    by_count.setdefault(len(program.members), []).append(p)
  for count, alike in by_count.items():
    for k in range(count):
      members = [programs[p].members[k] for p in alike]
      found = finish(tuple(alike), keys, numbers, [
          (i, places[p][k]) for p, (i, _) in zip(alike, members)])
      for p, (_, name), leaves in zip(alike, members, found):
        drawn[name] = jax.tree.unflatten(programs[p].structure, leaves)
  return {name: drawn[name] for name in drawers}


def _drawn_inside(key, programs, count):
  """What is drawn, in a program of the caller's, who may want it on many devices."""
  keys, drawn = _of_units(key, count), {}
  for program in programs:
    members = np.array([i for i, _ in program.members])
    # One after the other: XLA compiles a loop's body once.
    stack = jax.lax.map(program.alone, keys[members])
    for k, (_, name) in enumerate(program.members):
      drawn[name] = jax.tree.unflatten(
          program.structure, [leaf[k] for leaf in stack])
  return drawn


def _programs(key, drawers):
  """The different programs among drawers."""
  programs, known = {}, []
  for i, (name, drawer) in enumerate(drawers.items()):
    same = next((
        program for other, read, program in known
        if drawer.draws_as(other, read)), None)
    if same is None:
      recorded, read = base.recorded(drawer.info)
      # By its method, hashed by identity: a hash of the tuple reads every field.
      closed, out = jax.make_jaxpr(
          drawer._replace(info=recorded).slices, return_shape=True)(key)
      structure = jax.tree.structure(out)
      same = (str(closed.jaxpr), structure, *([] if not closed.consts else [name]))
      if not closed.consts:
        known.append((drawer, read, same))
      programs.setdefault(same, _Program(
          closed, structure, tuple(_draws(closed, key)), []))
    programs[same].members.append((i, name))
  return list(programs.values())


def _of_units(key, count):
  key, _ = jax.random.split(key)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


# Parts of what a key draws. Bits of threefry are a function of the key and of their
# position alone, whatever the shape (`jax_threefry_partitionable`, the default), so
# that a part can be drawn without what lies before it.


def _draws(closed: ClosedJaxpr, key: base.Key) -> Iterator[JaxprEqn]:
  """The equations of `bpjax_normals` that can be drawn in parts."""
  if not jax.config.jax_threefry_partitionable or not (
      jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
      and str(jax.random.key_impl(key)) == 'threefry2x32'):
    return
  late = set()  # What is made of numbers that were drawn.
  for eqn in closed.jaxpr.eqns:
    after = any(not isinstance(v, Literal) and v in late for v in eqn.invars)
    out = eqn.outvars[0].aval if eqn.outvars else None
    drawn = eqn.params.get('name') == bpjax_normals.__name__ and len(
        eqn.invars) == len(eqn.outvars) == 1
    if drawn and not after and out.shape[:-1] == eqn.invars[0].aval.shape and (
        0 < out.shape[-1] < 2**32) and jnp.issubdtype(out.dtype, jnp.floating):
      yield eqn
    if drawn or after:
      late.update(eqn.outvars)


def _wanted(eqn):
  """How many numbers a key draws, and their type."""
  aval = eqn.outvars[0].aval
  return aval.shape[-1], str(aval.dtype)


def _rows(eqn, sizes):
  """Parts of a draw, for all keys of it together."""
  count, dtype = _wanted(eqn)
  return math.prod(eqn.outvars[0].aval.shape[:-1]) * -(-count // sizes[dtype])


def _places(programs):
  """Program -> unit -> the first part of each of its draws; size of a part by type.

  The size is the one by which the least is drawn in vain.
  """
  wanted = {}
  for program in programs:
    for eqn in program.draws:
      count, dtype = _wanted(eqn)
      wanted.setdefault(dtype, []).append((
          count, len(program.members) * math.prod(eqn.outvars[0].aval.shape[:-1])))

  def cost(size, draws):
    return sum(-(-n // size) * (size + _OVERHEAD) * times for n, times in draws)

  sizes = {
      dtype: min((2**i for i in range(5, _LARGEST.bit_length())),
                 key=lambda size: cost(size, draws))  # pylint: disable=cell-var-from-loop
      for dtype, draws in wanted.items()}
  first, places = dict.fromkeys(sizes, 0), []
  for program in programs:
    of_units = [[] for _ in program.members]
    for eqn in program.draws:
      dtype = _wanted(eqn)[1]
      for places_of_unit in of_units:
        places_of_unit.append(first[dtype])
        first[dtype] += _rows(eqn, sizes)
    places.append(of_units)
  return places, sizes


class _Keys:
  """From a unit's key to those of its draws; equal to any that do the same."""

  def __init__(self, program: _Program):
    self.closed = program.of_keys()
    self._same = id(self) if self.closed.consts else str(self.closed.jaxpr)

  def __eq__(self, other):
    return isinstance(other, _Keys) and self._same == other._same

  def __hash__(self):
    return hash(self._same)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _all_keys(kinds, count, key):
  """The units' keys; and, by kind, those of each draw: of all units, `[units, ...]`.

  A program that all networks with as many units share.
  """
  keys = _of_units(key, count)
  return keys, [jax.vmap(jaxpr_as_fun(kind.closed))(keys) for kind in kinds]


def _all_numbers(programs, sizes, keys):
  """By type, all that programs draw, `[parts, size]`; `keys` are those of its draws."""
  parts = {dtype: [] for dtype in sizes}
  for program, found in zip(programs, keys, strict=True):
    members = np.array([i for i, _ in program.members])
    for eqn, own in zip(program.draws, found, strict=True):
      dtype = _wanted(eqn)[1]
      parts[dtype].append(_parts(eqn, own[members], sizes[dtype]))

  def draw(part, dtype):
    key = jax.random.wrap_key_data(part, impl=_FROM)
    return jax.random.normal(key, (sizes[dtype],), dtype)

  # One after the other: XLA compiles a loop's body once.
  return {
      dtype: jax.lax.map(functools.partial(draw, dtype=dtype), jnp.concatenate(found))
      for dtype, found in parts.items()}


def _parts(eqn, keys, size):
  """The words of each key, and where a part begins: `[parts, 3]`."""
  count, _ = _wanted(eqn)
  data = jax.random.key_data(keys).reshape(-1, 1, 2)
  first = size * np.arange(-(-count // size), dtype=np.uint32)
  shape = (len(data), len(first))
  return jnp.concatenate([
      jnp.broadcast_to(data, (*shape, 2)),
      jnp.broadcast_to(first[:, None], (*shape, 1))], 2).reshape(-1, 3)


def _cut(eqn, numbers, place, sizes):
  """A draw, from the parts that begin at a place."""
  count, dtype = _wanted(eqn)
  around = eqn.outvars[0].aval.shape[:-1]
  rows = jax.lax.dynamic_slice_in_dim(
      numbers[dtype], place, _rows(eqn, sizes), axis=0)
  return rows.reshape(*around, -1)[..., :count]


def _bits_from(data, width, shape):
  """Bits of threefry from a position on; `data` are a key's two words and that."""
  first, second, start = data
  place = start + jax.lax.iota(jnp.uint32, shape[0])
  high, low = random_lib.threefry2x32_p.bind(
      first, second, jnp.zeros_like(place), place)
  dtype = jnp.dtype(f'uint{width}')
  if width == 64:
    return high.astype(dtype) << 32 | low.astype(dtype)
  return (high ^ low).astype(dtype)


def _never(*_):
  raise NotImplementedError('a part of a draw has bits alone')


_FROM = random_lib.define_prng_impl(
    key_shape=(3,), seed=_never, split=_never, random_bits=_bits_from,
    fold_in=_never, name='bpjax_from', tag='bp')
