# %% [markdown]
# # Your own rule
#
# A rule is one function of one unit. This one sends errors through a mixture of
# the weights and of fixed random ones, so that one number leads from feedback
# alignment (0) to backprop (1). How much weight transport is needed? Half a
# minute on one CPU core.
#
#     python examples/your_own_rule.py [--small]

# %%
import sys

import bpjax
from bpjax import base
from bpjax import feedback as feedback_lib
from bpjax.engines import UnitRule
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets
from sklearn import model_selection

SMALL = '--small' in sys.argv  # A few steps, for a quick look.

# %% [markdown]
# ## The rule
#
# `init_unit` draws what the unit needs besides its weights; `draw` returns None
# where nothing below waits for a message. `backward` asks the unit for
# vector-Jacobian products, with the mixture in the place of the weights on the
# way down. No outer product is written, so that the same lines serve
# convolutions and attention.


# %%
def partial_transport(share: float = .1):

  def init_unit(key, info, params):
    return feedback_lib.draw(key, info, params, scale=1.)

  def backward(unit, feedback, signal):
    delta = unit.delta(signal.teaching)
    message = (None,) * len(unit.inputs)
    if unit.info.sends:
      weights = feedback_lib.stands_for(unit.params)
      message = unit.send(delta, jax.tree.map(
          lambda w, b: share * w + (1 - share) * b, weights, feedback))
    return base.Credit(params=unit.grad(delta), inputs=message)

  return UnitRule(
      name='partial_transport', init_unit=init_unit, backward=backward,
      linear=True)


# %% [markdown]
# ## The contract
#
# One call checks structure, determinism, compilation, the sign of updates,
# convolutions, boundaries, `scan`, a batch of one, and that hidden layers
# learn.

# %%
if not SMALL:
  bpjax.testing.check_rule(partial_transport())

# %% [markdown]
# ## On data, beside its parents

# %%
images, labels = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16., jnp.float32), jnp.asarray(labels)
x_train, x_test, y_train, y_test = model_selection.train_test_split(
    x, y, test_size=360, random_state=0)
net = bpjax.from_linen(nn.Sequential(
    [nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)]))
variables = net.init(jax.random.key(0), x_train)
loss = bpjax.losses.softmax_cross_entropy


def train(rule, steps):
  feedback = rule.init(jax.random.key(1), net, variables, x_train)
  learn = rule.value_and_grad(net, loss)
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
SHARES = (.1,) if SMALL else (0., .1, .3, 1.)
RULES = {f'share {share}': partial_transport(share) for share in SHARES}
if not SMALL:
  RULES |= {'feedback alignment': bpjax.rules.feedback_alignment(),
            'backprop': bpjax.rules.backprop()}
for name, rule in RULES.items():
  trees = train(rule, 100 if SMALL else 600)
  found = jax.jit(bpjax.alignment(net, loss, rule))(
      {'params': trees[0]}, trees[1], x_train[:256], y_train[:256])
  output = rule.predict(net)({'params': trees[0]}, x_test)
  accuracy = float((output.argmax(1) == y_test).mean())
  print(f'{name}: {accuracy:.1%} of the test images; cosine with backprop '
        f'{found["layers_0"].teaching:.2f} at the first layer')
assert accuracy > (.5 if SMALL else .9)
