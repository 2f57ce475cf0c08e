"""The rates of LocalMixer's table are those that the search found."""

import json
import pathlib

from absl.testing import absltest
import bpjax
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
        accuracies = [a or 0. for a in result['validation_accuracy']]
        self.assertLen(accuracies, len(local_mixer.CANDIDATES))
        chosen[row] = accuracies.index(max(accuracies))
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


if __name__ == '__main__':
  absltest.main()
