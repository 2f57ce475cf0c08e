"""Rows of tokens, and what is asked of a model that reads them. NumPy alone."""

from __future__ import annotations

from typing import Any, NamedTuple

NONE = -1  # The label of a token that is not asked for.


class Tokens(NamedTuple):
  """Rows of a text split.

  Attributes:
    tokens: int32 `[n, length]`.
    ends: int32 `[n, 2]`: where the first segment ends, and all real tokens; what
      comes behind is padding.
    labels: int32, a class a row, `[n]`, or a token, `[n, length]`; `NONE` where
      none is asked for.
    characters: int32 `[n]`, that the tokens asked for stand for; None for a task
      that does not count them.
  """
  tokens: Any
  ends: Any
  labels: Any
  characters: Any = None


class Asked(NamedTuple):
  """What is asked: a class of every text, or the next token of every token.

  Attributes:
    num_classes: how many classes there are, or tokens.
    vocabulary: how many tokens there are.
    length: of every row.
    pairs: whether a row may hold two segments.
    each_token: whether every token has a label, and not the row.
  """
  num_classes: int
  vocabulary: int
  length: int
  pairs: bool = False
  each_token: bool = False
