"""Averages, barriers, matching of neurons, and the script that measures them."""

import itertools
import json
import os
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from bpjax import merge
from experiments import merging
import jax
import jax.numpy as jnp
import numpy as np
from tests import scripts_test

_LAYERS = ['in', 'block/mid', 'out']


def network(seed, sizes=(4, 6, 5, 3), bias=True):
  rng = np.random.default_rng(seed)
  made = {}
  for name, fan_in, fan_out in zip(('in', 'mid', 'out'), sizes, sizes[1:]):
    made[name] = {'kernel': rng.normal(size=(fan_in, fan_out))}
    if bias:
      made[name]['bias'] = rng.normal(size=fan_out)
  return {'in': made['in'], 'block': {'mid': made['mid']}, 'out': made['out'],
          'scale': np.ones(2)}


def output(tree, x):
  for layer in (tree['in'], tree['block']['mid'], tree['out']):
    pre = x @ layer['kernel'] + layer.get('bias', 0)
    x = np.tanh(pre)
  return pre


def moved(tree, seed, signs):
  """The same function with other places (and signs) of its neurons."""
  rng = np.random.default_rng(seed)
  layers = [dict(l) for l in (tree['in'], tree['block']['mid'], tree['out'])]
  for low, high in zip(layers, layers[1:]):
    n = low['kernel'].shape[1]
    order = rng.permutation(n)
    flips = rng.choice([-1, 1], n) if signs else np.ones(n)
    low['kernel'] = low['kernel'][:, order] * flips
    if 'bias' in low:
      low['bias'] = low['bias'][order] * flips
    high['kernel'] = high['kernel'][order] * flips[:, None]
  return {**tree, 'in': layers[0], 'block': {'mid': layers[1]},
          'out': layers[2]}


class MatchTest(parameterized.TestCase):

  @parameterized.product(signs=(False, True), bias=(False, True))
  def test_finds_what_was_moved(self, signs, bias):
    before = network(0, bias=bias)
    other = moved(before, 1, signs)
    x = np.random.default_rng(2).normal(size=(7, 4))
    np.testing.assert_allclose(output(other, x), output(before, x))
    found = merge.match_weights(other, before, _LAYERS, sign_flips=signs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, atol=1e-6), found, before)

  @parameterized.parameters(False, True)
  def test_one_hidden_layer_is_the_best_of_all(self, signs):
    sizes = (3, 4, 2)
    a, b = ({'a': tree['in'], 'b': {
        'kernel': tree['block']['mid']['kernel']}} for tree in (
            network(0, (*sizes, 1)), network(1, (*sizes, 1))))
    inner = lambda p, q: sum(map(np.vdot, jax.tree.leaves(p), jax.tree.leaves(q)))
    best = -np.inf
    for order in map(list, itertools.permutations(range(4))):
      for flips in itertools.product((1, -1) if signs else (1,), repeat=4):
        f = np.array(flips)
        best = max(best, inner(b, {
            'a': {'kernel': a['a']['kernel'][:, order] * f,
                  'bias': a['a']['bias'][order] * f},
            'b': {'kernel': a['b']['kernel'][order] * f[:, None]}}))
    found = merge.match_weights(a, b, ['a', 'b'], sign_flips=signs)
    np.testing.assert_allclose(inner(b, found), best, rtol=1e-6)

  def test_is_the_same_function(self):
    a, b = network(0), network(1)
    x = np.random.default_rng(2).normal(size=(7, 4))
    for signs in (False, True):
      found = merge.match_weights(a, b, _LAYERS, sign_flips=signs)
      np.testing.assert_allclose(output(found, x), output(a, x), atol=1e-5)
      self.assertFalse(np.allclose(found['in']['kernel'], a['in']['kernel']))

  @parameterized.parameters(
      (['in', 'nothing'], 'must name dense layers'),
      (['in', 'out'], 'must be a chain'))
  def test_refuses(self, layers, text):
    with self.assertRaisesRegex(ValueError, text):
      merge.match_weights(network(0), network(1), layers)

  def test_refuses_other_shapes(self):
    with self.assertRaisesRegex(ValueError, 'the same shapes'):
      merge.match_weights(network(0), network(1, (4, 7, 5, 3)), _LAYERS)


class AverageTest(parameterized.TestCase):

  def test_weighted(self):
    trees = [network(i) for i in range(3)]
    found = merge.average(trees, [1, 2, 5])
    expected = sum(
        w * t['block']['mid']['bias'] for w, t in zip((1, 2, 5), trees)) / 8
    np.testing.assert_allclose(found['block']['mid']['bias'], expected)
    np.testing.assert_allclose(
        merge.average(trees)['in']['kernel'],
        np.mean([t['in']['kernel'] for t in trees], 0))

  @parameterized.parameters(
      ([], None, 'at least one'), ([1, 1], [1], 'one for each of the 2'),
      ([1, 1], [1, -1], 'none of them negative'), ([1, 1], [0, 0], 'not all 0'),
      ([1, {'a': 1}], None, 'one architecture'))
  def test_refuses(self, trees, weights, text):
    with self.assertRaisesRegex(ValueError, text):
      merge.average(trees, weights)

  def test_barrier(self):
    # Over the line from (1, 0) at loss 0 to (0, 1) at loss 2.
    loss = lambda p: 2 * p[1] + 12 * p[0] * p[1]
    found = jax.jit(lambda a, b: merge.interpolation_barrier(loss, a, b, 5))(
        jnp.array([1., 0.]), jnp.array([0., 1.]))
    self.assertAlmostEqual(float(found), 3., places=6)
    convex = lambda p: jnp.sum(p**2)
    self.assertEqual(float(merge.interpolation_barrier(
        convex, jnp.zeros(2), jnp.ones(2))), 0.)
    with self.assertRaisesRegex(ValueError, 'at least 3'):
      merge.interpolation_barrier(loss, jnp.zeros(2), jnp.ones(2), 2)


class MergingTest(parameterized.TestCase):

  def test_clients(self):
    y = np.random.default_rng(0).integers(0, 10, 4001)
    for kind in ('disjoint', 'skewed'):
      parts = merging.split(y, 4, kind, 0)
      self.assertLen(set(np.concatenate(parts)), 4000)
      self.assertEqual({len(p) for p in parts}, {1000})
      classes = [len(set(y[p])) for p in parts]
      self.assertTrue(all(c == 10 if kind == 'disjoint' else c <= 6
                          for c in classes), classes)

  def test_what_networks_have_in_common(self):
    data = merging.load('digits', 200, 100)
    dfa = merging.Setting('direct_feedback_alignment', widths=(8, 8), epochs=1)
    for setting, same_start, same_feedback in (
        (dfa, False, True), (dfa._replace(feedback='own'), False, False),
        (dfa._replace(start='common'), True, True)):
      group = merging.begin(setting, data, 0, 2)
      for tree, same in ((group.params, same_start),
                         (group.feedback, same_feedback)):
        first, second = next(
            l for l in jax.tree.leaves(tree) if l.ndim == 3)
        self.assertEqual(bool(jnp.all(first == second)), same)
    frozen = merging.Setting(
        'backprop', trained='readout', widths=(8, 8), epochs=1)
    before = merging.begin(frozen, data, 0, 2)
    after = merging.train(before, frozen, data, 0)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)),
                        before.params, after.params)
    self.assertTrue(all(jax.tree.leaves(
        [same['Dense_0'], same['Dense_1']])))
    self.assertFalse(same['Dense_2']['kernel'])


class ScriptTest(absltest.TestCase):

  def test_trains_and_reads(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    output_file = os.path.join(folder, 'merge.json')
    picture = f'--picture={os.path.join(folder, "merge.png")}'
    done = scripts_test.run(
        'merge.py', '--dataset=digits', '--examples=1000', '--validation=300',
        '--widths=32,32', '--rates=.3', '--decays=.003', '--epochs=30',
        '--batch=50', '--rows=0,2', '--seeds=3', f'--output={output_file}',
        picture)
    self.assertIn(done.returncode, (0, 1), done.stderr)
    with open(output_file, encoding='utf-8') as file:
      rows = json.load(file)['rows']
    lost = [np.mean([s['single'] - s['mean_4'] for s in row['seeds']])
            for row in rows]
    self.assertLess(lost[1] + 10, lost[0])  # Backprop loses far more.
    # A record in which direct feedback is no better must fail.
    for seed in rows[1]['seeds']:
      seed['mean_4'] = 10.
    with open(output_file, 'w', encoding='utf-8') as file:
      json.dump({'study': 'rules', 'dataset': 'digits', 'examples': 1000,
                 'rows': rows}, file)
    again = scripts_test.run('merge.py', f'--read={output_file}', picture)
    self.assertEqual(again.returncode, 1, again.stderr)
    self.assertIn('fails: DFA, same F, mean_4, over BP, mean_4', again.stdout)

  def test_refuses(self):
    done = scripts_test.run('merge.py', '--read=nothing.json')
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('error: `read` must be a file', done.stderr)


if __name__ == '__main__':
  absltest.main()
