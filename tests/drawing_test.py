"""Feedback of many units is drawn together: each as alone, what is alike once."""

import bpjax
from bpjax import drawing
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

  drawn = drawing.drawn_together(key, {
      name: drawing.Drawer(draw, info, info.params, lengths)
      for name, info in infos.items()})
  for i, (name, info) in enumerate(infos.items()):
    one = lambda key: draw(key, info, info.params)  # pylint: disable=cell-var-from-loop
    for _ in lengths:
      one = jax.vmap(one)
    own = jax.random.fold_in(jax.random.split(key)[0], i)
    alone = one(jax.random.split(own, lengths) if lengths else own)
    assert jax.tree.structure(alone) == jax.tree.structure(drawn[name])
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(drawn[name])):
      assert a.shape == b.shape[:len(lengths)] + (5, 5)
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('double', [False, True])
def test_parts_are_the_numbers_of_a_whole_draw(double):
  """Many shapes and types from one loop; inside a program of the caller's, too."""
  infos = _told(*_network())
  shapes = [(1,), (3, 7), (70_001,), (2, 65_536), (129, 5), (0, 4)]
  types = [jnp.float32, jnp.bfloat16, jnp.complex64, jnp.float16, jnp.float64]

  def draw(key, info, params):
    del params
    number = int(info.name[len('layer_')])
    dtype = jnp.dtype(types[number % (5 if double else 4)])
    a, b = jax.random.split(key)
    drawn = feedback_lib.normal(a, shapes[number], dtype)
    return {'a': drawn, 'b': 2 * feedback_lib.normal(b, shapes[-2], dtype),
            'late': feedback_lib.normal(
                jax.random.fold_in(b, jnp.sum(drawn > 0)), (6,), dtype)}

  def alone(i):
    own = jax.random.fold_in(jax.random.split(key)[0], i)
    return jax.jit(lambda key: draw(key, infos[f'layer_{i}'], {}))(own)

  with jax.enable_x64(double):
    key = jax.random.key(3)
    made = lambda key: drawing.drawn_together(key, {
        name: drawing.Drawer(draw, info, {}) for name, info in infos.items()})
    for drawn in (made(key), jax.jit(made)(key)):
      assert list(drawn) == list(infos)
      for i, name in enumerate(infos):
        for a, b in zip(
            jax.tree.leaves(alone(i)), jax.tree.leaves(drawn[name]), strict=True):
          assert a.dtype == b.dtype and a.shape == b.shape
          np.testing.assert_array_equal(a, b)


def test_other_keys_draw_as_they_do_alone():
  infos = _told(*_network(2))
  draw = lambda key, info, params: feedback_lib.draw(key, info, params, scale=1.)
  for key in (jax.random.key(3, impl='rbg'), jax.random.PRNGKey(3)):
    drawn = drawing.drawn_together(key, {
        name: drawing.Drawer(draw, info, info.params)
        for name, info in infos.items()})
    own = jax.random.fold_in(jax.random.split(key)[0], 1)
    info = infos['layer_1']
    np.testing.assert_allclose(
        draw(own, info, info.params)['w'], drawn['layer_1']['w'], rtol=1e-6)


def test_all_normal_numbers_are_compiled_once():
  """Of layers of different widths: one program draws, and another cuts."""
  def apply(params, x, train=False):
    del train
    for name in sorted(params):
      x = jnp.tanh(x @ params[name])
    return x

  widths = [4, 5, 6, 7, 8, 9]
  params = {f'layer_{i}': jnp.ones(pair)
            for i, pair in enumerate(zip(widths, widths[1:]))}
  net, x = bpjax.from_function(apply), jnp.ones((3, 4))
  rule = bpjax.rules.feedback_alignment()
  jaxpr = str(jax.make_jaxpr(lambda key: rule.init(
      key, net, {'params': params}, x))(jax.random.key(0)))
  assert jaxpr.count('erf_inv') == 4  # The caller's program: one a shape.
  programs = []
  original = jax.jit

  def counted(function, **kwargs):
    def traced(*args):
      programs.append(str(jax.make_jaxpr(function, **kwargs)(*args)))
      return original(function, **kwargs)(*args)
    return traced

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'jit', counted)
    rule.init(jax.random.key(0), net, {'params': params}, x)
  assert sum(p.count('erf_inv') for p in programs) == 1
  assert len(programs) == 2


def test_what_is_alike_is_traced_once():
  infos, traced = _told(*_network()), []

  def draw(key, info, params):
    traced.append(info.name if info.sends else 'the first')
    return feedback_lib.draw(key, info, params, scale=1.)

  drawer = lambda draw: {
      name: drawing.Drawer(draw, info, info.params)
      for name, info in infos.items()}
  drawing.drawn_together(jax.random.key(0), drawer(draw))
  # It reads the name of all that send: each is traced, and one is compiled.
  assert set(traced) == {'the first', *list(infos)[1:]}

  sent = []

  def quiet(key, info, params):
    sent.append(info.sends)
    return feedback_lib.draw(key, info, params, scale=1.)

  drawing.drawn_together(jax.random.key(0), drawer(quiet))
  assert sent == [False, True]


def test_what_reads_more_of_a_unit_draws_for_each():
  infos = _told(*_network())

  def draw(key, info, params):
    del key, params
    return jnp.asarray(float(info.name.removeprefix('layer_').removesuffix('/w')))

  drawn = drawing.drawn_together(jax.random.key(0), {
      name: drawing.Drawer(draw, info, info.params)
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
