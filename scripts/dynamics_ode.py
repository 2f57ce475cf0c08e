r"""Align, then memorise, in equations: claims 1 to 3 of docs/dynamics.md.

  python scripts/dynamics_ode.py [--output=...] [--read=results/dynamics_ode.json]

Align, then memorise, Refinetti, d'Ascoli, Ohana and Goldt, 2021
(https://arxiv.org/abs/2011.12428). A student of two neurons learns a teacher of two
(erf, A = (1, 1)) online; `bpjax.theory.teacher_student` simulates it and solves the
ODEs of its overlaps.

  1. ODEs against simulation: N = 1000, rate .1, F = (1, .7), from small weights (.1,
     second layer .001). The initial weights are one draw, for which the ODEs' errors
     at five times are known to five digits; the simulations differ in their inputs.
  2. Where 20 runs from weights of deviation 1 end (rate .2, t = 2000): under direct
     feedback with F = (1, -1), and under backprop.
  3. cos(v, F) over time from 20 draws of small weights, with one normal draw of F:
     when it has its maximum, and when the error leaves its plateau. The plateau is
     where the error, once below half of its first value, falls slowest in log time;
     it has left it when it is half of that.

The figure shows 3: ODEs as lines, one simulation (N = 1000) as points.
Exits with 1 if a claim is out of its bounds.
"""

from __future__ import annotations

from absl import flags
from bpjax.theory import teacher_student as ts
import dynamics
from experiments import measurement
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

jax.config.update('jax_enable_x64', True)

_SEEDS = flags.DEFINE_integer('seeds', 10, 'Simulations of claim 1.', 2)
_STARTS = flags.DEFINE_integer('starts', 20, 'Draws of claims 2 and 3.', 2)
_SIZE = flags.DEFINE_integer('size', 1000, 'N, inputs of the networks.', 10)
_LAST = flags.DEFINE_integer('last', 2000, 'Time at which 2 and 3 end.', 50)
_TOLERANCE = flags.DEFINE_float(
    'tolerance', .01, 'Of simulation over ODE after the plateau.', 0.)

A = np.ones(2)
# One draw, N = 1000: the errors of Euler's method with steps of .02.
KNOWN = {20: .11838, 40: .02243, 60: .01469, 100: .01369, 200: .01288}
_CHECK = {'rate': .1, 'feedback': np.array([1., .7])}
_SOLVED = 1e-3  # Errors of runs that have left the plateau.
_AFTER = 40  # The first plateau's end in that run.


def start(seed: int, scale: float, v: float | None = None):
  """Initial weights, v and the teacher's weights: the teacher is drawn first."""
  draw = np.random.default_rng(seed)
  teacher = draw.standard_normal((2, _SIZE.value))
  weights = scale * draw.standard_normal((2, _SIZE.value))
  second = scale * draw.standard_normal(2) if v is None else np.full(2, v)
  return weights, second, teacher


def solve(method, starts, times, feedback, **options):
  """ODEs of several starts: overlaps [starts, times, ...] and errors."""
  weights, v, teachers = (jnp.asarray(np.stack(a)) for a in zip(*starts))

  @jax.jit
  @jax.vmap
  def run(weights, v, teacher):
    fixed = ts.Teacher(teacher @ teacher.T / len(teacher[0]), jnp.asarray(A))
    path = method(ts.overlaps(weights, v, teacher), fixed, times, feedback,
                  **options)
    return path, jax.vmap(ts.generalisation_error, (0, None))(path, fixed)

  path, errors = run(weights, v, teachers)
  return jax.tree.map(np.asarray, path), np.asarray(errors)


def simulate(keys, begin, times, feedback, rate):
  """Simulations of one start in float32: as `solve`, [keys, times, ...]."""
  weights, v, teacher = begin
  fixed = ts.Teacher(teacher @ teacher.T / len(teacher[0]), A)

  @jax.jit
  @jax.vmap
  def run(key):
    path = ts.simulate(
        key, jnp.asarray(weights, jnp.float32), v, teacher, A, times, feedback,
        rate=rate)
    path = jax.tree.map(lambda p: p.astype(float), path)
    return path, jax.vmap(ts.generalisation_error, (0, None))(path, fixed)

  path, errors = run(keys)
  return jax.tree.map(np.asarray, path), np.asarray(errors)


def cosine(v, f):
  """Of v [..., K] and F."""
  return v @ f / np.linalg.norm(v, axis=-1) / np.linalg.norm(f)


def check() -> dict:
  """Claim 1: the known digits, and simulations of the same start."""
  begin, times = start(0, .1, 1e-3), np.array([0, *KNOWN], float)
  _, euler = solve(ts.euler, [begin], times, dt=.02, **_CHECK)
  path, errors = solve(ts.integrate, [begin], times, **_CHECK)
  keys = jax.random.split(jax.random.key(0), _SEEDS.value)
  found, simulated = simulate(keys, begin, times, **_CHECK)
  return {
      'times': times.tolist(), 'euler': euler[0].tolist(),
      'ode': errors[0].tolist(), 'v': path.v[0].tolist(),
      'cosine': cosine(path.v[0], _CHECK['feedback']).tolist(),
      'simulated': simulated.mean(0).tolist(),
      'standard_error': (
          simulated.std(0, ddof=1) / len(simulated)**.5).tolist(),
      'simulated_v': found.v.mean(0).tolist()}


def ends() -> dict:
  """Claim 2: the signs of v, and which of the teacher's neurons each became."""
  starts = [start(100 + i, 1.) for i in range(_STARTS.value)]
  result = {}
  for rule, feedback in (('dfa', np.array([1., -1.])), ('bp', None)):
    path, errors = solve(
        ts.integrate, starts, [0., float(_LAST.value)], feedback, rate=.2)
    signs = np.sign(path.v[:, -1]).astype(int)
    matched = np.abs(path.r[:, -1]).argmax(-1)
    result[rule] = [
        {'signs': s.tolist(), 'matched': m.tolist(), 'error': float(e)}
        for s, m, e in zip(signs, matched, errors[:, -1])]
  return result


def phases() -> dict:
  """Claim 3: errors and overlaps over time, and one simulation beside them."""
  starts = [start(200 + i, .1) for i in range(_STARTS.value)]
  feedback = np.random.default_rng(1).standard_normal(2)
  times = np.concatenate([[0.], np.geomspace(.1, _LAST.value, 200)])
  result = {'times': times.tolist(), 'feedback': feedback.tolist()}
  keys = jax.random.split(jax.random.key(5), 1)
  few = times[::6]
  result['simulated_times'] = few.tolist()
  for rule, f in (('dfa', feedback), ('bp', None)):
    path, errors = solve(ts.integrate, starts, times, f, rate=.2)
    cosines = cosine(path.v, feedback)
    found, simulated = simulate(keys, starts[0], few, f, .2)
    result[rule] = {
        'error': errors[0].tolist(), 'cosine': cosines[0].tolist(),
        'v': path.v[0].tolist(), 'r': path.r[0].tolist(),
        'simulated_error': simulated[0].tolist(),
        'simulated_cosine': cosine(found.v[0], feedback).tolist(),
        'simulated_v': found.v[0].tolist(),
        'simulated_r': found.r[0].tolist(),
        'starts': [
            {'peak_time': float(times[c.argmax()]), 'peak': float(c.max()),
             'last': float(c[-1]), 'left_plateau': leaves_plateau(times, e),
             'last_error': float(e[-1])}
            for c, e in zip(cosines, errors)]}
  return result


def leaves_plateau(times, errors) -> float:
  """The time at which the error is half of its plateau's; the last if never."""
  slopes = np.gradient(np.log(np.maximum(errors[1:], 1e-12)), np.log(times[1:]))
  low = np.flatnonzero(errors[1:] < errors[0] / 2)
  high = errors[1:] > 1e-3  # Where it has converged it is flat as well.
  low = low[high[low]]
  if not low.size:
    return float(times[-1])
  plateau = low[np.abs(slopes[low]).argmin()]
  after = np.flatnonzero(
      (errors[1:] < errors[1:][plateau] / 2) & (np.arange(len(slopes)) > plateau))
  return float(times[1:][after[0]]) if after.size else float(times[-1])


def measure() -> dict:
  """All three."""
  return {'size': _SIZE.value, 'seeds': _SEEDS.value, 'check': check(),
          'ends': ends(), 'phases': phases()}


def judge(record: dict) -> list[dynamics.Claim]:
  """Tables, and what must hold."""
  found = record['check']
  table = measurement.table(
      f'The error of the check run, N = {record["size"]}, {record["seeds"]} '
      'simulations', 't', 'known', 'Euler, .02', 'diffrax', 'simulated',
      'simulated / ODE', 'cos(v, F)')
  claims, ratios = [], []
  for i, t in enumerate(found['times']):
    ratio = found['simulated'][i] / found['ode'][i]
    error = found['standard_error'][i] / found['ode'][i]
    known = KNOWN.get(int(t))
    table.add_row(
        f'{t:g}', f'{known:.5f}' if known else '', f'{found["euler"][i]:.5f}',
        f'{found["ode"][i]:.5f}',
        f'{found["simulated"][i]:.5f} ± {found["standard_error"][i]:.5f}',
        f'{ratio:.4f} ± {error:.4f}', f'{found["cosine"][i]:.4f}')
    if known and record['size'] == 1000:
      claims.append(dynamics.Claim(
          1, f'Euler minus the known error at t = {t:g}',
          found['euler'][i] - known, -6e-6, 6e-6))
    if t >= _AFTER:
      ratios.append(ratio - 1)
  measurement.show(table)
  claims.append(dynamics.Claim(
      1, f'largest |simulated / ODE - 1| from t = {_AFTER} on',
      float(np.abs(ratios).max()), high=_TOLERANCE.value))
  claims.append(dynamics.Claim(
      1, 'largest |v simulated - v of the ODE|, t = 40 on', float(np.abs(
          np.array(found['simulated_v']) - np.array(found['v']))[2:].max()),
      high=.002))
  claims.append(dynamics.Claim(
      1, 'largest |Euler / diffrax - 1|', float(np.abs(
          np.array(found['euler']) / np.array(found['ode']) - 1).max()),
      high=2e-3))
  ends, count = record['ends'], len(record['ends']['dfa'])
  claims.append(dynamics.Claim(
      2, f'runs of {count} with sign(v) = sign(F), DFA',
      sum(r['signs'] == [1, -1] for r in ends['dfa']), count, count))
  solved = {rule: [r for r in runs if r['error'] < _SOLVED]
            for rule, runs in ends.items()}
  # Two permutations of the teacher's neurons are left to direct feedback.
  for rule, low, high in (('dfa', 1, 2), ('bp', 4, np.inf)):
    claims.append(dynamics.Claim(
        2, 'distinct ends (signs, neurons matched) of the '
        f'{len(solved[rule])} runs that converged, {rule.upper()}',
        len({(*r['signs'], *r['matched']) for r in solved[rule]}), low, high))
  claims.append(dynamics.Claim(
      2, 'distinct signs of v among these, BP',
      len({tuple(r['signs']) for r in solved['bp']}), 4))
  runs = record['phases']['dfa']['starts']
  claims.append(dynamics.Claim(
      3, f'runs of {len(runs)} with the peak of cos(v, F) on the plateau',
      sum(r['peak_time'] < r['left_plateau'] for r in runs), len(runs)))
  claims.append(dynamics.Claim(
      3, 'peak of cos(v, F), mean', float(np.mean([r['peak'] for r in runs])),
      .99))
  claims.append(dynamics.Claim(
      3, 'last cos(v, F) minus its peak, mean',
      float(np.mean([r['last'] - r['peak'] for r in runs])), high=-.01))
  backprop = record['phases']['bp']['starts']
  print(f'peak of cos(v, F): {min(r["peak"] for r in runs):.3f} to '
        f'{max(r["peak"] for r in runs):.3f}; at the end: DFA '
        f'{min(r["last"] for r in runs):.3f} to '
        f'{max(r["last"] for r in runs):.3f}, BP '
        f'{min(r["last"] for r in backprop):.3f} to '
        f'{max(r["last"] for r in backprop):.3f}; error at the end: DFA up to '
        f'{max(r["last_error"] for r in runs):.2g}, BP up to '
        f'{max(r["last_error"] for r in backprop):.2g}')
  return claims


def draw(record: dict, path: str) -> None:
  """Error, cos(v, F), second layer and overlaps, in one figure."""
  phases = record['phases']
  times, few = (np.array(phases[k]) for k in ('times', 'simulated_times'))
  figure, axes = plt.subplots(
      2, 2, figsize=(10, 6.4), sharex=True, layout='constrained')
  for color, rule in (('C0', 'dfa'), ('C1', 'bp')):
    run = phases[rule]
    panels = (
        (axes[0, 0].loglog, 'error'), (axes[0, 1].semilogx, 'cosine'),
        (axes[1, 0].semilogx, 'v'), (axes[1, 1].semilogx, 'r'))
    for plot, name in panels:
      flat = lambda v: np.array(v)[1:].reshape(len(v) - 1, -1)
      lines = plot(times[1:], flat(run[name]), color=color)
      lines[0].set_label(rule.upper())
      plot(few[1:], flat(run[f'simulated_{name}']), '.', color=color)
  dfa = phases['dfa']['starts'][0]
  for axis in axes.flat:
    axis.axvspan(times[1], dfa['peak_time'], color='C2', alpha=.12, lw=0)
    axis.axvspan(dfa['left_plateau'], times[-1], color='C3', alpha=.12, lw=0)
    axis.grid(alpha=.25)
    axis.set_xlim(times[1], times[-1])
  for axis, label in zip(axes.flat, (
      r'generalisation error $\epsilon_g$', 'cos(v, F)', r'second layer $v_k$',
      r'overlaps $R_{km}$')):
    axis.set_ylabel(label)
  for f in phases['feedback']:
    axes[1, 0].axhline(f, color='0.6', ls=':')
  axes[0, 0].set_ylim(1e-6, 1)
  axes[0, 0].legend(loc='lower left')
  axes[0, 0].set_title('lines: ODE; points: simulation', fontsize='medium')
  axes[0, 1].set_title('green: align; red: memorise (DFA)', fontsize='medium')
  for axis in axes[1]:
    axis.set_xlabel('time, steps / N')
  dynamics.save(figure, path)


if __name__ == '__main__':
  dynamics.main('dynamics_ode', measure, judge, draw)
