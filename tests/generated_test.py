"""Generated tasks against an evaluator of their own, and their splits."""

from bpjax.train import data
from bpjax.train.data import generated
import numpy as np
import pytest


def _value(names):
  """The value of an expression and its depth, read from left to right."""
  stack, depth = [[]], 0
  for name in names:
    if name == ']':
      operator, *given = stack.pop()
      given.sort()
      n = len(given)
      value = {
          '[MAX': given[-1], '[MIN': given[0], '[SM': sum(given) % 10,
          # Rounded down where it lies between two.
          '[MED': (given[n // 2] + given[(n - 1) // 2]) // 2}[operator]
      stack[-1].append(value)
    elif name.startswith('['):
      stack.append([name])
      depth = max(depth, len(stack) - 1)
    else:
      stack[-1].append(int(name))
  (value,), = stack
  return value, depth


def _splits(made):
  return {n: getattr(made, n) for n in ('train', 'validation', 'test')}


@pytest.mark.parametrize(
    'length, depth, arguments', [(64, 4, 5), (24, 2, 4), (40, 3, 3)])
def test_listops_are_expressions_with_their_values(length, depth, arguments):
  made = generated.listops(
      500, 100, 100, length=length, depth=depth, arguments=arguments)
  depths, sizes = set(), set()
  for split in _splits(made).values():
    assert split.tokens.shape[1] == length
    for row, end, value in zip(split.tokens, split.ends, split.labels):
      assert end[0] == end[1] and not row[end[1]:].any() and row[:end[1]].all()
      names = [generated.LISTOPS[token] for token in row[:end[1]]]
      assert names[0] == '[CLS]'
      found, deepest = _value(names[1:])
      assert found == value
      depths.add(deepest)
      sizes.add(len(names))
  assert depths == set(range(1, depth + 1))
  assert min(sizes) == 5 and max(sizes) <= length


def test_classes_of_listops_are_of_one_size_in_every_split():
  made = generated.listops(500, 100, 200)
  for split in _splits(made).values():
    assert set(np.bincount(split.labels)) == {len(split.labels) // 10}
    assert len(set(split.labels[:20])) > 5  # They are mixed.


@pytest.mark.parametrize('make', [
    lambda **sizes: generated.listops(**sizes, length=16, depth=2),
    lambda **sizes: generated.associative_recall(**sizes, pairs=2, keys=4),
    lambda **sizes: generated.associative_recall(
        **sizes, pairs=3, keys=4, values=3, queries=3)])
def test_splits_share_no_example_and_never_change(make):
  sizes = {'train': 400, 'validation': 50, 'test': 50}
  made = make(**sizes)
  rows = [tuple(row) for split in _splits(made).values()
          for row in split.tokens]
  assert len(rows) == len(set(rows)) == 500
  for name, split in _splits(make(**sizes)).items():
    assert len(split.labels) == sizes[name]
    for a, b in zip(split, getattr(made, name)):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('pairs, queries, length', [(8, 1, 0), (5, 3, 20)])
def test_the_value_of_a_key_is_recalled(pairs, queries, length):
  keys, values = 12, 7
  made = generated.associative_recall(
      200, 20, 20, length=length, pairs=pairs, keys=keys, values=values,
      queries=queries)
  least = 2 + 2 * pairs + queries
  for split in _splits(made).values():
    assert split.tokens.shape[1] == max(length, least)
    for row, label in zip(split.tokens, split.labels):
      assert row[0] == 1 and row[2 * pairs + 1] == 2
      assert not row[least:].any()
      held = dict(zip(row[1:2 * pairs + 1:2], row[2:2 * pairs + 1:2]))
      assert len(held) == pairs  # All keys are different ones.
      assert all(3 <= k < 3 + keys <= v < 3 + keys + values
                 for k, v in held.items())
      answers = [held[key] for key in row[least - queries:least]]
      assert len({*row[least - queries:least]}) == queries
      if queries == 1:
        assert label == answers[0] - 3 - keys
      else:
        np.testing.assert_array_equal(label[least - queries:least], answers)
        assert (np.delete(label, np.arange(least - queries, least)) == -1).all()
  if queries == 1:
    counts = np.bincount(made.train.labels, minlength=values)
    assert counts.min() > 10  # About 29 each.


@pytest.mark.parametrize('name, given, words', [
    ('listops', {'train': 15}, 'multiple of ten'),
    ('listops', {'length': 4}, '`dataset_args.length`'),
    ('listops', {'depth': 0}, '`dataset_args.depth`'),
    ('listops', {'depth': 1, 'arguments': 2}, 'were found'),
    ('listops', {'arguments': 1.5}, '`dataset_args.arguments`'),
    ('associative_recall', {'keys': 3}, '`dataset_args.keys`'),
    ('associative_recall', {'queries': 9}, 'at most the 8 pairs'),
    ('associative_recall', {'length': 9}, '`dataset_args.length`'),
    ('associative_recall', {'pairs': 1, 'keys': 2, 'values': 2}, 'were found')])
def test_what_cannot_be_made_is_refused(name, given, words):
  with pytest.raises(ValueError, match=words):
    generated.get(name)(**given)


def test_they_are_data_sets_with_validation_of_their_own_or_held_out():
  sizes = {'train': 400, 'validation': 50, 'test': 50}
  own = data.load('listops', length=16, dataset_args=sizes)
  assert own.train.tokens.shape == (400, 16)
  assert own.validation.tokens.shape == (50, 16)
  held = data.load(
      'listops', length=16, validation=100, train_examples=200,
      dataset_args=sizes)
  assert len(held.train.labels) == 200 and len(held.validation.labels) == 100
  rows = {tuple(row) for row in own.train.tokens}
  assert {tuple(row) for row in held.validation.tokens} <= rows
  assert own.tokenizer == '' and own.asked.vocabulary == 17
