"""Settings of all tests: eight CPU devices, and quick compilation."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling dominates the time of tests on tiny models: leave out what LLVM does
# for speed.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true'])
