"""Builds the sdist and the wheel, and trains with the wheel in an empty venv.

  python .ci/package.py

Fails where a tracked file is missing from the sdist, where the wheel holds
anything but `bpjax`, or where the README's examples do not run with the wheel
and what it requires alone.
"""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile

_WITHOUT_EXTRA = '''
try:
  bpjax.train.fit
except ImportError as error:
  assert "pip install 'bpjax[train]'" in str(error), error
else:
  raise AssertionError('bpjax.train works without its extra')
'''
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def main():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    # The wheel is built from the sdist, so that the sdist is enough.
    _run(sys.executable, '-m', 'build', '--outdir', folder / 'dist', _ROOT)
    sdist, = folder.glob('dist/*.tar.gz')
    wheel, = folder.glob('dist/*.whl')
    _check_sdist(sdist)
    _check_wheel(wheel)
    venv.create(folder / 'venv', with_pip=True)
    python = folder / 'venv' / 'bin' / 'python'
    _run(python, '-m', 'pip', 'install', '--quiet', '--no-compile',
         '--disable-pip-version-check', wheel)
    example = folder / 'example.py'
    example.write_text(_example(), encoding='utf-8')
    _run(python, example, cwd=folder, env={
        key: value for key, value in os.environ.items()
        if key != 'PYTHONPATH'})
  print('the wheel holds bpjax alone, installs, and trains')


def _run(*command, **options):
  subprocess.run(list(map(str, command)), check=True, **options)


def _check_sdist(path):
  with tarfile.open(path) as file:
    held = {name.partition('/')[2] for name in file.getnames()}
  tracked = subprocess.run(
      ['git', 'ls-files'], cwd=_ROOT, check=True, capture_output=True,
      text=True).stdout.split('\n')
  missing = sorted(set(filter(None, tracked)) - held)
  if missing:
    sys.exit(f'error: the sdist lacks {", ".join(missing)}; MANIFEST.in says '
             'what it holds.')


def _check_wheel(path):
  with zipfile.ZipFile(path) as file:
    names = file.namelist()
  top = {name.partition('/')[0] for name in names}
  packages = {name for name in top if not name.endswith('.dist-info')}
  if packages != {'bpjax'} or 'bpjax/py.typed' not in names:
    sys.exit(f'error: the wheel must hold `bpjax` alone, with py.typed, got '
             f'{sorted(packages)}.')


def _example():
  """The README's Python that needs no extra, and what says that one is missing."""
  text = (_ROOT / 'README.md').read_text(encoding='utf-8')
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.M | re.S)
  if not blocks:
    sys.exit('error: the README has no Python example.')
  blocks = [block for block in blocks if 'bpjax.train' not in block]
  return '\n'.join([*blocks, _WITHOUT_EXTRA])


if __name__ == '__main__':
  main()
