"""Wrong calls of the library: the source of each, and words of its sentence."""

from __future__ import annotations

import functools
import re
import time

_LIMIT = 2.  # Seconds of this process, whatever else the machine does.
_NUMBERS = ('float("nan")', 'float("inf")', '-1', '"a"', 'None', 'True', '(1,)')
# Function -> argument -> wrong values.
_ARGUMENTS = {
    'rules.feedback_alignment': {'scale': (*_NUMBERS, '0')},
    'rules.kolen_pollack': {'scale': _NUMBERS},
    'rules.sign_symmetry': {
        'scale': _NUMBERS, 'variant': ('"usf"', 'None', '1'),
        'zero_sign': ('2', 'True', '"0"')},
    'rules.direct_feedback_alignment': {
        'scale': _NUMBERS, 'connections': ('-1', '1.5', '"a"', 'None', 'True'),
        'placement': ('"x"', 'None'), 'shared': ('1', '"no"', 'None'),
        'normalise': ('"no"',)},
    'rules.direct_random_target_projection': {'scale': _NUMBERS},
    'rules.weight_mirror': {
        'rate': _NUMBERS, 'decay': (*_NUMBERS, '1'), 'sigma': _NUMBERS,
        'samples': ('0', '1.5', '"a"', 'None'), 'noise': ('"x"', '1'),
        'activation': ('"relo"', 'None', '"leaky_relu(.)"'), 'bias': ('1',)},
    'rules.equilibrium_propagation': {
        'beta': _NUMBERS, 'free_steps': ('0', '1.5', 'None', 'float("nan")'),
        'step_size': _NUMBERS, 'nudge': ('"x"', 'None'), 'readout': ('"x"',)},
    'rules.local_representation_alignment': {
        'beta': _NUMBERS, 'l2_share': ('1.5', 'float("nan")', '"a"'),
        'update': ('"x"', 'None')},
    'rules.recursive_local_representation_alignment': {
        'wiring': ('"x"', '1', 'None', '{1: 2}'), 'gap': ('0', '1.5', '"a"'),
        'direct_update': ('"transpose"',), 'radius': _NUMBERS},
    'rules.target_propagation': {
        'step': _NUMBERS, 'top': ('"x"',), 'inverse': ('"x"', 'None'),
        'readout': ('1',)},
    'rules.difference_target_propagation': {'sigma': _NUMBERS, 'scale': _NUMBERS},
    'rules.forward_gradient': {
        'perturb': ('"both"', 'None'), 'directions': ('"uniform"', '1'),
        'samples': ('0', '1.5', 'True', '"a"', 'float("nan")', 'None'),
        'epsilon': _NUMBERS, 'noise': ('"both"', 'True'),
        'exact_readout': ('1', '"no"'), 'loop': ('"no"',), 'antithetic': ('True', '1')},
    'losses_of_blocks.prediction': {'scale': _NUMBERS},
    'losses_of_blocks.contrastive': {
        'dim': ('0', '"a"', 'None'), 'temperature': ('0', *_NUMBERS),
        'negatives': ('"x"',)},
    'models.get("mlp")': {},
}
CALLS = [
    (f'{function}({argument}={value})', argument)
    for function, arguments in _ARGUMENTS.items()
    for argument, values in arguments.items() for value in values
    if not (function.endswith(('prediction',)) and value == 'None')]
CALLS += [
    # Names.
    ('rules.get("backporp")', 'did you mean `backprop`'), ('rules.get(None)', '`rule`'),
    ('models.get("mpl")', 'did you mean `mlp`'), ('models.get(1)', '`model`'),
    ('bpjax.variant("LG-FGA")', 'did you mean `LG-FG-A`'), ('bpjax.variant(None)', '`name`'),
    ('bpjax.variant("FA", samples=0)', '`samples`'),
    # Models.
    ('models.mlp(10, widths=(0,))', 'widths'), ('models.mlp(10, widths=("a",))', 'widths'),
    ('models.mlp(10, widths=(None,))', 'widths'), ('models.mlp(0)', 'num_classes'),
    ('models.mlp("a")', 'num_classes'), ('models.mlp(10, dropout=1.)', 'dropout'),
    ('models.mlp(10, dropout=float("nan"))', 'dropout'), ('models.mlp(10, dropout="a")', 'dropout'),
    ('models.mlp(10, dtype="float7")', 'dtype'), ('models.mlp(10, activation="rleu")', 'relu'),
    ('models.mlp(10, activation=None)', 'activation'), ('models.mlp(10, init="x")', 'init'),
    ('models.cnn(10, norm="layer")', 'norm'), ('models.cnn(10, channels=(0,))', 'channels'),
    ('models.cnn(10, channels=(9,), norm="group")', 'group_size'),
    ('models.local_mixer(10, dtype="float7")', 'dtype'),
    # Networks.
    ('bpjax.from_linen(nn.Dense)', '`model`'), ('bpjax.from_linen(None)', '`model`'),
    ('bpjax.from_linen(lambda x: x)', '`model`'),
    ('bpjax.from_linen(model, boundaries=1)', 'boundaries'),
    ('bpjax.from_linen(model, boundaries=[None])', 'boundaries'),
    ('bpjax.from_linen(model, is_unit="Dense")', 'is_unit'),
    ('bpjax.from_linen(model, train_args=["train"])', 'train_args'),
    ('bpjax.from_linen(model, rngs=1)', 'rngs'),
    ('bpjax.from_linen(model, norm_gain_transport="x")', 'norm_gain_transport'),
    ('bpjax.from_nnx(model)', '`module`'), ('bpjax.from_nnx(None)', '`module`'),
    ('bpjax.from_nnx(nnx.Linear)', '`module`'),
    ('bpjax.from_function(3)', '`apply`'), ('bpjax.from_function(None)', '`apply`'),
    ('bpjax.from_function(f, state="yes")', 'state'),
    ('bpjax.from_function(f).init(key, x)', 'no parameters of its own'),
    ('bpjax.from_linen(model).units', 'net.init'),
    ('net.init(0, x)', 'key'), ('net.init(None, x)', 'key'), ('net.init("a", x)', 'key'),
    ('net.init(jax.random.split(key), x)', 'key'), ('net.init(key, x[:0])', 'at least one example'),
    ('net.init(key, "x")', '`x`'), ('net.init(key, None)', '`x`'), ('net.init(key, [[1.]])', '`x`'),
    ('bpjax.Inputs()', 'at least one input'), ('bpjax.Inputs(bpjax.Inputs(x))', 'another `Inputs`'),
    # Composition.
    ('rules.by_path({})', 'at least one'), ('rules.by_path([])', 'by_path'),
    ('rules.by_path(None)', 'by_path'), ('rules.by_path({1: fa})', 'by_path'),
    ('rules.by_path({"": fa})', 'by_path'), ('rules.by_path({"*": "fa"})', 'credit engine'),
    ('rules.by_path({"*": rules.forward_gradient()})', 'credit engine'),
    ('rules.by_path({"Dense_9": fa, "*": fa}).init(key, net, variables, x)', 'Dense_9'),
    ('rules.by_path({"layers_0": fa}).init(key, net, variables, x)', 'no pattern'),
    ('bpjax.bottleneck(fa, {})', 'at least one'), ('bpjax.bottleneck(fa, None)', 'neurons'),
    ('bpjax.bottleneck(fa, {"layers_0": 0})', 'at least one neuron'),
    ('bpjax.bottleneck(fa, {"layers_0": -1})', 'at least one neuron'),
    ('bpjax.bottleneck(fa, {"layers_0": 1.5})', 'whole number'),
    ('bpjax.bottleneck(fa, {"layers_0": "a"})', 'whole number'),
    ('bpjax.bottleneck(fa, {"layers_0": None})', 'whole number'),
    ('bpjax.bottleneck(fa, {"layers_0": True})', 'whole number'),
    ('bpjax.bottleneck(fa, {"layers_0": float("nan")})', 'whole number'),
    ('bpjax.bottleneck(fa, {"layers_0": [1, [2]]})', 'whole number'),
    ('bpjax.bottleneck(fa, {1: 2})', 'neurons'), ('bpjax.bottleneck("fa", {"*": 2})', '`rule`'),
    ('bpjax.bottleneck(fa, {"*": 2}, seed="a")', 'seed'),
    ('bpjax.bottleneck(fa, {"layers_0": 99}).init(key, net, variables, x)', 'at most its 8'),
    ('bpjax.bottleneck(fa, {"none": 9}).init(key, net, variables, x)', 'matches no unit'),
    ('bpjax.local(None, ["a"])', '`rule`'), ('bpjax.local("fa", ["a"])', '`rule`'),
    ('bpjax.local(fa, [])', 'blocks'), ('bpjax.local(fa, ["a", "a"])', 'twice'),
    ('bpjax.local(fa, None)', 'blocks'), ('bpjax.local(fa, [1])', 'blocks'),
    ('bpjax.local(fa, ["a"], loss=loss)', 'local loss'), ('bpjax.local(fa, ["a"], groups=0)', 'groups'),
    ('bpjax.local(fa, ["a"], stop="x")', 'stop'), ('bpjax.local(fa, ["a"], head_scale=-1)', 'head_scale'),
    ('bpjax.local(fa, ["a"], head_scale=float("nan"))', 'head_scale'),
    ('bpjax.local(fa, ["a"], placement="x")', 'placement'), ('bpjax.local(fa, ["a"], readout=1)', 'readout'),
    ('bpjax.local(fa, ["a"], branches=1)', 'branches'), ('bpjax.local(fa, ["a"], grouped="no")', 'grouped'),
    ('bpjax.local(fa, ["none"]).init(key, net, variables, x)', 'none'),
    ('local_learn(variables, {}, x, y)', '`feedback`'),
    ('local_learn(variables, {"rule": {}, "heads": {}}, x, y)', '`feedback`'),
    ('local_learn(variables, feedback, x, y)', '`feedback`'),
    ('losses_of_blocks.similarity(1)', 'classes'), ('losses_of_blocks.similarity("a")', 'classes'),
    ('losses_of_blocks.similarity(3, kernel=2)', 'kernel'),
    ('losses_of_blocks.prediction_and_similarity(3, share=2)', 'share'),
    # Steps.
    ('fa.init(0, net, variables, x)', 'key'), ('fa.init(None, net, variables, x)', 'key'),
    ('fa.init(key, model, variables, x)', '`net`'), ('fa.init(key, net, variables["params"], x)', 'params'),
    ('fa.init(key, net, None, x)', '`variables`'), ('fa.init(key, net, variables, x[:0])', 'example'),
    ('fa.value_and_grad(model, loss)', '`net`'), ('fa.value_and_grad(net, None)', '`loss`'),
    ('fa.value_and_grad(net, "mse")', '`loss`'), ('fa.value_and_grad(net, loss, reduction="avg")', 'reduction'),
    ('fa.value_and_grad(net, loss, reduction=None)', 'reduction'),
    ('learn(variables, {}, x, y)', '`feedback`'), ('learn(variables, None, x, y)', '`feedback`'),
    ('learn(variables, "x", x, y)', '`feedback`'),
    ('learn(variables, {**feedback, "layers_9": feedback["layers_2"]}, x, y)', 'layers_9'),
    ('learn(variables, {"layers_2": {"kernel": jnp.ones((8, 3), int)}}, x, y)', 'whole numbers'),
    ('learn(variables, {"layers_2": {"kernel": jnp.ones((3, 8))}}, x, y)', '(8, 3)'),
    ('learn(variables, {"layers_2": {"bias": jnp.ones(3)}}, x, y)', 'layers_2'),
    ('learn(variables, {"layers_2": jnp.ones((8, 3))}, x, y)', 'layers_2'),
    ('learn(variables, feedback, x, y + 3)', 'labels'), ('learn(variables, feedback, x, y - 1)', 'labels'),
    ('learn(variables, feedback, x, y[:1])', 'labels'), ('learn(variables, feedback, x, y[:, None])', 'labels'),
    ('learn(variables, feedback, x, y.astype(float))', '`y`'), ('learn(variables, feedback, x, None)', '`y`'),
    ('learn(variables, feedback, x, "a")', '`y`'), ('learn(variables, feedback, x, y > 0)', '`y`'),
    ('learn(variables, feedback, x, y + 1j)', '`y`'), ('learn(variables, feedback, x[:0], y[:0])', 'example'),
    ('learn(variables, feedback, None, y)', '`x`'), ('learn(variables, feedback, [[1.]], y)', '`x`'),
    ('learn({}, feedback, x, y)', '`variables`'), ('learn(variables, feedback, x, y, key=0)', 'key'),
    ('learn(variables, feedback, x, y, key="a")', 'key'),
    ('learn(variables, feedback, x, y, key=jax.random.split(key))', 'key'),
    ('fa.value_and_grad(net, lambda o, y: loss(o, y).mean())(variables, feedback, x, y)', 'mean'),
    ('rules.backprop().value_and_grad(net, loss)(variables, feedback, x, y)', 'layers_2'),
    ('fg.value_and_grad(net, loss)(variables, {}, x, y)', 'key'),
    ('fg.value_and_grad(net, loss)(variables, feedback, x, y, key=key)', 'feedback'),
    ('fg.value_and_grad(net, loss)(variables, {}, x, y + 3, key=key)', 'labels'),
    ('fg.value_and_grad(net, loss)(variables, {}, x[:0], y[:0], key=key)', 'example'),
    ('ep.value_and_grad(net, loss)(variables, {}, x, y - 1, key=key)', 'labels'),
    ('ep.value_and_grad(net, loss)(variables, feedback, x, y, key=key)', 'feedback'),
    ('fg.bind(net)', 'bind'), ('bpjax.alignment(model, loss, fa)', '`net`'),
    ('bpjax.alignment(net, None, fa)', '`loss`'), ('bpjax.alignment(net, loss, "fa")', '`rule`'),
    ('bpjax.alignment(net, loss, fa)({}, feedback, x, y)', '`variables`'),
    ('bpjax.alignment(net, loss, rules.feedback_alignment)', '`rule`'),
    ('bpjax.optimizer(None, fa, feedback)', '`tx`'), ('bpjax.optimizer(optax.sgd(1.), "fa", feedback)', '`rule`'),
    ('bpjax.optimizer(optax.sgd(1.), fa, feedback).init(variables["params"])', '(params, feedback)'),
    ('bpjax.optimizer(optax.sgd(1.), fa, feedback).init((variables["params"], {}))', 'structure'),
    ('fa.init(key, bpjax.from_linen(nn.Sequential([nn.tanh])), {"params": {}}, x)', 'no unit'),
    # Losses.
    ('loss(jnp.ones((2, 3)), jnp.array([0, 3]))', 'labels'), ('loss(jnp.ones((2, 3)), jnp.array([-1, 0]))', 'labels'),
    ('loss(jnp.ones((2, 3), int), jnp.array([0, 1]))', '`output`'), ('loss((x, x), y)', '`output`'),
    ('loss(jnp.ones((2, 3)), "ab")', '`y`'), ('loss(jnp.ones((2, 3)), jnp.ones((2, 4)))', 'shape'),
    ('bpjax.losses.squared_error(jnp.ones((2, 3)), jnp.ones(2))', 'shape'),
    ('bpjax.losses.sigmoid_cross_entropy(jnp.ones((2, 3)), jnp.array([0, 3]))', 'labels'),
    ('bpjax.losses.sigmoid_cross_entropy(jnp.ones((2, 3)), jnp.array([0]))', 'labels'),
]


@functools.cache
def _names():
  """What the calls are made of."""
  import bpjax
  from flax import nnx
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import optax
  rules, models, loss = bpjax.rules, bpjax.models, bpjax.losses.softmax_cross_entropy
  losses_of_blocks = bpjax.local_losses
  model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
  net = bpjax.from_linen(model)
  key, x, y = jax.random.key(0), jnp.ones((2, 4)), jnp.zeros(2, int)
  variables = net.init(key, x)
  fa, fg = rules.feedback_alignment(), rules.forward_gradient()
  ep = rules.equilibrium_propagation()
  feedback = fa.init(key, net, variables, x)
  learn = fa.value_and_grad(net, loss)
  local_learn = bpjax.local(fa, ['layers_0']).value_and_grad(net, loss)
  f = lambda params, x: x @ params
  return {**locals(), 'nnx': nnx, 'optax': optax}


def call(source: str, words: str) -> str:
  """What is wrong with the answer to a call, or ''."""
  names = dict(_names())
  begin = time.process_time()
  try:
    eval(source, names)  # pylint: disable=eval-used
  except (ValueError, TypeError) as error:
    seconds = time.process_time() - begin
    text = str(error)
    if type(error) not in (ValueError, TypeError):
      return f'{type(error).__name__}: {text[:200]!r}'
    if words not in text or '\n' in text or not re.search(r'[.;]|Known', text):
      return f'not one sentence with {words!r}: {text[:200]!r}'
    return f'{seconds:.1f} s' if seconds > _LIMIT else ''
  except Exception as error:  # pylint: disable=broad-except
    return f'{type(error).__name__}: {str(error)[:200]!r}'
  return 'accepted'
