"""Names of units and parameters, and the patterns that select them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import difflib
import fnmatch
import re
from typing import Any

import jax


def matches(pattern: str, path: str) -> bool:
  """Whether `pattern` selects `path`.

  A pattern is a shell-style glob (`*`, `Block_*`) or a regular expression that
  has to match the whole path (`Block_[01]/.*`). It selects a path if it matches
  the path itself or a module that contains it, so `encoder` selects everything
  inside `encoder`.

  Args:
    pattern: the glob or the regular expression.
    path: names joined with `/`, such as `encoder/Dense_0/kernel`.

  Returns:
    True or False.

  Example:
    >>> matches('encoder', 'encoder/Dense_0/kernel')
    True
    >>> matches('*/kernel', 'encoder/Dense_0/kernel')
    True
    >>> matches('Dense_[12]', 'Dense_3')
    False
  """
  parts = path.split('/')
  prefixes = ['/'.join(parts[:i]) for i in range(len(parts), 0, -1)]
  if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes):
    return True
  try:
    expression = re.compile(pattern)
  except re.error:
    return False  # A glob such as `*` is no regular expression.
  return any(expression.fullmatch(prefix) for prefix in prefixes)


def is_module(pattern: str, path: str) -> bool:
  """Whether `pattern` is a glob for `path` itself, name by name.

  Unlike in `matches`, a `*` does not cross a `/`, and what lies inside is not
  selected.

  Example:
    >>> is_module('stage_*/block_*', 'stage_1/block_0')
    True
    >>> is_module('stage_*/block_*', 'stage_1/block_0/norm_0')
    False
  """
  globs, names = pattern.split('/'), path.split('/')
  return len(globs) == len(names) and all(
      map(fnmatch.fnmatchcase, names, globs))


def nearest(name: str, known: Iterable[str]) -> str:
  """The end of an error message: the known names, the nearest first.

  Example:
    >>> nearest('backporp', ['backprop', 'dfa'])
    'did you mean `backprop`? Known: backprop, dfa'
  """
  known = list(known)
  close = difflib.get_close_matches(str(name), known, n=2, cutoff=.5)
  hint = f'did you mean {" or ".join(f"`{c}`" for c in close)}? ' if close else ''
  return f'{hint}Known: {", ".join(known) or "none"}'


def name_of(key_path: tuple[Any, ...]) -> str:
  """A jax key path as names joined with `/`."""
  return '/'.join(
      str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
      for k in key_path)


def leaf_names(tree: Any) -> list[str]:
  """The path of every leaf of `tree`, in the order of `jax.tree.leaves`.

  A box that Flax keeps an array in (`nn.with_partitioning`) has no part in it.
  """
  return [
      name_of(p)
      for p, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]
      for _ in (jax.tree.leaves(leaf) if is_box(leaf) else (leaf,))]


def is_box(tree: Any) -> bool:
  """Whether this is one of Flax's boxes: an array with where it is to lie."""
  return hasattr(tree, 'unbox') and hasattr(tree, 'replace_boxed')


def unboxed(tree: Any) -> Any:
  """A tree with what is in its boxes in their place, wherever it lies."""
  return jax.tree.map(
      lambda leaf: (jax.tree.leaves(leaf) or [leaf])[0] if is_box(leaf)
      else leaf, tree,
      is_leaf=is_box)


def map_with_name(function, tree, *rest):
  """`jax.tree.map` whose function gets the leaf's path as first argument."""
  found, structure = jax.tree.flatten(tree)
  others = [structure.flatten_up_to(other) for other in rest]
  return structure.unflatten(map(function, leaf_names(tree), found, *others))


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict that has these leaves at these paths.

  Example:
    >>> nest({'a/b': 1, 'c': 2})
    {'a': {'b': 1}, 'c': 2}
  """
  tree = {}
  for name, leaf in leaves.items():
    *around, last = name.split('/')
    inside = tree
    for part in around:
      inside = inside.setdefault(part, {})
    inside[last] = leaf
  return tree


def is_inside(name: str, module: str) -> bool:
  """Whether a path is that of a module, or of something inside it."""
  return name == module or name.startswith(module + '/') or not module


def leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths."""
  return dict(zip(leaf_names(tree), jax.tree.leaves(tree)))


BARE = '#0'  # Name of a unit's bare array that lies beside others.


def of_unit(feedback: Any, name: str) -> Any:
  """A unit's part of the feedback, or None where there is none."""
  part = subtree(feedback, name)
  return part[BARE] if isinstance(part, Mapping) and BARE in part else part


def subtree(tree: Any, name: str) -> Any:
  """The part of a tree under `name`, or None where there is none."""
  found = tree
  for part in name.split('/') if name else ():
    if not isinstance(found, Mapping) or part not in found:
      break
    found = found[part]
  else:
    return unboxed(found)
  # No nested dict, or one with a `/` in its keys.
  inside = {n: leaf for n, leaf in leaves(tree).items() if is_inside(n, name)}
  if name in inside:
    return inside[name]
  return nest({n[len(name) + 1:]: leaf for n, leaf in inside.items()}) or None
