"""Augmentation: identities, independent references, determinism."""

import colorsys
import doctest

from absl.testing import absltest
from absl.testing import parameterized
from bpjax.train.data import augment
import jax
import jax.numpy as jnp
import numpy as np

_RANDOM = {
    'random_resized_crop': augment.random_resized_crop,
    'random_pad_crop': augment.random_pad_crop,
    'random_flip': augment.random_flip,
    'color_jitter': augment.color_jitter,
    'random_grayscale': augment.random_grayscale,
    'random_blur': augment.random_blur,
    'random_solarise': augment.random_solarise,
    'view': augment.view,
}
_NOTHING = augment.View(
    area=(1., 1.), aspect=(1., 1.), flip=0., jitter=0., grayscale=0., blur=0.)


def images(batch=6, height=12, width=12, channels=3, seed=0):
  return jax.random.uniform(
      jax.random.key(seed), (batch, height, width, channels))


def every(value, batch=6):
  return jnp.full(batch, value, jnp.float32)


class RandomTest(parameterized.TestCase):

  @parameterized.parameters(*_RANDOM)
  def test_is_a_function_of_the_key(self, name):
    function, x = jax.jit(_RANDOM[name]), images()
    one, again = (function(jax.random.key(1), x) for _ in range(2))
    other = function(jax.random.key(2), x)
    np.testing.assert_array_equal(one, again)
    self.assertFalse((one == other).all())
    for out in (one, other):
      self.assertEqual((out.shape, out.dtype), (x.shape, x.dtype))
      self.assertGreaterEqual(out.min(), 0)
      self.assertLessEqual(out.max(), 1)
      self.assertTrue(jnp.isfinite(out).all())

  def test_images_draw_apart(self):
    x = jnp.broadcast_to(images(1), (16, 12, 12, 3))
    a, b = jax.jit(augment.two_views)(jax.random.key(0), x)
    flat = np.concatenate([a, b]).reshape(32, -1)
    self.assertLen(np.unique(flat, axis=0), 32)

  @parameterized.parameters((8, 16), (28, 28), (7, 5))
  def test_nothing_is_the_identity(self, height, width):
    x = images(height=height, width=width)
    settings = _NOTHING._replace(aspect=(width / height,) * 2)
    got = jax.jit(lambda key: augment.view(key, x, settings))(
        jax.random.key(3))
    np.testing.assert_allclose(got, x, atol=2e-6)

  @parameterized.parameters(
      (augment.random_flip, {}), (augment.color_jitter, {}),
      (augment.random_grayscale, {}),
      (augment.random_blur, {'sigma': (1., 2.)}),
      (augment.random_solarise, {}))
  def test_probability(self, function, settings):
    x = images(200, 4, 4)
    changed = lambda p: float((jax.jit(
        lambda key: function(key, x, probability=p, **settings))(
            jax.random.key(5)) != x).any(axis=(1, 2, 3)).mean())
    self.assertEqual(changed(0.), 0)
    self.assertEqual(changed(1.), 1)
    self.assertBetween(changed(.3), .2, .4)

  def test_one_channel(self):
    x = images(channels=1)
    settings = augment.View(jitter=0., grayscale=0.)
    self.assertEqual(
        augment.view(jax.random.key(0), x, settings).shape, x.shape)


class CropTest(parameterized.TestCase):

  @parameterized.parameters((12, 12), (28, 28), (9, 14))
  def test_the_whole_area_is_the_image(self, height, width):
    x = images(height=height, width=width)
    got = augment.crop_and_resize(
        x, every(0.), every(0.), every(height), every(width))
    np.testing.assert_array_equal(got, x)

  def test_against_numpy(self):
    x = np.asarray(images(2, 8, 10))
    top, left, rows, columns = [1.3, 0.], [2., 4.1], [5., 8.], [6.5, 3.]
    got = augment.crop_and_resize(
        x, *map(jnp.array, (top, left, rows, columns)))
    for n in range(2):
      line = lambda start, length, size: np.clip(
          start + length * (np.arange(size) + .5) / size - .5,
          start, start + length - 1)
      expected = x[n]
      for axis, places in ((0, line(top[n], rows[n], 8)),
                           (1, line(left[n], columns[n], 10))):
        expected = np.apply_along_axis(
            lambda v, places: np.interp(places, np.arange(len(v)), v), axis,
            expected, places)
      np.testing.assert_allclose(got[n], expected, atol=1e-5)

  def test_area_and_aspect(self):
    # Where an image holds its own coordinates, the crop says what it is.
    size = 64
    line = jnp.linspace(0, 1, size)
    grid = jnp.stack(jnp.meshgrid(line, line, indexing='ij'), axis=-1)
    x = jnp.broadcast_to(grid, (300, *grid.shape))
    crop = jax.jit(lambda key: augment.random_resized_crop(
        key, x, (.25, .5), (.5, 2.)))(jax.random.key(0))
    # The first and the last pixel's centres are one box less one pixel apart.
    rows = 1 + (crop[:, -1, 0, 0] - crop[:, 0, 0, 0]) * (size - 1)
    columns = 1 + (crop[:, 0, -1, 1] - crop[:, 0, 0, 1]) * (size - 1)
    area, aspect = rows * columns / size**2, columns / rows
    self.assertBetween(float(area.min()), .25, .28)
    self.assertBetween(float(area.max()), .47, .5)
    self.assertBetween(float(aspect.min()), .5, .6)
    self.assertBetween(float(aspect.max()), 1.7, 2.)
    np.testing.assert_allclose(jnp.log(aspect).mean(), 0, atol=.1)

  def test_pad_crop_moves(self):
    x = images(50, 6, 7)
    got = np.asarray(augment.random_pad_crop(jax.random.key(0), x, 2))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    moves = set()
    for before, after in zip(padded, got):
      fits = [(i, j) for i in range(5) for j in range(5)
              if (before[i:i + 6, j:j + 7] == after).all()]
      self.assertLen(fits, 1)
      moves.add(fits[0])
    self.assertGreater(len(moves), 15)
    np.testing.assert_array_equal(
        augment.random_pad_crop(jax.random.key(0), x, 0), x)


class PixelTest(parameterized.TestCase):

  def test_flip_is_an_involution(self):
    x, where = images(), jnp.arange(6) % 2 == 0
    np.testing.assert_array_equal(
        augment.flip(augment.flip(x, where), where), x)
    once = augment.flip(x, where)
    np.testing.assert_array_equal(once[1], x[1])
    np.testing.assert_array_equal(once[0], x[0, :, ::-1])

  def test_hue_against_colorsys(self):
    corners = np.stack(np.meshgrid(*[(0., .5, 1.)] * 3), -1).reshape(-1, 3)
    x = np.concatenate([np.asarray(images()).reshape(-1, 3), corners])
    hsv = np.array([colorsys.rgb_to_hsv(*map(float, c)) for c in x])
    got = np.asarray(augment.rgb_to_hsv(jnp.asarray(x, jnp.float32)))
    turn = np.abs(got[:, 0] - hsv[:, 0])
    self.assertLess(np.minimum(turn, 1 - turn).max(), 1e-5)  # 0 is 1.
    np.testing.assert_allclose(got[:, 1:], hsv[:, 1:], atol=1e-5)
    back = np.array([colorsys.hsv_to_rgb(*map(float, c)) for c in x])
    np.testing.assert_allclose(
        augment.hsv_to_rgb(jnp.asarray(x, jnp.float32)), back, atol=1e-5)

  def test_a_turn_of_the_hue(self):
    x = images()
    np.testing.assert_allclose(
        augment.adjust_hue(x, every(0.)), x, atol=1e-5)
    np.testing.assert_allclose(
        augment.adjust_hue(x, every(1.)), x, atol=1e-5)
    third = augment.adjust_hue(x, every(1 / 3))
    np.testing.assert_allclose(third, jnp.roll(x, 1, axis=-1), atol=1e-5)

  @parameterized.parameters(
      augment.adjust_brightness, augment.adjust_contrast,
      augment.adjust_saturation)
  def test_a_factor_of_one_is_the_identity(self, function):
    x = images()
    np.testing.assert_allclose(function(x, every(1.)), x, atol=1e-6)

  def test_factors(self):
    x = .25 + images() / 2
    gray = np.asarray(x) @ np.array([.299, .587, .114])
    np.testing.assert_allclose(
        augment.adjust_brightness(x, every(1.2)), 1.2 * x, atol=1e-6)
    mean = gray.mean(axis=(1, 2))[:, None, None, None]
    np.testing.assert_allclose(
        augment.adjust_contrast(x, every(.6)), .6 * x + .4 * mean, atol=1e-6)
    np.testing.assert_allclose(
        augment.adjust_saturation(x, every(.6)),
        .6 * x + .4 * gray[..., None], atol=1e-6)

  def test_blur_against_numpy(self):
    size, sigma = 44, 1.3  # A tenth of 44 pixels: two to each side.
    x = np.asarray(images(1, size, size, 1))
    taps = np.exp(-np.arange(-2, 3)**2 / (2 * sigma**2))
    taps /= taps.sum()
    expected = x[0, :, :, 0]
    for axis in (0, 1):
      expected = np.apply_along_axis(
          lambda v: np.convolve(v, taps, 'same'), axis, expected)
    got = augment.blur(x, jnp.array([sigma]))[0, :, :, 0]
    np.testing.assert_allclose(
        got[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)
    np.testing.assert_allclose(augment.blur(x, jnp.zeros(1)), x, atol=1e-6)
    np.testing.assert_allclose(
        augment.blur(jnp.full_like(x, .3), jnp.array([sigma])), .3, atol=1e-6)

  def test_solarise_twice(self):
    x = jnp.array([.2, .5, .9])
    np.testing.assert_allclose(augment.solarise(x), [.2, .5, .1], atol=1e-6)


class ErrorsTest(parameterized.TestCase):

  @parameterized.parameters(
      ({'area': (0., 1.)}, '`area` must be'),
      ({'area': (.5, 1.5)}, '`area` must be .*at most 1.0'),
      ({'aspect': (2., 1.)}, '`aspect` must be'),
      ({'flip': 1.5}, r'`probability` must be in \[0, 1\], got 1.5'),
      ({'brightness': -.1}, '`brightness` must be at least 0'),
      ({'hue': .6}, '`hue` must be at least 0 and at most .5'),
      ({'sigma': (-1., 1.)}, '`sigma` must be'))
  def test_settings(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      augment.view(jax.random.key(0), images(), augment.View(**changes))

  @parameterized.parameters(
      ((2, 8, 8), jnp.float32, '`images` must be floats'),
      ((2, 8, 8, 3), jnp.uint8, r'`images` must be .*got uint8.*by 255'),
      ((2, 8, 8, 1), jnp.float32, 'red, green and blue, got 1'))
  def test_images(self, shape, dtype, message):
    with self.assertRaisesRegex(ValueError, message):
      augment.view(jax.random.key(0), jnp.ones(shape, dtype))

  def test_padding(self):
    with self.assertRaisesRegex(ValueError, '`padding` must be a whole numb'):
      augment.random_pad_crop(jax.random.key(0), images(), -1)


class DocumentationTest(absltest.TestCase):

  def test_examples(self):
    self.assertFalse(doctest.testmod(
        augment, optionflags=doctest.NORMALIZE_WHITESPACE).failed)


if __name__ == '__main__':
  absltest.main()
