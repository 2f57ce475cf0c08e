"""The examples run in small, and are notebooks."""

import pathlib
import runpy
import sys

import jupytext
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_EXAMPLES = sorted((_ROOT / 'examples').glob('*.py'))


@pytest.mark.parametrize('path', _EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_in_small(path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [str(path), '--small'])
  runpy.run_path(str(path), run_name='__main__')
  assert capsys.readouterr().out


@pytest.mark.parametrize('path', _EXAMPLES, ids=lambda path: path.stem)
def test_it_is_a_notebook(path):
  notebook = jupytext.read(path, fmt='py:percent')
  kinds = [cell.cell_type for cell in notebook.cells]
  assert kinds[0] == 'markdown'
  assert notebook.cells[0].source.startswith('# ')
  assert kinds.count('code') >= 3 and kinds.count('markdown') >= 3
