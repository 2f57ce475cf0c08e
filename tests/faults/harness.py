"""Draws faults, brings them into runs, and judges what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import random
import shutil
import signal

from tests.faults import commands

EQUAL = 'equal to the bit'
STOPPED = 'stopped with a sentence'
WRONG = 'wrong'
LOST = 'lost'
OUTCOMES = (EQUAL, STOPPED, WRONG, LOST)
_CUTS = (5, 10, 17)  # Steps at which runs that are damaged had stopped.
_MOST_COMMANDS = 4  # Until a run has to be finished.


@dataclasses.dataclass
class Outcome:
  """What became of a fault.

  Attributes:
    number: of the fault.
    kind: of the fault, for the table.
    what: the fault itself.
    outcome: one of OUTCOMES.
    why: what was wrong.
    stopped: seconds from a signal to the end of the command, or 0.
  """
  number: int
  kind: str
  what: str
  outcome: str
  why: str = ''
  stopped: float = 0.


class Harness:
  """Runs that met no fault, and folders that are copied to be damaged."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    whole = folder / 'whole'
    self._good(folder / 'first')  # Compiles.
    self.whole = self._good(whole)
    self.final = commands.final(whole)
    self.cuts = {}
    for step in _CUTS:
      path = folder / f'cut_{step}'
      self._good(path, commands.Fault(step=step, numbers=(signal.SIGTERM,)))
      self.cuts[step] = path
    self.cuts[18] = whole
    self.other = folder / 'other'  # A run of another seed.
    self._good(self.other, seed=1)

  def _good(self, path, fault=commands.Fault(), **kwargs):
    result = commands.run(path, fault, **kwargs)
    assert result.code == 0 and not result.problem, result
    return result

  def run(self, number: int) -> Outcome:
    """Draws a fault by its number, and brings it about."""
    rng = random.Random(number)
    path = self._folder / f'fault_{number}'
    kind = rng.choices(
        ('signal', 'kill', 'damage', 'disk', 'limit', 'stream'),
        (25, 20, 35, 10, 5, 5))[0]
    try:
      return getattr(self, f'_{kind}')(number, rng, path)
    finally:
      for made in (path, path.with_name(f'{path.name}.said')):
        shutil.rmtree(made, ignore_errors=True)
      path.with_name(f'{path.name}.outside').unlink(missing_ok=True)

  def _begin(self, rng, path, finished=False):
    """A folder that does not exist, or is of a run that stopped on its way."""
    cut = rng.choice([0, *_CUTS] + [18] * finished)
    if cut:
      shutil.copytree(self.cuts[cut], path, symlinks=True)
    return cut

  def _moment(self, rng, **fields):
    """A fault at a random operation of a file, or at a random time."""
    if rng.random() < .5:
      return commands.Fault(
          operation=rng.randrange(self.whole.operations), **fields)
    return commands.Fault(
        after=rng.uniform(.005, 1.1 * self.whole.seconds), **fields)

  def _signal(self, number, rng, path):
    cut = self._begin(rng, path)
    sent = rng.choice([
        (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,),
        (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
    fault = self._moment(rng, numbers=sent)
    names = '+'.join(s.name for s in sent)
    result = commands.run(path, fault)
    why = ''
    if result.code not in {0} | {130 if s == signal.SIGINT else 0 for s in sent}:
      why = f'code {result.code}'
    return self._judge(
        number, names, f'{fault} from step {cut}', path, [result], why)

  def _kill(self, number, rng, path):
    cut = self._begin(rng, path)
    fault = self._moment(rng, numbers=(signal.SIGKILL,))
    result = commands.run(path, fault)
    if result.code == -signal.SIGKILL:
      result.code = 0  # As it should be.
    return self._judge(
        number, 'SIGKILL', f'{fault} from step {cut}', path, [result])

  def _disk(self, number, rng, path):
    cut = self._begin(rng, path)
    fault = commands.Fault(
        operation=rng.randrange(self.whole.operations),
        error=rng.choice(commands.ERRORS))
    result = commands.run(path, fault)
    why = '' if result.code in (0, 2, 4) else f'code {result.code}'
    return self._judge(
        number, os.strerror(fault.error), f'{fault} from step {cut}', path,
        [result], why)

  def _limit(self, number, rng, path):
    cut = self._begin(rng, path)
    # Large enough for the sentence itself, where the log is a file.
    fault = commands.Fault(limit=int(2**rng.uniform(11, 16)))
    result = commands.run(path, fault)
    why = '' if result.code in (0, 2, 4) else f'code {result.code}'
    return self._judge(
        number, 'limit of a file', f'{fault} from step {cut}', path, [result],
        why)

  def _stream(self, number, rng, path):
    cut = self._begin(rng, path, finished=True)
    how = ('', 'full', 'closed', 'pipe')
    fault = commands.Fault(stdout=rng.choice(how[1:]), stderr=rng.choice(how))
    if rng.random() < .5:
      fault = commands.Fault(stdout=fault.stderr, stderr=fault.stdout)
    result = commands.run(path, fault)
    why = ''
    if result.code != (4 if fault.stdout else 0):
      why = f'code {result.code}'
    elif 'cannot be written to' not in (path / 'log.txt').read_text():
      why = 'the log says nothing'
    return self._judge(
        number, 'stdout or stderr', f'{fault} from step {cut}', path, [result],
        why)

  def _damage(self, number, rng, path):
    cut = rng.choice(list(self.cuts))
    shutil.copytree(self.cuts[cut], path, symlinks=True)
    kind, what, spared = damage(rng, path, self.other)
    before = _contents(path)
    outcome = self._judge(
        number, kind, f'{what} of a run at step {cut}', path, [], spared=spared)
    if outcome.outcome in (EQUAL, STOPPED):
      outside = path.with_name(f'{path.name}.outside')
      if outside.exists() and outside.read_text() != 'not yours':
        outcome.outcome, outcome.why = WRONG, 'wrote through a link'
      gone = _gone(before, _contents(path), outcome.outcome == STOPPED)
      if gone:
        outcome.outcome, outcome.why = LOST, f'gone: {gone}'
    return outcome

  def _judge(self, number, kind, what, path, results, why='', spared=True):
    """Gives the same command until the run is finished or refused."""
    outcome = Outcome(number, kind, what, EQUAL, why)
    if why:
      outcome.outcome = WRONG
    for result in results:
      outcome.stopped = result.stopped
      if result.problem:
        outcome.outcome, outcome.why = WRONG, result.problem
    for _ in range(_MOST_COMMANDS):
      if outcome.outcome != EQUAL:
        break
      saved = sorted(
          (int(p.name) for p in (path / 'checkpoints').glob('*')
           if p.name.isdigit())) if results else []
      result = commands.run(path)
      results.append(result)
      if result.problem:
        outcome.outcome, outcome.why = WRONG, result.problem
      elif result.code in (2, 4) and not spared:
        outcome.outcome = STOPPED
      elif result.code:
        outcome.outcome = LOST
        outcome.why = f'code {result.code}: {result.error[-300:]}'
      elif saved and result.state and (
          f'going on from step {saved[-1]} ' not in result.error):
        outcome.outcome = LOST
        outcome.why = f'checkpoint {saved[-1]} was not used'
      else:
        found = commands.final(path)
        different = [k for k in found if found[k] != self.final[k]]
        if result.state not in ('', self.whole.state):
          different.append('the last state')
        if different:
          outcome.outcome = WRONG
          outcome.why = f'other {", ".join(different)}'
        break
    if outcome.outcome in (WRONG, LOST):
      outcome.why += ''.join(
          f'\n--- code {r.code}\n{r.error[-1500:]}' for r in results)
    return outcome


def damage(rng: random.Random, path: pathlib.Path, other: pathlib.Path):
  """Damages a run's folder.

  Returns:
    The kind of damage; what it was; and whether the run has to go on, since
    what it needs was spared.
  """
  steps = sorted(
      (p for p in (path / 'checkpoints').iterdir()), key=lambda p: int(p.name))
  kind = rng.choice((
      'truncated', 'empty', 'bit flipped', 'deleted', 'garbage', 'swapped',
      'folder in its place', 'link in its place', 'line of metrics',
      'step folder', 'step folder', 'bytes appended'))
  if kind == 'step folder':
    newest = steps[-1]
    how = rng.choice((
        'copied', 'emptied', 'half', 'foreign', "another run's", 'renamed',
        'empty one added', 'file of that name', 'leading zero'))
    later = newest.with_name(str(int(newest.name) + rng.choice((1, 4, 100))))
    if how == 'copied':
      shutil.copytree(rng.choice(steps), later)
    elif how == 'renamed':
      newest.rename(later)
    elif how == 'leading zero':
      shutil.copytree(newest, newest.with_name(f'0{newest.name}'))
    elif how == 'empty one added':
      later.mkdir()
    elif how == 'file of that name':
      later.write_text('?')
    elif how == "another run's":
      shutil.rmtree(newest)
      shutil.copytree(other / 'checkpoints' / '18', later)
    else:
      files = [p for p in newest.rglob('*') if p.is_file()]
      for file in rng.sample(files, len(files) // 2 if how == 'half' else
                             len(files)):
        file.unlink()
      if how in ('emptied', 'foreign'):
        shutil.rmtree(newest)
        newest.mkdir()
      if how == 'foreign':
        (newest / 'my.txt').write_text('mine')
    return kind, f'{how} {newest.name}', True
  if kind == 'line of metrics':
    file = path / 'metrics.jsonl'
    lines = file.read_text().splitlines(keepends=True)
    index = rng.randrange(len(lines))
    new = rng.choice((
        '3\n', 'x\n', '{}\n', '', '{"step": "4", "split": "train"}\n',
        '\0\0\0\n', '[' * 99999 + '\n', lines[index] * 2, lines[index][:-9]))
    lines[index] = new
    file.write_text(''.join(lines))
    return kind, f'line {index + 1} is {new[:20]!r}', False
  files = sorted(p for p in path.rglob('*') if p.is_file())
  # Those of checkpoints are many: the others come as often.
  inside = [f for f in files if 'checkpoints' in f.parts[len(path.parts):]]
  rest = [f for f in files if f not in inside and f.name != 'log.txt']
  file = rng.choice(rng.choice((inside, rest)))
  content = file.read_bytes()
  if kind == 'truncated':
    file.write_bytes(content[:rng.randrange(len(content) or 1)])
  elif kind == 'empty':
    file.write_bytes(b'')
  elif kind == 'bit flipped':
    changed = bytearray(content or b'0')
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    file.write_bytes(changed)
  elif kind == 'deleted':
    file.unlink()
  elif kind == 'garbage':
    file.write_bytes(rng.randbytes(rng.randrange(1, 300)))
  elif kind == 'bytes appended':
    file.write_bytes(content + rng.choice((b'x', b'\n', b'{"step": 1}', b'\0')))
  elif kind == 'swapped':
    second = rng.choice([f for f in files if f != file])
    other_content = second.read_bytes()
    second.write_bytes(content)
    file.write_bytes(other_content)
    # Two checkpoints are damaged, or what lies outside of them.
    if second.parts[:len(path.parts) + 2] != file.parts[:len(path.parts) + 2]:
      return kind, f'{kind}: {file.relative_to(path)}', False
  elif kind == 'folder in its place':
    file.unlink()
    file.mkdir()
  else:
    outside = path.with_name(f'{path.name}.outside')
    outside.write_text('not yours')
    file.unlink()
    file.symlink_to(outside)
  return kind, f'{kind}: {file.relative_to(path)}', file in inside


def _contents(path):
  """File -> its bytes, without the log."""
  return {
      str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*')
      if p.is_file() and not p.is_symlink() and p.name != 'log.txt'}


def _gone(before, after, everything):
  """Bytes that are nowhere any more, though they could not be read.

  Of a run that went on, those of whole checkpoints may be: of the oldest, once
  there are newer ones, and of a summary or metrics that were written anew.
  """
  kept = set(after.values())
  if everything:
    return [n for n, content in before.items() if content not in kept]
  mine = [n for n in before if n.endswith('my.txt')]
  return [n for n in mine if before[n] not in kept]


def table(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
  """Kind of fault -> outcome -> how many."""
  counts = {}
  for kind in sorted({o.kind for o in outcomes}):
    found = [o.outcome for o in outcomes if o.kind == kind]
    counts[kind] = {o: found.count(o) for o in OUTCOMES}
  return counts
