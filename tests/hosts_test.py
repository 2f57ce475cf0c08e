"""Several processes: how they meet, what each reads, and how they end."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

from bpjax.train import config as config_lib
from bpjax.train import hosts
from bpjax.train.data import streaming
from bpjax.train.loop import launch as launch_lib
from bpjax.train.loop import progress
import jax
import numpy as np
import pytest
from scripts import two_processes

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Long enough to be stopped twice on the way.
_RUN = (
    '--config=experiments/configs/quickstart.py', '--config.epochs=6',
    '--config.model_args.widths=(16,)', '--config.checkpoint_every=11',
    '--config.rule=kolen_pollack', '--config.alignment_every=0')


def _cache():
  return os.environ.get('JAX_COMPILATION_CACHE_DIR', '')


def test_two_processes_end_as_one_does_however_they_are_stopped(tmp_path):
  folder = tmp_path / 'two'
  start = lambda: two_processes.Group(
      folder, _RUN, devices=2, cache=_cache())
  group = start()
  codes, _ = group.stop(0, signal.SIGKILL, step=22)
  assert codes == [-signal.SIGKILL, hosts.GONE]
  assert group.errors()[1] == f'process 1: {hosts.LOST}\n'

  group = start()
  codes, _ = group.stop(1, signal.SIGTERM, step=66)
  first, second = group.errors()
  assert codes == [0, 0], (first, second)
  assert 'going on from step' in first
  stopped = 'stopped by SIGTERM; the same command goes on from here'
  assert first.splitlines()[-1] == stopped
  assert second.splitlines()[-1] == f'process 1: {stopped}'
  # Both have saved the step at which they stopped.
  saved = max(int(p.name) for p in (folder / 'checkpoints').iterdir())

  group = start()
  assert group.wait(120.) == [0, 0], group.errors()
  first, second = group.errors()
  assert f'going on from step {saved} of 132' in first and not second

  config = config_lib.default()
  config.dataset, config.model = 'digits', 'mlp'
  config.model_args.widths = (16,)
  config.rule, config.learning_rate = 'kolen_pollack', 2e-3
  config.epochs, config.batch_size, config.eval_batch_size = 6, 64, 360
  assert launch_lib.launch(config, str(tmp_path / 'one'), quiet=True) == 0
  assert jax.device_count() == 8
  assert two_processes.difference(folder, tmp_path / 'one') < 1e-4


def test_a_process_that_never_comes_is_one_sentence(tmp_path):
  group = two_processes.Group(
      tmp_path / 'run', _RUN, flags=['--timeout=3'], only=[1])
  assert group.wait(60.) == [hosts.GONE]
  error, = group.errors()[0].splitlines()
  assert 'not all processes came' in error and 'within 3 seconds' in error
  assert not (tmp_path / 'run').exists()


_STREAM = '''
import sys
import jax
import numpy as np
from bpjax.train import hosts
from bpjax.train.data import feed
from bpjax.train.data import streaming

class Numbers(streaming.Stream):
  read = []
  def rows(self, batch):
    return streaming.Split(batch['image'], batch['label'])
  def _example(self, index, randomness):
    self.read.append(index)
    return {'image': np.full((2, 2, 1), index, np.uint8),
            'label': np.int32(index)}

each = hosts.meet(hosts.Asked(sys.argv[1], 2, int(sys.argv[2])), 16)
mesh = jax.make_mesh((4,), ('data',))
stream = Numbers(np.arange(50))
whole = lambda x: np.asarray(jax.jit(
    lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))(x))
made = feed.make(stream, 16, 0, mesh)
data, _ = made.fetch(1, 1, 1)
wanted = [b['label'] for b in Numbers(np.arange(50)).batches(16, epoch=1)]
assert (whole(data['rows'].labels)[0] == wanted[1]).all()
assert data['rows'].images.shape == (1, 16, 2, 2, 1)
assert (whole(data['rows'].images)[0, :, 0, 0, 0] == wanted[1]).all()
labels = []
stream.read.clear()
for rows, mask in feed.eval_batches(stream, 16, mesh):
  labels += whole(rows.labels)[whole(mask)].tolist()
assert labels == list(range(50))
told = each.share([each.index, sorted(set(stream.read))])
assert [index for index, _ in told] == [0, 1]
# The last example also fills up the last batch.
assert set(told[0][1]) & set(told[1][1]) <= {49}, told
assert each.first(lambda: each.index) == 0
each.close()
print('ok', file=sys.stderr)
'''


def test_each_process_reads_its_own_rows_of_a_stream():
  where = f'127.0.0.1:{two_processes._free_port()}'
  environment = os.environ | {'XLA_FLAGS': (
      f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2')}
  processes = [subprocess.Popen(
      [sys.executable, '-c', _STREAM, where, str(i)], cwd=_ROOT, text=True,
      env=environment, stderr=subprocess.PIPE) for i in range(2)]
  errors = [p.communicate(timeout=60)[1] for p in processes]
  assert [e.splitlines()[-1:] for e in errors] == [['ok'], ['ok']], errors


class _Numbers(streaming.Stream):

  def _example(self, index, randomness):
    return {'label': np.int32(index)}


@pytest.mark.parametrize('train', [True, False])
def test_parts_of_a_streams_batches_are_the_batches(train):
  stream = _Numbers(np.arange(22))
  whole = [b['label'] for b in stream.batches(8, train=train, epoch=1, start=1)]
  parts = [
      [b['label'] for b in stream.batches(
          8, train=train, epoch=1, start=1, part=np.array(part))]
      for part in ([0, 1, 2, 5], [3, 4, 6, 7])]
  assert len(whole) == len(parts[0]) == len(parts[1]) == 2 - train
  for batch, *halves in zip(whole, *parts):
    joined = np.zeros(8, int)
    joined[[0, 1, 2, 5]], joined[[3, 4, 6, 7]] = halves
    assert (joined[:len(batch)] == batch).all()
    assert (joined[len(batch):] == 21).all()  # The last one fills up.


@pytest.mark.parametrize('fields,text', [
    (dict(coordinator='host', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator=':1', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='h:0', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='h:99999', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='h:1', num_processes=2, process_id=2), 'from 0 to 1'),
    (dict(coordinator='h:1', num_processes=2, process_id=-1), 'from 0 to 1'),
    (dict(coordinator='h:1', num_processes=0, process_id=0), 'at least 1'),
    (dict(coordinator='h:1', num_processes=3, process_id=0), 'divisible by'),
    (dict(coordinator='h:1'), 'num_processes and process_id are missing'),
    (dict(num_processes=2, process_id=0), 'coordinator is missing'),
    (dict(distributed=True, process_id=0), 'must be left out'),
    (dict(timeout=0), '`timeout`'),
    (dict(heartbeat=1), '`heartbeat`')])
def test_flags_that_make_no_sense_are_one_sentence(fields, text):
  with pytest.raises(ValueError, match=text) as error:
    hosts.Asked(**fields).check(batch_size=64)
  assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_flags_that_make_sense_are_taken():
  hosts.Asked().check(64)
  hosts.Asked(distributed=True).check(64)
  hosts.Asked('[::1]:80', num_processes=2, process_id=1).check(64)


def _found(monkeypatch, environment):
  """What `distributed` would pass to JAX's coordination service and client."""
  from jax._src import distributed
  passed = {}

  class Met(Exception):
    pass

  def client(address, node, **fields):
    passed.update(address=address, process_id=node, **fields)
    raise Met

  def service(bind, count, **fields):
    passed.update(bind=bind, num_processes=count)

  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(distributed, 'global_state', distributed.State())
  monkeypatch.setattr(
      distributed._jax, 'get_distributed_runtime_client', client)
  monkeypatch.setattr(
      distributed._jax, 'get_distributed_runtime_service', service)
  monkeypatch.setattr(
      distributed.config, 'update', lambda name, value: passed.update(
          {name: value}))
  from jax._src import xla_bridge
  monkeypatch.setattr(xla_bridge, 'backends_are_initialized', lambda: False)
  with pytest.raises(Met):
    hosts._initialize(hosts.Asked(distributed=True, timeout=7, heartbeat=11))
  passed['count'] = distributed.global_state.num_processes
  return passed


@pytest.mark.parametrize('nodes,host', [
    ('node[003-004]', 'node003'), ('a1,a2', 'a1'), ('gpu[7,9-12],cpu1', 'gpu7')])
def test_slurm_says_who_a_process_is(monkeypatch, nodes, host):
  slurm = {
      'SLURM_JOB_ID': '4100', 'SLURM_STEP_NODELIST': nodes,
      'SLURM_NTASKS': '8', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}
  # The port is a function of the job: 4100 % 4096 above 61440.
  first = _found(monkeypatch, slurm)
  assert first['address'] == f'{host}:61444'
  assert (first['process_id'], first['num_processes']) == (0, 8)
  assert first['bind'] == '[::]:61444'
  assert first['heartbeat_timeout'] == 11 and first['init_timeout'] > 7
  other = _found(
      monkeypatch, slurm | {'SLURM_PROCID': '5', 'SLURM_LOCALID': '1'})
  assert other['address'] == f'{host}:61444'
  assert (other['process_id'], other['count']) == (5, 8)
  # One GPU a process: that of its place on the node.
  assert other['jax_cuda_visible_devices'] == '1'
  assert 'bind' not in other


def test_without_an_engine_there_is_a_way_out(monkeypatch):
  from jax._src import clusters
  from jax._src import xla_bridge
  monkeypatch.setattr(xla_bridge, 'backends_are_initialized', lambda: False)
  monkeypatch.setattr(clusters.ClusterEnv, '_cluster_types', [])
  monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
  with pytest.raises(ValueError, match='give --coordinator'):
    hosts._initialize(hosts.Asked(distributed=True))


def test_one_process_agrees_with_itself():
  alone = hosts.meet(None, 64)
  assert (alone.count, alone.index) == (1, 0)
  assert alone.share({'a': 1}) == [{'a': 1}] and alone.first(lambda: 3) == 3
  assert alone.agree(None, 2.5) == 2.5
  said = []
  assert alone.end(4, 'why', said.append) == 4 and said == ['why']


def test_a_signal_of_one_waits_until_all_agree():
  with progress.Stopper() as stopper:
    stopper.together = True
    with pytest.raises(progress.Interrupted):
      with stopper.deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        stopper.check()
        assert stopper.heard.number == signal.SIGTERM
        assert stopper.asked is None
        stopper.ask(signal.SIGTERM)
        assert stopper.asked is stopper.heard
        stopper.check()


def test_outside_the_main_thread_no_signal_is_asked_for():
  before, found = signal.getsignal(signal.SIGTERM), []

  def work():
    with progress.Stopper() as stopper:
      found.append((stopper.asked, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [(None, before)]
