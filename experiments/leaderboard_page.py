"""The leaderboard for readers: texts of tables, and a page without a server."""

from __future__ import annotations

from collections.abc import Mapping
import html as html_lib
import json
import math
from typing import Any

from experiments import cards
from experiments import leaderboard

HEADER = (
    'row', 'test accuracy, %', 'n', 'p, next row', 'minus frozen (p)', 'time',
    'memory', 'alignment (floor)', 'growth', 'published, %', 'verdict')


def numbers(own: Mapping[str, Any]) -> list[str]:
  """What a table says of a cell behind its name, a text for each of `HEADER`.

  Args:
    own: an entry of `leaderboard.table`.

  Returns:
    Accuracy, n, p against the next row, difference from the control with its p,
    time and memory over backprop's, alignment with its floor, growth, the paper's
    number, and the verdict.
  """
  cost = own.get('cost') or {}
  time = f'{cost["time_ratio"]:.2f}' if cost else ''
  memory = f'{cost["memory_ratio"]:.2f}' if cost else ''
  paper = leaderboard.COLUMNS[own['column']].published.get(own['row'])
  published = '' if paper is None else f'{paper.accuracy:.2f}'
  if 'mean' not in own:
    return ['', '', '', '', time, memory, '', '', published,
            f'{own["status"]}: {own["reason"]}']
  spread = '' if own['std'] is None else f' ± {own["std"]:.2f}'
  growth = '' if own['growth'] is None else f'{own["growth"]:.2f}'
  note = f'; {own["reason"]}' if own['reason'] else ''
  return [
      f'{own["mean"]:.2f}{spread}', str(own['n']), _p(own['below']),
      '' if own['row'] == leaderboard.FROZEN else _compared(own['frozen']),
      time, memory, _aligned(own), growth, published, own['verdict'] + note]


def _p(against):
  if against is None or against.p is None:
    return ''
  return f'{against.p:.3f}' if against.p >= .001 else '< 0.001'


def _compared(against):
  if against is None:
    return ''
  p = _p(against)
  return f'{against.difference:+.2f}' + (f' ({p})' if p else '')


def _aligned(own):
  if own['row'] == leaderboard.FROZEN:
    return ''
  measured, units = own['aligned_units']
  if own['alignment'] is None:
    return 'no signal'
  part = '' if measured == units else f', {measured} of {units} units'
  return f'{own["alignment"]:.2f} ({own["floor"]:.2f}{part})'


def anchor(entry: Mapping[str, Any]) -> str:
  """The name of a cell's record: that of its heading on the page of records.

  Example:
    >>> anchor({'tier': 'hour', 'column': 'mnist_mlp', 'row': 'LG-BP'})
    'hour-mnist_mlp-lg-bp'
  """
  text = f'{entry["tier"]}-{entry["column"]}-{entry["row"]}'.lower()
  return ''.join(c for c in text if c.isalnum() or c in '_-')


def record(own: Mapping[str, Any]) -> str:
  """One line of text: the search, and each run with its folder."""
  parts = []
  if 'candidates' in own:
    tried = ', '.join(
        f'{c["learning_rate"]:g}: '
        + ('not finite' if a is None else f'{100 * a:.2f}')
        for c, a in zip(own['candidates'], own['validation_accuracy']))
    best = own['candidates'][own['chosen']]
    parts.append(
        f'{best["optimizer"]}, validation accuracy by learning rate {tried}; '
        f'chosen {best["learning_rate"]:g}')
  for run in own.get('runs', ()):
    more = '' if run.get('bits_per_character') is None else (
        f', {run["bits_per_character"]:.3f} bits a character')
    parts.append(
        f'{run["run"]}: {100 * run["test_accuracy"]:.2f}{more}, '
        f'{run["epochs"]} epochs, {run["wall_time"]:.0f} s, commit '
        f'{(run["git_commit"] or "unknown")[:9]}')
  if own.get('cost'):
    parts.append(
        f'a step {own["cost"]["milliseconds"]:.2f} ms, '
        f'{own["cost"]["memory_mib"]:.1f} MiB')
  return '; '.join(parts) or f'{own["status"]}: {own["reason"]}'


def entries(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Every cell of every tier that has any, in the order of tables."""
  found = []
  for tier in reversed(leaderboard.TIERS):
    for column in leaderboard.TIERS[tier].columns:
      found += leaderboard.table(results, tier, column)
  return found


def html(results: Mapping[str, Any]) -> str:
  """A page of its own: tables that are sorted and filtered, plots, cards.

  Args:
    results: the content of a file of results.

  Returns:
    HTML that needs no other file, no server and no network.
  """
  tables, records = [], []
  for own in entries(results):
    texts = numbers(own)
    name = anchor(own)
    cells = ''.join(
        f'<td data-v="{html_lib.escape(_sortable(t), quote=True)}">'
        + (f'<a href="#{name}">{html_lib.escape(t)}</a>' if i < 8 and t
           else html_lib.escape(t)) + '</td>'
        for i, t in enumerate(texts))
    rule = html_lib.escape(own['row'])
    card = own['row'] if own['row'] in cards.CARDS else ''
    link = f'<a href="#card-{card}">{rule}</a>' if card else rule
    tables.append(
        f'<tr data-tier="{own["tier"]}" data-column="{own["column"]}">'
        f'<td data-v="{own["tier"]}">{own["tier"]}</td>'
        f'<td data-v="{own["column"]}">'
        f'{html_lib.escape(leaderboard.COLUMNS[own["column"]].title)}</td>'
        f'<td data-v="{rule}">{link}</td>{cells}</tr>')
    records.append(
        f'<dt id="{name}">{own["tier"]}, {own["column"]}, {rule}</dt>'
        f'<dd>{html_lib.escape(record(own))}</dd>')
  head = ''.join(
      f'<th>{html_lib.escape(h)}</th>' for h in ('tier', 'column', *HEADER))
  plots = ''.join(
      plot(results, tier, column) for tier in reversed(leaderboard.TIERS)
      for column in leaderboard.TIERS[tier].columns)
  made = ''.join(
      f'<tr id="card-{name}"><th>{html_lib.escape(name)}</th>'
      + ''.join(f'<td>{html_lib.escape(t)}</td>' for t in card) + '</tr>'
      for name, card in cards.CARDS.items())
  card_head = ''.join(
      f'<th>{f}</th>' for f in ('rule', *cards.Card._fields))
  papers = ''.join(
      f'<li>{html_lib.escape(leaderboard.COLUMNS[c].title)}, {row}: '
      f'{p.accuracy:.2f}% ({html_lib.escape(p.source)}; '
      f'{html_lib.escape(p.differs)})</li>'
      for c in leaderboard.COLUMNS
      for row, p in leaderboard.COLUMNS[c].published.items())
  facts = html_lib.escape(json.dumps({
      k: results[k] for k in ('command', 'machine', 'date') if k in results}))
  return _PAGE.format(
      head=head, rows='\n'.join(tables), plots=plots, cards=made,
      card_head=card_head, records='\n'.join(records), papers=papers, facts=facts)


def _sortable(text):
  """What a text is sorted by: its first number, or itself."""
  first = text.replace('<', '').strip().split(' ')[0]
  try:
    return repr(float(first))
  except ValueError:
    return text


def plot(results: Mapping[str, Any], tier: str, column: str) -> str:
  """Accuracy against the time of a step over backprop's, as SVG; '' without.

  Each point is a link to its record; a hollow one is no better than frozen, and
  the line is the control's accuracy.
  """
  shown = [
      e for e in leaderboard.table(results, tier, column)
      if 'mean' in e and e.get('cost')]
  if len(shown) < 2:
    return ''
  width, height, left, bottom = 760, 420, 60, 50
  xs = [e['cost']['time_ratio'] for e in shown]
  ys = [e['mean'] for e in shown]
  low_x, high_x = min(.5, *xs), max(2., *xs) * 1.15
  low_y, high_y = min(ys) - 1, max(ys) + 1

  def place(x, y):
    # A logarithm, so that .8 and 10 times backprop are both seen.
    across = math.log(x / low_x) / math.log(high_x / low_x)
    up = (y - low_y) / (high_y - low_y)
    return (left + across * (width - left - 150),
            height - bottom - up * (height - bottom - 20))

  parts = []
  for tick in (.5, 1, 2, 5, 10, 20, 50):
    if low_x <= tick <= high_x:
      x, _ = place(tick, low_y)
      parts.append(
          f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{height - bottom}" '
          f'class="grid"/><text x="{x:.1f}" y="{height - bottom + 18}" '
          f'text-anchor="middle">{tick:g}</text>')
  for i in range(6):
    value = low_y + i * (high_y - low_y) / 5
    _, y = place(low_x, value)
    parts.append(
        f'<line x1="{left}" x2="{width - 150}" y1="{y:.1f}" y2="{y:.1f}" '
        f'class="grid"/><text x="{left - 6}" y="{y + 4:.1f}" '
        f'text-anchor="end">{value:.1f}</text>')
  control = next((e for e in shown if e['row'] == leaderboard.FROZEN), None)
  if control:
    _, y = place(low_x, control['mean'])
    parts.append(
        f'<line x1="{left}" x2="{width - 150}" y1="{y:.1f}" y2="{y:.1f}" '
        'class="control"/>')
  for own in shown:
    x, y = place(own['cost']['time_ratio'], own['mean'])
    kind = ('hollow' if own['verdict'].startswith('no better') else
            'frozen' if own['row'] == leaderboard.FROZEN else 'point')
    parts.append(
        f'<a href="#{anchor(own)}"><circle cx="{x:.1f}" cy="{y:.1f}" r="4" '
        f'class="{kind}"><title>{html_lib.escape(own["row"])}: '
        f'{own["mean"]:.2f}%, {own["cost"]["time_ratio"]:.2f}</title></circle>'
        f'<text x="{x + 6:.1f}" y="{y + 3:.1f}" class="name">'
        f'{html_lib.escape(own["row"])}</text></a>')
  title = leaderboard.COLUMNS[column].title
  return (
      f'<figure><figcaption>{html_lib.escape(title)}, tier {tier}: test '
      'accuracy in % against the time of a step over backprop\'s (logarithmic); '
      'hollow: no better than frozen; dashed: the control</figcaption>'
      f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}'
      f'</svg></figure>')


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<title>Leaderboard of learning rules</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: #222; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }}
#board th {{ cursor: pointer; background: #f4f4f4; position: sticky; top: 0; }}
a {{ color: #14548c; text-decoration: none; }} a:hover {{ text-decoration: underline; }}
input, select {{ font: inherit; padding: .2rem .4rem; margin-right: .6rem; }}
svg {{ width: 100%; max-width: 60rem; }} svg text {{ font-size: 11px; fill: #444; }}
.grid {{ stroke: #e4e4e4; }} .control {{ stroke: #b33; stroke-dasharray: 5 4; }}
.point {{ fill: #14548c; }} .hollow {{ fill: #fff; stroke: #14548c; }} .frozen {{ fill: #b33; }}
dt {{ font-weight: 600; margin-top: .5rem; }} :target {{ background: #fff6d0; }}
</style></head><body>
<h1>Leaderboard of learning rules</h1>
<p>Every rule with one search budget on validation examples; then seeds on test
examples. Time and memory are of a step over backprop's on the same model. p: paired
t-test over seeds, two-sided. A row that is not above the frozen control with p
below 0.05 is marked <em>no better than frozen</em>. Every number leads to its runs.
A click on a header sorts.</p>
<p><label>Filter <input id="text" placeholder="rule, verdict, ..."></label>
<label>Column <select id="column"><option value="">all</option></select></label>
<label>Tier <select id="tier"><option value="">all</option></select></label></p>
<table id="board"><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table>
<h2>Accuracy against cost</h2>
{plots}
<h2>Identity cards</h2>
<table><thead><tr>{card_head}</tr></thead><tbody>{cards}</tbody></table>
<h2>Published numbers beside ours</h2>
<p>Other networks and longer training: they say what a rule can do, not what a row
here should be.</p>
<ul>{papers}</ul>
<h2>Records</h2>
<p>{facts}</p>
<dl>{records}</dl>
<script>
const body = document.querySelector('#board tbody');
const rows = [...body.rows];
const chosen = id => document.getElementById(id);
for (const id of ['column', 'tier'])
  for (const value of new Set(rows.map(r => r.dataset[id])))
    chosen(id).add(new Option(value, value));
function filter() {{
  const text = chosen('text').value.toLowerCase();
  for (const row of rows)
    row.hidden = !(row.textContent.toLowerCase().includes(text)
      && ['column', 'tier'].every(id => !chosen(id).value || row.dataset[id] === chosen(id).value));
}}
for (const id of ['text', 'column', 'tier']) chosen(id).addEventListener('input', filter);
document.querySelectorAll('#board th').forEach((head, i) => head.addEventListener('click', () => {{
  const down = head.dataset.down !== '1';
  head.dataset.down = down ? '1' : '';
  const key = row => row.cells[i].dataset.v;
  rows.sort((a, b) => {{
    const [p, q] = [key(a), key(b)];
    if (p === '' || q === '') return (p === '') - (q === '');
    const order = isNaN(p) || isNaN(q) ? p.localeCompare(q) : p - q;
    return down ? -order : order;
  }}).forEach(row => body.append(row));
}}));
</script></body></html>
"""
