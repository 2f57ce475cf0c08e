"""What the launcher withstands: signals, damage, full disks, foreign files.

Faults drawn at random are brought into runs by `tests/faults`; the cases here
are those of a kind by itself.
"""

import ast
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings

import bpjax
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train.data import decoded
from bpjax.train.data import prepared
from bpjax.train.fit import _Asked
from bpjax.train.folder import checkpoint
from bpjax.train.folder import environment
from bpjax.train.folder import streams
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import launch as launch_lib
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
from bpjax.train.loop import step as step_lib
import jax
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


@pytest.fixture(autouse=True)
def _hangups_are_heard():
  """Also where the tests themselves run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


def _config(**fields):
  """Two epochs of 6 steps."""
  config = config_lib.default()
  config.epochs, config.batch_size, config.train_examples = 2, 50, 300
  config.eval_batch_size, config.checkpoint_every = 360, 4
  config.model_args.widths = (8,)
  for field, value in fields.items():
    config[field] = value
  return config


def _launch(path, expect=0, **fields):
  assert launch_lib.launch(_config(**fields), str(path), quiet=True) == expect
  log = path / 'log.txt'
  return log.read_text() if log.exists() else ''


@pytest.fixture(scope='module', name='finished')
def _finished(tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    _launch(path)
  return path


@pytest.fixture(name='run')
def _run(finished, tmp_path):
  """A finished run, to be damaged."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))


@pytest.mark.parametrize('first', range(0, 100, 50))
def test_faults_at_random(first):
  done = subprocess.run(
      [sys.executable, '-m', 'tests.faults', '--faults=50', f'--first={first}',
       '--workers=1'],
      cwd=_ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


def test_the_harness_sees_a_run_that_goes_on_otherwise(tmp_path):
  program = '''
import pathlib, sys
from tests.faults import __main__  # One device.
from bpjax.train.folder import workdir
from tests.faults import harness
# What a checkpoint counts on is cut with the rest.
cut = workdir.Workdir.cut_metrics
faults = harness.Harness(pathlib.Path(sys.argv[1]))
workdir.Workdir.cut_metrics = lambda self, step: cut(self, step - 4)
outcome = faults._judge(0, '', '', faults.cuts[10], [])
assert outcome.outcome == harness.WRONG, outcome
assert 'metrics.jsonl' in outcome.why, outcome
'''
  done = subprocess.run(
      [sys.executable, '-c', program, str(tmp_path)], cwd=_ROOT,
      capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_a_disk_that_is_full_when_checkpoints_are_closed(tmp_path, monkeypatch):
  def close(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, 'close', close)
    log = _launch(tmp_path, expect=4)
  assert 'a checkpoint in' in log and 'No space left on device' in log
  # Nor does it hide what ended the run.
  with pytest.raises(KeyError), checkpoint.Checkpoints(
      str(tmp_path / 'checkpoints'), 2, print) as checkpoints:
    checkpoints._manager = types.SimpleNamespace(
        wait_until_finished=lambda: close(None), close=lambda: close(None))
    raise KeyError()
  _launch(tmp_path)


# Signals


def test_interrupted_is_no_error():
  assert not issubclass(progress.Interrupted, Exception)
  assert progress.Interrupted(signal.SIGHUP).exit_code == 0
  assert progress.Interrupted(signal.SIGINT).exit_code == 130


def test_nothing_catches_everything():
  for file in [
      *(_ROOT / 'experiments').glob('*.py'),
      *(_ROOT / 'bpjax' / 'train').rglob('*.py')]:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type else 'BaseException'
        assert 'BaseException' not in caught, file
        if file.name == 'leaderboard.py':
          continue  # An empty cell says what its rule raised, whatever it is.
        # One that raises again what says nothing of the data.
        assert not re.search(r'\bException\b', caught) or 'raise' in (
            ast.unparse(node)), file


@pytest.mark.parametrize('where', [
    (checkpoint.Checkpoints, '_read'), (run_lib, 'setup'),
    (data_lib, 'load'), (workdir_lib.Workdir, 'claim')])
def test_a_signal_anywhere_touches_nothing(run, where, monkeypatch):
  (run / 'summary.json').unlink()
  before = {p: p.read_bytes() for p in run.rglob('*')
            if p.is_file() and p.name != 'log.txt'}

  original = getattr(*where)

  def interrupted(*args, **kwargs):
    signal.raise_signal(signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(*where, interrupted)
  log = _launch(run)
  assert 'stopped by SIGTERM' in log and 'damaged' not in log
  assert {p: p.read_bytes() for p in run.rglob('*')
          if p.is_file() and p.name != 'log.txt'} == before


def test_a_signal_while_the_folder_is_closed(tmp_path, monkeypatch):
  show = workdir_lib.Workdir._show

  def interrupted(self, what, *args):
    show(self, what, *args)
    if what == 'close':
      signal.raise_signal(signal.SIGHUP)

  monkeypatch.setattr(workdir_lib.Workdir, '_show', interrupted)
  assert 'finished' in _launch(tmp_path)
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
  monkeypatch.undo()
  assert 'is finished' in _launch(tmp_path)  # Nor is it held any longer.


@pytest.mark.parametrize('stopper,numbers', [
    (progress.Stopper, [signal.SIGTERM]),
    (_Asked, [signal.SIGINT, signal.SIGINT])])
def test_a_signal_within_a_read_is_raised_at_its_end(stopper, numbers):
  done = []
  with pytest.raises(progress.Interrupted), stopper() as stopper:
    with stopper.reading():
      for number in numbers:
        signal.raise_signal(number)
      done.append('read')
    done.append('more')
  assert done == ['read']


def test_calls_are_cut_so_that_a_signal_is_heard():
  pace = run_lib._Pace()
  assert pace.limit(1000) == 1
  pace.seconds = .01
  assert pace.limit(1000) == 100 and pace.limit(7) == 7
  pace.seconds = 5.
  assert pace.limit(1000) == 1


def test_a_long_evaluation_is_broken_off_and_made_again(
    finished, tmp_path, monkeypatch):
  evaluate, calls = run_lib.evaluate, []

  def evaluate_and_send(run, state, split, check=lambda: None):
    calls.append(split)
    if len(calls) == 2:
      signal.raise_signal(signal.SIGTERM)
    return evaluate(run, state, split, check)

  monkeypatch.setattr(run_lib, 'evaluate', evaluate_and_send)
  log = _launch(tmp_path / 'run', checkpoint_every=100)
  assert 'stopped by SIGTERM' in log
  assert os.listdir(tmp_path / 'run' / 'checkpoints') == ['12']
  log = _launch(tmp_path / 'run', checkpoint_every=100)
  assert 'going on from step 12 of 12' in log
  assert ((tmp_path / 'run' / 'metrics.jsonl').read_bytes()
          == (finished / 'metrics.jsonl').read_bytes())


_PROGRAM = '''
import hashlib, time
from bpjax.train.loop import progress
ready = lambda: print('ready', flush=True)
class Destroyed:
  def __del__(self):
    ready()
    time.sleep(3)
try:
  with progress.Stopper() as stopper:
    {}
except progress.Interrupted as error:  # It came before the compiled code.
  progress.streams.complain(progress.STOPPED.format(error.signal))
  raise SystemExit(error.exit_code)
'''


@pytest.mark.parametrize('doing,numbers,code', [
    # What is raised in a destructor is lost.
    ('Destroyed(); time.sleep(60)', [signal.SIGTERM], 0),
    ('with stopper.reading(): ready(); time.sleep(60)', [signal.SIGTERM], 0),
    # Compiled code, in which no handler runs.
    ('ready(); hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)',
     [signal.SIGINT], 130),
    ('with stopper.deferring(): ready(); time.sleep(60)',
     [signal.SIGHUP, signal.SIGINT], 130)])
def test_a_signal_ends_what_does_not_listen(doing, numbers, code):
  process = subprocess.Popen(
      [sys.executable, '-c', _PROGRAM.format(doing)], cwd=_ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'ready\n'
  for number in numbers:
    process.send_signal(number)
    # Two of them must not come as one.
    if len(numbers) > 1:
      subprocess.run(['sleep', '.2'], check=True)
  _, error = process.communicate(timeout=30)
  assert process.returncode == code
  assert 'Traceback' not in error and 'stopped by' in error


# What lies in the folder


@pytest.mark.parametrize('line,sentence', [
    ('3', 'must be an object'), ('x', 'not JSON'), ('[' * 99999, 'not JSON'),
    ('{"step": "6", "epoch": 1, "split": "train"}', '`step` must be'),
    ('{"step": 6, "epoch": 1, "split": "train", "loss": "low"}', '`loss` must'),
    ('{"step": 6, "epoch": 1, "split": 7}', 'must be texts'),
    ('{"step": 0, "epoch": 1, "split": "train"}', 'before that of the line'),
    ('{"step": 6, "epoch": 1, "split": "train", "loss": NaN}', 'not JSON')])
def test_a_line_that_no_run_writes_is_named(run, line, sentence):
  file = run / 'metrics.jsonl'
  lines = file.read_text().splitlines()
  file.write_text('\n'.join([lines[0], line, *lines[1:]]) + '\n')
  log = _launch(run, expect=2).splitlines()[-1]
  assert f'line 2 of {file} is none' in log and sentence in log
  assert 'remove it and all lines after it' in log
  # The way out.
  file.write_text(lines[0] + '\n')
  assert 'none that this program can use' in _launch(run, expect=2)


@pytest.mark.parametrize('text', [
    '{}', '', '{"test_accuracy"', '[1]', 'null', None])
def test_a_summary_counts_when_it_is_whole_and_agrees(finished, run, text):
  file = run / 'summary.json'
  if text is None:  # Another accuracy, which the metrics do not hold.
    text = json.dumps(json.loads(file.read_text()) | {'test_accuracy': .99})
  file.write_text(text)
  log = _launch(run)
  assert 'summary.json.unreadable' in log
  assert (run / 'summary.json.unreadable').read_text() == text
  a, b = (json.loads((p / 'summary.json').read_text()) for p in (run, finished))
  assert a['digest'] == b['digest']


def test_a_last_line_that_is_cut_short_is_made_again(finished, run):
  file = run / 'metrics.jsonl'
  whole = file.read_bytes()
  file.write_bytes(whole[:-20])
  _launch(run)
  assert file.read_bytes() == whole


@pytest.mark.parametrize('damage,words', [
    (lambda new, old: new.mkdir(), 'empty or none of a run'),
    (lambda new, old: new.write_text(''), 'is no folder'),
    (lambda new, old: new.symlink_to(old), 'is no folder'),
    (lambda new, old: shutil.copytree(old, new), 'is of step 12')])
def test_a_step_folder_that_is_none_costs_itself_alone(run, damage, words):
  (run / 'summary.json').unlink()
  folder = run / 'checkpoints'
  damage(folder / '16', folder / '12')
  log = _launch(run)
  assert words in log and 'kept as 16.unreadable' in log
  assert os.path.lexists(folder / '16.unreadable')
  assert 'going on from step 12 of 12' in log


def test_a_checkpoint_of_another_run_is_not_used(run, tmp_path):
  _launch(tmp_path / 'other', seed=1)
  (run / 'summary.json').unlink()
  shutil.rmtree(run / 'checkpoints' / '12')
  shutil.copytree(
      tmp_path / 'other' / 'checkpoints' / '12', run / 'checkpoints' / '12')
  log = _launch(run)
  assert 'is of a run with another config' in log
  assert 'going on from step 8 of 12' in log


@pytest.mark.parametrize('kind,field,value,code,words', [
    ('settings', 'jax_threefry_partitionable', 'else', 2, 'began otherwise'),
    ('settings', 'jax_default_prng_impl', 'rbg', 2, 'began otherwise'),
    ('settings', 'jax_enable_x64', True, 2, 'began otherwise'),
    ('data', 'fingerprint', '0', 2, 'began otherwise'),
    ('machine', 'device_count', 9, 0, 'last bits')])
def test_what_changes_results_is_compared(run, kind, field, value, code, words):
  (run / 'summary.json').unlink()
  file = run / 'environment.json'
  held = json.loads(file.read_text())
  held[kind][field] = value
  file.write_text(json.dumps(held))
  log = _launch(run, expect=code)
  assert words in log and f'`{field}` is' in log


def test_the_fingerprint_of_data_covers_labels():
  dataset = data_lib.load('digits')
  labels = dataset.train.labels.copy()
  labels[7] += 1
  other = dataset._replace(train=dataset.train._replace(labels=labels))
  assert environment.fingerprint(dataset) != environment.fingerprint(other)


# The edge of the disk


@pytest.mark.parametrize('call', ['fsync', 'write', 'replace', 'ftruncate'])
def test_a_full_disk_is_one_sentence_and_goes_on(
    finished, tmp_path, call, monkeypatch, capfd):
  real, calls = getattr(os, call), []

  def full(*args):
    calls.append(args)
    if len(calls) > (3 if call == 'write' else 0):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(os, call, full)
    assert launch_lib.launch(_config(), str(tmp_path / 'run')) == 4
  error = capfd.readouterr().err
  assert error.count('error: ') == 1 and 'No space left' in error
  assert 'Traceback' not in error
  _launch(tmp_path / 'run')
  assert ((tmp_path / 'run' / 'metrics.jsonl').read_bytes()
          == (finished / 'metrics.jsonl').read_bytes())


@pytest.mark.parametrize('fields', [
    {'rule': 'backporp'}, {'batch_size': 4000}, {'dataset': 'digit'}])
def test_a_refused_command_leaves_nothing(tmp_path, fields):
  _launch(tmp_path / 'a' / 'b', expect=2, **fields)
  assert not os.listdir(tmp_path)


def test_names_of_folders(tmp_path, monkeypatch, capsys):
  assert launch_lib.launch(_config(), '') == 2
  assert '`workdir` must be a folder' in capsys.readouterr().err
  monkeypatch.setenv('HOME', str(tmp_path))
  with workdir_lib.Workdir('~/x') as folder:
    assert folder.path == str(tmp_path / 'x')


def test_streams_that_cannot_be_written_to(tmp_path, finished):
  program = '''
import sys
from tests.faults_test import _config
from bpjax.train.loop import launch
from bpjax.train.folder import streams
streams.guarded(lambda: sys.exit(launch.launch(_config(), sys.argv[1])))
'''
  def run(shell, path):
    command = f'exec {sys.executable} -c "$1" {path} {shell}'
    return subprocess.run(
        ['sh', '-c', command, 'sh', program], cwd=_ROOT, capture_output=True,
        text=True, check=False, env={
            **os.environ, 'PYTHONPATH': f'{_ROOT}:{_ROOT}/tests', 'XLA_FLAGS': (
                os.environ.get('XLA_FLAGS', '')
                + ' --xla_force_host_platform_device_count=1')})

  path = tmp_path / 'run'
  for shell in ('2>/dev/full', '2>&-'):
    done = run(shell, path)
    assert done.returncode == 0
    assert json.loads(done.stdout)['epochs'] == 2
    assert 'stderr cannot be written to' in (path / 'log.txt').read_text()
  done = run('>/dev/full', path)
  assert done.returncode == 4
  assert done.stderr.splitlines()[-1].startswith(
      'error: stdout cannot be written to (No space left on device)')


def test_a_script_whose_output_is_full():
  done = subprocess.run(
      ['sh', '-c', f'exec {sys.executable} scripts/akrout_mnist.py '
       '--read=results/akrout_mnist.json >/dev/full'],
      cwd=_ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 4
  assert done.stderr == (
      'error: stdout cannot be written to (No space left on device).\n')


def test_every_program_says_so_where_its_output_is_full():
  guards = ('guarded(', 'measurement.run(', '.main(EXPERIMENT',
            'reproduction.main(', 'measurement.main(', 'transformers.main(',
            'dynamics.main(', 'after.start(')
  for folder in ('scripts', 'benchmarks', 'experiments'):
    for file in (_ROOT / folder).glob('*.py'):
      _, is_program, last = file.read_text().rpartition(
          "if __name__ == '__main__':")
      if is_program:
        assert any(guard in last for guard in guards), file


# Trust


def _tfds_folder(path, features):
  folder = path / 'mine' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text(json.dumps({
      'name': 'mine', 'version': '1.0.0', 'fileFormat': 'array_record',
      'splits': [{'name': s, 'shardLengths': ['1']} for s in ('train', 'test')]
  }))
  (folder / 'features.json').write_text(json.dumps(features))
  return folder


def _features(**more):
  core = 'tensorflow_datasets.core.features'
  return {
      'pythonClassName': f'{core}.features_dict.FeaturesDict',
      'featuresDict': {'features': {
          'image': {
              'pythonClassName': f'{core}.image_feature.Image',
              'image': {'shape': {'dimensions': ['2', '2', '1']}}},
          'label': {
              'pythonClassName': f'{core}.class_label_feature.ClassLabel',
              'classLabel': {'numClasses': '10'}},
          **more}}}


_EVIL = 'evilmod.X'


@pytest.mark.parametrize('features', [
    _features(x={'pythonClassName': _EVIL}),
    _features(x={'python_class_name': _EVIL}),
    _features(x={'jsonFeature': {'json': json.dumps({'type': _EVIL})}}),
    _features() | {'type': _EVIL, 'content': {}},
    _features(x={'pythonClassName': 'tensorflow_datasets.evilmod.X'})])
def test_no_features_file_imports_anything(tmp_path, features, monkeypatch):
  (tmp_path / 'evilmod.py').write_text('raise SystemExit("it ran")')
  monkeypatch.syspath_prepend(str(tmp_path))
  _tfds_folder(tmp_path, features)
  with pytest.raises(ValueError, match='features of TFDS alone.*evilmod'):
    data_lib.load('mine', tmp_path, cache_dir=tmp_path)
  assert 'evilmod' not in sys.modules


def test_features_of_tfds_are_read(tmp_path):
  folder = _tfds_folder(tmp_path, _features())
  found = prepared.find('mine', tmp_path)
  assert found.num_classes == 10
  # Other labels in files of the same size are other data.
  shard = folder / 'mine-train.array_record-00000-of-00001'
  shard.write_bytes(b'\1' * 99)
  one = prepared.find('mine', tmp_path).fingerprint
  shard.write_bytes(b'\1' * 98 + b'\2')
  assert len({found.fingerprint, one,
              prepared.find('mine', tmp_path).fingerprint}) == 3


def test_a_cache_file_with_other_labels_is_not_used(tmp_path):
  split = decoded.Split(
      np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 2], np.int32))
  path = decoded.cache_path('mine', '1.0.0', tmp_path)
  decoded.write_cache(path, decoded.Decoded(split, split, 10, 'PNG', 'print'))
  assert decoded.read_cache(path) is not None
  with np.load(path) as file:
    arrays = dict(file)
  arrays['test_labels'][1] = 9
  np.savez(path, **arrays)
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    assert decoded.read_cache(path) is None
  assert str(path) in str(said[0].message)


@pytest.mark.parametrize('name', [
    'log.txt', 'metrics.jsonl', '.summary.json.tmp', '.config.json.tmp',
    'checkpoints'])
def test_links_are_not_followed_for_writing(tmp_path, name):
  outside, run = tmp_path / 'outside', tmp_path / 'run'
  run.mkdir()
  if name == 'checkpoints':
    outside.mkdir()
  else:
    outside.write_text('not yours')
  (run / name).symlink_to(outside)
  code = launch_lib.launch(_config(), str(run), quiet=True)
  assert code == (0 if name.endswith('.tmp') else code) and code in (0, 2, 4)
  if name == 'checkpoints':
    assert not os.listdir(outside)
  else:
    assert outside.read_text() == 'not yours'


def test_terminal_escapes_are_not_printed(capsys):
  streams.complain('a\x1b[2Jb')
  assert capsys.readouterr().err == 'a\\x1b[2Jb\n'
  assert streams.printable({'\x07': ['\x9b', 'ö\n']}) == {
      '\\x07': ['\\x9b', 'ö\n']}


# Divergence


@pytest.mark.parametrize('rule', bpjax.rules.names())
def test_every_rule_says_that_it_diverged(rule, tmp_path):
  fields = {}
  if rule == 'equilibrium_propagation':
    fields = {'loss': 'squared_error'}
  code = launch_lib.launch(
      _config(rule=rule, learning_rate=1e10, **fields), str(tmp_path / 'run'),
      quiet=True)
  assert code in (0, 3)
  last = (tmp_path / 'run' / 'log.txt').read_text().splitlines()[-1]
  if code == 3:
    assert 'not finite' in last or 'the loss of rule' in last
  else:
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['diverged'] is True
    assert 'finished, but diverged' in last


def test_a_run_that_learns_has_not_diverged(finished):
  summary = json.loads((finished / 'summary.json').read_text())
  assert summary['diverged'] is False
  assert summary['train_loss'] < summary['first_train_loss']


def test_feedback_that_is_not_finite_is_noticed():
  empty = jax.tree.map(np.asarray, step_lib.empty_window())
  state = step_lib.TrainState(
      np.int32(0), {'w': np.ones(3)}, {'b': np.array([np.inf])}, {}, {}, empty,
      {}, {})
  assert not step_lib.is_finite(state)
