"""Sweeps: points drawn at random, paired tests, runs side by side."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

from bpjax.train import config as config_lib
from experiments import comparison
from experiments import config as flags_lib
from experiments import jobs as jobs_lib
from experiments import space
from experiments import sweep as sweep_lib
import jax
import numpy as np
import pytest


def _p_value(t, degrees):
  """Two-sided, by integrating the density of Student's t, substituted."""
  angle = np.linspace(0., math.atan(abs(t) / math.sqrt(degrees)), 200_001)
  density = np.cos(angle) ** (degrees - 1)
  whole = np.sqrt(math.pi) * math.gamma(degrees / 2) / math.gamma(
      (degrees + 1) / 2)
  inside = np.sum((density[1:] + density[:-1]) / 2) * (angle[1] - angle[0])
  return 1 - 2 * inside / whole


@pytest.mark.parametrize('n', [2, 3, 10])
def test_paired_is_student_s_test_of_differences(n):
  rng = np.random.default_rng(n)
  x, y = rng.normal(size=(2, n))
  found = comparison.paired(
      dict(enumerate(x)) | {'a': 1., 'b': None},
      dict(enumerate(y)) | {'b': 2., 'c': 3.})
  d = y - x
  t = d.mean() / (d.std(ddof=1) / np.sqrt(n))
  assert found['n'] == n
  assert found['difference'] == pytest.approx(d.mean())
  assert found['d_z'] == pytest.approx(d.mean() / d.std(ddof=1))
  assert found['t'] == pytest.approx(t)
  assert found['p'] == pytest.approx(_p_value(t, n - 1), abs=1e-7)
  # At the ends of the interval, p is that of its confidence.
  shifted = (d.mean() - found['low']) / (d.std(ddof=1) / np.sqrt(n))
  assert _p_value(shifted, n - 1) == pytest.approx(.05, abs=1e-6)
  assert found['high'] + found['low'] == pytest.approx(2 * d.mean())


def test_pairs_without_a_spread_have_no_test():
  assert comparison.paired({}, {})['difference'] is None
  assert comparison.paired({0: 1.}, {0: 3.})['p'] is None
  # Equal but for rounding.
  found = comparison.paired({0: .1, 1: .2, 2: .7}, {0: .2, 1: .3, 2: .8})
  assert found['p'] is None and found['difference'] == pytest.approx(.1)


def test_pairs_are_corrected_together():
  rng = np.random.default_rng(0)
  rows = [dict(enumerate(rng.normal(m, .3, 5))) for m in (0., .4, 1.)]
  tests = comparison.pairs(rows)
  ps = sorted(t['p'] for t in tests)
  wanted, most = {}, 0.
  for p, factor in zip(ps, (3, 2, 1)):
    most = max(most, min(1., p * factor))
    wanted[p] = most
  assert [t['p_holm'] for t in tests] == [
      pytest.approx(wanted[t['p']]) for t in tests]
  assert [(t['a'], t['b']) for t in comparison.pairs(rows, first_only=True)] == [
      (0, 1), (0, 2)]


def test_points_are_drawn_from_their_distributions():
  points = space.sample([
      'learning_rate=log:1e-4:1e-1', 'momentum=uniform:.5:.9',
      'batch_size=int:3:6', 'rule=a,b'], 2000, seed=3)
  column = lambda field: np.array([float(p[field]) for p in points])
  rates, momenta, sizes = map(column, ('learning_rate', 'momentum', 'batch_size'))
  assert rates.min() >= 1e-4 and rates.max() <= 1e-1
  # A quarter of the range holds a quarter of the draws.
  shares = np.log10(rates / 1e-4) / 3
  for x in (shares, (momenta - .5) / .4):
    counts = np.histogram(x, 4, (0, 1))[0]
    np.testing.assert_allclose(counts, 500, atol=100)
  np.testing.assert_allclose(
      np.bincount(sizes.astype(int))[3:], 500, atol=100)
  assert sum(p['rule'] == 'a' for p in points) == pytest.approx(1000, abs=120)
  assert all(len(p['learning_rate']) <= 9 for p in points)


def test_more_points_only_add_to_fewer_and_none_comes_twice():
  for grid, count in ((['a=log:1:2', 'b=1,2'], 30), (['a=1,2,3', 'b=(4,5),6'], 6),
                      (['a=int:1:7'], 7)):
    points = space.sample(grid, count, seed=1)
    assert points[:count // 2] == space.sample(grid, count // 2, seed=1)
    assert len({tuple(p.items()) for p in points}) == count
    assert points != space.sample(grid, count, seed=2)


@pytest.fixture(name='one_device')
def _one_device(monkeypatch):
  """One device, in this process and in those that it starts."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setenv(
      'XLA_FLAGS', f'{os.environ.get("XLA_FLAGS", "")} '
      '--xla_force_host_platform_device_count=1')


def _config():
  config = config_lib.default()
  config.update({'epochs': 1, 'batch_size': 64, 'eval_batch_size': 360,
                 'train_examples': 500})
  config.model_args.widths = (8,)
  return config


def test_side_by_side_leaves_what_one_after_the_other_does(
    tmp_path, one_device, capfd):
  sweeps = []
  for name, jobs in (('alone', 1), ('beside', 2)):
    assert not sweep_lib.sweep(
        _config(), str(tmp_path / name), ['learning_rate=.1234567'], ['1'],
        jobs=jobs, watch=[])
    sweeps.append(json.loads((tmp_path / name / 'sweep.json').read_text()))
  assert '[1/1] finished' in capfd.readouterr().err
  for run in sweeps[0]['runs']:
    paths = [tmp_path / name / run['folder'] for name in ('alone', 'beside')]
    for file in ('metrics.jsonl', 'config.json', 'environment.json'):
      assert len({(p / file).read_bytes() for p in paths}) == 1, file
    assert len({json.loads((p / 'summary.json').read_text())['digest']
                for p in paths}) == 1
  for found in sweeps:
    del found['points'][0]['median_step_time']
  assert sweeps[0]['points'] == sweeps[1]['points']
  assert sweeps[0]['points'][0]['seeds'] == [1]


def test_points_are_tested_in_pairs_over_seeds(capfd):
  values = {'a': [.5, .6, .7], 'b': [.55, .68, .75], 'c': [.9, None, .2]}
  results = [
      {'point': {'rule': rule}, 'seed': seed,
       **dict.fromkeys(comparison.COLUMNS), 'test_accuracy': value}
      for rule, row in values.items() for seed, value in enumerate(row)]
  tests = sweep_lib._tests(results)
  assert set(tests) == {'test_accuracy'}
  found = {(t['a'], t['b']): t for t in tests['test_accuracy']}
  d = np.array([.05, .08, .05])
  assert found[0, 1]['n'] == 3 and found[0, 2]['n'] == 2
  assert found[0, 1]['d_z'] == pytest.approx(d.mean() / d.std(ddof=1))
  assert (1, 2) in found
  sweep_lib._print(
      sweep_lib._compare(results), sweep_lib._tests(results, first_only=True),
      False)
  lines = capfd.readouterr().out.splitlines()
  assert 'against' not in lines[0]
  assert 'test_accuracy against rule=a +6.00% [+1.70, +10.30]' in lines[1]
  assert 'd_z 3.5, n=3' in lines[1]


def test_what_a_process_is_told_keeps_every_bit():
  config = flags_lib.override(_config(), {
      'learning_rate': '.1', 'rule_args.scale': '2', 'pixel_mean': '(.3,)',
      'rule_by_path': "(('a', 'backprop', {'b': None}),)"})
  config.momentum = np.float64(1) / 3
  job = jobs_lib.Job('a', 'b', config)
  import ast
  order = ast.literal_eval(repr(jobs_lib._order(job, ['wandb'])))
  assert order == {'config': config.to_dict(), 'folder': 'b', 'watch': ['wandb']}
  assert type(order['config']['pixel_mean']) is tuple


# A run without JAX: says what it gets, into the folder that it is told.
_FAKE = '''
import ast, os, pathlib, signal, sys, threading, time
folder = pathlib.Path(ast.literal_eval(sys.stdin.readline())['folder'])
def heard(number, frame):
  with open(folder.with_suffix('.heard'), 'a') as file: file.write(f'{number} ')
  time.sleep(.2)
  os._exit(130 if number == signal.SIGINT else 0)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, heard)
folder.with_suffix('.cores').write_text(repr(
    (sorted(os.sched_getaffinity(0)), os.environ['NPROC'])))
print('started', folder.name, file=sys.stderr, flush=True)
if 'code' in folder.name: sys.exit(int(folder.name[-1]))
if 'kill' in folder.name: os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
'''


def _fake_jobs(monkeypatch, tmp_path, names):
  monkeypatch.setattr(jobs_lib, '_COMMAND', [sys.executable, '-c', _FAKE])
  return list(enumerate(
      jobs_lib.Job(n, str(tmp_path / n), _config()) for n in names))


def _eventually(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(.02)


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_stops_all_of_them(monkeypatch, tmp_path, number, code):
  jobs = _fake_jobs(monkeypatch, tmp_path, 'abc')
  started = lambda: len(list(tmp_path.glob('*.cores')))

  def ask():
    _eventually(lambda: started() == 2)
    os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  threading.Thread(target=ask).start()
  with pytest.raises(jobs_lib.Stopped) as stopped:
    jobs_lib._side_by_side(jobs, 2, [], lambda *_: None)
  assert stopped.value.exit_code == code
  assert signal.getsignal(number) is before
  assert started() == 2  # The third one never began.
  for name in 'ab':  # Each has heard it once.
    assert (tmp_path / f'{name}.heard').read_text() == f'{int(number)} '


def test_codes_lines_and_cores(monkeypatch, tmp_path):
  names = ['code=3', 'kill', 'code=2', 'code=4']
  jobs, said = _fake_jobs(monkeypatch, tmp_path, names), []
  codes = jobs_lib._side_by_side(jobs, 2, [], lambda i, line: said.append((i, line)))
  assert codes == {0: 3, 1: 128 + signal.SIGKILL, 2: 2, 3: 4}
  assert {(i, f'started {n}') for i, n in enumerate(names)} <= set(said)
  shares = {(tmp_path / f'{n}.cores').read_text() for n in names}
  cores = sorted(os.sched_getaffinity(0))
  # As many threads as without jobs, for the same last bits.
  number = os.environ.get('NPROC', str(len(cores)))
  assert shares <= {repr((c, number)) for c in (
      cores[0::2], cores[1::2] or cores)}


def test_one_that_is_stopped_stops_the_others(monkeypatch, tmp_path):
  jobs = _fake_jobs(monkeypatch, tmp_path, ['a', 'code=0', 'b'])
  with pytest.raises(jobs_lib.Stopped) as stopped:
    jobs_lib._side_by_side(jobs, 2, [], lambda *_: None)
  assert stopped.value.exit_code == 0
  assert not (tmp_path / 'b.cores').exists()


def test_a_run_stops_when_the_sweep_is_killed(tmp_path):
  """Its input ends then, whatever it does; here, before it has begun."""
  with subprocess.Popen(
      [sys.executable, '-m', 'experiments.jobs'], stdin=subprocess.PIPE,
      stderr=subprocess.PIPE, env=jobs_lib._environment()) as process:
    job = jobs_lib.Job('a', str(tmp_path / 'a'), flags_lib.override(
        _config(), {'epochs': '100000'}))
    process.stdin.write(f'{jobs_lib._order(job, [])!r}\n'.encode())
    process.stdin.close()
    assert process.wait(timeout=100) == 0
  assert not (tmp_path / 'a' / 'summary.json').exists()


def test_a_search_says_that_settings_are_not_chosen_on_test_examples(
    monkeypatch, capfd):
  number = lambda mean, n=1: {'mean': mean, 'std': None, 'n': n}
  points = [
      {'point': {'learning_rate': str(i)},
       **{c: number(None, 0) for c in comparison.COLUMNS},
       'test_accuracy': number(.5 + i / 10), 'validation_accuracy': number(v)}
      for i, v in enumerate((.3, .2, .4))]
  sweep_lib._print(points, {}, True)
  found = [line.split(':')[0] for line in capfd.readouterr().out.splitlines()]
  assert found == [f'learning_rate={i}' for i in (2, 0, 1)]
  for point in points:
    point['validation_accuracy'] = number(None, 0)
  sweep_lib._print(points, {}, True)
  said = capfd.readouterr()
  assert 'choose no setting by its test accuracy' in said.err
  assert said.out.startswith('learning_rate=0')
