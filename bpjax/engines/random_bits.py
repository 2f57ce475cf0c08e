"""Random bits that cost little on a CPU: what random signs are made of.

Parallel random numbers: as easy as 1, 2, 3, Salmon, Moraes, Dror and Shaw, SC
2011 (https://doi.org/10.1145/2063384.2063405).
"""

from bpjax import base
import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def words(key: base.Key, count: int) -> base.Array:
  """`jax.random.bits(key, (count,))`, the same bits, for most keys faster.

  On CPUs jax compiles Threefry to a loop that copies what it carries, its keys
  and rotations among it: up to a tenth of a small step. Here the loop carries the
  words alone. (Written out, without a loop, XLA would do it all again for each of
  the 32 signs of a word.) For a key of another generator jax is asked.

  Args:
    key: a random key.
    count: how many words.

  Returns:
    uint32 `[count]`.

  Example:
    >>> import jax
    >>> words(jax.random.key(0), 3).shape
    (3,)
  """
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if (count >= 2**32 or not jax.config.jax_threefry_partitionable
      or str(jax.random.key_impl(key)) != 'threefry2x32'):
    return jax.random.bits(key, (count,), jnp.uint32)
  first, second = jax.random.key_data(key)
  keys = jnp.stack([first, second, first ^ second ^ jnp.uint32(_PARITY)])
  rotations = jnp.array(_ROTATIONS, jnp.uint32)

  def rounds(i, pair):
    a, b = pair
    for rotation in rotations[i % 2]:
      a = a + b
      b = a ^ ((b << rotation) | (b >> (32 - rotation)))
    return a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + (i + 1)

  counts = jax.lax.iota(jnp.uint32, count)
  start = jnp.broadcast_to(first, count), counts + second
  a, b = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(5), rounds, start)
  return a ^ b
