"""The settings of recursive LRA's table are those that the search found."""

import json
import pathlib

from absl.testing import absltest
from experiments.configs import reclra_mnist

_RESULTS = (
    pathlib.Path(__file__).resolve().parents[1] / 'results'
    / 'reclra_search.json')


class SearchTest(absltest.TestCase):

  def test_chosen_are_the_best_on_validation(self):
    found = json.loads(_RESULTS.read_text(encoding='utf-8'))
    self.assertEqual(found['dataset'], 'fashion_mnist')
    self.assertEqual(set(found['rows']), set(reclra_mnist.CANDIDATES))
    for row, (_, candidates) in reclra_mnist.CANDIDATES.items():
      searched = found['rows'][row]
      self.assertEqual(
          searched['candidates'], json.loads(json.dumps(candidates)), row)
      full = {int(i): a or 0. for i, a in searched['in_full'].items()}
      self.assertEqual(
          reclra_mnist.CHOSEN[row], max(full, key=lambda i: full[i]), row)
      first = [a or 0. for a in searched['validation_accuracy']]
      self.assertLen(first, 6)
      self.assertGreaterEqual(
          min(first[i] for i in full),
          sorted(first)[-len(full)], row)


if __name__ == '__main__':
  absltest.main()
