"""Candidates trained and judged on validation examples: what searches share.

A script says which configs every row has; finished runs are not trained again,
and two processes can share the rows of one folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import json
import os
import sys
from typing import Any

from bpjax.train.folder import summary as summary_lib
from bpjax.train.folder import workdir as workdir_lib
from experiments import jobs as jobs_lib
import ml_collections

Accuracies = list[float | None]


def search(
    rows: Mapping[str, Sequence[ml_collections.ConfigDict]], workdir: str,
    prefix: str, jobs: int = 1) -> dict[str, Accuracies]:
  """Trains what is missing; exits where a run cannot.

  Args:
    rows: row -> its candidates, in order.
    workdir: folder of the runs' folders, `PREFIX,ROW,candidate=I`.
    prefix: what the rows have in common.
    jobs: how many runs are trained at a time.

  Returns:
    Row -> the validation accuracies of its candidates; None for one whose
    weights did not stay finite.

  Example:
    >>> best(search({'bp': configs}, 'runs/search', 'mnist')['bp'])
    2
  """
  found = iter(accuracies_of([
      jobs_lib.Job(name, os.path.join(workdir, name), config)
      for row, configs in rows.items() for i, config in enumerate(configs)
      for name in [f'{prefix},{row},candidate={i}']], jobs))
  return {row: [next(found) for _ in configs] for row, configs in rows.items()}


def in_full(
    configs: Mapping[str, Sequence[ml_collections.ConfigDict]],
    accuracies: Mapping[str, Accuracies], count: int, workdir: str, prefix: str,
    jobs: int = 1) -> dict[str, tuple[dict[int, float | None], int]]:
  """The second round: those that did best in the first, and longer.

  Args:
    configs: row -> its candidates as they are to be trained now.
    accuracies: of the first round.
    count: how many of a row go on.
    workdir: folder of the runs' folders, `PREFIX,ROW,candidate=I,full`.
    prefix: what the rows have in common.
    jobs: how many runs are trained at a time.

  Returns:
    Row -> (candidate -> validation accuracy, the candidate with the highest, the
    first of equals).

  Example:
    >>> found = in_full(
    ...     {'bp': configs}, {'bp': [.5, .8, .7]}, 2, 'runs/search', 'mnist')
    >>> sorted(found['bp'][0])
    [1, 2]
  """
  chosen = {row: sorted(ranked(a)[:count]) for row, a in accuracies.items()}
  found = iter(accuracies_of([
      jobs_lib.Job(name, os.path.join(workdir, name), configs[row][i])
      for row, candidates in chosen.items() for i in candidates
      for name in [f'{prefix},{row},candidate={i},full']], jobs))
  full = {row: {i: next(found) for i in c} for row, c in chosen.items()}
  return {row: (of, list(of)[ranked(list(of.values()))[0]])
          for row, of in full.items()}


def accuracies_of(jobs: Sequence[jobs_lib.Job], at_once: int = 1) -> Accuracies:
  """The validation accuracy of each run; trains what is not finished.

  Args:
    jobs: the runs.
    at_once: how many are trained at a time.

  Returns:
    The accuracies; None where the weights did not stay finite.

  Example:
    >>> accuracies_of([jobs_lib.Job('bp', 'runs/search/bp', config)])
    [.95]
  """
  try:
    codes = jobs_lib.run_all(jobs, at_once)
  except jobs_lib.Stopped as stopped:
    sys.exit(stopped.exit_code or 1)  # 1: by SIGTERM, and nothing is known yet.
  for code in codes:
    if code not in (0, 3):  # 3: the weights were not finite.
      sys.exit(code)
  summaries = [workdir_lib.read_summary(job.folder) for job in jobs]
  return [s and round(s['validation_accuracy'], 6) for s in summaries]


def ranked(accuracies: Accuracies) -> list[int]:
  """Candidates, the highest accuracy first, and the first of equals.

  Example:
    >>> ranked([.5, None, .7, .7])
    [2, 3, 0, 1]
  """
  return sorted(
      range(len(accuracies)), key=lambda i: (-(accuracies[i] or 0.), i))


def best(accuracies: Accuracies) -> int:
  """The index of the highest accuracy, the first of equals.

  Example:
    >>> best([.5, None, .7, .7])
    2
  """
  return ranked(accuracies)[0]


def check_rows(given: Iterable[str], known: Sequence[str]) -> None:
  """Exits with one sentence for a row that there is none of."""
  for row in given:
    if row not in known:
      print(f'error: `rows` has no {row!r}; known: {", ".join(known)}.',
            file=sys.stderr)
      sys.exit(2)


def write(
    path: str, script: str, settings: Mapping[str, Any],
    rows: Mapping[str, Any]) -> None:
  """Writes what was found, one line a row.

  Args:
    path: of the JSON file.
    script: its name, for the command.
    settings: what all rows had in common.
    rows: row -> what was found.

  Example:
    >>> write('results/search.json', 'search', {'epochs': 5}, {'bp': found})
  """
  head = {
      'command': ' '.join([f'python scripts/{script}.py', *sys.argv[1:]]),
      'versions': summary_lib.versions(), **settings}
  lines = [f'  {json.dumps(row)}: {json.dumps(v)}' for row, v in rows.items()]
  text = json.dumps(head, indent=1)[:-2]
  with open(path, 'w', encoding='utf-8') as file:
    file.write(text + ',\n "rows": {\n' + ',\n'.join(lines) + '\n }\n}\n')
