"""When the weight mirror learns: the launcher's schedule."""

import json

from bpjax.train import config as config_lib
from bpjax.train.loop import launch
import pytest


def trained(folder, **fields):
  """The exit code, and unit -> its weight alignment at the first and last step."""
  config = config_lib.default()
  config.rule, config.epochs = 'weight_mirror', 2
  config.feedback_optimizer, config.feedback_learning_rate = 'sgd', 1.
  config.model_args.widths = (32, 32)
  config.alignment_every = 1000
  for name, value in fields.items():
    config[name] = value
  code = launch.launch(config, str(folder), quiet=True)
  curves = {}
  if code == 0:
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    for line in map(json.loads, lines):
      if line['split'] == 'alignment' and line['weight'] is not None:
        curves.setdefault(line['unit'], []).append(line['weight'])
  return code, curves


def test_mirroring_first_aligns_before_training(tmp_path):
  code, curves = trained(tmp_path, mirror_first=400)
  assert code == 0
  assert set(curves) == {'Dense_1', 'Dense_2'}
  for first, last in curves.values():
    assert first > .98 and last > .9


def test_mirroring_less_often_aligns_later(tmp_path):
  _, often = trained(tmp_path / 'often')
  _, seldom = trained(tmp_path / 'seldom', mirror_every=5)
  for unit in often:
    assert abs(often[unit][0]) < .3
    assert often[unit][1] > seldom[unit][1] + .05


@pytest.mark.parametrize('fields', [
    {'mirror_every': 0}, {'rule': 'backprop', 'mirror_every': 2}])
def test_schedules_that_no_run_can_have(tmp_path, capsys, fields):
  code, _ = trained(tmp_path, **fields)
  assert code == 2
  error = capsys.readouterr().err
  assert 'mirror_every' in error and 'Traceback' not in error
