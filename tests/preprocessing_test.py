"""Contrast normalisation and ZCA whitening, against numpy."""

from absl.testing import parameterized
from bpjax.train import data
from bpjax.train.data import decoded
from bpjax.train.data import preprocessing
from bpjax.train.data import sets
import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _given(tmp_path, monkeypatch, request):
  """No test leaves anything outside of its own folder."""
  monkeypatch.setenv('BPJAX_CACHE_DIR', str(tmp_path / 'cache'))
  if request.instance is not None:
    request.instance.tmp = tmp_path
    request.instance.patch = monkeypatch


def _images(count, seed=0, shape=(4, 4, 3)):
  """Images whose pixels are correlated, as a picture's are."""
  rng = np.random.default_rng(seed)
  values = int(np.prod(shape))
  mix = np.random.default_rng(99).normal(size=(values, values))
  x = rng.normal(size=(count, values)) @ (mix + 6 * np.ones(values))
  return np.clip(128 + 3 * x, 0, 255).astype(np.uint8).reshape(count, *shape)


def _normalised(images):
  """One image after the other, in float64."""
  rows = []
  for image in images:
    x = image.astype(np.float64).ravel()
    x = x - np.mean(x)
    rows.append(x / np.sqrt(10 + np.mean(x**2)))
  return np.array(rows)


class MathTest(parameterized.TestCase):

  def test_contrast(self):
    images = _images(7)
    got = preprocessing.contrast_normalised(images)
    assert got.shape == images.shape and got.dtype == np.float32
    np.testing.assert_allclose(
        got.reshape(7, -1), _normalised(images), atol=1e-5)
    flat = preprocessing.contrast_normalised(np.full((1, 4, 4, 3), 9, np.uint8))
    np.testing.assert_array_equal(flat, 0)

  @parameterized.parameters(1e-5, .1)
  def test_whitened_covariance(self, epsilon):
    images = _images(3000)
    x = _normalised(images)
    covariance = np.cov(x.T, bias=True)
    variances, directions = np.linalg.eigh(covariance)
    got = preprocessing.whitened(
        images, preprocessing.whitening(images, epsilon))
    assert got.dtype == np.float16 and got.shape == images.shape
    got = got.reshape(3000, -1).astype(np.float64)
    np.testing.assert_allclose(got.mean(0), 0, atol=2e-3)
    expected = (directions * (variances / (variances + epsilon))) @ directions.T
    np.testing.assert_allclose(np.cov(got.T, bias=True), expected, atol=5e-3)
    if epsilon < 1e-4:
      # The identity, but for the mean of an image, which is always 0.
      identity = np.eye(48) - np.ones((48, 48)) / 48
      np.testing.assert_allclose(np.cov(got.T, bias=True), identity, atol=.02)

  def test_it_is_the_symmetric_whitening(self):
    images = _images(500)
    by = preprocessing.whitening(images, .1)
    np.testing.assert_allclose(by.matrix, by.matrix.T, atol=1e-6)
    np.testing.assert_allclose(by.mean, _normalised(images).mean(0), atol=1e-6)
    # (C + epsilon)^(-1/2), whatever made it.
    covariance = np.cov(_normalised(images).T, bias=True)
    product = by.matrix.astype(np.float64) @ by.matrix @ (
        covariance + .1 * np.eye(48))
    np.testing.assert_allclose(product, np.eye(48), atol=1e-3)


class SplitsTest(parameterized.TestCase):

  def _splits(self, held_out=True):
    split = lambda n, seed: decoded.Split(
        _images(n, seed), np.arange(n, dtype=np.int32) % 3)
    return [split(400, 0), split(60, 1) if held_out else None, split(50, 2)]

  def _apply(self, splits, kind='gcn_zca', epsilon=.1):
    return preprocessing.apply(
        kind, epsilon, splits, 'small', self.tmp / 'cache')

  def test_statistics_are_those_of_the_training_images_alone(self):
    splits = self._splits()
    by = preprocessing.whitening(splits[0].images, .1)
    done = self._apply(splits)
    for before, after in zip(splits, done):
      x = _normalised(before.images)
      np.testing.assert_allclose(
          after.images.reshape(x.shape), (x - by.mean) @ by.matrix, atol=5e-3)
      np.testing.assert_array_equal(after.labels, before.labels)
    # Other images to validate and to test on change nothing of the rest.
    others = self._splits()
    others[1] = others[1]._replace(images=255 - others[1].images)
    others[2] = others[2]._replace(images=others[2].images // 2)
    again = self._apply(others)
    np.testing.assert_array_equal(again[0].images, done[0].images)
    assert (again[1].images != done[1].images).any()

  def test_a_large_set_is_whitened_once(self):
    self.patch.setattr(preprocessing, '_CACHED_FROM', 0)
    splits = self._splits(held_out=False)
    first = self._apply(splits)
    (file,) = (self.tmp / 'cache').iterdir()
    assert file.name.startswith('small-gcn_zca-')
    whitening = preprocessing.whitening
    self.patch.setattr(preprocessing, 'whitening', None)
    second = self._apply(splits)
    np.testing.assert_array_equal(first[2].images, second[2].images)
    assert second[1] is None and second[0].images.dtype == np.float16
    # Another epsilon or another image is another file.
    self.patch.setattr(preprocessing, 'whitening', whitening)
    self._apply(splits, epsilon=.2)
    splits[2].images[3, 0, 0, 0] ^= 1
    self._apply(splits)
    assert len(list((self.tmp / 'cache').iterdir())) == 3

  @parameterized.parameters('truncated', 'flipped', 'other')
  def test_a_damaged_file_is_named_and_made_anew(self, damage):
    self.patch.setattr(preprocessing, '_CACHED_FROM', 0)
    splits = self._splits()
    first = self._apply(splits)
    (file,) = (self.tmp / 'cache').iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    if damage == 'other':
      decoded.write_arrays(file, {'images_0': np.zeros(3)})
    else:
      file.write_bytes(whole[:middle] + (b'' if damage == 'truncated' else (
          bytes([whole[middle] ^ 16]) + whole[middle + 1:])))
    with pytest.warns(UserWarning, match=f'{file.name} is damaged'):
      second = self._apply(splits)
    np.testing.assert_array_equal(first[1].images, second[1].images)
    assert file.read_bytes() == whole

  def test_a_folder_that_refuses_it_warns(self):
    self.patch.setattr(preprocessing, '_CACHED_FROM', 0)
    (self.tmp / 'cache').write_text('')
    with pytest.warns(UserWarning, match='cannot be written'):
      self._apply(self._splits())

  def test_contrast_alone_has_no_statistics(self):
    splits = self._splits()
    done = self._apply(splits, 'gcn')
    for before, after in zip(splits, done):
      np.testing.assert_allclose(
          after.images.reshape(len(before.labels), -1),
          _normalised(before.images), atol=2e-3)

  def test_large_images_are_refused(self):
    split = decoded.Split(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2))
    with pytest.raises(ValueError, match='at most 8192 values, got 12288'):
      self._apply([split, None, split])


class LoadTest(parameterized.TestCase):

  @parameterized.parameters('gcn', 'gcn_zca')
  def test_digits(self, kind):
    plain = data.load('digits', validation=200)
    done = data.load('digits', validation=200, preprocessing=kind)
    splits = preprocessing.apply(
        kind, .1, (plain.train, plain.validation, plain.test), 'digits',
        self.tmp)
    for name, expected in zip(('train', 'validation', 'test'), splits):
      np.testing.assert_array_equal(getattr(done, name).images, expected.images)
    assert done.source == f'{kind} of digits from scikit-learn'
    # What the model sees are these very numbers.
    x = jax.jit(data.normalise)(done.train.images, done.mean, done.std)
    np.testing.assert_array_equal(x, done.train.images.astype(np.float32))

  def test_a_stream_is_refused(self):
    stream = data.ImageStream([], num_classes=2, image_size=8, channels=3)
    self.patch.setattr(sets, '_digits', lambda: sets.Whole(
        stream, stream, 2, 'a stream'))
    self.patch.setattr(sets.splits, 'hold_out', lambda *a: (None, None))
    with pytest.raises(ValueError, match='is streamed, and .* into memory'):
      data.load('digits', preprocessing='gcn_zca')
