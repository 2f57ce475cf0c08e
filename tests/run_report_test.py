"""The page on runs: its numbers, that it is whole, and that it holds no code."""

import html.parser
import math
import os
import re
import subprocess
import sys

from bpjax.train import config as config_lib
from bpjax.train.folder import workdir as workdir_lib
from experiments import charts
from experiments import comparison
from experiments import report
import numpy as np
import pytest

_VOID = {'meta', 'br', 'wbr', 'img', 'link', 'input', 'hr'}
_UNITS = ('Dense_0', 'Dense_1', 'Dense_2')


def write_run(
    folder, seed=0, rule='backprop', final=.9, *, epochs=4, ended=4, steps=10,
    units=_UNITS, growth=False, **fields):
  """A run's folder, as a run leaves it, with curves that are made up."""
  rng = np.random.default_rng(seed)
  config = config_lib.default()
  config.update({'rule': rule, 'seed': seed, 'epochs': epochs, **fields})
  values = config_lib.to_json(config)
  with workdir_lib.Workdir(str(folder)) as run:
    run.claim(values, {
        'machine': {'device_kind': 'cpu', 'jax': '0.10.0'},
        'data': {'fingerprint': 'f00'}})
    run.cut_metrics(0)
    for epoch in range(ended + 1):
      line = lambda split, **v: {
          'step': epoch * steps, 'epoch': epoch, 'split': split, **v}
      grown = 1 - math.exp(-3 * epoch / epochs)
      last = epoch == epochs
      accuracy = final if last else final * grown + .01 * rng.normal()
      lines = []
      for i, unit in enumerate(units):
        known = rule != 'backprop'
        lines.append(line(
            'alignment', unit=unit, teaching=1. if not known or i == len(units) - 1
            else .6 * grown + .02 * i, teaching_std=.1, update=.5,
            weight=.4 * grown if known and i else None, backprop_norm=.1 + i,
            **({'growth': 1. + i} if growth else {})))
      if epoch:
        lines.append(line('train', loss=2.5 - 2.4 * grown, accuracy=accuracy))
        lines.append(line('test', loss=2.6 - 2.4 * grown, accuracy=accuracy))
      run.record(lines)
    if ended == epochs:
      aligned = {
          m['unit']: {k: m.get(k) for k in ('teaching', 'weight')}
          for m in lines if 'unit' in m}
      test = lines[-1]
      run.finish({
          'test_accuracy': test['accuracy'], 'test_loss': test['loss'],
          'validation_accuracy': None, 'validation_loss': None,
          'train_accuracy': final, 'rule': rule, 'seed': seed, 'epochs': epochs,
          'steps': epochs * steps, 'units': dict.fromkeys(units, rule),
          'alignment': aligned, 'median_step_time': .001 * (seed + 1),
          'wall_time': 12., 'diverged': final < .2, 'data_source': 'digits',
          'device_kind': 'cpu', 'device_count': 1, 'git_commit': 'abc',
          'versions': {'python': '3.12', 'jax': '0.10.0'}})
  return folder


class _Page(html.parser.HTMLParser):
  """Holds a page against HTML's nesting, and collects what is looked for."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.faults = [], [], []
    self.texts, self.tables = [], []
    self.feed(text)
    self.close()
    self.faults += [f'<{t}> is not closed' for t in self.open]

  def handle_starttag(self, tag, attrs):
    names = [k for k, _ in attrs]
    if len({*names}) < len(names):
      self.faults.append(f'<{tag}> has an attribute twice')
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)
    if tag == 'table':
      self.tables.append([])
    if tag == 'tr':
      self.tables[-1].append([])
    if tag in ('td', 'th') and self.tables:
      self.tables[-1][-1].append('')

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if 'svg' not in self.open:
      self.faults.append(f'<{tag}/> outside of a drawing')

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.faults.append(f'</{tag}> does not close what is open')

  def handle_data(self, data):
    if 'style' not in self.open and 'script' not in self.open:
      self.texts.append(data)
    if {'td', 'th'} & set(self.open):
      self.tables[-1][-1][-1] += data

  def having(self, **attributes):
    return [(t, a) for t, a in self.tags if all(
        v in a.get(k.rstrip('_'), '').split() for k, v in attributes.items())]


def _written(folder, *arguments):
  assert report.main([str(folder), *arguments]) == 0
  text = (folder / 'report.html').read_text(encoding='utf-8')
  page = _Page(text)
  assert not page.faults
  return text, page


@pytest.fixture(name='sweep', scope='module')
def _sweep(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'rules'
  finals = {'kolen_pollack': (.8, .84, .85), 'backprop': (.9, .91, .95)}
  for rule, values in finals.items():
    for seed, final in enumerate(values):
      write_run(folder / f'{rule},{seed}', seed, rule, final)
  return folder, finals


def test_numbers_and_tests_are_those_of_the_runs(sweep):
  folder, finals = sweep
  text, page = _written(folder)
  numbers, tests = page.tables[:2]
  assert [row[0] for row in numbers] == ['row', 'backprop', 'kolen_pollack']
  for row in numbers[1:]:
    values = finals[row[0]]
    assert row[1:3] == [
        '3', f'{100 * np.mean(values):.2f}% \xb1 {100 * np.std(values, ddof=1):.2f}']
  # Teaching signals of the hidden units alone.
  assert numbers[2][-1] == f'{.6 * (1 - math.exp(-3)) + .01:.3f} \xb1 0.000'
  d = np.subtract(finals['kolen_pollack'], finals['backprop'])
  (row,) = tests[1:]
  assert row[0] == 'kolen_pollack' and row[-1] == '3'
  assert row[1] == f'{100 * d.mean():.2f}%'.replace('-', '\N{MINUS SIGN}')
  assert row[-2] == f'{d.mean() / d.std(ddof=1):.1f}'.replace('-', '\N{MINUS SIGN}')
  found = comparison.paired(*(
      dict(enumerate(finals[r])) for r in ('backprop', 'kolen_pollack')))
  assert row[-3] == f'{found["p"]:.2g}'
  assert '2 rows \xb7 3 seeds each \xb7 6 of 6 runs finished' in ''.join(page.texts)
  assert 'python -m experiments.report' in text and 'digits' in text


def test_curves_are_means_with_bands_of_the_seeds(sweep):
  folder, finals = sweep
  _, page = _written(folder)
  start = next(i for i, (t, a) in enumerate(page.tags)
               if t == 'svg' and a.get('aria-label') == 'test accuracy')
  chart = page.tags[start][1]
  end = next(i for i, (t, _) in enumerate(page.tags[start + 1:], start + 1)
             if t == 'svg')
  y0, y1 = map(float, chart['data-y'].split())
  left, right, top, bottom = map(float, chart['data-box'].split())
  assert list(map(float, chart['data-x'].split())) == [1, 4]
  for number, rule in enumerate(('backprop', 'kolen_pollack')):
    inside = {a['class']: a for t, a in page.tags[start:end] if t == 'path'}
    line = [tuple(map(float, p.split())) for p in
            inside[f'line r{number}']['d'][1:].split('L')]
    assert [x for x, _ in line] == pytest.approx(
        np.linspace(left, right, 4), abs=.06)
    value = lambda y: y0 + (bottom - y) / (bottom - top) * (y1 - y0)
    assert value(line[-1][1]) == pytest.approx(np.mean(finals[rule]), abs=1e-4)
    band = [tuple(map(float, p.split())) for p in
            inside[f'band r{number}']['d'][1:-1].split('L')]
    assert value(band[3][1]) == pytest.approx(
        np.mean(finals[rule]) + np.std(finals[rule], ddof=1), abs=1e-4)
    assert value(band[4][1]) == pytest.approx(
        np.mean(finals[rule]) - np.std(finals[rule], ddof=1), abs=1e-4)


def test_one_file_that_loads_nothing(sweep):
  folder, _ = sweep
  text, page = _written(folder)
  for _, attributes in page.tags:
    for name, value in attributes.items():
      assert name not in ('src', 'href', 'srcset', 'action', 'onclick'), value
  assert 'url(' not in text and '@import' not in text and '//' not in re.sub(
      r'^\s*// .*$|http://www.w3.org/2000/svg', '', text, flags=re.M)
  policy = page.having(http_='x') or [
      a for t, a in page.tags if a.get('http-equiv') == 'Content-Security-Policy']
  assert "default-src 'none'" in policy[0]['content']
  assert page.having(name='viewport') and 'prefers-color-scheme' in text
  assert len(text) < 120_000


def test_rows_that_differ_in_other_fields_and_how(tmp_path):
  for seed in range(2):
    for rate in (.1, .01):
      write_run(tmp_path / f'{rate},{seed}', seed, 'pepita', .5 + rate + seed / 9,
                learning_rate=rate, rule_args={'scale': rate})
  write_run(tmp_path / 'other', 0, 'backprop', .7, learning_rate=.1)
  text, page = _written(tmp_path)
  assert page.tables[0][1][0].startswith(
      'pepita, rule_args.scale=0.01, learning_rate=0.01')
  (fields,) = [t for t in page.tables if t[0][0] == 'row' and t[0][1] == 'rule']
  assert fields[0] == ['row', 'rule', 'rule_args.scale', 'learning_rate']
  assert fields[3][1:] == ['backprop', '-', '0.1']
  # One colour a rule; the second row of a rule is dashed.
  colours = dict(re.findall(r'\.r(\d)\{--row:var\(--(\w+)\)\}', text))
  assert colours['0'] == colours['1'] != colours['2'] == 'ref'
  assert '.line.r1{stroke-dasharray' in text
  assert '.line.r0{stroke-dasharray' not in text


def test_alignment_of_many_units_and_growth(tmp_path):
  units = [f'block_{i}/Dense_0' for i in range(20)]
  for rule in ('backprop', 'feedback_alignment'):
    write_run(tmp_path / rule, 0, rule, units=units, growth=True)
  text, page = _written(tmp_path)
  captions = [a['aria-label'] for t, a in page.tags
              if t == 'svg' and a.get('class') == 'chart']
  assert captions.count('block_7/Dense_0') == 5
  assert 'at the end, by unit' in captions and 'Growth' in text
  assert 'A test needs two seeds' in text
  assert text.index('Teaching signals') < text.index('Growth')


def test_texts_of_a_folder_are_texts(tmp_path):
  evil = '</td><script>alert(1)</script>"\'&<b>'
  folder = tmp_path / 'a<b>&'
  write_run(folder / 'x"><i>', 0, 'backprop', units=(evil, 'b'), data_dir=evil)
  write_run(folder / 'y', 1, 'backprop', units=(evil, 'b'), data_dir='other')
  text, page = _written(folder, '--title', evil)
  assert evil in ''.join(page.texts) and '<script>alert' not in text
  assert [t for t, _ in page.tags if t in ('b', 'i', 'script')] == ['script']


def test_runs_that_are_not_finished_diverged_or_damaged(tmp_path, capfd):
  write_run(tmp_path / 'a', 0, 'backprop', .9)
  write_run(tmp_path / 'b', 1, 'backprop', .9, ended=2)
  write_run(tmp_path / 'c', 0, 'pepita', .1)
  write_run(tmp_path / 'd', 1, 'pepita', .1)
  metrics = tmp_path / 'd' / 'metrics.jsonl'
  metrics.write_text('nonsense\n' + metrics.read_text())
  (tmp_path / 'report.html').mkdir()
  assert report.main([str(tmp_path)]) == 4
  assert 'cannot be written' in capfd.readouterr().err
  (tmp_path / 'report.html').rmdir()
  text, page = _written(tmp_path)
  assert 'd is left out: line 1 of' in capfd.readouterr().err
  shown = ''.join(page.texts)
  assert 'is left out: line 1 of' in shown and 'pepita diverged' in shown
  assert '2 of 3 runs finished' in shown and 'epoch 2 of 4' in shown
  assert page.tables[0][1][1] == '1 of 2'


@pytest.mark.parametrize('arguments, words', [
    ([], 'DIR'), (['missing'], '`missing` holds no run'),
    (['.', '--outptu=x'], '--outptu'), (['a', '--out=x'], '--out')])
def test_wrong_commands(tmp_path, monkeypatch, capfd, arguments, words):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as end:
    sys.exit(report.main(arguments))
  assert end.value.code == 2
  said = capfd.readouterr().err
  assert said.count('error: ') == 1 and words in said and not os.listdir()


def test_axes():
  axis = charts.axis([.001, 300.], log=True)
  assert axis.share(.001) == 0 and axis.share(300) == pytest.approx(1)
  assert axis.share(math.sqrt(.3)) == pytest.approx(.5)
  assert all(a < b for a, b in zip(axis.ticks, axis.ticks[1:]))
  for values in ([0., 0.], [5.], [-3., 1e6], [1e-9, 2e-9], [-1e-3, -1e-3]):
    axis = charts.axis(values)
    assert 0 <= axis.share(min(values)) <= axis.share(max(values)) <= 1
    assert len(axis.ticks) >= 2
  points = [(i, 0., 0., 0.) for i in range(1001)]
  thinned = charts._thinned(points)
  assert len(thinned) <= 241 and thinned[-1] == points[-1]


def test_jax_is_not_loaded():
  code = 'import sys, experiments.report; sys.exit("jax" in sys.modules)'
  subprocess.run(
      [sys.executable, '-c', code], check=True, timeout=60,
      cwd=report._HERE.parent)
