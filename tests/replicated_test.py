"""The fused replicated losses against copies that are really made."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax import replicated
import float64
import jax
import jax.numpy as jnp
import numpy as np

_ALL = 'block+patch+group'
_LOSS = bpjax.losses.softmax_cross_entropy


def pooled_cross_entropy(z, head, labels):
  return _LOSS(z @ head['kernel'] + head['bias'], labels)


def pooled_info_nce(z, head, labels, other, temperature, negatives):
  """One row at a time, written out."""
  del labels
  length = lambda u: u / jnp.sqrt(jnp.sum(u * u))
  fixed = jax.lax.stop_gradient
  losses = []
  for i in range(len(z)):
    own = length(z[i] @ head['kernel'] + head['bias'])
    project = lambda row: fixed(length(row @ head['kernel'] + head['bias']))
    scores = [own @ project(o) / temperature for o in other]
    if negatives == 'both':
      scores += [own @ project(z[j]) / temperature
                 for j in range(len(z)) if j != i]
    losses.append(jnp.log(sum(map(jnp.exp, scores))) - scores[i])
  return jnp.stack(losses)


def copies(x, patch, group):
  """Features [batch, P', G', P, G, C/G] in which only one's own part moves."""
  patches, groups = x.shape[1:3]
  same = lambda n, apart: (
      jnp.eye(n, dtype=bool) if apart else jnp.ones((1, n), bool))
  own = same(patches, patch)[:, None, :, None] & same(
      groups, group)[None, :, None, :]
  whole = x[:, None, None]
  return jnp.where(own[..., None], whole, jax.lax.stop_gradient(whole))


def naive(loss, placement, x, head, *targets):
  """The replicated loss by its definition: one pooled loss for every copy."""
  every = copies(x, *replicated.PLACEMENTS[placement])
  z = every.mean(axis=3).reshape(*every.shape[:3], -1)
  by_patch = jax.vmap(lambda z: loss(z, head, *targets), 1, 1)
  return jax.vmap(by_patch, 2, 2)(z)


def data(patches, groups, batch=3, width=2, classes=5, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  draw = functools.partial(jax.random.normal, dtype=jnp.float64)
  x = draw(keys[0], (batch, patches, groups, width))
  head = {'kernel': draw(keys[1], (groups * width, classes)),
          'bias': draw(keys[2], (classes,))}
  return x, head, jnp.arange(batch) % classes, draw(keys[3], x.shape)


def derivatives(function, x, head, seed=3):
  """Value; jvp along random x and head; vjp of unequal cotangents."""
  def tangent(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [
        jax.random.normal(k, l.shape, l.dtype) for k, l in zip(keys, leaves)])

  value, pull = jax.vjp(function, x, head)
  _, along_x = jax.jvp(lambda x: function(x, head), (x,), (tangent(x, seed),))
  _, along_both = jax.jvp(
      function, (x, head), (tangent(x, seed), tangent(head, seed + 1)))
  return {
      'value': value, 'along_x': along_x, 'along_both': along_both,
      'vjp': pull(tangent(value, seed + 2))}


class NaiveTest(float64.Float64TestCase):

  @parameterized.product(patches=(1, 2, 4, 16), groups=(1, 2, 4, 16))
  def test_cross_entropy(self, patches, groups):
    x, head, labels, _ = data(patches, groups)
    fused = lambda x, head: replicated.cross_entropy(
        x, head, labels, head_scale='sum')
    slow = lambda x, head: naive(pooled_cross_entropy, _ALL, x, head, labels)
    a, b = jax.jit(lambda *args: (
        derivatives(fused, *args), derivatives(slow, *args)))(x, head)
    self.assertEqual(a['value'].shape, (3, patches, groups))
    self.assert_close(a, b, 1e-12)

  @parameterized.product(
      shape=((1, 1), (4, 2), (2, 16)), negatives=('other', 'both'))
  def test_info_nce(self, shape, negatives):
    x, head, labels, other = data(*shape)
    pooled = other.mean(axis=1).reshape(len(x), -1)
    fused = lambda x, head: replicated.info_nce(
        x, head, other, temperature=.3, negatives=negatives, head_scale='sum')

    def slow(x, head):
      every = copies(x, True, True)
      z = every.mean(axis=3).reshape(*every.shape[:3], -1)
      one = lambda z: pooled_info_nce(z, head, labels, pooled, .3, negatives)
      return jax.vmap(jax.vmap(one, 1, 1), 2, 2)(z)

    a, b = jax.jit(lambda *args: (
        derivatives(fused, *args), derivatives(slow, *args)))(x, head)
    self.assert_close(a, b, 1e-12)

  @parameterized.parameters(
      ('block', (3, 1, 1)), ('block+patch', (3, 4, 1)),
      ('block+group', (3, 1, 2)), (_ALL, (3, 4, 2)))
  def test_placement(self, placement, shape):
    x, head, labels, _ = data(4, 2)
    fused = lambda x, head: replicated.cross_entropy(
        x, head, labels, placement=placement, head_scale='sum')
    slow = lambda x, head: naive(
        pooled_cross_entropy, placement, x, head, labels)
    a, b = jax.jit(lambda *args: (
        derivatives(fused, *args), derivatives(slow, *args)))(x, head)
    self.assertEqual(a['value'].shape, shape)
    self.assert_close(a, b, 1e-12)

  def test_any_loss_without_a_bias_and_with_probabilities(self):
    x, head, _, _ = data(4, 2)
    kernel = {'kernel': head['kernel']}
    y = jax.nn.softmax(data(1, 1)[0].reshape(3, 2) @ jnp.ones((2, 5)))

    def squared(z, head, y):
      return bpjax.losses.squared_error(jnp.tanh(z @ head['kernel']), y)

    fused = lambda x, head: replicated.replicate(
        squared, x, head, y, head_scale='sum')
    self.assert_close(
        *jax.jit(lambda *args: (
            derivatives(fused, *args),
            derivatives(lambda x, head: naive(
                squared, _ALL, x, head, y), *args)))(x, kernel), 1e-12)
    fused = lambda x, head: replicated.cross_entropy(
        x, head, y, head_scale='sum')
    both = {**head, 'bias': jnp.zeros(5)}
    self.assert_close(
        *jax.jit(lambda *args: (
            derivatives(lambda x, h: fused(x, {'kernel': h['kernel']}), *args),
            derivatives(lambda x, h: naive(
                lambda z, head, y: _LOSS(z @ head['kernel'], y), _ALL, x, h, y),
                        *args)))(x, both), 1e-12)


class IdentitiesTest(float64.Float64TestCase):

  def test_values_are_those_of_the_pooled_loss(self):
    x, head, labels, _ = data(4, 2)
    x32, head32 = jax.tree.map(lambda a: a.astype(jnp.float32), (x, head))
    z = x32.mean(axis=1).reshape(3, -1)
    pooled = pooled_cross_entropy(z, head32, labels)
    got = replicated.cross_entropy(x32, head32, labels)
    np.testing.assert_array_equal(
        got, np.broadcast_to(np.asarray(pooled)[:, None, None], (3, 4, 2)))

  @parameterized.parameters(*replicated.PLACEMENTS)
  def test_all_copies_together_are_one_loss(self, placement):
    x, head, labels, _ = data(4, 2)

    def local(x, head):
      return replicated.cross_entropy(
          x, head, labels, placement=placement).sum()

    def one(x, head):
      return pooled_cross_entropy(
          x.mean(axis=1).reshape(3, -1), head, labels).sum()

    both = jax.jit(lambda *args: (
        jax.grad(local, (0, 1))(*args), jax.grad(one, (0, 1))(*args)))
    self.assert_close(*both(x, head), 1e-13)

  def test_one_patch_and_group_is_the_plain_loss(self):
    x, head, labels, _ = data(1, 1, width=6)
    fused = lambda x, head: replicated.cross_entropy(x, head, labels)[:, 0, 0]
    plain = lambda x, head: pooled_cross_entropy(x[:, 0, 0], head, labels)
    a, b = jax.jit(lambda *args: (
        derivatives(fused, *args), derivatives(plain, *args)))(x, head)
    self.assert_close(a, b, 1e-13)

  @parameterized.parameters('mean', 'sum')
  def test_forward_and_reverse_are_each_others_transpose(self, head_scale):
    x, head, labels, dx = data(4, 2)
    function = lambda x, head: replicated.cross_entropy(
        x, head, labels, head_scale=head_scale)
    dhead = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size)).reshape(w.shape),
                         head)
    ct = jnp.sin(jnp.arange(3. * 4 * 2)).reshape(3, 4, 2)

    @jax.jit
    def both(x, head):
      _, push = jax.linearize(function, x, head)
      back, back_head = jax.vjp(function, x, head)[1](ct)
      along = jax.vmap(push)(
          jnp.stack([dx, 2 * dx]), jax.tree.map(lambda w: jnp.stack([w, w]),
                                                dhead))
      sent = jnp.vdot(back, dx) + sum(
          jnp.vdot(back_head[k], dhead[k]) for k in head)
      return jnp.vdot(ct, along[0]), sent, along

    forward, reverse, along = both(x, head)
    self.assertAlmostEqual(float(forward), float(reverse), 12)
    _, twice = jax.jvp(function, (x, head), (2 * dx, dhead))
    np.testing.assert_allclose(along[1], twice, atol=1e-13)

  def test_the_scale_of_the_head_is_the_number_of_copies(self):
    x, head, labels, _ = data(4, 2)
    grad = jax.grad(lambda head, scale: replicated.cross_entropy(
        x, head, labels, head_scale=scale).sum())
    self.assert_close(
        grad(head, 'sum'), jax.tree.map(lambda g: 8 * g, grad(head, 'mean')),
        1e-12)

  def test_the_other_view_is_a_constant(self):
    x, head, _, other = data(2, 2)
    grad = jax.grad(lambda other: replicated.info_nce(x, head, other).sum())
    self.assertFalse(grad(other).any())
    labels = jax.nn.softmax(jnp.ones((3, 5), jnp.float64))
    grad = jax.grad(
        lambda labels: replicated.cross_entropy(x, head, labels).sum())
    self.assertFalse(grad(labels).any())

  def test_half_precision(self):
    x, head, labels, dx = data(4, 2)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    function = lambda x, head: replicated.cross_entropy(x, head, labels)
    value, change = jax.jvp(
        function, half((x, head)), half((dx, head)))
    self.assertEqual((value.dtype, change.dtype), (jnp.bfloat16,) * 2)
    exact, _ = jax.jvp(function, (x, head), (dx, head))
    np.testing.assert_allclose(
        value.astype(jnp.float64), exact, rtol=.05, atol=.05)
    grad = jax.grad(lambda x: function(x, half(head)).sum())(half(x))
    self.assertEqual(grad.dtype, jnp.bfloat16)


class MemoryTest(parameterized.TestCase):

  @parameterized.parameters('jvp', 'grad')
  def test_no_copies_are_made(self, mode):
    batch, patches, groups, width = 4, 16, 16, 32
    x = jax.ShapeDtypeStruct((batch, patches, groups, width), jnp.float32)
    head = {'kernel': jnp.zeros((groups * width, 10)), 'bias': jnp.zeros(10)}
    labels = jnp.arange(batch)

    def temporaries(function):
      losses = lambda x: function(x, head, labels)
      run = {
          'jvp': lambda x: jax.jvp(losses, (x,), (x,)),
          'grad': jax.grad(lambda x: losses(x).sum())}[mode]
      return jax.jit(run).lower(x).compile().memory_analysis(
          ).temp_size_in_bytes

    size = 4 * batch * patches * groups * width
    self.assertLess(temporaries(replicated.cross_entropy), 1.5 * size)
    self.assertGreater(
        temporaries(functools.partial(naive, pooled_cross_entropy, _ALL)),
        groups * size)


class ShardingTest(float64.Float64TestCase):

  @parameterized.product(
      axes=('Auto', 'Explicit'), loss=('cross_entropy', 'info_nce'))
  def test_examples_on_four_devices(self, axes, loss):
    x, head, labels, other = data(2, 2, batch=4)
    target = labels if loss == 'cross_entropy' else other

    @jax.jit
    def run(x, head, target):
      losses = lambda x, head: getattr(replicated, loss)(x, head, target)
      _, change = jax.jvp(lambda x: losses(x, head), (x,), (x,))
      return change, jax.grad(lambda *args: losses(*args).sum(), (0, 1))(
          x, head)

    expected = run(x, head, target)
    mesh = jax.make_mesh(
        (4,), ('data',), axis_types=(jax.sharding.AxisType[axes],),
        devices=jax.devices()[:4])
    place = lambda tree, *axes: jax.device_put(
        tree, jax.NamedSharding(mesh, jax.P(*axes)))
    with jax.set_mesh(mesh):
      got = run(place(x, 'data'), place(head), place(target, 'data'))
    self.assert_close(got, expected, 1e-13)


class ErrorsTest(parameterized.TestCase):

  def test_cross_entropy(self):
    x, labels = jnp.ones((2, 4, 2, 3)), jnp.array([0, 1])
    head = {'kernel': jnp.ones((6, 5)), 'bias': jnp.ones(5)}
    loss = replicated.cross_entropy
    with self.assertRaisesRegex(ValueError, r"`head\['kernel'\]` .*\[6, outp"):
      loss(x, {**head, 'kernel': jnp.ones((5, 5))}, labels)
    with self.assertRaisesRegex(ValueError, r"`head` must hold a 'kernel'"):
      loss(x, {'bias': jnp.ones(5)}, labels)
    with self.assertRaisesRegex(ValueError, r"`head\['bias'\]` must have"):
      loss(x, {**head, 'bias': jnp.ones(6)}, labels)
    with self.assertRaisesRegex(ValueError, '`x` must be features .*group`'):
      loss(x.reshape(2, 4, 6), head, labels)
    with self.assertRaisesRegex(ValueError, '`x` must be features .*int32'):
      loss(x.astype(int), head, labels)
    with self.assertRaisesRegex(ValueError, "`placement` must be 'block', "):
      loss(x, head, labels, placement='patch')
    with self.assertRaisesRegex(ValueError, "`head_scale` must be 'mean' or"):
      loss(x, head, labels, head_scale='max')
    with self.assertRaisesRegex(ValueError, 'integer labels `y` must have'):
      loss(x, head, jnp.arange(3))

  def test_info_nce(self):
    x, head = jnp.ones((2, 4, 2, 3)), {'kernel': jnp.ones((6, 5))}
    with self.assertRaisesRegex(ValueError, '`other` must have the shape of'):
      replicated.info_nce(x, head, x[:1])
    with self.assertRaisesRegex(ValueError, '`temperature` must be positive'):
      replicated.info_nce(x, head, x, temperature=0.)
    with self.assertRaisesRegex(ValueError, "`negatives` must be 'other' or"):
      replicated.info_nce(x, head, x, negatives='same')

  def test_group(self):
    with self.assertRaisesRegex(ValueError, '`groups` must divide the channe'):
      replicated.group(jnp.ones((2, 3, 3, 10)), 4)
    with self.assertRaisesRegex(ValueError, r'\[batch, ..., channels\]'):
      replicated.group(jnp.ones(3), 1)
    x = jnp.arange(2. * 6 * 8).reshape(2, 2, 3, 8)
    np.testing.assert_array_equal(
        replicated.group(x, 4)[1, 5, 2], x[1, 1, 2, 4:6])
    self.assertEqual(replicated.group(jnp.ones((2, 8)), 1).shape, (2, 1, 1, 8))


if __name__ == '__main__':
  absltest.main()
