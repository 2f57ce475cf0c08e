"""Eleven ways to train a network of blocks, by their published names.

Scaling forward gradient with local losses, Ren, Kornblith, Liao and Hinton,
ICLR 2023 (https://arxiv.org/abs/2210.03310), Tables 3 and 4.
"""

from __future__ import annotations

from typing import Any

from bpjax import arguments
from bpjax import paths
from bpjax import rules
from bpjax.local import losses as local_losses
from bpjax.local import view as view_lib
from bpjax.local.engine import local

# Name -> where losses are ('' for the network's output alone; 'L': also at every
# block; 'LG': there, and gradients stop between blocks), and the rule.
_VARIANTS = {
    'BP': ('', 'backprop'),
    'L-BP': ('L', 'backprop'),
    'LG-BP': ('LG', 'backprop'),
    'FA': ('', 'feedback_alignment'),
    'L-FA': ('L', 'feedback_alignment'),
    'LG-FA': ('LG', 'feedback_alignment'),
    'DFA': ('', 'direct_feedback_alignment'),
    'FG-W': ('', 'weight'),
    'FG-A': ('', 'activity'),
    'LG-FG-W': ('LG', 'weight'),
    'LG-FG-A': ('LG', 'activity'),
}


def variant(
    name: str, blocks: view_lib.Blocks = ('block_*',), *, grouped: bool = True,
    groups: int = 1, placement: str = 'group',
    loss: local_losses.LocalLoss | None = None, last: str | None = None,
    pooled: bool = True, directions: str = 'rademacher', samples: int = 1,
    head_scale: float = 1., feedback_scale: float = 1.) -> Any:
  """A rule that trains a network of blocks, by its name in the paper.

  ::

    name                     losses                          rule
    BP, FA, DFA              of the network's output         as it says
    FG-W, FG-A               of the network's output         forward gradient
    L-BP, L-FA               of blocks and output; errors    as it says
                             pass from block to block
    LG-BP, LG-FA             of blocks and output; errors    as it says
    LG-FG-W, LG-FG-A         stop between blocks             forward gradient

  FA is feedback alignment and DFA its direct kind; forward gradient perturbs
  weights (W) or activities (A), and gives the readout its exact gradient. With
  local losses no error goes from the readout into the network.

  Another local loss than the prediction of labels, `contrastive()` say, is none
  of the network's output: the names without L then train the blocks on that loss
  of the `last` block alone, and the readout on its own, so that it reads what
  the labels had no part in.

  The released code departs from the paper, which changes its numbers; here:

  * a bias is added once. The code's layers of whole channels add theirs twice,
    so that its exact gradient is doubled and that of FG-A is not.
  * DFA projects the error of the network's output, as its author has it. The
    code gives each layer a fixed random readout of the labels instead, a local
    loss: the paper's row DFA is that, not this.
  * FA learns from the network's output alone. The code's `feedback_alignment`
    learns from every local loss unless it is told otherwise: that is L-FA here.
  * FA takes as long as BP; there 1.5 times, for two forward passes.
  * FG-W, FG-A and FA learn from the loss of the network's output. The code's
    learn from the last block's local loss, and its readout alone from the
    output's (so that the paper's FG-A is its LG-FG-A in networks of one block):
    that is
    `variant('FG-A', loss=bpjax.local_losses.prediction(), last='block_3')`.
  * Heads begin with a deviation of `1 / sqrt(channels)`, there up to twice that,
    and read what the block puts out; there what is normalised in each group.

  Units should hold the norms of `bpjax.models.local_mixer`, so that noise comes
  after them, as in the paper: `from_linen(model, is_unit=lambda m: isinstance(m,
  NormedLayer))`; without, gradients are estimated as well, with other variance.

  Args:
    name: one of `names()`.
    blocks: as in `bpjax.local`.
    grouped: whether blocks put out an axis for groups, as LocalMixer's do.
    groups: the number of groups, where they do not.
    placement: 'block', 'patch' or 'group': where the local losses of LG-FG-W
      and LG-FG-A are. For other rules it makes no difference.
    loss: a local loss; default `bpjax.local_losses.prediction()`.
    pooled: whether the default local loss averages positions; False for labels of
      each position, as a language model's.
    last: path of the last block; needed, and read, with `loss` for the names
      without L.
    directions: as in `bpjax.rules.forward_gradient`; 'rademacher' is faster on
      CPUs than the paper's 'gaussian', with slightly less variance.
    samples: directions to average over; 1 in the paper.
    head_scale: factor on the updates of heads; 1 in the paper.
    feedback_scale: factor on the deviation of FA's and DFA's fixed weights,
      `1 / sqrt(fan-in)` and `1 / sqrt(outputs)`.

  Returns:
    A rule, as the functions in `bpjax.rules` return. What its name does not
    speak of is checked and not used.

  Raises:
    ValueError: for an unknown name, a value out of range, or `loss` without
      `last` for a name without L.

  Example:
    >>> import bpjax
    >>> rule = variant('LG-FG-A')
    >>> rule.stop, rule.placement, rule.rule.name
    ('output', 'group', 'forward_gradient')
  """
  if not isinstance(name, str) or name not in _VARIANTS:
    raise ValueError(
        f'`name` must be a variant of the paper, got {name!r}; '
        f'{paths.nearest(name, _VARIANTS)}.')
  arguments.flag('pooled', pooled)
  where, kind = _VARIANTS[name]
  if where and loss is None and not pooled:
    loss = local_losses.prediction(pooled=False)
  made = _rules(directions, samples, feedback_scale)
  greedy = local(
      made[kind], blocks, loss=loss, placement=placement, groups=groups,
      grouped=grouped, head_scale=head_scale)
  if where == 'LG':
    return greedy
  if where == 'L':
    return local(
        made[kind], blocks, loss=loss, placement=placement, groups=groups,
        grouped=grouped, stop='none', head_scale=head_scale)
  if loss is None:
    return made[kind]
  if not last:
    raise ValueError(
        f'`last` must be the path of the last block for {name!r} with a `loss` '
        "of its own, since it has no other block's, got "
        f"{last!r}; give last='block_3', say.")
  # One loss of the network: a perturbation of any entry may change it.
  return local(
      made[kind], (last,), loss=loss, grouped=grouped, stop='none',
      head_scale=head_scale)


def names() -> tuple[str, ...]:
  """The names of all variants, in the paper's order.

  Example:
    >>> names()[:3]
    ('BP', 'L-BP', 'LG-BP')
  """
  return tuple(_VARIANTS)


def _rules(directions, samples, feedback_scale):
  """Every rule, so that any argument is checked whatever the name."""
  forward = lambda perturb: rules.forward_gradient(
      perturb, directions=directions, samples=samples, exact_readout=True)
  return {
      'backprop': rules.backprop(),
      'feedback_alignment': rules.feedback_alignment(feedback_scale),
      'direct_feedback_alignment': rules.direct_feedback_alignment(
          scale=feedback_scale),
      'weight': forward('weight'),
      'activity': forward('activity'),
  }
