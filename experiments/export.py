"""Writes a trained run as files that load without bpjax.

python -m experiments.export --workdir=runs/digits [--output=DIR] [--best]

A program for `jax.export`, the same as StableHLO text, weights as safetensors,
and what they need to be understood.
"""

import os

from absl import flags
from experiments import after

OUTPUT = flags.DEFINE_string('output', '', 'The folder; empty: WORKDIR/export.')


def use(run, files):
  del files
  from bpjax.train import export

  folder = OUTPUT.value or os.path.join(run.workdir, 'export')
  for path in export.export(run, folder).values():
    print(path)


if __name__ == '__main__':
  after.start(use)
