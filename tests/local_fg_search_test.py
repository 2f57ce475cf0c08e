"""The rates of LocalMixer's table are those that the search found."""

import json
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
import bpjax
from bpjax.train.folder import workdir
from bpjax.train.loop import launch
from experiments import search
from experiments.configs import local_mixer
from experiments.configs import local_mixer_contrastive

_RESULTS = pathlib.Path(__file__).resolve().parents[1] / 'results'


class SearchTest(absltest.TestCase):

  def test_chosen_are_the_best_on_validation(self):
    searched = {}
    for path in _RESULTS.glob('local_fg_search*.json'):
      found = json.loads(path.read_text(encoding='utf-8'))
      self.assertEqual(found['candidates'], list(local_mixer.CANDIDATES))
      self.assertEqual(list(found['rows']), list(bpjax.variants.names()))
      chosen = {}
      for row, result in found['rows'].items():
        first = [a or 0. for a in result['validation_accuracy']]
        self.assertLen(first, len(local_mixer.CANDIDATES))
        full = {int(i): a or 0. for i, a in result['in_full'].items()}
        self.assertGreaterEqual(
            min(first[i] for i in full), sorted(first)[-len(full)])
        chosen[row] = max(full, key=lambda i: full[i])
      searched[found['of']] = chosen
    self.assertEqual(local_mixer.CHOSEN, searched)

  def test_configs_of_variants_differ_in_one_field(self):
    for make in (
        lambda name: local_mixer.get_config(f'{name}:m/1/16:mnist'),
        local_mixer_contrastive.get_config):
      configs = [make(name).to_dict() for name in bpjax.variants.names()]
      self.assertEqual(
          tuple(c.pop('rule') for c in configs), bpjax.variants.names())
      self.assertTrue(all(c == configs[0] for c in configs))

  def test_other_rates(self):
    rate = lambda what: local_mixer.get_config(what).learning_rate
    for i, candidate in enumerate(local_mixer.CANDIDATES):
      self.assertEqual(rate(f'FA:s/1/1:mnist:{i}'), candidate)
    for what in ('FAA:s/1/1:mnist', 'FA:s/1/2:mnist', 'FA', 'FA:s/1/1:mnist:9'):
      with self.assertRaisesRegex(ValueError, 'must be'):
        local_mixer.get_config(what)


class LoopTest(absltest.TestCase):

  def _search(self, codes, summaries):
    """What is found of two candidates whose runs end in these ways."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    ends, held = iter(zip(codes, summaries, strict=True)), {}

    def run(config, workdir, **kwargs):
      del config, kwargs
      code, accuracy = next(ends)
      if accuracy is not None:
        held[workdir] = {'validation_accuracy': accuracy}
      return code

    with (mock.patch.object(launch, 'launch', run),
          mock.patch.object(workdir, 'read_summary', held.get)):
      found = search.search({'a': [None, None]}, folder, 'digits')
    self.assertLessEqual(set(held), {
        os.path.join(folder, f'digits,a,candidate={i}') for i in range(2)})
    return found

  def test_candidates_and_the_one_that_diverged(self):
    self.assertEqual(
        self._search((0, 3), (.91234567, None)), {'a': [.912346, None]})
    self.assertEqual(search.best([None, .5, .5]), 1)

  def test_a_stopped_run_ends_the_search(self):
    for code, exits in ((0, 1), (130, 130)):
      with self.assertRaises(SystemExit) as ended:
        self._search((code,), (None,))
      self.assertEqual(ended.exception.code, exits)

  def test_unknown_rows(self):
    with self.assertRaises(SystemExit) as ended:
      search.check_rows(['LG'], ['BP'])
    self.assertEqual(ended.exception.code, 2)

  def test_the_file(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'found.json')
    search.write(path, 'local_fg_search', {'epochs': 3}, {'a': {'best': 1}})
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    self.assertEqual((found['epochs'], found['rows']), (3, {'a': {'best': 1}}))
    self.assertIn('scripts/local_fg_search.py', found['command'])


if __name__ == '__main__':
  absltest.main()
