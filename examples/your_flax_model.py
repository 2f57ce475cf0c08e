# %% [markdown]
# # Your own Flax model
#
# A small transformer that was written without a word of bpjax: tied embeddings,
# attention, norms, dropout, a flag for training. It learns to say which of two
# symbols is more frequent in a sequence. Less than a minute on one CPU core.
#
#     python examples/your_flax_model.py [--small]

# %%
import sys

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

SMALL = '--small' in sys.argv  # A few steps, for a quick look.

# %% [markdown]
# ## The model


# %%
class Encoder(nn.Module):
  width: int = 32
  layers: int = 2

  @nn.compact
  def __call__(self, tokens, mask, deterministic=True):
    embed = nn.Embed(8, self.width, name='embed')
    h = embed(tokens)
    pairs = nn.make_attention_mask(mask, mask)
    for i in range(self.layers):
      a = nn.LayerNorm(name=f'norm_a_{i}')(h)
      a = nn.MultiHeadDotProductAttention(
          4, name=f'attention_{i}')(a, mask=pairs)
      h += nn.Dropout(.1, deterministic=deterministic)(a)
      b = nn.LayerNorm(name=f'norm_b_{i}')(h)
      b = nn.gelu(nn.Dense(2 * self.width, name=f'up_{i}')(b))
      h += nn.Dense(self.width, name=f'down_{i}')(b)
    pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    pooled = nn.tanh(nn.Dense(self.width, name='pool')(pooled))
    return embed.attend(pooled)[:, :2]


# %% [markdown]
# ## Data: several inputs
#
# Several inputs are a tuple, some of them by keyword `bpjax.Inputs`. That the
# call takes `deterministic` is found by itself: it is False in training.


# %%
def data(key, n):
  keys = jax.random.split(key, 2)
  tokens = jax.random.randint(keys[0], (n, 11), 0, 4)
  mask = jnp.arange(11) < jax.random.randint(keys[1], (n, 1), 5, 12)
  counts = [((tokens == s) & mask).sum(1) for s in (0, 1)]
  return bpjax.Inputs(tokens, mask=mask), (counts[1] > counts[0]).astype(int)


x, y = data(jax.random.key(0), 256 if SMALL else 2048)
x_test, y_test = data(jax.random.key(1), 64 if SMALL else 512)

# %% [markdown]
# ## What will be trained
#
# The tied embedding is one unit with two calls. Gains and biases of norms keep
# their exact derivative; the table says so.

# %%
net = bpjax.from_linen(Encoder(layers=1 if SMALL else 2))
variables = jax.jit(net.init)(jax.random.key(2), x)
print(net.units)

# %% [markdown]
# ## Training
#
# Dropout needs a key at every step.

# %%
rule = bpjax.rules.kolen_pollack()
feedback = rule.init(jax.random.key(3), net, variables, x)
learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)
tx = bpjax.optimizer(optax.adamw(2e-3, weight_decay=1e-3), rule, feedback)
trees = (variables['params'], feedback)
state = tx.init(trees)


@jax.jit
def step(trees, state, key):
  picked, noise = jax.random.split(key)
  rows = jax.random.randint(picked, (64,), 0, len(y))
  batch = jax.tree.map(lambda a: a[rows], (x, y))
  (loss, _), grads = learn({'params': trees[0]}, trees[1], *batch, key=noise)
  updates, state = tx.update(grads, state, trees)
  return optax.apply_updates(trees, updates), state, loss


# %%
keys = jax.random.split(jax.random.key(4), 10 if SMALL else 900)
for i, key in enumerate(keys):
  trees, state, loss = step(trees, state, key)
  if i % 300 == 0:
    print(f'step {i}: loss {loss:.3f}')

# %%
output = rule.predict(net)({'params': trees[0]}, x_test)
accuracy = float((output.argmax(1) == y_test).mean())
print(f'{accuracy:.1%} of the test sequences')
assert SMALL or accuracy > .85
