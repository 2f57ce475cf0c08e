"""Draws how close runs came to backprop, layer by layer, over training.

  python scripts/plot_alignment.py RUN... [--output=alignment.png]

RUN is the folder of a run, or of a sweep (all its runs), trained with
--config.alignment_every=N. Prints a table of the runs as well: test accuracy,
step time relative to the backprop run among them, and the last alignment. The
first row of panels is the cosine between a layer's teaching signal and
backprop's (line: mean over examples; band: standard deviation), the second the
cosine between a layer's weights and what the rule aligns them with.
"""

from __future__ import annotations

import math
import os
import statistics
import sys

from absl import app
from absl import flags
from bpjax.train.folder import streams
from bpjax.train.folder import workdir
import matplotlib
import rich.console
import rich.table

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

_OUTPUT = flags.DEFINE_string(
    'output', None, 'The picture; default alignment.png in the first folder.')


def find_runs(folders: list[str]) -> list[str]:
  """The finished runs in `folders`: each one itself, or those in it."""
  runs = []
  for folder in folders:
    inside = sorted(
        os.path.join(folder, name) for name in os.listdir(folder)
    ) if os.path.isdir(folder) else []
    found = [f for f in (folder, *inside)
             if workdir.read_summary(f) is not None]
    if not found:
      raise ValueError(
          f'`{folder}` holds no finished run; train one with `python -m '
          'experiments.main --config=... --workdir=...`.')
    runs += found
  return runs


def read(run: str) -> dict:
  """A run's summary, and its alignment lines as unit -> list of lines."""
  summary = workdir.read_summary(run)
  units = {}
  for line in workdir.read_metrics(run):
    if line['split'] == 'alignment':
      units.setdefault(line['unit'], []).append(line)
  # In the order of the model, not of the file.
  order = [u for u in summary['units'] if u in units]
  summary['curves'] = {u: units[u] for u in order}
  return summary


def hidden(summary: dict) -> dict:
  """The curves of all units but the output, whose signal is always exact."""
  curves = summary['curves']
  return {u: curves[u] for u in list(curves)[:-1]}


def print_table(runs: list[dict], console: rich.console.Console) -> None:
  """One row a run: accuracy, relative step time, alignment of hidden units."""
  times = [r['median_step_time'] for r in runs if r['rule'] == 'backprop']
  reference = statistics.median(times) if times else None
  table = rich.table.Table(
      'rule', 'seed', 'test accuracy', 'step time / backprop',
      'final alignment, cosine')
  for run in runs:
    last = [c[-1]['teaching'] for c in hidden(run).values()]
    ratio = run['median_step_time'] / reference if reference else None
    table.add_row(
        run['rule'], str(run['seed']), f'{100 * run["test_accuracy"]:.2f}%',
        '-' if ratio is None else f'{ratio:.2f}',
        f'{statistics.fmean(last):.3f}' if last else '-')
  console.print(table)


def draw(runs: list[dict], path: str) -> None:
  """Draws the panels; one colour a rule, seeds in the same colour."""
  units = list(dict.fromkeys(u for r in runs for u in r['curves']))
  columns = max(len(units), 1)
  figure, axes = plt.subplots(
      2, columns, figsize=(1.5 + 3.6 * columns, 6), sharex=True, sharey='row',
      squeeze=False, layout='constrained')
  colours = {}
  for run in runs:
    new = run['rule'] not in colours
    colour = colours.setdefault(run['rule'], f'C{len(colours)}')
    label = run['rule'].replace('_', ' ') if new else None
    for unit, curve in run['curves'].items():
      top, bottom = axes[:, units.index(unit)]
      epochs = [c['step'] * run['epochs'] / run['steps'] for c in curve]
      number = lambda value: math.nan if value is None else value
      mean = [number(c['teaching']) for c in curve]
      std = [number(c['teaching_std']) for c in curve]
      top.plot(epochs, mean, color=colour, label=label)
      top.fill_between(
          epochs, [m - s for m, s in zip(mean, std)],
          [m + s for m, s in zip(mean, std)], color=colour, alpha=.12, lw=0)
      weight = [number(c['weight']) for c in curve]
      if not all(map(math.isnan, weight)):
        bottom.plot(epochs, weight, color=colour, label=label)
      label = None
  for axis, unit in zip(axes[0], units):
    axis.set_title(unit)
  for axis in axes[1]:
    axis.set_xlabel('epoch')
  axes[0, 0].set_ylabel('teaching signal, cosine to backprop')
  axes[1, 0].set_ylabel('weights, cosine to their target')
  for axis in axes.flat:
    axis.axhline(0, color='0.6', lw=.8, zorder=0)
    axis.grid(alpha=.25)
  handles, labels = zip(*[
      pair for axis in axes[0]
      for pair in zip(*axis.get_legend_handles_labels())])
  figure.legend(handles, labels, loc='outside lower center', ncols=3)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    print('error: name at least one run folder; see --help', file=sys.stderr)
    sys.exit(2)
  try:
    runs = [read(run) for run in find_runs(argv[1:])]
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  console = rich.console.Console()
  print_table(runs, console if console.is_terminal else rich.console.Console(
      width=110))
  measured = [r for r in runs if r['curves']]
  if not measured:
    print('error: no run has alignment; train with '
          '--config.alignment_every=N', file=sys.stderr)
    sys.exit(2)
  path = _OUTPUT.value or os.path.join(argv[1], 'alignment.png')
  draw(measured, path)
  print(f'drew {path}')


if __name__ == '__main__':
  streams.guarded(lambda: app.run(main))
