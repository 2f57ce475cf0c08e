"""Augmentation on the device: pure functions of a key and a batch of images.

Images are floats in [0, 1], [batch, height, width, channels], and stay so. Each
image draws its own numbers; the same key gives the same images, on any number
of devices. Crops and blurs are two small matrices an image, one for its rows
and one for its columns, so that all of a batch is two batched products.

  A simple framework for contrastive learning of visual representations, Chen,
  Kornblith, Norouzi and Hinton, ICML 2020 (https://arxiv.org/abs/2002.05709),
  Appendix A: crop, flip, jitter, grayscale and blur.
  Bootstrap your own latent, Grill et al., NeurIPS 2020
  (https://arxiv.org/abs/2006.07733), Appendix B: solarise, and two views that
  differ in blur and solarise.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_GRAY = (.299, .587, .114)  # Weights of red, green and blue (ITU-R BT.601).
_ATTEMPTS = 10


class View(NamedTuple):
  """What one view of an image goes through, in this order.

  Attributes:
    area: the crop's share of the image's area, (least, most).
    aspect: the crop's width over its height, (least, most).
    flip: probability of a horizontal flip.
    jitter: probability of the colour jitter.
    brightness: its strength: a factor in [1 - b, 1 + b].
    contrast: the same.
    saturation: the same.
    hue: its strength: a turn in [-h, h] of the circle of hues, at most .5.
    grayscale: probability of losing all colour.
    blur: probability of a Gaussian blur.
    sigma: its standard deviation in pixels, (least, most).
    solarise: probability of inverting all values of at least .5.

  Example:
    >>> supervised = View(area=(.3, 1.), blur=0., grayscale=0.)
  """
  area: tuple[float, float] = (.08, 1.)
  aspect: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = .5
  jitter: float = .8
  brightness: float = .4
  contrast: float = .4
  saturation: float = .2
  hue: float = .1
  grayscale: float = .2
  blur: float = 1.
  sigma: tuple[float, float] = (.1, 2.)
  solarise: float = 0.


FIRST = View()
SECOND = View(blur=.1, solarise=.2)


# `(key, images) -> images [views * batch, ...]`, one view after the other.
Augment = Callable[[jax.Array, jax.Array], jax.Array]


def crop_flip(padding: int = 4) -> Augment:
  """Images moved by up to `padding` pixels and flipped: one view.

  Raises:
    ValueError: for a padding that is no whole number of at least 0.

  Example:
    >>> augment = crop_flip()
    >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 3)
  """
  _check_padding(padding)

  def augment(key, images):
    crop_key, flip_key = jax.random.split(key)
    return random_flip(flip_key, random_pad_crop(crop_key, images, padding))

  return augment


def contrastive(area: float = .08) -> Augment:
  """`two_views` of every image; without what changes colours for gray images.

  Args:
    area: the least share of the image that a view shows; .08 in SimCLR, .3 to
      .5 in the text of Scaling forward gradient with local losses.

  Raises:
    ValueError: for an `area` outside (0, 1].

  Example:
    >>> augment = contrastive(area=.3)
    >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (4, 8, 8, 1)
  """
  _check_range('area', (area, 1.), 1.)

  def augment(key, images):
    changes = {'area': (area, 1.)}
    if images.shape[-1] == 1:
      changes |= {'jitter': 0., 'grayscale': 0.}
    views = two_views(
        key, images, FIRST._replace(**changes), SECOND._replace(**changes))
    return jnp.concatenate(views)

  return augment


AUGMENTS = {'crop_flip': crop_flip, 'contrastive': contrastive}


def two_views(
    key: jax.Array, images: jax.Array, first: View = FIRST,
    second: View = SECOND) -> tuple[jax.Array, jax.Array]:
  """Two views of every image, independent of each other.

  Args:
    key: a random key.
    images: in [0, 1], `[batch, height, width, 3]`.
    first: of one view.
    second: of the other; blurred less often, and sometimes solarised.

  Returns:
    Two arrays in the shape of `images`.

  Raises:
    ValueError: for images or settings that do not fit.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    >>> a, b = two_views(jax.random.key(1), images)
    >>> a.shape
    (2, 8, 8, 3)
  """
  first_key, second_key = jax.random.split(key)
  return view(first_key, images, first), view(second_key, images, second)


def view(
    key: jax.Array, images: jax.Array, settings: View = FIRST) -> jax.Array:
  """One view of every image: everything that `View` lists.

  Args:
    key: a random key.
    images: in [0, 1], `[batch, height, width, 3]`; one channel where `jitter`
      and `grayscale` are 0.
    settings: what happens with which probability.

  Returns:
    An array in the shape of `images`.

  Raises:
    ValueError: for images or settings that do not fit.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    >>> gray = View(jitter=0., grayscale=0.)
    >>> view(jax.random.key(1), images, gray).shape
    (2, 8, 8, 1)
  """
  s = settings
  keys = jax.random.split(key, 6)
  images = random_resized_crop(keys[0], images, s.area, s.aspect)
  images = random_flip(keys[1], images, s.flip)
  images = color_jitter(
      keys[2], images, s.brightness, s.contrast, s.saturation, s.hue, s.jitter)
  images = random_grayscale(keys[3], images, s.grayscale)
  images = random_blur(keys[4], images, s.sigma, s.blur)
  return random_solarise(keys[5], images, s.solarise)


def random_resized_crop(
    key: jax.Array, images: jax.Array, area: tuple[float, float] = (.08, 1.),
    aspect: tuple[float, float] = (3 / 4, 4 / 3)) -> jax.Array:
  """A random part of each image, brought back to the whole size.

  Ten boxes are drawn, area uniform and aspect log-uniform, and the first that
  fits into the image is taken; where none does, the whole image.

  Args:
    key: a random key.
    images: `[batch, height, width, channels]`.
    area: the box's share of the image's area, (least, most).
    aspect: the box's width over its height, (least, most).

  Returns:
    An array in the shape of `images`.

  Raises:
    ValueError: for shares outside (0, 1], or ranges that are empty.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    >>> whole = random_resized_crop(
    ...     jax.random.key(1), images, (1., 1.), (1., 1.))
    >>> bool((whole == images).all())
    True
  """
  _check_images(images)
  _check_range('area', area, 1.)
  _check_range('aspect', aspect, math.inf)
  batch, height, width, _ = images.shape
  area_key, aspect_key, row_key, column_key = jax.random.split(key, 4)
  shape = (batch, _ATTEMPTS)
  share = _uniform(area_key, shape, *area) * (height * width)
  ratio = jnp.exp(_uniform(aspect_key, shape, *map(math.log, aspect)))
  rows, columns = jnp.sqrt(share / ratio), jnp.sqrt(share * ratio)
  # Rounding must not refuse a box that is the whole image.
  fits = (rows <= height * (1 + 1e-6)) & (columns <= width * (1 + 1e-6))
  first = jnp.argmax(fits, axis=1)[:, None]
  pick = lambda x, whole: jnp.where(
      fits.any(axis=1),
      jnp.minimum(jnp.take_along_axis(x, first, axis=1)[:, 0], whole), whole)
  rows, columns = pick(rows, height), pick(columns, width)
  top = jax.random.uniform(row_key, (batch,)) * (height - rows)
  left = jax.random.uniform(column_key, (batch,)) * (width - columns)
  return crop_and_resize(images, top, left, rows, columns)


def crop_and_resize(
    images: jax.Array, top: jax.Array, left: jax.Array, rows: jax.Array,
    columns: jax.Array) -> jax.Array:
  """A box of each image, interpolated linearly to the whole size.

  Nothing outside the box is read: beyond the centres of its outermost pixels
  they are repeated.

  Args:
    images: `[batch, height, width, channels]`.
    top: upper edge of each box, `[batch]`, in pixels; need not be whole.
    left: its left edge, `[batch]`.
    rows: its height, `[batch]`.
    columns: its width, `[batch]`.

  Returns:
    An array in the shape of `images`.

  Example:
    >>> images = jnp.arange(16.).reshape(1, 4, 4, 1) / 16
    >>> one = lambda value: jnp.full(1, value)
    >>> crop_and_resize(images, one(1.), one(0.), one(2.), one(4.))[0, :, 0, 0]
    Array([0.25  , 0.3125, 0.4375, 0.5   ], dtype=float32)
  """
  _check_images(images)
  return _mix(
      images, _interpolation(images.shape[1], top, rows),
      _interpolation(images.shape[2], left, columns))


def random_pad_crop(
    key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
  """Each image moved by up to `padding` pixels, zeros where none was.

  Args:
    key: a random key.
    images: `[batch, height, width, channels]`.
    padding: pixels; 0 changes nothing.

  Returns:
    An array in the shape of `images`.

  Raises:
    ValueError: for a padding that is no whole number of at least 0.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    >>> random_pad_crop(jax.random.key(1), images, 2).shape
    (2, 8, 8, 3)
  """
  _check_images(images)
  _check_padding(padding)
  edge = (padding, padding)
  padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
  start = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
  return jax.vmap(lambda image, s: jax.lax.dynamic_slice(
      image, (s[0], s[1], 0), images.shape[1:]))(padded, start)


def flip(images: jax.Array, where: jax.Array | bool = True) -> jax.Array:
  """Images flipped from left to right.

  Args:
    images: `[batch, height, width, channels]`.
    where: which of them, bools `[batch]`.

  Example:
    >>> flip(jnp.arange(3.).reshape(1, 1, 3, 1))[0, 0, :, 0]
    Array([2., 1., 0.], dtype=float32)
  """
  _check_images(images)
  return _choose(where, images[:, :, ::-1], images)


def random_flip(
    key: jax.Array, images: jax.Array, probability: float = .5) -> jax.Array:
  """Flips each image from left to right with some probability.

  Example:
    >>> images = jnp.ones((2, 4, 4, 3))
    >>> random_flip(jax.random.key(0), images).shape
    (2, 4, 4, 3)
  """
  return _sometimes(key, probability, images, lambda key: flip(images))


def color_jitter(
    key: jax.Array, images: jax.Array, brightness: float = .4,
    contrast: float = .4, saturation: float = .2, hue: float = .1,
    probability: float = .8) -> jax.Array:
  """Brightness, contrast, saturation and hue of each image, at random.

  In this order always (the papers draw the order, too); a strength of 0 leaves
  its step out.

  Args:
    key: a random key.
    images: `[batch, height, width, 3]`.
    brightness: a factor in [1 - b, 1 + b], and at least 0.
    contrast: the same, of the distance to the image's mean gray.
    saturation: the same, of the distance to each pixel's gray.
    hue: a turn in [-h, h]; at most .5, half of the circle.
    probability: that an image is changed at all.

  Returns:
    An array in the shape of `images`, cut off at 0 and 1 after each step.

  Raises:
    ValueError: for negative strengths, a hue above .5, or images without three
      channels.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
    >>> color_jitter(jax.random.key(1), images).shape
    (2, 4, 4, 3)
  """
  strengths = {
      'brightness': brightness, 'contrast': contrast, 'saturation': saturation,
      'hue': hue}
  for name, strength in strengths.items():
    if not 0 <= strength <= (.5 if name == 'hue' else math.inf):
      raise ValueError(
          f'`{name}` must be at least 0{" and at most .5" * (name == "hue")}, '
          f'got {strength}.')

  def change(key):
    changed = images
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for step, (name, strength), step_key in zip(
        steps, strengths.items(), jax.random.split(key, len(steps))):
      if strength:
        center = 0. if name == 'hue' else 1.
        least = center - strength if name == 'hue' else max(0, 1 - strength)
        changed = step(changed, _uniform(
            step_key, (len(images),), least, center + strength))
    return changed

  return _sometimes(key, probability, images, change)


def adjust_brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
  """Images `[batch, height, width, channels]` times `factor`, `[batch]`.

  Example:
    >>> adjust_brightness(jnp.full((1, 1, 1, 1), .25), jnp.array([2.])).item()
    0.5
  """
  return jnp.clip(images * _each(factor), 0, 1)


def adjust_contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
  """The distance to the image's mean gray times `factor`, `[batch]`.

  Example:
    >>> images = jnp.array([.25, .75]).reshape(1, 1, 2, 1) * jnp.ones(3)
    >>> adjust_contrast(images, jnp.zeros(1))[0, 0, :, 0]
    Array([0.5, 0.5], dtype=float32)
  """
  mean = _gray(images).mean(axis=(1, 2), keepdims=True)
  return _blend(images, mean, factor)


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
  """The distance to each pixel's gray times `factor`, `[batch]`.

  Example:
    >>> images = jnp.ones((1, 2, 2, 3)) / 2
    >>> adjust_saturation(images, jnp.zeros(1)).shape
    (1, 2, 2, 3)
  """
  return _blend(images, _gray(images), factor)


def adjust_hue(images: jax.Array, turn: jax.Array) -> jax.Array:
  """Every hue turned by `turn`, `[batch]`, where 1 is the whole circle.

  Example:
    >>> red = jnp.array([1., 0., 0.]).reshape(1, 1, 1, 3)
    >>> adjust_hue(red, jnp.array([1 / 3]))[0, 0, 0].round(5) + 0
    Array([0., 1., 0.], dtype=float32)
  """
  hsv = rgb_to_hsv(images)
  hue = (hsv[..., :1] + _each(turn)) % 1.
  return hsv_to_rgb(jnp.concatenate([hue, hsv[..., 1:]], axis=-1))


def rgb_to_hsv(images: jax.Array) -> jax.Array:
  """Red, green, blue to hue, saturation, value, all in [0, 1].

  Args:
    images: `[..., 3]`.

  Returns:
    An array in the shape of `images`; the hue of a gray is 0.

  Raises:
    ValueError: for another number of channels.

  Example:
    >>> rgb_to_hsv(jnp.array([0., 1., 0.])).round(4)
    Array([0.3333, 1.    , 1.    ], dtype=float32)
  """
  _check_colors(images)
  red, green, blue = jnp.moveaxis(images, -1, 0)
  value, least = images.max(axis=-1), images.min(axis=-1)
  spread = value - least
  safe = jnp.where(spread > 0, spread, 1)
  sixths = jnp.where(
      value == red, (green - blue) / safe, jnp.where(
          value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
  hue = jnp.where(spread > 0, sixths / 6 % 1., 0)
  saturation = spread / jnp.where(value > 0, value, 1)
  return jnp.stack([hue, saturation, value], axis=-1)


def hsv_to_rgb(images: jax.Array) -> jax.Array:
  """The inverse of `rgb_to_hsv`.

  Example:
    >>> hsv_to_rgb(jnp.array([2 / 3, 1., 1.])).round(4) + 0
    Array([0., 0., 1.], dtype=float32)
  """
  _check_colors(images)
  hue, saturation, value = (images[..., i:i + 1] for i in range(3))
  # Each channel is a trapezium around its own place on the circle of hues.
  place = (jnp.array([5., 3., 1.], images.dtype) + 6 * hue) % 6
  share = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
  return jnp.clip(value * (1 - saturation * share), 0, 1)


def random_grayscale(
    key: jax.Array, images: jax.Array, probability: float = .2) -> jax.Array:
  """Each image `[batch, height, width, 3]` made gray, with some probability.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
    >>> gray = random_grayscale(jax.random.key(1), images, 1.)
    >>> bool((gray[..., 0] == gray[..., 2]).all())
    True
  """
  def gray(key):
    del key
    return jnp.broadcast_to(_gray(images), images.shape)

  return _sometimes(key, probability, images, gray)


def blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
  """Gaussian blur within a tenth of the image, as SimCLR has it.

  Args:
    images: `[batch, height, width, channels]`.
    sigma: standard deviation in pixels, `[batch]`; 0 changes nothing.

  Returns:
    An array in the shape of `images`; at an edge, the mean of what is there.

  Example:
    >>> blur(jnp.ones((1, 8, 8, 3)), jnp.ones(1)).shape
    (1, 8, 8, 3)
  """
  _check_images(images)
  return _mix(images, *(_gaussian(n, sigma) for n in images.shape[1:3]))


def random_blur(
    key: jax.Array, images: jax.Array,
    sigma: tuple[float, float] = (.1, 2.), probability: float = .5
) -> jax.Array:
  """Blurs each image by a `sigma` within its range, with some probability.

  Example:
    >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    >>> random_blur(jax.random.key(1), images, probability=1.).shape
    (2, 8, 8, 3)
  """
  _check_range('sigma', sigma, math.inf)
  return _sometimes(
      key, probability, images,
      lambda key: blur(images, _uniform(key, (len(images),), *sigma)))


def solarise(images: jax.Array, threshold: float = .5) -> jax.Array:
  """Values of at least `threshold` are inverted: v becomes 1 - v.

  Example:
    >>> solarise(jnp.array([.25, .75]))
    Array([0.25, 0.25], dtype=float32)
  """
  return jnp.where(images >= threshold, 1 - images, images)


def random_solarise(
    key: jax.Array, images: jax.Array, probability: float = .2,
    threshold: float = .5) -> jax.Array:
  """Solarises each image with some probability.

  Example:
    >>> random_solarise(jax.random.key(0), jnp.ones((2, 4, 4, 3))).shape
    (2, 4, 4, 3)
  """
  return _sometimes(
      key, probability, images, lambda key: solarise(images, threshold))


def _sometimes(key, probability, images, change):
  """`change(key)` for each image with `probability`, else the image."""
  _check_images(images)
  if not 0 <= probability <= 1:
    raise ValueError(f'`probability` must be in [0, 1], got {probability}.')
  if probability == 0:
    return images
  which_key, change_key = jax.random.split(key)
  where = jax.random.bernoulli(which_key, probability, (len(images),))
  return _choose(where, change(change_key), images)


def _uniform(key, shape, least, most):
  return jax.random.uniform(key, shape, minval=least, maxval=most)


def _each(values):
  return values[:, None, None, None]


def _choose(where, changed, images):
  where = jnp.broadcast_to(where, images.shape[:1])
  return jnp.where(_each(where), changed, images)


def _gray(images):
  if images.shape[-1] == 1:
    return images
  _check_colors(images)
  weights = jnp.array(_GRAY, images.dtype)
  return jnp.sum(images * weights, axis=-1, keepdims=True)


def _blend(images, other, factor):
  factor = _each(factor)
  return jnp.clip(factor * images + (1 - factor) * other, 0, 1)


def _mix(images, rows, columns):
  """Rows and columns of each image mixed: `rows`, `columns` [batch, n, n]."""
  mixed = jnp.einsum(
      'brh,bhwc,bsw->brsc', rows, images, columns,
      precision=jax.lax.Precision.HIGHEST)
  # The weights of a pixel add up to 1, but for rounding.
  return jnp.clip(mixed, 0, 1)


def _interpolation(size, start, length):
  """Linear interpolation of `size` points within each box, [batch, n, n]."""
  start, length = start[:, None], length[:, None]
  # The whole line is left as it is, exactly: its step is 1.
  places = start + length / size * (jnp.arange(size) + .5) - .5
  places = jnp.clip(places, start, start + jnp.maximum(length - 1, 0))
  distance = jnp.abs(places[..., None] - jnp.arange(size))
  return jnp.maximum(0, 1 - distance)


def _gaussian(size, sigma):
  """The blur of a line of `size` pixels, [batch, n, n]."""
  distance = jnp.arange(size)[:, None] - jnp.arange(size)
  reach = max(1, size // 20)
  scaled = distance / jnp.maximum(sigma, 1e-6)[:, None, None]
  weights = jnp.where(jnp.abs(distance) <= reach, jnp.exp(-scaled**2 / 2), 0)
  return weights / weights.sum(axis=-1, keepdims=True)


def _check_images(images):
  if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
        '`images` must be floats [batch, height, width, channels] in [0, 1], '
        f'got {images.dtype}{list(images.shape)}; divide bytes by 255.')


def _check_padding(padding):
  if int(padding) != padding or padding < 0:
    raise ValueError(
        f'`padding` must be a whole number of at least 0, got {padding}.')


def _check_colors(images):
  if images.shape[-1] != 3:
    raise ValueError(
        '`images` must have the three channels red, green and blue, got '
        f'{images.shape[-1]}; leave out what changes colours.')


def _check_range(name, bounds, most):
  if not (len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= most):
    limit = '' if most == math.inf else f', at most {most}'
    raise ValueError(
        f'`{name}` must be (least, most) with 0 < least <= most{limit}, got '
        f'{tuple(bounds)}.')
