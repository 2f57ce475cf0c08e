"""Sets of texts: what is read, tokenised, cut, cached and refused."""

import os
import pathlib
import shutil
import subprocess
import sys

from bpjax.train import data
from bpjax.train.data import tokenizer
import numpy as np
import pytest
import tensorflow_datasets as tfds
import written_sets

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_WORDS = 'the cat dog sat ran on under a mat tree and slept well never'.split()
_INDEX = {'pythonClassName':
          'tensorflow_datasets.core.features.tensor_feature.Tensor',
          'tensor': {'dtype': 'int32', 'encoding': 'none', 'shape': {}}}
_REAL = pytest.mark.skipif(
    'TFDS_DATA_DIR' not in os.environ,
    reason='reads real texts: set TFDS_DATA_DIR to a directory that holds them')


def _sentence(rng, least=1, most=9):
  return ' '.join(rng.choice(_WORDS, rng.integers(least, most)))


def _sst2(count, seed, label=lambda i: i % 2):
  rng = np.random.default_rng(seed)
  return [{'sentence': _sentence(rng), 'label': label(i), 'idx': i}
          for i in range(count)]


def _pairs(count, seed, label=lambda i: i % 3):
  rng = np.random.default_rng(seed)
  return [{'premise': _sentence(rng, 3, 12), 'hypothesis': _sentence(rng),
           'label': label(i)} for i in range(count)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """No test reads or leaves anything outside of its own folder."""
  monkeypatch.setenv('BPJAX_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def root(tmp_path):
  """A TFDS directory with small sets of the features of the real ones."""
  root = tmp_path / 'tfds'
  unlabelled = lambda i: -1
  written_sets.write_texts(root, 'glue/sst2', {
      'sentence': written_sets.TEXT, 'label': written_sets.label(2),
      'idx': _INDEX}, {
          'train': _sst2(60, 0), 'validation': _sst2(20, 1),
          'test': _sst2(10, 2, unlabelled)}, '2.0.0')
  features = {
      'premise': written_sets.TEXT, 'hypothesis': written_sets.TEXT,
      'label': written_sets.label(3)}
  splits = {
      'train': _pairs(60, 3), 'validation_matched': _pairs(20, 4),
      'validation_mismatched': _pairs(20, 5)}
  written_sets.write_texts(root, 'multi_nli', features, splits)
  with_index = {k: [{**row, 'idx': i} for i, row in enumerate(rows)]
                for k, rows in splits.items()}
  written_sets.write_texts(
      root, 'glue/mnli', {**features, 'idx': _INDEX},
      {**with_index, 'test_matched': [
          {**row, 'label': -1} for row in with_index['train'][:9]]})
  rng = np.random.default_rng(6)
  line = lambda: {'text': _sentence(rng, 4, 20)}
  written_sets.write_texts(root, 'lm1b', {'text': written_sets.TEXT}, {
      'train': [line() for _ in range(40)], 'test': [line() for _ in range(9)]})
  return root


def _words(dataset, split, row):
  """The two segments of a row, as text."""
  made = tokenizer.load(dataset.tokenizer)
  first, end = split.ends[row]
  ids = split.tokens[row]
  assert ids[0] == 2 and ids[end - 1] == 3 and not ids[end:].any()
  parts = [ids[1:first - 1]] + ([ids[first:end - 1]] if first < end else [])
  assert all(not set(part) & {0, 1, 2, 3} for part in parts)
  return [' '.join(
      made.decode(list(part)).replace(' ##', '').split()) for part in parts]


@pytest.mark.parametrize('name', ['glue/sst2', 'glue/mnli', 'multi_nli'])
def test_sets_with_labels_are_found_by_their_features(root, name):
  dataset = data.load(name, root, length=40)
  single = name == 'glue/sst2'
  train = _sst2(60, 0) if single else _pairs(60, 3)
  test = _sst2(20, 1) if single else _pairs(20, 4)
  for split, rows in ((dataset.train, train), (dataset.test, test)):
    np.testing.assert_array_equal(split.labels, [row['label'] for row in rows])
    for i, row in enumerate(rows):
      wanted = [row['sentence']] if single else [
          row['premise'], row['hypothesis']]
      assert _words(dataset, split, i) == wanted
  assert dataset.validation is None  # The test split of GLUE has no labels.
  assert dataset.num_classes == dataset.asked.num_classes == (2 if single else 3)
  assert dataset.asked.pairs != single and not dataset.asked.each_token
  assert dataset.train.tokens.dtype == dataset.train.ends.dtype == np.int32


def test_text_features_choose_and_order(root):
  both = data.load(
      'multi_nli', root, length=40, text_features=('hypothesis', 'premise'))
  row = _pairs(60, 3)[0]
  assert _words(both, both.train, 0) == [row['hypothesis'], row['premise']]
  one = data.load('multi_nli', root, length=40, text_features=('premise',))
  assert _words(one, one.train, 0) == [row['premise']]
  assert not one.asked.pairs


def test_examples_without_a_label_are_left_out(tmp_path):
  label = lambda i: -1 if i % 5 == 0 else i % 3
  written_sets.write_texts(tmp_path, 'snli', {
      'premise': written_sets.TEXT, 'hypothesis': written_sets.TEXT,
      'label': written_sets.label(3)}, {
          'train': _pairs(50, 0, label), 'validation': _pairs(20, 1, label),
          'test': _pairs(20, 2, label)})
  dataset = data.load('snli', tmp_path)
  assert [len(s.labels) for s in (
      dataset.train, dataset.validation, dataset.test)] == [40, 16, 16]
  assert dataset.train.labels.min() == 0


@pytest.mark.parametrize('kind', ['characters', 'bpe'])
@pytest.mark.parametrize('length', [7, 32])
def test_a_language_is_read_whole_and_each_character_counted(
    root, kind, length):
  dataset = data.load(
      'lm1b', root, tokenizer=kind, vocabulary=300, length=length)
  made = tokenizer.load(dataset.tokenizer)
  examples = tfds.builder_from_directory(root / 'lm1b/1.0.0').as_data_source()
  for name, split in (('train', dataset.train), ('test', dataset.test)):
    texts = [row['text'].decode() for row in examples[name]]
    real = split.labels != -1
    flat = split.labels[real]
    np.testing.assert_array_equal(real.sum(1), split.ends[:, 1])
    # Inputs are the labels of one step before, from a first [SEP] on.
    np.testing.assert_array_equal(split.tokens[real], [3, *flat[:-1]])
    assert split.tokens.shape == (-(-len(flat) // length), length)
    pieces = np.split(flat, np.flatnonzero(flat == 3) + 1)
    found = [made.decode(list(p[:-1])) for p in pieces[:-1]]
    if kind == 'characters':
      texts = [' '.join(t) for t in texts]
      found = [f.replace('   ', '   ') for f in found]
    assert found == texts and len(pieces[-1]) == 0
    own = [row['text'].decode() for row in examples[name]]
    assert split.characters.sum() == sum(map(len, own)) + len(own)
  assert dataset.asked.each_token
  assert dataset.num_classes == made.get_vocab_size()


def test_characters_of_each_window_are_those_of_its_tokens():
  text = 'naïve café — 你好\nand more, ünïcode words\r\n' * 3
  made = tokenizer.load(tokenizer.train('bpe', [text], 280, None))
  tokens, characters = tokenizer.passage(made, [text])
  assert characters.sum() == len(text) and characters.min() == 0
  assert made.decode(list(tokens[1:])) == text
  ends = np.cumsum(characters)
  for i in range(1, len(tokens)):  # Where a character is whole, so is the text.
    part = made.decode(list(tokens[1:i + 1]))
    if '\ufffd' not in part:
      assert len(part) == ends[i]


def test_a_text_file_is_a_language_of_three_splits(tmp_path):
  path = tmp_path / 'my text.txt'
  text = ''.join(
      f'{i}. {w} \r\n' for i, w in enumerate(_WORDS * 20))
  path.write_bytes(text.encode())
  dataset = data.load(str(path), length=16)
  made = tokenizer.load(dataset.tokenizer)
  found = ''
  for split, share in ((dataset.train, .9), (dataset.validation, .05),
                       (dataset.test, .05)):
    ids = split.labels[split.labels != -1]
    assert len(ids) == split.characters.sum()
    assert len(ids) == pytest.approx(share * len(text), abs=1)
    found += ''.join(made.id_to_token(i) for i in ids)
  assert found.replace('[UNK]', '') == text
  assert str(path) in dataset.source


def test_a_tokeniser_sees_training_texts_alone(root):
  held = data.load('multi_nli', root, validation=20, train_examples=10)
  rows = _pairs(60, 3)
  assert len(held.validation.labels) == 20 and len(held.train.labels) == 10
  # Trained anew, on the rows that are found in it.
  words = {tuple(_words(held, held.train, i)) for i in range(10)}
  texts = [row for row in rows if (row['premise'], row['hypothesis']) in words]
  columns = [[row[k] for row in texts] for k in ('premise', 'hypothesis')]
  assert held.tokenizer == tokenizer.train(
      'wordpiece', [*columns[0], *columns[1]], 8192, 64)
  unheard = [{**row, 'sentence': f'zyzzyva{i}', 'label': 0}
             for i, row in enumerate(_sst2(30, 0))]
  unheard[0]['sentence'] = 'plain'
  folder = root / 'more'
  written_sets.write_texts(folder, 'sentences', {
      'sentence': written_sets.TEXT, 'label': written_sets.label(2),
      'idx': _INDEX}, {'train': unheard[:1], 'test': unheard})
  dataset = data.load('sentences', folder)
  assert dataset.test.tokens[0, 1] > 3
  assert all(1 in row for row in dataset.test.tokens[1:])  # [UNK].


@pytest.mark.parametrize('kind', tokenizer.KINDS)
def test_a_tokeniser_is_the_same_in_every_process(kind):
  program = (
      'import sys; from bpjax.train.data import tokenizer\n'
      'texts = [f"word{i % 97} and thing{i % 13}, no {i}." for i in range(500)]\n'
      f'print(tokenizer.train({kind!r}, texts, 300, None))')
  found = {
      subprocess.run(
          [sys.executable, '-c', program], capture_output=True, text=True,
          check=True, cwd=_ROOT,
          env={**os.environ, 'PYTHONHASHSEED': seed}).stdout
      for seed in ('1', '2')}
  assert len(found) == 1 and tokenizer.size(found.pop()) > 26


@pytest.mark.parametrize('length', [6, 9, 12, 20])
def test_the_longer_of_a_pair_is_cut_first(length):
  made = tokenizer.load(
      tokenizer.train('wordpiece', ['a b c d'], 100, length))
  first, second = map(made.token_to_id, 'ab')
  sizes = [(a, b) for a in range(10) for b in range(10)]
  rows, ends = tokenizer.rows(
      made, [['a ' * a for a, _ in sizes], ['b ' * b for _, b in sizes]])
  for (a, b), row, end in zip(sizes, rows, ends):
    kept = int((row == first).sum()), int((row == second).sum())
    wanted = [2, *[first] * kept[0], 3, *[second] * kept[1], 3]
    np.testing.assert_array_equal(row, wanted + [0] * (length - len(wanted)))
    assert tuple(end) == (kept[0] + 2, len(wanted))
    assert sum(kept) == min(a + b, length - 3)
    for own, size, other in ((kept[0], a, kept[1]), (kept[1], b, kept[0])):
      assert own == size or own >= other - 1  # Cut, so among the longest.


def test_an_empty_sentence_keeps_its_frame_and_names_are_no_tokens():
  made = tokenizer.load(
      tokenizer.train('wordpiece', ['padding is sep cls'], 200, 16))
  tokens, ends = tokenizer.rows(made, [['', '   ', '[PAD] [SEP] [CLS]']])
  for row, end in list(zip(tokens, ends))[:2]:
    np.testing.assert_array_equal(row, [2, 3] + [0] * 14)
    np.testing.assert_array_equal(end, [2, 2])
  end = ends[2, 1]
  assert not set(tokens[2, 1:end - 1]) & {0, 2, 3}


def test_a_stream_gives_the_rows_of_the_arrays(root):
  for name in ('multi_nli',):
    whole = data.load(name, root, length=16)
    streamed = data.load(name, root, length=16, stream=True)
    assert streamed.tokenizer == whole.tokenizer
    assert 'streamed' in streamed.source
    for split, stream in ((whole.train, streamed.train),
                          (whole.test, streamed.test)):
      batches = [stream.rows(b) for b in stream.batches(8, train=False)]
      for field in ('tokens', 'ends', 'labels'):
        np.testing.assert_array_equal(
            np.concatenate([getattr(b, field) for b in batches]),
            getattr(split, field))
    first, resumed = (
        list(streamed.train.batches(8, seed=1, epoch=2, start=start))
        for start in (0, 3))
    for a, b in zip(first[3:], resumed, strict=True):
      np.testing.assert_array_equal(a['tokens'], b['tokens'])
    order = data.epoch_order(60, seed=1, epoch=2)
    np.testing.assert_array_equal(
        first[0]['labels'], whole.train.labels[order[:8]])


def test_a_streamed_language_has_a_text_a_row(root):
  streamed = data.load('lm1b', root, length=150, stream=True, validation=5)
  assert len(streamed.train) == 35 and len(streamed.validation) == 5
  made = tokenizer.load(streamed.tokenizer)
  batch = streamed.test.rows(next(streamed.test.batches(9, train=False)))
  source = tfds.builder_from_directory(root / 'lm1b/1.0.0').as_data_source()
  for i, row in enumerate(source['test']):
    text = row['text'].decode()
    ids = batch.labels[i][batch.labels[i] != -1]
    assert ''.join(made.id_to_token(k) for k in ids) == (text + '[SEP]')[:150]
    assert batch.characters[i] == min(len(text) + 1, 150)


def test_the_cache_replaces_folder_and_tfds(root, cache, monkeypatch):
  first = data.load('multi_nli', root, length=16)
  files = sorted(file.name for file in cache.iterdir())
  assert files[0] == 'multi_nli-1.0.0-texts.npz'
  assert len(files) == 2 and 'wordpiece' in files[1]
  shutil.rmtree(root)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  again = data.load('multi_nli', root, length=16)
  other = data.load('multi_nli', root, length=12)
  for split in ('train', 'test'):
    for a, b in zip(getattr(first, split)[:3], getattr(again, split)):
      np.testing.assert_array_equal(a, b)
  assert other.train.tokens.shape[1] == 12
  assert len(list(cache.iterdir())) == 3


def test_a_set_that_was_prepared_anew_is_read_anew(root):
  data.load('multi_nli', root, length=16)
  folder = root / 'multi_nli/1.0.0'
  shutil.rmtree(folder)
  written_sets.write_texts(root, 'multi_nli', {
      'premise': written_sets.TEXT, 'hypothesis': written_sets.TEXT,
      'label': written_sets.label(3)}, {
          'train': _pairs(70, 8), 'validation_matched': _pairs(20, 9)})
  assert len(data.load('multi_nli', root, length=16).train.labels) == 70


def _lost(root):
  """Sets that no task can be made of."""
  text, label = written_sets.TEXT, written_sets.label(2)
  row = {'a': 'x', 'b': 'y', 'c': 'z'}
  written_sets.write_texts(root, 'three', {
      'a': text, 'b': text, 'c': text, 'label': label}, {
          'train': [{**row, 'label': 0}], 'test': [{**row, 'label': 1}]})
  written_sets.write_texts(root, 'nothing', {'text': text}, {
      'train': [{'text': ''}] * 3, 'test': [{'text': 'a'}]})
  written_sets.write_texts(root, 'bare', {'text': text, 'label': label}, {
      'train': [{'text': 'a', 'label': -1}], 'test': [{'text': 'a', 'label': 1}]})
  written_sets.write_texts(root, 'wrong', {'text': text, 'label': label}, {
      'train': [{'text': 'a', 'label': 2}], 'test': [{'text': 'a', 'label': 1}]})


@pytest.mark.parametrize('name, given, words', [
    ('multi_nli', {'tokenizer': 'wordpeice'}, '`tokenizer` must be one of'),
    ('multi_nli', {'vocabulary': 9}, '`vocabulary` must hold the alphabet'),
    ('lm1b', {'tokenizer': 'bpe', 'vocabulary': 99}, 'at least 260 tokens'),
    ('multi_nli', {'length': 4}, '`length` must be at least 5'),
    ('multi_nli', {'text_features': ('premis',)}, 'it has hypothesis, premise'),
    ('multi_nli', {'validation': 60}, '`validation` must be at least 0'),
    ('three', {}, '`text_features` must name one or two texts'),
    ('nothing', {}, "all of 'train' are empty"),
    ('bare', {}, "'train' has none"),
    ('wrong', {}, r'must lie in \[0, 2\), got 2'),
    ('glue/qqp', {}, "is not prepared in .*build glue/qqp --data_dir="),
    ('multi_nil', {}, "did you mean 'multi_nli'"),
    ('not/here.txt', {}, 'must be a text file in UTF-8'),
    ('latin.txt', {}, 'must be a text file in UTF-8'),
    ('short.txt', {}, 'must hold 20 characters at least, got 3')])
def test_what_cannot_be_read_is_refused_in_one_sentence(
    root, name, given, words, monkeypatch):
  _lost(root)
  (root / 'latin.txt').write_bytes('naïve'.encode('latin1') * 20)
  (root / 'short.txt').write_text('abc')
  monkeypatch.chdir(root)
  with pytest.raises(ValueError, match=words) as caught:
    data.load(name, root, **given)
  assert '\n' not in str(caught.value)


@_REAL
@pytest.mark.parametrize('name, sizes, classes', [
    ('sick', (7945, 1982), 3), ('tiny_shakespeare', (7843, 436), 69)])
def test_real_sets(name, sizes, classes):
  dataset = data.load(name)
  assert (len(dataset.train.labels), len(dataset.test.labels)) == sizes
  assert dataset.num_classes == classes
  if name == 'sick':
    share = np.bincount(dataset.test.labels).max() / sizes[1]
    assert share == pytest.approx(.564, abs=5e-4) and dataset.asked.pairs
  else:
    totals = [s.characters.sum() for s in (
        dataset.train, dataset.validation, dataset.test)]
    assert totals == [1_003_854, 55_770, 55_770]
