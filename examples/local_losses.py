# %% [markdown]
# # Local losses
#
# Forward gradient perturbs a network and steps along the change of the loss.
# Its variance grows with what one loss has to answer for. Here: one loss for
# the network, one for each block, and what is learned without any hidden layer.
# A minute or two on one CPU core.
#
#     python examples/local_losses.py [--small]

# %%
import sys

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets
from sklearn import model_selection

SMALL = '--small' in sys.argv  # A few steps, for a quick look.

# %%
images, labels = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16., jnp.float32), jnp.asarray(labels)
x_train, x_test, y_train, y_test = model_selection.train_test_split(
    x, y, test_size=360, random_state=0)

# %% [markdown]
# ## A model made of blocks
#
# A block is any module; `bpjax.local` is told by a glob which ones are. Each
# gets a head, a linear readout of the labels, which is trainable feedback.


# %%
class Block(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.tanh(nn.Dense(128, name='dense')(nn.LayerNorm(name='norm')(x)))


class Model(nn.Module):

  @nn.compact
  def __call__(self, x):
    for i in range(4):
      x = Block(name=f'block_{i}')(x)
    return nn.Dense(10, name='readout')(x)


net = bpjax.from_linen(Model())
variables = net.init(jax.random.key(0), x_train)

# %% [markdown]
# ## Three ways
#
# The perturbed units of a block are told of by that block's loss alone.

# %%
noise = bpjax.rules.forward_gradient(directions='rademacher')
RULES = {
    'one loss, forward gradient': noise,
    'a loss a block, forward gradient': bpjax.local(noise, ['block_*']),
    'a loss a block, backprop in it': bpjax.local(
        bpjax.rules.backprop(), ['block_*']),
}
if SMALL:
  RULES = dict(list(RULES.items())[1:2])


# %%
def train(rule, steps, loss=bpjax.losses.softmax_cross_entropy):
  feedback = rule.init(jax.random.key(1), net, variables, x_train)
  learn = rule.value_and_grad(net, loss)
  tx = bpjax.optimizer(optax.adam(1e-3), rule, feedback)
  trees = (variables['params'], feedback)
  state = tx.init(trees)

  @jax.jit
  def step(trees, state, key):
    picked, drawn = jax.random.split(key)
    rows = jax.random.randint(picked, (128,), 0, len(x_train))
    _, grads = learn(
        {'params': trees[0]}, trees[1], x_train[rows], y_train[rows], key=drawn)
    updates, state = tx.update(grads, state, trees)
    return optax.apply_updates(trees, updates), state

  for key in jax.random.split(jax.random.key(2), steps):
    trees, state = step(trees, state, key)
  return trees


# %% [markdown]
# ## What each learns

# %%
for name, rule in RULES.items():
  trees = train(rule, 10 if SMALL else 2000)
  output = rule.predict(net)({'params': trees[0]}, x_test)
  accuracy = float((output.argmax(1) == y_test).mean())
  print(f'{name}: {accuracy:.1%} of the test images')
assert SMALL or accuracy > .9
