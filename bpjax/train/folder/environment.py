"""What changes a run's results besides its config, to be compared later."""

from __future__ import annotations

import hashlib
from typing import Any

from bpjax.train import data as data_lib
import jax
import jaxlib.version
import numpy as np

_SETTINGS = (
    'jax_default_prng_impl', 'jax_enable_x64', 'jax_threefry_partitionable')


def settings() -> dict[str, Any]:
  """Settings of JAX under which the same seed gives other numbers.

  Example:
    >>> settings()['settings']['jax_default_prng_impl']
    'threefry2x32'
  """
  return {'settings': {name: getattr(jax.config, name) for name in _SETTINGS}}


def describe(dataset: data_lib.Dataset) -> dict[str, Any]:
  """The settings, the data, and what may change the last bits of a result."""
  return settings() | {
      'data': {'fingerprint': fingerprint(dataset)},
      'machine': {
          'device_count': jax.device_count(),
          # A run of before there were several has no such line.
          **({'process_count': jax.process_count()}
             if jax.process_count() > 1 else {}),
          'device_kind': jax.devices()[0].device_kind,
          'jax_default_matmul_precision':
              jax.config.jax_default_matmul_precision,
          'jax': jax.__version__, 'jaxlib': jaxlib.version.__version__,
      }}


def fingerprint(dataset: data_lib.Dataset) -> str:
  """A hash of all examples with their labels.

  Of a stream, which is too large to be read for that: of what
  `Prepared.fingerprint` covers, and of which examples they are.
  """
  digest = hashlib.blake2b(digest_size=16)
  for split in (dataset.train, dataset.validation, dataset.test):
    if isinstance(split, data_lib.Stream):
      digest.update(split.fingerprint.encode())
    elif split is None:
      digest.update(b'none')
    else:
      for array in jax.tree.leaves(tuple(split)):
        digest.update(f'{array.dtype} {array.shape}'.encode())
        digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()
