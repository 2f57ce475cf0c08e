# %% [markdown]
# # A first network
#
# Handwritten digits (1,797 images of 8x8 pixels, of scikit-learn), a network of
# two hidden layers, and four rules that train it. About a minute on one CPU
# core.
#
#     python examples/first_network.py [--small]

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

# %% [markdown]
# ## Data
#
# 360 images are for testing. Nothing here is chosen by them.

# %%
images, labels = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16., jnp.float32), jnp.asarray(labels)
x_train, x_test, y_train, y_test = model_selection.train_test_split(
    x, y, test_size=360, random_state=0)

# %% [markdown]
# ## A network of units
#
# The model is plain Flax. `net.units` lists what a rule will train, and every
# parameter that keeps its exact derivative: none, here.

# %%
model = nn.Sequential(
    [nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)])
net = bpjax.from_linen(model)
variables = net.init(jax.random.key(0), x_train)
print(net.units)

# %% [markdown]
# ## Training
#
# `rule.value_and_grad` stands where `jax.value_and_grad` would, and
# `bpjax.optimizer` trains parameters and feedback; it leaves feedback alone
# that does not learn. One compiled loop over the steps of an epoch.


# %%
def train(rule, epochs, batch=64):
  """The trained parameters."""
  feedback = rule.init(jax.random.key(1), net, variables, x_train)
  learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
  tx = bpjax.optimizer(optax.adam(2e-3), rule, feedback)
  trees = (variables['params'], feedback)

  def step(carry, inputs):
    trees, state = carry
    rows, key = inputs
    _, grads = learn(
        {'params': trees[0]}, trees[1], x_train[rows], y_train[rows], key=key)
    updates, state = tx.update(grads, state, trees)
    return (optax.apply_updates(trees, updates), state), None

  @jax.jit
  def epoch(carry, key):
    order, noise = jax.random.split(key)
    steps = len(x_train) // batch
    rows = jax.random.permutation(order, len(x_train))[:steps * batch]
    inputs = rows.reshape(steps, batch), jax.random.split(noise, steps)
    return jax.lax.scan(step, carry, inputs)[0]

  carry = trees, tx.init(trees)
  for key in jax.random.split(jax.random.key(2), epochs):
    carry = epoch(carry, key)
  return carry[0][0]


# %% [markdown]
# Four rules, with the settings of the quickstart's config, which no search
# chose for them:

# %%
RULES = {
    'backprop': bpjax.rules.backprop(),
    'feedback alignment': bpjax.rules.feedback_alignment(),
    'Kolen-Pollack': bpjax.rules.kolen_pollack(),
    'forward gradient': bpjax.rules.forward_gradient(),
}
if SMALL:
  RULES = {'feedback alignment': RULES['feedback alignment']}
accuracies = {}
for name, rule in RULES.items():
  params = train(rule, epochs=3 if SMALL else 30)
  output = rule.predict(net)({'params': params}, x_test)
  accuracies[name] = float((output.argmax(1) == y_test).mean())
  print(f'{name}: {accuracies[name]:.1%} of the test images')

# %%
assert min(accuracies.values()) > (.5 if SMALL else .9)
