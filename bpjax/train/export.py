"""A trained network as files that load without bpjax."""

from __future__ import annotations

import json
import os
from typing import Any

from bpjax import paths
from bpjax.train import data as data_lib
from bpjax.train import restore as restore_lib
from bpjax.train.data import prepared
from bpjax.train.data.decoded import Split
from bpjax.train.data.rows import Tokens
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

PLATFORMS = ('cpu', 'cuda', 'tpu')
_README = '''# {name}

{what} The files load without bpjax:

```python
import jax.export, numpy as np
with open('model.jax_export', 'rb') as file:
  model = jax.export.deserialize(bytearray(file.read()))
{example}
```

`model.mlir` is the same program as StableHLO text, `weights.safetensors` the
weights by name (`safetensors.numpy.load_file`), `metadata.json` the classes, the
shapes and the preprocessing.
'''


def export(run: restore_lib.Restored, folder: str) -> dict[str, str]:
  """Writes a trained network and its weights.

  Args:
    run: from `bpjax.train.restore.restore`.
    folder: where to; made if it is missing.

  Returns:
    What was written: name -> path. `model.jax_export` is what
    `jax.export.deserialize` reads: a function of a batch of any size, for CPU,
    CUDA and TPU, of images as the data set has them (bytes; the run's own
    scaling is a part of the program) or of tokens and `ends`, to probabilities.

  Raises:
    ValueError: if a file cannot be written.
  """
  numpy_lib = prepared.require('safetensors.numpy', 'exporting')
  asked = run.dataset.asked
  batch, = jax_export.symbolic_shape('batch')

  def probabilities(*rows):
    labels = jnp.zeros(rows[0].shape[0], jnp.int32)
    made = Split(*rows, labels) if asked is None else Tokens(*rows, labels)
    return jnp.exp(run.log_probabilities(run.outputs(made)))

  if asked is None:
    example = _first(run.dataset.train)
    shapes = [((batch, *run.dataset.image_shape), example.dtype)]
  else:
    shapes = [((batch, asked.length), np.int32), ((batch, 2), np.int32)]
  exported = jax_export.export(jax.jit(probabilities), platforms=PLATFORMS)(
      *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
  weights = {
      name: np.asarray(x) for name, x in zip(
          paths.leaf_names(run.variables), jax.tree.leaves(run.variables))
      if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}
  metadata = {
      'classes': list(run.classes), 'rule': run.config.rule,
      'model': run.config.model, 'model_args': run.config.model_args.to_dict(),
      'dataset': run.config.dataset, 'step': run.step,
      'inputs': [{'shape': ['batch', *shape[1:]], 'dtype': np.dtype(t).name}
                 for shape, t in shapes],
      'output': 'probabilities [batch, classes]' if not (
          asked and asked.each_token) else 'probabilities [batch, length, tokens]'}
  if asked is None:
    task: Any = run.learner.task
    metadata['preprocessing'] = {
        'pixels': run.config.preprocessing or 'in the program',
        'mean': np.asarray(task.mean).tolist(),
        'std': np.asarray(task.std).tolist()}
  shown = ', '.join(
      f'np.zeros({(1, *shape[1:])}, np.{np.dtype(t).name})'
      for shape, t in shapes)
  what = (
      'The function maps images, as their files hold them, to probabilities of '
      'the classes.' if asked is None else
      'The function maps tokens and where the first text and all real tokens '
      'end to probabilities; `tokenizer.json` is that of the library tokenizers.')
  texts = {
      'model.mlir': str(exported.mlir_module()),
      'metadata.json': json.dumps(metadata, indent=2) + '\n',
      'README.md': _README.format(
          name=os.path.basename(run.workdir), what=what,
          example=f'probabilities = model.call({shown})')}
  if run.dataset.tokenizer:
    texts['tokenizer.json'] = run.dataset.tokenizer
  written = {}
  try:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'model.jax_export')
    with open(path, 'wb') as file:
      file.write(exported.serialize())
    written['model.jax_export'] = path
    path = os.path.join(folder, 'weights.safetensors')
    numpy_lib.save_file(weights, path)
    written['weights.safetensors'] = path
    for name, text in texts.items():
      written[name] = os.path.join(folder, name)
      with open(written[name], 'w', encoding='utf-8') as file:
        file.write(text)
  except OSError as error:
    raise ValueError(
        f'{folder!r} cannot be written to ({error.strerror or error}); give '
        'another by --output.') from error
  return written


def _first(split):
  if isinstance(split, data_lib.Stream):
    return np.zeros(0, np.uint8)
  return split.images[:1]
