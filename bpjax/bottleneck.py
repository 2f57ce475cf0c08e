"""A fixed mask on the neurons of a layer, as an option of any rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any
import zlib

from bpjax import arguments
from bpjax import base
from bpjax import paths
from bpjax.engines import credit
from bpjax.engines import perturbation
import jax.numpy as jnp
import numpy as np

Neurons = int | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)  # Arrays have no hash.
class Mask:
  """Which neurons of which units learn. Made by `bottleneck`.

  Attributes:
    neurons: pairs of a path pattern and a number of neurons, or a bool for
      each of them.
    seed: of the choice, where a number is given.
  """
  neurons: tuple[tuple[str, Neurons], ...]
  seed: int

  def check(self, units: Iterable[str]) -> None:
    """Raises a ValueError for a pattern without a unit."""
    for pattern, _ in self.neurons:
      if not any(paths.matches(pattern, name) for name in units):
        raise ValueError(
            f'pattern `{pattern}` of `bottleneck` matches no unit; '
            f'{paths.nearest(pattern, units)}.')

  def check_unit(self, info: base.UnitInfo) -> None:
    """Raises a ValueError for a mask that does not fit a unit."""
    self.of(info.name, info.out.shape[-1])

  def of(self, unit: str, features: int) -> np.ndarray | None:
    """A bool for each neuron of a unit; None for a unit without a mask."""
    wanted = next(
        (n for p, n in self.neurons if paths.matches(p, unit)), None)
    if wanted is None:
      return None
    if isinstance(wanted, np.ndarray):
      if wanted.shape != (features,):
        raise ValueError(
            f'`neurons` of unit `{unit}` must be a bool for each of its '
            f'{features} neurons, got shape {wanted.shape}.')
      return wanted
    if wanted > features:
      raise ValueError(
          f'`neurons` of unit `{unit}` must be at most its {features}, got '
          f'{wanted}.')
    # A function of the seed and of the name: the same at every step, at every
    # resumption, whatever other units there are.
    generator = np.random.default_rng([self.seed, zlib.crc32(unit.encode())])
    mask = np.zeros(features, bool)
    mask[generator.choice(features, wanted, replace=False)] = True
    return mask

  def apply(self, name: str, x: base.Array) -> base.Array:
    """`x`, of a unit or inside it, with the other neurons' entries at 0."""
    mask = self.of(name, x.shape[-1])
    return x if mask is None else jnp.where(mask, x, 0)


@dataclasses.dataclass(frozen=True)
class _Bottleneck(credit.Rule):
  """A credit rule behind a mask."""
  rule: credit.Rule | None = None
  mask: Mask | None = None

  def rule_for(self, unit):
    label, rule = self.rule.rule_for(unit)

    def backward(unit, params, feedback, activations, signal):
      teaching = self.mask.apply(unit.info.name, signal.teaching)
      return rule.answer(
          unit, params, feedback, activations,
          signal._replace(teaching=teaching))

    return label, dataclasses.replace(rule, backward=backward)

  def check_names(self, units):
    self.rule.check_names(units)
    self.mask.check(units)

  def check(self, survey):
    super().check(survey)
    for info in survey.units.infos.values():
      self.mask.check_unit(info)


def bottleneck(
    rule: Any, neurons: Mapping[str, int | Any], seed: int = 0) -> Any:
  """Lets only some neurons of a layer learn, and send anything below.

  What reaches the other neurons' outputs is set to 0 before the rule sees it,
  so that neither their weights change nor a message of theirs goes down. Always
  the same neurons. How wide such a bottleneck has to be is the question of
  Principled training of neural networks with direct feedback alignment, Launay,
  Poli and Krzakala, 2019, section 3.4 (https://arxiv.org/abs/1906.04554). Under
  a perturbation, they are not perturbed either.

  Args:
    rule: any rule.
    neurons: path pattern -> how many neurons (features, channels: the last axis
      of the unit's output) learn, chosen at random, or a bool for each.
    seed: of the choice.

  Returns:
    A rule.

  Raises:
    ValueError: for a mask that leaves no neuron; when the network is known, for
      a pattern without a unit, or more neurons than a unit has.

  Example:
    >>> import bpjax
    >>> rule = bpjax.bottleneck(
    ...     bpjax.rules.feedback_alignment(), {'Dense_1': 118})
  """
  if not isinstance(neurons, Mapping):
    raise ValueError(
        '`neurons` needs a mapping from path patterns to numbers, got '
        f'{type(neurons).__name__}.')
  arguments.patterns('neurons', neurons)
  arguments.whole('seed', seed, least=0)
  seed = int(seed)
  if not neurons:
    raise ValueError('`neurons` needs at least one path pattern, got none.')
  checked = []
  for pattern, wanted in neurons.items():
    try:
      array = np.asarray(wanted)
    except ValueError:  # Ragged.
      array = np.asarray(None)
    if not array.dtype.kind == 'b' if array.ndim else (
        array.dtype.kind not in 'iuf' or wanted != wanted // 1):
      raise ValueError(
          f'`neurons` of `{pattern}` must be a whole number or a bool for each '
          f'neuron, got {wanted!r}.')
    wanted = array if array.ndim else int(wanted)
    if np.sum(wanted) < 1:
      raise ValueError(
          f'`neurons` of `{pattern}` must leave at least one neuron that '
          f'learns, got {wanted!r}; to keep a layer as it is, leave its updates '
          'out of the optimiser.')
    checked.append((pattern, wanted))
  mask = Mask(tuple(checked), seed)
  if isinstance(rule, credit.Rule):
    return _Bottleneck(
        name=rule.name, backward=None, linear=rule.linear, rule=rule, mask=mask)
  if isinstance(rule, perturbation.Rule):
    return dataclasses.replace(rule, mask=mask)
  raise ValueError(
      '`rule` must be of the credit or the perturbation engine, such as '
      'bpjax.rules.feedback_alignment(), got '
      f'{getattr(rule, "name", rule)!r}; under local losses mask the rule of '
      'the blocks, bpjax.local(bpjax.bottleneck(rule, ...), ...).')
