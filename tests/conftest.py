"""Settings of all tests: eight CPU devices, and quick compilation."""

import gc
import importlib.util
import mmap
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

# Of flags that jaxlib does not know, XLA aborts: what is optional is looked up.
_OPTIONAL_FLAGS = (
    'xla_cpu_use_fusion_emitters=false',
    'xla_cpu_parallel_codegen_split_count=1')


def _known_to_xla(flag: str) -> bool:
  """Whether the name of `flag` stands in the library of jaxlib."""
  spec = importlib.util.find_spec('jaxlib')
  library = pathlib.Path(spec.origin).parent / 'libjax_common.so'
  if not library.exists():
    return False
  with library.open('rb') as file, mmap.mmap(
      file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return content.find(flag.partition('=')[0].encode()) >= 0


os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling dominates the time of tests on tiny models: leave out what LLVM does
# for speed. Code that is emitted by way of MLIR, and in several modules a
# program, takes twice as long to compile.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    *(f'--{flag}' for flag in _OPTIONAL_FLAGS if _known_to_xla(flag))])

# What is traced is kept: millions of objects, which the collector would visit again
# and again.
gc.set_threshold(200_000, 50, 1000)

# Many tests compile what another has compiled: one cache for all of a run, its
# workers and the scripts that it starts. The process that makes it removes it.
_CACHE = ''
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix='bpjax-tests-')
  os.environ |= {
      'JAX_COMPILATION_CACHE_DIR': _CACHE,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}


@pytest.fixture(autouse=True)
def _registered_rules():
  """Rules that a test registers are its own."""
  yield
  rules = sys.modules.get('bpjax.rules')
  for name in list(rules._REGISTERED) if rules else ():
    del rules._REGISTERED[name], vars(rules)[name]
    rules._NAMES = rules._LIBRARY


def pytest_unconfigure():
  if _CACHE:
    shutil.rmtree(_CACHE, ignore_errors=True)
