"""The types that a rule is written in. Their docstrings are the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple, Protocol, TYPE_CHECKING

import jax

Array = jax.Array
Key = jax.Array
Tree = Any
Loss = Callable[[Any, Any], Array]

JOINT = 'Joint'  # The kind of what owns a segment that several units share.
BOUNDARY = 'Boundary'  # The kind, and in lower case the name, of a boundary.
# What the engines keep in collections beside the model's own.
FEEDBACK, PORTS, PROBES = 'bpjax_feedback', 'bpjax_ports', 'bpjax_probes'
TAPS, NOISE, BLOCKS = 'bpjax_taps', 'bpjax_noise', 'bpjax_blocks'
TERMS = 'bpjax_terms'  # Of a sum whose gradient is the update.
TOKENS = 'bpjax_tokens'  # Block -> a zero that hands on the error of its output.
PARTICLES = 'particles'  # Equilibrium propagation's, which a user may pass.
COLLECTIONS = (
    FEEDBACK, PORTS, PROBES, TAPS, NOISE, BLOCKS, TERMS, TOKENS, PARTICLES)
# Collections of models that never change, so that a unit may hold them: they
# are inputs of the unit behind those of its call.
CONSTANTS = ('perturbation',)
# Kind of the marks at what `bpjax.nn.rectified` takes, and the collection of
# which entries are active.
ACTIVE = 'bpjax_active'


class Activations(NamedTuple):
  """What one unit saw and made on the way forward.

  Attributes:
    inputs: the unit's array inputs, each `[batch, ...]`; constants that it
      holds (`CONSTANTS`) come last, `[1, ...]`.
    pre: the output of the unit's affine operation, `[batch, ..., features]`.
    out: the unit's output; the same array as `pre` unless the unit owns its
      nonlinearity.
  """
  inputs: tuple[Array, ...]
  pre: Array
  out: Array


class Signal(NamedTuple):
  """What reaches one unit on the way back.

  Attributes:
    teaching: what arrives at the unit's output in place of the gradient
      `d(sum_n l_n)/d(out)`, in the shape of `out`. Per example: it was never
      divided by the batch size.
    error: the error of the unit's port: `d(sum_n l_n)/d(output)` in the shape
      of the model's output, or what another unit answered as its `source`, in
      the shape of that unit's output; None for a unit without a port.
    key: the unit's own random key for this step (None for a rule that does not
      say `stochastic=True`).
    divisor: what the engine will divide the unit's updates by (the number of
      losses, or 1): a term that is not a sum over examples is multiplied by it.
    target: the labels `y` as they were given to `learn`; None where there are
      none (`rule.bind`).
    step: how many steps were taken before this one, for a rule that counts them
      (`counts=True`); else None.
    mask: bool `[batch, positions]`, True where a position is real, where the
      model was given one (`from_linen(mask=...)`); else None. The exact VJP of a
      masked model brings nothing to the other positions; what a rule makes
      beside it must be 0 there (`bpjax.networks.examples.only_real`).
  """
  teaching: Array
  error: Array | None
  key: Key | None
  divisor: int = 1
  target: Any = None
  step: Array | None = None
  mask: Array | None = None


class Credit(NamedTuple):
  """What a rule answers for one unit. Sums over examples, gradient-signed.

  Attributes:
    params: an update for each parameter of the unit, in its shape; None: no
      update.
    inputs: the message to each input, in its shape; None for an integer input.
      A tuple of the length of `Activations.inputs`; None: no message.
    feedback: an update for the unit's feedback in its structure, or None where
      the feedback is fixed.
    source: the unit's own error, in the shape of its output, for the units
      whose ports name this one; None where none does.
  """
  params: Tree | None = None
  inputs: tuple[Array | None, ...] | None = None
  feedback: Tree | None = None
  source: Array | None = None


class Aux(NamedTuple):
  """The second part of the value that `learn` returns.

  Attributes:
    output: the model's output.
    model_state: the model's own collections (`batch_stats`, ...) after this
      step; {} for a model without any.
    feedback: the feedback, with what the rule keeps there besides what is
      trained (a count of steps, matrices that are drawn anew) as the next step
      needs it; the very same where a rule keeps nothing. Updates are added to
      this.
  """
  output: Any
  model_state: Mapping[str, Tree]
  feedback: Tree | None = None


@dataclasses.dataclass(frozen=True)
class UnitInfo:
  """What is known of a unit before any data is seen.

  Attributes:
    name: the path of its module, joined with `/`.
    kind: the class of its affine operation, such as `Dense` or `Conv`;
      `Boundary` for the output of a module, and `Joint` for the segment that
      several units share, units without parameters.
    inputs: shape and dtype of each array input, batch axis included.
    pre: shape and dtype of the affine operation's output.
    out: shape and dtype of the unit's output.
    params: shape and dtype of each parameter.
    net_output: shape and dtype of the model's output (an error has them too).
    is_output: whether this is the last unit that the model calls.
    sends: whether anything trainable lies upstream, so that the unit's message
      is of use. A unit that reads the data alone sends nothing and needs no
      feedback.
    taught: whether an error can reach the unit at all.
    calls: how often the model calls the unit in one forward pass.
    positionwise: whether the unit does the same to every position of its
      input's middle axes (Dense, DenseGeneral), so that its features are the
      last axes alone.
    feature_axes: the number of trailing input axes that are its features.
    summed_axes: of an Einsum, the axes of its kernel that are summed over,
      counted from the last; None for another operation.
    owns_activation: whether the unit holds its nonlinearity.
    reads: for each input, the unit whose output it is, with nothing between
      but a reshape, pooling, a mask (dropout) or a constant factor; or None.
    readers: the units whose first input is this unit's output, in that sense.
    outs: shape and dtype of every unit's output, in the order of the calls.
    pres: those of the outputs of affine operations, boundaries among the units.
    all_readers: unit or boundary -> its readers, for all of the network.
    block: the block whose loss teaches the unit first, under `bpjax.local`;
      '' where that is the model's own.
    operation: the primitive of the affine operation, such as `dot_general`.
    given_examples: for each input where its examples lie, see
      `bpjax.networks.examples`; None: on the first axis.
    examples: where they lie in `out`.
    by_example: whether each example has weights of its own (those of an expert
      that the data picks), so that the operation has one batch size.
    joint: the name of the unit that owns what follows this one and others, where
      they share a segment: what arrives here is this one's error already.
    weights_as_kept: whether its weights are a parameter as it is kept, which no
      other unit reads: not transposed, normalised or tied.
  """
  name: str
  kind: str
  inputs: tuple[jax.ShapeDtypeStruct, ...]
  pre: jax.ShapeDtypeStruct
  out: jax.ShapeDtypeStruct
  params: Tree
  net_output: Any
  is_output: bool
  sends: bool
  taught: bool
  calls: int
  positionwise: bool
  feature_axes: int
  summed_axes: tuple[int, ...] | None = None
  owns_activation: bool = False
  reads: tuple[str | None, ...] = ()
  readers: tuple[str, ...] = ()
  outs: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(
      default_factory=dict)
  pres: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(
      default_factory=dict)
  all_readers: Mapping[str, tuple[str, ...]] = dataclasses.field(
      default_factory=dict)
  block: str = ''
  operation: str = ''
  given_examples: tuple[tuple[int, int, int] | None, ...] = ()
  examples: tuple[int, int, int] | None = None
  by_example: bool = False
  joint: str = ''
  weights_as_kept: bool = True

  def place(self, i: int) -> tuple[int, int, int] | None:
    """Where the examples of an input lie, see `given_examples`."""
    return self.given_examples[i] if self.given_examples else None

  if not TYPE_CHECKING:  # Which knows the fields.

    def __getattr__(self, name):
      known = ', '.join(f.name for f in dataclasses.fields(UnitInfo))
      raise AttributeError(f'the info of a unit has no {name!r}; it has {known}')


class _Recorded(UnitInfo):
  """Remembers in `_read` which fields were read, with their values."""

  def __getattribute__(self, name):
    value = super().__getattribute__(name)
    if name in UnitInfo.__dataclass_fields__:
      super().__getattribute__('__dict__')['_read'][name] = value
    return value


def recorded(info: UnitInfo) -> tuple[UnitInfo, dict[str, Any]]:
  """A copy of an info, and what is read of it from now on: field -> value."""
  copy, read = object.__new__(_Recorded), {}
  vars(copy).update(vars(info), _read=read)
  read.clear()
  return copy, read


class Delta(NamedTuple):
  """A signal before the unit's activation, and what the activation itself owns.

  Attributes:
    pre: the signal at the affine operation's output, in the shape of `pre`.
    params: the activation's own exact parameter updates (a norm's scale inside
      the unit, say), or None.
    inputs: what passes the affine operation by (a skip connection inside the
      unit), one entry per input, or None.
  """
  pre: Array
  params: Tree | None = None
  inputs: tuple[Array | None, ...] | None = None


class Unit(Protocol):
  """The smallest piece whose backward pass a rule replaces.

  A rule asks the unit for vector-Jacobian products instead of writing outer
  products: that is what lets one rule serve dense, convolutional and attention
  layers, with or without sharding.
  """
  info: UnitInfo

  def affine(self, params: Tree, inputs: tuple[Array, ...]) -> Array:
    """The affine operation's output `pre`."""

  def activation(
      self, params: Tree, pre: Array, inputs: tuple[Array, ...]) -> Array:
    """What follows the affine operation inside the unit; identity if nothing."""

  def delta(
      self, params: Tree, activations: Activations, teaching: Array) -> Delta:
    """The exact VJP of the unit's activation: `teaching` brought before it."""

  def params_vjp(
      self, params: Tree, activations: Activations, delta: Delta) -> Tree:
    """The exact VJP with respect to the parameters (`x^T delta` and so on)."""

  def inputs_vjp(
      self, params: Tree, weights: Tree, activations: Activations,
      delta: Delta) -> tuple[Array | None, ...]:
    """The VJP with respect to the inputs, with `weights` for the parameters."""


class BoundUnit(Protocol):
  """A unit with its parameters and activations, as `backward` may take it."""
  info: UnitInfo
  params: Tree
  inputs: tuple[Array, ...]
  pre: Array
  out: Array

  def delta(self, teaching: Array) -> Delta:
    """The exact VJP of the unit's activation: `teaching` brought before it."""

  def grad(self, delta: Delta) -> Tree:
    """The exact VJP with respect to the parameters (`x^T delta` and so on)."""

  def send(self, delta: Delta, weights: Tree) -> tuple[Array | None, ...]:
    """The VJP with respect to the inputs, with `weights` for the parameters."""

  def affine(self, params: Tree, inputs: tuple[Array, ...]) -> Array:
    """The affine operation at other parameters or inputs."""

  def activation(self, pre: Array) -> Array:
    """What follows the affine operation, at another pre-activation."""


class Network(Protocol):
  """A model as a pure function, seen as units: `from_linen` and the others."""

  @property
  def units(self) -> Any:
    """Name -> unit, and what keeps its exact derivative; printed as a table."""

  def init(self, key: Key, x: Any) -> dict[str, Any]:
    """The model's variables."""

  def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
    """The model's output in evaluation mode."""

  def survey(self, variables: Mapping[str, Any], x: Any) -> Any:
    """What is known of the units for inputs of this shape; traced once."""

  def run(
      self, variables: Mapping[str, Any], x: Any, visit: Callable[..., Any],
      key: Key | None, mutable: Any) -> tuple[Any, dict[str, Any]]:
    """Runs the model in training mode; `visit` answers for every unit's call."""


class Rule(Protocol):
  """A learning rule, as users and the launcher see it."""
  name: str

  def init(
      self, key: Key, net: Any, variables: Mapping[str, Any], x: Any
  ) -> dict[str, Any]:
    """Draws the rule's feedback; refuses a network that it cannot train."""

  def value_and_grad(self, net: Any, loss: Loss) -> Callable[..., Any]:
    """Makes `learn(variables, feedback, x, y, key=None)`.

    It returns `((loss, aux), (grads, feedback_grads))`: the mean loss, an `Aux`,
    and updates in the structures of `variables['params']` and `feedback`.
    """

  def trainable(self, feedback: Tree) -> Tree:
    """A tree of bools: which feedback an optimiser may touch."""

  def predict(self, net: Any) -> Callable[..., Any]:
    """`(variables, x) -> output` in evaluation mode."""

  def units(
      self, net: Any, variables: Mapping[str, Any], x: Any) -> dict[str, str]:
    """Unit -> the rule that trains it; parameter -> where it is exact."""


class Engine(Rule, Protocol):
  """A rule with what the other parts of the library ask of it."""

  def check(self, survey: Any) -> None:
    """Raises a ValueError for a network that the rule cannot train."""

  def infos(
      self, net: Any, variables: Mapping[str, Any], x: Any
  ) -> Mapping[str, UnitInfo]:
    """Unit -> what is known of it before any data."""

  def differentiate(self, *args: Any, **kwargs: Any) -> Any:
    """One step's learning: summed updates, and the number of losses."""


class Alignment(NamedTuple):
  """How close one unit's learning is to backprop. Cosines, in [-1, 1].

  A cosine is NaN where one of its sides is not there or is exactly zero, and where
  backprop's own gradient is less than 1e-7 of the largest unit's.

  Attributes:
    teaching: mean over examples of the cosine between the rule's teaching
      signal at the unit's output and backprop's (of a boundary, between what
      it hands down and backprop's).
    teaching_std: its standard deviation over examples.
    update: cosine between the rule's update of the unit's parameters and
      backprop's, flattened together; NaN for a boundary.
    weight: cosine between the unit's weights and what the rule aligns them
      with (its feedback for feedback alignment); NaN where nothing is defined.
    backprop_norm: the norm of backprop's own mean gradient of the unit's
      parameters (of a boundary, of its teaching signals, by the number of rows):
      a cosine with next to nothing says nothing.
  """
  teaching: Array
  teaching_std: Array
  update: Array
  weight: Array
  backprop_norm: Array
