# %% [markdown]
# # Rules by path on a ResNet
#
# Convolutions cannot align with random feedback. So let each residual block
# take its error from a projection of the output's error at its *boundary*, and
# learn inside by another rule: backprop, sign symmetry, or feedback alignment.
# Digits of 8x8 pixels; a few minutes on one CPU core.
#
#     python examples/rules_by_path_resnet.py [--small]

# %%
import sys

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets
from sklearn import model_selection

SMALL = '--small' in sys.argv  # A smaller model and a few steps.

# %% [markdown]
# ## A ResNet, with its blocks as boundaries
#
# `boundaries` makes the output of each block a unit without parameters, called
# `block_0/boundary`. Nothing in the model changes.


# %%
class Block(nn.Module):
  channels: int
  strides: int = 1

  @nn.compact
  def __call__(self, x):
    norm = lambda i: nn.GroupNorm(4, name=f'norm_{i}')
    conv = lambda i, strides: nn.Conv(
        self.channels, (3, 3), strides, use_bias=False, name=f'conv_{i}')
    h = nn.relu(norm(0)(conv(0, self.strides)(x)))
    h = norm(1)(conv(1, 1)(h))
    if x.shape != h.shape:
      x = nn.Conv(self.channels, (1, 1), self.strides, name='shortcut')(x)
    return nn.relu(x + h)


class ResNet(nn.Module):
  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(self.channels[0], (3, 3), name='stem')(x))
    for i, channels in enumerate(self.channels):
      x = Block(channels, 1 + (i > 0), name=f'block_{i}')(x)
    return nn.Dense(10, name='readout')(x.mean((1, 2)))


net = bpjax.from_linen(
    ResNet((4, 8) if SMALL else (16, 16, 32, 32)), boundaries=['block_*'])

# %%
images, labels = datasets.load_digits(return_X_y=True)
x = jnp.asarray(images / 16., jnp.float32).reshape(-1, 8, 8, 1)
y = jnp.asarray(labels)
x_train, x_test, y_train, y_test = model_selection.train_test_split(
    x, y, test_size=360, random_state=0)
variables = jax.jit(net.init)(jax.random.key(0), x_train[:64])
print(net.units)

# %% [markdown]
# ## Rules by path
#
# A pattern is a glob on a unit's path; the first that matches wins. Direct
# feedback at the boundaries replaces all that would arrive there, skip
# connections included.

# %%
direct = bpjax.rules.direct_feedback_alignment(placement='boundaries')
RULES = {
    'backprop everywhere': bpjax.rules.backprop(),
    'feedback alignment everywhere': bpjax.rules.feedback_alignment(),
    'direct to blocks, backprop inside': bpjax.rules.by_path({
        '*/boundary': direct, '*': bpjax.rules.backprop()}),
    'direct to blocks, sign symmetry inside': bpjax.rules.by_path({
        '*/boundary': direct, '*': bpjax.rules.sign_symmetry()}),
}
if SMALL:
  RULES = dict(list(RULES.items())[-1:])


# %%
def train(rule, steps):
  feedback = rule.init(jax.random.key(1), net, variables, x_train[:64])
  learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
  tx = bpjax.optimizer(optax.adam(2e-3), rule, feedback)
  trees = (variables['params'], feedback)
  state = tx.init(trees)

  @jax.jit
  def step(trees, state, key):
    rows = jax.random.randint(key, (64,), 0, len(x_train))
    _, grads = learn(
        {'params': trees[0]}, trees[1], x_train[rows], y_train[rows])
    updates, state = tx.update(grads, state, trees)
    return optax.apply_updates(trees, updates), state

  for key in jax.random.split(jax.random.key(2), steps):
    trees, state = step(trees, state, key)
  return trees


# %%
for name, rule in RULES.items():
  trees = train(rule, 3 if SMALL else 600)
  output = rule.predict(net)({'params': trees[0]}, x_test)
  accuracy = float((output.argmax(1) == y_test).mean())
  print(f'{name}: {accuracy:.1%} of the test images')

# %% [markdown]
# Which rule trained which unit (and where parameters of norms are exact):

# %%
trained = rule.units(net, variables, x_train[:64])
for unit in net.units:
  print(f'{unit}: {trained[unit]}')
assert SMALL or accuracy > .8
