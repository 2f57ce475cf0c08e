"""A test case in float64, and comparisons of trees."""

from absl.testing import parameterized
import bpjax
import jax
import jax.numpy as jnp
import numpy as np


class Float64TestCase(parameterized.TestCase):
  """Runs every test with 64-bit types, and leaves the setting as it was."""

  def setUp(self):
    super().setUp()
    before = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', True)
    self.addCleanup(jax.config.update, 'jax_enable_x64', before)

  def assert_close(self, a, b, tolerance):
    """Equal structure, and every entry within `tolerance`, absolutely."""
    self.assertEqual(bpjax.paths.leaf_names(a), bpjax.paths.leaf_names(b))
    for name, p, q in zip(
        bpjax.paths.leaf_names(a), jax.tree.leaves(a), jax.tree.leaves(b)):
      self.assertEqual(np.shape(p), np.shape(q), name)
      self.assertLessEqual(np.abs(np.asarray(p) - np.asarray(q)).max(),
                           tolerance, name)


def doubles(tree):
  """All floats as float64."""
  return jax.tree.map(
      lambda a: jnp.asarray(a, jnp.float64)
      if jnp.issubdtype(a.dtype, jnp.floating) else jnp.asarray(a), tree)


def setup(model, x, *, seed=0, **kwargs):
  """(network, variables in float64, inputs in float64)."""
  x = doubles(x)
  net = bpjax.from_linen(model, **kwargs)
  return net, doubles(jax.jit(net.init)(jax.random.key(seed), x)), x
