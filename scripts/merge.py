r"""Networks that share their feedback, averaged: what survives, and why.

  python scripts/merge.py --study=rules [--dataset=mnist] [--seeds=5] \
      [--output=results/merge_mnist.json]
  python scripts/merge.py --study=settings | --study=clients
  python scripts/merge.py --read=results/merge_mnist.json

Networks learn from different initial weights and in different orders, and their
parameters are averaged as they are. Under backprop that destroys them. Direct
feedback alignment takes all networks with one F to the same weights up to what
the start left in them (align, then memorise: the dynamics of learning with
feedback alignment, Refinetti, d'Ascoli, Ohana and Goldt, 2020,
https://arxiv.org/abs/2011.12428), so that theirs can be averaged.

Studies, all on MLPs with tanh, SGD with a cosine, and L2 decay:

  rules     every rule with the same feedback and with its own, and the controls:
            backprop from one common start; random features that stay as they
            are, with a trained readout; neurons matched before averaging (weight
            matching, https://arxiv.org/abs/2209.04836, with permutations, and
            with signs, too, since tanh is odd); the readout refitted after
            averaging (ridge regression); an ensemble of the outputs.
  settings  what closes the gap of direct feedback alignment that is left: one
            thing changed at a time, and whether alignment predicts the loss.
  clients   four clients with a part of the data each, disjoint or skewed,
            averaged once at the end, or after every epoch.

Rate and decay of every row are chosen from --rates and --decays by the accuracy
on validation examples of the mean of two networks, with a seed that is not
measured; the same candidates for every row. In `settings` nothing is chosen: each
row has the first of both, but for what it changes. Differences are paired by seed: seeds
give equal initial weights to all rows. A claim holds where the difference is
above 0 and a one-sided paired t test gives less than .05; the exact sign-flip
test beside it cannot come below 1 / 2^seeds. Exits with 1 where one fails.
"""

from collections.abc import Mapping, Sequence
import itertools
import json
from typing import Any

from absl import flags
from experiments import measurement
from experiments import merging
from experiments.merging import Setting
import matplotlib
import numpy as np
from scipy import stats

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

_STUDY = flags.DEFINE_enum(
    'study', 'rules', ['rules', 'settings', 'clients'], 'What is measured.')
_DATASET = flags.DEFINE_string('dataset', 'mnist', "'digits', or a TFDS set.")
_ROWS = flags.DEFINE_list('rows', [], (
    'Rows to train, by their number from 0; default: all.'))
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Groups of networks a row.', 2)
_NETWORKS = flags.DEFINE_integer(
    'networks', 4, 'In a group; also the number of clients.', 2)
_WIDTHS = flags.DEFINE_list('widths', ['128'] * 3, 'Of the hidden layers.')
_RATES = flags.DEFINE_list('rates', ['.1', '.3'], 'Candidates.')
_DECAYS = flags.DEFINE_list('decays', ['.001', '.003', '.01'], 'Candidates.')
_EPOCHS = flags.DEFINE_integer('epochs', 10, 'Also the number of rounds.', 1)
_EXAMPLES = flags.DEFINE_integer(
    'examples', 6000, 'To train on; 0: all but those of validation.', 0)
_VALIDATION = flags.DEFINE_integer('validation', 5000, 'Held out.', 1)
_BATCH = flags.DEFINE_integer('batch', 100, 'Examples of a step.', 1)
_READ = flags.DEFINE_string('read', '', (
    'JSON file of results: print its table and claims, train nothing.'))

_SEARCH_SEED = 1000
_BP = Setting('backprop', feedback='own')
_DFA = Setting('direct_feedback_alignment')
# With beta = .1, the default, hidden layers take steps of a tenth.
_LRA = Setting('recursive_local_representation_alignment',
               (('beta', 1.), ('update', 'fixed')))
RULES = {
    'BP': _BP,
    'BP, common start': _BP._replace(start='common'),
    'DFA, same F': _DFA,
    'DFA, own F': _DFA._replace(feedback='own'),
    'FA, same B': Setting('feedback_alignment'),
    'FA, own B': Setting('feedback_alignment', feedback='own'),
    'KP, same B at first': Setting('kolen_pollack'),
    'KP, own B': Setting('kolen_pollack', feedback='own'),
    'rec-LRA, same E': _LRA,
    'rec-LRA, own E': _LRA._replace(feedback='own'),
    'random features, own': _BP._replace(trained='readout'),
    'random features, common': _BP._replace(trained='readout', start='common'),
}
CLIENTS = {name: RULES[name] for name in (
    'BP', 'BP, common start', 'DFA, same F', 'DFA, own F', 'FA, same B')}
_SPLITS = ('disjoint', 'skewed')
# Row and column that must be above another row and column.
Claim = tuple[str, str, str, str]
_ALONE = {
    'rules': [
        ('DFA, same F', 'mean_4', 'DFA, own F', 'mean_4'),
        ('DFA, same F', 'mean_4', 'BP', 'mean_4'),
        ('DFA, same F', 'mean_4', 'BP', 'permuted_4'),
        ('DFA, same F', 'mean_4', 'BP', 'flipped_4'),
        ('DFA, same F', 'mean_4', 'BP', 'refit_4'),
        ('DFA, same F', 'mean_4', 'random features, common', 'refit_1'),
        ('FA, same B', 'mean_4', 'FA, own B', 'mean_4'),
        ('KP, same B at first', 'mean_4', 'KP, own B', 'mean_4'),
        ('rec-LRA, same E', 'mean_4', 'rec-LRA, own E', 'mean_4')],
    'settings': [
        ('as it is', 'lost', 'decay 0.03', 'lost'),
        ('decay 0', 'lost', 'as it is', 'lost'),
        ('1 epochs', 'lost', 'as it is', 'lost'),
        ('8 layers', 'mean_4', '8 layers, own F', 'mean_4'),
        ('8 layers', 'mean_4', '8 layers, BP', 'mean_4')],
    'clients': [
        (f'{split}: {a}', column, f'{split}: {b}', column)
        for split in _SPLITS for column in ('once', 'round 1')
        for a, b in (('DFA, same F', 'BP'), ('DFA, same F', 'DFA, own F'))] + [
            (f'{split}: DFA, same F', 'once', f'{split}: DFA, same F', 'single')
            for split in _SPLITS],
}
# Differences that are worth a line and are no claim.
_FOUND = {
    'rules': [
        ('DFA, same F', 'single', 'DFA, same F', 'mean_4'),
        ('BP', 'single', 'DFA, same F', 'single'),
        ('BP, common start', 'mean_4', 'DFA, same F', 'mean_4'),
        ('DFA, same F', 'ensemble_4', 'DFA, same F', 'mean_4'),
        ('BP', 'ensemble_4', 'DFA, same F', 'mean_4'),
        ('DFA, same F', 'refit_4', 'DFA, same F', 'mean_4'),
        ('BP', 'flipped_4', 'BP', 'permuted_4')],
    'settings': [],
    'clients': [
        (f'{split}: BP, common start', column, f'{split}: DFA, same F', column)
        for split in _SPLITS for column in ('once', 'last round')],
}
_COLUMNS = {
    'rules': ('single', 'mean_2', 'mean_4', 'permuted_4', 'flipped_4',
              'refit_1', 'refit_4', 'ensemble_4', 'barrier', 'cosine'),
    'settings': ('single', 'mean_2', 'mean_4', 'mean_8', 'lost', 'cosine',
                 'weight_alignment', 'gradient_alignment'),
    'clients': ('single', 'once', 'round 1', 'last round'),
}


def settings(base: Setting) -> dict[str, Setting]:
  """The rows of `settings`: direct feedback alignment, one thing changed."""
  args = lambda **changes: base._replace(rule_args=tuple(changes.items()))
  deep = base._replace(widths=(base.widths[0],) * 8)
  small = base._replace(init_scale=.3)
  bp = dict(rule='backprop', feedback='own')
  return {
      'as it is': base,
      **{f'decay {d:g}': base._replace(decay=d)
         for d in (0., .001, .01, .03) if d != base.decay},
      **{f'{n} epochs': base._replace(epochs=n) for n in (1, 3, 30)},
      **{f'width {n}': base._replace(widths=(n,) * len(base.widths))
         for n in (32, 256)},
      **{f'{n} layers': base._replace(widths=(base.widths[0],) * n)
         for n in (2, 4)},
      '8 layers': deep,
      '8 layers, own F': deep._replace(feedback='own'),
      '8 layers, BP': deep._replace(**bp),
      'start x .3': small,
      'start x .3, own F': small._replace(feedback='own'),
      'start x .3, BP': small._replace(**bp),
      'F shared by layers': args(shared=True),
      'F with 1 entry a neuron': args(connections=1),
      'F x 3': args(scale=3.),
  }


def _train(setting, data, seed, networks):
  group = merging.begin(setting, data, seed, networks)
  return merging.train(group, setting, data, seed)


def _candidates(setting):
  return [setting._replace(rate=rate, decay=decay)
          for rate, decay in itertools.product(
              _floats('rates', _RATES), _floats('decays', _DECAYS))]


def chosen(candidates: Sequence[Setting], judge) -> Setting:
  """The candidate with the highest `judge(candidate)`, the first of equals."""
  return candidates[0] if len(candidates) == 1 else max(candidates, key=judge)


def _merged_accuracy(group, part):
  return merging.accuracy(
      group.net, merging.merge.average(merging.members(group)), part)


def _measure_rules(rows, data):
  for name, base in rows.items():
    setting = chosen(_candidates(base), lambda candidate: _merged_accuracy(
        _train(candidate, data, _SEARCH_SEED, 2), data.validation))
    yield _row(name, setting, [
        merging.measure(_train(setting, data, seed, _NETWORKS.value), data)
        for seed in range(_SEEDS.value)])


def _measure_settings(rows, data):
  for name, setting in rows.items():
    found = []
    for seed in range(_SEEDS.value):
      # The mean of 8 of the first row alone, and of no other.
      networks = _NETWORKS.value * (2 if name == 'as it is' else 1)
      one = merging.measure(
          _train(setting, data, seed, networks), data, (2, 4, 8), False)
      found.append({**one, 'lost': one['single'] - one['mean_4']})
    yield _row(name, setting, found)


def _measure_clients(rows, data):
  for split, (name, base) in itertools.product(_SPLITS, rows.items()):

    def learn(setting, seed, epochs=None, group=None, split=split):
      own = merging.split(
          np.asarray(data.train.y), _NETWORKS.value, split, seed)
      group = group or merging.begin(setting, data, seed, _NETWORKS.value)
      return merging.train(group, setting, data, seed, own, epochs)

    setting = chosen(_candidates(base), lambda candidate: _merged_accuracy(
        learn(candidate, _SEARCH_SEED), data.validation))  # pylint: disable=cell-var-from-loop
    found = []
    for seed in range(_SEEDS.value):
      once = learn(setting, seed)
      one = {
          'single': float(np.mean([
              merging.accuracy(once.net, params, data.test)
              for params in merging.members(once)])),
          'once': _merged_accuracy(once, data.test)}
      group = None
      for epoch in range(setting.epochs):
        group = learn(setting, seed, (epoch, epoch + 1), group)
        one[f'round {epoch + 1}'] = _merged_accuracy(group, data.test)
        group = merging.replaced(
            group, merging.merge.average(merging.members(group)))
      one['last round'] = one[f'round {setting.epochs}']
      found.append(one)
    yield _row(f'{split}: {name}', setting, found)


def _row(name, setting, found):
  print(f'trained: {name}, rate {setting.rate:g}, decay {setting.decay:g}, ' +
        ', '.join(f'{k} {np.mean([f[k] for f in found]):.2f}'
                  for k in ('single', 'mean_4', 'once') if k in found[0]),
        flush=True)
  return {'row': name, 'setting': setting._asdict(), 'seeds': found}


def _values(rows: Mapping[str, Any], row: str, column: str):
  """One number a seed, or None where the row or column was not measured."""
  if row not in rows or column not in rows[row]['seeds'][0]:
    return None
  return np.array([seed[column] for seed in rows[row]['seeds']])


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """The mean of a - b, its standard error, and two one-sided tests.

  Args:
    a: one number a seed.
    b: of the same seeds.

  Returns:
    'difference'; 'standard_error'; 'p': of the paired t test; 'p_signs': the
    share of all flips of signs whose mean is at least as high.

  Example:
    >>> difference(np.array([2., 3.]), np.array([1., 1.]))['p_signs']
    0.25
  """
  change = a - b
  flips = np.array(list(itertools.product((1, -1), repeat=len(change))))
  error = np.std(change, ddof=1) / len(change)**.5
  p = float(change.mean() <= 0) if not error else float(
      stats.ttest_1samp(change, 0, alternative='greater').pvalue)
  reached = flips @ change >= change.sum() - 1e-9 * np.abs(change).sum()
  return {'difference': float(change.mean()), 'standard_error': float(error),
          'p': p, 'p_signs': float(np.mean(reached))}


def _compared(rows, claim):
  a, b = _values(rows, *claim[:2]), _values(rows, *claim[2:])
  if a is None or b is None:
    return None
  found = difference(a, b)
  return found, (
      '{0}, {1}, over {2}, {3}: '.format(*claim) +
      f'{found["difference"]:.3g} +- {found["standard_error"]:.2g} '
      f'(t test p = {found["p"]:.2g}, sign flips p = {found["p_signs"]:.2g})')


def predicted(rows: Mapping[str, Any]) -> list[str]:
  """Whether alignment predicts what is lost, over settings with the same F."""
  own = {n: r for n, r in rows.items()
         if r['setting']['feedback'] == 'same'}
  lost = [np.mean(_values(own, name, 'lost')) for name in own]
  lines = []
  for column in ('weight_alignment', 'gradient_alignment', 'cosine', 'single'):
    values = [np.mean(_values(own, name, column)) for name in own]
    rank, p = stats.spearmanr(values, lost)
    lines.append(f'rank correlation of {column} with what is lost, over '
                 f'{len(own)} settings: {rank:.2f} (p = {p:.2g})')
  return lines


def _show(study, record):
  """Prints tables and lines; what failed."""
  rows = {row['row']: row for row in record['rows']}
  columns = [c for c in _COLUMNS[study]
             if any(_values(rows, row, c) is not None for row in rows)]
  table = measurement.table(
      f'{record["dataset"]}, {record["examples"]} examples, accuracy in %, '
      f'mean (standard error) of {len(record["rows"][0]["seeds"])} seeds',
      'row', 'rate', 'decay', *columns)
  for name, row in rows.items():
    cells = []
    for column in columns:
      values = _values(rows, name, column)
      digits = 2 if column in ('barrier', 'cosine') or 'ali' in column else 1
      cells.append('-' if values is None else
                   f'{values.mean():.{digits}f} '
                   f'({np.std(values, ddof=1) / len(values)**.5:.{digits}f})')
    table.add_row(name, *(f'{row["setting"][k]:g}' for k in ('rate', 'decay')),
                  *cells)
  measurement.show(table, width=160)
  for line in filter(None, (_compared(rows, c) for c in _FOUND[study])):
    print(f'found: {line[1]}')
  if study == 'settings':
    for line in predicted(rows):
      print(f'found: {line}')
  wrong = []
  for compared in (_compared(rows, claim) for claim in _ALONE[study]):
    if compared is None:
      continue
    found, text = compared
    holds = found['difference'] > 0 and found['p'] < .05
    print(f'{"holds" if holds else "fails"}: {text}')
    if not holds:
      wrong.append(text)
  return wrong


def _draw(study, record, path):
  """Accuracy of the mean against the number of networks, settings or rounds."""
  rows = {row['row']: row for row in record['rows']}
  if study == 'clients':
    figure, panels = plt.subplots(
        1, len(_SPLITS), figsize=(9, 3.8), sharey=True, layout='constrained')
    for axis, split in zip(panels, _SPLITS):
      for name in (n for n in rows if n.startswith(split)):
        rounds = range(1, rows[name]['setting']['epochs'] + 1)
        _line(axis, rounds, [_values(rows, name, f'round {r}') for r in rounds],
              name.removeprefix(f'{split}: '))
      axis.set_title(split)
      axis.set_xlabel('round')
    panels[0].set_ylabel('accuracy of the mean, %')
    panels[0].legend(fontsize='small')
  elif study == 'settings':
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 3.8), sharey=True, layout='constrained')
    for axis, column in zip(panels, ('weight_alignment', 'cosine')):
      for name in rows:
        values = _values(rows, name, column)
        if values is not None and rows[name]['setting']['feedback'] == 'same':
          at = values.mean(), _values(rows, name, 'lost').mean()
          axis.plot(*at, 'o')
          axis.annotate(name, at, fontsize=6, xytext=(3, 3),
                        textcoords='offset points')
      axis.set_xlabel(column.replace('_', ' '))
    panels[0].set_ylabel('points lost by averaging four')
  else:
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout='constrained')
    for name in rows:
      columns = ['single', *(f'mean_{k}' for k in (2, 4, 8))]
      columns = [c for c in columns if _values(rows, name, c) is not None]
      _line(axis, [int(c.rpartition('_')[2]) if '_' in c else 1
                   for c in columns],
            [_values(rows, name, c) for c in columns], name)
    axis.set_xscale('log', base=2)
    axis.set_xticks([1, 2, 4], ['1', '2', '4'])
    axis.set_xlabel('networks averaged')
    axis.set_ylabel(f'{record["dataset"]}, test accuracy, %')
    axis.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, .5))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _line(axis, x, values, label):
  axis.errorbar(
      list(x), [v.mean() for v in values],
      [np.std(v, ddof=1) / len(v)**.5 for v in values], marker='o', ms=3,
      capsize=2, label=label,
      linestyle='-' if 'same' in label or 'common' in label else '--')


def _floats(name, flag):
  try:
    return [float(v) for v in flag.value]
  except ValueError:
    raise measurement.FlagError(
        f'`{name}` must be numbers, such as --{name}=.1,.3, got '
        f'{",".join(flag.value)!r}.') from None


def _trained():
  """Trains all rows of the study."""
  study = _STUDY.value
  widths = tuple(measurement.numbers('widths', _WIDTHS.value))
  rate, decay = (f[0] for f in (
      _floats('rates', _RATES), _floats('decays', _DECAYS)))
  common = dict(widths=widths, epochs=_EPOCHS.value, batch=_BATCH.value)
  rows = (settings(_DFA._replace(rate=rate, decay=decay, **common))
          if study == 'settings' else
          {name: row._replace(**common)
           for name, row in {'rules': RULES, 'clients': CLIENTS}[study].items()})
  if _ROWS.value:
    wanted = measurement.numbers('rows', _ROWS.value, 0)
    if max(wanted) >= len(rows):
      raise measurement.FlagError(
          f'`rows` must be below {len(rows)}, got {max(wanted)}.')
    rows = {name: rows[name] for name in [list(rows)[i] for i in wanted]}
  try:
    data = merging.load(_DATASET.value, _EXAMPLES.value, _VALIDATION.value)
    parts = _NETWORKS.value if study == 'clients' else 1
    if len(data.train.y) < parts * _BATCH.value:
      raise ValueError(
          f'`batch` must be at most the {len(data.train.y) // parts} examples '
          f'of a network, got {_BATCH.value}.')
  except ValueError as error:
    raise measurement.FlagError(str(error)) from error
  measure = {'rules': _measure_rules, 'settings': _measure_settings,
             'clients': _measure_clients}[study]
  return {'study': study, 'dataset': _DATASET.value,
          'examples': len(data.train.y), 'rows': list(measure(rows, data))}


def _measure(picture):
  if _READ.value:
    try:
      with open(_READ.value, encoding='utf-8') as file:
        record = json.load(file)
      record = {k: record[k] for k in ('study', 'dataset', 'examples', 'rows')}
    except (OSError, ValueError, KeyError) as error:
      raise measurement.FlagError(
          f'`read` must be a file that --output wrote, and {_READ.value!r} is '
          f'none ({error}).') from error
  else:
    record = _trained()
  wrong = _show(record['study'], record)
  _draw(record['study'], record, picture)
  return record, wrong


if __name__ == '__main__':
  measurement.main('merge', _measure)
