"""Wrong commands and wrong calls are answered in one sentence; see the list."""

import json
import os
import pathlib
import subprocess
import sys

from bpjax.train import config as config_lib
from bpjax.train import fields
import pytest
import wrong_calls
import wrong_commands

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_commands_and_values_of_fields():
  """In a process of their own, which forks before JAX has threads."""
  done = subprocess.run(
      [sys.executable, wrong_commands.__file__, '--no-calls'], cwd=_ROOT,
      capture_output=True, text=True, timeout=300, check=False,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  assert done.stdout, done.stderr
  found = json.loads(done.stdout)
  assert not found['faults']
  assert found['commands'] >= 150


def test_calls():
  assert len(wrong_calls.CALLS) >= 150
  faults = {s: wrong_calls.call(s, words) for s, words in wrong_calls.CALLS}
  assert not {s: fault for s, fault in faults.items() if fault}


def test_a_right_call_would_be_a_fault():
  assert wrong_calls.call('rules.feedback_alignment(scale=1)', '') == 'accepted'
  assert wrong_calls.call('rules.feedback_alignment(scale=0)', 'samples')


def test_the_page_is_that_of_the_table():
  text = (_ROOT / 'docs/config.md').read_text(encoding='utf-8')
  assert text == fields.page(), 'run `python -m bpjax.train.fields`'


def test_the_defaults_are_those_of_the_table_and_are_right():
  config_lib.check(config_lib.default())
  assert set(config_lib.default()) == set(fields.BY_NAME)
  config_lib.default().rule_args.scale = 1.  # Not that of the table itself.
  assert not config_lib.default().rule_args


def test_help_names_every_field():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.main', '--help'], cwd=_ROOT,
      capture_output=True, text=True, timeout=60, check=True)
  assert all(f'--config.{name}=' in done.stdout for name in fields.BY_NAME)


@pytest.mark.parametrize('module', ['experiments.main', 'experiments.sweep'])
def test_a_wrong_value_is_refused_before_jax_is_loaded(module):
  code = f'import sys, {module}; sys.exit("jax" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], cwd=_ROOT, check=True, timeout=60)


def test_the_page_has_the_numbers_that_were_counted():
  counted = json.loads((_ROOT / 'results/wrong_inputs.json').read_text())
  assert not counted['faults']
  page = ' '.join(
      (_ROOT / 'docs/reliability.md').read_text(encoding='utf-8').split())
  assert (f'{counted["commands"]} wrong commands, {counted["calls"]} wrong calls'
          in page)
  assert f'{counted["field_values"]:,} wrong values' in page
