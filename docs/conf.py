"""The documentation site: `make docs`.

Mathematics becomes MathML while the site is built, so that a page needs neither
the network nor a script to show it.
"""

import pathlib

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
html_static_path = ['_static']
html_css_files = ['site.css']
html_math_renderer = 'mathml'

myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 3
# Pages that may not be there yet: their places in the table of contents are.
suppress_warnings = ['toc.empty_glob']

default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types of signatures: of private modules, of other libraries, and variables.
nitpick_ignore_regex = [('py:.*', r'.*')]
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True


def setup(app):
  app.add_html_math_renderer(
      'mathml', inline_renderers=(_render('inline'), None),
      block_renderers=(_render('block'), None))
  _write_examples()


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
