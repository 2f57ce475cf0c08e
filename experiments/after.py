"""What the commands that use a trained run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import sys

from absl import app
from absl import flags
from absl import logging
from bpjax.train.folder import streams

WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
BEST = flags.DEFINE_bool(
    'best', False, 'Take the checkpoint of the best epoch (`keep_best`).')
TRUST_CODE = flags.DEFINE_bool(
    'trust_code', False, "Run the code that the run's config names.")


def start(use: Callable[..., None], takes_files: bool = False) -> None:
  """Parses the command line, restores the run and calls `use(run, files)`.

  Whatever cannot work is one sentence, and exit code 2.
  """
  flags.mark_flag_as_required('workdir')

  def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    if argv[1:] and not takes_files:
      _refuse(f'unexpected argument {argv[1]!r}; every argument is a flag.')
    from bpjax.train import restore

    try:
      run = restore.restore(
          WORKDIR.value, best=BEST.value, trust_code=TRUST_CODE.value)
      use(run, argv[1:])
    except ValueError as error:
      _refuse(str(error))

  def parse(argv: Sequence[str]) -> Sequence[str]:
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      _refuse(f'the command line is not understood: {error}')
      return []

  streams.guarded(lambda: app.run(main, flags_parser=parse))


def _refuse(text):
  streams.complain(f'error: {text}')
  sys.exit(2)
