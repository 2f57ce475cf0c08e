"""What an entry can reach: never less than its derivative says."""

from absl.testing import parameterized
from bpjax.networks import reach as reach_lib
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def allowed(axes, shape, inputs):
  """Mask [*output, *input] of the pairs that the digits do not exclude."""
  mask = np.ones((*shape, *inputs), bool)
  for place, digits in enumerate(axes):
    stride = shape[place]
    for size, source in digits:
      stride //= size
      if source is None:
        continue
      axis, step = source
      out = (np.arange(shape[place]) // stride) % size
      own = (np.arange(inputs[axis]) // step) % size
      pair = out[:, None] == own[None]
      wide = [1] * mask.ndim
      wide[place], wide[len(shape) + axis] = pair.shape
      mask &= pair.reshape(wide)
  return mask


def norm(x):
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


_W = jax.random.normal(jax.random.key(1), (6, 6))
_GROUPED = jax.random.normal(jax.random.key(2), (2, 3, 3))
_KERNEL = jax.random.normal(jax.random.key(3), (3, 3, 1, 4))
_conv = lambda x, k, groups: jax.lax.conv_general_dilated(
    x, k, (1, 1), 'SAME', feature_group_count=groups,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def loop(x):
  step = lambda c, a: (jnp.tanh(c @ _W + a), c)
  c, ys = jax.lax.scan(step, x[0], x)
  return c + ys.sum(0)


_CASES = {
    # name: (function, input shape, digits of the output or None)
    'elementwise': (lambda x: jnp.tanh(x) * x + 1, (2, 3), '0 1'),
    'dense': (lambda x: jax.nn.relu(x @ _W), (2, 5, 6), '0 1 -'),
    'norm': (norm, (2, 5, 6), '0 1 -'),
    'split': (lambda x: x.reshape(2, 5, 2, 3).sum(-1), (2, 5, 6), None),
    'grouped': (lambda x: norm(jnp.einsum(
        'npgi,gij->npgj', x.reshape(2, 5, 2, 3), _GROUPED)), (2, 5, 6), None),
    'merged': (lambda x: norm(x).reshape(2, 6), (2, 2, 3), None),
    'tokens': (lambda x: jnp.einsum('npc,pq->nqc', x, _W), (2, 6, 4), '0 - 2'),
    'transpose': (lambda x: jnp.swapaxes(x, 1, 2), (2, 3, 4), '0 2 1'),
    'batch': (lambda x: x - x.mean(0), (4, 3), '- 1'),
    'depthwise': (lambda x: _conv(x, _KERNEL, 4), (2, 5, 5, 4), '0 - - 3'),
    'kernel': (lambda k: _conv(jnp.ones((2, 5, 5, 4)), k, 4), (3, 3, 1, 4),
               '- - - 3'),
    'scan': (loop, (4, 3, 6), '1 -'),
    'pad': (lambda x: jnp.pad(x, ((0, 0), (1, 2))), (2, 3), '0 -'),
    'skip': (lambda x: x + jax.nn.softmax(x @ _W), (2, 6), '0 -'),
    'sort': (lambda x: jnp.sort(x, axis=1), (2, 6), '0 -'),
    'top_k': (lambda x: jax.lax.top_k(x, 2)[0], (2, 6), '0 -'),
    'unknown': (lambda x: x.at[:, 1].set(x[:, 0]), (2, 6), '- -'),
    'map': (lambda x: jax.lax.map(loop, x), (2, 4, 3, 6), '0 2 -'),
    'along': (lambda x: jnp.take_along_axis(
        x, jnp.array([[1], [0]]), axis=1), (2, 6), '0 -'),
    'labels': (lambda x: jax.nn.log_softmax(x)[
        jnp.arange(3), jnp.array([1, 0, 4])], (3, 6), '0'),
    'rows': (lambda x: x[jnp.array([2, 0, 2])], (3, 6), '- 1'),
    'branches': (lambda x: jax.lax.cond(
        jnp.array(True), lambda x: x @ _W, jnp.sin, x), (2, 6), '0 -'),
    'reordered': (lambda x: jax.lax.reshape(x, (3, 8), (1, 0, 2)), (2, 3, 4), '1 0'),
    'shape_changes': (lambda x: x.reshape(3, 4), (2, 6), None),
}


class ReachTest(parameterized.TestCase):

  @parameterized.named_parameters((n, *case) for n, case in _CASES.items())
  def test_covers_the_derivative(self, function, shape, expected):
    x = jax.random.normal(jax.random.key(0), shape)
    ((axes,),) = reach_lib.reach(jax.jit(function), x)
    jacobian = np.asarray(jax.jit(jax.jacobian(function))(x))
    out = jacobian.shape[:jacobian.ndim - x.ndim]
    mask = allowed(axes, out, shape)
    self.assertFalse(np.any(jacobian[~mask]))
    if expected is not None:
      sources = ['-' if all(s is None for _, s in digits) else
                 str(digits[0][1][0]) for digits in axes]
      self.assertEqual(' '.join(sources), expected)

  def test_finds_groups(self):
    ((axes,),) = reach_lib.reach(_CASES['grouped'][0], jnp.ones((2, 5, 6)))
    self.assertEqual(axes, (
        ((2, (0, 1)),), ((5, (1, 1)),), ((2, (2, 3)),), ((3, None),)))
    # Side by side again, and still apart.
    flat = lambda x: _CASES['grouped'][0](x).reshape(2, 5, 6) * 2
    ((axes,),) = reach_lib.reach(flat, jnp.ones((2, 5, 6)))
    self.assertEqual(axes[2], ((2, (2, 3)), (3, None)))

  def test_what_is_not_reached(self):
    f = lambda t: (jax.lax.stop_gradient(t['a']) + t['b'], t['a'].sum())
    first, second = reach_lib.reach(f, {'a': jnp.ones(3), 'b': jnp.ones(3)})
    self.assertEqual(first, [None, (((3, (0, 1)),),)])
    self.assertEqual(second, [(), None])

  def test_values_are_more_than_derivatives(self):
    f = lambda x: (x > 0).astype(x.dtype) + jnp.sign(x)
    self.assertEqual(reach_lib.reach(f, jnp.ones(3)), [[None]])
    axes = (((3, (0, 1)),),)
    self.assertEqual(reach_lib.reach(f, jnp.ones(3), values=True), [[axes]])
    # A surrogate derivative is no less than that.
    spike = jax.custom_jvp(f)
    spike.defjvps(lambda t, out, x: t)
    self.assertEqual(reach_lib.reach(spike, jnp.ones(3)), [[axes]])


if __name__ == '__main__':
  pytest.main([__file__])
