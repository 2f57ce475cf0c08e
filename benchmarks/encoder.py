"""A transformer encoder as flax.linen has its parts, for the benchmarks."""

from __future__ import annotations

import flax.linen as nn


class Encoder(nn.Module):
  """Token ids `[batch, tokens]` to 10 classes; post-norm, no dropout."""
  layers: int = 4
  width: int = 256
  heads: int = 4

  @nn.compact
  def __call__(self, ids, train: bool = False):
    del train
    x = nn.Embed(1000, self.width)(ids)
    for _ in range(self.layers):
      y = nn.MultiHeadDotProductAttention(self.heads)(x, x)
      x = nn.LayerNorm()(x + y)
      y = nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(x)))
      x = nn.LayerNorm()(x + y)
    return nn.Dense(10)(x.mean(1))
