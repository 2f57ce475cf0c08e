"""Feedback of many units is drawn together: each as alone, what is alike once."""

import bpjax
from bpjax import feedback as feedback_lib
from bpjax import projection
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _network(layers=6, width=5):
  def apply(params, x, train=False):
    del train
    for name in sorted(params):
      x = jnp.tanh(x @ params[name]['w'])
    return x

  params = {f'layer_{i}': {'w': jnp.eye(width)} for i in range(layers)}
  return bpjax.from_function(apply), {'params': params}, jnp.ones((3, width))


def _told(network, variables, x):
  return {name: unit.info for name, unit in network.survey(
      variables, x).units.items()}


@pytest.mark.parametrize('lengths', [(), (4,), (2, 3)])
def test_each_is_drawn_as_alone(lengths):
  infos = _told(*_network())
  key = jax.random.key(3)

  def draw(key, info, params):
    return feedback_lib.draw(key, info, params, scale=2.)

  drawn = feedback_lib.drawn_together(key, {
      name: feedback_lib.Drawer(draw, info, info.params, lengths)
      for name, info in infos.items()})
  for i, (name, info) in enumerate(infos.items()):
    one = lambda key: draw(key, info, info.params)  # pylint: disable=cell-var-from-loop
    for _ in lengths:
      one = jax.vmap(one)
    own = jax.random.fold_in(key, i)
    alone = one(jax.random.split(own, lengths) if lengths else own)
    assert jax.tree.structure(alone) == jax.tree.structure(drawn[name])
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(drawn[name])):
      assert a.shape == b.shape[:len(lengths)] + (5, 5)
      np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_is_alike_is_traced_once():
  infos, traced = _told(*_network()), []

  def draw(key, info, params):
    traced.append(info.name if info.sends else 'the first')
    return feedback_lib.draw(key, info, params, scale=1.)

  drawer = lambda draw: {
      name: feedback_lib.Drawer(draw, info, info.params)
      for name, info in infos.items()}
  feedback_lib.drawn_together(jax.random.key(0), drawer(draw))
  # It reads the name of all that send: each is traced, and one is compiled.
  assert set(traced) == {'the first', *list(infos)[1:]}

  sent = []

  def quiet(key, info, params):
    sent.append(info.sends)
    return feedback_lib.draw(key, info, params, scale=1.)

  feedback_lib.drawn_together(jax.random.key(0), drawer(quiet))
  assert sent.count(False) == 2 and sent.count(True) == 2  # Traced and compiled.


def test_what_reads_more_of_a_unit_draws_for_each():
  infos = _told(*_network())

  def draw(key, info, params):
    del key, params
    return jnp.asarray(float(info.name.removeprefix('layer_').removesuffix('/w')))

  drawn = feedback_lib.drawn_together(jax.random.key(0), {
      name: feedback_lib.Drawer(draw, info, info.params)
      for name, info in infos.items()})
  assert [float(v) for v in drawn.values()] == list(range(6))


def test_what_an_info_has_not_is_answered_with_what_it_has():
  info = next(iter(_told(*_network()).values()))
  with pytest.raises(AttributeError, match="no 'output'; it has name, kind, .*out"):
    _ = info.output


def test_what_a_rule_gets_wrong_is_one_sentence():
  net, variables, x = _network(2)

  def learn(backward):
    from bpjax.engines import UnitRule
    rule = UnitRule(
        name='mine', init_unit=lambda key, info, params: jnp.ones((5, 5)),
        backward=backward)
    feedback = rule.init(jax.random.key(0), net, variables, x)
    rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)(
        variables, feedback, x, jnp.zeros(3, int))

  with pytest.raises(TypeError, match='what `unit.delta.teaching.` returned'):
    learn(lambda unit, feedback, signal: bpjax.Credit(
        unit.grad(signal.teaching), (None,)))
  with pytest.raises(ValueError, match='labels have to be one-hot'):
    learn(lambda unit, feedback, signal: bpjax.Credit(
        unit.grad(unit.delta(signal.teaching)), projection.messages(
            unit, signal.target[:, None], feedback)))
  reader = net.survey(variables, jnp.ones((3, 5), int)).units['layer_0'].info
  assert not projection.sends(reader)
  with pytest.raises(ValueError, match='`layer_0` sends no message'):
    projection.feedback_shape(reader)
