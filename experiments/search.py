"""Candidates trained and judged on validation examples: what searches share.

A script says which configs every row has; finished runs are not trained again,
and two processes can share the rows of one folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
import os
import sys
from typing import Any

from bpjax.train.folder import summary as summary_lib
from bpjax.train.loop import launch
import ml_collections

Accuracies = list[float | None]


def search(
    rows: Mapping[str, Sequence[ml_collections.ConfigDict]], workdir: str,
    prefix: str) -> Iterator[tuple[str, Accuracies]]:
  """Trains what is missing; exits where a run cannot.

  Args:
    rows: row -> its candidates, in order.
    workdir: folder of the runs' folders, `PREFIX,ROW,candidate=I`.
    prefix: what the rows have in common.

  Yields:
    A row, and the validation accuracies of its candidates; None for one whose
    weights did not stay finite.

  Example:
    >>> for row, accuracies in search({'bp': configs}, 'runs/search', 'mnist'):
    ...   print(row, best(accuracies))
  """
  for row, configs in rows.items():
    yield row, [
        accuracy_of(
            config, os.path.join(workdir, f'{prefix},{row},candidate={i}'))
        for i, config in enumerate(configs)]


def in_full(
    configs: Sequence[ml_collections.ConfigDict], accuracies: Accuracies,
    count: int, workdir: str, prefix: str) -> tuple[dict[int, Any], int]:
  """The second round: those that did best in the first, and longer.

  Args:
    configs: a row's candidates as they are to be trained now.
    accuracies: of the first round.
    count: how many go on.
    workdir: folder of the runs' folders, `PREFIX,candidate=I,full`.
    prefix: data set and row.

  Returns:
    Candidate -> validation accuracy, and the candidate with the highest, the
    first of equals.

  Example:
    >>> full, best = in_full(configs, [.5, .8, .7], 2, 'runs/search', 'mnist,bp')
    >>> sorted(full)
    [1, 2]
  """
  full = {
      i: accuracy_of(
          configs[i], os.path.join(workdir, f'{prefix},candidate={i},full'))
      for i in sorted(ranked(accuracies)[:count])}
  return full, list(full)[ranked(list(full.values()))[0]]


def accuracy_of(
    config: ml_collections.ConfigDict, folder: str) -> float | None:
  """A config's validation accuracy; trains it unless that was done.

  Returns:
    The accuracy, or None if the weights did not stay finite.

  Example:
    >>> accuracy_of(config, 'runs/search/mnist,bp,candidate=0')
  """
  code = launch.launch(config, folder, quiet=True)
  if code not in (0, 3):
    sys.exit(code)
  path = os.path.join(folder, 'summary.json')
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      return round(json.load(file)['validation_accuracy'], 6)
  if not code:
    sys.exit(1)  # Stopped by SIGTERM.
  return None  # Code 3: the weights were not finite.


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
