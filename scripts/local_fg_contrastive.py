"""LocalMixer trained without labels in eleven ways: Table 4 of Ren et al., 2023.

  python scripts/local_fg_contrastive.py [--presets=full] [--seeds=0,1,2] \
      [--rows=BP,LG-FG-A]

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310): the column CIFAR-10, M/8/16. What
the presets `small` (the default: a trial of the whole path, one to two minutes a
row on one CPU core) and `full` (for a GPU) train is said in
experiments/configs/local_mixer_contrastive.py. CIFAR-10 is read from
TFDS_DATA_DIR.

Must hold: LG-FG-A before FG-A and FG-W, in full; every row better than chance in
the trial, which is too short for more.
"""

import bpjax
from experiments import reproduction
from experiments.configs import local_mixer_contrastive

_TEST, _TRAIN = 'test error, %', 'train error, %'
# Variant -> test and train error.
_PUBLISHED = {
    'BP': (24.11, 21.08),
    'L-BP': (24.69, 21.80),
    'LG-BP': (29.63, 25.60),
    'FA': (45.87, 44.06),
    'L-FA': (37.73, 36.13),
    'LG-FA': (36.72, 34.06),
    'DFA': (46.09, 42.76),
    'FG-W': (53.37, 51.56),
    'FG-A': (54.59, 52.96),
    'LG-FG-W': (52.66, 50.23),
    'LG-FG-A': (32.88, 29.73),
}


def _row(variant, preset):
  numbers = zip((_TEST, _TRAIN), _PUBLISHED[variant])
  return reproduction.Row(
      variant, local_mixer_contrastive.get_config(f'{variant}:{preset}'),
      {column: reproduction.Number(value) for column, value in numbers}, preset)


def _checks(preset):
  if preset == 'small':
    return [
        reproduction.between(f'small,{row}', _TEST, 0, 87) for row in _PUBLISHED]
  return [
      reproduction.difference(f'{preset},{row}', f'{preset},LG-FG-A', _TEST)
      for row in ('FG-A', 'FG-W')]


EXPERIMENT = reproduction.Experiment(
    name='local_fg_contrastive',
    title='Ren et al., 2023, Table 4: two views',
    rows=[_row(variant, preset)
          for preset in local_mixer_contrastive.PRESETS
          for variant in bpjax.variants.names()],
    columns=[
        reproduction.Column(
            _TEST, lambda run: 100 - reproduction.test_accuracy(run)),
        reproduction.Column(
            _TRAIN, lambda run: 100 - reproduction.train_accuracy(run)),
    ],
    checks=_checks, presets=('small',))

if __name__ == '__main__':
  reproduction.main(EXPERIMENT)
