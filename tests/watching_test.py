"""What watchers are shown agrees with metrics.jsonl, and harms no run."""

import errno
import json
import os
import struct
import sys

from bpjax.train import config as config_lib
from bpjax.train.folder import watching
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import launch as launch_lib
from bpjax.train.loop import progress
from experiments import sweep as sweep_lib
import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def _one_device(tmp_path_factory):
  """Runs take one device of this process, and share what they compile."""
  settings = {
      'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
      'jax_persistent_cache_min_compile_time_secs': 0.,
      'jax_persistent_cache_min_entry_size_bytes': -1}
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    for name, value in settings.items():
      jax.config.update(name, value)
    yield
  for name, value in before.items():
    jax.config.update(name, value)


def _config(**fields):
  config = config_lib.default()
  config.update(
      {'epochs': 2, 'batch_size': 64, 'eval_batch_size': 360,
       'rule': 'kolen_pollack', 'alignment_every': 22, 'log_every': 10,
       'checkpoint_every': 4, 'train_examples': 700, **fields})
  config.model_args.widths = (8,)
  return config


def _points(folder):
  """(tag, step) -> every value that the event files hold, read by hand."""
  from tensorboardX.proto import event_pb2
  points, texts = {}, {}
  for path in sorted((folder / 'tensorboard').iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from('<Q', data, at)
      event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
      at += size + 16
      for value in event.summary.value:
        if value.HasField('tensor'):
          texts[value.tag] = value.tensor.string_val[0].decode()
        else:
          points.setdefault((value.tag, event.step), []).append(
              value.simple_value)
  return points, texts


def _expected(folder):
  """The same out of metrics.jsonl."""
  found = {}
  for line in map(json.loads, (folder / 'metrics.jsonl').open()):
    unit = f'/{line["unit"]}' if 'unit' in line else ''
    for name, value in line.items():
      if name in ('step', 'split', 'unit') or value is None or (
          unit and name == 'epoch'):
        continue
      tag = f'{line["split"]}_{name}{unit}' if unit else f'{line["split"]}/{name}'
      found[tag, line['step']] = [pytest.approx(value, rel=1e-6)]
  return found


def _write(folder, *steps):
  """Lines of a run in a folder, as it records them."""
  for step in steps:
    folder.record([
        {'step': step, 'epoch': 1, 'split': 'train', 'loss': step / 7},
        {'step': step, 'epoch': 1, 'split': 'alignment', 'unit': 'a/b',
         'teaching': .5, 'weight': float('nan')}])


def test_event_files_agree_with_the_metrics_and_change_nothing(tmp_path):
  for name, watch in (('with', ['tensorboard']), ('without', [])):
    assert not launch_lib.launch(
        _config(), str(tmp_path / name), quiet=True, watch=watch)
  with_, without = (tmp_path / n for n in ('with', 'without'))
  points, texts = _points(with_)
  assert points == _expected(with_) and len(points) > 20
  assert '| rule | `"kolen_pollack"` |' in texts['config/text_summary']
  assert {*os.listdir(with_)} == {*os.listdir(without), 'tensorboard'}
  for name in ('metrics.jsonl', 'config.json', 'environment.json'):
    assert (with_ / name).read_bytes() == (without / name).read_bytes()
  digests = [json.loads((f / 'summary.json').read_text())['digest']
             for f in (with_, without)]
  assert digests[0] == digests[1]


def test_a_run_that_goes_on_has_every_point_once(tmp_path, monkeypatch):
  """Killed where lines of the metrics lie behind the last checkpoint."""

  class Killed(BaseException):
    pass

  advance = progress.Progress.advance

  def die(self, steps):
    advance(self, steps)
    if self._step >= 15:
      raise Killed()

  with monkeypatch.context() as patch:
    patch.setattr(progress.Progress, 'advance', die)
    # Nothing is closed or flushed by a process that is killed.
    patch.setattr(watching.TensorBoard, 'close', lambda self: None)
    with pytest.raises(Killed):
      launch_lib.launch(_config(), str(tmp_path), quiet=True)
  (torn,) = (tmp_path / 'tensorboard').iterdir()
  torn.write_bytes(torn.read_bytes()[:-7])
  assert not launch_lib.launch(_config(), str(tmp_path), quiet=True)
  assert 'going on from step' in (tmp_path / 'log.txt').read_text()
  assert _points(tmp_path)[0] == _expected(tmp_path)


def test_lines_that_are_cut_leave_no_point(tmp_path):
  other = tmp_path / 'tensorboard' / 'events.out.tfevents.1.somebody'
  with workdir_lib.Workdir(str(tmp_path)) as folder:
    folder.watch(['tensorboard'], {})
    folder.cut_metrics(0)
    other.write_bytes(b'')
    _write(folder, 3, 5, 9)
    folder.cut_metrics(5)
    _write(folder, 6)
    assert {step for _, step in _points(tmp_path)[0]} == {3, 6}
    assert _points(tmp_path)[0] == _expected(tmp_path)
  assert other.exists()


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EACCES])
def test_a_write_that_fails_is_one_warning(tmp_path, monkeypatch, code):
  from tensorboardX import event_file_writer
  flush = event_file_writer.EventsWriter.flush
  count = []

  def fail(self):
    count.append(1)
    if len(count) > 2:
      raise OSError(code, os.strerror(code))
    return flush(self)

  monkeypatch.setattr(event_file_writer.EventsWriter, 'flush', fail)
  with workdir_lib.Workdir(str(tmp_path)) as folder:
    folder.watch(['tensorboard'], {})
    folder.cut_metrics(0)
    _write(folder, *range(5))
    log = (tmp_path / 'log.txt').read_text()
  assert log.count('`watch` of tensorboard failed') == 1
  assert os.strerror(code) in log and len(count) <= 4
  assert len(workdir_lib.read_metrics(str(tmp_path))) == 10


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path):
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'tensorboard').symlink_to(tmp_path / 'elsewhere')
  with workdir_lib.Workdir(str(tmp_path / 'run')) as folder:
    folder.watch(['tensorboard'], {})
    folder.cut_metrics(0)
    _write(folder, 1)
    assert 'is a symbolic link' in (tmp_path / 'run/log.txt').read_text()
  assert not os.listdir(tmp_path / 'elsewhere')


def test_a_package_that_is_missing(tmp_path, monkeypatch):
  monkeypatch.setattr(watching.importlib.util, 'find_spec', lambda name: None)
  assert launch_lib.launch(_config(), str(tmp_path / 'a'), watch=['wandb']) == 2
  assert sweep_lib.sweep(
      _config(), str(tmp_path / 'a'), [], [], watch=['wandb']) == 2
  assert not (tmp_path / 'a').exists()
  with workdir_lib.Workdir(str(tmp_path / 'b')) as folder:
    folder.watch(watching.DEFAULT, {})
    folder.cut_metrics(0)
    _write(folder, 1, 2)
    log = (tmp_path / 'b' / 'log.txt').read_text()
  assert log.count('warning') == log.count('needs the package tensorboardX') == 1
  assert not (tmp_path / 'b' / 'tensorboard').exists()


@pytest.mark.parametrize('watch', [['tensorbord'], ['wandb', 'wandb'], 'wandb'])
def test_a_wrong_name_is_refused(tmp_path, watch):
  with pytest.raises(ValueError, match='`watch` must'):
    watching.check(watch)
  assert launch_lib.launch(_config(), str(tmp_path / 'a'), watch=watch) == 2
  assert not (tmp_path / 'a').exists()


_WANDB = '''
"""Keeps what it is told as Weights & Biases does: rows by step, none twice."""
runs, broken = {}, False

class Run:
  def __init__(self, rows):
    self.rows, self.resumed = rows, bool(rows)
    self.step = max(rows, default=-1) + 1

  def log(self, values, step):
    if broken:
      raise RuntimeError('the network is down\\nfor long')
    assert step >= self.step, 'dropped with a warning'
    self.rows.setdefault(step, {}).update(values)
    self.step = step

  def finish(self):
    pass

def init(id, config, resume, **kwargs):
  assert resume == 'allow' and config['rule']
  return Run(runs.setdefault(id, {}))
'''


def test_weights_and_biases_get_every_step_once(tmp_path, monkeypatch):
  (tmp_path / 'wandb.py').write_text(_WANDB)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  run, config = tmp_path / 'run', {'rule': 'backprop'}
  with workdir_lib.Workdir(str(run)) as folder:
    folder.watch(['wandb'], config)
    assert 'wandb' not in sys.modules  # Until it is used.
    folder.cut_metrics(0)
    _write(folder, 3, 5, 9)
  with workdir_lib.Workdir(str(run)) as folder:
    folder.watch(['wandb'], config)
    folder.cut_metrics(5)
    import wandb
    ((identity, rows),) = wandb.runs.items()
    assert identity == (run / 'wandb-run.txt').read_text().strip()
    _write(folder, 5, 9, 12)  # Two that it has.
    assert {*rows} == {3, 5, 9, 12}
    assert rows[12] == {'train/epoch': 1, 'train/loss': 12 / 7,
                        'alignment_teaching/a/b': .5}
    monkeypatch.setattr(wandb, 'broken', True)
    _write(folder, 15, 20)
    log = (run / 'log.txt').read_text()
  assert log.count('`watch` of wandb failed (the network is down)') == 1
  del sys.modules['wandb']


_AIM = '''
"""Keeps what it is told as Aim does: one value for a name and a step."""
runs = {}

class MissingRunError(RuntimeError):
  pass

class Run:
  def __init__(self, run_hash=None, *, repo, **kwargs):
    if run_hash is not None and run_hash not in runs:
      raise MissingRunError('no such run')
    self.hash = run_hash or f'run{len(runs)}'
    self.repo, self.values = repo, runs.setdefault(self.hash, {})

  def __setitem__(self, key, value):
    assert key == 'config' and value == {'rule': 'backprop', 'units': '[]'}

  def track(self, value, name, step):
    self.values[name, step] = value

  def close(self):
    self.values = None
'''


def test_aim_has_every_step_once(tmp_path, monkeypatch):
  (tmp_path / 'aim.py').write_text(_AIM)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'aim', raising=False)
  monkeypatch.delenv('AIM_REPO', raising=False)
  run, config = tmp_path / 'run', {'rule': 'backprop', 'units': []}

  def write(first, *steps):
    with workdir_lib.Workdir(str(run)) as folder:
      folder.watch(['aim'], config)
      folder.cut_metrics(first)
      _write(folder, *steps)

  write(0, 3, 5, 9)
  write(5, 5, 9, 12)
  import aim
  (identity, values), = aim.runs.items()
  assert identity == (run / 'aim-run.txt').read_text().strip()
  assert [s for n, s in values if n == 'train/loss'] == [3, 5, 9, 12]
  assert values['alignment_teaching/a/b', 12] == .5
  aim.runs.clear()  # By somebody: all steps go to another run.
  write(12, 15)
  (_, values), = aim.runs.items()
  assert [s for n, s in values if n == 'train/loss'] == [3, 5, 9, 15]
  del sys.modules['aim']
