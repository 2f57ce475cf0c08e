"""Which examples are held out of the training ones: the same for every run."""

from __future__ import annotations

from bpjax.train.data.streaming import epoch_order
import numpy as np

# Splits never depend on the run's seed: seeds are compared on the same data.
SEED = 0


def hold_out(
    size: int, validation: int, train_examples: int | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Positions kept for train and held out of it; None for all, and for none.

  Args:
    size: number of train examples.
    validation: how many to hold out.
    train_examples: how many to keep of the others; None for all.

  Raises:
    ValueError: for numbers that do not fit the size.

  Example:
    >>> kept, held_out = hold_out(100, 20, None)
    >>> len(kept), len(held_out)
    (80, 20)
  """
  if not 0 <= validation < size:
    raise ValueError(
        f'`validation` must be at least 0 and less than the {size} train '
        f'examples, got {validation}; choose a smaller number')
  left = size - validation
  if train_examples is not None and not 1 <= train_examples <= left:
    raise ValueError(
        f'`train_examples` must be between 1 and the {left} train examples '
        f'that are left, got {train_examples}; use None for all of them')
  if not validation and train_examples in (None, size):
    return None, None
  order = epoch_order(size, seed=SEED, epoch=0)
  kept = np.sort(order[validation:])[:train_examples]
  return kept, np.sort(order[:validation]) if validation else None
