# %% [markdown]
# # A public BERT, unmodified
#
# Queries, keys and values are modules of their own here, as public code has them,
# and nothing in the model knows of this library. A sentence is random words among
# which three stand out; its class is the one of these that occurs most often.
#
#     python examples/public_bert.py [--small]

# %%
import functools
import sys

import bpjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

VOCABULARY, LENGTH, WIDTH, HEADS = 50, 16, 32, 4
STEPS = 2 if '--small' in sys.argv else 150

# %% [markdown]
# ## The model
#
# Padding is told by `attention_mask`, which `from_linen` is told the name of, so
# that a word that is not there neither teaches nor is taught.


# %%

class SelfAttention(nn.Module):
  """Attention over the words that are there, with dropout."""

  @nn.compact
  def __call__(self, x, attention_mask, deterministic):
    def split(name):
      y = nn.Dense(WIDTH, name=name)(x)
      return y.reshape(*y.shape[:2], HEADS, -1)

    query, key, value = split('query'), split('key'), split('value')
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key) / key.shape[-1] ** .5
    seen = attention_mask[:, None, None, :] > 0
    shares = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    shares = nn.Dropout(.1)(shares, deterministic=deterministic)
    y = jnp.einsum('bhqk,bkhd->bqhd', shares, value).reshape(x.shape)
    return nn.LayerNorm(name='norm')(x + nn.Dense(WIDTH, name='output')(y))


class Layer(nn.Module):
  """Attention and a feed-forward part."""

  @nn.compact
  def __call__(self, x, attention_mask, deterministic):
    x = SelfAttention(name='attention')(x, attention_mask, deterministic)
    y = nn.gelu(nn.Dense(4 * WIDTH, name='intermediate')(x))
    return nn.LayerNorm(name='norm')(x + nn.Dense(WIDTH, name='output')(y))


class Bert(nn.Module):
  """Embeddings, two layers, a pooler and a classifier."""

  @nn.compact
  def __call__(self, input_ids, attention_mask, deterministic: bool = True):
    x = nn.Embed(VOCABULARY, WIDTH, name='word')(input_ids)
    x += nn.Embed(LENGTH, WIDTH, name='position')(jnp.arange(LENGTH))
    x = nn.LayerNorm(name='norm')(x)
    for i in range(2):
      x = Layer(name=f'layer_{i}')(x, attention_mask, deterministic)
    x = nn.tanh(nn.Dense(WIDTH, name='pooler')(x[:, 0]))
    return nn.Dense(3, name='classifier')(x)


# %% [markdown]
# ## Data and training


# %%
def batch(key, size=64):
  """Sentences `[size, LENGTH]` with their mask, and classes."""
  word_key, length_key = jax.random.split(key)
  words = jax.random.randint(word_key, (size, LENGTH), 1, 8)  # 1 to 3 stand out.
  lengths = jax.random.randint(length_key, (size, 1), 8, LENGTH + 1)
  mask = (jnp.arange(LENGTH) < lengths).astype(jnp.int32)
  words = words * mask
  counts = jnp.stack([(words == w).sum(1) for w in (1, 2, 3)], 1)
  return (bpjax.Inputs(words, attention_mask=mask), jnp.argmax(counts, 1))


def train(rule, boundaries=()):
  """Accuracy on sentences that were not trained on."""
  net = bpjax.from_linen(Bert(), mask='attention_mask', boundaries=boundaries)
  x, _ = batch(jax.random.key(0))
  variables = net.init(jax.random.key(1), x)
  feedback = rule.init(jax.random.key(2), net, variables, x)
  tx = bpjax.optimizer(optax.adam(2e-3), rule, feedback)
  learn = rule.value_and_grad(net, bpjax.losses.softmax_cross_entropy)

  def step(carry, key):
    trees, state = carry
    x, y = batch(key)
    _, grads = learn({'params': trees[0]}, trees[1], x, y, key=key)
    updates, state = tx.update(grads, state, trees)
    return (optax.apply_updates(trees, updates), state), None

  @jax.jit
  def run(trees):
    keys = jax.random.split(jax.random.key(3), STEPS)
    (trees, _), _ = jax.lax.scan(step, (trees, tx.init(trees)), keys)
    x, y = batch(jax.random.key(4), 1000)
    output = rule.predict(net)({'params': trees[0]}, x)
    return jnp.mean(jnp.argmax(output, 1) == y)

  return float(run((variables['params'], feedback)))


# %% [markdown]
# ## Several rules
#
# Rules that set targets refuse such a model in one sentence, since the three maps
# meet before anything is read of one alone; `bpjax.models.bert_encoder`, where
# they are one map, takes those as well.

# %%
direct = bpjax.rules.direct_feedback_alignment
rules = {
    'backprop': functools.partial(train, bpjax.rules.backprop()),
    'feedback alignment': functools.partial(
        train, bpjax.rules.feedback_alignment()),
    'Kolen-Pollack': functools.partial(train, bpjax.rules.kolen_pollack()),
    'direct feedback to every projection': functools.partial(train, direct()),
    'direct feedback to every layer': functools.partial(
        train, direct(placement='boundaries'), ('layer_*',)),
}
if '--small' in sys.argv:
  rules = {name: rules[name] for name in ('backprop', 'feedback alignment')}
for name, accuracy in rules.items():
  print(f'{name:36} {100 * accuracy():.1f}% of unseen sentences')
try:
  train(bpjax.rules.local_representation_alignment())
except ValueError as error:
  print(f'local representation alignment refuses: {error}')
