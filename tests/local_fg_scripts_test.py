"""The scripts on Ren et al., 2023, that measure: tiny, as a user runs them."""

import json
import os
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import scripts_test


class ScriptsTest(parameterized.TestCase):

  def results(self, script, code, *arguments):
    """Output, JSON and errors of a script that shall exit with `code`."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    output, picture = (os.path.join(folder, f) for f in ('a.json', 'a.png'))
    done = scripts_test.run(
        script, f'--output={output}', f'--picture={picture}', *arguments)
    self.assertEqual(done.returncode, code, done.stderr)
    with open(picture, 'rb') as file:
      self.assertEqual(file.read(4), b'\x89PNG')
    with open(output, encoding='utf-8') as file:
      return done.stdout, json.load(file), done.stderr

  def test_variance(self):
    stdout, record, stderr = self.results(
        'local_fg_variance.py', 1, '--dataset=digits', '--draws=2000',
        '--tolerance=1e-6', '--fan_outs=8', '--batches=8', '--groups=2',
        '--channels=16',
        '--patches=2', '--blocks=1', '--batch=8', '--cosines=20')
    self.assertLen(record['one_layer'], 4)
    for row in record['one_layer'] + record['whole_network']:
      self.assertLess(
          abs(row['ratio'] - 1), 5 * row['standard_error'], row)
      self.assertLess(row['standard_error'], .1)
    self.assertEqual([r['groups'] for r in record['cosine']], [2])
    self.assertIn('of the formula', stderr)
    self.assertIn('weight, independent', stdout)

  def test_memory(self):
    stdout, record, _ = self.results(
        'local_fg_memory.py', 0, '--shapes=', '--sweep=2,4,16',
        '--groups=1,8', '--rounds=1')
    self.assertIn('all of it within its bounds', stdout)
    of = {(r['form'], r['mode'], r['groups']): r['temporaries_mib']
          for r in record['sweep']}
    for mode in ('jvp', 'grad'):
      # 8 groups: copies of 2 * 4 * 16 floats for each patch and group.
      self.assertGreater(of['naive', mode, 8], 4 * 8 * 2 * 64 / 2**20)
      self.assertLess(10 * of['fused', mode, 8], of['naive', mode, 8])

  def test_placement(self):
    stdout, record, _ = self.results(
        'local_fg_placement.py', 0, '--dataset=digits',
        '--train_examples=0', '--epochs=1',
        '--rows=block,block + patch + group',
        '--blocks=1', '--patches=2', '--channels=16', '--groups=4',
        '--cosines=20', '--tolerance=100')
    self.assertIn('losses at', stdout)
    self.assertLen(record['runs'], 2)
    block, group = record['runs']
    self.assertGreater(group['cosine'], block['cosine'] + .05)
    for run in record['runs']:
      self.assertLen(run['test_error_by_epoch'], 1)

  @parameterized.parameters(
      ('variance', '--groups=1,3', '`groups` must divide the channels, 128'),
      ('memory', '--shapes=XL', "`shapes` has no 'XL'"),
      ('placement', '--seeds=one', '`seeds` must be whole numbers'))
  def test_refused_flags(self, script, flag, message):
    done = scripts_test.run(f'local_fg_{script}.py', flag)
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn(f'error: {message}', done.stderr)
    self.assertNotIn('Traceback', done.stderr)


if __name__ == '__main__':
  absltest.main()
