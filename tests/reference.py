"""The learning rules written out in numpy float64, as references for tests.

Rows are examples; a network is `{unit: {'kernel', 'bias'}}`, units in the order
of their numbers (Conv before Dense), one activation between, a linear readout;
feedback has the shape of the forward weights, so B = W is backprop; errors are
per example, gradients are divided once by the batch size.

`net` below stands for `activation='tanh'` (relu, sigmoid, linear),
`loss='cross_entropy'` (squared_error) and `pool_tokens=False` (sequences
[N, T, d]: average the tokens before the readout).

Lillicrap et al. 2016, doi:10.1038/ncomms13276; Nøkland 2016, arXiv:1609.01596;
Launay et al. 2019, arXiv:1906.04554; Akrout et al. 2019, arXiv:1904.05391; Ren
et al. 2023, arXiv:2210.03310.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
Tree = Mapping[str, Mapping[str, Array]]

# name -> (phi(a), phi'(a))
_ACTIVATIONS = {
    'tanh': (np.tanh, lambda a: 1.0 - np.tanh(a) ** 2),
    'relu': (lambda a: np.maximum(a, 0.0), lambda a: (a > 0.0).astype(float)),
    'sigmoid': (lambda a: 0.5 + 0.5 * np.tanh(0.5 * a),
                lambda a: 0.25 * (1.0 - np.tanh(0.5 * a) ** 2)),
    'linear': (lambda a: a, np.ones_like),
}
# c = E[v^4] - 2 in a forward gradient's Var_j = sum_i g_i^2 + c g_j^2.
_EXCESS = {'gaussian': 1, 'rademacher': -1}


def _f64(values) -> Array:
  return np.asarray(values, np.float64)


def _names(params: Tree) -> list[str]:
  return sorted(params, key=lambda k: (k.split('_')[0], int(k.split('_')[1])))


def _pad_same(x: Array, k: Array) -> Array:
  sides = [((s - 1) // 2, s // 2) for s in k.shape[:2]]
  return np.pad(x, [(0, 0), *sides, (0, 0)])


def conv2d_same(x, k) -> Array:
  """out[r, c] = sum_ij x[r + i, c + j] k[i, j]: x [N, h, w, c_in], k HWIO.

  Cross-correlation; zeros around, an even kernel has one more at the end.
  """
  x, k = _f64(x), _f64(k)
  padded, (h, w) = _pad_same(x, k), x.shape[1:3]
  return sum(padded[:, i:i + h, j:j + w] @ k[i, j]
             for i, j in np.ndindex(k.shape[:2]))


def conv2d_same_vjp_input(delta, k) -> Array:
  """dx[r + i, c + j] += delta[r, c] k[i, j]^T, the padding cut off."""
  delta, k = _f64(delta), _f64(k)
  h, w = delta.shape[1:3]
  out = _pad_same(np.zeros((*delta.shape[:3], k.shape[2])), k)
  for i, j in np.ndindex(k.shape[:2]):
    out[:, i:i + h, j:j + w] += delta @ k[i, j].T
  top, left = ((s - 1) // 2 for s in k.shape[:2])
  return out[:, top:top + h, left:left + w]


def conv2d_same_vjp_kernel(delta, x, kernel_shape: Sequence[int]) -> Array:
  """dk[i, j] = sum_{n,r,c} x[r + i, c + j]^T delta[r, c], summed over N."""
  delta, out = _f64(delta), np.zeros(kernel_shape)
  padded, (h, w) = _pad_same(_f64(x), out), delta.shape[1:3]
  for i, j in np.ndindex(out.shape[:2]):
    out[i, j] = np.einsum('nrci,nrco->io', padded[:, i:i + h, j:j + w], delta)
  return out


def mlp_forward(params: Tree, x, activation='tanh', pool_tokens=False):
  """a_l = h_{l-1} W_l + b_l, h_l = phi(a_l), linear readout.

  Returns the pre-activations [a_1..a_L] and each unit's input [x, h_1..]; the
  output is the last pre-activation. Images are flattened before a Dense.
  """
  pre, inputs, h = [], [], _f64(x)
  for name in _names(params):
    kernel, bias = _f64(params[name]['kernel']), _f64(params[name]['bias'])
    if kernel.ndim == 2 and h.ndim == 4:
      h = h.reshape(len(h), -1)
    if pool_tokens and len(pre) == len(params) - 1:
      h = h.mean(1)
    inputs.append(h)
    linear = conv2d_same(h, kernel) if kernel.ndim == 4 else h @ kernel
    pre.append(linear + bias)
    h = _ACTIVATIONS[activation][0](pre[-1])
  return pre, inputs


def loss_and_error(output, y, loss='cross_entropy') -> tuple[Array, Array]:
  """Per-example losses [N] and e = d(loss_n)/d(output), shaped as output.

  'cross_entropy': softmax and integer labels, e = softmax - onehot.
  'squared_error': 1/2 sum (output - y)^2, e = output - y. Tokens are summed.
  """
  output = _f64(output)
  axes = tuple(range(1, output.ndim))
  if loss == 'squared_error':
    error = output - _f64(y)
    return 0.5 * np.sum(error**2, axis=axes), error
  if loss != 'cross_entropy':
    raise ValueError('`loss` must be cross_entropy or squared_error, got '
                     f'{loss!r}: use one of the two.')
  shifted = output - output.max(-1, keepdims=True)
  log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  onehot = np.eye(output.shape[-1])[np.asarray(y)]
  return -(onehot * log_softmax).sum(axes), np.exp(log_softmax) - onehot


def direct_feedback_sequence_message(e, B, T: int) -> Array:
  """The message [N, T, d] to T tokens, with B [C, d].

  e [N, C]: (e B) / sqrt(T) to every token. e [N, T, C]: e B, token by token.
  """
  e, B = _f64(e), _f64(B)
  return e @ B if e.ndim == 3 else np.stack([e @ B / np.sqrt(T)] * T, axis=1)


def teaching(rule: str, params: Tree, feedback, x, y, activation='tanh',
             loss='cross_entropy', pool_tokens=False) -> dict[str, Array]:
  """What each unit is taught: {unit: delta_l, shaped as its output}.

  delta_L = e; below, delta_l = message_{l+1} phi'(a_l), where unit l + 1 sends
  'backprop': delta W^T (`feedback` unused); 'feedback_alignment': delta B^T;
  'direct_feedback_alignment': e B. A convolution sends its transpose. Flatten
  and the mean over tokens keep their exact derivatives.
  """
  names = _names(params)
  pre, inputs = mlp_forward(params, x, activation, pool_tokens)
  delta = error = loss_and_error(pre[-1], y, loss)[1]
  deltas = {names[-1]: delta}
  for upper in range(len(names) - 1, 0, -1):
    name, below = names[upper], pre[upper - 1]
    if rule == 'direct_feedback_alignment':
      B = _f64(feedback[name])
      message = (direct_feedback_sequence_message(error, B, below.shape[1])
                 if inputs[upper].ndim == 3 else np.tensordot(error, B, 1))
    else:
      weights = {'backprop': params, 'feedback_alignment': feedback}[rule]
      kernel = _f64(weights[name]['kernel'])
      message = (conv2d_same_vjp_input(delta, kernel) if kernel.ndim == 4
                 else delta @ kernel.T)
    if pool_tokens and upper == len(names) - 1:
      message = np.repeat(message[:, None], below.shape[1], 1) / below.shape[1]
    slope = _ACTIVATIONS[activation][1](below)
    delta = deltas[names[upper - 1]] = message.reshape(below.shape) * slope
  return deltas


def _unit_gradient(unit, h, delta):
  """dW = h^T delta / N and db = sum delta / N."""
  shape, rows = np.shape(unit['kernel']), delta.reshape(-1, delta.shape[-1])
  kernel = (conv2d_same_vjp_kernel(delta, h, shape) if len(shape) == 4
            else h.reshape(-1, h.shape[-1]).T @ rows)
  return {'kernel': kernel / len(h), 'bias': rows.sum(0) / len(h)}


def _learn(rule, params, feedback, x, y, activation='tanh',
           loss='cross_entropy', pool_tokens=False):
  deltas = teaching(rule, params, feedback, x, y, activation, loss, pool_tokens)
  _, inputs = mlp_forward(params, x, activation, pool_tokens)
  return {k: _unit_gradient(params[k], h, deltas[k])
          for k, h in zip(_names(params), inputs, strict=True)}


def backprop(params: Tree, x, y, *net, **named_net):
  """delta_l = (delta_{l+1} W_{l+1}^T) phi'(a_l): gradients as `params`."""
  return _learn('backprop', params, None, x, y, *net, **named_net)


def feedback_alignment(params: Tree, feedback: Tree, x, y, *net, **named_net):
  """delta_l = (delta_{l+1} B_{l+1}^T) phi'(a_l) (Lillicrap et al. 2016).

  `feedback` is {unit: {'kernel': B as W}} for every unit but the first.
  """
  return _learn('feedback_alignment', params, feedback, x, y, *net, **named_net)


def direct_feedback_alignment(params: Tree, feedback, x, y, *net, **named_net):
  """delta_l = (e B_{l+1}) phi'(a_l) (Nøkland 2016).

  `feedback` is {unit: [C, *input shape of the unit]} for every unit but the
  first: what it hands upstream instead of its input's gradient (Conv:
  [C, h, w, c_in]; Dense after images: [C, h w c]; tokens: [C, d]).
  """
  return _learn('direct_feedback_alignment', params, feedback, x, y, *net,
                **named_net)


def kolen_pollack(params: Tree, feedback: Tree, x, y, *net, **named_net):
  """Feedback alignment whose B gets the update of its W (Akrout et al. 2019).

  Returns (grads, feedback_grads); decay belongs to the optimiser.
  """
  grads = feedback_alignment(params, feedback, x, y, *net, **named_net)
  return grads, {k: {'kernel': grads[k]['kernel'].copy()} for k in feedback}


# The same formulas on {'Conv_0', 'Conv_1', 'Dense_0'}, x [N, h, w, c].
conv_net_forward = mlp_forward
conv_net_backprop = backprop
conv_net_feedback_alignment = feedback_alignment
conv_net_direct_feedback_alignment = direct_feedback_alignment
conv_net_kolen_pollack = kolen_pollack


def shared_feedback(U, widths: Sequence[int | tuple[int, ...]]) -> list[Array]:
  """B_l = U[:, :l] / sqrt(l C): one matrix for all layers (Launay et al. 2019).

  U [C, l_max]; `widths` holds an int or a shape per layer; each slice is
  [C, *shape], filled in row-major order.
  """
  U = _f64(U)
  shapes = [(w,) if np.isscalar(w) else tuple(w) for w in widths]
  return [U[:, :np.prod(s)].reshape(len(U), *s) / np.sqrt(np.prod(s) * len(U))
          for s in shapes]


def kolen_pollack_difference(w0, b0, decay: float, steps: int) -> Array:
  """W_t - B_t = (1 - decay)^t (W_0 - B_0) on any data (Akrout et al. 2019).

  `decay` is what one step removes: under AdamW learning_rate * lambda.
  """
  return (1.0 - decay) ** steps * (_f64(w0) - _f64(b0))


def alignment(teaching_a, teaching_b) -> tuple[Array, float, float]:
  """cos_n = <a_n, b_n> / (|a_n| |b_n|) over all but the batch axis.

  Returns the cosines [N], their mean and population standard deviation (Launay
  et al. 2019). A row of zeros has no cosine: nan.
  """
  a, b = (_f64(t).reshape(len(t), -1) for t in (teaching_a, teaching_b))
  norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  cosines = np.sum(a * b, axis=1) / norms
  return cosines, cosines.mean(), cosines.std()


def _directional(params, x, y, activation, loss, nudge):
  """Tangents [N, 1] of the losses under nudge(unit, h); inputs; error."""
  pre, inputs = mlp_forward(params, x, activation)
  tangent = np.zeros_like(inputs[0])
  for level, (name, h) in enumerate(zip(_names(params), inputs, strict=True)):
    if level:
      tangent = _ACTIVATIONS[activation][1](pre[level - 1]) * tangent
    tangent = tangent @ _f64(params[name]['kernel']) + nudge(name, h)
  error = loss_and_error(pre[-1], y, loss)[1]
  return np.sum(error * tangent, axis=1, keepdims=True), inputs, error


def forward_gradient_activity(params: Tree, noise, x, y, activation='tanh',
                              loss='cross_entropy', exact_readout=True):
  """dW_l = h_{l-1}^T (s u_l) / N, s_n = sum_l <dl_n/da_l, u_{n,l}>.

  Ren et al. 2023: `noise` {unit: u [N, d_out]} joins the tangents of all
  perturbed units at once; s_n is example n's own directional derivative. With
  `exact_readout` the readout is not perturbed (no noise) and gets h^T e / N.
  """
  names = _names(params)
  u = {k: _f64(noise[k]) for k in (names[:-1] if exact_readout else names)}
  s, inputs, error = _directional(params, x, y, activation, loss,
                                  lambda name, _: u.get(name, 0.0))
  return {k: _unit_gradient(params[k], h, s * u[k] if k in u else error)
          for k, h in zip(names, inputs, strict=True)}


def forward_gradient_weight(params: Tree, direction, x, y, activation='tanh',
                            loss='cross_entropy', exact_readout=True):
  """g = (grad L . v) v, L the mean loss, one v for the batch (Ren et al. 2023).

  `direction` v is shaped as `params`. With `exact_readout` the readout is left
  out of v and gets its own gradient.
  """
  names = _names(params)
  v = {k: {leaf: _f64(a) for leaf, a in direction[k].items()}
       for k in (names[:-1] if exact_readout else names)}
  s, inputs, error = _directional(
      params, x, y, activation, loss,
      lambda k, h: h @ v[k]['kernel'] + v[k]['bias'] if k in v else 0.0)
  grads = {k: {leaf: s.mean() * a for leaf, a in v[k].items()} for k in v}
  if exact_readout:
    grads[names[-1]] = _unit_gradient(params[names[-1]], inputs[-1], error)
  return grads


def forward_gradient_variance_weight(per_example, directions='gaussian',
                                     independent=False) -> float:
  """Mean variance over entries when these weights alone are perturbed.

  Per-example gradients G [N, p, q] of a fixed batch (several tensors at once:
  [N, entries]): one v for the batch, (pq + 1) mean(Gbar^2); one per example,
  (pq + 1)/N mean(G_n^2) (Ren et al. 2023). Rademacher: pq - 1 for pq + 1.
  """
  g = _f64(per_example)
  squares = g**2 / len(g) if independent else g.mean(0) ** 2
  return (g[0].size + _EXCESS[directions]) * np.mean(squares)


def forward_gradient_variance_activity(per_example, directions='gaussian',
                                       independent=True) -> float:
  """Mean variance over entries when one layer's q outputs are perturbed.

  Per-example gradients G [N, p, q] (biases [N, q]) of a fixed batch: noise per
  example, (q + 1)/N mean(G_n^2); one noise for the batch,
  (q + 1) mean(Gbar^2) (Ren et al. 2023). Rademacher: q - 1 for q + 1.
  """
  g = _f64(per_example)
  squares = g**2 / len(g) if independent else g.mean(0) ** 2
  return (g.shape[-1] + _EXCESS[directions]) * np.mean(squares)


def per_example_gradients(params: Tree, x, y, activation='tanh',
                          loss='cross_entropy'):
  """Backprop's G_n = h_n^T delta_n: kernels [N, d_in, d_out], biases [N, d]."""
  d = teaching('backprop', params, None, x, y, activation, loss)
  inputs = mlp_forward(params, x, activation)[1]
  return {k: {'kernel': np.einsum('ni,nj->nij', h, d[k]), 'bias': d[k]}
          for k, h in zip(_names(params), inputs, strict=True)}


def forward_gradient_variance_joint(params: Tree, x, y, activation='tanh',
                                    loss='cross_entropy',
                                    directions='gaussian', exact_readout=True):
  """Each entry's variance, the outputs of all layers perturbed at once.

  Noise per example: sum_n h_i^2 (sum_{l,k} delta_{l,k}^2 + c delta_j^2) / N^2,
  inner sum over perturbed layers, h = 1 for biases, c = 1 Gaussian and -1
  Rademacher. 0 for an exact readout; K samples divide by K. As `params`.
  """
  names, inputs = _names(params), mlp_forward(params, x, activation)[1]
  deltas = teaching('backprop', params, None, x, y, activation, loss)
  perturbed = names[:-1] if exact_readout else names
  total = sum(np.sum(deltas[k] ** 2, 1, keepdims=True) for k in perturbed)
  out = {}
  for k, h in zip(names, inputs, strict=True):
    each = (total + _EXCESS[directions] * deltas[k] ** 2) / len(h) ** 2
    each = each * (k in perturbed)
    out[k] = {'kernel': (h**2).T @ each, 'bias': each.sum(0)}
  return out
