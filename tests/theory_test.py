"""The theory of feedback alignment, against numpy and Monte Carlo averages."""

import glob
import json
import os
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import bpjax
from bpjax.theory import alignment
from bpjax.theory import convolution
from bpjax.theory import linear
from bpjax.theory import teacher_student as ts
import flax.linen as nn
import float64
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special
import scripts_test

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_DRAWS = 1_000_000
derivative = jax.jit(ts.derivative)
generalisation_error = jax.jit(ts.generalisation_error)


def g(z):
  return special.erf(z / np.sqrt(2))


def slope(z):
  return np.sqrt(2 / np.pi) * np.exp(-z**2 / 2)


def averages(samples):
  """Mean and standard error of [draws]."""
  return samples.mean(), samples.std() / len(samples)**.5


def networks(seed, k, m, n):
  draw = np.random.default_rng(seed)
  return (draw.standard_normal((k, n)), draw.standard_normal(k),
          draw.standard_normal((m, n)), draw.standard_normal(m))


class TeacherStudentTest(float64.Float64TestCase):

  def setUp(self):
    super().setUp()
    self.w, self.v, self.teacher_w, self.a = networks(0, 2, 3, 12)
    self.f = np.array([.7, -1.3])
    self.state = ts.overlaps(
        *map(jnp.array, (self.w, self.v, self.teacher_w)))
    self.teacher = ts.Teacher(
        jnp.array(self.teacher_w @ self.teacher_w.T / 12), jnp.array(self.a))

  def test_integrals_are_those_of_monte_carlo(self):
    draw = np.random.default_rng(1)
    root = draw.standard_normal((4, 4))
    c = jnp.array(root @ root.T)
    a, b, d, e = (draw.standard_normal((_DRAWS, 4)) @ root.T).T
    for found, samples in (
        (ts.i2(c, 0, 1), g(a) * g(b)),
        (ts.j2(c, 0, 1), slope(a) * slope(b)),
        (ts.i3(c, 0, 1, 2), slope(a) * b * g(d)),
        (ts.i3(c, 0, 0, 2), slope(a) * a * g(d)),
        (ts.i4(c, 0, 1, 2, 3), slope(a) * slope(b) * g(d) * g(e)),
        (ts.i4(c, 0, 0, 2, 2), slope(a)**2 * g(d)**2),
        (ts.i4(c, 0, 1, 0, 3), slope(a) * slope(b) * g(a) * g(e))):
      mean, error = averages(samples)
      self.assertLess(abs(found - mean), 5 * error)
      self.assertGreater(abs(mean), 5 * error)  # Else it would say nothing.

  @parameterized.named_parameters(('dfa', True), ('bp', False))
  def test_derivative_is_the_mean_change_of_a_step(self, fixed):
    rate, noise = .3, .2
    draw = np.random.default_rng(2)
    x = draw.standard_normal((_DRAWS, 12)) / np.sqrt(12)
    own, others = x @ self.w.T, x @ self.teacher_w.T
    error = g(own) @ self.v - g(others) @ self.a + (
        noise * draw.standard_normal(_DRAWS))
    f = self.f if fixed else self.v
    # w_i moves by -x / sqrt(N) times this, N times in a unit of time.
    moves = rate * f * slope(own) * error[:, None]
    found = derivative(
        self.state, self.teacher, jnp.array(f) if fixed else None, rate=rate,
        noise=noise)
    for i in range(2):
      for m in range(3):
        mean, sd = averages(-moves[:, i] * others[:, m])
        self.assertLess(abs(found.r[i, m] - mean), 5 * sd)
      for k in range(2):
        # |x|^2 / N is 1 in the limit of large N.
        mean, sd = averages(-moves[:, i] * own[:, k] - moves[:, k] * own[:, i]
                            + moves[:, i] * moves[:, k])
        self.assertLess(abs(found.q[i, k] - mean), 5 * sd)
      mean, sd = averages(-rate * g(own[:, i]) * error)
      self.assertLess(abs(found.v[i] - mean), 5 * sd)
    mean, sd = averages(error**2 / 2)
    expected = generalisation_error(self.state, self.teacher) + noise**2 / 2
    self.assertLess(abs(expected - mean), 5 * sd)

  def test_known_errors_of_one_draw(self):
    draw = np.random.default_rng(0)
    teacher_w = draw.standard_normal((2, 1000))
    w = .1 * draw.standard_normal((2, 1000))
    teacher = ts.Teacher(jnp.array(teacher_w @ teacher_w.T / 1000), jnp.ones(2))
    state = ts.overlaps(jnp.array(w), jnp.full(2, 1e-3), jnp.array(teacher_w))
    times, f = [20., 40., 60., 100., 200.], jnp.array([1., .7])
    known = np.array([.11838, .02243, .01469, .01369, .01288])
    error = jax.vmap(ts.generalisation_error, (0, None))
    path = ts.euler(state, teacher, times, f, rate=.1, dt=.02)
    np.testing.assert_allclose(error(path, teacher), known, atol=5.1e-6)
    adaptive = ts.integrate(state, teacher, times, f, rate=.1)
    np.testing.assert_allclose(error(adaptive, teacher), known, rtol=2e-3)
    cosines = adaptive.v @ f / jnp.linalg.norm(f) / jnp.linalg.norm(
        adaptive.v, axis=1)
    np.testing.assert_allclose(cosines[jnp.array([0, 4])], [.998, .995], atol=5e-4)

  @parameterized.named_parameters(('dfa', True), ('bp', False))
  def test_the_teacher_is_a_fixed_point(self, fixed):
    t, a = self.teacher
    solved = ts.Overlaps(t, t, a)
    change = derivative(
        solved, self.teacher, a if fixed else None, rate=.5)
    self.assertLess(max(float(abs(c).max()) for c in change), 1e-14)
    self.assertLess(abs(generalisation_error(solved, self.teacher)), 1e-15)
    # erf is odd: the other signs are a fixed point of backprop alone.
    signs = jnp.array([-1., 1., 1.])
    turned = ts.Overlaps(
        t * jnp.outer(signs, signs), t * signs[:, None], a * signs)
    self.assertLess(abs(generalisation_error(turned, self.teacher)), 1e-15)

  def test_errors_are_not_negative(self):
    for seed in range(20):
      w, v, teacher_w, a = map(jnp.array, networks(seed, 3, 2, 5))
      error = generalisation_error(
          ts.overlaps(w, v, teacher_w),
          ts.Teacher(teacher_w @ teacher_w.T / 5, a))
      self.assertGreaterEqual(error, 0)

  def test_neurons_may_be_permuted(self):
    order, others = jnp.array([1, 0]), jnp.array([2, 0, 1])

    def permuted(s):
      return ts.Overlaps(
          s.q[order][:, order], s.r[order][:, others], s.v[order])

    teacher = ts.Teacher(
        self.teacher.t[others][:, others], self.teacher.a[others])
    for f in (None, jnp.array(self.f)):
      plain = derivative(self.state, self.teacher, f, rate=.3, noise=.1)
      turned = derivative(
          permuted(self.state), teacher, None if f is None else f[order],
          rate=.3, noise=.1)
      for a, b in zip(permuted(plain), turned):
        np.testing.assert_allclose(a, b, atol=1e-14)

  @parameterized.named_parameters(('dfa', True), ('bp', False))
  def test_simulation_is_numpys(self, fixed):
    rate, noise, n, times = .4, .3, 12, [0., .5, 2.]
    keys = jax.random.split(jax.random.key(3), 2)
    f = self.f if fixed else None
    run = lambda key: ts.simulate(
        key, jnp.array(self.w), self.v, self.teacher_w, self.a, times, f,
        rate=rate, noise=noise)
    path = jax.jit(jax.vmap(run))(keys)
    for s, key in enumerate(keys):
      w, v = self.w.copy(), self.v.copy()
      for i in range(25):
        for t, at in enumerate((0, 6, 24)):
          if i == at:
            for got, want in (
                (path.q, w @ w.T), (path.r, w @ self.teacher_w.T)):
              np.testing.assert_allclose(got[s, t], want / n, atol=1e-12)
            np.testing.assert_allclose(path.v[s, t], v, atol=1e-12)
        draw = np.asarray(jax.random.normal(
            jax.random.fold_in(key, i), (n + 1,), float))
        x = draw[:n]
        own, others = w @ x / n**.5, self.teacher_w @ x / n**.5
        error = v @ g(own) - self.a @ g(others) - noise * draw[n]
        new_v = v - rate / n * g(own) * error
        w = w - rate / n**.5 * np.outer(
            (self.f if fixed else v) * slope(own) * error, x)
        v = new_v

  @parameterized.parameters(([],), ([2., 1.],), ([-1.],))
  def test_times_must_rise(self, times):
    with self.assertRaisesRegex(ValueError, '`times` must be a list'):
      ts.euler(self.state, self.teacher, times, rate=.1)


class LinearTest(float64.Float64TestCase):

  @parameterized.product(outputs=(1, 10), hidden=((8,), (8, 5, 6)))
  def test_recursion_is_numpys_training(self, outputs, hidden):
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((40, 7)), draw.standard_normal((40, outputs))
    feedback = [draw.standard_normal((n, outputs)) / n**.5 for n in hidden]
    sizes = [7, *hidden, outputs]
    weights = [np.zeros((n, m)) for m, n in zip(sizes, sizes[1:])]
    for x_t, y_t in zip(x, y):
      h = [x_t]
      for w in weights:
        h.append(w @ h[-1])
      error = h[-1] - y_t
      for w, f, below in zip(weights, [*feedback, np.eye(outputs)], h):
        w -= .05 * np.outer(f @ error, below)
    given = jnp.array(x), jnp.array(y), list(map(jnp.array, feedback)), .05
    matrices = [a[-1] for a in jax.jit(linear.alignment_matrices)(*given)]
    for found in (linear.weights(matrices, given[2]),
                  jax.jit(linear.train)(*given)):
      for a, b in zip(found, weights):
        np.testing.assert_allclose(a, b, atol=1e-11 * abs(b).max())
        self.assertGreater(abs(b).max(), 0)
    if outputs == 1:
      cosines = alignment.weight_alignment(
          linear.weights(matrices, given[2]), given[2])
      np.testing.assert_allclose(abs(cosines.layers), 1, atol=1e-12)

  def test_prediction_holds_for_orthonormal_feedback(self):
    draw = np.random.default_rng(1)
    f = [jnp.linalg.qr(jnp.array(draw.standard_normal((30, 5))))[0]
         for _ in range(2)]
    a = jnp.array(draw.standard_normal((5, 5)) + 2 * np.eye(5))
    weights = linear.weights([jnp.ones((5, 3)), a, a], f)
    found = alignment.weight_alignment(weights, f).layers
    np.testing.assert_allclose(
        found, [linear.predicted_alignment(a)] * 2, atol=1e-12)
    np.testing.assert_allclose(
        linear.condition_number(a), np.linalg.cond(a), rtol=1e-10)

  def test_feedback_must_fit(self):
    with self.assertRaisesRegex(ValueError, '`feedback` must hold a matrix'):
      linear.train(jnp.ones((3, 2)), jnp.ones((3, 4)), [jnp.ones((5, 3))], .1)


class AlignmentTest(parameterized.TestCase):

  def test_chain_is_what_the_framework_aligns_with(self):
    net = bpjax.from_linen(nn.Sequential([
        nn.Dense(6), nn.tanh, nn.Dense(5), nn.tanh, nn.Dense(3)]))
    x, y = jax.random.normal(jax.random.key(0), (4, 7)), jnp.arange(4) % 3
    variables = net.init(jax.random.key(1), x)
    rule, loss = (bpjax.rules.direct_feedback_alignment(),
                  bpjax.losses.softmax_cross_entropy)
    feedback = rule.init(jax.random.key(2), net, variables, x)
    names = [f'layers_{i}' for i in (0, 2, 4)]
    weights, f = alignment.chain(variables['params'], feedback, names)
    found = alignment.weight_alignment(weights, f)
    measured = jax.jit(bpjax.alignment(net, loss, rule))(
        variables, feedback, x, y)
    np.testing.assert_allclose(
        found.layers, [measured[n].weight for n in names[1:]], atol=1e-6)
    targets = [np.asarray(t) for t in (f[1] @ f[0].T, f[1].T)]
    side = lambda arrays: np.concatenate([np.ravel(a) for a in arrays])
    a, b = side(weights[1:]), side(targets)
    np.testing.assert_allclose(
        found.total, a @ b / np.linalg.norm(a) / np.linalg.norm(b), atol=1e-6)

  def test_gradient_alignment_by_both_definitions(self):
    draw = np.random.default_rng(0)
    taught, exact = ([draw.standard_normal((6, n)) for n in (4, 3, 2)]
                     for _ in range(2))
    found = alignment.gradient_alignment(
        *([jnp.array(a) for a in s] for s in (taught, exact)))

    def mean(first, last):
      a, b = (np.concatenate(s[first:last], axis=1) for s in (taught, exact))
      return np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1)
                     / np.linalg.norm(b, axis=1))

    np.testing.assert_allclose(
        found.layers, [mean(i, i + 1) for i in range(3)], atol=1e-6)
    np.testing.assert_allclose(found.total, mean(0, 3), atol=1e-6)
    np.testing.assert_allclose(found.lower, mean(0, 2), atol=1e-6)

  def test_similarity_is_the_mean_of_all_pairs(self):
    rows = np.random.default_rng(0).standard_normal((5, 8))
    tree = {'a': jnp.array(rows[:, :6].reshape(5, 2, 3)),
            'b': jnp.array(rows[:, 6:])}
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(5) for j in range(i)]
    np.testing.assert_allclose(
        alignment.similarity(tree), np.mean(pairs), atol=1e-6)

  def test_shapes_must_fit(self):
    with self.assertRaisesRegex(ValueError, '`feedback` must hold F_l'):
      alignment.weight_alignment(
          [jnp.ones((3, 4)), jnp.ones((2, 3))], [jnp.ones((4, 2))])
    with self.assertRaisesRegex(ValueError, 'must have the same shapes'):
      alignment.gradient_alignment([jnp.ones((3, 4))], [jnp.ones((3, 5))])


class ConvolutionTest(float64.Float64TestCase):

  cases = parameterized.product(
      strides=((1, 1), (2, 1)), padding=('SAME', 'VALID', ((0, 2), (1, 0))))

  def reference(self, kernel, shape, strides, padding):
    """phi(W), entry by entry."""
    height, width, out = kernel.shape[0], kernel.shape[1], kernel.shape[3]
    if padding == 'SAME':
      padding = []
      for size, k, s in zip(shape, kernel.shape, strides):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding.append((total // 2, total - total // 2))
    elif padding == 'VALID':
      padding = ((0, 0), (0, 0))
    made = [(size + sum(p) - k) // s + 1 for size, p, k, s in zip(
        shape, padding, kernel.shape, strides)]
    matrix = np.zeros((*made, out, *shape))
    for i, j, a, b in np.ndindex(*made, height, width):
      y = i * strides[0] + a - padding[0][0]
      x = j * strides[1] + b - padding[1][0]
      if 0 <= y < shape[0] and 0 <= x < shape[1]:
        matrix[i, j, :, y, x, :] += kernel[a, b].T
    return matrix.reshape(made[0] * made[1] * out, -1), made

  @cases
  def test_dense_project_and_bound(self, strides, padding):
    draw = np.random.default_rng(0)
    shape, kernel = (5, 4, 2), draw.standard_normal((3, 2, 2, 3))
    matrix, made = self.reference(kernel, shape, strides, padding)
    how = {'strides': strides, 'padding': padding}
    np.testing.assert_allclose(
        convolution.dense(jnp.array(kernel), shape, **how), matrix, atol=1e-12)
    # Least squares over the matrices of single entries.
    basis = np.stack([
        self.reference(one.reshape(kernel.shape), shape, strides, padding)[
            0].ravel() for one in np.eye(kernel.size)])
    up = draw.standard_normal((4, *made, 3))
    down = draw.standard_normal((4, *shape))
    target = up.reshape(4, -1).T @ down.reshape(4, -1)
    best = np.linalg.lstsq(basis.T, target.ravel(), rcond=None)[0]
    projected = convolution.project(
        jnp.array(target), kernel.shape, shape, **how)
    np.testing.assert_allclose(projected.ravel(), best, atol=1e-12)
    np.testing.assert_allclose(
        convolution.uses(kernel.shape, shape, **how).ravel(),
        (basis**2).sum(1))
    cosine = lambda a, b: a.ravel() @ b.ravel() / (
        np.linalg.norm(a) * np.linalg.norm(b))
    found, bound = convolution.target_alignment(
        jnp.array(kernel), jnp.array(up), jnp.array(down), **how)
    np.testing.assert_allclose(found, cosine(matrix, target), atol=1e-12)
    np.testing.assert_allclose(
        bound, cosine(best @ basis, target), atol=1e-12)
    reached, _ = convolution.target_alignment(
        projected, jnp.array(up), jnp.array(down), **how)
    np.testing.assert_allclose(reached, bound, atol=1e-12)

  def test_shapes_must_fit(self):
    kernel = jnp.ones((3, 3, 2, 4))
    with self.assertRaisesRegex(ValueError, '`kernel` must have shape'):
      convolution.dense(kernel, (5, 5, 3))
    with self.assertRaisesRegex(ValueError, '`outputs` must have the shape'):
      convolution.correlate(
          jnp.ones((1, 5, 5, 3)), jnp.ones((1, 5, 5, 2)), kernel.shape)
    with self.assertRaisesRegex(ValueError, '`matrix` must have shape'):
      convolution.project(jnp.ones((3, 50)), kernel.shape, (5, 5, 2))


class ScriptsTest(absltest.TestCase):

  def test_the_library_does_without(self):
    done = subprocess.run(
        [sys.executable, '-c', 'import bpjax, sys; '
         'print({"bpjax.theory", "diffrax"} & set(sys.modules))'],
        env={**os.environ, 'PYTHONPATH': _ROOT}, capture_output=True,
        text=True, timeout=100, check=True)
    self.assertEqual(done.stdout.strip(), 'set()')

  def test_exit_codes_and_plots_of_committed_results(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    results = os.path.join(_ROOT, 'results', 'dynamics_linear.json')
    record = json.loads(open(results, encoding='utf-8').read())
    record['recursion'][0]['difference'] = 1e-3
    broken, picture = (os.path.join(folder, f) for f in ('a.json', 'a.png'))
    with open(broken, 'w', encoding='utf-8') as file:
      json.dump(record, file)
    for path, code in ((results, 0), (broken, 1), (folder, 2)):
      done = scripts_test.run(
          'dynamics_linear.py', f'--read={path}', f'--picture={picture}')
      self.assertEqual(done.returncode, code, done.stderr)
    self.assertIn('`read` must be a file', done.stderr)
    with open(picture, 'rb') as file:
      self.assertEqual(file.read(4), b'\x89PNG')

  def test_targets_are_trained_and_judged(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    output, picture = (os.path.join(folder, f) for f in ('a.json', 'a.png'))
    done = scripts_test.run(
        'dynamics_targets.py', '--epochs=10', '--alphas=1', '--betas=1',
        f'--output={output}', f'--picture={picture}')
    self.assertEqual(done.returncode, 1, done.stderr)  # Ten epochs are few.
    with open(output, encoding='utf-8') as file:
      record = json.load(file)
    for row in record['rows']:
      self.assertLess(row['mse'][-1], row['mse'][0])
      self.assertLess(abs(row['wa'][0]), .05)

  def test_committed_claims_are_whole(self):
    found = glob.glob(os.path.join(_ROOT, 'results', 'dynamics_*.json'))
    rows = []
    for path in found:
      with open(path, encoding='utf-8') as file:
        record = json.load(file)
      self.assertNotIn('/tmp', record['command'])
      rows += record['claims']
    for row in rows:
      self.assertEqual(
          set(row), {'claim', 'text', 'bound', 'value', 'holds'}, row)
    self.assertEqual({row['claim'] for row in rows}, set(range(1, 12)))


if __name__ == '__main__':
  absltest.main()
