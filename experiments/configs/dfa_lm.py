"""Language models by feedback: characters here, WikiText-103 on an accelerator.

  python -m experiments.main --config=experiments/configs/dfa_lm.py:kolen_pollack:3 \
      --workdir=runs/lm
  python -m experiments.main \
      --config=experiments/configs/dfa_lm.py:wikitext:macro_adam_98 \
      --config.dataset=wiki.train.txt --workdir=runs/wikitext

A rule of `experiments.transformers.RULES` and a number of blocks: a small decoder
of characters of tiny_shakespeare, read from --config.data_dir or TFDS_DATA_DIR.

`wikitext:ROW`: the ten commands of Direct feedback alignment scales to modern deep
learning tasks and architectures, Launay, Poli, Boniface and Krzakala, NeurIPS 2020
(https://arxiv.org/abs/2006.12878). Six blocks of width 512, eight heads, 2,048
hidden relu units, post-norm, sinusoidal positions, dropout .1, an untied readout;
32,000 byte pairs, batches of 64 rows of 128 tokens, gradients clipped to a norm of
.5. Direct feedback once (macro) or three times (micro) a block, of the error before
the readout, by one shared uniform matrix. Noam's schedule with a warm-up of 4,000
steps and beta_2 .98 or .999; Adam at 5e-5 with the same two; and a plateau from
1e-4. Their text is lower-cased, and their byte pairs are those of WikiText-2: here
they are those of the file that is given, which is to be lower-cased before. Chunks
are cut as those of any text file here: 90, 5 and 5% of it.
"""

from bpjax import transformer
from bpjax.train import config as config_lib
from experiments import transformers
from experiments.configs import tiny_shakespeare

# Optimisation -> the settings that differ.
_WIDTH, _WARMUP = 512, 4000
_NOAM = {'learning_rate': (_WIDTH * _WARMUP) ** -.5, 'schedule': 'noam',
         'warmup_steps': _WARMUP}
_OPTIMISATIONS = {
    'noam_98': {**_NOAM, 'beta_2': .98},
    'noam_999': {**_NOAM, 'beta_2': .999},
    'adam_98': {'learning_rate': 5e-5, 'beta_2': .98},
    'adam_999': {'learning_rate': 5e-5, 'beta_2': .999},
    'plateau': {'learning_rate': 1e-4, 'schedule': 'plateau',
                'plateau_factor': .2, 'plateau_patience': 1, 'beta_2': .98},
}
WIKITEXT = (
    'bp_noam_98', 'bp_noam_999', *(
        f'{points}_{name}' for points in ('macro', 'micro')
        for name in _OPTIMISATIONS if name != 'noam_999'))
DEPTH = 6  # Of theirs.


def get_config(what: str = 'backprop:3'):
  first, _, second = what.partition(':')
  if first == 'wikitext' and second in WIKITEXT:
    return _wikitext(second)
  if (first not in transformers.RULES or not second.isdecimal()
      or int(second) < 1):
    raise ValueError(
        'the config must be RULE:DEPTH, with a rule of '
        f'{", ".join(transformers.RULES)} and a number of blocks, or '
        f'wikitext:ROW, with one of {", ".join(WIKITEXT)}, got {what!r}.')
  config = tiny_shakespeare.get_config()
  config.model_args.depth = int(second)
  config.model_args.width = 128
  config.batch_size = 16
  config.epochs = 12
  config.keep_checkpoints = 1
  return transformers.configured(config, first, each_token=True)


def _wikitext(row):
  points, _, optimisation = row.partition('_')
  config = config_lib.default()
  config.dataset = 'wikitext103.txt'
  config.tokenizer = 'bpe'
  config.vocabulary = 32_000
  config.length = 128
  config.model = 'gpt'
  config.model_args = {
      'depth': DEPTH, 'width': _WIDTH, 'heads': 8, 'hidden': 2048,
      'activation': 'relu', 'positions': 'sinusoidal', 'dropout': .1}
  if points != 'bp':
    config.rule = 'direct_feedback_alignment'
    config.rule_args = {
        'placement': 'boundaries', 'error': 'hidden', 'shared': True,
        'entries': 'uniform', 'normalise': 'largest'}
    config.boundaries = transformer.points(points, hidden=True)
  config.optimizer = 'adam'
  for field, value in _OPTIMISATIONS[optimisation].items():
    config[field] = value
  config.epochs = 20
  config.batch_size = 64
  config.eval_batch_size = 64
  config.clip_norm = .5
  config.keep_checkpoints = 1
  return config
