"""Tests of the data sets: real digits, written TFDS folders, real MNIST."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings

from absl.testing import parameterized
from bpjax.train import data
from bpjax.train.data import decoded
from bpjax.train.data import prepared
from bpjax.train.data import sets
from bpjax.train.data import streaming
import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets as sklearn_datasets
import tensorflow_datasets as tfds
import written_sets

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_TRAIN, _TEST, _CLASSES = 37, 11, 100
_REAL = pytest.mark.skipif(
    'TFDS_DATA_DIR' not in os.environ,
    reason='reads real MNIST: set TFDS_DATA_DIR to a directory that holds it')


def _pixels(split, index, size=(32, 32)):
  """The image that the written folder holds, made without any decoder."""
  rng = np.random.default_rng([split == 'train', index])
  return rng.integers(0, 256, (*size, 3), np.uint8)


def _label(index):
  return (7 * index) % _CLASSES


def _png(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def _write_split(folder, name, split, count, size, label):
  # A size that is not fixed varies from image to image.
  return written_sets.write_split(folder, name, split, [
      {'id': f'{split}_{i}'.encode(), 'coarse_label': i % 20,
       'label': label(i),
       'image': _png(_pixels(split, i, size or (40 + i % 5, 50)))}
      for i in range(count)])


def _features(size):
  core = 'tensorflow_datasets.core.features.'
  classes = written_sets.label
  dimensions = [str(d) for d in (*(size or (-1, -1)), 3)]
  return {
      'featuresDict': {'features': {
          'id': written_sets.TEXT,
          'image': {
              'image': {
                  'dtype': 'uint8', 'shape': {'dimensions': dimensions}},
              'pythonClassName': core + 'image_feature.Image'},
          'label': classes(_CLASSES), 'coarse_label': classes(20)}},
      'pythonClassName': core + 'features_dict.FeaturesDict'}


def _write_cifar100(root, *, size=(32, 32), label=_label, train=_TRAIN,
                    version='3.0.2', name='cifar100',
                    splits=('train', 'test'), **info):
  """Writes a TFDS folder with the features of CIFAR-100, without TensorFlow."""
  folder = root / name / version
  folder.mkdir(parents=True)
  counts = (train, _TEST)
  described = [
      _write_split(folder, name, split, count, size, label)
      for split, count in zip(splits, counts)]
  keys = [{'featureKey': 'image'}, {'featureKey': 'label'}]
  (folder / 'dataset_info.json').write_text(json.dumps({
      'fileFormat': 'array_record', 'name': name, 'splits': described,
      'supervisedKeys': {'tuple': {'items': keys}}, 'version': version,
      **info}))
  (folder / 'features.json').write_text(json.dumps(_features(size)))
  return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """No test reads or leaves anything outside of its own folder."""
  monkeypatch.setenv('BPJAX_CACHE_DIR', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def root(tmp_path):
  """A TFDS directory that holds a small CIFAR-100."""
  _write_cifar100(tmp_path / 'tfds')
  return tmp_path / 'tfds'


@pytest.fixture
def no_tfds(monkeypatch):
  """Makes every question to TFDS fail: its builders may try the network."""
  def refuse(*unused_args, **unused_kwargs):
    raise AssertionError('TFDS was asked')
  for name in ('builder', 'builder_from_directory', 'load', 'data_source'):
    monkeypatch.setattr(tfds, name, refuse)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', refuse)


def _assert_split(split, which, count):
  np.testing.assert_array_equal(
      split.images, [_pixels(which, i) for i in range(count)])
  np.testing.assert_array_equal(
      split.labels, [_label(i) for i in range(count)])
  assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


def _message(*args, **kwargs):
  with pytest.raises(ValueError) as caught:
    data.load(*args, **kwargs)
  return str(caught.value)


# Digits.


def test_digits_are_the_1797_of_scikit_learn():
  dataset = data.load('digits')
  assert dataset.train.images.shape == (1437, 8, 8, 1)
  assert dataset.test.images.shape == (360, 8, 8, 1)
  assert (dataset.num_classes, dataset.image_shape) == (10, (8, 8, 1))
  assert dataset.validation is None and 'digits' in dataset.source
  images, labels = sklearn_datasets.load_digits(return_X_y=True)
  ours = np.concatenate([dataset.train.images, dataset.test.images])
  ours = np.concatenate([
      ours.reshape(1797, 64) / 255 * 16,
      np.concatenate([dataset.train.labels, dataset.test.labels])[:, None]], 1)
  theirs = np.concatenate([images, labels[:, None]], 1)
  sort = lambda rows: rows[np.lexsort(rows.T)]
  np.testing.assert_array_equal(sort(np.rint(ours)), sort(theirs))
  assert np.abs(ours - np.rint(ours)).max() < 0.032


def test_digits_are_the_same_whatever_the_seed():
  one, two = data.load('digits', seed=0), data.load('digits', seed=5)
  np.testing.assert_array_equal(one.train.images, two.train.images)
  np.testing.assert_array_equal(one.test.labels, two.test.labels)


def test_normalised_train_images_have_mean_zero_and_variance_one():
  dataset = data.load('digits')
  x = data.normalise(dataset.train.images, dataset.mean, dataset.std)
  assert x.dtype == np.float32 and x.shape == dataset.train.images.shape
  np.testing.assert_allclose((x.mean(), x.std()), (0, 1), atol=1e-5)
  traced = jax.jit(data.normalise)(
      dataset.train.images, dataset.mean, dataset.std)
  np.testing.assert_allclose(traced, x, atol=1e-5)


def test_moments_are_per_channel_and_a_constant_channel_stays_finite(root):
  dataset = data.load('cifar100', root)
  scaled = dataset.train.images / 255
  np.testing.assert_allclose(dataset.mean, scaled.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(dataset.std, scaled.std((0, 1, 2)), rtol=1e-6)
  assert dataset.mean.dtype == dataset.std.dtype == np.float32
  images = dataset.train.images.copy()
  images[..., 1] = 9
  mean, std = sets._moments(images)
  assert std[1] == 1 and np.isfinite(data.normalise(images, mean, std)).all()


# Order and splits.


def test_epoch_order_is_a_pure_function_of_seed_and_epoch():
  order = data.epoch_order(1000, seed=3, epoch=7)
  np.random.seed(0)
  np.testing.assert_array_equal(
      order, data.epoch_order(1000, seed=3, epoch=7))
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  assert order.dtype == np.int32
  for seed, epoch in ((3, 8), (4, 7), (7, 3)):
    assert (order != data.epoch_order(1000, seed=seed, epoch=epoch)).any()


def test_epoch_order_never_changes():
  # Written down once: a resumed run on another machine needs this very order.
  np.testing.assert_array_equal(
      data.epoch_order(8, seed=1, epoch=2), [2, 0, 5, 7, 1, 6, 4, 3])


def test_epoch_order_refuses_a_negative_seed():
  with pytest.raises(ValueError, match='`seed` must not be negative, got -1'):
    data.epoch_order(8, seed=-1, epoch=0)


def test_validation_is_disjoint_and_independent_of_the_seed(root):
  one = data.load('cifar100', root, validation=9, seed=0)
  two = data.load('cifar100', root, validation=9, seed=1)
  np.testing.assert_array_equal(one.validation.images, two.validation.images)
  rows = lambda split: {image.tobytes() for image in split.images}
  assert len(rows(one.validation)) == 9 and len(rows(one.train)) == _TRAIN - 9
  everything = rows(data.load('cifar100', root).train)
  assert rows(one.train) | rows(one.validation) == everything
  _assert_split(one.test, 'test', _TEST)


def test_train_examples_keeps_the_first_of_what_validation_left(root):
  whole = data.load('cifar100', root, validation=9)
  quick = data.load('cifar100', root, validation=9, train_examples=5)
  np.testing.assert_array_equal(quick.train.images, whole.train.images[:5])
  np.testing.assert_array_equal(
      quick.validation.labels, whole.validation.labels)


class SizesTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('validation_all', dict(validation=1437), '`validation` must .* 1437'),
      ('validation_negative', dict(validation=-1), '`validation` .* got -1'),
      ('train_too_many', dict(validation=437, train_examples=1001),
       '`train_examples` must .* 1000 .* got 1001'),
      ('train_none', dict(train_examples=0), '`train_examples` .* got 0'),
      ('streamed_digits', dict(stream=True), '`stream` must be False'))
  def test_refuses(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      data.load('digits', **arguments)


# TFDS folders.


def test_reads_a_tfds_folder_without_tensorflow(root):
  dataset = data.load('cifar100', root)
  _assert_split(dataset.train, 'train', _TRAIN)
  _assert_split(dataset.test, 'test', _TEST)
  assert (dataset.num_classes, dataset.image_shape) == (100, (32, 32, 3))
  assert 'PNG' in dataset.source and str(root) in dataset.source
  assert 'tensorflow' not in sys.modules


def test_directory_from_the_environment(root, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(root))
  assert len(data.load('cifar100').train.labels) == _TRAIN


def test_the_newest_version_unless_one_is_named(root):
  _write_cifar100(root, version='3.0.10', train=21)
  assert len(data.load('cifar100', root).train.labels) == 21
  assert len(data.load('cifar100:3.0.2', root).train.labels) == _TRAIN


def test_imagenet_is_tested_on_validation_as_its_test_has_no_labels(tmp_path):
  _write_cifar100(
      tmp_path, name='imagenet2012', splits=('train', 'validation'))
  dataset = data.load('imagenet2012', tmp_path)
  _assert_split(dataset.test, 'validation', _TEST)
  described = {'train': 3, 'validation': 2, 'test': 2}
  assert prepared._test_split('imagenet2012', described) == 'validation'
  assert prepared._test_split('mnist', described) == 'test'


def test_names_the_first_label_outside_the_classes(tmp_path):
  _write_cifar100(tmp_path, label=lambda i: 100 + i if i > 4 else i)
  message = _message('cifar100', tmp_path)
  assert 'must lie in [0, 100), got 105 at example 5' in message
  stream = data.load('cifar100', tmp_path, stream=True, image_size=8).train
  with pytest.raises(ValueError, match=r'\[0, 100\), got 1\d\d at example'):
    list(stream.batches(4, train=False))


def test_a_damaged_image_is_named(root, monkeypatch):
  png = _png(_pixels('train', 0))
  monkeypatch.setattr(sys.modules[__name__], '_png', lambda _: png[:-500])
  _write_cifar100(root, version='4.0.0')
  assert 'cannot be read: an image at example 0' in _message('cifar100', root)


@pytest.mark.parametrize('size', [None, 0, 40000])
def test_damaged_files_are_named(root, size):
  (file,) = root.glob('cifar100/3.0.2/*train*')
  whole = file.read_bytes()
  file.unlink()
  if size is not None:
    file.write_bytes(whole[:size])
  message = _message('cifar100', root)
  assert "of 'train' in" in message and 'cannot be read: files' in message


# What cannot be read is said at once.


def test_not_prepared_is_said_at_once(root, no_tfds):
  start = time.monotonic()
  message = _message('mnist', root)
  assert time.monotonic() - start < 1
  for part in (
      "`dataset` 'mnist' is not prepared", str(root), 'cifar100', 'tensorflow',
      'python -m tensorflow_datasets.scripts.cli.main build mnist '
      f'--data_dir={root}'):
    assert part in message
  assert '\n' not in message


def test_an_unknown_name_gets_the_nearest(root, no_tfds):
  message = _message('cifar10O', root)
  assert "'cifar100'" in message and "got 'cifar10O'" in message


def test_a_missing_directory_is_named(tmp_path, no_tfds):
  message = _message('mnist', tmp_path / 'nowhere')
  assert f'{tmp_path / "nowhere"}, which does not exist' in message


def test_a_set_of_neither_images_nor_texts_is_refused(tmp_path, no_tfds):
  folder = _write_cifar100(tmp_path, name='glue/sst2')
  features = json.loads((folder / 'features.json').read_text())
  del features['featuresDict']['features']['image']
  (folder / 'features.json').write_text(json.dumps(features))
  assert 'it has id' in _message('glue/sst2', tmp_path)
  del features['featuresDict']['features']['id']
  (folder / 'features.json').write_text(json.dumps(features))
  assert 'must hold images with one ClassLabel, or texts' in _message(
      'glue/sst2', tmp_path)
  assert 'glue/sst2' in _message('glue', tmp_path)


def test_other_folders_that_cannot_be_read(tmp_path, no_tfds):
  folder = _write_cifar100(tmp_path, fileFormat='tfrecord')
  assert 'must be stored as array_record' in _message('cifar100', tmp_path)
  (folder / 'features.json').write_text('{"featuresDict": ')
  assert 'must have a readable' in _message('cifar100', tmp_path)
  assert "'../cifar100' is a path where nothing lies" in _message('../cifar100', tmp_path)


def test_a_missing_package_is_one_sentence(root, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  message = _message('cifar100', root)
  assert 'needs the Python package tensorflow_datasets' in message


# The cache.


def test_the_cache_replaces_folder_and_tfds(root, cache, monkeypatch):
  first = data.load('cifar100', root)
  assert [file.name for file in cache.iterdir()] == ['cifar100-3.0.2.npz']
  shutil.rmtree(root)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  monkeypatch.setitem(sys.modules, 'PIL', None)
  second = data.load('cifar100', root)
  _assert_split(second.train, 'train', _TRAIN)
  _assert_split(second.test, 'test', _TEST)
  assert second.num_classes == 100 and second.image_shape == (32, 32, 3)
  assert 'cache file' in second.source and 'cache file' not in first.source


def test_an_unchanged_folder_is_not_decoded_twice(root, monkeypatch):
  data.load('cifar100', root)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  assert 'cache file' in data.load('cifar100', root).source


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'empty', 'other'])
def test_a_damaged_cache_is_named_and_rebuilt(root, cache, damage):
  data.load('cifar100', root)
  path = cache / 'cifar100-3.0.2.npz'
  whole = path.read_bytes()
  middle = len(whole) // 2
  path.write_bytes({
      'truncated': whole[:middle], 'empty': b'', 'other': b'not a zip',
      'flipped': whole[:middle] + bytes([whole[middle] ^ 255])
                 + whole[middle + 1:]}[damage])
  with pytest.warns(UserWarning, match='cifar100-3.0.2.npz is damaged'):
    dataset = data.load('cifar100', root)
  _assert_split(dataset.train, 'train', _TRAIN)
  assert path.read_bytes() == whole


def test_a_damaged_cache_without_the_folder_is_an_error(root, cache):
  data.load('cifar100', root)
  (cache / 'cifar100-3.0.2.npz').write_bytes(b'')
  shutil.rmtree(root)
  with pytest.warns(UserWarning, match='is damaged'):
    assert 'is not prepared' in _message('cifar100', root)


def test_another_folder_of_the_same_version_is_not_mixed_up(root, tmp_path):
  data.load('cifar100', root)
  _write_cifar100(tmp_path / 'other', train=20)
  dataset = data.load('cifar100', tmp_path / 'other')
  _assert_split(dataset.train, 'train', 20)


def test_a_cache_that_cannot_be_written_warns(root, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.warns(UserWarning, match='cannot be written'):
    dataset = data.load('cifar100', root, cache_dir=tmp_path / 'file')
  _assert_split(dataset.train, 'train', _TRAIN)


def test_labels_of_a_cache_are_checked(root, cache):
  data.load('cifar100', root)
  path = cache / 'cifar100-3.0.2.npz'
  held = decoded.read_cache(path)
  decoded.write_cache(path, held._replace(num_classes=50))
  assert 'must lie in [0, 50)' in _message('cifar100', root)


def test_two_writers_leave_one_whole_file(root, cache):
  data.load('cifar100', root)
  path = cache / 'cifar100-3.0.2.npz'
  program = (
      'import pathlib, sys; from bpjax.train.data import decoded; '
      'path = pathlib.Path(sys.argv[1]); held = decoded.read_cache(path)\n'
      'for _ in range(40): decoded.write_cache(path, held)')
  writers = [
      subprocess.Popen([sys.executable, '-c', program, str(path)],
                       cwd=_ROOT)
      for _ in range(2)]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    while any(writer.poll() is None for writer in writers):
      _assert_split(decoded.read_cache(path).train, 'train', _TRAIN)
  assert [writer.returncode for writer in writers] == [0, 0]
  assert [file.name for file in cache.iterdir()] == [path.name]


def test_needs_nothing_but_numpy_until_it_is_used():
  program = (
      'import sys; from bpjax.train import data; '
      "print([m for m in ('tensorflow_datasets', 'grain', 'PIL', 'sklearn', "
      "'absl') if m in sys.modules])")
  printed = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True,
      check=True, cwd=_ROOT)
  assert printed.stdout.strip() == '[]'


# Streams.


@pytest.fixture
def streamed(root):
  return data.load('cifar100', root, stream=True, image_size=16).train


def _assert_same(ours, theirs):
  ours, theirs = list(ours), list(theirs)
  assert len(ours) == len(theirs)
  for one, two in zip(ours, theirs):
    np.testing.assert_array_equal(one['image'], two['image'])
    np.testing.assert_array_equal(one['label'], two['label'])


def test_a_stream_yields_each_example_once(streamed):
  assert len(streamed) == _TRAIN and streamed.image_shape == (16, 16, 3)
  batches = list(streamed.batches(5, seed=0, epoch=0, train=False))
  assert [len(batch['label']) for batch in batches] == [5] * 7 + [2]
  assert batches[0]['image'].shape == (5, 16, 16, 3)
  assert batches[0]['image'].dtype == np.uint8
  assert batches[0]['label'].dtype == np.int32
  np.testing.assert_array_equal(
      np.concatenate([batch['label'] for batch in batches]),
      [_label(i) for i in range(_TRAIN)])
  trained = [
      batch['label'] for batch in streamed.batches(5, seed=0, epoch=0)]
  assert [len(labels) for labels in trained] == [5] * 7
  assert len(set(np.concatenate(trained))) == 35


def test_a_stream_shuffles_by_seed_and_epoch(streamed):
  labels = lambda **kwargs: np.concatenate(
      [batch['label'] for batch in streamed.batches(37, **kwargs)])
  order = data.epoch_order(_TRAIN, seed=2, epoch=3)
  np.testing.assert_array_equal(
      labels(seed=2, epoch=3), [_label(i) for i in order])
  assert (labels(seed=2, epoch=3) != labels(seed=2, epoch=4)).any()


def test_a_stream_is_deterministic_and_crops_anew_each_epoch(streamed):
  _assert_same(streamed.batches(8, seed=1, epoch=2),
               streamed.batches(8, seed=1, epoch=2))
  by_label = []
  for epoch in (0, 1):
    (batch,) = streamed.batches(_TRAIN, seed=1, epoch=epoch)
    by_label.append(batch['image'][np.argsort(batch['label'])])
  assert all((one != two).any() for one, two in zip(*by_label))


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('start', [0, 3, 7, 9])
def test_a_stream_resumes_exactly(streamed, start, train):
  arguments = dict(seed=4, epoch=1, train=train)
  _assert_same(streamed.batches(5, start=start, **arguments),
               list(streamed.batches(5, **arguments))[start:])


def test_skipping_reads_nothing(streamed, monkeypatch):
  read = []
  original = streamed._example
  monkeypatch.setattr(
      streamed, '_example',
      lambda index, randomness: read.append(index) or original(
          index, randomness))
  list(streamed.batches(5, seed=0, epoch=0, start=6))
  order = data.epoch_order(_TRAIN, seed=0, epoch=0)
  assert sorted(read) == sorted(order[30:])


def test_evaluation_sees_the_centre(root):
  stream = data.load('cifar100', root, stream=True, image_size=28).test
  # 7/8 of 32 is 28: the crop is 28 stored pixels wide and is not resized.
  (batch,) = stream.batches(_TEST, train=False)
  np.testing.assert_array_equal(
      batch['image'], [_pixels('test', i)[2:30, 2:30] for i in range(_TEST)])


def test_images_of_varying_size_are_streamed(tmp_path):
  _write_cifar100(tmp_path, size=None)
  dataset = data.load('cifar100', tmp_path, image_size=24, validation=7,
                      train_examples=20)
  assert isinstance(dataset.train, data.Stream)
  assert (len(dataset.train), len(dataset.validation)) == (20, 7)
  assert dataset.image_shape == (24, 24, 3) and 'streamed' in dataset.source
  np.testing.assert_allclose(dataset.mean, [0.485, 0.456, 0.406], atol=1e-7)
  (batch,) = dataset.train.batches(20, seed=0, epoch=0)
  (held,) = dataset.validation.batches(7, train=False)
  assert batch['image'].shape == (20, 24, 24, 3)
  assert not set(batch['label']) & set(held['label'])


def test_a_large_set_is_streamed(root, monkeypatch):
  monkeypatch.setattr(sets, '_MAX_DECODED_BYTES', 48 * 32 * 32 * 3 - 1)
  assert isinstance(data.load('cifar100', root).test, data.Stream)
  monkeypatch.setattr(sets, '_MAX_DECODED_BYTES', 48 * 32 * 32 * 3)
  assert isinstance(data.load('cifar100', root).test, data.Split)


def test_random_boxes_lie_inside_the_image():
  rng = np.random.default_rng(0)
  for width, height in ((500, 375), (1, 1), (10, 1000)):
    for _ in range(200):
      left, top, right, bottom = streaming._random_box(rng, width, height)
      assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_a_stream_refuses_wrong_arguments(streamed, root):
  with pytest.raises(ValueError, match='`batch_size` .* 37 .* got 38'):
    streamed.batches(38, seed=0, epoch=0)
  with pytest.raises(ValueError, match='`start` .* got -1'):
    streamed.batches(5, seed=0, epoch=0, start=-1)
  with pytest.raises(ValueError, match='`image_size` .* got -1'):
    data.load('cifar100', root, stream=True, image_size=-1)


def test_a_stream_that_is_left_early_ends(streamed):
  batches = streamed.batches(5, seed=0, epoch=0)
  next(batches)
  batches.close()
  with pytest.raises(StopIteration):
    next(batches)


# Real data.


@pytest.fixture(scope='session')
def mnist(tmp_path_factory):
  return data.load('mnist', cache_dir=tmp_path_factory.mktemp('mnist'))


@_REAL
def test_real_mnist_is_whole(mnist):
  assert mnist.train.images.shape == (60000, 28, 28, 1)
  assert mnist.test.images.shape == (10000, 28, 28, 1)
  np.testing.assert_array_equal(
      np.bincount(mnist.train.labels),
      [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
  np.testing.assert_allclose(mnist.mean, [0.1307], atol=1e-4)
  np.testing.assert_allclose(mnist.std, [0.3081], atol=1e-4)
