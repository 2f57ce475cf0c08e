"""Every rule on every kind of layer, and across what lies between them."""

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
from tests import float64
from tests import zoo

_LOSS = bpjax.losses.softmax_cross_entropy


class Layers(nn.Module):
  """Convolutions of every kind, dense connections, norms, pooling, dropout."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (3, 3), name='conv')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    y = nn.Conv(4, (3, 3), feature_group_count=2, name='grouped')(x)
    x = jnp.concatenate([x, nn.tanh(nn.GroupNorm(2)(y))], axis=-1)
    y = nn.Conv(2, (3, 3), kernel_dilation=2, name='dilated')(x)
    x = jnp.concatenate([x, nn.relu(y)], axis=-1)
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.tanh(nn.ConvTranspose(3, (2, 2), strides=(2, 2), name='transposed')(x))
    x = nn.Conv(4, (2, 2), strides=2, padding='VALID', name='strided')(x)
    x = nn.avg_pool(nn.elu(x), (2, 2), (2, 2))
    x = nn.tanh(nn.ConvLocal(3, (2, 2), padding='VALID', name='local')(x))
    x = nn.Dropout(.25, deterministic=not train)(x.reshape(x.shape[0], -1))
    x = nn.DenseGeneral((2, 3), name='general')(x)
    x = nn.tanh(nn.LayerNorm()(x))
    x = nn.Einsum((2, 3, 5), 'nab,abc->nc', name='einsum')(x)
    return nn.Dense(3, name='readout')(nn.tanh(x))


def exact_feedback(rule, net, variables, x):
  """The feedback under which a rule is backprop."""
  feedback = rule.init(jax.random.key(1), net, variables, x)
  def own(name, _):
    weights = bpjax.paths.subtree(variables['params'], name)
    return jnp.abs(weights) if rule.name == 'sign_symmetry' else weights
  return bpjax.paths.map_with_name(own, feedback)


class LayersTest(float64.Float64TestCase):

  @parameterized.product(
      rule=(
          bpjax.rules.feedback_alignment(), bpjax.rules.kolen_pollack(),
          bpjax.rules.weight_mirror(samples=2),
          bpjax.rules.sign_symmetry('frSF')),
      model=('layers', 'encoder'))
  def test_is_backprop_where_feedback_is_the_weights(self, rule, model):
    if model == 'layers':
      module, y = Layers(), jnp.arange(4) % 3
      x = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    else:
      module, x, y = zoo.inputs(model)
    net, variables, x = float64.setup(module, x)
    feedback = exact_feedback(rule, net, variables, x)
    with_something_below = {
        name for name, info in net.units.infos.items() if info.sends}
    self.assertEqual(
        {name.rpartition('/')[0] for name in bpjax.paths.leaf_names(feedback)},
        with_something_below)
    args = (x, y, jax.random.key(2))
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, *args)
    _, (exact, _) = zoo.learn(bpjax.rules.backprop(), net)(
        variables, {}, *args)
    self.assert_close(grads, exact, 1e-13)

  @parameterized.parameters(
      'direct_feedback_alignment', 'sign_symmetry', 'forward_gradient')
  def test_every_parameter_learns(self, name):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    net, variables, x = float64.setup(Layers(), x)
    rule = bpjax.rules.get(name)()
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (grads, _) = zoo.learn(rule, net)(
        variables, feedback, x, jnp.arange(4) % 3, jax.random.key(2))
    for path, leaf in zip(
        bpjax.paths.leaf_names(grads), jax.tree.leaves(grads)):
      self.assertGreater(jnp.abs(leaf).max(), 0, path)


if __name__ == '__main__':
  absltest.main()
