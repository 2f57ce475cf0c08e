"""Feedback that is never stored: drawn again from its key where it is used."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from bpjax.engines import credit
from bpjax.networks import trace as trace_lib
import jax


def unstored(rule: credit.Rule) -> credit.Rule:
  """The rule whose units keep the key of their fixed feedback in its place.

  Each unit draws its feedback in its own backward pass, in the memory of one,
  with the numbers that the rule itself would have kept.

  Args:
    rule: a rule of the credit engine whose feedback is fixed, unit by unit.

  Returns:
    The rule; `feedback[unit]` holds a key's data, of whole numbers.
  """

  def init_unit(key, info, params):
    drawn = jax.eval_shape(lambda: rule.init_unit(key, info, params))
    if drawn is None:
      return None
    if _are_weights(drawn, info.params) and not info.weights_as_kept:
      raise ValueError(
          f'`stored` must be True for unit `{info.name}`, whose weights are '
          'transposed, normalised or tied on the way: feedback that is kept '
          'goes through the same operations.')
    data = jax.random.key_data(key)
    if data.shape != jax.random.key_data(jax.random.key(0)).shape:
      raise ValueError(
          '`stored=False` draws with the default generator of `jax.random`, and '
          f'`key` is of another, {jax.random.key_impl(key)}; set '
          '`jax_default_prng_impl` to that.')
    return data

  def draw(info, data):
    return rule.init_unit(jax.random.wrap_key_data(data), info, info.params)

  def backward(unit, params, feedback, activations, signal):
    if feedback is not None:
      feedback = draw(unit.info, credit.late(feedback, signal.teaching))
      if _are_weights(feedback, params):
        feedback = _placed(feedback, params)
    return rule.answer(unit, params, feedback, activations, signal)

  def weight_target(units, params, feedback):
    drawn = {name: draw(units[name], data) for name, data in feedback.items()}
    return rule.weight_target(units, params, drawn)

  return dataclasses.replace(
      rule, init_unit=init_unit, backward=backward,
      weight_target=rule.weight_target and weight_target)


def _are_weights(feedback, params):
  """Whether feedback stands for parameters, and is no matrix of its own."""
  return isinstance(feedback, Mapping) and feedback.keys() <= params.keys()


def _placed(feedback, params):
  """Weights in the dtype of those that they stand for, and where these lie."""
  if isinstance(feedback, Mapping):
    return {k: _placed(v, params[k]) for k, v in feedback.items()}
  place = trace_lib.explicit(jax.typeof(params))
  feedback = feedback.astype(params.dtype)
  return feedback if place is None else jax.sharding.reshard(feedback, place)
