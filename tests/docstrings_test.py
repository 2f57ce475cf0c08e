"""The examples in the docstrings run, and say what comes out."""

import doctest
import importlib
import pkgutil

import bpjax
import pytest

_MODULES = sorted(
    m.name for m in pkgutil.walk_packages(bpjax.__path__, 'bpjax.'))
# Their examples need data sets, files or the folder of a run, and are read alone.
_NEEDS_FILES = {f'bpjax.train.{m}' for m in (
    'data.decoded', 'data.feed', 'data.own', 'data.prepared',
    'data.preprocessing', 'data.streaming', 'data.text', 'data.tokenizer',
    'folder.checkpoint', 'folder.streams', 'folder.workdir', 'loop.launch',
    'loop.optimizer', 'loop.progress', 'predict', 'restore')}


@pytest.mark.parametrize('name', _MODULES)
def test_examples(name):
  module = importlib.import_module(name)
  if name in _NEEDS_FILES:
    for test in doctest.DocTestFinder().find(module):
      for example in test.examples:
        compile(example.source, test.name, 'single')
    return
  results = doctest.testmod(
      module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  assert not results.failed


def test_there_are_examples_in_every_rule_and_model():
  for package in (bpjax.rules, bpjax.models):
    for name in package.names():
      function = package.get(name)
      assert '>>> ' in function.__doc__, name
