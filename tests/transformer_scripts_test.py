"""The scripts on transformers: rows, settings, checks, and a few steps."""

import importlib
import json
import math

from absl.testing import parameterized
import bpjax
from bpjax.train import config as config_lib
from bpjax.train.loop import optimizer
from experiments import reproduction
from experiments import search
from experiments import transformers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import report

_SCRIPTS = ('dfa_lm', 'transformer_depth', 'transformer_paths', 'vit_cifar')
_OWN = {'dataset': [], 'depths': [], 'rules': [], 'trial': False,
        'candidate': [], 'search_epochs': 0}
_FLAGS = {'workdir': '', 'seeds': [], 'rows': [], 'presets': [], 'epochs': 0,
          'override': [], 'train': True, 'jobs': 1, 'output': '', 'read': '',
          'picture': ''}


@pytest.fixture(autouse=True)
def _given(tmp_path, capsys, monkeypatch, request):
  if request.instance is not None:
    request.instance.tmp = tmp_path
    request.instance.capsys = capsys
    request.instance.patch = monkeypatch


def _experiment(name):
  return importlib.import_module(f'scripts.{name}').EXPERIMENT


def _prepared(name, flags=None, **own):
  """What a script makes of its flags: the experiment, and the others' flags."""
  script = importlib.import_module(f'scripts.{name}')
  given, values = _OWN | own, _FLAGS | (flags or {})
  experiment = script.EXPERIMENT
  if name == 'dfa_lm':
    experiment, values = script._prepare(
        experiment, values, given := {'text': '', **given})
  return transformers._prepare(
      experiment, script.TRIAL, script.DEPTHS, {}, ('wikitext103',), values,
      given)


def _made_up(preset, row, accuracy, seed=0, **more):
  return {'preset': preset, 'row': f'{preset},{row}', 'seed': seed,
          'test_accuracy': accuracy, 'train_accuracy': accuracy,
          'median_step_time': .1, **more}


class RowsTest(parameterized.TestCase):

  @parameterized.parameters(*_SCRIPTS)
  def test_every_row_is_a_run_that_can_be(self, name):
    experiment = _experiment(name)
    labels = [row.label for row in experiment.rows]
    self.assertLen(set(labels), len(labels))
    for row in experiment.rows:
      rule, depth = transformers.parts(row.name)
      self.assertEqual(transformers.row_of(rule, depth), row.name)
      self.assertEqual(row.config.model_args.depth, depth)
      if depth == 2 or 'wikitext' in row.label:
        config_lib.check(row.config)
    for row in experiment.rows:
      if row.name.startswith('frozen'):
        self.assertEqual(row.config.frozen, ('block_*',))

  def test_paths_are_all_units_but_the_first(self):
    config = importlib.import_module('experiments.configs.transformer_paths')
    for dataset, model in (('recall', 'gpt'), ('sick', 'bert_encoder')):
      made = config.get_config(f'{dataset}:post:bp_v:1')
      self.assertEqual(made.model, model)
      self.assertEqual(
          made.rule_by_path, (('block_*/attention/value', 'backprop', {}),))
    x = jnp.zeros((1, 4), int)
    net = bpjax.from_linen(bpjax.models.bert_encoder(
        2, depth=1, width=4, heads=1, vocabulary=3, length=4, separate=True))
    jax.eval_shape(net.init, jax.random.key(0), x)
    own = [p for patterns in config.PATHS.values() for p in patterns]
    self.assertLen(net.units, 9)
    for unit in net.units:
      self.assertLen(
          [p for p in own if bpjax.paths.matches(p, unit)],
          unit != 'token', unit)


class SettingsTest(parameterized.TestCase):

  def test_one_setting_for_all(self):
    experiment, values = _prepared(
        'transformer_depth', dataset=['sick'], depths=['2'],
        candidate=['1', 'usf:3'])
    self.assertLen(values['rows'], 10)
    rows = {r.name: r for r in experiment.rows if r.preset == 'sick'}
    for row in values['rows']:
      rule, _ = transformers.parts(row)
      self.assertEqual(
          (rows[row].config.learning_rate, rows[row].config.weight_decay),
          transformers.candidates(rule)[3 if rule == 'usf' else 1])

  def test_the_best_candidate_goes_to_every_depth(self):
    seen = []

    def made_up(rows, workdir, prefix, jobs):
      del workdir, jobs
      (row, configs), = rows.items()
      seen.append((prefix, row, [c.epochs for c in configs]))
      return {row: [.1, None, .3, .2, .2]}

    self.patch.setattr(search, 'search', made_up)
    own = {'dataset': ['sick'], 'depths': ['1', '2', '4'], 'rules': ['usf']}
    flags = {'workdir': str(self.tmp)}
    for _ in range(2):  # The second time nothing is searched.
      experiment, values = _prepared('transformer_depth', flags, **own)
    self.assertEqual(seen, [('sick', 'usf_2', [2] * 5)])
    self.assertEqual(values['rows'], ['usf_1', 'usf_2', 'usf_4'])
    self.assertEqual(experiment.head['search']['sick']['usf']['best'], 2)
    for row in experiment.rows:
      if row.preset == 'sick' and row.name.startswith('usf'):
        self.assertEqual(row.config.weight_decay, 1.)

  @parameterized.parameters(
      ({'dataset': ['sik']}, '`dataset` has no'),
      ({'depths': ['3']}, '`depths` must be among'),
      ({'rules': ['bp']}, '`rules` has no'),
      ({'candidate': ['5']}, '`candidate` must be a number below 5'),
      ({'candidate': ['usf:1']}, '`candidate` must begin with a number'))
  def test_refused(self, own, sentence):
    with self.assertRaisesRegex(ValueError, sentence):
      _prepared('transformer_depth', **own)

  def test_second_moments(self):
    config = config_lib.default()
    config.optimizer, config.beta_2, config.learning_rate = 'adam', .5, .1
    tx = optimizer.build(config, 10)
    trees = {'params': {'w': jnp.zeros(1)}, 'feedback': {}}
    state, total, squares, mean = tx.init(trees), 0., 0., 0.
    for i, g in enumerate((1., 3.), 1):
      updates, state = tx.update(
          {'params': {'w': jnp.array([g])}, 'feedback': {}}, state, trees)
      total += float(updates['params']['w'][0])
      mean, squares = .9 * mean + .1 * g, .5 * squares + .5 * g * g
    expected = -.1 * (1 + mean / (1 - .9**i) / math.sqrt(squares / (1 - .5**i)))
    self.assertAlmostEqual(total, expected, places=5)


class ChecksTest(parameterized.TestCase):

  def _results(self, kp, fa, frozen=(.3, .31)):
    rows = {'backprop': (.9, .9), 'kolen_pollack': kp,
            'feedback_alignment': fa, 'frozen': frozen}
    return reproduction.Results(_experiment('transformer_depth').columns, [
        _made_up('recall', f'{rule}_2', accuracy, seed)
        for rule, pair in rows.items() for seed, accuracy in enumerate(pair)])

  def _judged(self, results):
    """Text -> verdict, of the checks of two blocks."""
    found = {}
    for check in _experiment('transformer_depth').checks('recall'):
      if 'depth 2' in check.text:
        reproduction._judge(check, results)
        line = self.capsys.readouterr().out
        found[check.text.partition(': ')[2][:5]] = line.partition(':')[0]
    return found

  @parameterized.parameters(
      ((.89, .90), (.5, .52), 'within', 'within'),
      ((.70, .90), (.3, .30), 'outside', 'outside'))
  def test_where_blocks_matter(self, kp, fa, close, above):
    self.assertEqual(
        self._judged(self._results(kp, fa)), {'Kolen': close, 'p-val': above})

  def test_where_they_do_not(self):
    found = self._judged(self._results((.9, .9), (.9, .9), (.89, .9)))
    self.assertEqual(set(found.values()), {'not judged'})

  def test_standard_error_of_one_seed_is_that_of_examples(self):
    results = reproduction.Results(_experiment('transformer_depth').columns, [
        _made_up('sick', row, .5) for row in ('backprop_1', 'frozen_1')])
    self.assertAlmostEqual(transformers.standard_error(
        results, 'sick,backprop_1', 'sick,frozen_1', 100), 100 * .5**.5 / 10)
    with self.assertRaisesRegex(reproduction.MissingError, 'needs two seeds'):
      transformers.paired(results, 'sick,backprop_1', 'sick,frozen_1')

  def test_a_page_says_what_is_not_judged(self):
    results = self._results((.9, .9), (.9, .9), (.89, .9))
    self.patch.setattr(report, 'read', lambda name: {'runs': results.runs})
    text = report.checks('transformer_depth')
    self.assertIn('blocks are not shown to matter', text)
    self.assertIn('2 not judged', report.verdict('transformer_depth'))

  def test_the_path_that_breaks_it(self):
    experiment = _experiment('transformer_paths')
    results = reproduction.Results(experiment.columns, [
        _made_up('recall_pre', f'{row}_2', accuracy) for row, accuracy in {
            'backprop': .9, 'frozen': .3, 'feedback_alignment': .4,
            'bp_v': .8, 'bp_qk': .41}.items()])
    lines = list(experiment.report(results, 'recall_pre'))
    self.assertEqual(lines, [
        'recall_pre, depth 2: gains over feedback alignment: bp_v +40.0, '
        'bp_qk +1.0'])
    first, second = (c for c in experiment.checks('recall_pre')
                     if 'depth 2' in c.text)
    self.assertGreater(first.measure(results), 3)
    self.assertAlmostEqual(second.measure(results), .8)

  def test_pictures(self):
    depth, vit = _experiment('transformer_depth'), _experiment('vit_cifar')
    made = reproduction.Results(vit.columns, [
        {**_made_up('', row.name, .5), 'row': row.name,
         'test_accuracy_by_epoch': [.4, .5]} for row in vit.rows[:5]])
    paths = _experiment('transformer_paths')
    of_paths = reproduction.Results(paths.columns, [
        _made_up('recall_pre', f'{row}_2', .5) for row in ('bp_v', 'backprop')])
    for i, (experiment, results) in enumerate((
        (depth, self._results((.9, .9), (.5, .5))), (vit, made),
        (paths, of_paths))):
      experiment.draw(results, str(self.tmp / f'{i}.png'))
      self.assertGreater((self.tmp / f'{i}.png').stat().st_size, 5000)


class TrainingTest(parameterized.TestCase):

  def _train(self, name, override, own):
    """The records of some rows."""
    output = self.tmp / 'results.json'
    experiment, values = _prepared(name, {
        'workdir': str(self.tmp / 'runs'), 'output': str(output), 'epochs': 1,
        'override': override}, candidate=['0'], **own)
    # Most checks miss their rows.
    self.assertEqual(reproduction.reproduce(experiment, **values), 1)
    held = json.loads(output.read_text())
    self.assertIn('date', held)
    return held['runs']

  def test_a_step_on_lists(self):
    run, = self._train('transformer_depth', [
        'dataset_args.train=80', 'dataset_args.validation=10',
        'dataset_args.test=10', 'batch_size=80', 'warmup_epochs=0',
        'model_args.width=8', 'model_args.hidden=8'],
        {'dataset': ['listops'], 'depths': ['1'], 'rules': ['dfa_macro']})
    self.assertEqual(run['steps'], 1)
    self.assertEqual(run['row'], 'listops,dfa_macro_1')

  def test_a_step_of_a_plateau_on_a_text(self):
    text = self.tmp / 'wiki.txt'
    rng = np.random.default_rng(0)
    text.write_text(' '.join(
        rng.choice(['the', 'cat', 'sat', 'on', 'a', 'mat'], 600)))
    run, = self._train('dfa_lm', [
        'vocabulary=300', 'length=8', 'model_args.width=8',
        'model_args.heads=2', 'model_args.hidden=8', 'model_args.depth=1'], {
            'dataset': ['wikitext103'], 'text': str(text),
            'rules': ['macro_plateau']})
    self.assertEqual(run['steps'], 1)
    self.assertLen(run['perplexity_by_epoch']['validation'], 1)
    self.assertGreater(run['perplexity_by_epoch']['validation'][0], 1)


class ModelTest(parameterized.TestCase):

  def test_three_maps_are_the_one(self):
    x = jax.random.randint(jax.random.key(0), (2, 5), 0, 7)
    sizes = {'depth': 1, 'width': 8, 'heads': 2, 'length': 5, 'dropout': 0.}
    one, three = (
        bpjax.models.gpt(7, separate=s, **sizes) for s in (False, True))
    params = jax.jit(three.init)(jax.random.key(1), x)['params']
    own = params['block_0']['attention']
    together = {
        name: jnp.concatenate(
            [own[part][name] for part in ('query', 'key', 'value')], -1)
        for name in ('kernel', 'bias')}
    rest = {k: v for k, v in own.items() if k in ('out', 'norm')}
    stacked = {**params, 'block_0': {
        **params['block_0'], 'attention': {**rest, 'qkv': together}}}
    np.testing.assert_allclose(
        jax.jit(one.apply)({'params': stacked}, x),
        jax.jit(three.apply)({'params': params}, x), atol=1e-6)

  def test_local_losses_of_each_token(self):
    x = jax.random.randint(jax.random.key(0), (2, 5), 0, 7)
    y = (x + 1) % 7
    model = bpjax.models.gpt(
        7, depth=1, width=8, heads=2, length=5, dropout=0.)
    net = bpjax.from_linen(model)
    rule = bpjax.variant('LG-BP', grouped=False, pooled=False)

    @jax.jit
    def learn(key):
      variables = net.init(key, x)
      feedback = rule.init(key, net, variables, x)
      _, (_, grads) = rule.value_and_grad(
          net, bpjax.losses.softmax_cross_entropy)(
              variables, feedback, x, y, key=key)
      _, state = model.apply(variables, x, capture_intermediates=True)
      block, = state['intermediates']['block_0']['__call__']
      return block, feedback['heads']['block_0'], grads['heads']['block_0']

    block, head, grad = jax.tree.map(np.asarray, learn(jax.random.key(1)))
    # Each token's own prediction, and the mean over all of them.
    error = np.exp(block @ head['kernel'] + head['bias'])
    error = error / error.sum(-1, keepdims=True) - np.eye(7)[y]
    np.testing.assert_allclose(
        grad['kernel'], np.einsum('btc,bto->co', block, error) / 10, atol=1e-6)
    np.testing.assert_allclose(
        grad['bias'], error.sum((0, 1)) / 10, atol=1e-6)
