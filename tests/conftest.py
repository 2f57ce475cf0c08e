"""Settings of all tests: eight CPU devices, and quick compilation."""

import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling dominates the time of tests on tiny models: leave out what LLVM does
# for speed.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true'])

# Many tests compile what another has compiled: one cache for all of a run, its
# workers and the scripts that it starts. The process that makes it removes it.
_CACHE = ''
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix='bpjax-tests-')
  os.environ |= {
      'JAX_COMPILATION_CACHE_DIR': _CACHE,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}


def pytest_unconfigure():
  if _CACHE:
    shutil.rmtree(_CACHE, ignore_errors=True)
