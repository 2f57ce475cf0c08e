"""Texts in the launcher: everything that images have, and their metrics."""

import contextlib
import io
import json
import signal

import bpjax
from bpjax.train import config as config_lib
from bpjax.train import data as data_lib
from bpjax.train.data import sets
from bpjax.train.data import text as text_lib
from bpjax.train.data.rows import Asked
from bpjax.train.data.rows import Tokens
from bpjax.train.folder import checkpoint
from bpjax.train.folder import workdir as workdir_lib
from bpjax.train.loop import launch as launch_lib
from bpjax.train.loop import optimizer
from bpjax.train.loop import progress
from bpjax.train.loop import run as run_lib
from bpjax.train.loop import tasks
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


class Tiny(nn.Module):
  """Reads tokens as `bert_encoder` does, or as `gpt` where `each` is set."""
  num_classes: int
  vocabulary: int
  length: int
  each: bool

  @nn.compact
  def __call__(self, tokens, mask=None, segments=None, train: bool = False):
    if tokens.shape[1] > self.length:
      raise ValueError('`tokens` must be at most as long as the positions.')
    x = nn.Embed(self.vocabulary, 8, name='token')(tokens)
    if segments is not None:
      x += nn.Embed(2, 8, name='segment')(segments)
    x = nn.relu(nn.Dense(8, name='hidden')(x)) * mask[..., None]
    if self.each:
      x = jnp.cumsum(x, 1) / (1. + jnp.arange(x.shape[1]))[:, None]
    else:
      x = x.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    return nn.Dense(self.num_classes, name='readout')(x)


def tiny(num_classes, vocabulary=9, length=9, each=False):
  return Tiny(num_classes, vocabulary, length, each)


def tiny_each(num_classes, vocabulary=9, length=9):
  return Tiny(num_classes, vocabulary, length, True)


_TEXT = 'To be, or not to be: that is the question.\n' * 60


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
  """The models that tests read texts with, one device, a cache of their own."""
  models = {'tiny': tiny, 'tiny_each': tiny_each}
  get = bpjax.models.get
  monkeypatch.setattr(
      bpjax.models, 'get', lambda name: models.get(name) or get(name))
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setenv('BPJAX_CACHE_DIR', str(tmp_path / 'cache'))
  (tmp_path / 'play.txt').write_text(_TEXT)


def _config(**fields):
  """A run of 2 epochs of 12 steps on short ListOps."""
  config = config_lib.default()
  config.model, config.dataset, config.length = 'tiny', 'listops', 12
  config.dataset_args = {
      'train': 200, 'validation': 50, 'test': 50, 'depth': 1}
  config.epochs, config.batch_size, config.eval_batch_size = 2, 16, 40
  config.learning_rate = 1e-2
  for field, value in fields.items():
    config[field] = value
  return config


def _language(tmp_path, **fields):
  return _config(**{
      'dataset': str(tmp_path / 'play.txt'), 'dataset_args': {},
      'model': 'tiny_each', **fields})


def _launch(config, path, expect=0):
  """The log; of a refused run, which leaves none, what it said."""
  with contextlib.redirect_stderr(io.StringIO()) as said:
    code = launch_lib.launch(config, str(path), quiet=True)
  assert code == expect, said.getvalue()
  return said.getvalue() if code == 2 else (path / 'log.txt').read_text()


def _ready(config, path):
  with workdir_lib.Workdir(str(path)) as folder:
    return run_lib.setup(config, folder)


def _state(config, tmp_path, path):
  run = _ready(config, tmp_path / 'ready')
  with checkpoint.Checkpoints(
      str(path / 'checkpoints'), 2, warn=pytest.fail) as checkpoints:
    return run, checkpoints.restore(run.like)[1]


def _metrics(path):
  return [json.loads(line)
          for line in (path / 'metrics.jsonl').read_text().splitlines()]


def _assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def _everything(tmp_path, language):
  """All that a checkpoint could forget is in use."""
  make = _language if language else lambda _, **f: _config(**f)
  return make(
      tmp_path, rule='kolen_pollack', optimizer='adamw', weight_decay=.01,
      schedule='plateau', plateau_factor=.5, accumulate=3, clip_norm=1.,
      log_every=5, alignment_every=8, checkpoint_every=5, epochs=4)


@pytest.mark.parametrize('language', [False, True])
def test_an_interrupted_run_ends_in_the_same_bits(
    tmp_path, language, monkeypatch):
  config = _everything(tmp_path, language)
  _launch(config, tmp_path / 'whole')
  advance, sent = progress.Progress.advance, []

  def advance_and_send(self, steps):
    advance(self, steps)
    if self._step >= 17 and not sent:
      sent.append(signal.raise_signal(signal.SIGTERM))

  monkeypatch.setattr(progress.Progress, 'advance', advance_and_send)
  _launch(config, tmp_path / 'cut')
  assert not (tmp_path / 'cut' / 'summary.json').exists()
  assert 'going on from step' in _launch(config, tmp_path / 'cut')
  assert _metrics(tmp_path / 'whole') == _metrics(tmp_path / 'cut')
  states = [_state(config, tmp_path, tmp_path / n)[1] for n in ('whole', 'cut')]
  _assert_same(*states)
  assert (tmp_path / 'cut' / 'tokenizer.json').exists() == language


def test_metrics_of_a_language_are_those_of_its_characters(tmp_path):
  config = _language(
      tmp_path, tokenizer='bpe', vocabulary=300, loss='cross_entropy')
  log = _launch(config, tmp_path / 'run')
  assert 'bits per character' in log and 'perplexity' in log
  run, state = _state(config, tmp_path, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  held = (tmp_path / 'run' / 'tokenizer.json').read_text()
  assert held == run.dataset.tokenizer
  size = len(_TEXT)
  ends = [0, int(.9 * size), int(.95 * size), size]
  for name, characters in zip(('train', 'validation', 'test'), np.diff(ends)):
    split = getattr(run.dataset, name)
    x = run.learner.task.inputs(jax.tree.map(jnp.asarray, split))
    logits = run.learner.net.apply({'params': state.params}, x)
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    asked = np.argwhere(split.labels != -1)
    nats = -sum(logp[i, j, split.labels[i, j]] for i, j in asked)
    right = np.mean([
        logp[i, j].argmax() == split.labels[i, j] for i, j in asked])
    for value, wanted in (
        ('loss', nats / len(asked)), ('accuracy', right),
        ('perplexity', np.exp(nats / len(asked))),
        ('bits_per_character', nats / np.log(2) / characters)):
      assert summary[f'{name}_{value}'] == pytest.approx(wanted, rel=1e-5)
  last = _metrics(tmp_path / 'run')[-1]
  assert last['bits_per_character'] == summary['test_bits_per_character']


def _padded(tokens, ends, labels, length):
  fill = lambda x, value: np.pad(
      x, [(0, 0), (0, length - x.shape[1])], constant_values=value)
  return Tokens(
      fill(tokens, 0), ends, fill(labels, -1) if labels.ndim > 1 else labels)


@pytest.mark.parametrize('each', [False, True])
def test_padding_changes_no_update(each):
  rng = np.random.default_rng(0)
  ends = np.array([[3, 3], [7, 7], [5, 5], [1, 1]], np.int32)
  real = np.arange(7) < ends[:, 1:]
  tokens = np.where(real, rng.integers(1, 9, (4, 7)), 0)
  labels = rng.integers(0, 5, (4, 7) if each else 4)
  labels = np.where(real, labels, -1) if each else labels
  task = tasks.Text(Asked(5, 9, 12, each_token=each))
  net = bpjax.from_linen(tiny(5, length=12, each=each))
  loss = tasks.loss_function('cross_entropy', 5)
  rule = bpjax.rules.feedback_alignment()
  found, variables, feedback = [], None, None
  for length in (7, 12):
    batch = _padded(tokens, ends, labels, length)
    x = task.inputs(batch)
    if variables is None:
      variables = net.init(jax.random.key(0), x)
      feedback = rule.init(jax.random.key(1), net, variables, x)
    (value, aux), (grads, _) = rule.value_and_grad(net, loss)(
        variables, feedback, x, batch.labels)
    found.append((value, grads))
    sums = tasks.sums(loss(aux.output, batch.labels), aux.output, batch)
    count = real.sum() if each else 4
    assert sums.count == count
    assert sums.loss == pytest.approx(float(value) * count, rel=1e-5)
  for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1])):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  changed = np.where(real, tokens, 8)  # What padding holds is never seen.
  (value, _), (grads, _) = rule.value_and_grad(net, loss)(
      variables, feedback, task.inputs(Tokens(changed, ends, labels)), labels)
  touched = grads['token'].pop('embedding')
  kept = found[0][1]['token'].pop('embedding')
  _assert_same((value, grads), (found[0][0], found[0][1]))
  np.testing.assert_array_equal(touched[:8], kept[:8])


def test_pairs_say_which_segment_a_token_is_of():
  batch = Tokens(np.ones((2, 6)), np.array([[3, 5], [2, 2]]), np.zeros(2))
  x = tasks.Text(Asked(2, 9, 6, pairs=True)).inputs(batch)
  np.testing.assert_array_equal(
      x.kwargs['mask'], [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
      x.kwargs['segments'], [[0, 0, 0, 1, 1, 0], [0] * 6])
  assert 'segments' not in tasks.Text(Asked(2, 9, 6)).inputs(batch).kwargs


def test_two_devices_give_what_one_gives(tmp_path):
  config = _config(rule='kolen_pollack')
  _launch(config, tmp_path / 'one')
  run, one = _state(config, tmp_path, tmp_path / 'one')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 2)
    _launch(config, tmp_path / 'two')
  del run
  _, two = _state(config, tmp_path, tmp_path / 'two')
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize('language', [False, True])
def test_texts_are_streamed(tmp_path, language, monkeypatch):
  texts = [f'word{i % 7} thing{i % 5} {i}' for i in range(120)]
  labels = np.arange(120, dtype=np.int32) % 2
  examples = list(zip(zip(texts), labels.tolist()))
  corpus = text_lib.Corpus(
      {'train': examples, 'test': examples[:30]}, 0 if language else 2, '', '')
  loaded = text_lib.load(
      'made', corpus, kind='', vocabulary=300, length=16, validation=20,
      train_examples=None, cache_dir=tmp_path)
  monkeypatch.setattr(
      data_lib, 'load', lambda *_, **__: sets._of_texts('made', loaded))
  config = _config(
      dataset='streamed', dataset_args={},
      model='tiny_each' if language else 'tiny')
  _launch(config, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['steps'] == 12 and summary['test_loss'] > 0
  lines = [m for m in _metrics(tmp_path / 'run') if m['split'] == 'train']
  assert lines[-1]['loss'] < lines[0]['loss']
  assert ('test_perplexity' in summary) == language


def test_bfloat16_computes_in_it_and_keeps_single_precision(tmp_path):
  found = {}
  for dtype in ('float32', 'bfloat16'):
    config = _config(dtype=dtype, rule='kolen_pollack', weight_decay=1e-3)
    run = _ready(config, tmp_path / dtype)
    state = run.programs['init']()
    assert {x.dtype for x in jax.tree.leaves((state.params, state.feedback))
            } == {jnp.dtype('float32')}
    batch = run.feed.fixed_batch
    after, loss = jax.jit(run.learner.step)(state, batch)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(
        lambda x: x.dtype, state)
    seen = jax.make_jaxpr(run.learner.step)(state, batch)
    assert ('bf16' in str(seen)) == (dtype == 'bfloat16')
    found[dtype] = after, loss
    gap = lambda s: s.params['readout']['kernel'] - s.feedback['readout'][
        'kernel']
    np.testing.assert_allclose(gap(after), (1 - 1e-3) * gap(state), atol=1e-6)
  (_, exact), (_, rounded) = found.values()
  assert 0 < abs(exact - rounded) < .02 * exact


@pytest.mark.parametrize('accumulate', [1, 4])
def test_kolen_pollacks_law_holds_whatever_is_done_to_updates(accumulate):
  config = _config(
      accumulate=accumulate, clip_norm=.05, optimizer='adamw',
      weight_decay=.1, schedule='noam', warmup_steps=3)
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
  tree = {'params': draw(), 'feedback': draw()}
  gap = tree['params'] - tree['feedback']
  tx = optimizer.build(config, steps_per_epoch=8)
  state = tx.init(tree)
  for step in range(16):
    update = draw() * (1 if step % 2 else 30)
    before = tree
    changes, state = tx.update(
        {'params': update, 'feedback': update}, state, tree)
    tree = optax.apply_updates(tree, changes)
    if (step + 1) % accumulate:
      _assert_same(before, tree)
      continue
    n = (step + 1) // accumulate
    gap = gap * (1 - .1 * 1e-2 * min(n / 3, (3 / n)**.5))
    np.testing.assert_allclose(
        tree['params'] - tree['feedback'], gap, atol=2e-6)


def test_four_batches_make_one_update_of_their_mean():
  rng = np.random.default_rng(0)
  tree = {'params': jnp.ones(3), 'feedback': {}}
  updates = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
  tx = optimizer.build(
      _config(accumulate=4, optimizer='sgd', schedule='linear'), 4)
  state, moved = tx.init(tree), []
  for update in updates:
    change, state = tx.update({'params': update, 'feedback': {}}, state, tree)
    moved.append(change['params'])
  np.testing.assert_array_equal(moved[0], np.zeros(3))
  # The linear schedule counts two steps of the optimiser's own.
  np.testing.assert_allclose(moved[3], -.01 * updates[:4].mean(0), rtol=1e-5)
  np.testing.assert_allclose(moved[7], -.005 * updates[4:].mean(0), rtol=1e-5)


def test_a_plateau_lowers_the_rate_of_both_trees():
  config = _config(
      schedule='plateau', plateau_factor=.5, plateau_patience=2,
      optimizer='sgd', feedback_optimizer='sgd', feedback_learning_rate=.1,
      validation=20)
  tree = {'params': jnp.ones(2), 'feedback': jnp.ones(2)}
  tx = optimizer.build(config, 4)
  state, scale, best, bad = tx.init(tree), 1., np.inf, 0
  for loss in (3., 2., 2.5, 2.2, 1.9, 2., 2., 2., 2.):
    change, state = tx.update(tree, state, tree)
    np.testing.assert_allclose(change['params'], [-.01 * scale] * 2, rtol=1e-6)
    np.testing.assert_allclose(change['feedback'], [-.1 * scale] * 2, rtol=1e-6)
    state = optimizer.after_epoch(config, state, loss)
    bad, best = (0, loss) if loss < best else (bad + 1, best)
    if bad == 2:
      scale, bad = scale / 2, 0
  assert scale == .125


@pytest.mark.parametrize('fields, words', [
    ({'tokenizer': 'wordpeice'}, '`tokenizer` must be one of'),
    ({'dataset': 'digits', 'dataset_args': {}, 'length': 0},
     "`model` 'tiny' reads tokens, and `dataset` 'digits' is one of images"),
    ({'model': 'mlp'}, "reads images, and `dataset` 'listops' is one of tokens"),
    ({'model': 'tiny_each'}, 'asks for one answer an example'),
    ({'dataset': 'FILE', 'dataset_args': {}},
     'a set without labels, asks for one answer a token'),
    ({'model_args': {'length': 5}}, 'at most as long as the positions'),
    ({'dataset_args': {'depht': 2}}, '`dataset_args.depht`'),
    ({'dataset_args': {'depth': 'two'}}, '`dataset_args.depth`'),
    ({'dataset': 'digits'}, '`dataset_args` needs a generated `dataset`'),
    ({'dataset': 'digits', 'dataset_args': {}, 'model': 'mlp'},
     '`length` means nothing'),
    ({'augment': 'crop_flip'}, '`augment` means nothing'),
    ({'input_noise': .1}, '`input_noise` means nothing'),
    ({'preprocessing': 'gcn'}, '`preprocessing` means nothing'),
    ({'dataset': 'FILE', 'dataset_args': {}, 'model': 'tiny_each',
      'loss': 'squared_error'}, "`loss` must not be 'squared_error'"),
    ({'rule': 'LG-FG-A'}, 'block'),
    ({'schedule': 'noam'}, '`warmup_steps` or `warmup_epochs`'),
    ({'warmup_steps': 99, 'schedule': 'cosine'}, '`warmup_steps` must be less'),
    ({'warmup_steps': 2, 'warmup_epochs': 1.}, 'must not both be set'),
    ({'accumulate': 99}, '`accumulate` must be at most the 24 batches'),
    ({'accumulate': 2, 'feedback_schedule': 'epochs'}, '`accumulate` must be 1'),
    ({'plateau_factor': 1.}, '`plateau_factor` must be a number between 0 and 1'),
    ({'dtype': 'float16'}, '`dtype` must be one of')])
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, fields, words):
  if fields.get('dataset') == 'FILE':
    fields = {**fields, 'dataset': str(tmp_path / 'play.txt')}
  log = _launch(_config(**fields), tmp_path / 'run', expect=2)
  assert words in log and log.count('\n') == 1


def test_plateau_needs_validation_examples(tmp_path):
  log = _launch(_config(
      dataset='digits', dataset_args={}, model='mlp', length=0,
      schedule='plateau'), tmp_path / 'run', expect=2)
  assert 'needs validation examples' in log


def test_another_tokeniser_than_the_folders_is_refused(tmp_path):
  config = _language(tmp_path, epochs=1)
  _launch(config, tmp_path / 'run')
  (tmp_path / 'run' / 'summary.json').unlink()
  (tmp_path / 'play.txt').write_text(_TEXT.replace('q', 'z'))
  log = _launch(config, tmp_path / 'run', expect=2)
  assert 'a run that began otherwise' in log
