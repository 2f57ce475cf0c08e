"""The rules that set targets, written out in numpy float64, for tests.

Target propagation (by inverses, or direct), local representation alignment (a
chain, or recursive over any wiring) and equilibrium propagation in multilayer
perceptrons. "Decided:" marks what the papers leave open.

Rows are examples. `params` is a list of {'kernel' [d_in, d_out], 'bias'
[d_out]}; units are numbered 1..L, so unit l is `params[l - 1]`, and
whatever belongs to a unit is a dict with its number as the key. One activation
serves all hidden units. The readout is linear: a_L are logits for
'cross_entropy' and the prediction for 'squared_error'.

Errors are per example. Every update is a sum over the examples, never divided,
and gradient-signed: descending it is what the rule asks for.

Lee et al. 2015, arXiv:1412.7525; Ororbia & Mali 2019, arXiv:1805.11703;
Scellier & Bengio 2017, arXiv:1602.05179; Meulemans et al. 2020,
arXiv:2006.14331.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Unit = Mapping[str, Array]
Inverse = Callable[[Array], Array]

# name -> (phi(a), phi'(a)); no derivative of sign is of use to a rule.
_ACTIVATIONS = {
    'identity': (lambda a: a, np.ones_like),
    'tanh': (np.tanh, lambda a: 1.0 - np.tanh(a) ** 2),
    'sigmoid': (lambda a: 0.5 + 0.5 * np.tanh(0.5 * a),
                lambda a: 0.25 * (1.0 - np.tanh(0.5 * a) ** 2)),
    'relu': (lambda a: np.maximum(a, 0.0), lambda a: (a > 0.0).astype(float)),
    'elu': (lambda a: np.where(a > 0.0, a, np.expm1(np.minimum(a, 0.0))),
            lambda a: np.exp(np.minimum(a, 0.0))),
    'sign': (np.sign, None),
}


def _f64(values) -> Array:
  return np.asarray(values, np.float64)


def _one_of(name: str, got, known: Sequence) -> None:
  if got not in known:
    raise ValueError(f'`{name}` must be one of {", ".join(map(str, known))}, '
                     f'got {got!r}: use one of these.')


def _shaped(name: str, values, shape: Sequence[int]) -> Array:
  """No silent broadcasting: rows of the wrong number would still compute."""
  values = _f64(values)
  if values.shape != tuple(shape):
    raise ValueError(f'`{name}` must have the shape {tuple(shape)}, got '
                     f'{values.shape}: nothing is broadcast.')
  return values


def _phi(activation: str) -> Callable[[Array], Array]:
  _one_of('activation', activation, list(_ACTIVATIONS))
  return _ACTIVATIONS[activation][0]


def _slope(activation: str) -> Callable[[Array], Array]:
  _one_of('activation', activation, list(_ACTIVATIONS))
  slope = _ACTIVATIONS[activation][1]
  if slope is None:
    raise ValueError(f'`activation` {activation!r} has no derivative for this '
                     'rule to learn with: use one that has.')
  return slope


def _affine(unit: Unit, h: Array) -> Array:
  return _f64(h) @ _f64(unit['kernel']) + _f64(unit['bias'])


def _unit_update(h: Array, error: Array) -> dict[str, Array]:
  return {'kernel': h.T @ error, 'bias': error.sum(0)}


def forward(params: Sequence[Unit], x, activation: str = 'tanh',
            residual_gap: int | None = None):
  """a_l = h_{l-1} W_l + b_l, h_l = phi(a_l), a linear readout.

  With `residual_gap` g, a_l also gets h_{l-g} where l mod g = 0 and l < L, if
  the widths agree: before the activation, as Algorithm 1 has it.
  Decided: h_0 = x is a source of a skip like any other; where the widths differ
  there is no skip; the form after the activation is left out,
  since the papers do not say whether its targets hold the skip.

  Returns {1: a_1, .., L: a_L} and {0: x, 1: h_1, .., L-1: h_{L-1}}.
  """
  phi, last = _phi(activation), len(params)
  pre, hidden = {}, {0: _f64(x)}
  for l, unit in enumerate(params, start=1):
    pre[l] = _affine(unit, hidden[l - 1])
    if residual_gap and l % residual_gap == 0 and l < last:
      skip = hidden[l - residual_gap]
      if skip.shape == pre[l].shape:
        pre[l] = pre[l] + skip
    if l < last:
      hidden[l] = phi(pre[l])
  return pre, hidden


def read_out(logits, loss: str = 'cross_entropy') -> Array:
  """h_L: softmax(a_L), or a_L itself for 'squared_error'."""
  _one_of('loss', loss, ['cross_entropy', 'squared_error'])
  logits = _f64(logits)
  if loss == 'squared_error':
    return logits
  exponentials = np.exp(logits - logits.max(1, keepdims=True))
  return exponentials / exponentials.sum(1, keepdims=True)


def true_output(y, shape: Sequence[int], loss: str = 'cross_entropy') -> Array:
  """Y, of the output's `shape` [N, C]: one-hot rows of labels `y`.

  For 'squared_error', `y` itself.
  """
  _one_of('loss', loss, ['cross_entropy', 'squared_error'])
  if loss == 'squared_error':
    return _shaped('y', y, shape)
  _shaped('y', y, shape[:1])
  return np.eye(shape[1])[np.asarray(y)]


def losses(params: Sequence[Unit], x, y, activation: str = 'tanh',
           loss: str = 'cross_entropy',
           residual_gap: int | None = None) -> Array:
  """Per-example losses [N], whose derivative by a_L is h_L - Y.

  'cross_entropy' is -log softmax(a_L)[y]; 'squared_error' 1/2 |a_L - Y|^2.
  """
  logits = forward(params, x, activation, residual_gap)[0][len(params)]
  truth = true_output(y, logits.shape, loss)
  if loss == 'squared_error':
    return 0.5 * np.sum((logits - truth) ** 2, axis=1)
  top = logits.max(1)
  log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
  return log_sum - np.sum(truth * logits, axis=1)


# --- Target propagation -----------------------------------------------------


class TargetPropagation(NamedTuple):
  """Targets {l: t_l [N, d_l]} and updates, a list as `params`."""
  targets: dict[int, Array]
  updates: list[dict[str, Array]]


def inverse_network(unit: Unit, activation: str = 'tanh') -> Inverse:
  """g_l(u) = phi_bar(u V_l + c_l), `unit` holding V_l and c_l.

  V_l, under 'kernel', has the shape [d_l, d_{l-1}] and c_l, under 'bias',
  [d_{l-1}]. Decided: phi_bar is the caller's and need not be
  the forward activation.
  """
  phi = _phi(activation)
  return lambda u: phi(_affine(unit, u))


def target_propagation(params: Sequence[Unit], inverses: Mapping[int, Inverse],
                       x, y, *, step: float, difference: bool = False,
                       top: str = 'gradient', activation: str = 'tanh',
                       loss: str = 'cross_entropy') -> TargetPropagation:
  """Target propagation, and difference target propagation.

  t_{l-1} = g_l(t_l); with `difference`, h_{l-1} + g_l(t_l) - g_l(h_l). It is
  the target t_l that g_l reads, not the pre-activation. Then
  dW_l = h_{l-1}^T [2 (h_l - t_l) phi'(a_l)] for l < L, the gradient of
  |f_l(h_{l-1}) - t_l|^2 with input and target held; dW_L = h_{L-1}^T e.

  `top` says where the targets start:
  'gradient': t_{L-1} = h_{L-1} - step e W_L^T, and no g_L;
  'inverse':  t_L = h_L - step e, and t_{L-1} from a learned g_L as from any.

  Decided: `step` multiplies the per-example error; the paper's step
  on the mean loss is `step / N` here. For 'inverse', g_L reads h_L, which is
  softmax(a_L) under 'cross_entropy', so that `step = 1` makes t_L one-hot (the
  two alternatives that the papers give are then one), and a_L under
  'squared_error'. W_L gets the true gradient whatever `top` is. The factor 2 is
  kept; the source that writes 1/2 has it cancelled. With 'gradient', t_{L-1} is
  the same with and without `difference`. Sign is refused: its derivative is 0.

  Args:
    params: The network.
    inverses: {l: g_l} for l = 2..L-1, with `top` 'inverse' also for l = L.
    x: Inputs [N, d_0].
    y: Labels [N], or targets [N, C] for 'squared_error'.
    step: How far the first target lies from the activity.
    difference: Whether g_l's own mistake is subtracted.
    top: 'gradient' or 'inverse'.
    activation: Of the hidden units.
    loss: 'cross_entropy' or 'squared_error'.

  Returns:
    Targets of units 1..L-1 (of L, too, for 'inverse'), and the updates.
  """
  _one_of('top', top, ['gradient', 'inverse'])
  last = len(params)
  needed = list(range(2, last + (top == 'inverse')))
  if sorted(inverses) != needed:
    raise ValueError(f'`inverses` must have the keys {needed} for top={top!r}, '
                     f'got {sorted(inverses)}: give one per unit.')
  slope = _slope(activation)
  pre, hidden = forward(params, x, activation)
  output = read_out(pre[last], loss)
  error = output - true_output(y, output.shape, loss)
  values = {**hidden, last: output}
  if top == 'inverse':
    targets = {last: output - step * error}
  elif last > 1:
    kernel = _f64(params[last - 1]['kernel'])
    targets = {last - 1: values[last - 1] - step * error @ kernel.T}
  else:
    targets = {}
  for l in reversed(needed):
    targets[l - 1] = _f64(inverses[l](targets[l]))
    if difference:
      targets[l - 1] = (
          values[l - 1] + targets[l - 1] - _f64(inverses[l](values[l])))
  updates = [
      _unit_update(hidden[l - 1],
                   2.0 * (hidden[l] - targets[l]) * slope(pre[l]))
      for l in range(1, last)]
  updates.append(_unit_update(hidden[last - 1], error))
  return TargetPropagation(targets, updates)


def inverse_loss_and_gradient(params: Sequence[Unit], inverse: Unit, layer: int,
                              x, noise, *, activation: str = 'tanh',
                              inverse_activation: str = 'tanh',
                              loss: str = 'cross_entropy'):
  """sum_n |g_l(f_l(h_{l-1} + noise)) - (h_{l-1} + noise)|^2.

  f_l(.) is a constant: the gradient is by V_l and c_l alone. The noise sits on
  the activity and on what is to be reconstructed, not on the code.
  Decided: h_{l-1} comes from a pass without noise, so that `noise`
  [N, d_{l-1}] reaches layer `layer` alone; summed over features, no 1/2; f_L is
  softmax(affine) under 'cross_entropy', as in `target_propagation`.

  Returns:
    The loss, a float, and its gradient {'kernel', 'bias'}, shaped as `inverse`.
  """
  if not 2 <= layer <= len(params):
    raise ValueError(f'`layer` must be in 2..{len(params)}, got {layer}: unit '
                     '1 has no inverse, since nothing below it learns.')
  slope = _slope(inverse_activation)
  clean = forward(params, x, activation)[1][layer - 1]
  corrupted = clean + _shaped('noise', noise, clean.shape)
  code = _affine(params[layer - 1], corrupted)
  code = (read_out(code, loss) if layer == len(params)
          else _phi(activation)(code))
  mistake = inverse_network(inverse, inverse_activation)(code) - corrupted
  delta = 2.0 * mistake * slope(_affine(inverse, code))
  return np.sum(mistake**2), _unit_update(code, delta)


class DirectDifferenceTargetPropagation(NamedTuple):
  """Updates, a list as `params`, and {l: dQ_l [d_l, d_L]}."""
  updates: list[dict[str, Array]]
  feedback_updates: dict[int, Array]


def direct_difference_target_propagation(
    params: Sequence[Unit], feedback: Mapping[int, Array], x, y,
    noise: Mapping[int, Array], *, step: float, sigma: float, decay: float,
    activation: str = 'tanh', loss: str = 'cross_entropy'
) -> DirectDifferenceTargetPropagation:
  """DDTP-linear: targets h_l + Q_l (t_L - a_L), with t_L = a_L - step e.

  dW_l is the gradient of |h_l - t_l|^2 with input and target held, for l < L;
  dW_L = h_{L-1}^T e. dQ_l is the gradient of
  sum_n |Q_l (a_L^c - a_L) - sigma eps|^2 / sigma^2 + decay |Q_l|^2,
  where a_L^c follows from h_l + sigma eps with the units above as they are.

  Decided: the targets and the noise's reply are of a_L, before a softmax. `step`
  multiplies the per-example error. The decay is added once, not by example. W_L
  gets the true gradient, where the paper's has the factor 2 step.

  Args:
    params: The network.
    feedback: {l: Q_l [d_l, d_L]} for l = 1..L-1.
    x: Inputs [N, d_0].
    y: Labels [N], or targets [N, C] for 'squared_error'.
    noise: {l: eps [N, d_l]} for l = 1..L-1, of standard deviation 1.
    step: How far the output's target lies from the output.
    sigma: The noise's standard deviation.
    decay: Of Q.
    activation: Of the hidden units.
    loss: 'cross_entropy' or 'squared_error'.

  Returns:
    The updates of weights and feedback.
  """
  phi, slope, last = _phi(activation), _slope(activation), len(params)
  pre, hidden = forward(params, x, activation)
  output = read_out(pre[last], loss)
  error = output - true_output(y, output.shape, loss)
  target = pre[last] - step * error
  updates, feedback_updates = [], {}
  for l in range(1, last):
    q = _shaped(f'feedback[{l}]', feedback[l],
                (hidden[l].shape[1], error.shape[1]))
    own_target = hidden[l] + (target - pre[last]) @ q.T
    updates.append(_unit_update(
        hidden[l - 1], 2.0 * (hidden[l] - own_target) * slope(pre[l])))
    moved = sigma * _shaped(f'noise[{l}]', noise[l], hidden[l].shape)
    corrupted = hidden[l] + moved
    for unit in params[l:last - 1]:
      corrupted = phi(_affine(unit, corrupted))
    change = _affine(params[last - 1], corrupted) - pre[last]
    mistake = change @ q.T - moved
    feedback_updates[l] = (
        2.0 * mistake.T @ change / sigma**2 + 2.0 * decay * q)
  updates.append(_unit_update(hidden[last - 1], error))
  return DirectDifferenceTargetPropagation(updates, feedback_updates)


# --- Local representation alignment -----------------------------------------


class LocalRepresentationAlignment(NamedTuple):
  """Everything is keyed by unit, but `updates`, a list as `params`.

  displacements: {i: d_i}, targets: {i: t_i}, errors: {i: e_i}, each [N, d_i];
  units 1..L, the displacements 1..L-1.
  feedback_updates: {i: dE_{j->i} [d_i, d_j]}.
  """
  displacements: dict[int, Array]
  targets: dict[int, Array]
  errors: dict[int, Array]
  updates: list[dict[str, Array]]
  feedback_updates: dict[int, Array]


def chain_wiring(units: int) -> dict[int, int]:
  """{i: i + 1} for i = 1..L-1: LRA-E, depth L - 1."""
  return {i: i + 1 for i in range(1, units)}


def direct_wiring(units: int) -> dict[int, int]:
  """{i: L} for i = 1..L-1: depth 1."""
  return dict.fromkeys(range(1, units), units)


def gap_wiring(units: int, gap: int, inner: str) -> dict[int, int]:
  """Depth 2: L to every i with i mod gap = 0, the rest within gaps.

  `inner` 'chain_in_gap' wires any other unit i to i + 1 (Algorithm 1); 'meta'
  wires it to the top unit of its gap, the next multiple of `gap` (the worked
  example).
  Decided: both put the gaps' tops at the multiples of `gap`, counted from 1;
  the example's 2, 5, 8 for a gap of 3 is another offset, for which a caller may
  write the dict out. Units above the last multiple hang on L, by their chain
  ('chain_in_gap') or directly ('meta').
  """
  _one_of('inner', inner, ['chain_in_gap', 'meta'])
  if gap < 1:
    raise ValueError(f'`gap` must be at least 1, got {gap}: use the number of '
                     'units from one gap top to the next.')
  wiring = {}
  for i in range(1, units):
    if i % gap == 0:
      wiring[i] = units
    elif inner == 'chain_in_gap':
      wiring[i] = i + 1
    else:
      wiring[i] = min(units, i + gap - i % gap)
  return wiring


def _sources_first(wiring: Mapping[int, int], units: int) -> list[int]:
  """The units below L, each after its source."""
  if sorted(wiring) != list(range(1, units)):
    raise ValueError(f'`wiring` must give a source to each of 1..{units - 1}, '
                     f'got {sorted(wiring)}: one source a unit, none for the '
                     'output.')
  ready = [units]
  for j in ready:  # grows while it is read
    ready += [i for i in sorted(wiring) if wiring[i] == j]
  if len(ready) < units:
    raise ValueError(f'`wiring` must lead every unit to the output {units}, '
                     f'got {dict(wiring)}: break the cycle.')
  return ready[1:]


def mix_error(difference, l2_share: float) -> Array:
  """e = alpha (h - t) + (1 - alpha) sign(h - t).

  `l2_share` is alpha; sign(0) = 0.
  """
  difference = _f64(difference)
  return l2_share * difference + (1.0 - l2_share) * np.sign(difference)


def _share(l2_share, unit: int) -> float:
  return l2_share[unit] if isinstance(l2_share, Mapping) else l2_share


def recursive_local_representation_alignment(
    params: Sequence[Unit], feedback: Mapping[int, Array],
    wiring: Mapping[int, int], x, y, *, beta: float, gamma: float = 1.0,
    mode: str = 'fixed', l2_share: float | Mapping[int, float] = 1.0,
    activation: str = 'tanh', loss: str = 'cross_entropy',
    residual_gap: int | None = None) -> LocalRepresentationAlignment:
  """Recursive local representation alignment over any wiring.

  e_L = h_L - Y; for every other unit i, with its source j,
  d_i = e_j E_{j->i}^T,  t_i = phi(a_i - beta d_i),  e_i = h_i - t_i,
  dW_i = h_{i-1}^T e_i,  db_i = sum_n e_i, without phi'. `mode` gives dE_{j->i}:
  'fixed':     0;
  'eq6':       +gamma d_i^T e_j. Eq. 6 is a change to be added, -gamma d e^T
              ; here it is something to descend;
  'transpose': gamma dW_j, for j = i + 1 only;
  'dx':        the derivative of D_i by E_{j->i}, (beta phi'(a_i - beta d_i)
               e_i)^T e_j.

  Decided: the output is an error unit as any other, with h_L = softmax(a_L) or
  a_L and t_L = Y, so its share of L1 applies and
  the mixed e_L is what W_L learns from and what goes into the E's. A number as
  `l2_share` is for all units, L included. No division by beta, nor by the
  distance from the output. In 'dx' gamma takes no part, e_j is a constant and
  so is what E does to D of other units; under a mix of norms D_i is that mix
  (see `discrepancies`), so e_i stays e_i; sign is refused there, since its
  derivative is 0. 'transpose' refuses a wire that is not from the neighbour
  above, rather than leave it fixed, so only the chain takes it. A skip
  (`residual_gap`) is a constant part of a_i, so t_i holds it as h_i does.
  Projection to a ball is the caller's (`project_to_ball`). A weight W_{k->i}
  has k = i - 1 here. Multiplying dW_i by phi' (an earlier version of the
  rule) is left out.

  Args:
    params: The network.
    feedback: {i: E_{j->i} [d_i, d_j]}: in the shape of W_{i+1} where j = i + 1.
    wiring: {i: j}, the source j of each unit i = 1..L-1, in any order.
    x: Inputs [N, d_0].
    y: Labels [N], or targets [N, C] for 'squared_error'.
    beta: The step of the pre-activation towards its target.
    gamma: The strength of the error synapses' update.
    mode: 'fixed', 'eq6', 'transpose' or 'dx'.
    l2_share: alpha, a number or {unit: alpha} for all of 1..L.
    activation: Of the hidden units; sign is welcome, but for 'dx'.
    loss: 'cross_entropy' or 'squared_error'.
    residual_gap: See `forward`.

  Returns:
    Displacements, targets, errors and both kinds of updates.
  """
  _one_of('mode', mode, ['fixed', 'eq6', 'transpose', 'dx'])
  last = len(params)
  order = _sources_first(wiring, last)
  if mode == 'transpose' and dict(wiring) != chain_wiring(last):
    raise ValueError("`mode` 'transpose' needs each unit's source to be the "
                     f'next one, got {dict(wiring)}: use another mode.')
  slope = _slope(activation) if mode == 'dx' else None
  phi = _phi(activation)
  if sorted(feedback) != sorted(wiring):
    raise ValueError(f'`feedback` must have the keys {sorted(wiring)}, got '
                     f'{sorted(feedback)}: give one matrix per wire.')
  width = {l: np.shape(unit['bias'])[0] for l, unit in enumerate(params, 1)}
  wires = {i: _shaped(f'feedback[{i}]', feedback[i], (width[i], width[j]))
           for i, j in wiring.items()}
  pre, hidden = forward(params, x, activation, residual_gap)
  output = read_out(pre[last], loss)
  targets = {last: true_output(y, output.shape, loss)}
  errors = {last: mix_error(output - targets[last], _share(l2_share, last))}
  displacements, feedback_updates = {}, {}
  for i in order:
    e_source = errors[wiring[i]]
    displacements[i] = e_source @ wires[i].T
    moved = pre[i] - beta * displacements[i]
    targets[i] = phi(moved)
    errors[i] = mix_error(hidden[i] - targets[i], _share(l2_share, i))
    if mode == 'eq6':
      feedback_updates[i] = gamma * displacements[i].T @ e_source
    elif mode == 'dx':
      feedback_updates[i] = (beta * slope(moved) * errors[i]).T @ e_source
    elif mode == 'transpose':
      feedback_updates[i] = gamma * hidden[i].T @ e_source
    else:
      feedback_updates[i] = np.zeros_like(wires[i])
  updates = [_unit_update(hidden[l - 1], errors[l])
             for l in range(1, last + 1)]
  return LocalRepresentationAlignment(displacements, targets, errors, updates,
                                      feedback_updates)


def local_representation_alignment(
    params: Sequence[Unit], feedback: Mapping[int, Array], x, y, *, beta: float,
    gamma: float = 1.0, mode: str = 'transpose',
    l2_share: float | Mapping[int, float] = 1.0, activation: str = 'tanh',
    loss: str = 'cross_entropy') -> LocalRepresentationAlignment:
  """LRA-E: every unit is wired to the next one.

  d_l = e_{l+1} E_{l+1}^T. Decided: the paper's E_{l+1} is `feedback[l]` here,
  named after the unit that it teaches, as in the recursive rule, of which this
  is the chain; 'transpose' is the default, with the authors' code
  sign, which aligns E with W.
  """
  return recursive_local_representation_alignment(
      params, feedback, chain_wiring(len(params)), x, y, beta=beta, gamma=gamma,
      mode=mode, l2_share=l2_share, activation=activation, loss=loss)


def project_to_ball(update, radius: float) -> Array:
  """Nm(u, c) = c u / |u| where |u| >= c, else u; c = `radius`.

  Decided: |u| is the norm of one array (Frobenius for a matrix); kernels,
  biases and error synapses are projected one by one, as the last thing done to
  an update, so gamma comes before. Whether `update` is the sum or the mean over
  examples, which the paper does not say and which matters, is the caller's.
  """
  if radius <= 0.0:
    raise ValueError(f'`radius` must be above 0, got {radius}: a ball of no '
                     'size would leave no update.')
  update = _f64(update)
  norm = np.linalg.norm(update)
  return update * (radius / norm) if norm >= radius else update


def discrepancies(params: Sequence[Unit], targets: Mapping[int, Array], x, *,
                  activation: str = 'tanh', loss: str = 'cross_entropy',
                  l2_share: float | Mapping[int, float] = 1.0,
                  residual_gap: int | None = None) -> dict[int, Array]:
  """D_i = 1/2 |h_i - t_i|^2 of every unit, per example.

  Targets are held: evaluate it at new `params` with old targets.
  Decided: with a mix of norms D_i = alpha/2 |h - t|^2 + (1 - alpha) |h - t|_1,
  whose derivative by h_i is e_i; the output's term is of this form, too, with
  t_L = Y, and not the loss (equal for 'squared_error', different for
  'cross_entropy', where e_L is the loss's derivative by a_L, not that of D_L).

  Returns:
    {i: D_i [N]} for the units in `targets`.
  """
  pre, hidden = forward(params, x, activation, residual_gap)
  values = {**hidden, len(params): read_out(pre[len(params)], loss)}
  out = {}
  for i, target in targets.items():
    difference, share = values[i] - _f64(target), _share(l2_share, i)
    out[i] = (0.5 * share * np.sum(difference**2, axis=1)
              + (1.0 - share) * np.sum(np.abs(difference), axis=1))
  return out


def total_discrepancy(params: Sequence[Unit], targets: Mapping[int, Array], x,
                      **net) -> float:
  """D = sum_i kappa_i D_i over units and examples, kappa_i = 1.

  `net` goes to `discrepancies`. Decided: the output counts, if it has a target.
  """
  return sum(d.sum() for d in discrepancies(params, targets, x, **net).values())


# --- Equilibrium propagation ------------------------------------------------


class EquilibriumPropagation(NamedTuple):
  """Free `particles` {l: s_l [N, d_l]}; updates as `params`."""
  particles: dict[int, Array]
  updates: list[dict[str, Array]]


def _rho(s) -> Array:
  return np.clip(_f64(s), 0.0, 1.0)


def _all_units(params, particles, x) -> list[Array]:
  if sorted(particles) != list(range(1, len(params) + 1)):
    raise ValueError(f'`particles` must have a state for each of 1..'
                     f'{len(params)}, got {sorted(particles)}: give all units '
                     'theirs.')
  return [_f64(x)] + [
      _shaped(f'particles[{l}]', particles[l], (len(x), len(unit['bias'])))
      for l, unit in enumerate(params, 1)]


def equilibrium_energy(params: Sequence[Unit], particles, x) -> Array:
  """E [N] = 1/2 sum_l |rho(s_l)|^2 - sum rho(s_l) b_l - sum r_{l-1} W_l r_l.

  r_l = rho(s_l) = clip(s_l, 0, 1), s_0 = x. Decided: l runs from 1 in
  all sums (s_0 is clamped: a constant); rho applies to x, too, as the formula
  is written, which matters for inputs outside [0, 1].
  """
  r = [_rho(s) for s in _all_units(params, particles, x)]
  energy = np.zeros(len(r[0]))
  for unit, below, here in zip(params, r[:-1], r[1:], strict=True):
    drive = below @ _f64(unit['kernel']) + _f64(unit['bias'])
    energy += np.sum(here * (0.5 * here - drive), axis=1)
  return energy


def equilibrium_cost(particles: Mapping[int, Array], y) -> Array:
  """C [N] = |s_L - Y|^2, no 1/2; `y` [N, C], labels one-hot.

  Decided: s_L itself, not rho(s_L); they agree wherever the dynamics lead.
  """
  output = _f64(particles[max(particles)])
  return np.sum((output - _shaped('y', y, output.shape)) ** 2, axis=1)


def equilibrium_settle(params: Sequence[Unit], particles, x, *, steps: int,
                       step_size: float, beta: float = 0.0,
                       y=None) -> dict[int, Array]:
  """s_l <- clip(s_l - step_size d(E + beta C)/ds_l, 0, 1), `steps` times.

  beta = 0 is the free phase, which needs no `y`.
  Decided: all layers move at once, from the same old state; rho'(s) = 1 on the
  closed interval [0, 1], for with 0 at its ends no unit could ever leave a
  bound; 0 outside, where only a caller's particles can be.
  """
  if beta and y is None:
    raise ValueError(f'`y` must be given where `beta` is not 0, got {beta} and '
                     'None: a nudged phase needs the targets.')
  s = _all_units(params, particles, x)
  truth = _shaped('y', y, s[-1].shape) if beta else None
  kernels = [None] + [_f64(unit['kernel']) for unit in params]
  biases = [None] + [_f64(unit['bias']) for unit in params]
  last = len(params)
  for _ in range(steps):
    r, moved = [_rho(state) for state in s], [s[0]]
    for l in range(1, last + 1):
      pull = r[l] - biases[l] - r[l - 1] @ kernels[l]
      if l < last:
        pull = pull - r[l + 1] @ kernels[l + 1].T
      slope = ((s[l] >= 0.0) & (s[l] <= 1.0)).astype(float)
      gradient = slope * pull
      if l == last and beta:
        gradient = gradient + 2.0 * beta * (s[l] - truth)
      moved.append(_rho(s[l] - step_size * gradient))
    s = moved
  return dict(enumerate(s[1:], start=1))


def equilibrium_propagation(params: Sequence[Unit], particles, x, y, *,
                            beta: float, free_steps: int, nudged_steps: int,
                            step_size: float,
                            symmetric: bool = False) -> EquilibriumPropagation:
  """Free phase, nudged phase(s), and the contrast of the two.

  dW_l = -(1/beta) sum_n [r^beta_{l-1}^T r^beta_l - r^0_{l-1}^T r^0_l],
  db_l = -(1/beta) sum_n [r^beta_l - r^0_l], r = rho(s). With `symmetric`, the
  states at +beta and -beta are contrasted, over 2 beta.

  Decided: the sign of `beta` is the caller's; every
  nudged phase starts at the free fixed point; that point, not the nudged one,
  is what is kept as the next `particles`; the sum over examples where the paper
  writes the mean. At beta <= -1/2 the readout has no interior fixed point, only
  the bounds hold it: nothing is refused there.

  Args:
    params: The network; each kernel is used both ways.
    particles: {l: s_l [N, d_l]} for l = 1..L, where the free phase starts.
    x: Inputs [N, d_0], clamped.
    y: Targets [N, C] (labels one-hot).
    beta: The strength of the nudge, of either sign.
    free_steps: n-.
    nudged_steps: n+.
    step_size: epsilon of the dynamics.
    symmetric: Whether to nudge both ways.

  Returns:
    The free particles and the updates, which tend to d(sum C)/d(params) at the
    free fixed point as beta goes to 0.
  """
  if beta == 0.0:
    raise ValueError('`beta` must not be 0, got 0: the update is a difference '
                     'quotient; use a small number.')
  free = equilibrium_settle(params, particles, x, steps=free_steps,
                            step_size=step_size)

  def nudged(strength):
    return equilibrium_settle(params, free, x, steps=nudged_steps,
                              step_size=step_size, beta=strength, y=y)

  after, before = nudged(beta), nudged(-beta) if symmetric else free
  span = 2.0 * beta if symmetric else beta
  r_after = [_rho(s) for s in _all_units(params, after, x)]
  r_before = [_rho(s) for s in _all_units(params, before, x)]
  updates = []
  for l in range(1, len(params) + 1):
    high = _unit_update(r_after[l - 1], r_after[l])
    low = _unit_update(r_before[l - 1], r_before[l])
    updates.append({k: -(high[k] - low[k]) / span for k in high})
  return EquilibriumPropagation(free, updates)
