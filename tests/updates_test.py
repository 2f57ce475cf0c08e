"""One step of the tables' networks and rules against kept numbers.

The numbers were made before rules acted on traces, by

  python tests/updates_test.py tests/fixtures/updates.json

so that tables which are not trained again stay what they are. Random draws of a
rule (noise of inverses, mirrors, directions) are left out, as are those of
feedback: it is filled by the names of its leaves.
"""

import json
import pathlib
import sys
import zlib

import bpjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

_FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'updates.json'
_LOSS = bpjax.losses.softmax_cross_entropy
_models, _rules = bpjax.models, bpjax.rules


def _mlp(units='affine', activation='tanh', widths=(12, 11)):
  return _models.mlp(10, widths=widths, activation=activation, units=units)


_DIRECT = {'boundaries': ('stage_*/block_*',)}
# Name -> (model, shape of an image, rule, arguments of the network).
CASES = {
    **{f'mnist_mlp {name}': (_mlp, (6, 6, 1), _rules.get(name), {}) for name in (
        'backprop', 'feedback_alignment', 'direct_feedback_alignment',
        'kolen_pollack', 'sign_symmetry')},
    'akrout_mnist frSF': (_mlp, (6, 6, 1), lambda: _rules.sign_symmetry('frSF'),
                          {}),
    'mnist_random_features shared': (
        lambda: _mlp(activation='relu'), (6, 6, 1),
        lambda: _rules.direct_feedback_alignment(shared=True), {}),
    'launay_mlp direct': (
        lambda: _models.launay_mlp(10, (12, 11), batch_norm=True), (6, 6, 1),
        _rules.direct_feedback_alignment, {}),
    'launay_cnn direct': (
        lambda: _models.launay_cnn(10), (32, 32, 3),
        _rules.direct_feedback_alignment, {}),
    **{f'reclra_mnist {name}': (
        lambda: _mlp('layer', widths=(12, 12, 12)), (6, 6, 1),
        lambda name=name, arguments=arguments: _rules.get(name)(**arguments), {})
       for name, arguments in (
           ('local_representation_alignment', {}),
           ('recursive_local_representation_alignment', {}),
           ('difference_target_propagation', {'sigma': 0.}),
           ('target_propagation', {'sigma': 0.}),
           ('equilibrium_propagation', {'nudge': 'positive'}))},
    'reclra_deep meta': (
        lambda: _models.residual_mlp(10, (12,) * 5, 2), (6, 6, 1),
        lambda: _rules.recursive_local_representation_alignment(
            'meta', update='eq6'), {}),
    'reclra_cifar cnn': (
        lambda: _models.ororbia_cnn(10, (4, 4, 4, 4)), (16, 16, 3),
        lambda: _rules.recursive_local_representation_alignment('direct'), {}),
    'resnet_cifar feedback': (
        lambda: _models.resnet20(10), (8, 8, 3), _rules.feedback_alignment, {}),
    'resnet_cifar direct': (
        lambda: _models.resnet20(10), (8, 8, 3),
        lambda: _rules.direct_feedback_alignment(placement='boundaries'),
        _DIRECT),
    'local_mixer LG-BP': (
        lambda: _models.local_mixer(
            10, blocks=2, patches=2, channels=12, groups=2), (8, 8, 3),
        lambda: bpjax.variant('LG-BP', grouped=True), {}),
}


def _filled(tree):
  """The tree with numbers that depend on the names of its leaves alone."""
  def fill(name, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 1 / np.sqrt(max(np.prod(leaf.shape[:-1]), 1))
    return jnp.asarray(scale * generator.standard_normal(leaf.shape), leaf.dtype)

  return bpjax.paths.map_with_name(fill, tree)


def updates(case):
  """Path -> norm of an update, and its product with fixed random numbers."""
  make, image, make_rule, arguments = CASES[case]
  net = bpjax.from_linen(make(), **arguments)
  generator = np.random.default_rng(0)
  x = jnp.asarray(generator.standard_normal((4, *image)), jnp.float32)
  variables = jax.jit(net.init)(jax.random.key(0), x)
  variables = {**variables, 'params': _filled(variables['params'])}
  rule = make_rule()
  feedback = _filled(rule.init(jax.random.key(1), net, variables, x))
  _, trees = jax.jit(rule.value_and_grad(net, _LOSS))(
      variables, feedback, x, jnp.arange(4), key=jax.random.key(2))
  result = {}
  for part, tree in zip(('params', 'feedback'), trees):
    for name, leaf in zip(
        bpjax.paths.leaf_names(tree), jax.tree.leaves(tree)):
      leaf = np.asarray(leaf, np.float64)
      fixed = np.random.default_rng(1).standard_normal(leaf.shape)
      result[f'{part}/{name}'] = [
          float(np.linalg.norm(leaf)), float(np.sum(leaf * fixed))]
  return result


@pytest.mark.parametrize('case', CASES)
def test_updates_are_what_they_were(case):
  expected = json.loads(_FIXTURE.read_text(encoding='utf-8'))[case]
  got = updates(case)
  assert set(got) == set(expected)
  for name, (norm, product) in expected.items():
    assert got[name][0] == pytest.approx(norm, rel=2e-4, abs=1e-6), name
    assert got[name][1] == pytest.approx(
        product, rel=2e-3, abs=3e-4 * norm + 1e-6), name


if __name__ == '__main__':
  made = {case: updates(case) for case in CASES}
  pathlib.Path(sys.argv[1]).write_text(
      json.dumps(made, indent=0) + '\n', encoding='utf-8')
