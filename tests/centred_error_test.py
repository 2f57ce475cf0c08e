"""Feedback alignment with the batch's mean taken from the error, against numpy."""

from absl.testing import parameterized
import bpjax
import float64
import jax
import jax.numpy as jnp
import numpy as np
import reference
import zoo

LOSS = bpjax.losses.softmax_cross_entropy


def _centred(e):
  return e - e.mean(0, keepdims=True)


def _reference(params, feedback, x, y, names, centre, owned):
  """Dense layers with tanh: the updates, written out.

  `owned`: whether a unit's output is behind its tanh, where 'units' centres.
  """
  h, inputs, slopes = x, [], []
  for name in names:
    inputs.append(h)
    a = h @ params[name]['kernel'] + params[name]['bias']
    slopes.append(1 - np.tanh(a)**2)
    h = np.tanh(a)
  e = np.exp(a - a.max(1, keepdims=True))
  e = e / e.sum(1, keepdims=True) - np.eye(a.shape[1])[y]
  delta = e if centre == 'none' else _centred(e)
  grads = {}
  for i in reversed(range(len(names))):
    name = names[i]
    grads[name] = {'kernel': inputs[i].T @ delta / len(x),
                   'bias': delta.sum(0) / len(x)}
    if i:
      message = delta @ feedback[name]['kernel'].T
      if centre == 'units' and owned:
        delta = _centred(message) * slopes[i - 1]
      else:
        delta = message * slopes[i - 1]
        if centre == 'units':
          delta = _centred(delta)
  return grads


class CentredErrorTest(float64.Float64TestCase):

  @parameterized.product(
      centre=('none', 'output', 'units'), model=('plain', 'layered'))
  def test_equals_numpy(self, centre, model):
    model, x, y = zoo.inputs(model)
    net, variables, x = float64.setup(model, x)
    rule = bpjax.rules.feedback_alignment(centre=centre)
    feedback = float64.doubles(
        rule.init(jax.random.key(1), net, variables, x))
    _, (grads, _) = zoo.learn(rule, net)(variables, feedback, x, y)
    owned = isinstance(model, zoo.Layered)
    tree = lambda t, inner: {
        k: v['affine'] if inner and 'affine' in v else v
        for k, v in jax.tree.map(np.asarray, t).items()}
    names = (['Layer_0', 'Layer_1', 'Dense_0'] if owned
             else ['Dense_0', 'Dense_1', 'Dense_2'])
    wanted = _reference(
        tree(variables['params'], owned), tree(feedback, owned), np.asarray(x),
        np.asarray(y), names, centre, owned)
    self.assert_close(tree(grads, owned), wanted, 1e-14)
    if centre == 'output':
      np.testing.assert_allclose(wanted[names[-1]]['bias'], 0, atol=1e-15)

  def test_none_is_feedback_alignment_and_the_reference_is_not_the_others(self):
    model, x, y = zoo.inputs('plain')
    net, variables, x = float64.setup(model, x)
    make = bpjax.rules.feedback_alignment
    feedback = float64.doubles(make().init(jax.random.key(1), net, variables, x))
    learn = lambda centre: zoo.learn(make(centre=centre), net)(
        variables, feedback, x, y)[1][0]
    want = reference.feedback_alignment(
        variables['params'], feedback, np.asarray(x), np.asarray(y))
    self.assert_close(learn('none'), want, 1e-14)
    kernels = [np.asarray(learn(c)['Dense_0']['kernel'])
               for c in ('none', 'output', 'units')]
    for i in range(3):
      self.assertGreater(np.abs(kernels[i] - kernels[i - 1]).max(), 1e-4)

  def test_maps_are_centred_position_by_position(self):
    """An error that all examples share is sent nowhere."""
    model, x, _ = zoo.inputs('residual')
    net, variables, x = float64.setup(model, x)
    x = jnp.tile(x[:1], (4, 1, 1, 1))
    rule = bpjax.rules.feedback_alignment(centre='units')
    feedback = rule.init(jax.random.key(1), net, variables, x)
    _, (grads, _) = zoo.learn(rule, net)(
        variables, feedback, x, jnp.zeros(4, int))
    for leaf in jax.tree.leaves(grads):
      np.testing.assert_allclose(leaf, 0, atol=1e-15)

  def test_hidden_positions_stay_at_0_and_do_not_count(self):
    tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 9)
    mask = jnp.arange(5) < jnp.array([5, 3, 2])[:, None]
    model = bpjax.models.bert_encoder(
        3, depth=1, width=8, heads=2, hidden=8, vocabulary=9, length=5,
        dropout=0., pool='mean')
    net = bpjax.from_linen(model, mask='mask')
    other = jnp.where(mask, tokens, (tokens + 1) % 9)
    rule = bpjax.rules.feedback_alignment(centre='units')
    grads = []
    for ids in (tokens, other):
      x = bpjax.Inputs(ids, mask=mask)
      variables = float64.doubles(net.init(jax.random.key(0), x))
      feedback = float64.doubles(
          rule.init(jax.random.key(1), net, variables, x))
      grads.append(zoo.learn(rule, net)(
          variables, feedback, x, jnp.arange(3))[1][0])
    self.assert_close(*grads, 1e-12)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, '`centre` must be'):
      bpjax.rules.feedback_alignment(centre='batch')


if __name__ == '__main__':
  from absl.testing import absltest
  absltest.main()
