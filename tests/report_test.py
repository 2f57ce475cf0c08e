"""The pages of results are what results/*.json make of them."""

import json
import os
import re
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from scripts import report


class ReportTest(parameterized.TestCase):

  def test_pages_are_those_of_the_results(self):
    for path, text in report.pages().items():
      with self.subTest(path.name):
        self.assertEqual(path.read_text(encoding='utf-8'), text)

  def test_every_results_file_has_its_evidence_on_a_page(self):
    text = '\n'.join(
        p.read_text(encoding='utf-8')
        for p in (report.ROOT / 'docs/results/templates').glob('*.md'))
    for path in (report.ROOT / 'results').glob('*.json'):
      self.assertRegex(text, rf'<<evidence {path.stem} ')

  @parameterized.parameters(
      ('akrout_mnist', '"test_accuracy": 0.9845', '"test_accuracy": 0.8845'),
      ('step_time', '0.8300367578792784', '0.9300367578792784'))
  def test_another_number_is_another_page(self, name, old, new):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    for part in ('results', 'docs'):
      shutil.copytree(report.ROOT / part, os.path.join(folder, part),
                      ignore=shutil.ignore_patterns('_build'))
    shutil.copy(report.ROOT / 'README.md', folder)
    path = os.path.join(folder, 'results', f'{name}.json')
    with open(path, encoding='utf-8') as file:
      text = file.read()
    self.assertIn(old, text)
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text.replace(old, new))
    self.enterContext(absltest.mock.patch.object(
        report, 'ROOT', type(report.ROOT)(folder)))
    report.read.cache_clear()
    self.addCleanup(report.read.cache_clear)
    self.assertEqual(report.main(['--check']), 1)
    self.assertEqual(report.main([]), 0)
    self.assertEqual(report.main(['--check']), 0)

  @parameterized.parameters(
      ('tabel mnist_mlp', 'makes nothing'),
      ('number step_time workloads/w9', 'cannot be made'),
      ('evidence step_time guess none', 'protocol or trial'))
  def test_refuses(self, directive, message):
    with self.assertRaisesRegex(ValueError, message):
      report.make(directive)

  def test_mean_and_spread_are_those_of_the_runs(self):
    with open(report.ROOT / 'results/reclra_table1.json',
              encoding='utf-8') as file:
      errors = [
          100 * (1 - run['test_accuracy']) for run in json.load(file)['runs']
          if run['row'] == 'mnist,lra']
    mean = sum(errors) / len(errors)
    std = (sum((e - mean) ** 2 for e in errors) / (len(errors) - 1)) ** .5
    found = report.make('mean reclra_table1 mnist,lra "test error, %"')
    self.assertEqual(found, f'{mean:.2f} ± {std:.2f} (n={len(errors)})')

  def test_the_readme_is_short(self):
    text = (report.ROOT / 'README.md').read_text(encoding='utf-8')
    self.assertLessEqual(len(text.splitlines()), 150)
    self.assertLessEqual(len(text.split()), 1200)
    example, *more = re.findall(r'```python\n(.*?)```', text, re.S)
    self.assertLessEqual(len(example.splitlines()), 15)
    self.assertLessEqual(sum(len(m.splitlines()) for m in more), 5)


if __name__ == '__main__':
  absltest.main()
