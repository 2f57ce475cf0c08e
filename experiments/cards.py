"""Identity cards of rules: what each needs, and where it fails.

`CARDS` is the one place. `tests/leaderboard_test.py` holds that every row of the
leaderboard has one; `docs/leaderboard.md` and its page show them. L is the number
of layers, C that of outputs; costs are of a step, backprop's being one forward
and one backward pass.
"""

from typing import NamedTuple


class Card(NamedTuple):
  """What a rule needs.

  Attributes:
    transported: what of the forward weights the way back, or a unit, must know.
    local: what a unit's update is made of.
    stored: what is kept besides weights and activations.
    cost: of a step, in passes.
    fails: where it does not learn, as its documentation or a table here has it.
    paper: who, and when.
  """
  transported: str
  local: str
  stored: str
  cost: str
  fails: str
  paper: str


_NOTHING = 'nothing'
_ACTIVATIONS = 'nothing'
_ONE_BACK = 'one forward, one backward'

CARDS: dict[str, Card] = {
    'backprop': Card(
        'W, transposed, at every layer', 'its input, and the exact error from '
        'above', _ACTIVATIONS, _ONE_BACK, 'it is the reference',
        'Rumelhart, Hinton and Williams, 1986'),
    'frozen': Card(
        _NOTHING, 'no hidden unit learns; the readout has its exact gradient',
        _NOTHING, 'one forward; backward in the readout alone',
        'whatever random features do not separate', 'a control, no rule'),
    'feedback_alignment': Card(
        _NOTHING, 'its input, and an error through fixed random B',
        'B, as many numbers as W', _ONE_BACK,
        'deep relu networks; convolutions; transformers of more than a few '
        'layers', 'Lillicrap et al., 2016'),
    'direct_feedback_alignment': Card(
        _NOTHING, 'its input, and a fixed random projection of the output\'s '
        'error', 'B of C times the entries of each hidden layer, or keys alone',
        'one forward; a projection in place of each backward product',
        'convolutions; deep relu networks; units that are called more than once '
        '(refused)', 'Nøkland, 2016'),
    'direct_kolen_pollack': Card(
        _NOTHING, 'its input, and a projection that learns from that input and '
        'the output\'s error', 'B as in direct feedback, trained',
        'one forward; two products a layer in place of the backward one',
        'as direct feedback, later; without a decay B keeps its first values',
        'direct Kolen-Pollack, arXiv 2602.15571'),
    'direct_random_target_projection': Card(
        _NOTHING, 'its input, and a fixed random projection of the label',
        'B as in direct feedback', 'one forward; a layer learns before it ends',
        'anything hard: the signal never says how wrong the output is',
        'Frenkel, Lefebvre and Bol, 2019'),
    'sign_symmetry': Card(
        'the signs of W', 'its input, and an error through sign(W)',
        'nothing, or magnitudes as many as W', _ONE_BACK,
        'weights of 0, whose sign sends nothing', 'Liao, Leibo and Poggio, 2016; '
        'Xiao et al., 2019'),
    'kolen_pollack': Card(
        'no weight; both sides see the same updates', 'its input, and an error '
        'through B that is updated as W is', 'B, as many numbers as W, in the '
        'optimiser', _ONE_BACK, 'without a decay, or under an optimiser that '
        'treats B otherwise than W, B stays apart from W',
        'Akrout et al., 2019'),
    'weight_mirror': Card(
        'no weight; B sees what noise through W gives', 'its input, and an error '
        'through B, which learns from noise', 'B, as many numbers as W',
        'one forward, one backward, and a product with noise a layer',
        'noise that is not of mean 0; too few mirror steps before training',
        'Akrout et al., 2019'),
    'target_propagation': Card(
        'no weight; the readout\'s own gradient sets the first target',
        'its input, and a target from a learned inverse',
        'an inverse V of each layer, as many numbers as W, trained',
        'one forward, one pass of inverses, and their training',
        'inverses that are not good yet; layers that narrow; graphs that are no '
        'chain', 'Bengio, 2014; Lee et al., 2015'),
    'difference_target_propagation': Card(
        'no weight; the readout\'s own gradient sets the first target',
        'its input, and a target from a learned inverse, corrected by what the '
        'inverse misses', 'an inverse V of each layer, trained',
        'one forward, two passes of inverses, and their training',
        'graphs that are no chain; interleaved training at high rates',
        'Lee et al., 2015'),
    'direct_difference_target_propagation': Card(
        'no weight; Q sees how the output replies to noise in its layer',
        'its input, and a target that a learned projection of the output\'s error '
        'sets', 'Q, as B in direct feedback, trained',
        'one forward, a projection a layer, and a forward pass from each layer on',
        'deep nets, whose passes grow with the square of the depth; units that are '
        'called more than once (refused)', 'Meulemans et al., 2020'),
    'local_representation_alignment': Card(
        'no weight; with E that learn, their updates', 'its input, and the '
        'distance to a target that error synapses E set',
        'E, as many numbers as W', 'about one forward, one backward',
        'plain SGD: updates shrink with beta at each layer',
        'Ororbia and Mali, 2019'),
    'recursive_local_representation_alignment': Card(
        _NOTHING, 'its input, and the distance to a target that E from any layer '
        'sets', 'E from the output, or a neighbour, to each layer',
        'one forward; layers that are wired directly learn at once',
        'wires to layers of many entries; nets that narrow at once',
        'Ororbia et al., 2023'),
    'equilibrium_propagation': Card(
        'W itself, used both ways', 'what two units put out, in two phases',
        'the states of all units', 'a forward and a backward pass for each of '
        'free and nudged steps', 'depth: a nudge travels one layer a step; Adam; '
        'norms over the batch (refused)', 'Scellier and Bengio, 2017'),
    'predictive_coding': Card(
        'W, transposed, between neighbours', 'its input, and its error of '
        'prediction', 'the states of all units',
        'a forward and a backward pass for each step',
        'fewer steps than layers; norms over the batch (refused)',
        'Whittington and Bogacz, 2017; Millidge et al., 2020'),
    'forward_gradient': Card(
        _NOTHING, 'its own noise, and one number an example: the change of the '
        'loss', 'nothing', 'a forward pass with its derivative; no backward pass',
        'many units: variance grows with their number; give blocks a loss',
        'Baydin et al., 2022; Ren et al., 2023'),
    'pepita': Card(
        _NOTHING, 'its input and output in two forward passes',
        'F, from the output to the input', 'two forward passes',
        'more than three hidden layers; parameters outside of units (refused)',
        'Dellaferrera and Kreiman, 2022'),
    'forward_forward': Card(
        _NOTHING, 'its input, and its own goodness on right and wrong labels',
        _NOTHING, 'three forward passes, derivatives inside a layer',
        'a label that drowns in the input; norms over the batch; inputs that are '
        'no array of floats (refused)', 'Hinton, 2022'),
    'spsa': Card(
        _NOTHING, 'its own noise, drawn again from a key, and one number a step',
        _NOTHING, 'two forward passes; the memory of inference',
        'training from scratch: variance grows with the number of weights',
        'Spall, 1992; Malladi et al., 2023'),
    'L-BP': Card(
        'W, transposed, inside blocks and from block to block', 'exact errors, of '
        'a loss at every block', 'a linear head of each block, trained',
        'one forward, one backward, and the heads', 'it is backprop with more '
        'losses', 'Ren et al., 2023'),
    'LG-BP': Card(
        'W, transposed, inside a block alone', 'exact errors of its block\'s own '
        'loss: "pred" of Nøkland and Eidnes where a block is a layer',
        'a linear head of each block, trained',
        'one forward, one backward, and the heads; blocks may learn in parallel',
        'early blocks that a label alone teaches too little',
        'Nøkland and Eidnes, 2019; Ren et al., 2023'),
    'LG-FA': Card(
        _NOTHING, 'errors of its block\'s own loss, through fixed random B',
        'heads, and B inside blocks', 'one forward, one backward, and the heads',
        'blocks of many layers, as feedback alignment', 'Ren et al., 2023'),
    'LG-FG-W': Card(
        _NOTHING, 'noise on its weights, and the change of its block\'s loss',
        'a linear head of each block', 'a forward pass with its derivative, and '
        'the heads', 'blocks of many weights', 'Ren et al., 2023'),
    'LG-FG-A': Card(
        _NOTHING, 'noise on its output, and the change of its block\'s loss at '
        'that place', 'a linear head of each block',
        'a forward pass with its derivative, and the heads',
        'wide blocks without groups', 'Ren et al., 2023'),
    'local_similarity': Card(
        'W, transposed, inside a block alone', 'exact errors of similarity '
        'matching in its block: "sim"', 'a linear map or convolution of each '
        'block, trained', 'one forward, one backward, and N x N similarities',
        'targets that are not labels (refused); small batches',
        'Nøkland and Eidnes, 2019'),
    'local_prediction_and_similarity': Card(
        'W, transposed, inside a block alone', 'exact errors of both local '
        'losses: "predsim"', 'both heads of each block, trained',
        'one forward, one backward, both heads, and N x N similarities',
        'targets that are not labels (refused)', 'Nøkland and Eidnes, 2019'),
}
