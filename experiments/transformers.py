"""Rules on transformers: what the scripts that train them share.

A row of their tables is a rule, at a depth: `RULE_DEPTH`. Every rule of a data
set gets the same budget of settings, `CANDIDATES`, judged on validation examples
with seed 0 at the smallest depth but 1 (one block cannot do what two can); the best
is used at all depths, and what was found is kept in the folder of the runs and in
the results file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import dataclasses
import json
import math
import os
import statistics
import time
from typing import Any, NamedTuple

from absl import flags
import bpjax
from bpjax import paths
from bpjax.train import config as config_lib
from experiments import config as flags_lib
from experiments import measurement
from experiments import reproduction
from experiments import search as search_lib
import ml_collections
from scipy import stats

_ACCURACY = 'test accuracy, %'


class Setting(NamedTuple):
  """How a row learns.

  Attributes:
    rule: its name, in a config.
    rule_args: its arguments.
    fields: other fields of the config.
  """
  rule: str
  rule_args: Mapping[str, Any] = {}
  fields: Mapping[str, Any] = {}


_POINTS = bpjax.transformer.points
RULES = {
    'backprop': Setting('backprop'),
    'kolen_pollack': Setting('kolen_pollack'),
    # The mirror's own step is SGD with a rate of 1. Decay and clipping of the
    # parameters would act on its step, too. A noise vector for every position of
    # 32 sequences: the default's 128 would double the time of a step.
    'weight_mirror': Setting('weight_mirror', {'samples': 32}, {
        'feedback_optimizer': 'sgd', 'feedback_learning_rate': 1.,
        'mirror_first': 100, 'clip_norm': 0.}),
    'usf': Setting('sign_symmetry', {'variant': 'uSF'}),
    'feedback_alignment': Setting('feedback_alignment'),
    'dfa_macro': Setting(
        'direct_feedback_alignment', {'placement': 'boundaries'},
        {'boundaries': _POINTS('macro')}),
    'dfa_micro': Setting(
        'direct_feedback_alignment', {'placement': 'boundaries'},
        {'boundaries': _POINTS('micro')}),
    # Before the projection to classes: it passes the readout's own weights.
    'dfa_macro_hidden': Setting(
        'direct_feedback_alignment',
        {'placement': 'boundaries', 'error': 'hidden'},
        {'boundaries': _POINTS('macro', hidden=True)}),
    'dfa_micro_hidden': Setting(
        'direct_feedback_alignment',
        {'placement': 'boundaries', 'error': 'hidden'},
        {'boundaries': _POINTS('micro', hidden=True)}),
    # An error loses a factor of beta at every unit: with less than 1 nothing of
    # it is left some blocks below.
    'lra': Setting('local_representation_alignment', {'beta': 1.}),
    'rec_lra': Setting(
        'recursive_local_representation_alignment', {'beta': 1.}),
    'lg_fg_a': Setting('LG-FG-A', {'grouped': False, 'placement': 'block'}),
    'frozen': Setting('backprop', {}, {'frozen': ('block_*',)}),
}
# Data set -> answers in its test split.
ANSWERS = {
    'recall': 16_000, 'listops': 2000, 'sick': 1982, 'sst2': 872, 'mnli': 9815}
# Learning rate and weight decay, of AdamW. Kolen-Pollack's feedback aligns by the
# factor exp(-rate * decay) a step: strong decays for a thousand steps, a tenth of
# them for ten thousand. Commands name them by index: new ones come last.
CANDIDATES = ((1e-3, .01), (3e-3, .01), (3e-3, 1.), (3e-3, 3.), (3e-3, .1))
_OF_MIRRORS = (  # As many, but with no decay; see above.
    (1e-3, 0.), (1e-2, 0.), (3e-3, 0.), (5e-4, 0.), (2e-3, 0.))


def candidates(rule: str) -> tuple[tuple[float, float], ...]:
  """Learning rates and weight decays that a rule, or a row, is tried with.

  Example:
    >>> candidates('backprop')[0]
    (0.001, 0.01)
  """
  return _OF_MIRRORS if rule == 'weight_mirror' else CANDIDATES


def configured(
    config: ml_collections.ConfigDict, rule: str, candidate: int = 0,
    each_token: bool = False) -> ml_collections.ConfigDict:
  """A copy of a config that trains by a row's rule.

  Args:
    config: of the data and the model.
    rule: a name of `RULES`.
    candidate: index of its learning rate and decay.
    each_token: whether every position has a label, which local losses must know.

  Returns:
    The config.

  Example:
    >>> configured(sst2.get_config(), 'usf').rule
    'sign_symmetry'
  """
  config, setting = copy.deepcopy(config), RULES[rule]
  config.rule, config.rule_args = setting.rule, dict(setting.rule_args)
  if rule == 'lg_fg_a' and each_token:
    config.rule_args.pooled = False
  for field, value in setting.fields.items():
    config[field] = value
  return with_candidate(config, rule, candidate)


def with_candidate(
    config: ml_collections.ConfigDict, rule: str, candidate: int
) -> ml_collections.ConfigDict:
  """A copy of a config with a candidate's learning rate and decay.

  Example:
    >>> with_candidate(config, 'usf', 1).learning_rate
    0.003
  """
  config = copy.deepcopy(config)
  config.learning_rate, config.weight_decay = candidates(rule)[candidate]
  return config


def row_of(rule: str, depth: int) -> str:
  """The name of a row.

  Example:
    >>> row_of('usf', 2)
    'usf_2'
  """
  return f'{rule}_{depth}'


def parts(row: str) -> tuple[str, int]:
  """The rule and the depth of a row.

  Example:
    >>> parts('lg_fg_a_2')
    ('lg_fg_a', 2)
  """
  rule, _, depth = row.rpartition('_')
  return rule, int(depth)


class Trial(NamedTuple):
  """What `--trial` stands for, where other flags do not say otherwise.

  Attributes:
    depths: of the rows.
    rules: of the rows.
    override: texts `FIELD=VALUE`.
    epochs: in place of the configs'; 0: theirs.
    seeds: as texts.
  """
  depths: Sequence[int]
  rules: Sequence[str]
  override: Sequence[str] = ()
  epochs: int = 0
  seeds: Sequence[str] = ('0',)


def main(
    experiment: reproduction.Experiment, trial: Trial,
    depths: Sequence[int], datasets: Mapping[str, str] | None = None,
    seeds: Sequence[str] = ('0',), unsearched: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
    prepare: Callable[..., Any] | None = None) -> None:
  """Runs a script whose rows are named by `row_of`; never returns.

  Args:
    experiment: the table, with rows for everything that can be asked for.
    trial: what `--trial` stands for.
    depths: those of the default.
    datasets: other name of a preset -> preset, for `--dataset`.
    seeds: those of the default, as texts.
    unsearched: presets whose rows have settings of their own.
    more: flags of the script's own, as `reproduction.main` takes them.
    prepare: as there, called first.
  """
  own = {
      'dataset': (flags.DEFINE_list, [], (
          f'As --presets; default: {",".join(experiment.presets)}.')),
      'depths': (flags.DEFINE_list, [], (
          f'Numbers of blocks; default: {",".join(map(str, depths))}.')),
      'rules': (flags.DEFINE_list, [], 'Of the rows; default: all.'),
      'trial': (flags.DEFINE_boolean, False, f'A small grid: {_said(trial)}.'),
      'candidate': (flags.DEFINE_list, [], (
          'Index of the setting that every rule gets, without a search; '
          'RULE:INDEX for one rule.')),
      'search_epochs': (flags.DEFINE_integer, 0, (
          'Of a candidate; 0: a quarter of the run, one at least.')),
  }

  def prepared(made, values, given):
    if prepare:
      made, values = prepare(made, values, given)
    if not (values['seeds'] or values['read']):
      values = {**values, 'seeds': list(trial.seeds if given['trial'] else seeds)}
    return _prepare(
        made, trial, depths, datasets or {}, unsearched, values, given)

  reproduction.main(experiment, {**own, **(more or {})}, prepared)


def _said(trial):
  text = (f'depths {",".join(map(str, trial.depths))}; rules '
          f'{",".join(trial.rules)}; seeds {",".join(trial.seeds)}')
  if trial.epochs:
    text += f'; {trial.epochs} epochs'
  return text + ''.join(f'; {o}' for o in trial.override)


def _prepare(
    experiment, trial, depths, datasets, unsearched, values, given):
  """`reproduction.Prepare`: which rows, and their settings."""
  if given['dataset'] and values['presets']:
    raise ValueError(
        '`dataset` and `presets` say the same; leave one of them out.')
  values = dict(values)
  presets = [datasets.get(d, d) for d in given['dataset'] or values['presets']]
  known = list(dict.fromkeys(row.preset for row in experiment.rows))
  for preset in presets:
    if preset not in known:
      raise ValueError(
          f'`dataset` has no {preset!r} in {experiment.name}; '
          f'{paths.nearest(preset, known)}.')
  values['presets'] = presets
  if values['read']:
    return experiment, values
  presets = presets or list(experiment.presets)
  values['presets'] = presets
  rows = [row for row in experiment.rows if row.preset in presets]
  rules = list(dict.fromkeys(parts(row.name)[0] for row in rows))
  wanted = given['rules'] or (
      [r for r in trial.rules if r in rules] if given['trial'] else rules)
  for rule in wanted:
    if rule not in rules:
      raise ValueError(
          f'`rules` has no {rule!r} in {experiment.name}; '
          f'{paths.nearest(rule, rules)}.')
  chosen = _depths(
      given['depths'] or (trial.depths if given['trial'] else depths), rows)
  if given['trial']:
    values['epochs'] = values['epochs'] or trial.epochs
    values['override'] = [*trial.override, *values['override']]
  asked = experiment.rows
  if not values['rows']:
    values['rows'] = list(dict.fromkeys(
        row.name for row in rows
        if parts(row.name)[0] in wanted and parts(row.name)[1] in chosen))
    asked = [row for row in rows if row.name in values['rows']]
  found = {}
  fixed = _fixed(given['candidate'], rules)
  if not fixed:
    found = _search(
        experiment, [r for r in rows if r.preset not in unsearched], values,
        given)
  rates = {
      (preset, rule): held['best']
      for preset, held_rules in found.items()
      for rule, held in held_rules.items()}
  if fixed:
    rates = {
        (row.preset, rule): fixed[rule] for row in rows
        if row.preset not in unsearched and (
            rule := parts(row.name)[0]) in fixed}
  head = {
      'date': time.strftime('%Y-%m-%d'), 'machine': measurement.machine(),
      'trial': bool(given['trial']), 'search': found}
  return dataclasses.replace(
      experiment, head=head, rows=[
          row._replace(config=with_candidate(row.config, key[1], rates[key]))
          if (key := (row.preset, parts(row.name)[0])) in rates else row
          for row in asked]), values


def _fixed(given, rules):
  """Rule -> index of its setting, of `--candidate`; {} without one."""
  found = {}
  for text in given:
    rule, _, index = text.rpartition(':')
    if index not in map(str, range(len(CANDIDATES))) or rule not in ('', *rules):
      raise ValueError(
          f'`candidate` must be a number below {len(CANDIDATES)}, or RULE:NUMBER '
          f'with one of {", ".join(rules)}, got {text!r}.')
    found |= dict.fromkeys([rule] if rule else rules, int(index))
  if found and set(found) != set(rules):
    raise ValueError(
        '`candidate` must begin with a number for all rules, got '
        f'{",".join(given)!r}; write for example --candidate=0,{text}.')
  return found


def _depths(given, rows):
  known = sorted({parts(row.name)[1] for row in rows})
  for depth in given:
    if str(depth) not in map(str, known):
      raise ValueError(
          f'`depths` must be among {", ".join(map(str, known))}, got '
          f'{str(depth)!r}.')
  return [int(depth) for depth in given]


def _search(experiment, rows, values, given):
  """Preset -> rule -> candidates, what they reached, and the best of them."""
  workdir = values['workdir'] or os.path.join('runs', experiment.name)
  path = os.path.join(workdir, 'search.json')
  found = {}
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  if not values['train']:
    return found
  texts = dict(text.partition('=')[::2] for text in values['override'])
  for preset in values['presets']:
    of_preset = [
        r for r in rows if r.preset == preset and r.name in values['rows']]
    for rule in dict.fromkeys(parts(row.name)[0] for row in of_preset):
      held = found.setdefault(preset, {})
      if rule in held:
        continue
      row = min((r for r in of_preset if parts(r.name)[0] == rule),
                key=lambda r: (parts(r.name)[1] == 1, parts(r.name)[1]))
      epochs = given['search_epochs'] or max(
          1, (values['epochs'] or row.config.epochs) // 4)
      tried = candidates(rule)
      configs = [
          flags_lib.override(with_candidate(row.config, rule, i), {
              **texts, 'epochs': str(epochs), 'seed': '0'})
          for i, _ in enumerate(tried)]
      for config in configs:
        config_lib.check(config)
      accuracies = search_lib.search(
          {row.name: configs}, os.path.join(workdir, 'search'),
          preset or experiment.name, values['jobs'])[row.name]
      held[rule] = {
          'row': row.name, 'epochs': epochs, 'seed': 0,
          'learning_rate_and_decay': [list(c) for c in tried],
          'validation_accuracy': accuracies,
          'best': search_lib.best(accuracies)}
      with open(path, 'w', encoding='utf-8') as file:
        json.dump(found, file, indent=1)
  return found


# What is said of the rows.


def standard_error(
    results: reproduction.Results, label: str, other: str, count: int
) -> float:
  """Of the difference of two rows' test accuracies, in points.

  The larger of that over seeds and that of the test examples, which is known for
  one seed as well.

  Args:
    results: the runs.
    label: a row.
    other: another.
    count: the number of test examples.

  Raises:
    MissingError: if one has no finished run.

  Example:
    >>> standard_error(results, 'sick,backprop_2', 'sick,frozen_2', 1982)
    .4
  """
  by_seeds, by_examples = 0., 0.
  for name in (label, other):
    mean = results.mean(name, _ACCURACY) / 100
    number = results.number(name, _ACCURACY)
    if number is not None and number.std is not None:
      by_seeds += (number.std / 100) ** 2 / number.n
    by_examples += mean * (1 - mean) / count
  return 100 * math.sqrt(max(by_seeds, by_examples))


def paired(
    results: reproduction.Results, label: str, other: str
) -> tuple[float, float]:
  """A paired t-test over seeds: is the first row above the second?

  Returns:
    The mean difference in points, and the one-sided p-value; NaN where all
    differences are equal.

  Raises:
    MissingError: for fewer than two seeds that both have.

  Example:
    >>> paired(results, 'sick,feedback_alignment_2', 'sick,frozen_2')
    (-.6, .8)
  """
  of = lambda row: {
      run['seed']: reproduction.test_accuracy(run) for run in results.of(row)}
  first, second = of(label), of(other)
  seeds = sorted(set(first) & set(second))
  if len(seeds) < 2:
    raise reproduction.MissingError(
        f'a paired test of {label} and {other} needs two seeds of each, and '
        f'there are {len(seeds)}')
  a, b = [first[s] for s in seeds], [second[s] for s in seeds]
  return (
      statistics.fmean(a) - statistics.fmean(b),
      float(stats.ttest_rel(a, b, alternative='greater').pvalue))


def where_blocks_matter(
    preset: str, depth: int, count: int, errors: float = 3.
) -> Callable[[reproduction.Results], str]:
  """For `Check.excused`: backprop is not clearly above the frozen blocks.

  Nor is anything judged at a depth of which there is no run at all.

  Example:
    >>> check._replace(excused=where_blocks_matter('sst2', 2, 872))
  """
  def excused(results):
    if not any(
        run['preset'] == preset and run['row'].endswith(f'_{depth}')
        for run in results.runs):
      return reproduction.NOT_ASKED
    rows = [f'{preset},{row_of(r, depth)}' for r in ('backprop', 'frozen')]
    try:
      gap = results.mean(rows[0], _ACCURACY) - results.mean(rows[1], _ACCURACY)
      error = standard_error(results, *rows, count)
    except reproduction.MissingError:
      return ''  # The check says itself what it misses.
    if gap >= errors * error:
      return ''
    return (f'backprop is {gap:.1f} points above the frozen blocks, less than '
            f'{errors:g} standard errors of {error:.1f}: blocks are not shown to '
            'matter')

  return excused


def of_rules(
    results: reproduction.Results, preset: str, rules: Iterable[str]
) -> dict[str, dict[int, reproduction.Number]]:
  """Rule -> depth -> test accuracy in percent, of those that are finished.

  Example:
    >>> of_rules(results, 'sick', ['backprop'])['backprop'][2].mean
    64.1
  """
  found: dict[str, dict[int, reproduction.Number]] = {r: {} for r in rules}
  for run in results.runs:
    rule, depth = parts(run['row'].removeprefix(f'{preset},'))
    if run['preset'] == preset and rule in found:
      number = results.number(run['row'], _ACCURACY)
      if number is not None:
        found[rule][depth] = number
  return {rule: dict(sorted(d.items())) for rule, d in found.items() if d}
