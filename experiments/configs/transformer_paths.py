"""Feedback alignment on all paths of a transformer but one.

  python -m experiments.main \
      --config=experiments/configs/transformer_paths.py:recall:post:bp_v:2 \
      --workdir=runs/paths

What follows the first colon is a data set (`transformer_depth.DATASETS`), where
the norms are ('post' or 'pre'), a row of `ROWS`, and the number of blocks. Queries
and keys, values, the attention's output, the two maps of the feed-forward part and
the readout (with the pooler) are paths of their own: `bp_v` sends the error through
the true weights of the values, and through fixed random ones everywhere else;
`kp_v` has Kolen-Pollack's weights there.
"""

from experiments import transformers
from experiments.configs import transformer_depth

PATHS = {
    'qk': ('block_*/attention/query', 'block_*/attention/key'),
    'v': ('block_*/attention/value',),
    'o': ('block_*/attention/out',),
    'in': ('block_*/feed_forward/in',),
    'out': ('block_*/feed_forward/out',),
    'readout': ('readout', 'pooler')}
_EXEMPT = {'bp': 'backprop', 'kp': 'kolen_pollack'}
_WHOLE = ('backprop', 'feedback_alignment', 'frozen')
ROWS = (*_WHOLE, *(f'{rule}_{path}' for rule in _EXEMPT for path in PATHS))


def get_config(what: str = 'recall:post:bp_v:2'):
  dataset, norm, row, depth, *rest = (*what.split(':'), '', '', '')
  if (dataset not in transformer_depth.DATASETS or norm not in ('post', 'pre')
      or row not in ROWS or any(rest)):
    raise ValueError(
        'the config must be DATASET:NORM:ROW:DEPTH, with a data set of '
        f'{", ".join(transformer_depth.DATASETS)}, a norm of post, pre, and a '
        f'row of {", ".join(ROWS)}, got {what!r}.')
  rule = row if row in _WHOLE else 'feedback_alignment'
  config = transformer_depth.get_config(f'{dataset}:{rule}:{depth}')
  config.model_args.norm = norm
  config.model_args.separate = True
  if row not in _WHOLE:
    exempt, path = row.split('_')
    patterns = [
        p for p in PATHS[path]  # A decoder has no pooler.
        if p != 'pooler' or config.model == 'bert_encoder']
    config.rule_by_path = tuple((p, _EXEMPT[exempt], {}) for p in patterns)
  return transformers.with_candidate(config, 'feedback_alignment', 0)
