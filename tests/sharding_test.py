"""Presets of `sharding`: where things lie, and that nothing else changes."""

import json

from bpjax.train import config as config_lib
from bpjax.train.loop import build
from bpjax.train.loop import devices
from bpjax.train.loop import launch
import jax
import numpy as np
import pytest


def _shapes(**shapes):
  return {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in shapes.items()}


def _specs(axes, rules, **shapes):
  mesh = devices.make_mesh(axes, 8)
  learned = {'params': _shapes(**shapes), 'feedback': {}}
  placed = devices.shardings(mesh, rules, learned, learned)['params']
  return {k: tuple(p.spec) for k, p in placed.items()}


@pytest.mark.parametrize('shape,spec', [
    ((64, 10), ('data',)), ((10, 64), (None, 'data')), ((64, 64), ('data',)),
    ((16, 64), (None, 'data')), ((7, 10), ()), ((64,), ('data',)), ((), ()),
    ((3, 3, 64, 128), (None, None, None, 'data'))])
def test_fsdp_splits_the_largest_axis_that_can_be(shape, spec):
  assert _specs({'data': 8}, [('*', 'fsdp')], w=shape) == {'w': spec}


@pytest.mark.parametrize('shape,spec', [
    ((10, 64), (None, 'model')), ((64, 10), ()), ((64,), ()), ((), ()),
    ((3, 3, 64, 128), (None, None, None, 'model'))])
def test_tensor_splits_columns(shape, spec):
  axes = {'data': 2, 'model': 4}
  assert _specs(axes, [('*', 'tensor')], w=shape) == {'w': spec}


def test_the_first_that_matches_wins():
  assert _specs(
      {'data': 2, 'model': 4}, [('a', 'tensor'), ('b', ()), ('*', 'fsdp')],
      a=(8, 8), b=(8, 8), c=(8, 8)) == {
          'a': (None, 'model'), 'b': (), 'c': ('data',)}


def test_tensor_needs_its_axis():
  with pytest.raises(ValueError, match="needs an axis 'model'"):
    _specs({'data': 8}, [('*', 'tensor')], w=(8, 8))


def _config(rules=(), model=1):
  config = config_lib.default()
  config.model_args.widths = (64,)
  config.rule, config.batch_size, config.epochs = 'kolen_pollack', 64, 1
  config.eval_batch_size, config.optimizer = 360, 'adam'
  config.mesh = {'data': -1, 'model': model}
  config.sharding = rules
  return config


def test_presets_hold_a_part_and_train_alike(tmp_path):
  rules = (('feedback/*', 'fsdp'), ('*/bias', 'fsdp'), ('*', 'tensor'))
  lines = []
  for name, config in (('whole', _config()), ('split', _config(rules, 2))):
    assert launch.launch(config, str(tmp_path / name), quiet=True) == 0
    lines.append([
        json.loads(line) for line in
        (tmp_path / name / 'metrics.jsonl').read_text().splitlines()])
  for a, b in zip(*lines, strict=True):
    assert a == pytest.approx(b, abs=1e-4)
  *_, like = build.make(_config(rules, 2))
  share = lambda x: (
      np.prod(x.sharding.shard_shape(x.shape)) / np.prod(x.shape))
  dense = like.params['Dense_0']
  assert share(dense['kernel']) == 1 / 2 and share(dense['bias']) == 1 / 4
  assert share(like.feedback['Dense_1']['kernel']) == 1 / 4
  # The optimiser's moments lie where what they are of does.
  moments = like.opt_state[0].mu
  assert share(moments['params']['Dense_0']['kernel']) == 1 / 2
  assert share(moments['feedback']['Dense_1']['kernel']) == 1 / 4
