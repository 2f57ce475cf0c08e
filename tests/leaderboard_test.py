"""The leaderboard: its statistics, its cells, its pages, a rule from outside."""

import json
import math
import os
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from experiments import cards
from experiments import leaderboard
from experiments import leaderboard_page
import numpy as np
from scipy import stats
from scripts import leaderboard as script
from scripts import report

_MINE = '''
import bpjax

def my_rule(scale=.5):
  return bpjax.rules.feedback_alignment(scale)
'''
_TIER = leaderboard.Tier(
    2, 2, {'digits_mlp': leaderboard.Budget(128, 1, 128, 1, 60.)},
    ('backprop', 'frozen'))


def _run(row, seed, accuracy, column='digits_mlp', **more):
  return {
      'tier': 'minute', 'column': column, 'row': row, 'rule': row,
      'run': f'{column},{row},seed={seed}', 'seed': seed,
      'test_accuracy': accuracy, 'train_accuracy': .9, 'epochs': 1, 'steps': 9,
      'wall_time': 1., 'device_kind': 'cpu', 'git_commit': 'a' * 40,
      'data_source': 'digits', 'learning_rate': .002, 'optimizer': 'adam',
      'alignment': {'mean': .5, 'measured': 1, 'units': 2, 'floor': .125},
      'alignment_before': 0., **more}


def _cell(row, status='run', reason='', column='digits_mlp', ratio=1.):
  cell = {'tier': 'minute', 'column': column, 'row': row, 'rule': row,
          'status': status, 'reason': reason}
  if status == 'run':
    cell |= {
        'cost': {'milliseconds': 2., 'time_ratio': ratio, 'memory_mib': 1.,
                 'memory_ratio': 1.},
        'candidates': [{'optimizer': 'adam', 'learning_rate': .002}],
        'validation_accuracy': [.9], 'chosen': 0}
  return cell


def _results():
  """Two rows above the control, one that is not, one that is refused."""
  accuracies = {
      'backprop': (.95, .96, .97), 'feedback_alignment': (.91, .93, .92),
      'spsa': (.83, .79, .80), 'frozen': (.80, .81, .79)}
  return {
      'command': 'python scripts/leaderboard.py', 'commands': {},
      'machine': 'a processor', 'date': '2026-11-27',
      'cells': [*(_cell(row, ratio=2. if row == 'spsa' else 1.)
                  for row in accuracies),
                _cell('pepita', 'refused', 'rule `pepita` adds <the error>.')],
      'runs': [_run(row, seed, value) for row, values in accuracies.items()
               for seed, value in enumerate(values)]}


class StatisticsTest(parameterized.TestCase):

  @parameterized.parameters(2, 3, 7)
  def test_paired_is_scipys_and_by_hand(self, n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n)) + [[.4], [0]]
    found = leaderboard.paired(dict(enumerate(a)), dict(enumerate(b)))
    d = a - b
    t = d.mean() / (d.std(ddof=1) / math.sqrt(n))
    self.assertAlmostEqual(found.difference, d.mean(), places=12)
    self.assertAlmostEqual(found.p, stats.ttest_rel(a, b).pvalue, places=10)
    self.assertAlmostEqual(found.p, 2 * stats.t.sf(abs(t), n - 1), places=10)

  def test_paired_takes_common_seeds_alone(self):
    found = leaderboard.paired({0: 1., 1: 5., 2: 3.}, {1: 1., 2: 1., 3: 9.})
    self.assertEqual(found[::2], (3., 2))
    self.assertIsNone(leaderboard.paired({0: 1.}, {1: 1.}))
    self.assertEqual(leaderboard.paired({0: 2.}, {0: 1.}), (1., None, 1))
    # Differences without a spread.
    self.assertEqual(
        leaderboard.paired({0: 2., 1: 2.}, {0: 1., 1: 1.}), (1., 0., 2))
    self.assertEqual(
        leaderboard.paired({0: 1., 1: 1.}, {0: 1., 1: 1.}), (0., 1., 2))

  def test_rows_of_a_column(self):
    rows = leaderboard.table(_results(), 'minute', 'digits_mlp')
    self.assertEqual(
        [(r['row'], r.get('verdict')) for r in rows],
        [('backprop', 'better than frozen'),
         ('feedback_alignment', 'better than frozen'),
         ('spsa', 'no better than frozen'), ('frozen', 'control'),
         ('pepita', None)])
    first = rows[0]
    self.assertAlmostEqual(first['mean'], 96)
    self.assertAlmostEqual(first['std'], np.std([95, 96, 97], ddof=1))
    self.assertAlmostEqual(
        first['below'].p,
        stats.ttest_rel([95, 96, 97], [91, 93, 92]).pvalue, places=10)
    self.assertAlmostEqual(
        first['frozen'].p,
        stats.ttest_rel([95, 96, 97], [80, 81, 79]).pvalue, places=10)
    # One seed says nothing.
    self.assertEqual(leaderboard.verdict(
        'spsa', leaderboard.paired({0: 9.}, {0: 1.})), 'not tested')

  def test_alignment_leaves_out_units_without_a_signal(self):
    measured = {'a': {'teaching': .5}, 'b': {'teaching': None},
                'c': {'teaching': .1}, 'readout': {'teaching': 1.}}
    found = leaderboard.aligned(measured, {'a': 16, 'b': 9, 'c': 64})
    self.assertEqual(found, {
        'mean': .3, 'measured': 2, 'units': 3, 'floor': .1875})
    none = leaderboard.aligned({'a': {'teaching': None}}, {'a': 16})
    self.assertIsNone(none['mean'])

  def test_new_cells_take_the_place_of_the_same(self):
    held = _results()
    new = leaderboard.merged(
        held, [_cell('spsa'), _cell('backprop', 'missing', 'Not run.')],
        [_run('spsa', 0, .5)])
    of = lambda row: [
        r['test_accuracy'] for r in new['runs'] if r['row'] == row]
    self.assertEqual(of('spsa'), [.5])
    self.assertEqual(of('backprop'), [.95, .96, .97])  # What is held stays.
    self.assertLen(new['cells'], len(held['cells']))
    self.assertNotIn(
        ('digits_mlp', 'spsa'), leaderboard.missing(new, 'minute'))


class CardsTest(absltest.TestCase):

  def test_every_row_has_a_whole_card_and_every_card_a_row(self):
    self.assertEqual(set(cards.CARDS), set(leaderboard.rows()))
    self.assertContainsSubset(set(leaderboard.LIBRARY), set(cards.CARDS))
    for name, card in cards.CARDS.items():
      for field, text in card._asdict().items():
        self.assertTrue(text, f'{name}: {field}')

  def test_budgets_are_the_same_for_every_row(self):
    for tier in leaderboard.TIERS.values():
      for name, row in leaderboard.rows().items():
        self.assertGreaterEqual(len(row.rates), tier.rates, name)
        self.assertEqual(sorted(row.rates), list(row.rates))


class CellsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.enterContext(absltest.mock.patch.dict(
        leaderboard.TIERS, {'minute': _TIER}))
    leaderboard.register()

  def _settings(self, **known):
    return leaderboard.Settings(
        'minute', self.folder, {**leaderboard.rows(), **known})

  def test_a_rule_from_outside_is_trained_resumed_and_shown(self):
    path = os.path.join(self.folder, 'mine.py')
    with open(path, 'w', encoding='utf-8') as file:
      file.write(_MINE)
    row, rule = leaderboard.outside(f'{path}:my_rule')
    self.assertRegex(row, r'^my_rule@[0-9a-f]{8}$')
    settings = self._settings(**{row: rule})
    cell, runs = leaderboard.cell(settings, 'digits_mlp', row)
    self.assertEqual(cell['status'], 'run', cell['reason'])
    self.assertEqual([r['seed'] for r in runs], [0, 1])
    self.assertLen(cell['validation_accuracy'], 2)
    self.assertEqual(cell['chosen'], int(np.argmax(cell['validation_accuracy'])))
    self.assertGreater(cell['cost']['memory_ratio'], 0)
    self.assertEqual(runs[0]['alignment']['units'], 2)
    rate = cell['candidates'][cell['chosen']]['learning_rate']
    self.assertEqual(runs[0]['learning_rate'], rate)

    # A seed that was killed is trained again, and what is finished is not.
    os.remove(os.path.join(
        self.folder, f'digits_mlp,{row},seed=1', 'summary.json'))
    launch = bpjax.train.loop.launch.launch
    trained = []

    def watched(config, folder, **kwargs):
      if not os.path.exists(os.path.join(folder, 'summary.json')):
        trained.append(os.path.basename(folder))
      return launch(config, folder, **kwargs)

    with absltest.mock.patch.object(
        bpjax.train.loop.launch, 'launch', watched):
      same, again = leaderboard.cell(settings, 'digits_mlp', row)
    self.assertEqual(trained, [f'digits_mlp,{row},seed=1'])
    self.assertEqual(same, cell)
    self.assertEqual([r['test_accuracy'] for r in again],
                     [r['test_accuracy'] for r in runs])

    # Among the rows of a file.
    held = _results()
    results = {**held, **leaderboard.merged(held, [cell], runs)}
    self.assertIn(row, [r['row'] for r in leaderboard.table(
        results, 'minute', 'digits_mlp')])
    self.assertIn('my_rule@', leaderboard_page.html(results))
    # Collected without training.
    collected = leaderboard.cell(
        settings._replace(train=False), 'digits_mlp', row)
    self.assertEqual(collected, (cell, again))

  def test_the_control_learns_in_the_readout_alone(self):
    config = leaderboard.config_of(
        'minute', 'digits_mlp', 'frozen', leaderboard.rows())
    leaderboard.freeze(config, 'Dense_0')
    self.assertEqual(config.frozen, ('Layer_0', 'Layer_1'))

  def test_empty_cells_say_why(self):
    settings = self._settings(
        refused=leaderboard.Row(
            'direct_feedback_alignment', {'placement': 'boundaries'}))
    cell, runs = leaderboard.cell(settings, 'digits_mlp', 'refused')
    self.assertEqual((cell['status'], runs), ('refused', []))
    self.assertIn('needs a network with boundaries', cell['reason'])
    cell, _ = leaderboard.cell(
        settings._replace(train=False), 'digits_mlp', 'spsa')
    self.assertEqual(cell['status'], 'missing')
    self.assertIn('no blocks', leaderboard.refusal(
        'sst2_lstm', 'LG-BP', leaderboard.rows()))

  def test_refuses_a_file_that_is_no_rule(self):
    path = os.path.join(self.folder, 'wrong.py')
    with open(path, 'w', encoding='utf-8') as file:
      file.write('def needs(x):\n  return x\ndef none():\n  return 3\n'
                 'def backprop():\n  pass\n')
    for text, message in (
        ('mine', 'FILE.py:FUNCTION'), (f'{path}.py:f', 'is not there'),
        (f'{path}:absent', 'must name something'), (f'{path}:needs', 'TypeError'),
        (f'{path}:none', 'returns int'), (f'{path}:backprop', 'its own')):
      with self.assertRaisesRegex(ValueError, message):
        leaderboard.outside(text)


class RegisterTest(absltest.TestCase):

  def test_a_name_is_new_and_the_librarys_stay(self):
    library = leaderboard.LIBRARY
    make = lambda: bpjax.rules.backprop()
    bpjax.rules.register('a_rule_of_a_test', make)
    self.assertIs(bpjax.rules.get('a_rule_of_a_test'), make)
    self.assertEqual(bpjax.rules.names()[:len(library)], library)
    for name, wrong, message in (
        ('backprop', make, 'taken'), ('names', make, 'taken'),
        ('my rule', make, 'letters'), ('new_rule', 3, 'function')):
      with self.assertRaisesRegex(ValueError, message):
        bpjax.rules.register(name, wrong)


class PageTest(absltest.TestCase):

  def test_html_has_every_row_its_record_and_no_other_file(self):
    page = leaderboard_page.html(_results())
    for own in leaderboard_page.entries(_results()):
      name = leaderboard_page.anchor(own)
      self.assertIn(f'<dt id="{name}">', page)
    for row in ('backprop', 'spsa', 'frozen'):
      self.assertIn(f'href="#minute-digits_mlp-{row}"', page)
    self.assertIn('96.00 ± 1.00', page)
    self.assertIn('no better than frozen', page)
    self.assertIn('rule `pepita` adds &lt;the error&gt;.', page)
    self.assertIn('<svg', page)
    self.assertIn('class="hollow"', page)
    for outside in ('src=', '<link', '@import', 'http'):
      self.assertNotIn(outside, page)
    for name in cards.CARDS:
      self.assertIn(f'id="card-{name}"', page)

  def test_markdown_of_the_page(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    os.mkdir(os.path.join(folder, 'results'))
    with open(os.path.join(folder, 'results', 'made_up.json'), 'w',
              encoding='utf-8') as file:
      json.dump(_results(), file)
    self.enterContext(absltest.mock.patch.object(
        report, 'ROOT', type(report.ROOT)(folder)))
    text = report.make('leaderboard made_up')
    self.assertIn(
        '| `backprop` | [96.00 ± 1.00](results/made_up.md#minute-digits_mlp-'
        'backprop) | 3 |', text)
    self.assertIn('refused: rule `pepita` adds <the error>.', text)
    records = report.make('leaderboard_records made_up')
    self.assertIn('### minute digits_mlp spsa', records)
    self.assertIn('- digits_mlp,spsa,seed=1: 79.00', records)
    self.assertIn('sign_symmetry', report.make('leaderboard_missing made_up'))

  def test_a_file_is_written_and_keeps_what_others_ran(self):
    path = os.path.join(
        self.enterContext(tempfile.TemporaryDirectory()), 'results.json')
    settings = leaderboard.Settings('minute', '', leaderboard.rows())
    held = _results()
    script.write(path, settings, held['cells'], held['runs'])
    script.write(path, settings, [_cell('spsa')], [_run('spsa', 0, .5)])
    found = script.read(path)
    self.assertLen(found['cells'], len(held['cells']))
    self.assertEqual(
        [r['test_accuracy'] for r in found['runs'] if r['row'] == 'spsa'], [.5])
    self.assertIn('scripts/leaderboard.py', found['command'])


if __name__ == '__main__':
  absltest.main()
