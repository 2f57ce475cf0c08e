"""A layer of a transformer and its learning rules, in numpy float64.

Written from the equations: the encoder layer of `bpjax.transformer.Block` in the
form with norms behind the sums, between a dense layer below (`stem`) and one that
reads the first token (`readout`), with softmax cross-entropy. A value has its
unit's letter: s (stem), q (queries, keys and values), n (behind attention), i and
o (the feed-forward part), r (readout). Updates are divided by the batch size.
"""

import numpy as np

EPSILON = 1e-5


def norm(u, gain, shift):
  """LayerNorm over the last axis."""
  m, v = u.mean(-1, keepdims=True), u.var(-1, keepdims=True)
  return gain * (u - m) / np.sqrt(v + EPSILON) + shift


def norm_vjp(u, gain, g):
  """The cotangents of u, of the gain and of the shift."""
  m, v = u.mean(-1, keepdims=True), u.var(-1, keepdims=True)
  h = (u - m) / np.sqrt(v + EPSILON)
  d = g * gain
  du = (d - d.mean(-1, keepdims=True)
        - h * (d * h).mean(-1, keepdims=True)) / np.sqrt(v + EPSILON)
  return du, (g * h).sum((0, 1)), g.sum((0, 1))


_C = np.sqrt(2 / np.pi)


def gelu(a):
  """The form with tanh."""
  return .5 * a * (1 + np.tanh(_C * (a + .044715 * a**3)))


def gelu_slope(a):
  t = np.tanh(_C * (a + .044715 * a**3))
  return .5 * (1 + t) + .5 * a * (1 - t**2) * _C * (1 + 3 * .044715 * a**2)


def _heads(a, heads):
  """q, k, v, each [batch, heads, tokens, features]."""
  batch, tokens, width = a.shape
  parts = a.reshape(batch, tokens, 3, heads, width // (3 * heads))
  return parts.transpose(2, 0, 3, 1, 4)


def _shares(a, mask, heads):
  q, k, v = _heads(a, heads)
  scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
  scores = np.where(mask[:, None, None, :], scores, -np.inf)
  shares = np.exp(scores - scores.max(-1, keepdims=True))
  return q, k, v, shares / shares.sum(-1, keepdims=True)


def _together(x):
  return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(a, mask, heads):
  *_, v, shares = _shares(a, mask, heads)
  return _together(shares @ v)


def attention_vjp(a, mask, heads, g):
  q, k, v, shares = _shares(a, mask, heads)
  g = g.reshape(*g.shape[:2], heads, -1).swapaxes(1, 2)
  dv = shares.swapaxes(-1, -2) @ g
  ds = g @ v.swapaxes(-1, -2)
  ds = shares * (ds - (ds * shares).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
  return np.concatenate(
      [_together(d) for d in (ds @ k, ds.swapaxes(-1, -2) @ q, dv)], -1)


def affine(p, x):
  return x @ p['kernel'] + p['bias']


def forward(p, x, mask, heads):
  """Every z and every a, by the unit's letter; 'e' once `error` is asked."""
  z, a = {}, {}
  z['s'] = a['s'] = affine(p['s'], x)
  a['q'] = affine(p['q'], z['s'])
  z['q'] = attention(a['q'], mask, heads)
  a['n'] = affine(p['n'], z['q'])
  z['n'] = norm(a['n'] + z['s'], *p['norm_n'])
  a['i'] = affine(p['i'], z['n'])
  z['i'] = gelu(a['i'])
  a['o'] = affine(p['o'], z['i'])
  z['o'] = norm(a['o'] + z['n'], *p['norm_o'])
  a['r'] = affine(p['r'], z['o'][:, 0])
  return z, a


def error(logits, y):
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  return shares / shares.sum(-1, keepdims=True) - np.eye(logits.shape[-1])[y]


def _update(x, d, count):
  axes = tuple(range(x.ndim - 1))
  return {'kernel': np.tensordot(x, d, (axes, axes)) / count,
          'bias': d.sum(axes) / count}


def _first(g, like):
  """A cotangent of the first token, as one of all tokens."""
  out = np.zeros_like(like)
  out[:, 0] = g
  return out


def credit(p, x, y, mask, heads, back, replaced=()):
  """Updates of feedback alignment, with `back` for the weights on the way back.

  Args:
    back: letter -> B in the shape of W; W itself is backprop.
    replaced: letter -> what arrives at that unit's output (or behind its norm) in
      place of what readers send, skips left in; with the key 'block', what
      arrives at the layer's output in place of everything.
  """
  replaced = dict(replaced)
  z, a = forward(p, x, mask, heads)
  n = len(x)
  e = error(a['r'], y)
  got = lambda letter, sent: replaced.get(letter, sent)
  updates = {'r': _update(z['o'][:, 0], e, n)}
  g = got('block', _first(got('o', e @ back['r'].T), z['o']))
  do, gain, shift = norm_vjp(a['o'] + z['n'], p['norm_o'][0], g)
  updates['norm_o'] = gain / n, shift / n
  updates['o'] = _update(z['i'], do, n)
  di = got('i', do @ back['o'].T) * gelu_slope(a['i'])
  updates['i'] = _update(z['n'], di, n)
  g = got('n', di @ back['i'].T) + do
  dn, gain, shift = norm_vjp(a['n'] + z['s'], p['norm_n'][0], g)
  updates['norm_n'] = gain / n, shift / n
  updates['n'] = _update(z['q'], dn, n)
  dq = attention_vjp(a['q'], mask, heads, got('q', dn @ back['n'].T))
  updates['q'] = _update(z['s'], dq, n)
  updates['s'] = _update(x, got('s', dq @ back['q'].T) + dn, n)
  return updates


def projected(e, b, mask):
  """The error of a sentence, once for each of its real tokens, over sqrt(T)."""
  count = mask.sum(1)[:, None, None]
  return mask[..., None] * (e @ b)[:, None] / np.sqrt(count)


def lra(p, x, y, mask, heads, synapses, beta):
  """Updates of LRA-E; errors act on the pre-activations below.

  Args:
    synapses: 'r', 'o', 'i': E in the shape of W; 'n', 'q': from the output of that
      unit to the pre-activation of the one below, `[from, to]`.

  Returns:
    The updates, and for the E of 'n' and 'q' the derivative of the local loss.
  """
  z, a = forward(p, x, mask, heads)
  n, real = len(x), mask[..., None]
  e = error(a['r'], y)
  updates = {'r': _update(z['o'][:, 0], e, n)}
  d = _first(e @ synapses['r'].T, z['o'])
  e = real * (z['o'] - norm(a['o'] - beta * d + z['n'], *p['norm_o']))
  updates['o'] = _update(z['i'], e, n)
  e = real * (z['i'] - gelu(a['i'] - beta * e @ synapses['o'].T))
  updates['i'] = _update(z['n'], e, n)
  d = e @ synapses['i'].T
  e = real * (z['n'] - norm(a['n'] - beta * d + z['s'], *p['norm_n']))
  updates['n'] = _update(z['q'], e, n)
  above, target = e, a['q'] - beta * e @ synapses['n']
  e = real * (z['q'] - attention(target, mask, heads))
  updates['q'] = _update(z['s'], attention_vjp(a['q'], mask, heads, e), n)
  d = beta * e @ synapses['q']
  updates['s'] = _update(x, d, n)
  slope = attention_vjp(target, mask, heads, e)
  learned = {l: beta * np.tensordot(u, v, ((0, 1), (0, 1))) / n
             for l, u, v in (('n', above, slope), ('q', e, d))}
  return updates, learned


def dtp(p, x, y, mask, heads, inverses, step):
  """Updates of difference target propagation and of its inverses, no noise.

  Args:
    inverses: letter -> (V, c): g(u) = tanh(u V^T + c), from a unit's output to
      what it reads.
  """
  z, a = forward(p, x, mask, heads)
  n, real = len(x), mask[..., None]
  e = error(a['r'], y)
  updates, learned = {'r': _update(z['o'][:, 0], e, n)}, {}

  def below(letter, h, moved):
    """How far what the unit reads shall move; its inverse learns."""
    v, c = inverses[letter]
    g = lambda u: np.tanh(u @ v.T + c)
    reads = {'o': z['i'], 'i': z['n'], 'n': z['q'], 'q': z['s']}[letter]
    d = 2 * real * (g(h) - reads) * (1 - g(h)**2)
    learned[letter] = (np.tensordot(d, h, ((0, 1), (0, 1))) / n,
                       d.sum((0, 1)) / n)
    return real * (g(h) - g(h - moved))

  moved = _first(step * e @ p['r']['kernel'].T, z['o'])
  d, *_ = norm_vjp(a['o'] + z['n'], p['norm_o'][0], 2 * moved)
  updates['o'] = _update(z['i'], d, n)
  moved = below('o', z['o'], moved)
  updates['i'] = _update(z['n'], 2 * moved * gelu_slope(a['i']), n)
  moved = below('i', z['i'], moved)
  d, *_ = norm_vjp(a['n'] + z['s'], p['norm_n'][0], 2 * moved)
  updates['n'] = _update(z['q'], d, n)
  moved = below('n', z['n'], moved)
  d = attention_vjp(a['q'], mask, heads, 2 * moved)
  updates['q'] = _update(z['s'], d, n)
  moved = below('q', z['q'], moved)
  updates['s'] = _update(x, 2 * moved, n)
  return updates, learned
