"""The launcher: what a run leaves, and what it withstands."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

from absl.testing import parameterized
import bpjax
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import launch as launch_lib
from bpjax.train.loop import optimizer
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
from bpjax.train.loop import step as step_lib
from experiments import config as flags_lib
from experiments import space
from experiments import sweep as sweep_lib
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import PIL.Image
import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_QUICKSTART = 'experiments/configs/quickstart.py'
# Reads of a damaged checkpoint that end late complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module', autouse=True)
def _one_device(tmp_path_factory):
  """Runs take one device of this process, and share what they compile."""
  cache = str(tmp_path_factory.mktemp('compiled'))
  settings = {
      'jax_compilation_cache_dir': cache,
      'jax_persistent_cache_min_compile_time_secs': 0.,
      'jax_persistent_cache_min_entry_size_bytes': -1}
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    for name, value in settings.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _folder(tmp_path, request):
  if request.instance is not None:
    request.instance.tmp = tmp_path


def _environment(devices=1):
  # The last flag wins; the others are those of this process, for equal bits.
  flags = (f'{os.environ.get("XLA_FLAGS", "")} '
           f'--xla_force_host_platform_device_count={devices}')
  return {**os.environ, 'XLA_FLAGS': flags}


def _config(**fields):
  """A run of 3 epochs of 22 steps on digits that takes well under a second."""
  config = config_lib.default()
  config.epochs = 3
  config.batch_size = 64
  config.eval_batch_size = 360
  config.model_args.widths = (16,)
  for field, value in fields.items():
    config[field] = value
  return config


def _everything():
  """A config in which all that can be forgotten by a checkpoint is in use."""
  config = _config(
      rule='kolen_pollack', optimizer='momentum', learning_rate=.05,
      schedule='cosine', warmup_epochs=.5, weight_decay=1e-4, clip_norm=5.,
      log_every=5, alignment_every=10, checkpoint_every=7, validation=100,
      feedback_optimizer='adam', feedback_learning_rate=1e-3)
  config.model_args.batch_norm = True
  config.model_args.dropout = .1
  return config


def _launch(config, path, expect=0):
  code = launch_lib.launch(config, str(path), quiet=True)
  assert code == expect, (path / 'log.txt').read_text()


def _summary(path):
  return json.loads((path / 'summary.json').read_text())


def _metrics(path, split=None):
  lines = (path / 'metrics.jsonl').read_text().splitlines()
  return [m for m in map(json.loads, lines) if split in (None, m['split'])]


def _ready(config, path):
  """The run of a config, made ready in a folder of its own."""
  with workdir_lib.Workdir(str(path)) as folder:
    return run_lib.setup(config, folder)


def _rows(run, count):
  """The first training examples."""
  return jax.tree.map(lambda x: jnp.asarray(x[:count]), run.dataset.train)


def _restore(like, path):
  """The step and the state of a run's newest checkpoint."""
  with checkpoint.Checkpoints(
      str(path / 'checkpoints'), 2, warn=pytest.fail) as checkpoints:
    return checkpoints.restore(like)


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def _interrupt_at(monkeypatch, step, number):
  """Sends this process a signal while the step is being reported."""
  advance = progress.Progress.advance
  sent = []

  def advance_and_send(self, steps):
    advance(self, steps)
    if self._step >= step and not sent:
      sent.append(signal.raise_signal(number))

  monkeypatch.setattr(progress.Progress, 'advance', advance_and_send)


@pytest.fixture(scope='module', name='reference')
def _reference(tmp_path_factory):
  """A run of `_everything` that nothing interrupted: folder, shapes, state."""
  path = tmp_path_factory.mktemp('reference') / 'run'
  _launch(_everything(), path)
  like = _ready(_everything(), path.parent / 'ready').like
  return path, like, _restore(like, path)


class RunFolderTest(parameterized.TestCase):

  def test_leaves_config_metrics_summary_and_log(self):
    config = _config(rule='feedback_alignment', alignment_every=30)
    _launch(config, self.tmp)
    held = json.loads((self.tmp / 'config.json').read_text())
    assert held == config_lib.to_json(config)
    lines = _metrics(self.tmp)
    assert [m['step'] for m in lines if m['split'] == 'train'] == [22, 44, 66]
    assert [m['epoch'] for m in lines if m['split'] == 'test'] == [1, 2, 3]
    aligned = _metrics(self.tmp, 'alignment')
    assert sorted({m['step'] for m in aligned}) == [0, 30, 60, 66]
    assert {m['unit'] for m in aligned} == {'Dense_0', 'Dense_1'}
    assert 'time' not in (self.tmp / 'metrics.jsonl').read_text()
    summary = _summary(self.tmp)
    last = _metrics(self.tmp, 'test')[-1]
    assert summary['test_accuracy'] == last['accuracy']
    assert summary['parameter_count'] == 64 * 16 + 16 + 16 * 10 + 10
    assert summary['feedback_count'] == 16 * 10
    assert summary['units'] == {
        'Dense_0': 'feedback_alignment', 'Dense_1': 'feedback_alignment'}
    assert summary['alignment']['Dense_1']['teaching'] == pytest.approx(1)
    assert summary['validation_accuracy'] is None
    assert summary['steps'] == 66 and summary['device_count'] == 1
    assert 0 < summary['median_step_time'] < summary['wall_time']
    assert summary['versions']['jax'] == jax.__version__
    assert 'finished' in (self.tmp / 'log.txt').read_text()

  def test_final_accuracies_are_those_of_the_final_parameters(self):
    config = _config(validation=101, eval_batch_size=100)
    _launch(config, self.tmp / 'run')
    like = _ready(config, self.tmp / 'ready').like
    _, state = _restore(like, self.tmp / 'run')
    data = data_lib.load('digits', validation=101)
    model = bpjax.models.get('mlp')(10, widths=(16,))
    for name in ('train', 'validation', 'test'):
      split = getattr(data, name)
      x = (split.images / 255. - data.mean) / data.std
      logits = model.apply({'params': state.params}, jnp.asarray(x, np.float32))
      correct = np.mean(np.argmax(logits, -1) == split.labels)
      loss = np.mean(optax.softmax_cross_entropy_with_integer_labels(
          logits, split.labels))
      summary = _summary(self.tmp / 'run')
      assert summary[f'{name}_accuracy'] == pytest.approx(correct)
      assert summary[f'{name}_loss'] == pytest.approx(
          float(loss), rel=1e-5)

  def test_a_finished_run_is_not_trained_again(self):
    _launch(_config(epochs=1), self.tmp)
    before = os.stat(self.tmp / 'summary.json').st_mtime_ns
    _launch(_config(epochs=1), self.tmp)
    assert os.stat(self.tmp / 'summary.json').st_mtime_ns == before
    assert 'nothing to do' in (self.tmp / 'log.txt').read_text()

  def test_another_config_is_refused_naming_the_first_difference(self):
    _launch(_config(epochs=1), self.tmp)
    _launch(_config(epochs=1, learning_rate=.1, seed=3), self.tmp, expect=2)
    log = (self.tmp / 'log.txt').read_text()
    assert '`learning_rate` is 0.001 there and 0.1 here' in log

  def test_a_field_that_is_newer_than_the_run_was_at_its_default(self):
    _launch(_config(epochs=1), self.tmp)
    file = self.tmp / 'config.json'
    held = json.loads(file.read_text())
    del held['bottleneck']
    file.write_text(json.dumps(held))
    _launch(_config(epochs=1), self.tmp)
    assert 'nothing to do' in (self.tmp / 'log.txt').read_text()
    _launch(_config(epochs=1, bottleneck=(('Dense_0', 3),)), self.tmp, expect=2)

  def test_a_refused_config_does_not_claim_the_folder(self):
    _launch(_config(epochs=1, rule='backporp'), self.tmp, expect=2)
    _launch(_config(epochs=1), self.tmp)

  def test_a_folder_in_use_is_refused(self):
    holder = subprocess.Popen(
        [sys.executable, '-c',
         'import sys; from bpjax.train.folder import workdir\n'
         f'w = workdir.Workdir({str(self.tmp)!r}); print("held", flush=True)\n'
         'sys.stdin.read()'],
        cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    with pytest.raises(ValueError, match='in use by another process'):
      workdir_lib.Workdir(str(self.tmp))
    holder.communicate()
    with workdir_lib.Workdir(str(self.tmp)):
      pass

  def test_squared_error_learns(self):
    _launch(_config(loss='squared_error', learning_rate=1e-2), self.tmp)
    losses = [m['loss'] for m in _metrics(self.tmp, 'train')]
    assert losses[-1] < .6 * losses[0]
    assert _summary(self.tmp)['test_accuracy'] > .5

  def test_a_sum_in_one_layer_and_a_mean_in_the_other(self):
    moved = {}
    pairs = ((), (('Dense_0', 'sum'), ('*', 'mean')), (('*', 'sum'),))
    for i, by_path in enumerate(pairs):
      run = _ready(_config(
          optimizer='sgd', reduction_by_path=by_path), self.tmp / str(i))
      before = jax.jit(run.learner.init)()
      after, _ = jax.jit(run.learner.step)(before, _rows(run, 64))
      for unit in ('Dense_0', 'Dense_1'):
        moved.setdefault(unit, []).append(
            after.params[unit]['kernel'] - before.params[unit]['kernel'])
    for unit, factors in (('Dense_0', (64, 64)), ('Dense_1', (1, 64))):
      for change, factor in zip(moved[unit][1:], factors, strict=True):
        np.testing.assert_allclose(
            change, factor * moved[unit][0], rtol=1e-3, atol=1e-6)

  def test_only_some_neurons_learn(self):
    run = _ready(_config(
        rule='feedback_alignment', bottleneck=(('Dense_0', 3),)), self.tmp)
    before = jax.jit(run.learner.init)()
    after, _ = jax.jit(run.learner.step)(before, _rows(run, 64))
    change = after.params['Dense_0']['bias'] - before.params['Dense_0']['bias']
    assert np.count_nonzero(change) == 3

  def test_where_alignment_is_measured_and_how_pixels_are_scaled(self):
    for split in ('train', 'validation', 'test'):
      run = _ready(_config(
          validation=100, alignment_every=22, alignment_split=split,
          pixel_mean=(.5,), pixel_std=(2.,)), self.tmp / split)
      images, labels = run.alignment_batch
      own = getattr(run.dataset, split)
      assert np.array_equal(labels, own.labels[:64]) == (split != 'train')
      assert images.shape == (64, 8, 8, 1)
    np.testing.assert_array_equal(run.learner.task.mean, [.5])
    np.testing.assert_array_equal(run.learner.task.std, [2.])

  def test_noise_on_inputs_is_a_function_of_seed_and_step(self):
    runs = {
        noise: _ready(_config(input_noise=noise), self.tmp / str(noise))
        for noise in (0., .5)}
    run = runs[0.]
    batch = images, labels = _rows(run, 64)
    before = jax.jit(run.learner.init)()
    _assert_same(before, jax.jit(runs[.5].learner.init)())
    plain, noisy = (jax.jit(r.learner.step) for r in runs.values())
    one, loss = noisy(before, batch)
    same, _ = noisy(before, batch)
    _assert_same(one, same)
    _, later = noisy(before._replace(step=jnp.int32(1)), batch)
    assert len({float(loss), float(later),
                float(plain(before, batch)[1])}) == 3
    # The loss of the first step, from the noise's own definition.
    *_, key = jax.random.split(jax.random.key(0), 5)
    noise = jax.random.normal(jax.random.fold_in(key, 0), images.shape)
    x = data_lib.normalise(images, run.dataset.mean, run.dataset.std)
    output = run.learner.net.apply({'params': before.params}, x + .5 * noise)
    np.testing.assert_allclose(
        loss, run.learner.loss(output, labels).mean(), rtol=1e-5)
    mask = np.ones(64, bool)
    for a, b in zip(*(
        r.learner.evaluate(before.params, {}, batch, mask)
        for r in runs.values()), strict=True):
      assert a == b

  def test_keys_of_a_run_are_those_that_they_were(self):
    # Results of before there was a key for noise on inputs stay reproducible.
    four, five = (jax.random.split(jax.random.key(3), n) for n in (4, 5))
    np.testing.assert_array_equal(
        jax.random.key_data(five[:4]), jax.random.key_data(four))

  def test_whitened_digits_from_start_to_end(self):
    config = _config(
        preprocessing='gcn_zca', validation=100, alignment_every=22,
        learning_rate=1e-2)
    _launch(config, self.tmp / 'run')
    summary = _summary(self.tmp / 'run')
    assert summary['data_source'] == 'gcn_zca of digits from scikit-learn'
    assert summary['test_accuracy'] > .8
    run = _ready(config, self.tmp / 'ready')
    assert run.dataset.test.images.dtype == np.float16
    _, state = _restore(run.like, self.tmp / 'run')
    x = run.dataset.test.images.astype(np.float32)
    logits = run.learner.net.apply({'params': state.params}, jnp.asarray(x))
    assert summary['test_accuracy'] == pytest.approx(
        np.mean(np.argmax(logits, -1) == run.dataset.test.labels))

  def test_rules_by_path(self):
    run = _ready(_config(
        rule='feedback_alignment',
        rule_by_path=(('Dense_1', 'sign_symmetry', {'variant': 'uSF'}),)),
        self.tmp)
    assert run.units == {
        'Dense_0': 'feedback_alignment', 'Dense_1': 'sign_symmetry'}

  def test_perturbative_layers_keep_their_noise(self):
    config = _config(model='ororbia_cnn', epochs=1)
    config.model_args = {'channels': (3, 4), 'conv': 'perturbative'}
    _launch(config, self.tmp / 'run')
    run = _ready(config, self.tmp / 'ready')
    _, state = _restore(run.like, self.tmp / 'run')
    _assert_same(state.model_state, run.programs['init']().model_state)
    assert state.model_state['perturbation']

  def test_particles_are_kept_by_example(self):
    config = _config(
        rule='equilibrium_propagation', loss='squared_error', particles=True,
        epochs=2, optimizer='sgd', learning_rate=.1, pixel_mean=(0.,),
        pixel_std=(1.,))
    config.model_args.activation = 'identity'
    config.rule_args.update({'free_steps': 2, 'readout': 'clip'})
    _launch(config, self.tmp / 'run')
    run = _ready(config, self.tmp / 'ready')
    _, state = _restore(run.like, self.tmp / 'run')
    rows = state.particles['Dense_0']['call_0']
    assert rows.shape == (1437, 16)
    seen = np.any(np.asarray(rows) != 0, axis=1)
    assert 1300 < seen.sum() <= 1437  # But for states that end at a bound of 0.
    # Each example's free phase began where its last one had ended.
    before = run.programs['init']()
    data, _ = run.feed.fetch(0, 0, 1)
    index = np.asarray(data['order'][0])
    twice = before
    for _ in range(2):
      twice, _ = jax.jit(run.learner.step)(
          twice, jax.tree.map(lambda x: x[index], data['rows']),
          jnp.asarray(index))
    assert not np.any(jax.tree.leaves(before.particles)[0])
    moved = np.flatnonzero(np.any(
        np.asarray(jax.tree.leaves(twice.particles)[0]) != 0, axis=1))
    assert set(moved) <= set(index)
    assert len(moved) > .9 * len(index)  # Some states end at 0, a bound.

  def test_sigmoid_cross_entropy_learns(self):
    _launch(_config(loss='sigmoid_cross_entropy', learning_rate=1e-2), self.tmp)
    assert _summary(self.tmp)['test_accuracy'] > .5


class ResumeTest(parameterized.TestCase):

  @pytest.fixture(autouse=True)
  def _setup(self, monkeypatch, reference):
    self.monkeypatch = monkeypatch
    self.reference, self.like, self.state = reference

  def _assert_as_never_interrupted(self, path):
    for file in ('config.json', 'metrics.jsonl'):
      assert (path / file).read_bytes() == (self.reference / file).read_bytes()
    a, b = _summary(path), _summary(self.reference)
    for timing in ('median_step_time', 'wall_time'):
      del a[timing], b[timing]
    assert a == b
    _assert_same(_restore(self.like, path), self.state)

  @parameterized.named_parameters(
      ('sigterm', signal.SIGTERM, 0), ('sigint', signal.SIGINT, 130))
  def test_a_signal_saves_and_the_same_command_goes_on(self, number, code):
    # Step 25 is neither an epoch's end nor a multiple of checkpoint_every.
    _interrupt_at(self.monkeypatch, 25, number)
    path = self.tmp / 'run'
    _launch(_everything(), path, expect=code)
    assert not (path / 'summary.json').exists()
    assert '25' in os.listdir(path / 'checkpoints')
    _launch(_everything(), path)
    self._assert_as_never_interrupted(path)

  @parameterized.named_parameters(
      ('truncated', lambda file: file.write_bytes(file.read_bytes()[:99])),
      ('missing', lambda file: file.unlink()))
  def test_a_damaged_checkpoint_is_named_and_the_one_before_used(self, damage):
    _interrupt_at(self.monkeypatch, 25, signal.SIGTERM)
    path = self.tmp / 'run'
    _launch(_everything(), path)
    newest = path / 'checkpoints' / '25'
    for file in newest.rglob('d/*'):
      damage(file)
    _launch(_everything(), path)
    log = (path / 'log.txt').read_text()
    assert f'warning: checkpoint {newest} is damaged' in log
    assert 'going on from step 21 of 60' in log
    self._assert_as_never_interrupted(path)

  def test_without_a_usable_checkpoint_it_is_refused(self):
    _interrupt_at(self.monkeypatch, 25, signal.SIGTERM)
    _launch(_everything(), self.tmp)
    for manifest in (self.tmp / 'checkpoints').glob('*/default/manifest.ocdbt'):
      manifest.unlink()
    _launch(_everything(), self.tmp, expect=2)
    assert 'train from the start' in (self.tmp / 'log.txt').read_text()

  def test_killed_and_terminated_processes_go_on(self):
    """kill -9 twice and SIGTERM once, from outside, then to the end."""
    path = self.tmp / 'run'
    config = self.tmp / 'config.py'
    config.write_text(
        'import json, ml_collections\n'
        'from bpjax.train import config as config_lib\n'
        'def get_config():\n'
        '  config = config_lib.default()\n'
        f'  values = {config_lib.to_json(_everything())!r}\n'
        '  for k, v in values.items():\n'
        '    config[k] = tuple(v) if isinstance(v, list) else v\n'
        '  return config\n')
    # Slow enough that a signal from outside meets it in the middle.
    slow = (
        'import sys, time\n'
        'from experiments import main; from bpjax.train.loop import progress\n'
        'from absl import app\n'
        'advance = progress.Progress.advance\n'
        'def wait(self, steps):\n'
        '  time.sleep(.05); advance(self, steps)\n'
        'progress.Progress.advance = wait\n'
        'app.run(main.main, flags_parser=main.parse)\n')
    command = [
        sys.executable, '-c', slow, f'--config={config}', f'--workdir={path}']
    total = len(_metrics(self.reference))
    for part, number, code in (
        (.2, signal.SIGKILL, -9), (.4, signal.SIGTERM, 0),
        (.6, signal.SIGKILL, -9), (1., None, 0)):
      process = subprocess.Popen(
          command, cwd=_ROOT, env=_environment(), stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE)
      while number and process.poll() is None:
        file = path / 'metrics.jsonl'
        if file.exists() and file.read_bytes().count(b'\n') >= part * total:
          process.send_signal(number)
          break
        time.sleep(.02)
      _, errors = process.communicate(timeout=120)
      assert process.returncode == code, errors.decode()
    assert 'going on from step' in (path / 'log.txt').read_text()
    self._assert_as_never_interrupted(path)

  @parameterized.named_parameters(
      ('calls_of_4', {'steps_per_call': 4}),
      ('checkpoints_elsewhere', {'checkpoint_every': 3}),
      ('no_checkpoints_within', {'checkpoint_every': 1000}))
  def test_how_steps_are_cut_into_calls_changes_no_bit(self, fields):
    config = _everything()
    config.update(fields)
    _launch(config, self.tmp / 'run')
    assert _metrics(self.tmp / 'run') == _metrics(self.reference)
    _assert_same(_restore(self.like, self.tmp / 'run'), self.state)

  def test_a_stream_goes_on_where_it_was(self):
    config = _config(epochs=2)
    self.monkeypatch.setattr(data_lib, 'load', lambda *a, **k: _stream())
    _launch(config, self.tmp / 'whole')
    _interrupt_at(self.monkeypatch, 14, signal.SIGTERM)
    _launch(config, self.tmp / 'cut')
    _launch(config, self.tmp / 'cut')
    whole, cut = (self.tmp / 'whole', self.tmp / 'cut')
    assert 'going on from step 14' in (cut / 'log.txt').read_text()
    assert _metrics(whole) == _metrics(cut)
    like = _ready(config, self.tmp / 'ready').like
    _assert_same(_restore(like, whole), _restore(like, cut))


def _stream():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (640, 8, 8), np.uint8)
  examples = [
      (PIL.Image.fromarray(image), int(i % 10))
      for i, image in enumerate(images)]
  stream = data_lib.ImageStream(
      examples, num_classes=10, image_size=8, channels=1, num_threads=2)
  return data_lib.Dataset(
      'fake', 10, (8, 8, 1), stream, None, stream.select(np.arange(99)),
      np.array([.5], np.float32), np.array([.3], np.float32), 'a stream')


class NonFiniteTest(parameterized.TestCase):

  def test_a_non_finite_loss_stops_with_step_and_rule(self):
    config = _config(
        optimizer='sgd', learning_rate=1e30, checkpoint_every=1)
    _launch(config, self.tmp / 'run', expect=3)
    log = (self.tmp / 'run' / 'log.txt').read_text()
    assert 'the loss of rule `backprop` is' in log
    assert not (self.tmp / 'run' / 'summary.json').exists()
    like = _ready(config, self.tmp / 'ready').like
    step, state = _restore(like, self.tmp / 'run')
    assert f'at step {step + 1}' in log or f'after step {step + 1}' in log
    assert step_lib.is_finite(state)
    _launch(config, self.tmp / 'run', expect=3)

  def test_weights_that_are_not_finite_are_not_saved(self):
    # The loss is finite at step 1, the weights after it are not.
    config = _config(
        optimizer='sgd', learning_rate=1e300, checkpoint_every=1)
    _launch(config, self.tmp, expect=3)
    assert 'not finite after step 1' in (self.tmp / 'log.txt').read_text()
    assert not [f for f in os.listdir(self.tmp / 'checkpoints') if f.isdigit()]


class RefusedTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('rule', {'rule': 'backporp'}, 'did you mean `backprop`'),
      ('model', {'model': 'mpl'}, 'did you mean `mlp`'),
      ('dataset', {'dataset': 'digit'}, 'digits'),
      ('field', {'lerning_rate': '1'}, 'did you mean `learning_rate`'),
      ('type', {'epochs': 'abc'}, 'epochs=abc'),
      ('nested', {'rule.scale': '1'}, 'fields of their own'),
      ('deep', {'rule_args.a.b': '1'}, 'one level deep'),
      ('epochs', {'epochs': '0'}, '`epochs` must be'),
      ('rate', {'learning_rate': '-1'}, '`learning_rate` must be'),
      ('no_rate', {'learning_rate': '0'}, '`learning_rate` must be a number of at least'),
      ('optimizer', {'optimizer': 'adm'}, 'did you mean `adam`'),
      ('unused', {'feedback_learning_rate': '1'}, '`feedback_optimizer`'),
      ('rule_arg', {'rule': 'feedback_alignment', 'rule_args.scal': '1'},
       'did you mean `scale`'),
      ('rule_arg_type', {'rule': 'feedback_alignment', 'rule_args.scale': 'a'},
       'of the kind of its default, 1.0'),
      ('model_arg', {'model_args.width': '3'}, 'did you mean `widths`'),
      ('model_value', {'model_args.activation': 'relo'}, '`relu`'),
      ('large_batch', {'batch_size': '2000'}, 'at most the 1437'),
      ('validation', {'validation': '2000'}, '`validation`'),
      ('labels', {'model_args.num_classes': '5'}, 'below the 5 outputs'),
      ('mesh', {'mesh.model': '3'}, '`mesh` must use all'),
      ('sharding', {'sharding': "(('*/kernel', ()),)"},
       'no pattern matches `params/Dense_0/bias`'),
      ('spec', {'sharding': "(('*', (None, None, None)),)"}, 'fit its shape'),
      ('axis', {'sharding': "(('*', ('modle',)),)"}, "axis 'modle'"),
      ('alignment_split', {'alignment_split': 'validation'},
       'holds no whole batch of 64'),
      ('pixel_mean', {'pixel_mean': '(.5, .5)'}, 'one for each of the 1'),
      ('pixel_std', {'pixel_std': '(0.,)'}, '`pixel_std[0]` must be a positive number'),
      ('bottleneck', {'bottleneck': "(('Dense_0', 99),)"}, 'at most its 16'),
      ('particles', {'particles': 'True'}, 'needs a rule that settles'),
      ('turns', {'feedback_schedule': 'epochs', 'epochs': '3'},
       '`epochs` must be even'),
      ('schedule', {'schedule': 'polynom'}, 'did you mean `polynomial`'),
      ('power', {'schedule': 'polynomial', 'schedule_power': '0'},
       '`schedule_power` must be a positive number'),
      ('final', {'schedule': 'cosine', 'final_learning_rate': '.1'},
       '`final_learning_rate` must be at most `learning_rate`, 0.001'),
      ('final_constant', {'final_learning_rate': '1e-5'},
       '0 under a constant `schedule`'),
      ('preprocessing', {'preprocessing': 'zca'}, 'did you mean `gcn_zca`'),
      ('pixels', {'preprocessing': 'gcn', 'pixel_std': '(1.,)'},
       '`pixel_mean` and `pixel_std` must be empty'),
      ('epsilon', {'zca_epsilon': '0'}, '`zca_epsilon` must be a positive number'),
      ('noise', {'input_noise': '-1'}, '`input_noise` must be'),
      ('by_path', {'rule_by_path': "(('Dense_0', 'backprop'),)"},
       '`rule_by_path` must be a list of triples'),
      ('by_path_rule', {'rule_by_path': "(('Dense_0', 'backporp', {}),)"},
       'did you mean `backprop`'),
      ('by_path_arg', {
          'rule_by_path': "(('Dense_0', 'feedback_alignment', {'scal': 1}),)"},
       "`rule_by_path['Dense_0'].scal` is no argument"),
      ('by_path_pattern', {'rule_by_path': "(('Dense_9', 'backprop', {}),)"},
       '`Dense_9` of `by_path` matches no unit'),
      ('variant', {'rule': 'LG-FGA'}, 'did you mean `LG-FG-A`'),
      ('variant_arg', {'rule': 'BP', 'rule_args.loss': 'contrastive'},
       '`rule_args.loss` must be left out'),
      ('variant_by_path', {
          'rule': 'BP', 'rule_by_path': "(('Dense_0', 'backprop', {}),)"},
       '`rule_by_path` must be empty with a variant'),
      ('units', {'units': "('Dense_*', 'dense')"},
       "`units` has the glob 'dense', which fits no module"),
      ('units_text', {'units': '(1,)'}, 'a list of path patterns'),
      ('augment', {'augment': 'crop'}, 'did you mean `crop_flip`'),
      ('augment_arg', {'augment': 'crop_flip', 'augment_args.area': '.3'},
       '`augment_args.area` is no argument'),
      ('augment_value', {
          'rule': 'LG-BP', 'augment': 'contrastive', 'augment_args.area': '2.'},
       '`area` must be'),
      ('augment_padding',
       {'augment': 'crop_flip', 'augment_args.padding': '.5'}, 'padding` must be whole'),
      ('augment_args', {'augment_args.padding': '2'}, '`augment_args` needs'),
      ('augment_rule', {'augment': 'contrastive'}, 'with a rule that learns'),
      ('augment_last', {'augment': 'contrastive', 'rule': 'FA'},
       '`last` must be the path of the last block'),
      ('augment_gcn', {'augment': 'crop_flip', 'preprocessing': 'gcn'},
       '`augment` works on images in'),
      ('augment_particles', {'augment': 'contrastive', 'particles': 'True'},
       'one state of each image'),
      ('temperature', {'contrastive_temperature': '0'}, 'must be a positive'),
      ('l2', {'l2': '-1'}, '`l2` must be'),
      ('optimizer_by_path', {'optimizer_by_path': "(('a', 'adm', .1),)"},
       '`optimizer_by_path` must be a list of triples'),
      ('optimizer_pattern', {'optimizer_by_path': "(('a', 'adam', .1),)"},
       "`optimizer_by_path` has the pattern 'a'"),
      ('rule_for_model',
       {'rule': 'feedback_alignment', 'model_args.activation': 'sign'}, ''),
  )
  def test_with_one_sentence(self, values, sentence):
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv('TFDS_DATA_DIR', str(self.tmp / 'none'))
      patch.setenv('BPJAX_CACHE_DIR', str(self.tmp / 'none'))
      with pytest.raises(ValueError) as error:
        config = flags_lib.override(_config(), values)
        config_lib.to_json(config)
        _ready(config, self.tmp)
    assert sentence in str(error.value)
    assert '\n' not in str(error.value)

  @parameterized.named_parameters(('a_file', 'file'), ('under', 'file/run'))
  def test_a_folder_that_cannot_be_made(self, path):
    (self.tmp / 'file').write_text('')
    assert launch_lib.launch(_config(), str(self.tmp / path)) == 2

  @parameterized.named_parameters(
      ('field', ['--config.lerning_rate=1'], '`learning_rate`'),
      ('no_config', ['--config=none.py'], 'there is none at'),
      ('flag', ['--wrokdir=x'], 'wrokdir'))
  def test_on_the_command_line(self, arguments, sentence):
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.main', f'--config={_QUICKSTART}',
         f'--workdir={self.tmp}', *arguments],
        cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr and 'Traceback' not in done.stderr
    assert done.stderr.count('\n') == 1

  def test_new_keys_from_the_command_line(self):
    config = flags_lib.override(_config(), {
        'rule_args.scale': '.5', 'model_args.widths': '(8, 4)',
        'model_args.activation': 'tanh', 'mesh.model': '1'})
    assert config.rule_args.scale == .5
    assert config.model_args.widths == (8, 4)
    assert config.model_args.activation == 'tanh'
    assert config.mesh.to_dict() == {'data': -1, 'model': 1}


class OptimizerTest(parameterized.TestCase):

  def _updates(self, steps=3, **fields):
    """Updates of params {'w': 2} and feedback {'b': 2} for gradients of 1."""
    tx = optimizer.build(_config(**fields), steps_per_epoch=1)
    tree = {'params': {'w': jnp.float32(2)}, 'feedback': {'b': jnp.float32(2)}}
    grads = jax.tree.map(jnp.ones_like, tree)
    state, updates = tx.init(tree), []
    for _ in range(steps):
      update, state = tx.update(grads, state, tree)
      updates.append(
          (float(update['params']['w']), float(update['feedback']['b'])))
    return np.array(updates)

  def test_decay_is_per_step_outside_adamw(self):
    np.testing.assert_allclose(
        self._updates(optimizer='sgd', learning_rate=.1, weight_decay=.01),
        -.1 - .01 * 2, rtol=1e-6)
    np.testing.assert_allclose(
        self._updates(1, optimizer='adamw', learning_rate=.1, weight_decay=.01),
        -.1 - .1 * .01 * 2, rtol=1e-5)

  def test_clipping_is_joint(self):
    np.testing.assert_allclose(
        self._updates(optimizer='sgd', learning_rate=1., clip_norm=1.),
        -np.sqrt(.5), rtol=1e-6)

  def _of_a_layer(self, **fields):
    """Two updates of a kernel of [3, 4], a bias of 2, and the readout's."""
    tx = optimizer.build(_config(**fields), steps_per_epoch=1)
    layer = lambda: {
        'kernel': jnp.array([[3., 4.]]), 'bias': jnp.array([2.])}
    tree = {'params': {'a': layer(), 'readout': layer()}, 'feedback': {}}
    grads = jax.tree.map(jnp.ones_like, tree)
    state, updates = tx.init(tree), []
    for _ in range(2):
      update, state = tx.update(grads, state, tree)
      updates.append(update['params'])
    return updates

  def test_l2_is_of_kernels_and_before_the_optimizer(self):
    first, second = self._of_a_layer(
        optimizer='momentum', momentum=.5, learning_rate=.1, l2=.01)
    kernel = -.1 * (1 + .01 * np.array([[3., 4.]]))
    np.testing.assert_allclose(first['a']['kernel'], kernel, rtol=1e-6)
    np.testing.assert_allclose(second['a']['kernel'], 1.5 * kernel, rtol=1e-6)
    np.testing.assert_allclose(first['a']['bias'], -.1, rtol=1e-6)

  def test_lars_scales_kernels_to_their_norm(self):
    first, second = self._of_a_layer(
        optimizer='lars', momentum=.5, learning_rate=2., l2=.1)
    gradient = 1 + .1 * np.array([[3., 4.]])
    # The paper's coefficient, .001, times the norm of the kernel, 5.
    kernel = -2 * .001 * 5 * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(first['a']['kernel'], kernel, rtol=1e-5)
    np.testing.assert_allclose(second['a']['kernel'], 1.5 * kernel, rtol=1e-5)
    np.testing.assert_allclose(first['a']['bias'], -2, rtol=1e-6)

  def test_an_optimizer_by_path(self):
    first, second = self._of_a_layer(
        optimizer='lars', momentum=.5, learning_rate=1., schedule='linear',
        optimizer_by_path=(('readout', 'momentum', .1),), epochs=2)
    np.testing.assert_allclose(first['a']['bias'], -1, rtol=1e-6)
    np.testing.assert_allclose(first['readout']['kernel'], -.1, rtol=1e-6)
    # Momentum of gradients, times a rate that has fallen by half.
    np.testing.assert_allclose(second['readout']['bias'], -.075, rtol=1e-6)

  def test_feedback_has_its_own_optimizer(self):
    np.testing.assert_allclose(
        self._updates(
            2, optimizer='sgd', learning_rate=.1, feedback_optimizer='momentum',
            feedback_learning_rate=1., momentum=.5),
        [[-.1, -1], [-.1, -1.5]], rtol=1e-6)

  def test_feedback_and_parameters_by_turns(self):
    # An epoch is one step here; momentum shows that the one that waits stops.
    np.testing.assert_allclose(
        self._updates(
            4, optimizer='momentum', momentum=.5, learning_rate=1., epochs=4,
            schedule='linear', feedback_schedule='epochs'),
        [[0, -1], [-1, 0], [0, -.75], [-.75, 0]], rtol=1e-6)

  def test_schedule(self):
    fields = dict(optimizer='sgd', learning_rate=1., epochs=6, warmup_epochs=2.)
    for schedule, after in (
        ('constant', [1, 1, 1, 1]), ('linear', [1, .75, .5, .25]),
        ('cosine', .5 * (1 + np.cos(np.pi * np.arange(4) / 4)))):
      np.testing.assert_allclose(
          -self._updates(6, schedule=schedule, **fields)[:, 0],
          [0, .5, *after], rtol=1e-5)

  @parameterized.parameters(1., 2., .5)
  def test_polynomial_schedule(self, power):
    rates = -self._updates(
        8, optimizer='sgd', learning_rate=1e-2, epochs=6, warmup_epochs=2.,
        schedule='polynomial', schedule_power=power,
        final_learning_rate=1e-5)[:, 0]
    falling = 1e-5 + (1e-2 - 1e-5) * (1 - np.arange(4) / 4)**power
    np.testing.assert_allclose(
        rates, [0, .5e-2, *falling, 1e-5, 1e-5], rtol=1e-4)

  def test_where_schedules_end(self):
    fields = dict(
        optimizer='sgd', learning_rate=1., final_learning_rate=.2, epochs=4)
    falls = {
        'linear': 1 - .8 * np.arange(5) / 4,
        'cosine': .2 + .4 * (1 + np.cos(np.pi * np.arange(5) / 4))}
    for schedule, rates in falls.items():
      # Feedback with a rate of its own falls by the same factor.
      np.testing.assert_allclose(
          -self._updates(
              5, schedule=schedule, feedback_optimizer='sgd',
              feedback_learning_rate=10., **fields),
          np.stack([rates, 10 * rates], 1), rtol=1e-5)


class FeedbackTest(parameterized.TestCase):

  @parameterized.parameters('feedback_alignment', 'direct_feedback_alignment')
  def test_fixed_feedback_keeps_every_bit_under_adamw(self, rule):
    config = _config(
        rule=rule, optimizer='adamw', weight_decay=.1, clip_norm=1., epochs=10)
    _launch(config, self.tmp / 'run')
    run = _ready(config, self.tmp / 'ready')
    step, state = _restore(run.like, self.tmp / 'run')
    fresh = run.programs['init']()
    assert step >= 200
    _assert_same(state.feedback, fresh.feedback)
    with pytest.raises(AssertionError):
      _assert_same(state.params, fresh.params)
    # Two moments per parameter and a count: nothing for the feedback.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))

  def test_kolen_pollack_law(self):
    decay = 1e-2
    config = _config(
        rule='kolen_pollack', optimizer='momentum', learning_rate=1e-2,
        weight_decay=decay, clip_norm=.5, epochs=10)
    _launch(config, self.tmp / 'run')
    run = _ready(config, self.tmp / 'ready')
    step, state = _restore(run.like, self.tmp / 'run')
    fresh = run.programs['init']()
    between = lambda s: np.asarray(
        s.params['Dense_1']['kernel'] - s.feedback['Dense_1']['kernel'],
        np.float64)
    np.testing.assert_allclose(
        between(state), (1 - decay)**step * between(fresh), atol=1e-6)


class CheckpointsTest(parameterized.TestCase):

  def _state(self):
    mesh = jax.make_mesh(
        (1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    state = {
        'x': jax.random.normal(jax.random.key(0), (300, 300)), 'n': None,
        'b': jnp.array([True]), 'h': jnp.ones(3, jnp.bfloat16)}
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state)
    return state, like

  def test_donated_arrays_are_saved_as_they_were(self):
    state, like = self._state()
    first = np.array(state['x'])
    grow = jax.jit(lambda s: {**s, 'x': s['x'] + 1}, donate_argnums=0)
    with checkpoint.Checkpoints(
        str(self.tmp), keep=2, warn=pytest.fail) as checkpoints:
      assert checkpoints.restore(like) is None
      for step in range(5):
        checkpoints.save(step, state)
        state = grow(state)
      checkpoints.wait()
      step, restored = checkpoints.restore(like)
    assert step == 4 and sorted(os.listdir(self.tmp)) == ['3', '4']
    np.testing.assert_allclose(restored['x'], first + 4, rtol=1e-6)
    assert restored['h'].dtype == jnp.bfloat16 and restored['n'] is None

  def test_a_flipped_bit_anywhere_is_noticed_or_does_no_harm(self):
    state, like = self._state()
    with checkpoint.Checkpoints(
        str(self.tmp), keep=2, warn=pytest.fail) as checkpoints:
      checkpoints.save(7, state)
    noticed = 0
    for file in [f for f in self.tmp.rglob('*') if f.is_file()]:
      whole = file.read_bytes()
      middle = len(whole) // 2
      file.write_bytes(
          whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1:])
      warnings = []
      with checkpoint.Checkpoints(
          str(self.tmp), keep=2, warn=warnings.append) as checkpoints:
        try:
          _assert_same(checkpoints.restore(like)[1], state)
        except ValueError as error:
          assert 'none that this program can use' in str(error)
          assert str(self.tmp / '7') in warnings[0]
          noticed += 1
      file.write_bytes(whole)
    assert noticed >= 3


class AugmentTest(parameterized.TestCase):

  def _two_views(self):
    config = _config(
        rule='BP', rule_args={'last': 'block_0'}, model='local_mixer',
        model_args={'size': 's/1/1', 'channels': 4}, units=('block_*/*',),
        augment='contrastive', contrastive_dim=3, epochs=1, batch_size=64,
        log_every=5, frozen=('readout',))
    return config

  def test_views_are_of_seed_and_step_and_count_once(self):
    _launch(self._two_views(), self.tmp / 'one')
    like = _ready(self._two_views(), self.tmp / 'ready').like
    step, state = _restore(like, self.tmp / 'one')
    assert step == 22
    # The readout keeps its zeros, which say 0 to everything.
    labels = data_lib.load('digits').train.labels
    found = [m['accuracy'] for m in _metrics(self.tmp / 'one', 'train')][:4]
    assert np.mean(found) == pytest.approx(np.mean(labels == 0), abs=.02)
    with pytest.MonkeyPatch.context() as patch:
      _interrupt_at(patch, 5, signal.SIGTERM)
      _launch(self._two_views(), self.tmp / 'cut')
    assert not (self.tmp / 'cut' / 'summary.json').exists()
    _launch(self._two_views(), self.tmp / 'cut')
    _assert_same(_restore(like, self.tmp / 'cut'), (step, state))
    # Two devices: the views of an image lie on both, and so do its negatives.
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, 'device_count', lambda: 2)
      _launch(self._two_views(), self.tmp / 'two')
    _, two = _restore(like, self.tmp / 'two')
    for a, b in zip(
        jax.tree.leaves(two.params), jax.tree.leaves(state.params)):
      np.testing.assert_allclose(a, b, atol=1e-4)

  def test_inputs_are_augmented_before_they_are_scaled(self):
    config = _config(
        augment='crop_flip', augment_args={'padding': 0}, epochs=1,
        pixel_mean=(.5,), pixel_std=(.25,))
    learner = _ready(config, self.tmp / 'ready').learner
    images = np.arange(64 * 64, dtype=np.int32).reshape(64, 8, 8, 1) % 251
    batch = jax.jit(learner._augmented)(
        jax.random.key(0),
        data_lib.Split(images.astype(np.uint8), np.arange(64)))
    x, labels = learner.task.inputs(batch), batch.labels
    np.testing.assert_array_equal(labels, np.arange(64))
    scaled = (images / 255 - .5) / .25
    flipped = [
        np.allclose(a, b[:, ::-1], atol=1e-5) for a, b in zip(x, scaled)]
    as_it_was = [np.allclose(a, b, atol=1e-5) for a, b in zip(x, scaled)]
    assert all(a or b for a, b in zip(flipped, as_it_was))
    assert any(flipped) and any(as_it_was)
    keys = []

    def note(key, images):
      del images
      keys.append(jax.random.key_data(key).tolist())
      raise LookupError  # Enough seen.

    noting = dataclasses.replace(learner, augment=note)
    for step in (3, 4, 3):
      with pytest.raises(LookupError):
        noting.step(
            types.SimpleNamespace(step=jnp.int32(step)),
            data_lib.Split(images, np.arange(64)))
    assert keys[0] == keys[2] != keys[1]


class DevicesTest(parameterized.TestCase):

  def test_8_devices_give_what_one_gives(self):
    _launch(_config(rule='kolen_pollack', epochs=1), self.tmp / 'one')
    program = f'''
import json
from bpjax.train import config as config_lib
from experiments import config as flags_lib
from bpjax.train.loop import launch
from bpjax.train.loop import run as run_lib
from bpjax.train.folder import workdir
config = config_lib.default()
for k, v in json.loads({json.dumps(json.dumps(config_lib.to_json(
    _config(rule='kolen_pollack', epochs=1))))}).items():
  config[k] = tuple(v) if isinstance(v, list) else v
assert launch.launch(config, {str(self.tmp / 'data')!r}, quiet=True) == 0
config.mesh.model = 2
config.sharding = (
    ('feedback/*', ('model',)), ('Dense_0/kernel', (None, 'model')), ('*', ()))
assert launch.launch(config, {str(self.tmp / 'model')!r}, quiet=True) == 0
with workdir.Workdir({str(self.tmp / 'other')!r}) as folder:
  run = run_lib.setup(config, folder)
  state = run.programs['init']()
  print(state.params['Dense_0']['kernel'].sharding.spec)
  print(state.feedback['Dense_1']['kernel'].sharding.spec)
  print({{x.sharding.spec for x in state.opt_state[0].mu['params'][
      'Dense_0'].values()}} == {{x.sharding.spec for x in state.params[
      'Dense_0'].values()}})
config.batch_size = 65
assert launch.launch(config, {str(self.tmp / 'odd')!r}) == 2
'''
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=_ROOT, capture_output=True,
        text=True, timeout=120, check=False, env=_environment(devices=8))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "P(None, 'model')", "P('model',)", 'True'], done.stdout
    assert 'divisible by the 4 devices' in done.stderr
    for name in ('data', 'model'):
      assert _summary(self.tmp / name)['device_count'] == 8
      for a, b in zip(
          _metrics(self.tmp / name), _metrics(self.tmp / 'one'), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


class SweepTest(parameterized.TestCase):

  def test_grid(self):
    assert space.parse_grid([]) == [{}]
    assert space.parse_grid(['a=1,2', 'b=(3,4),5']) == [
        {'a': '1', 'b': '(3,4)'}, {'a': '1', 'b': '5'},
        {'a': '2', 'b': '(3,4)'}, {'a': '2', 'b': '5'}]
    for grid in (['a'], ['a=1,'], ['a=1', 'a=2'], ['seed=1']):
      with pytest.raises(ValueError, match='`grid` must'):
        space.parse_grid(grid)

  def test_compares_seeds_and_goes_on_after_a_failure(self):
    with pytest.MonkeyPatch.context() as patch:
      out = []
      patch.setattr('builtins.print', lambda *a, **k: out.append(str(a[0])))
      arguments = (
          _config(epochs=1, optimizer='sgd'), str(self.tmp),
          ['learning_rate=1e30,1e-2'],
          ['0', '1'])
      assert sweep_lib.sweep(*arguments) == 1
      folder = self.tmp / 'learning_rate=1e-2,seed=1'
      before = os.stat(folder / 'summary.json').st_mtime_ns
      assert sweep_lib.sweep(*arguments) == 1
      assert os.stat(folder / 'summary.json').st_mtime_ns == before
    held = json.loads((self.tmp / 'sweep.json').read_text())
    accuracies = [
        _summary(self.tmp / f'learning_rate=1e-2,seed={s}')['test_accuracy']
        for s in (0, 1)]
    found = held['points'][1]['test_accuracy']
    assert found['mean'] == pytest.approx(np.mean(accuracies))
    assert found['std'] == pytest.approx(np.std(accuracies, ddof=1))
    assert held['points'][0]['test_accuracy']['n'] == 0
    assert any('learning_rate=1e30,seed=0 failed with exit code 3' in o for o in out)
    assert any(o.startswith('learning_rate=1e-2: test_accuracy') for o in out)

  @parameterized.parameters('lerning_rate=1', 'rule=backprop,backporp')
  def test_a_wrong_point_is_refused_before_any_run(self, grid):
    assert sweep_lib.sweep(_config(), str(self.tmp), [grid], []) == 2
    assert not os.listdir(self.tmp)


class ProgramTest(parameterized.TestCase):

  def test_nothing_is_compiled_in_the_loop(self):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
        if name == '/jax/core/compile/backend_compile_duration' else None)
    counts = []
    for epochs in (1, 4):
      compiled.clear()
      _launch(_config(epochs=epochs, log_every=5, checkpoint_every=4),
              self.tmp / str(epochs))
      counts.append(len(compiled))
    assert 0 < counts[1] <= counts[0]

  def test_convolutions_are_not_put_into_a_loop_on_a_cpu(self):
    assert _ready(_config(), self.tmp).most > 1
    config = _config(model='cnn')
    config.model_args = {}
    most = _ready(config, self.tmp).most
    assert (most == 1) == (jax.default_backend() == 'cpu')
