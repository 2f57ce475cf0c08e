"""The documentation site: `make docs`.

Mathematics becomes MathML while the site is built, and its font is part of the
site, so that a page needs neither the network nor a script to show it.
"""

import importlib.resources
import json
import pathlib
import re
import sys

import bpjax
from docutils import nodes
import jupytext
from latex2mathml import converter

_HERE = pathlib.Path(__file__).resolve().parent

project = 'bpjax'
author = 'The bpjax authors'
version = release = bpjax.__version__
extensions = [
    'myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon',
    'sphinx.ext.viewcode', 'sphinx_copybutton']
exclude_patterns = ['_build', 'results/templates']

html_theme = 'furo'
html_title = 'bpjax'
# A browser sets MathML well in a font with a table of mathematics alone.
_FONT = importlib.resources.files('ziamath.fonts') / 'STIXTwoMath-Regular.ttf'
html_static_path = ['_static', str(_FONT)]
html_css_files = ['site.css']
html_math_renderer = 'mathml'

myst_enable_extensions = ['colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 3
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Prose, and no types: those are in the signature.
napoleon_custom_sections = ['Returns']
# Types in signatures: those of other libraries, and variables.
nitpick_ignore_regex = [('py:(class|data|obj)', r'.*')]
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True


# Pages that have a place in the table of contents before they are there.
_PLACES = ('config', 'dynamics', 'averaging')


def setup(app):
  app.connect('source-read', _leave_places)
  app.connect('autodoc-process-docstring', _mark_code, priority=100)
  app.add_html_math_renderer(
      'mathml', inline_renderers=(_render('inline'), None),
      block_renderers=(_render('block'), None))
  _write_examples()
  _write_leaderboard()


def _leave_places(app, name, source):
  del app
  for place in _PLACES:
    if name == 'index' and not (_HERE / f'{place}.md').exists():
      source[0] = source[0].replace(f'\n{place}\n', '\n')


def _mark_code(app, what, name, obj, options, lines):
  """Single backticks are code, as the docstrings have them."""
  del app, what, name, obj, options

  def code(match):
    if match[1] is None:  # A role, a literal or a link: as it is.
      return match[0]
    return f'``{" ".join(match[1].split())}``'

  text = re.sub(
      r':[\w:]+:`[^`]*`|``[^`]+``|`[^`<]+<[^`]*`_|`([^`]+)`', code,
      '\n'.join(lines))
  lines[:] = text.split('\n')


def _render(display):

  def visit(translator, node):
    translator.body.append(converter.convert(node.astext(), display=display))
    raise nodes.SkipNode

  return visit


def _write_examples():
  """The examples as pages: the prose of their notebooks, and their code."""
  folder = _HERE / 'examples'
  folder.mkdir(exist_ok=True)
  for path in sorted((_HERE.parent / 'examples').glob('*.py')):
    notebook = jupytext.read(path, fmt='py:percent')
    notebook.metadata.clear()
    text = jupytext.writes(notebook, fmt='md')
    page = folder / f'{path.stem}.md'
    # A file that is written anew is built anew.
    if not page.exists() or page.read_text(encoding='utf-8') != text:
      page.write_text(text, encoding='utf-8')


def _write_leaderboard():
  """The leaderboard as a page that sorts and filters, among the static files."""
  sys.path.insert(0, str(_HERE.parent))
  # Only now is the checkout on the path.
  from experiments import leaderboard_page  # pylint: disable=g-import-not-at-top
  path = _HERE.parent / 'results' / 'leaderboard.json'
  results = json.loads(path.read_text(encoding='utf-8'))
  (_HERE / '_static' / 'leaderboard.html').write_text(
      leaderboard_page.html(results), encoding='utf-8')
