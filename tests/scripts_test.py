"""Scripts, run as a user runs them."""

import json
import os
import subprocess
import sys
import tempfile

from absl.testing import absltest
import bpjax
from bpjax.train import config as config_lib
from bpjax.train.loop import launch

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(script, *arguments):
  """The finished process of `python scripts/SCRIPT ARGUMENTS`."""
  return subprocess.run(
      [sys.executable, os.path.join('scripts', script), *arguments], cwd=_ROOT,
      env={**os.environ, 'PYTHONPATH': _ROOT}, capture_output=True, text=True,
      timeout=300, check=False)


class LaunayTable1Test(absltest.TestCase):

  def test_numbers(self):
    done = run('launay_table1.py')
    self.assertEqual(done.returncode, 0, done.stderr)
    # The outputs of conv_1_1 to dense_2, from the paper's configuration D.
    outputs = [
        channels * size ** 2
        for channels, size, convolutions in (
            (64, 224, 2), (128, 112, 2), (256, 56, 3), (512, 28, 3),
            (512, 14, 3))
        for _ in range(convolutions)] + [4096, 4096]
    # The last convolution before each pooling is read at a quarter of its size.
    pooled = sum(outputs[i] for i in (1, 3, 6, 9, 12)) * 3 // 4
    self.assertEqual(sum(outputs), 13_555_712)
    for entries in (sum(outputs), sum(outputs) - pooled):
      self.assertIn(f'{entries:,}', done.stdout)
      self.assertIn(f'{entries * 4000 / 1e9:.2f} GB', done.stdout)
    self.assertIn(f'{max(outputs) * 4000 / 1e9:.2f} GB', done.stdout)
    # 15*15*32 + 7*7*64 + 3*3*64 + 128 entries for ten classes.
    self.assertIn('441,600 bytes allocated', done.stdout)
    self.assertIn('288,000 bytes allocated', done.stdout)
    # One connection of 6 bytes in place of ten of 4.
    self.assertIn('66,240 bytes allocated', done.stdout)
    self.assertIn('53.8 MB', done.stdout)

  def test_exits_with_1_outside_the_tolerance(self):
    done = run('launay_table1.py', '--tolerance=.013')
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertIn('outside: independent: 54.22 GB', done.stderr)
    self.assertNotIn('outside: shared', done.stderr)

  def test_refuses_stray_arguments(self):
    done = run('launay_table1.py', 'vgg19')
    self.assertEqual(done.returncode, 2)
    self.assertIn("error: unknown argument 'vgg19'", done.stderr)


class PlotAlignmentTest(absltest.TestCase):

  def test_table_and_picture_of_two_runs(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    for rule in ('backprop', 'kolen_pollack'):
      config = config_lib.default()
      config.rule, config.epochs, config.alignment_every = rule, 1, 4
      config.model_args.widths = (16, 16)
      code = launch.launch(config, os.path.join(folder, rule), quiet=True)
      self.assertEqual(code, 0)
    done = run('plot_alignment.py', folder)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r'backprop +. 0 .*1\.00 .*1\.000')
    self.assertIn('kolen_pollack', done.stdout)
    picture = os.path.join(folder, 'alignment.png')
    with open(picture, 'rb') as file:
      self.assertEqual(file.read(4), b'\x89PNG')
    self.assertGreater(os.path.getsize(picture), 10_000)

  def test_a_folder_without_runs(self):
    empty = self.enterContext(tempfile.TemporaryDirectory())
    done = run('plot_alignment.py', empty)
    self.assertEqual(done.returncode, 2)
    self.assertIn('holds no finished run', done.stderr)
    self.assertNotIn('Traceback', done.stderr)


class StepTimeTest(absltest.TestCase):

  def test_every_rule_has_a_row(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    output = os.path.join(folder, 'times.json')
    done = subprocess.run(
        [sys.executable, 'benchmarks/step_time.py', '--workloads=w1',
         '--rounds=1', f'--output={output}'], cwd=_ROOT, capture_output=True,
        text=True, timeout=300, check=False)
    self.assertEqual(done.returncode, 0, done.stderr)
    with open(output, encoding='utf-8') as file:
      rows = json.load(file)['workloads']['w1']
    self.assertContainsSubset(
        bpjax.rules.names(), {row['rule'].split()[0] for row in rows})
    self.assertEqual(rows[0]['ratio'], 1)



if __name__ == '__main__':
  absltest.main()
