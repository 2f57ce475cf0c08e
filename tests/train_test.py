"""`bpjax.train`: fit, models and losses of a user's own, and what comes after."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import bpjax
from bpjax.train import config as config_lib
from bpjax.train import evaluate as evaluate_lib
from bpjax.train import export as export_lib
from bpjax.train import named
from bpjax.train import predict as predict_lib
from bpjax.train import restore as restore_lib
from bpjax.train.loop import launch
from bpjax.train.loop import tasks
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MINE = '''
from flax import nnx
import jax, jax.numpy as jnp
import bpjax

class Net(nnx.Module):
  def __init__(self, num_classes, in_features, *, hidden=16, rngs):
    self.first = nnx.Linear(in_features, hidden, rngs=rngs)
    self.last = nnx.Linear(hidden, num_classes, rngs=rngs)

  def __call__(self, x):
    return self.last(jnp.tanh(self.first(x.reshape(x.shape[0], -1))))

def rule(scale=1.):
  return bpjax.rules.feedback_alignment(scale=scale)

def loss(output, labels):
  return bpjax.losses.softmax_cross_entropy(output, labels)

def top3(output, labels):
  return jnp.any(jax.lax.top_k(output, 3)[1] == labels[:, None], -1)

def shift(key, images, by=1):
  return jnp.roll(images, by, 2)

def broken(num_classes):
  raise TypeError('no such layer')
'''


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
  path = tmp_path_factory.mktemp('mine') / 'mine_of_tests.py'
  path.write_text(_MINE)
  return str(path)


def _config(**fields):
  config = config_lib.default()
  config.model_args.widths = (16,)
  for name, value in fields.items():
    config[name] = value
  return config


def _launch(folder, **fields):
  return launch.launch(_config(**fields), str(folder), quiet=True)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run on digits with names, set apart, and the best kept."""
  folder = tmp_path_factory.mktemp('run')
  assert not _launch(
      folder, epochs=3, validation=200, keep_best=True, learning_rate=.01)
  return str(folder)


def _data():
  images = np.random.default_rng(0).integers(
      0, 255, (60, 4, 4)).astype(np.uint8)
  labels = images.reshape(60, -1).mean(1) > 127
  labels = labels.astype(int)
  return bpjax.train.dataset(
      (images[:40], labels[:40]), (images[40:], labels[40:]),
      classes=('dark', 'light'))


def test_fit_is_the_launcher(run, tmp_path):
  """The same numbers, in a folder that is the same but for names."""
  fitted = bpjax.train.fit(
      bpjax.models.mlp(num_classes=10, widths=(16,)), 'backprop',
      dataset='digits', epochs=3, validation=200, keep_best=True,
      learning_rate=.01, workdir=str(tmp_path / 'run'), quiet=True)
  a, b = (pathlib.Path(f, 'metrics.jsonl').read_text()
          for f in (run, fitted.workdir))
  assert a == b
  assert fitted.summary['test_accuracy'] > .8
  restored = restore_lib.restore(run)
  np.testing.assert_array_equal(
      restored.variables['params']['Dense_0']['kernel'],
      fitted.variables['params']['Dense_0']['kernel'])


def test_fit_takes_objects_and_goes_on(tmp_path, capsys):
  dataset = _data()

  def fit(epochs):
    module = nnx.Sequential(
        lambda x: x.reshape(x.shape[0], -1), nnx.Linear(16, 2, rngs=nnx.Rngs(0)))
    return bpjax.train.fit(
        module, bpjax.rules.direct_feedback_alignment(),
        lambda o, y: bpjax.losses.softmax_cross_entropy(o, y), dataset,
        metrics={'sure': lambda o, y: jnp.max(jax.nn.softmax(o), -1)},
        workdir=str(tmp_path / 'run'), epochs=epochs, batch_size=16, quiet=True)

  first, again = fit(1), fit(1)
  jax.tree.map(np.testing.assert_array_equal, first.variables, again.variables)
  longer = fit(2)
  assert longer.summary['steps'] == 2 * first.summary['steps']
  assert 0 < longer.summary['test_sure'] <= 1
  guess = np.argmax(longer.predict(dataset.test.images), -1)
  accuracy = np.mean(guess == dataset.test.labels)
  assert longer.summary['test_accuracy'] == pytest.approx(accuracy)
  assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('change, words', [
    ({'net': 3}, '`net` must be a network'),
    ({'rule': 3}, '`rule` must be a rule'),
    ({'rule': 'kolen_polack'}, 'did you mean `kolen_pollack`'),
    ({'dataset': ([1], [2])}, '`bpjax.train.dataset`'),
    ({'epoch': 3}, '`epoch` is no argument of `fit`'),
    ({'epochs': 0}, '`epochs` must be'),
    ({'model': 'mlp'}, '`model` must be left out'),
    ({'workdir': ''}, '`workdir` must be a folder'),
    ({'loss': lambda o, y: 0 * o[0, 0]}, 'one number for each'),
    ({'keep_best': True}, 'needs validation examples'),
    ({'keep_best': True, 'validation': 9, 'monitor': 'acuracy'},
     '`monitor` must be one of'),
    ({'class_weights': (1.,)}, 'one number for each of the 2 classes'),
    ({'label_smoothing': .1, 'loss': 'squared_error'}, '`label_smoothing`'),
    ({'prior_bias': True, 'loss': 'squared_error'}, '`prior_bias`'),
    ({'prior_bias': True, 'net': nn.Sequential(
        [lambda x: x.reshape(len(x), -1), nn.Dense(2, use_bias=False)])},
     'one readout with a bias'),
])
def test_fit_refuses(tmp_path, change, words):
  arguments = {
      'net': bpjax.models.mlp(num_classes=2, widths=(4,)), 'rule': 'backprop',
      'dataset': _data(), 'workdir': str(tmp_path / 'run'),
      'batch_size': 16} | change
  with pytest.raises(ValueError, match=words):
    bpjax.train.fit(**arguments)
  assert not os.path.exists(tmp_path / 'run')


def test_the_readout_begins_at_the_frequencies_of_the_classes(tmp_path):
  x = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)
  y = np.repeat([0, 1, 2], [60, 30, 0])
  data = bpjax.train.dataset((x, y), (x, y), classes=('a', 'b', 'c'))
  fitted = bpjax.train.fit(
      bpjax.models.mlp(num_classes=3, widths=(4,)), 'feedback_alignment',
      dataset=data, workdir=str(tmp_path / 'run'), batch_size=40, epochs=1,
      learning_rate=1e-9, prior_bias=True, quiet=True)
  expected = np.log(np.array([61, 31, 1]) / 93)
  np.testing.assert_allclose(
      fitted.variables['params']['Dense_1']['bias'], expected, atol=1e-6)


def test_code_of_ones_own(mine, tmp_path):
  folder = tmp_path / 'run'
  config = config_lib.default()
  config.update(
      model=f'{mine}:Net', rule=f'{mine}:rule', loss=f'{mine}:loss',
      augment=f'{mine}:shift', metrics=(f'{mine}:top3',), epochs=2,
      learning_rate=.01)
  config.model_args.hidden = 8
  config.augment_args.by = 0
  config.rule_args.scale = .5
  assert launch.launch(config, str(folder), quiet=True) == 0
  summary = json.loads((folder / 'summary.json').read_text())
  assert summary['units'] == {
      'first': 'feedback_alignment', 'last': 'feedback_alignment'}
  assert summary['test_top3'] > summary['test_accuracy']
  with pytest.raises(ValueError, match='names code.*--trust_code'):
    restore_lib.restore(str(folder))
  restored = restore_lib.restore(str(folder), trust_code=True)
  found = evaluate_lib.evaluate(restored)
  assert found['top3'] == pytest.approx(summary['test_top3'])


@pytest.mark.parametrize('field, value, words', [
    ('model', 'nowhere:Net', 'cannot be imported'),
    ('model', 'nowhere.py:Net', 'a file that is not there'),
    ('model', '{mine}:Nett', 'it holds'),
    ('model', '{mine}:broken', 'raises TypeError: no such layer'),
    ('model', '{mine}:loss', 'raises TypeError'),
    ('model', 'math:pi', 'a class, or a function'),
    ('rule', '{mine}:shift', 'raises TypeError'),
    ('rule', 'math:gcd', 'must return a rule'),
    ('loss', 'cross_entrop', 'did you mean'),
    ('metrics', ('top3',), "'package.module:name'"),
])
def test_wrong_code(mine, tmp_path, field, value, words, capsys):
  config = config_lib.default()
  config[field] = value if field == 'metrics' else value.format(mine=mine)
  assert launch.launch(config, str(tmp_path / 'run')) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and pytest.importorskip('re').search(words, error)


def test_nothing_read_is_taken_for_code():
  assert not named.is_code('mnist:3.0.1')
  assert not named.is_code('glue/sst2')
  assert named.is_code('a.b:c') and named.is_code('./a b.py:c')


def test_a_finished_run_goes_on_to_the_same_bits(tmp_path):
  fields = {'alignment_every': 7, 'ema': .9, 'train_examples': 300}
  assert not _launch(tmp_path / 'a', epochs=1, **fields)
  assert not _launch(tmp_path / 'a', epochs=3, **fields)
  assert not _launch(tmp_path / 'b', epochs=3, **fields)
  for name in ('metrics.jsonl', 'config.json'):
    assert (tmp_path / 'a' / name).read_text() == (
        tmp_path / 'b' / name).read_text()
  assert (tmp_path / 'a' / 'summary.1_epochs.json').exists()
  assert _launch(tmp_path / 'a', epochs=2, **fields) == 2  # Fewer.
  assert not _launch(tmp_path / 'c', epochs=1, schedule='cosine', **fields)
  assert _launch(tmp_path / 'c', epochs=2, schedule='cosine', **fields) == 2


def test_early_stopping(tmp_path):
  assert not _launch(
      tmp_path / 'run', epochs=50, validation=200, learning_rate=.1,
      early_stopping=2, keep_best=True, monitor='loss', train_examples=256)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  lines = [json.loads(line) for line in open(
      tmp_path / 'run' / 'metrics.jsonl', encoding='utf-8')]
  losses = [m['loss'] for m in lines if m['split'] == 'validation']
  best = int(np.argmin(losses))
  assert summary['best']['epoch'] == best + 1
  assert len(losses) == best + 3 < 50
  assert os.listdir(tmp_path / 'run' / 'best') == [str(summary['best']['step'])]
  assert launch.launch(_config(
      epochs=50, validation=200, learning_rate=.1, early_stopping=2,
      keep_best=True, monitor='loss', train_examples=256),
      str(tmp_path / 'run'), quiet=True) == 0  # It is finished.


def test_smoothing_and_weights():
  output = jnp.array([[2., 0, -1], [0, 1, 3]])
  labels = jnp.array([0, 1])
  logs = np.log(np.exp(output) / np.exp(output).sum(1, keepdims=True))
  target = .9 * np.eye(3)[labels] + .1 / 3
  expected = -(target * logs).sum(1) * np.array([2., .5])
  loss = tasks.loss_function('cross_entropy', 3, .1, (2., .5, 1.))
  np.testing.assert_allclose(loss(output, labels), expected, rtol=1e-6)


def test_evaluation_agrees_with_the_run(run):
  restored = restore_lib.restore(run)
  found = evaluate_lib.evaluate(restored)
  summary = json.loads(pathlib.Path(run, 'summary.json').read_text())
  for name in ('loss', 'accuracy'):
    assert found[name] == pytest.approx(summary[f'test_{name}'], rel=1e-6)
  confusion = np.array(found['confusion'])
  assert confusion.sum() == 360
  assert np.trace(confusion) / 360 == pytest.approx(found['accuracy'])
  third = found['per_class'][3]
  assert third['support'] == confusion[3].sum()
  assert third['recall'] == pytest.approx(confusion[3, 3] / confusion[3].sum())
  assert '360 test examples' in evaluate_lib.table(found)
  best = restore_lib.restore(run, best=True)
  assert best.step == summary['best']['step']


def test_calibration():
  probabilities = np.array([[.8, .2], [.8, .2], [.4, .6], [.5, .5]])
  found = evaluate_lib.calibration(probabilities, np.array([0, 1, 1, 0]))
  # Bins .8: 2 examples, accuracy .5; .6: 1, right; .5: 1, right.
  assert found['expected_calibration_error'] == pytest.approx(
      (2 * .3 + .4 + .5) / 4)
  assert found['brier_score'] == pytest.approx(
      (.08 + 1.28 + .32 + .5) / 4)


def test_prediction_reads_as_the_data_were_read(run, tmp_path):
  restored = restore_lib.restore(run)
  files = []
  for i in range(3):
    files.append(str(tmp_path / f'{i}.png'))
    Image.fromarray(restored.dataset.test.images[i, ..., 0]).save(files[-1])
  answers = predict_lib.predict(restored, files, top=10)
  outputs = restored.outputs(
      restored.dataset.test._replace(
          images=restored.dataset.test.images[:3],
          labels=restored.dataset.test.labels[:3]))
  expected = np.asarray(jax.nn.softmax(outputs))
  for i in range(3):
    mine = {a['class']: a['probability'] for a in answers
            if a['file'] == files[i]}
    np.testing.assert_allclose(
        [mine[str(k)] for k in range(10)], expected[i], atol=1e-6)
  with pytest.raises(ValueError, match='is no file'):
    predict_lib.predict(restored, ['nothing.png'])
  with pytest.raises(ValueError, match='`top` must be between'):
    predict_lib.predict(restored, files, top=11)


def test_rows_of_numbers_are_predicted(tmp_path):
  with open(tmp_path / 't.csv', 'w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows(
        [('a', 'b', 'label')] + [(i, -i, ('lo', 'hi')[i > 20])
                                 for i in range(42)])
  assert not _launch(
      tmp_path / 'run', dataset=str(tmp_path / 't.csv'), batch_size=8,
      epochs=20, learning_rate=.05)
  (tmp_path / 'new.csv').write_text('a,b\n1,-1\n40,-40\n')
  answers = predict_lib.predict(
      restore_lib.restore(str(tmp_path / 'run')), [str(tmp_path / 'new.csv')])
  assert [(a['line'], a['class']) for a in answers] == [(1, 'lo'), (2, 'hi')]
  (tmp_path / 'new.csv').write_text('a\n1\n')
  with pytest.raises(ValueError, match='must have 2 columns'):
    predict_lib.predict(
        restore_lib.restore(str(tmp_path / 'run')), [str(tmp_path / 'new.csv')])


def test_export_loads_without_bpjax(run, tmp_path):
  restored = restore_lib.restore(run)
  export_lib.export(restored, str(tmp_path))
  images = restored.dataset.test.images[:5]
  np.save(tmp_path / 'images.npy', images)
  code = (
      'import jax.export, numpy as np, sys\n'
      'from safetensors.numpy import load_file\n'
      'model = jax.export.deserialize('
      'bytearray(open("model.jax_export", "rb").read()))\n'
      'np.save("out.npy", model.call(np.load("images.npy")))\n'
      'assert load_file("weights.safetensors")["params/Dense_0/kernel"].shape'
      ' == (64, 16)\n'
      'assert "bpjax" not in sys.modules\n')
  subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
  np.testing.assert_allclose(
      np.load(tmp_path / 'out.npy'),
      jax.nn.softmax(restored.outputs(restored.dataset.test._replace(
          images=images, labels=np.zeros(5, np.int32)))), atol=1e-6)


def test_folders_that_hold_no_run(tmp_path):
  with pytest.raises(ValueError, match='must be the folder of a run'):
    restore_lib.restore(str(tmp_path))
  (tmp_path / 'config.json').write_text('{"epoks": 3}')
  with pytest.raises(ValueError, match="field 'epoks'"):
    restore_lib.restore(str(tmp_path))
  config = config_lib.to_json(config_lib.default())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='holds no checkpoints'):
    restore_lib.restore(str(tmp_path))
  (tmp_path / 'config.json').write_text(
      json.dumps(config | {'model': 'os:system'}))
  with pytest.raises(ValueError, match='names code'):
    restore_lib.restore(str(tmp_path))


@pytest.mark.parametrize('command, code, words', [
    (['predict', '--workdir={run}'], 2, 'one file at least'),
    (['export', '--workdri=x'], 2, 'command line is not understood'),
])
def test_wrong_commands(run, command, code, words):
  """Those that are right are blocks of docs/training.md and docs/data.md."""
  found = subprocess.run(
      [sys.executable, '-m', f'experiments.{command[0]}',
       *(c.format(run=run) for c in command[1:])], cwd=_ROOT,
      capture_output=True, text=True, check=False)
  assert found.returncode == code, found.stderr
  assert words in (found.stderr if code else found.stdout)
  assert 'Traceback' not in found.stderr


if __name__ == '__main__':
  pytest.main([__file__])
