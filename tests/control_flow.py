"""Kinds of control flow in plain functions, with the units expected in each.

A parameter can reach a product through loops, branches, calls, custom
derivatives and indices. Each case is one such way, as small as it can be:
`x` of `[4, 6]` goes through `a` and `b` of `[6, 6]` and is read out by `o` of
`[6, 3]`, unless the case says otherwise.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
  """A function, its parameters and input, and what is to be found in it.

  Attributes:
    name: the key in `CASES`.
    apply: `apply(params, x)`, with logits `[batch, 3]`.
    params: a dictionary of arrays.
    x: the input.
    units: names of the units, in the order of their first calls.
    exact: paths of the parameters that keep their exact derivative.
  """
  name: str
  apply: Callable[[dict[str, jax.Array], jax.Array], jax.Array]
  params: dict[str, jax.Array]
  x: jax.Array
  units: tuple[str, ...]
  exact: frozenset[str]


CASES: dict[str, Case] = {}
LABELS = jnp.arange(4) % 3
CALLS: list[float] = []  # What the host callbacks were called with.


def _normal(seed, *shape, scale=None):
  """Random numbers; by default with a deviation that keeps a product's size."""
  if scale is None:
    scale = shape[-2] ** -.5 if len(shape) > 1 else .1
  values = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(values, jnp.float32)


_X = _normal(0, 4, 6, scale=1.)
_SEQUENCE = _normal(0, 4, 5, 6, scale=1.)
_O = {'o': _normal(3, 6, 3)}
_A = {'a': _normal(1, 6, 6), **_O}
_B = {'b': _normal(2, 6, 6), **_O}
_WEIGHTS = {**_A, **_B}
_LOW_RANK = {'A': _normal(7, 6, 2), 'B': _normal(8, 2, 6)}


def _case(units: str, exact: str = '', params=None, x=_X):
  """Enters a function in `CASES`; names are separated by spaces."""

  def enter(apply: Callable[..., Any]):
    name = apply.__name__
    CASES[name] = Case(
        name, apply, dict(params or _WEIGHTS), x, tuple(units.split()),
        frozenset(exact.split()))
    return apply

  return enter


def _two_layers(params, x, view=lambda w: w):
  """`a`, then `b`, each through `view`, then `o` as it is."""
  h = jnp.tanh(x @ view(params['a']))
  return jnp.tanh(h @ view(params['b'])) @ params['o']


# -----------------------------------------------------------------------------
# Loops.
# -----------------------------------------------------------------------------

@_case('a b o')
def scan_in_scan(params, x):
  """A loop inside a loop; both bodies use weights from outside of the loops."""

  def inner(h, _):
    return jnp.tanh(h @ params['a']), None

  def outer(h, _):
    h, _ = lax.scan(inner, h, length=2)
    return jnp.tanh(h @ params['b']), None

  h, _ = lax.scan(outer, x, length=2)
  return h @ params['o']


@_case('a o', params={'a': _normal(1, 2, 2, 6, 6), **_O})
def scan_in_scan_xs(params, x):
  """Two loops that slice one parameter along its first two axes."""

  def outer(h, kernels):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, kernels)

  h, _ = lax.scan(outer, x, params['a'])
  return h @ params['o']


@_case('a b o')
def scan_remat_policy(params, x):
  """The body is under remat, with a policy that saves products."""

  @functools.partial(
      jax.checkpoint,
      policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  def block(h):
    return jnp.tanh(jnp.tanh(h @ params['a']) @ params['b'])

  h, _ = lax.scan(lambda h, _: (block(h), None), x, length=3)
  return h @ params['o']


@_case('a b o')
def cond_in_scan(params, x):
  """The steps of a loop take one of two branches in turn."""

  def step(h, i):
    h = lax.cond(
        i % 2 == 1, lambda h: jnp.tanh(h @ params['b']),
        lambda h: jnp.tanh(h @ params['a']), h)
    return h, None

  h, _ = lax.scan(step, x, jnp.arange(3))
  return h @ params['o']


@_case('a o', params=_A)
def dropout_scan(params, x):
  """A loop over keys; each step drops other neurons."""

  def step(h, key):
    h = jnp.tanh(h @ params['a'])
    return jnp.where(jax.random.bernoulli(key, .5, h.shape), 2 * h, 0), None

  h, _ = lax.scan(step, x, jax.random.split(jax.random.key(3), 3))
  return h @ params['o']


@_case('a o', params=_A)
def fori_const(params, x):
  """A counted loop, which is a scan as its number of steps is fixed."""
  h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params['a']), x)
  return h @ params['o']


@_case('a o', params={'a': _normal(1, 2, 6, 6), **_O})
def fori_index(params, x):
  """The loop's counter picks its layer's weights out of a stack."""
  h = lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ params['a'][i]), x)
  return h @ params['o']


@_case('a b o')
def lax_map(params, x):
  """Examples one after the other; the products have no batch axis."""
  row = lambda r: jnp.tanh(jnp.tanh(r @ params['a']) @ params['b'])
  return lax.map(row, x) @ params['o']


@_case('b o', 'a', params={'a': _normal(1, 6), **_B}, x=_SEQUENCE)
def assoc_scan(params, x):
  """A linear recurrence with learned decays, by an associative scan."""
  h = jnp.tanh(x @ params['b'])
  decay = jnp.broadcast_to(jax.nn.sigmoid(params['a']), h.shape)

  def combine(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]

  _, states = lax.associative_scan(combine, (decay, h), axis=1)
  return states[:, -1] @ params['o']


@_case('b a o')
def fast_weights_carry(params, x):
  """Weights are carried and shrink at each step; they stay a view."""

  def step(carry, current):
    kernel, h = carry
    return (.9 * kernel, jnp.tanh(h @ kernel + current)), None

  first = params['a'], jnp.tanh(x @ params['b'])
  (_, h), _ = lax.scan(step, first, jnp.stack([x] * 3))
  return h @ params['o']


@_case('b o', 'a')
def hebbian_carry(params, x):
  """Carried weights take up products of activations: they become data."""

  def step(carry, current):
    kernel, h = carry
    h = jnp.tanh(h @ kernel + current)
    return (kernel + .1 * h.T @ h, h), None

  first = params['a'], jnp.tanh(x @ params['b'])
  (_, h), _ = lax.scan(step, first, jnp.stack([x] * 3))
  return h @ params['o']


@_case('b a o')
def while_in_view(params, x):
  """A power iteration in a `while_loop` of parameters, as in spectral norms."""
  a = params['a']

  def iterate(state):
    step, u = state
    v = a.T @ (a @ u)
    return step + 1, v / jnp.linalg.norm(v)

  first = 0, jnp.ones(6, a.dtype)
  _, u = lax.stop_gradient(
      lax.while_loop(lambda state: state[0] < 3, iterate, first))
  h = jnp.tanh(x @ params['b'])
  return jnp.tanh(h @ (a / (1 + jnp.linalg.norm(a @ u)))) @ params['o']


@_case('w o', 'h0', params={
    'h0': _normal(1, 6, scale=1.), 'w': _normal(2, 6, 6), **_O})
def learned_h0(params, x):
  """A learned first state, tiled over the batch: in the product it is data."""
  h = jnp.broadcast_to(params['h0'], x.shape)
  for _ in range(3):
    h = jnp.tanh(h @ params['w'] + x)
  return h @ params['o']


# -----------------------------------------------------------------------------
# Calls, callbacks and custom derivatives.
# -----------------------------------------------------------------------------

@_case('a b o')
def remat_static(params, x):
  """Remat with a static argument among the others."""

  @functools.partial(jax.checkpoint, static_argnums=(1,))
  def layer(h, bounded, kernel):
    return jnp.tanh(h @ kernel) if bounded else h @ kernel

  h = layer(layer(x, True, params['a']), True, params['b'])
  return h @ params['o']


@_case('a b o')
def nested_jit(params, x):
  """One compiled function is called with one parameter, then with another."""
  layer = jax.jit(lambda h, w: jnp.tanh(h @ w), donate_argnums=0)
  return layer(layer(x + 0, params['a']), params['b']) @ params['o']


@_case('a b o')
def debug_print(params, x):
  """A callback to the host, which is to be called once a step."""
  h = jnp.tanh(x @ params['a'])
  jax.debug.callback(lambda value: CALLS.append(float(value)), h.sum())
  return jnp.tanh(h @ params['b']) @ params['o']


@_case('a o', params=_A)
def debug_in_scan(params, x):
  """A callback in a loop, which is to be called once for each of its steps."""

  def step(h, _):
    h = jnp.tanh(h @ params['a'])
    jax.debug.callback(lambda value: CALLS.append(float(value)), h.sum())
    return h, None

  h, _ = lax.scan(step, x, length=3)
  return h @ params['o']


@jax.custom_vjp
def _clipped_product(x, w):
  return x @ w


def _clipped_product_forward(x, w):
  return x @ w, (x, w)


def _clipped_product_backward(saved, error):
  x, w = saved
  return jnp.clip(error, -.05, .05) @ w.T, x.T @ error


_clipped_product.defvjp(_clipped_product_forward, _clipped_product_backward)


@_case('a o', 'b')
def customvjp_linear(params, x):
  """A product whose author clips the message: that derivative stays."""
  h = jnp.tanh(x @ params['a'])
  return jnp.tanh(_clipped_product(h, params['b'])) @ params['o']


@jax.custom_jvp
def _halved_layer(x, w):
  return jnp.tanh(x @ w)


@_halved_layer.defjvp
def _halved_layer_jvp(primals, tangents):
  (x, w), (dx, dw) = primals, tangents
  return _halved_layer(x, w), (dx @ w + x @ dw) / 2


@_case('a o', 'b')
def customjvp_linear(params, x):
  """A whole layer whose author gives its tangent: that derivative stays."""
  h = jnp.tanh(x @ params['a'])
  return _halved_layer(h, params['b']) @ params['o']


@jax.custom_vjp
def _sign(w):
  return jnp.sign(w)


_sign.defvjp(
    lambda w: (jnp.sign(w), w), lambda w, error: (error * (jnp.abs(w) < 1),))


@_case('a b o')
def sign_customvjp(params, x):
  """Binary weights; a custom derivative of parameters alone is a view's."""
  return _two_layers(params, x, _sign)


@_case('a b o')
def sign_stopgrad(params, x):
  """Binary weights, straight through by `stop_gradient`."""
  return _two_layers(
      params, x, lambda w: w + lax.stop_gradient(jnp.sign(w) - w))


@_case('b a o')
def barrier(params, x):
  """A parameter and data pass one optimisation barrier together."""
  h, kernel = lax.optimization_barrier(
      (jnp.tanh(x @ params['b']), params['a']))
  return jnp.tanh(h @ kernel) @ params['o']


# -----------------------------------------------------------------------------
# Views: what a parameter may go through before its product.
# -----------------------------------------------------------------------------

@_case('b a o', 'a')
def view_and_direct(params, x):
  """One parameter in a product, and its sum as a factor of the input."""
  h = jnp.tanh(jnp.tanh(x @ params['b']) @ params['a'])
  return (h + x * params['a'].sum()) @ params['o']


@_case('b a o')
def dus_view(params, x):
  """A corner of the kernel is overwritten by zeros."""
  kernel = lax.dynamic_update_slice(
      params['a'], jnp.zeros((2, 2), params['a'].dtype), (0, 0))
  return jnp.tanh(jnp.tanh(x @ params['b']) @ kernel) @ params['o']


@_case('b a o')
def dus_data_idx(params, x):
  """The input decides which row of the kernel is set to zero."""
  kernel = params['a'].at[jnp.argmax(x[0])].set(0.)
  return jnp.tanh(jnp.tanh(x @ params['b']) @ kernel) @ params['o']


@_case('a b o', params={
    'a': _normal(1, 6, 6) * jnp.complex64(1 + .5j),
    'b': _normal(2, 6, 6) * jnp.complex64(1 - 1j), **_O})
def complex_p(params, x):
  """Complex kernels between a real input and a real readout."""
  h = jnp.tanh((x + 0j) @ params['a'] @ params['b'])
  return (h.real + h.imag) @ params['o']


@_case('a b o', params={
    k: w.astype(jnp.bfloat16) for k, w in _WEIGHTS.items()})
def bf16_params(params, x):
  """Parameters are kept in bfloat16, and used in the input's type."""
  return _two_layers(jax.tree.map(lambda w: w.astype(x.dtype), params), x)


@_case('a b o')
def bf16_compute(params, x):
  """Everything is computed in bfloat16; parameters and output are wider."""
  narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  return _two_layers(narrow, x.astype(jnp.bfloat16)).astype(x.dtype)


@_case('b a o', 'A B', params={**_WEIGHTS, **_LOW_RANK})
def lora_merged(params, x):
  """A product of two parameters is added to the kernel before its use."""
  kernel = params['a'] + params['A'] @ params['B']
  return jnp.tanh(jnp.tanh(x @ params['b']) @ kernel) @ params['o']


@_case('b a A B o', params={**_WEIGHTS, **_LOW_RANK})
def lora_split(params, x):
  """The same correction beside the kernel: three products with data."""
  h = jnp.tanh(x @ params['b'])
  h = h @ params['a'] + (h @ params['A']) @ params['B']
  return jnp.tanh(h) @ params['o']


@_case('a b o')
def weight_std(params, x):
  """Kernels are standardised over their inputs."""
  return _two_layers(
      params, x, lambda w: (w - w.mean(0)) / (w.std(0) + 1e-3))


@_case('b a o')
def where_w(params, x):
  """The input decides whether the kernel is transposed."""
  kernel = jnp.where(x[0, 0] > 0, params['a'], params['a'].T)
  return jnp.tanh(jnp.tanh(x @ params['b']) @ kernel) @ params['o']


@_case('b o', 'a')
def data_scaled_w(params, x):
  """The kernel is scaled by an activation without a derivative: no view."""
  h = jnp.tanh(x @ params['b'])
  scale = lax.stop_gradient(jnp.abs(h).mean())
  return jnp.tanh(h @ (params['a'] * scale)) @ params['o']


@_case('b e o', params={'e': _normal(1, 3, 6, 6), **_B})
def expert_gather(params, x):
  """The input picks each example's kernel out of a stack."""
  kernels = params['e'][jnp.argmax(x[:, :3], -1)]
  h = jnp.tanh(x @ params['b'])
  return jnp.tanh(jnp.einsum('bi,bij->bj', h, kernels)) @ params['o']


@_case('b e o', params={'e': _normal(1, 3, 6, 6), **_B})
def ragged(params, x):
  """Runs of examples share an expert, by a ragged product."""
  h = lax.ragged_dot(
      jnp.tanh(x @ params['b']), params['e'], jnp.array([1, 2, 1]))
  return jnp.tanh(h) @ params['o']


@_case('wk wq o', 'q wq', params={
    'q': _normal(1, 2, 6, scale=1.), 'wq': _normal(2, 6, 6),
    'wk': _normal(4, 6, 6), **_O}, x=_SEQUENCE)
def learned_queries(params, x):
  """Queries of parameters alone meet keys of the input."""
  key = jnp.tanh(x @ params['wk'])
  query = jnp.tanh(params['q'] @ params['wq'])
  weights = jax.nn.softmax(jnp.einsum('qd,btd->bqt', query, key))
  return jnp.einsum('bqt,btd->bqd', weights, x).mean(1) @ params['o']


# -----------------------------------------------------------------------------
# Products that are none, or more than one.
# -----------------------------------------------------------------------------

@_case('h b o', params={'h': _normal(1, 6, 36, scale=.5), **_B})
def hypernet(params, x):
  """A product with weights that another product has made for each example."""
  kernels = (x @ params['h']).reshape(-1, 6, 6)
  h = jnp.tanh(x @ params['b'])
  return jnp.tanh(jnp.einsum('bi,bij->bj', h, kernels)) @ params['o']


@_case('b o', 'a')
def mul_reduce(params, x):
  """A product that is written as a multiplication and a sum."""
  h = jnp.tanh(x @ params['b'])
  return jnp.tanh((h[:, :, None] * params['a']).sum(1)) @ params['o']


@_case('b w o', params={'w': _normal(1, 6, 6, 6, scale=.4), **_B})
def bilinear(params, x):
  """One parameter between two copies of an activation."""
  h = jnp.tanh(x @ params['b'])
  return jnp.tanh(jnp.einsum('bi,oij,bj->bo', h, params['w'], h)) @ params['o']


@_case('b g a o', params={**_WEIGHTS, 'g': 1 + _normal(9, 6)})
def gain_einsum(params, x):
  """A gain that is written as an einsum, which makes it a product."""
  h = jnp.einsum('bd,d->bd', jnp.tanh(x @ params['b']), params['g'])
  return jnp.tanh(h @ params['a']) @ params['o']


@_case('a o', 'b', params={**_WEIGHTS, 'b': _normal(2, 6, 6) + 2 * jnp.eye(6)})
def solve(params, x):
  """A linear system with a parameter as its matrix."""
  h = jnp.tanh(x @ params['a'])
  return jnp.tanh(jnp.linalg.solve(params['b'], h.T).T) @ params['o']


@_case('b a o o/#1', 'a')
def maml(params, x):
  """A gradient step on `a` inside the model; `o` carries the inner error."""

  def forward(a):
    h = jnp.tanh(jnp.tanh(x @ params['b']) @ a)
    return h @ params['o']

  inner = jax.grad(lambda a: jnp.square(forward(a)).mean())
  return forward(params['a'] - .1 * inner(params['a']))


@_case('b a a/#1 b/#1 o')
def inner_grad_x(params, x):
  """The gradient with respect to the input is what is read out."""
  energy = lambda x: jnp.tanh(
      jnp.tanh(x @ params['b']) @ params['a']).sum()
  return jax.grad(energy)(x) @ params['o']


@_case('b a o')
def const_input(params, x):
  """A generator: noise of the batch's size, into which no input goes."""
  z = jax.random.normal(jax.random.key(5), x.shape, x.dtype)
  h = jnp.tanh(jnp.tanh(z @ params['b']) @ params['a'])
  return h @ params['o'] + 0 * x[:, :3]


@_case('o', 'c1 c2', params={
    'c1': _normal(1, 2, 6), 'c2': _normal(2, 6, 1), **_O})
def cpb_mlp(params, x):
  """A network over constant coordinates makes a gain: no product has data."""
  step = np.arange(6)
  places = jnp.asarray(np.stack([step, step ** 2], -1) / 10, x.dtype)
  gain = (jnp.tanh(places @ params['c1']) @ params['c2'])[:, 0]
  return (jnp.tanh(x) * jax.nn.softmax(gain)) @ params['o']
