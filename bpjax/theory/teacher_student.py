r"""Online learning of a teacher by a student: its simulation, and its ODEs.

A student :math:`\hat y = \sum_k v_k g(\lambda_k)`, :math:`\lambda_k = w_k \cdot x
/ \sqrt N`, learns a teacher :math:`y = \sum_m A_m g(\nu_m)`, :math:`\nu_m =
\tilde w_m \cdot x / \sqrt N`, with :math:`g(z) = \mathrm{erf}(z / \sqrt 2)`. Each
step has a fresh input :math:`x \sim \mathcal N(0, I_N)` and an error
:math:`\epsilon = \hat y - y - \sigma\zeta`, :math:`\zeta` standard normal:

.. math::
  w_k \leftarrow w_k - \frac{\eta}{\sqrt N} F_k g'(\lambda_k) \epsilon x, \qquad
  v_k \leftarrow v_k - \frac{\eta}{N} g(\lambda_k) \epsilon

Direct feedback alignment keeps F fixed; under backprop F = v. In the limit of
large N, with time t = steps / N, the overlaps Q = WW'/N, R = WW~'/N and v follow
ordinary differential equations, with T = W~W~'/N fixed: see `derivative`.

Exact solution for on-line learning in multilayer neural networks, Saad and
Solla, PRL 1995; Dynamics of stochastic gradient descent for two-layer neural
networks in the teacher-student setup, Goldt et al., 2019
(https://arxiv.org/abs/1906.08632); for direct feedback alignment Refinetti et
al., 2021 (https://arxiv.org/abs/2011.12428).

All functions work under `jax.jit`, and under `jax.vmap` over seeds. K is the
number of the student's neurons, M that of the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Overlaps(NamedTuple):
  """A student's state, as the ODEs see it.

  Attributes:
    q: [K, K], the student's weights with one another, divided by N.
    r: [K, M], the student's with the teacher's.
    v: [K], the second layer.
  """
  q: Array
  r: Array
  v: Array


class Teacher(NamedTuple):
  """A teacher, as the ODEs see it.

  Attributes:
    t: [M, M], its first-layer weights with one another, divided by N.
    a: [M], its second layer.
  """
  t: Array
  a: Array


def overlaps(weights: Array, v: Array, teacher_weights: Array) -> Overlaps:
  """The overlaps of a student with weights [K, N] and a teacher with [M, N].

  Example:
    >>> state = overlaps(2 * jnp.ones((1, 4)), jnp.ones(1), jnp.ones((3, 4)))
    >>> state.q.tolist(), state.r.tolist()
    ([[4.0]], [[2.0, 2.0, 2.0]])
  """
  n = weights.shape[1]
  return Overlaps(
      weights @ weights.T / n, weights @ teacher_weights.T / n, v)


# Averages over jointly normal variables z of covariance c. Indices may be arrays,
# which broadcast: i3(c, *jnp.ix_(a, b, d)) is the tensor of all of them.


def i2(c: Array, a: Array, b: Array) -> Array:
  r"""E[g(z_a) g(z_b)].

  .. math:: \frac2\pi \arcsin\frac{C_{ab}}{\sqrt{(1+C_{aa})(1+C_{bb})}}

  Example:
    >>> print(f'{i2(jnp.eye(2), 0, 0):.4f} {i2(jnp.eye(2), 0, 1):.4f}')
    0.3333 0.0000
  """
  return 2 / jnp.pi * _arcsin(
      c[a, b], jnp.sqrt((1 + c[a, a]) * (1 + c[b, b])))


def j2(c: Array, a: Array, b: Array) -> Array:
  r"""E[g'(z_a) g'(z_b)].

  .. math:: \frac{2}{\pi\sqrt{(1+C_{aa})(1+C_{bb}) - C_{ab}^2}}

  Example:
    >>> print(f'{j2(jnp.zeros((1, 1)), 0, 0):.4f}')
    0.6366
  """
  return 2 / jnp.pi / jnp.sqrt(_minor(c, a, b))


def i3(c: Array, a: Array, b: Array, d: Array) -> Array:
  r"""E[g'(z_a) z_b g(z_d)].

  .. math::
    \frac{2}{\pi\sqrt{\Lambda_3}}
    \frac{C_{bd}(1+C_{aa}) - C_{ab}C_{ad}}{1+C_{aa}}, \qquad
    \Lambda_3 = (1+C_{aa})(1+C_{dd}) - C_{ad}^2

  Example:
    >>> print(f'{i3(jnp.eye(3), 0, 1, 1):.4f}')
    0.3183
  """
  one = 1 + c[a, a]
  return 2 / jnp.pi * (c[b, d] * one - c[a, b] * c[a, d]) / (
      one * jnp.sqrt(_minor(c, a, d)))


def i4(c: Array, a: Array, b: Array, d: Array, e: Array) -> Array:
  r"""E[g'(z_a) g'(z_b) g(z_d) g(z_e)].

  .. math::
    \frac{4}{\pi^2\sqrt{\Lambda_4}}
    \arcsin\frac{\Lambda_{de}}{\sqrt{(\Lambda_4+\Lambda_{dd})(\Lambda_4
    +\Lambda_{ee})}}, \qquad \Lambda_4 = (1+C_{aa})(1+C_{bb}) - C_{ab}^2

  .. math::
    \Lambda_{de} = \Lambda_4 C_{de} - C_{bd}C_{be}(1+C_{aa}) -
    C_{ad}C_{ae}(1+C_{bb}) + C_{ab}(C_{ad}C_{be} + C_{ae}C_{bd})

  Example:
    >>> print(f'{i4(jnp.eye(4), 0, 1, 2, 2):.4f}')
    0.1061
  """
  minor = _minor(c, a, b)

  def given(d, e):  # Times the minor: what covariance z_a and z_b leave.
    return (minor * c[d, e] - c[b, d] * c[b, e] * (1 + c[a, a])
            - c[a, d] * c[a, e] * (1 + c[b, b])
            + c[a, b] * (c[a, d] * c[b, e] + c[a, e] * c[b, d]))

  scale = jnp.sqrt((minor + given(d, d)) * (minor + given(e, e)))
  return 4 / jnp.pi**2 * _arcsin(given(d, e), scale) / jnp.sqrt(minor)


def _minor(c, a, b):
  """The determinant of 1 + c, for a and b."""
  return (1 + c[a, a]) * (1 + c[b, b]) - c[a, b]**2


def _arcsin(x, scale):
  """Of x / scale, which rounding can take past 1."""
  return jnp.arcsin(jnp.clip(x / scale, -1, 1))


def _joint(state, teacher):
  """The covariance [K + M, K + M] of all pre-activations, and their weights."""
  c = jnp.block([[state.q, state.r], [state.r.T, teacher.t]])
  return c, jnp.concatenate([state.v, -teacher.a])


def generalisation_error(state: Overlaps, teacher: Teacher) -> Array:
  r"""Half the mean squared error on fresh inputs, exactly.

  .. math:: \epsilon_g = \frac12 \sum_{ab} \omega_a \omega_b I_2(a, b), \qquad
    \omega = (v, -A)

  Args:
    state: of the student.
    teacher: of the same inputs; the label's noise is not part of the error.

  Returns:
    A scalar.

  Example:
    >>> teacher = Teacher(jnp.eye(2), jnp.ones(2))
    >>> zero = Overlaps(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros(2))
    >>> print(f'{generalisation_error(zero, teacher):.4f}')
    0.3333
  """
  c, weights = _joint(state, teacher)
  every = jnp.arange(len(weights))
  return weights @ i2(c, *jnp.ix_(every, every)) @ weights / 2


def derivative(
    state: Overlaps, teacher: Teacher, feedback: Array | None = None, *,
    rate: float, noise: float = 0.) -> Overlaps:
  r"""The right-hand side of the ODEs: d state / dt.

  With a, b running over student and teacher, :math:`\omega = (v, -A)`:

  .. math::
    \dot R_{im} &= -\eta F_i \sum_a \omega_a I_3(i, m, a) \\
    \dot Q_{ik} &= -\eta F_i \sum_a \omega_a I_3(i, k, a)
      - \eta F_k \sum_a \omega_a I_3(k, i, a)
      + \eta^2 F_i F_k \Big[\sum_{ab} \omega_a \omega_b I_4(i, k, a, b)
      + \sigma^2 J_2(i, k)\Big] \\
    \dot v_i &= -\eta \sum_a \omega_a I_2(i, a)

  Args:
    state: of the student.
    teacher: of the student.
    feedback: F [K], fixed; None for backprop, F = v.
    rate: the learning rate eta.
    noise: sigma, the standard deviation of the label's noise.

  Returns:
    The derivatives, in the shapes of `state`.

  Example:
    >>> teacher = Teacher(jnp.eye(2), jnp.ones(2))
    >>> solved = Overlaps(jnp.eye(2), jnp.eye(2), jnp.ones(2))
    >>> print(f'{abs(derivative(solved, teacher, rate=.1).q).max():.5f}')
    0.00000
  """
  c, weights = _joint(state, teacher)
  every = jnp.arange(len(weights))
  own = every[:len(state.v)]
  f = state.v if feedback is None else jnp.asarray(feedback)
  # The drift of z_b along w_i: [K, K + M].
  drift = -rate * f[:, None] * (i3(c, *jnp.ix_(own, every, every)) @ weights)
  towards, to_teacher = jnp.split(drift, [len(own)], axis=1)
  fourth = i4(c, *jnp.ix_(own, own, every, every))
  spread = jnp.einsum('ikab,a,b->ik', fourth, weights, weights)
  spread += noise**2 * j2(c, *jnp.ix_(own, own))
  return Overlaps(
      q=towards + towards.T + rate**2 * jnp.outer(f, f) * spread, r=to_teacher,
      v=-rate * i2(c, *jnp.ix_(own, every)) @ weights)


def integrate(
    state: Overlaps, teacher: Teacher, times: Sequence[float],
    feedback: Array | None = None, *, rate: float, noise: float = 0.,
    rtol: float = 1e-6, atol: float = 1e-8) -> Overlaps:
  """Solves the ODEs with adaptive steps (diffrax, Tsitouras' method of order 5).

  Args:
    state: at time 0.
    teacher: of the student.
    times: [times], not negative and rising; in steps / N.
    feedback: F [K], or None for backprop.
    rate: the learning rate.
    noise: standard deviation of the label's noise.
    rtol: relative tolerance of a step. In float32 keep it above 1e-6.
    atol: absolute tolerance of a step.

  Returns:
    The states at `times`, each with a first axis of that length.

  Raises:
    ValueError: if `times` do not rise, or diffrax is missing.

  Example:
    >>> teacher = Teacher(jnp.eye(1), jnp.ones(1))
    >>> start = Overlaps(.1 * jnp.eye(1), .1 * jnp.eye(1), .1 * jnp.ones(1))
    >>> path = integrate(start, teacher, [0., 200.], rate=.5)
    >>> error = jax.vmap(generalisation_error, (0, None))(path, teacher)
    >>> print(f'{error[0]:.3f}', bool(error[1] < 1e-4))
    0.163 True
  """
  when = _rising(times)
  try:
    import diffrax  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ValueError(
        '`integrate` needs diffrax: `pip install "bpjax[theory]"`; `euler` '
        'does without it.') from error
  term = diffrax.ODETerm(lambda t, y, args: derivative(
      y, args[0], args[1], rate=rate, noise=noise))
  return diffrax.diffeqsolve(
      term, diffrax.Tsit5(), t0=0., t1=float(when[-1]), dt0=None, y0=state,
      args=(teacher, feedback), saveat=diffrax.SaveAt(ts=jnp.asarray(when)),
      stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
      max_steps=None).ys


def euler(
    state: Overlaps, teacher: Teacher, times: Sequence[float],
    feedback: Array | None = None, *, rate: float, noise: float = 0.,
    dt: float = .01) -> Overlaps:
  """Solves the ODEs as the paper's authors do: Euler steps of .01.

  Args:
    state: at time 0.
    teacher: of the student.
    times: [times], not negative and rising; rounded to multiples of `dt`.
    feedback: F [K], or None for backprop.
    rate: the learning rate.
    noise: standard deviation of the label's noise.
    dt: length of a step.

  Returns:
    The states at `times`, each with a first axis of that length.

  Raises:
    ValueError: if `times` do not rise.

  Example:
    >>> teacher = Teacher(jnp.eye(1), jnp.ones(1))
    >>> start = Overlaps(jnp.eye(1), jnp.eye(1), jnp.zeros(1))
    >>> print(f'{euler(start, teacher, [1.], rate=.3).v[0, 0]:.3f}')
    0.095
  """
  counts = np.rint(_rising(times) / dt).astype(int)

  def step(i, state):
    del i
    change = derivative(state, teacher, feedback, rate=rate, noise=noise)
    return jax.tree.map(lambda s, d: s + dt * d, state, change)

  return _states_at(step, state, counts, lambda s: s)


def simulate(
    key: Any, weights: Array, v: Array, teacher_weights: Array, a: Array,
    times: Sequence[float], feedback: Array | None = None, *, rate: float,
    noise: float = 0.) -> Overlaps:
  """Trains a student online, one fresh input a step; `jax.vmap` it over seeds.

  Args:
    key: of inputs and noise.
    weights: the student's first layer [K, N]; its dtype is that of the run.
    v: the student's second layer [K].
    teacher_weights: [M, N].
    a: the teacher's second layer [M].
    times: [times], not negative and rising; a time is N steps.
    feedback: F [K], or None for backprop.
    rate: the learning rate.
    noise: standard deviation of the label's noise.

  Returns:
    The overlaps at `times`, each with a first axis of that length.
    `generalisation_error` of them is exact: no test set is needed.

  Raises:
    ValueError: if `times` do not rise.

  Example:
    >>> w = jax.random.normal(jax.random.key(0), (3, 100))
    >>> path = simulate(jax.random.key(1), w[:2], jnp.ones(2), w[2:],
    ...                 jnp.ones(1), [0., 1., 10.], rate=.1)
    >>> path.q.shape, path.r.shape, path.v.shape
    ((3, 2, 2), (3, 2, 1), (3, 2))
  """
  n, dtype = weights.shape[1], weights.dtype
  counts = np.rint(_rising(times) * n).astype(int)
  v, a, teacher_weights = (
      jnp.asarray(x, dtype) for x in (v, a, teacher_weights))
  fixed = None if feedback is None else jnp.asarray(feedback, dtype)
  # Rows of both networks side by side: one product with the input a step.
  root = np.sqrt(n).astype(dtype)

  def step(i, state):
    w, v = state
    draw = jax.random.normal(jax.random.fold_in(key, i), (n + 1,), dtype)
    x, label_noise = draw[:n], draw[n]
    own, others = w @ x / root, teacher_weights @ x / root
    g = _erf(own)
    error = v @ g - a @ _erf(others) - noise * label_noise
    slope = np.sqrt(2 / np.pi) * jnp.exp(-own**2 / 2)
    f = v if fixed is None else fixed
    change = (rate * error / root * f * slope).astype(dtype)
    return (w - change[:, None] * x, (v - rate / n * error * g).astype(dtype))

  return _states_at(
      step, (weights, v), counts, lambda s: overlaps(*s, teacher_weights))


def _erf(z):
  return lax.erf(z / np.sqrt(2).astype(z.dtype))


def _states_at(
    step: Callable[[Any, Any], Any], state: Any, counts: np.ndarray,
    observe: Callable[[Any], Any]) -> Any:
  """What is observed after so many steps each, with a first axis."""

  def advance(carry, count):
    state, done = carry
    state = lax.fori_loop(done, count, step, state)
    return (state, count), observe(state)

  steps = jnp.asarray(counts)
  return lax.scan(advance, (state, jnp.zeros_like(steps[0])), steps)[1]


def _rising(given) -> np.ndarray:
  times = np.asarray(given, float)
  if times.ndim != 1 or not times.size or times[0] < 0 or (
      np.diff(times) < 0).any():
    raise ValueError(
        '`times` must be a list of times that rise, none of them negative, got '
        f'{times.tolist()}.')
  return times
