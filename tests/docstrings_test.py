"""The examples in the docstrings run, and say what comes out."""

import doctest
import importlib
import pkgutil

import bpjax
import pytest

_MODULES = sorted(
    m.name for m in pkgutil.walk_packages(bpjax.__path__, 'bpjax.'))


@pytest.mark.parametrize('name', _MODULES)
def test_examples(name):
  module = importlib.import_module(name)
  results = doctest.testmod(
      module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  assert not results.failed


def test_there_are_examples_in_every_rule_and_model():
  for package in (bpjax.rules, bpjax.models):
    for name in package.names():
      function = package.get(name)
      assert '>>> ' in function.__doc__, name
