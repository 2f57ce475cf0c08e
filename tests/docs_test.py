"""README and docs: code blocks run or say why not, and links lead somewhere.

A block of Python runs after those above it on its page; one of shell runs in a
copy of the checkout. `<!-- not run: REASON -->` on the line above a block marks
one that does not; a block without a language is a display, and not run.
"""

import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

from markdown_it import MarkdownIt
import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = sorted([
    *_ROOT.glob('*.md'),
    *(p for p in (_ROOT / 'docs').rglob('*.md')
      if not {'_build', 'examples'} & set(p.relative_to(_ROOT / 'docs').parts)
      and p.parent.name != 'templates')])
_NAMES = [p.relative_to(_ROOT).as_posix() for p in _PAGES]
_MARK = re.compile(r'<!-- not run: (.+?) -->\s*$')
_LANGUAGES = ('python', 'sh')


def _blocks(path, language):
  """Line and code of every block of a language that is to run."""
  tokens = MarkdownIt().parse(path.read_text(encoding='utf-8'))
  for before, token in zip([None, *tokens], tokens):
    if token.type != 'fence' or token.info.strip() != language:
      continue
    marked = before is not None and before.type == 'html_block' and (
        _MARK.search(before.content))
    if not marked:
      yield token.map[0] + 1, token.content


def _with(language):
  return [n for n, p in zip(_NAMES, _PAGES) if any(_blocks(p, language))]


@pytest.mark.parametrize('name', _with('python'))
def test_python(name):
  space = {'__name__': '__main__'}
  for line, code in _blocks(_ROOT / name, 'python'):
    # Empty lines before it, so that a traceback has the page's own numbers.
    exec(compile('\n' * line + code, name, 'exec'), space)


@pytest.mark.parametrize('name', _with('sh'))
def test_shell(name, tmp_path):
  for entry in _ROOT.iterdir():
    if entry.name not in ('runs', '.git'):
      (tmp_path / entry.name).symlink_to(entry)
  environment = {
      **os.environ, 'PYTHONPATH': str(tmp_path),
      'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}
  for _, code in _blocks(_ROOT / name, 'sh'):
    done = subprocess.run(
        ['bash', '-euc', code], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f'{code}\n{done.stderr[-2000:]}'


@pytest.mark.parametrize('name', _NAMES)
def test_blocks_have_a_language_that_runs(name):
  for token in MarkdownIt().parse((_ROOT / name).read_text(encoding='utf-8')):
    if token.type == 'fence' and not token.info.startswith('{'):
      assert token.info.strip() in ('', *_LANGUAGES), token.info


def test_commands_name_files_that_exist():
  text = '\n'.join(p.read_text(encoding='utf-8') for p in _PAGES)
  for path in set(re.findall(
      r'\b(?:scripts|benchmarks|examples|tests|experiments|bpjax)/[\w/.]+\.py',
      text)):
    assert (_ROOT / path).exists() or 'my_rule' in path, path
  for module in set(re.findall(r'python -m ((?:experiments|bpjax)\.[\w.]+)', text)):
    assert (_ROOT / f'{module.replace(".", "/")}.py').exists(), module


def _slug(heading):
  """The anchor that GitHub and MyST give a heading."""
  kept = re.sub(r'[^\w\- ]', '', heading.replace('`', '').lower())
  return kept.strip().replace(' ', '-')


@pytest.mark.parametrize('name', _NAMES)
def test_links(name):
  path = _ROOT / name
  for token in MarkdownIt().enable('table').parse(
      path.read_text(encoding='utf-8')):
    for child in token.children or ():
      target = child.attrGet('href') or child.attrGet('src')
      if not target or urllib.parse.urlsplit(target).scheme:
        continue
      file, _, anchor = target.partition('#')
      to = (path.parent / file).resolve() if file else path
      assert to.exists(), f'{target} leads nowhere'
      if anchor and to.suffix == '.md':
        headings = re.findall(
            r'^#+ (.+)$', to.read_text(encoding='utf-8'), re.M)
        assert anchor in map(_slug, headings), f'{target}: no such heading'
