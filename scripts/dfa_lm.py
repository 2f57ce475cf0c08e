"""Language models by direct feedback and other rules: bits a character.

  python scripts/dfa_lm.py [--rules=backprop,dfa_macro] [--depths=3] \
      [--seeds=0,1,2] [--trial]
  python scripts/dfa_lm.py --dataset=wikitext103 --text=wiki.train.txt

`tiny_shakespeare`: a pre-norm decoder of characters, width 128, four heads, rows of
128 characters, twelve epochs of AdamW with a cosine; validation bits a character
are the table. Rows: backprop, Kolen-Pollack, weight mirror, sign symmetry, feedback
alignment; direct feedback once (macro) or three times (micro) a block, of the error
behind the projection to the vocabulary, or before it (`_hidden`); forward gradient
of activities with a loss for every block; and the frozen blocks. Each rule has five
learning rates and decays, judged on validation examples for a quarter of the epochs.
The test split chose nothing. Read from TFDS_DATA_DIR.

`wikitext103`: the ten commands of Direct feedback alignment scales to modern deep
learning tasks and architectures, Launay, Poli, Boniface and Krzakala, NeurIPS 2020
(https://arxiv.org/abs/2006.12878), on a text file, --text, which is to be the
training text of WikiText-103 in lower case; perplexities are per byte pair. They
found an epoch to take 45 minutes with backprop and 55 with direct feedback on one
V100: this preset wants a GPU. See experiments/configs/dfa_lm.py for its settings,
which are not searched.

Must hold on tiny_shakespeare: backprop at most 2.2 bits a character; the frozen
blocks at least .3 bits above backprop, so that blocks matter; then Kolen-Pollack
within .1 bits of backprop, and direct feedback to each block below the frozen
blocks. On wikitext103: the best perplexity of direct feedback is above backprop's,
and that of macro below that of micro.

Twelve epochs of backprop, 5,880 steps, took 23 minutes on one core: the eleven rows
are five to six hours, and the search another five, which --candidate=1 leaves out.
--trial, two epochs of each without a smaller model, is about an hour without the
search.
"""

import math

from experiments import reproduction
from experiments import transformers
from experiments.configs import dfa_lm
import matplotlib.pyplot as plt

_BITS, _TEST = 'validation bits a character', 'test bits a character'
_PERPLEXITY = 'validation perplexity'
_CHARACTERS, _WIKITEXT = 'tiny_shakespeare', 'wikitext103'
RULES = (
    'backprop', 'kolen_pollack', 'weight_mirror', 'usf', 'feedback_alignment',
    'dfa_macro', 'dfa_micro', 'dfa_macro_hidden', 'dfa_micro_hidden', 'lg_fg_a',
    'frozen')
DEPTHS = (1, 2, 3, 4, 6)
_DEPTH = 3
TRIAL = transformers.Trial(depths=(_DEPTH,), rules=RULES, epochs=2)


def _last(name, split):
  """A column's value: that of the last epoch."""
  def value(run):
    found = run.get(f'{name}_by_epoch', {}).get(split)
    return found[-1] if found else None

  return value


def _label(rule, depth=_DEPTH):
  return f'{_CHARACTERS},{transformers.row_of(rule, depth)}'


def _gap(rule, other):
  return lambda results: results.mean(_label(rule), _BITS) - results.mean(
      _label(other), _BITS)


def _excused(results):
  """For `Check.excused`: the frozen blocks do as well as backprop."""
  try:
    gap = _gap('frozen', 'backprop')(results)
  except reproduction.MissingError:
    return ''
  return '' if gap >= .3 else (
      f'the frozen blocks are {gap:.2f} bits above backprop, less than .3: blocks '
      'do not matter')


def _best(points):
  """Measures the lowest perplexity of the rows of some points."""
  def measure(results):
    found = [
        number.mean for row in dfa_lm.WIKITEXT if row.startswith(points)
        if (number := results.number(
            f'{_WIKITEXT},{transformers.row_of(row, dfa_lm.DEPTH)}',
            _PERPLEXITY))]
    if not found:
      raise reproduction.MissingError(f'no row of {points} is finished')
    return min(found)

  return measure


def _checks(preset):
  if preset == _WIKITEXT:
    bp, macro, micro = (_best(p) for p in ('bp', 'macro', 'micro'))
    return [
        reproduction.Check(
            'wikitext103: best perplexity of macro minus that of backprop',
            lambda results: macro(results) - bp(results), low=0.),
        reproduction.Check(
            'wikitext103: best perplexity of micro minus that of macro',
            lambda results: micro(results) - macro(results), low=0.)]
  return [
      reproduction.between(
          _label('backprop'), _BITS, -math.inf, math.nextafter(2.2, math.inf)),
      reproduction.difference(
          _label('frozen'), _label('backprop'), _BITS, math.nextafter(.3, 0.)),
      reproduction.Check(
          f'{_label("kolen_pollack")} from backprop: {_BITS}',
          lambda results: abs(_gap('kolen_pollack', 'backprop')(results)),
          high=math.nextafter(.1, math.inf), excused=_excused),
      *(reproduction.difference(
          _label('frozen'), _label(f'dfa_macro{error}'), _BITS)._replace(
              excused=_excused) for error in ('', '_hidden'))]


def draw(results: reproduction.Results, path: str) -> None:
  """Validation bits (or perplexity) by epoch, a panel a preset."""
  presets = list(dict.fromkeys(run['preset'] for run in results.runs))
  figure, axes = plt.subplots(
      1, len(presets), figsize=(1.5 + 5.5 * len(presets), 5.), squeeze=False,
      layout='constrained')
  for axis, preset in zip(axes[0], presets):
    name = 'perplexity' if preset == _WIKITEXT else 'bits_per_character'
    rows = list(dict.fromkeys(
        run['row'] for run in results.runs if run['preset'] == preset))
    for i, row in enumerate(rows):
      for run in results.of(row):
        curve = run.get(f'{name}_by_epoch', {}).get('validation', [])
        line, = axis.plot(
            range(1, len(curve) + 1), curve, marker='o', ms=3, color=f'C{i}',
            linestyle='--' if 'frozen' in row else '-')
      line.set_label(row.rpartition(',')[2].replace('_', ' '))
    axis.set_title(preset)
    axis.set_xlabel('epoch')
    axis.set_ylabel(f'validation, {name.replace("_", " ")}')
    axis.grid(alpha=.25)
    axis.legend(fontsize='small')
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _prepare(experiment, values, given):
  """`--text` is what WikiText's rows read."""
  asked = given['dataset'] or values['presets']
  if bool(given['text']) != (_WIKITEXT in asked) and not values['read']:
    raise ValueError(
        '`text` must be given with --dataset=wikitext103, and with that alone: '
        'a text file, as --text=wiki.train.txt.')
  if given['text']:
    if len(asked) > 1:
      raise ValueError(
          '`dataset` must be wikitext103 alone, whose text is a file, got '
          f'{",".join(asked)}; run the others by another command.')
    values = {
        **values, 'override': [f'dataset={given["text"]}', *values['override']]}
    given['depths'] = given['depths'] or [dfa_lm.DEPTH]
    given['rules'] = given['rules'] or list(dfa_lm.WIKITEXT)
  return experiment, values


EXPERIMENT = reproduction.Experiment(
    name='dfa_lm',
    title='Language models by direct feedback',
    rows=[
        *(reproduction.Row(
            transformers.row_of(rule, depth),
            dfa_lm.get_config(f'{rule}:{depth}'), {}, _CHARACTERS)
          for depth in DEPTHS for rule in RULES),
        *(reproduction.Row(
            transformers.row_of(row, dfa_lm.DEPTH),
            dfa_lm.get_config(f'wikitext:{row}'), {}, _WIKITEXT)
          for row in dfa_lm.WIKITEXT)],
    columns=[
        reproduction.Column(_BITS, _last('bits_per_character', 'validation'), 3),
        reproduction.Column(_TEST, _last('bits_per_character', 'test'), 3),
        reproduction.Column(_PERPLEXITY, _last('perplexity', 'validation'), 2),
    ],
    checks=_checks, presets=(_CHARACTERS,), draw=draw)

if __name__ == '__main__':
  transformers.main(
      EXPERIMENT, TRIAL, (_DEPTH,), unsearched=(_WIKITEXT,), more={
          'text': (transformers.flags.DEFINE_string, '', (
              'The text file of --dataset=wikitext103.'))},
      prepare=_prepare)
