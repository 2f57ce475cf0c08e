"""Two processes as one run: equal results, and every way in which one can end.

  python scripts/two_processes.py [--rules=backprop,...] [--seeds=0,1] \
      [--output=results/two_processes.json]

Two processes with four CPU devices each, over the loopback interface, against
one process with eight; digits, batches of 64.

1. Each rule trains two epochs (LG-FG-A on LocalMixer one). Must hold: every
   loss and accuracy of the metrics is that of one process to 1e-4. Sums over
   devices are taken in another order, so that the last bits differ.
2. A run of 20 epochs is stopped at a process: by SIGTERM, upon which both have to
   save, and to end with 0 within ten seconds; by SIGKILL, upon which the other
   has to end with 5, one sentence, and within 30 seconds (a heartbeat of 10).
   The same commands then go on. Must hold: metrics as without a stop, to the
   bit.
3. What two processes began goes on in one process of eight devices, and in one
   of four: 1e-4 again.
4. One process comes, the other never does: one sentence, exit code 5.

About half an hour on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import flags
from experiments import measurement

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_TOLERANCE = 1e-4
_DIGITS = '--config=experiments/configs/quickstart.py'
_MIXER = '--config=experiments/configs/local_mixer.py:LG-FG-A:m/1/16:digits'
_HEARTBEAT, _BOUND, _SOON = 10, 30., 10.  # Seconds.


def _mlp(rule):
  return (
      _DIGITS, f'--config.rule={rule}', '--config.epochs=2',
      '--config.alignment_every=0')


RULES = {
    **{rule: _mlp(rule) for rule in (
        'backprop', 'feedback_alignment', 'direct_feedback_alignment',
        'kolen_pollack', 'weight_mirror', 'forward_gradient')},
    'LG-FG-A': (
        _MIXER, '--config.validation=0', '--config.epochs=1',
        '--config.batch_size=64', '--config.eval_batch_size=360'),
}
STOPPED = (
    _DIGITS, '--config.rule=kolen_pollack', '--config.epochs=20',
    '--config.alignment_every=0', '--config.checkpoint_every=11')


class Group:
  """The processes of one run.

  Example:
    >>> Group('runs/two', RULES['backprop'], cache='runs/cache').wait()
    [0, 0]
  """

  def __init__(
      self, folder: str | os.PathLike, config: Sequence[str], count: int = 2,
      devices: int = 4, cache: str | os.PathLike = '',
      flags: Sequence[str] = (f'--heartbeat={_HEARTBEAT}',),
      only: Sequence[int] | None = None):
    """Starts them.

    Args:
      folder: of the run.
      config: flags of the launcher.
      count: how many processes; 1: one that meets nobody.
      devices: of each process.
      cache: where compiled programs are kept.
      flags: others, where there are several.
      only: which processes to start; None: all.
    """
    self.folder = pathlib.Path(folder)
    # The last flag of a name wins.
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join([
            os.environ.get('XLA_FLAGS', ''),
            f'--xla_force_host_platform_device_count={devices}'])}
    if cache:
      environment |= {
          'JAX_COMPILATION_CACHE_DIR': str(cache),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
    where = f'--coordinator=127.0.0.1:{_free_port()}'
    self.begin = time.monotonic()
    self._errors = []
    self.processes = []
    for i in range(count) if only is None else only:
      each = [where, f'--num_processes={count}', f'--process_id={i}', *flags]
      error = tempfile.TemporaryFile('w+')  # A pipe that is full would wait.
      self._errors.append(error)
      self.processes.append(subprocess.Popen(
          [sys.executable, '-m', 'experiments.main', f'--workdir={folder}',
           *config, *(each if count > 1 else [])],
          cwd=_ROOT, env=environment, text=True, stderr=error,
          stdout=subprocess.DEVNULL))

  def wait(self, timeout: float = 600.) -> list[int]:
    """Waits until all have ended; returns their exit codes."""
    until = time.monotonic() + timeout
    try:
      return [p.wait(max(until - time.monotonic(), .1)) for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def errors(self) -> list[str]:
    """What each has written to standard error."""
    found = []
    for error in self._errors:
      error.seek(0)
      found.append(error.read())
    return found

  def stop(self, index: int, number: int, step: int = 44,
           timeout: float = 300.) -> tuple[list[int], float]:
    """Sends one process a signal once the metrics have reached a step.

    Returns:
      All exit codes, and the seconds that it took until all had ended.
    """
    until = time.monotonic() + timeout
    while not any(line['step'] >= step for line in metrics(self.folder)):
      if time.monotonic() > until or self.processes[0].poll() is not None:
        raise RuntimeError(f'step {step} was not reached: {self.errors()}')
      time.sleep(.05)
    self.processes[index].send_signal(number)
    begin = time.monotonic()
    return self.wait(timeout), time.monotonic() - begin


def metrics(folder: str | os.PathLike) -> list[dict]:
  """The whole lines of a run's metrics; none where there is no file yet."""
  path = pathlib.Path(folder) / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [json.loads(t) for t in text.splitlines(True) if t.endswith('\n')]


def difference(one: str | os.PathLike, other: str | os.PathLike) -> float:
  """The largest difference of losses and accuracies in two runs' metrics."""
  pairs = list(zip(metrics(one), metrics(other), strict=True))
  assert pairs and all(
      (a['step'], a['split']) == (b['step'], b['split']) for a, b in pairs)
  return max(
      abs(a[k] - b[k]) for a, b in pairs for k in ('loss', 'accuracy'))


def _free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def _sentences(text):
  """The lines of a log that tell of no step."""
  return [line for line in text.splitlines() if not re.match('step ', line)]


def _rules(folder, cache, seeds, labels, wrong):
  rows = {}
  for label in labels:
    row = rows[label] = {'flags': list(RULES[label]), 'difference': [],
                         'test_loss': [], 'test_accuracy': []}
    for seed in seeds:
      config = (*RULES[label], f'--config.seed={seed}')
      runs = [folder / f'{label}_{seed}_{n}' for n in ('one', 'two')]
      codes = [
          Group(runs[0], config, count=1, devices=8, cache=cache).wait(),
          Group(runs[1], config, cache=cache).wait()]
      if codes != [[0], [0, 0]]:
        wrong.append(f'{label}, seed {seed}: exit codes {codes}')
        continue
      found = difference(*runs)
      last = metrics(runs[1])[-1]
      row['difference'].append(found)
      row['test_loss'].append(last['loss'])
      row['test_accuracy'].append(last['accuracy'])
      if not found <= _TOLERANCE:
        wrong.append(f'{label}, seed {seed}: metrics differ by {found:.2g}')
      print(f'{label}, seed {seed}: {found:.2g}', flush=True)
  return rows


def _stops(folder, cache, whole, wrong):
  rows = {}
  bits = (whole / 'metrics.jsonl').read_bytes()
  for number in (signal.SIGTERM, signal.SIGKILL):
    for index in (1, 0):
      name = f'{signal.Signals(number).name} of process {index}'
      run = folder / name.replace(' ', '_')
      group = Group(run, STOPPED, cache=cache)
      codes, seconds = group.stop(index, number)
      said = _sentences(group.errors()[1 - index])[-1]
      other = codes[1 - index]
      again = Group(run, STOPPED, cache=cache)
      went_on = again.wait()
      equal = (run / 'metrics.jsonl').read_bytes() == bits
      from_step = re.search(r'going on from step (\d+)', again.errors()[0])
      rows[name] = {
          'exit_codes': codes, 'seconds_until_all_ended': seconds,
          'the_other_says': said, 'then_exit_codes': went_on,
          'goes_on_from_step': int(from_step[1]) if from_step else None,
          'metrics_equal_to_the_bit': equal}
      asked = number == signal.SIGTERM
      if (other, seconds < (_SOON if asked else _BOUND), went_on, equal,
          from_step is not None) != (0 if asked else 5, True, [0, 0], True, True):
        wrong.append(f'{name}: {rows[name]}')
      print(name, rows[name], flush=True)
  return rows


def _elsewhere(folder, cache, whole, wrong):
  rows = {}
  for devices in (8, 4):
    name = f'one process, {devices} devices'
    run = folder / f'elsewhere_{devices}'
    group = Group(run, STOPPED, cache=cache)
    group.stop(0, signal.SIGTERM)
    again = Group(run, STOPPED, count=1, devices=devices, cache=cache)
    codes, found = again.wait(), None
    if codes == [0]:
      found = difference(run, whole)
    rows[name] = {'exit_codes': codes, 'difference': found}
    if found is None or not found <= _TOLERANCE:
      wrong.append(f'{name}: {rows[name]}')
    print(name, rows[name], flush=True)
  return rows


def _never(folder, wrong):
  rows = {}
  for index in (0, 1):
    group = Group(
        folder / 'never', STOPPED, flags=['--timeout=3'], only=[index])
    codes = group.wait(120.)
    said = group.errors()[0].splitlines()
    rows[f'process {index} alone'] = {
        'exit_codes': codes, 'seconds': time.monotonic() - group.begin,
        'says': said}
    if codes != [5] or len(said) != 1:
      wrong.append(f'process {index} alone: {codes}, {said}')
  return rows


def _measure(picture):
  del picture
  seeds = measurement.numbers('seeds', _SEEDS.value, 0)
  labels = _RULES.value or list(RULES)
  unknown = [label for label in labels if label not in RULES]
  if unknown:
    raise measurement.FlagError(
        f'`rules` must be of {", ".join(RULES)}, got {unknown[0]!r}.')
  wrong, begin = [], time.monotonic()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    cache, whole = folder / 'cache', folder / 'whole'
    rules = _rules(folder, cache, seeds, labels, wrong)
    codes = Group(whole, STOPPED, cache=cache).wait()
    assert codes == [0, 0], codes
    record = {
        'machine': (
            f'{measurement.machine()}, which other programs used at the same time'),
        'processes': 2, 'devices_of_each': 4, 'tolerance': _TOLERANCE,
        'heartbeat': _HEARTBEAT, 'seeds': seeds, 'rules': rules,
        'stopped': _stops(folder, cache, whole, wrong),
        'elsewhere': _elsewhere(folder, cache, whole, wrong),
        'never_comes': _never(folder, wrong),
        'seconds': time.monotonic() - begin}
  # Ports differ from run to run.
  record = json.loads(re.sub(
      r'127\.0\.0\.1:\d+', '127.0.0.1:PORT', json.dumps(record)))
  table = measurement.table(
      'Metrics of two processes against one', 'rule', 'largest difference',
      'test loss')
  for label, row in rules.items():
    if row['difference']:
      table.add_row(label, f'{max(row["difference"]):.1e}',
                    f'{sum(row["test_loss"]) / len(row["test_loss"]):.4f}')
  measurement.show(table)
  return record, wrong


if __name__ == '__main__':
  # Not above, since a test imports this file beside programs with such flags.
  _RULES = flags.DEFINE_list('rules', [], 'Labels of `RULES`; none: all.')
  _SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Seeds of the first part.')
  measurement.main('two_processes', _measure, plot=False)
