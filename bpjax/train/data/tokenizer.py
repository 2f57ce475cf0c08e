"""Tokenisers, trained on a set's own training texts; what knows `tokenizers`.

A tokeniser is its JSON text, the content of a `tokenizer.json`: with the same
texts it is the same to the byte, whichever process trains it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bpjax.train.data import prepared
import numpy as np

KINDS = ('wordpiece', 'bpe', 'characters')
# Numbers 0 to 3 in every vocabulary.
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
_PAD, _UNKNOWN, _START, _SEPARATOR = SPECIAL
SEPARATOR = SPECIAL.index(_SEPARATOR)
_CHUNK = 4096  # Texts that are encoded at once.


def train(
    kind: str, texts: Sequence[str], vocabulary: int, length: int | None
) -> str:
  """Trains a tokeniser.

  Args:
    kind: 'wordpiece' (of lower-case words without accents, as in BERT), 'bpe'
      (byte pairs, of texts as they are) or 'characters'.
    texts: what it is trained on.
    vocabulary: largest number of tokens; 'characters' takes as many as there are.
    length: of the rows that it makes of sentences and pairs: [CLS] a [SEP], or
      [CLS] a [SEP] b [SEP], the longer one cut first; None for a language, whose
      texts are neither cut nor framed.

  Returns:
    Its JSON text.

  Raises:
    ValueError: for an unknown kind, a vocabulary that does not hold the
      alphabet, or where `tokenizers` is not installed.

  Example:
    >>> text = train('characters', ['to be'], 100, length=None)
    >>> size(text)
    8
  """
  if kind not in KINDS:
    raise ValueError(
        f'`tokenizer` must be one of {", ".join(KINDS)}, got {kind!r}.')
  lib = prepared.require('tokenizers', f'a tokeniser of the kind {kind!r}')
  characters = sorted(set().union(*texts))
  made = {
      'wordpiece': _wordpiece, 'bpe': _bpe, 'characters': _characters,
  }[kind](lib, texts, vocabulary, characters)
  if length is not None:
    made.post_processor = lib.processors.TemplateProcessing(
        single=f'{_START} $A {_SEPARATOR}',
        pair=f'{_START} $A {_SEPARATOR} $B:1 {_SEPARATOR}:1',
        special_tokens=[
            (token, SPECIAL.index(token)) for token in (_START, _SEPARATOR)])
    made.enable_truncation(length, strategy='longest_first')
    made.enable_padding(length=length, pad_id=0, pad_token=_PAD)
  return made.to_str(pretty=True)


def _wordpiece(lib, texts, vocabulary, characters):
  def empty(vocab=None):
    made = lib.Tokenizer(lib.models.WordPiece(vocab, unk_token=_UNKNOWN))
    made.normalizer = lib.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
    return made

  made = empty()
  alphabet = sorted(set(''.join(map(
      made.normalizer.normalize_str, characters))) - {' '})
  _check_alphabet(vocabulary, len(SPECIAL) + 2 * len(alphabet))
  # The trainer numbers inner letters in the order of a hash table, and breaks
  # ties by these numbers: they get theirs here, in the order of the alphabet.
  inner = [f'##{letter}' for letter in alphabet]
  made.train_from_iterator(texts, lib.trainers.WordPieceTrainer(
      vocab_size=vocabulary, special_tokens=[*SPECIAL, *inner],
      initial_alphabet=alphabet, show_progress=False))
  final = empty(made.get_vocab())
  final.add_special_tokens(list(SPECIAL))
  return final


def _bpe(lib, texts, vocabulary, characters):
  del characters
  made = lib.Tokenizer(lib.models.BPE(unk_token=_UNKNOWN))
  made.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = lib.decoders.ByteLevel()
  alphabet = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
  _check_alphabet(vocabulary, len(SPECIAL) + len(alphabet))
  made.train_from_iterator(texts, lib.trainers.BpeTrainer(
      vocab_size=vocabulary, special_tokens=list(SPECIAL),
      initial_alphabet=alphabet, show_progress=False))
  return made


def _characters(lib, texts, vocabulary, characters):
  del texts
  names = [*SPECIAL, *characters]
  _check_alphabet(vocabulary, len(names))
  made = lib.Tokenizer(lib.models.WordLevel(
      {name: i for i, name in enumerate(names)}, unk_token=_UNKNOWN))
  made.pre_tokenizer = lib.pre_tokenizers.Split(
      lib.Regex(r'[\s\S]'), 'isolated')
  made.add_special_tokens(list(SPECIAL))
  return made


def _check_alphabet(vocabulary, least):
  if vocabulary < least:
    raise ValueError(
        f'`vocabulary` must hold the alphabet of the training texts, at least '
        f'{least} tokens, got {vocabulary}; choose a larger one.')


def load(text: str) -> Any:
  """The tokeniser of a JSON text.

  Special tokens are the tokeniser's own: a text that spells one out, such as
  '[SEP]', is read as the letters that it is.
  """
  lib = prepared.require('tokenizers', 'a tokeniser')
  made = lib.Tokenizer.from_str(text)
  made.encode_special_tokens = True
  return made


def size(text: str) -> int:
  """The number of tokens of a tokeniser's JSON text."""
  return load(text).get_vocab_size()


def rows(
    tokenizer: Any, columns: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
  """Sentences, or pairs of them, as rows of one length.

  A sentence without a word is [CLS] [SEP], so that no row is all padding.

  Args:
    tokenizer: from `load`, trained with a length.
    columns: one or two lists of n texts.

  Returns:
    Tokens int32 `[n, length]`, and int32 `[n, 2]`: where the first segment ends,
    and the row.
  """
  texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
  length = tokenizer.truncation['max_length']
  tokens = np.zeros((len(texts), length), np.int32)
  ends = np.zeros((len(texts), 2), np.int32)
  for start in range(0, len(texts), _CHUNK):
    found = tokenizer.encode_batch_fast(texts[start:start + _CHUNK])
    part = slice(start, start + len(found))
    tokens[part] = [e.ids for e in found]
    ends[part, 1] = [sum(e.attention_mask) for e in found]
    ends[part, 0] = ends[part, 1] - [sum(e.type_ids) for e in found]
  return tokens, ends


def passage(
    tokenizer: Any, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
  """Texts one after the other, with [SEP] before each, and behind if several.

  Args:
    tokenizer: from `load`, trained without a length.
    texts: the texts.

  Returns:
    Tokens int32 `[n]`, and how many characters each of them stands for, int32
    `[n]`: as many as the texts have, and one for every [SEP] but the first.
  """
  tokens, characters = [np.array([SEPARATOR])], [np.array([0])]
  several = False
  for i, text in enumerate(texts):
    if i:
      several = True
      tokens.append(np.array([SEPARATOR]))
      characters.append(np.array([1]))
    for piece, found in _pieces(tokenizer, text):
      tokens.append(np.array(found.ids, np.int32))
      ends = np.array([0, *(end for _, end in found.offsets)])
      ends[-1] = len(piece)
      characters.append(np.diff(np.maximum.accumulate(ends)))
  if several:
    tokens.append(np.array([SEPARATOR]))
    characters.append(np.array([1]))
  return (np.concatenate(tokens).astype(np.int32),
          np.concatenate(characters).astype(np.int32))


def _pieces(tokenizer, text) -> Iterator[tuple[str, Any]]:
  """Lines and what they are encoded as: a long text is not encoded at once."""
  lines = text.splitlines(keepends=True)
  for start in range(0, len(lines), _CHUNK):
    part = lines[start:start + _CHUNK]
    yield from zip(
        part, tokenizer.encode_batch(part, add_special_tokens=False),
        strict=True)
