"""The command line: see the package."""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

# Before JAX is imported: one device, and one cache of what is compiled.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=1')
_HOME = tempfile.TemporaryDirectory(prefix='bpjax-faults-')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{_HOME.name}/compiled')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

from tests.faults import harness


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.faults')
  parser.add_argument('--faults', type=int, default=200)
  parser.add_argument('--first', type=int, default=0, help='The first number.')
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--output', help='A JSON file for the table.')
  arguments = parser.parse_args()
  begin = time.monotonic()
  faults = harness.Harness(pathlib.Path(_HOME.name))
  numbers = range(arguments.first, arguments.first + arguments.faults)
  outcomes = []
  # Forked, as nothing here has used JAX; and each forks on by itself.
  with multiprocessing.get_context('fork').Pool(arguments.workers) as pool:
    for outcome in pool.imap(faults.run, numbers):
      outcomes.append(outcome)
      if outcome.outcome in (harness.WRONG, harness.LOST):
        print(f'{outcome.number} {outcome.outcome}: {outcome.what}: '
              f'{outcome.why}\n', flush=True)
  table = harness.table(outcomes)
  print('| fault | ' + ' | '.join(harness.OUTCOMES) + ' |')
  print('| --- ' * (1 + len(harness.OUTCOMES)) + '|')
  for kind, counts in table.items():
    print(f'| {kind} | ' + ' | '.join(map(str, counts.values())) + ' |')
  total = {o: sum(c[o] for c in table.values()) for o in harness.OUTCOMES}
  print('| all | ' + ' | '.join(map(str, total.values())) + ' |')
  stopped = sorted(o.stopped for o in outcomes if o.stopped)
  pool.join()
  cores = sum(os.times()[:4])
  print(f'{len(outcomes)} faults in {time.monotonic() - begin:.0f} s, of which '
        f'{cores:.0f} s of a core; after a signal the longest command took '
        f'{max(stopped, default=0):.2f} s')
  if arguments.output:
    from experiments import measurement  # It uses JAX: after all forks.
    with open(arguments.output, 'w', encoding='utf-8') as file:
      json.dump({
          'command': ' '.join(['python -m tests.faults', *sys.argv[1:]]),
          'machine': measurement.machine(),
          'date': datetime.date.today().isoformat(),
          'faults': len(outcomes), 'seconds_of_a_core': round(cores),
          'total': total, 'table': table,
          'seconds_after_a_signal': {
              'median': stopped[len(stopped) // 2] if stopped else None,
              'longest': max(stopped, default=None)},
          'not_survived': [
              dataclasses.asdict(o) for o in outcomes
              if o.outcome in (harness.WRONG, harness.LOST)]}, file, indent=1)
      file.write('\n')
  return 1 if total[harness.WRONG] or total[harness.LOST] else 0


if __name__ == '__main__':
  CODE = main()
  _HOME.cleanup()
  sys.exit(CODE)
