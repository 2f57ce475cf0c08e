"""Code of a user's own, by name: 'package.module:name' or 'file.py:name'.

Only what the user says on the command line, in a config file or to `fit` gets
here; nothing that is read from a folder does. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from typing import Any

_FORM = re.compile(r'(?P<where>[^:\0]+):(?P<name>[A-Za-z_]\w*)', re.ASCII)
_MODULE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*', re.ASCII)
HOW = "'package.module:name' or 'file.py:name'"


def is_code(text: Any) -> bool:
  """Whether a value names code of a user's own.

  Example:
    >>> is_code('my_models:Net'), is_code('mnist:3.0.1')
    (True, False)
  """
  match = _FORM.fullmatch(text) if isinstance(text, str) else None
  return bool(match) and (
      match['where'].endswith('.py') or bool(_MODULE.fullmatch(match['where'])))


def find(field: str, text: str) -> Any:
  """What 'package.module:name' or 'file.py:name' names.

  Args:
    field: of the config, for the error.
    text: the name. Modules are looked for from the current folder on.

  Raises:
    ValueError: if there is no such file, module or name, or if running it
      raises.

  Example:
    >>> find('loss', 'math:sqrt')(4.)
    2.0
  """
  where, _, name = text.partition(':')
  try:
    module = _of_file(where) if where.endswith('.py') else _of_name(where)
  except FileNotFoundError:
    raise ValueError(
        f'`{field}` names a file that is not there, got {text!r}; give '
        f'{HOW}.') from None
  except ModuleNotFoundError as error:
    raise ValueError(
        f'`{field}` {text!r} cannot be imported ({error}); start from the '
        f'folder that holds it, or give {HOW}.') from error
  except (Exception, SystemExit) as error:
    # It is run as code, and may raise anything: what is said is whose it is.
    raise ValueError(
        f'`{field}` {text!r} cannot be imported: it raises '
        f'{type(error).__name__}: {_line(error)}.') from error
  if not hasattr(module, name):
    public = [n for n in vars(module) if not n.startswith('_')]
    raise ValueError(
        f'`{field}` {text!r} must name something that {where} holds; it holds '
        f'{", ".join(public[:20]) or "nothing"}.')
  return getattr(module, name)


def called(field: str, text: str, function: Any, *args, **kwargs) -> Any:
  """What a function of the user's own returns, or one sentence of what it raises.

  Raises:
    ValueError: for whatever else it raises.
  """
  if not callable(function):
    raise ValueError(
        f'`{field}` {text!r} must be a function or a class, got '
        f'{type(function).__name__}.')
  try:
    return function(*args, **kwargs)
  except Exception as error:
    raise ValueError(
        f'`{field}` {text!r} raises {type(error).__name__}: {_line(error)}.'
    ) from error


def _of_name(where):
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.insert(0, os.getcwd())
  return importlib.import_module(where)


def _of_file(where):
  path = os.path.abspath(os.path.expanduser(where))
  # The file's neighbours are what it imports.
  name = 'bpjax_user_' + re.sub(r'\W', '_', path)
  if name in sys.modules:
    return sys.modules[name]
  if not os.path.isfile(path):
    raise FileNotFoundError(path)
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  if os.path.dirname(path) not in sys.path:
    sys.path.insert(0, os.path.dirname(path))
  with contextlib.ExitStack() as stack:
    stack.callback(sys.modules.pop, name)  # What broke off is not kept.
    spec.loader.exec_module(module)
    stack.pop_all()
  return module


def _line(error):
  lines = [line for line in str(error).splitlines() if line.strip()]
  text = lines[0] if lines else 'no message'
  return ''.join(c if c.isprintable() else ' ' for c in text).rstrip('.')
