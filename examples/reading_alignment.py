# %% [markdown]
# # Reading alignment
#
# Is a hidden layer taught anything? `bpjax.alignment` holds a rule against
# backprop on one batch, unit by unit. This example measures while it trains,
# and says how to read the numbers. Half a minute on one CPU core.
#
#     python examples/reading_alignment.py [--small]

# %%
import sys

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

SMALL = '--small' in sys.argv  # A few steps, for a quick look.

# %%
images, labels = datasets.load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16., jnp.float32), jnp.asarray(labels)
net = bpjax.from_linen(nn.Sequential([
    nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh,
    nn.Dense(10)]))
variables = net.init(jax.random.key(0), x)
loss = bpjax.losses.softmax_cross_entropy

# %% [markdown]
# ## What is measured
#
# - `teaching`: the cosine between the rule's signal at the unit's output and
#   backprop's, a mean over examples, and `teaching_std`, its deviation over
#   them. This is *the* number: 0 is a right angle, so that the step goes
#   nowhere near downhill.
# - `update`: the cosine of the whole update of the unit's parameters.
# - `weight`: the cosine between the unit's weights and its feedback. It
#   explains the first: feedback alignment works because the weights turn
#   towards the feedback.
# - `backprop_norm`: a cosine with next to nothing says nothing. NaN: there is
#   no signal.


# %%
def trained(rule, steps, every):
  """Alignment at each `every`-th step, `{step: {unit: Alignment}}`."""
  feedback = rule.init(jax.random.key(1), net, variables, x)
  learn = rule.value_and_grad(net, loss)
  measure = jax.jit(bpjax.alignment(net, loss, rule))
  tx = bpjax.optimizer(optax.adam(2e-3), rule, feedback)
  trees = (variables['params'], feedback)
  state = tx.init(trees)

  @jax.jit
  def step(trees, state, key):
    rows = jax.random.randint(key, (64,), 0, len(x))
    _, grads = learn({'params': trees[0]}, trees[1], x[rows], y[rows], key=key)
    updates, state = tx.update(grads, state, trees)
    return optax.apply_updates(trees, updates), state

  found = {}
  for i, key in enumerate(jax.random.split(jax.random.key(2), steps + 1)):
    if i % every == 0:
      found[i] = measure(
          {'params': trees[0]}, trees[1], x[:256], y[:256], key=key)
    trees, state = step(trees, state, key)
  return found


# %% [markdown]
# ## Over training
#
# At the start fixed random feedback is at a right angle to backprop, and the
# weights come round to it. The output layer is always exact. Direct feedback
# aligns the layers at about the same pace; through feedback alignment the
# lowest comes last.

# %%
RULES = {
    'feedback alignment': bpjax.rules.feedback_alignment(),
    'direct feedback alignment': bpjax.rules.direct_feedback_alignment(),
    'forward gradient': bpjax.rules.forward_gradient(),
}
if SMALL:
  RULES = {'feedback alignment': RULES['feedback alignment']}
for name, rule in RULES.items():
  print(name)
  curves = trained(rule, 100 if SMALL else 600, 50 if SMALL else 100)
  for i, units in curves.items():
    cosines = '  '.join(f'{u.teaching:5.2f}' for u in units.values())
    print(f'  step {i:4d}: {cosines}')
  if name == 'feedback alignment':
    first, *_, last = curves.values()
    assert last['layers_4'].teaching > first['layers_4'].teaching + .05
    assert jnp.allclose(last['layers_6'].teaching, 1, atol=1e-4)

# %% [markdown]
# Forward gradient stays near zero, and yet trains: its signal is noise around
# the gradient, right on average. A mean over many draws would be near 1. A
# small cosine that comes from variance is cured by averaging; one that comes
# from random feedback is not.
