"""Backprop, three rules and frozen blocks in a vision transformer, CIFAR-10.

  python scripts/vit_cifar.py [--depths=4] [--seeds=0,1,2] [--trial] \
      [--override=model_args.width=64]

A pre-norm vision transformer of four blocks, width 128, patches of 4, 30 epochs of
AdamW with a cosine, no augmentation. Five learning rates and decays for each rule,
judged on 2,000 training images set apart, for a quarter of the epochs. CIFAR-10 is
read from TFDS_DATA_DIR. A GPU is wanted for the full protocol; --trial, 5
runs of 30 to 40 s and 25 candidates of half that, fits a core.

Beside ours stand the numbers of a residual MLP: four pre-norm blocks of width 256
on CIFAR-10, three seeds, from a preprint of 2026, Beyond accuracy and alignment: a
diagnostic evaluation protocol for feedback alignment. It is another network, so
that no number has to agree; the order has to: backprop above feedback alignment
above the frozen blocks above direct feedback. Kolen-Pollack, which it does not have,
has to be above feedback alignment.
"""

from experiments import reproduction
from experiments import transformers
from experiments.configs import vit_cifar
import matplotlib.pyplot as plt

_ACCURACY = 'test accuracy, %'
_DEPTH = 4
DEPTHS = (1, 2, 4, 8)
# Of the residual MLP: mean and, where it is given, deviation over three seeds.
_PUBLISHED = {
    'backprop': (61.7, None), 'kolen_pollack': None,
    'feedback_alignment': (40.1, .9), 'dfa_macro': (30.6, .8),
    'frozen': (34.9, None)}
_ORDER = (('backprop', 'feedback_alignment'), ('feedback_alignment', 'frozen'),
          ('frozen', 'dfa_macro'), ('kolen_pollack', 'feedback_alignment'))
TRIAL = transformers.Trial(
    depths=(_DEPTH,), rules=tuple(_PUBLISHED), epochs=2,
    override=('train_examples=10000', 'model_args.width=64',
              'model_args.patch=8', 'warmup_epochs=.2'))


def _row(rule, depth):
  published = _PUBLISHED[rule] if depth == _DEPTH else None
  return reproduction.Row(
      transformers.row_of(rule, depth), vit_cifar.get_config(f'{rule}:{depth}'),
      {_ACCURACY: reproduction.Number(*published, 3)} if published else {})


def _checks(preset):
  del preset
  return [
      reproduction.difference(
          *(transformers.row_of(r, _DEPTH) for r in pair), _ACCURACY)
      for pair in _ORDER]


def draw(results: reproduction.Results, path: str) -> None:
  """Test accuracy by epoch, and the residual MLP's as marks at the right."""
  figure, axis = plt.subplots(figsize=(7, 5), layout='constrained')
  rows = list(dict.fromkeys(run['row'] for run in results.runs))
  for i, row in enumerate(rows):
    for run in results.of(row):
      curve = [100 * a for a in run['test_accuracy_by_epoch']]
      line, = axis.plot(range(1, len(curve) + 1), curve, 'o-', ms=3, color=f'C{i}')
    line.set_label(row.replace('_', ' '))
    published = _PUBLISHED[transformers.parts(row)[0]]
    if published:
      axis.axhline(published[0], color=f'C{i}', ls=':', lw=1)
  axis.set_xlabel('epoch')
  axis.set_ylabel('test accuracy, % (dotted: the residual MLP)')
  axis.grid(alpha=.25)
  axis.legend(fontsize='small')
  figure.savefig(path, dpi=110)
  plt.close(figure)


EXPERIMENT = reproduction.Experiment(
    name='vit_cifar',
    title='CIFAR-10 by a vision transformer; "paper": a residual MLP',
    rows=[_row(rule, depth) for depth in DEPTHS for rule in _PUBLISHED],
    columns=[
        reproduction.Column(_ACCURACY, reproduction.test_accuracy),
        reproduction.Column('train accuracy, %', reproduction.train_accuracy),
    ],
    checks=_checks, draw=draw)

if __name__ == '__main__':
  transformers.main(EXPERIMENT, TRIAL, (_DEPTH,))
