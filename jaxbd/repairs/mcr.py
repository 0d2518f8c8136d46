"""Mode connectivity repair: trains a curve of low loss between the suspect and its fine-tuned copy,
and takes the net as far from both ends as accuracy allows (Zhao et al. 2020)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Key,
    Need,
    Net,
    Phase,
    Problem,
    Repair,
    RepairData,
    UserError,
    Variables,
    check_choices,
)
from jaxbd.data import draw
from jaxbd.repairs import choose
from jaxbd.repairs.restate import restate

PAPER = "https://arxiv.org/abs/2005.00060"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the curve; defaults follow the released code, whose 100 epochs of 2,500 images
    are 2,000 steps here.

    Attributes:
      other: the curve's second end: a "fine-tuned" copy of the suspect, or the "suspect" again
        (Yan et al. 2023).
      finetune_learning_rate: SGD's, for the copy; falls along a cosine to zero.
      finetune_steps: length of the fine-tuning.
      learning_rate: SGD's, for the curve; constant for the first half, then falls linearly to a
        hundredth at 90 % of the steps.
      momentum: SGD's, for both.
      weight_decay: for the curve, half of it times the squared norm of the drawn net's weights is
        added to the loss; for the copy it is SGD's.
      num_steps: length of the curve's training.
      batch_size: images per step.
      points: number of values of t on the dial, from 0 (the suspect) to 1 (the second end).
      max_drop: maximum loss of held-out accuracy, as a share.
      held_share: share of the clean images held out to measure accuracy.
      most_held: maximum number of held-out images.
    """

    # Differs from paper: there both ends are given, two nets with the backdoor
    other: Literal["fine-tuned", "suspect"] = "fine-tuned"
    finetune_learning_rate: float = 0.01
    finetune_steps: int = 2000
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    num_steps: int = 2000
    batch_size: int = 128
    points: int = 11
    # Differs from released code: it shows the whole curve on test images and chooses nothing
    max_drop: float = 0.03
    held_share: float = 0.2
    most_held: int = 500

    def __post_init__(self):
        check_choices("mcr", self)
        choose.check_held("mcr", self.max_drop, self.held_share, self.most_held)
        for name in ("finetune_learning_rate", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"mcr: {name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < float("inf")):
            raise UserError("mcr: momentum must be in [0, 1) and weight_decay at least 0")
        for name in ("finetune_steps", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"mcr: {name} must be at least 1, got {getattr(self, name)}")
        if self.points < 3:
            raise UserError(f"mcr: points must be at least 3, got {self.points}")


def quick(**changes: Any) -> Config:
    """Fewer and larger steps on smaller batches, for small data sets and a CPU."""
    settings = dict(
        finetune_steps=200,
        num_steps=300,
        learning_rate=0.05,
        finetune_learning_rate=0.05,
        batch_size=64,
    )
    return Config(**{**settings, **changes})


def released(**changes: Any) -> Config:
    """The settings of the released code, but for the choice of t and without augmentation."""
    return Config(**changes)


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32.
      bend: theta, params of the curve's control point.
      other: w2, variables of the second end; the suspect's until it is fine-tuned.
      copy_opt, opt: SGD's states for the second end, and for the bend.
      sweep: accuracies along the dial.
      train, held: images to train on, and images held out.
      variables: the suspect's, which never change; their params are w1.
    """

    step: Array
    bend: ArrayTree
    other: Variables
    copy_opt: optax.OptState
    opt: optax.OptState
    sweep: choose.Sweep
    train: Batch
    held: Batch
    variables: Variables


class Info(NamedTuple):
    """Loss [] in nats, without weight decay, and accuracy [] on the batch as drawn."""

    loss: Array
    accuracy: Array


def make(problem: Problem, config: Config) -> Repair:
    """The curve for `problem.net`: trains the second end, then the bend, then measures the accuracy
    along the curve on held-out images.

    The automatic choice is the t within the budget that is nearest to the middle of the curve.
    """
    net, values = problem.net, jnp.linspace(0, 1, config.points)
    rules = copy_rule(config), optax.sgd(falling_rate(config), momentum=config.momentum)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        train, held = choose.split(key, data.clean, config.held_share, config.most_held, "mcr")
        variables = {"batch_stats": {}, **variables}
        known = choose.start_sweep(net, variables, held, config.points)
        params = variables["params"]
        opts = rules[0].init(params), rules[1].init(params)
        zero = jnp.zeros((), jnp.int32)
        state = State(zero, params, variables, *opts, known, train, held, variables)
        # drivers donate the state, so no two of its leaves may share memory
        return jax.tree.map(jnp.copy, state)

    def fine_tune(key: Key, state: State, batch: None) -> tuple[State, Info]:
        del batch
        return train_copy(key, state, net, rules[0], config)

    def bend(key: Key, state: State, batch: None) -> tuple[State, Info]:
        del batch
        return train_bend(key, state, net, rules[1], config)

    def extract(state: State, dial: Array | None = None) -> Variables:
        if dial is None:
            _, known, before = state.sweep
            dial = values[choose.nearest_middle(known, before, config.max_drop)]
        return at(state, dial, net)

    half = lambda one, two: (one + two) / 2
    ends = lambda state: (state.variables["params"], state.other["params"])
    # the bend starts half-way between both ends
    begin = lambda state: state._replace(bend=jax.tree.map(half, *ends(state)))
    rows = config.batch_size
    copy = Phase("fine-tune", fine_tune, config.finetune_steps, Info, draws=None, rows=rows)
    curve = Phase("curve", bend, config.num_steps, Info, draws=None, rows=rows, begin=begin)
    phases = copy, curve, choose.sweep("measure", values, net, extract)
    if config.other == "suspect":
        phases = phases[1:]
    return Repair(init, phases, extract, dial=values, needs=NEEDS)


def copy_rule(config: Config) -> optax.GradientTransformation:
    """SGD for the second end; weight decay is added to the gradient before momentum."""
    rate = optax.cosine_decay_schedule(config.finetune_learning_rate, config.finetune_steps)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=config.momentum))


def train_copy(
    key: Key, state: State, net: Net, rule: optax.GradientTransformation, config: Config
) -> tuple[State, Info]:
    """One fine-tuning step on the second end."""
    batch = draw.uniform(config.batch_size)(key, state.train)
    other, opt, loss, accuracy = losses.descend(net, rule, state.other, state.copy_opt, batch)
    return state._replace(step=state.step + 1, other=other, copy_opt=opt), Info(loss, accuracy)


def train_bend(
    key: Key, state: State, net: Net, rule: optax.GradientTransformation, config: Config
) -> tuple[State, Info]:
    """One step on the curve's bend, at one t drawn from U(0, 1) for the whole batch."""
    draw_key, t_key = jax.random.split(key)
    t = jax.random.uniform(t_key, (), jax.tree.leaves(state.bend)[0].dtype)
    batch = draw.uniform(config.batch_size)(draw_key, state.train)
    (_, parts), gradient = jax.value_and_grad(curve_loss, has_aux=True)(
        state.bend, t, state, net, batch, config.weight_decay
    )
    updates, opt = rule.update(gradient, state.opt)
    moved = optax.apply_updates(state.bend, updates)
    return state._replace(step=state.step + 1, bend=moved, opt=opt), Info(*parts)


def falling_rate(config: Config) -> Callable[[Any], Any]:
    """The curve's learning rate as a function of the step."""

    def rate(step: Array) -> Array:
        done = step / config.num_steps
        share = jnp.clip(1 - (done - 0.5) / 0.4 * 0.99, 0.01, 1)
        return config.learning_rate * share

    return rate


def point(one: ArrayTree, bend: ArrayTree, two: ArrayTree, t: Array) -> ArrayTree:
    """phi(t) = (1 - t)^2 w1 + 2 t (1 - t) theta + t^2 w2, the quadratic Bezier curve (Zhao et al.
    2020, section 3; Garipov et al. 2018)."""
    weights = (1 - t) ** 2, 2 * t * (1 - t), t**2
    mix = lambda a, b, c: (weights[0] * a + weights[1] * b + weights[2] * c).astype(a.dtype)
    return jax.tree.map(mix, one, bend, two)


def curve_loss(
    bend: ArrayTree, t: Array, state: State, net: Net, batch: Batch, weight_decay: float
) -> tuple[Array, tuple[Array, Array]]:
    """(L(phi(t)) + weight_decay / 2 ||phi(t)||^2, (L [] in nats, accuracy [])). BatchNorm uses
    batch moments."""
    params = point(state.variables["params"], bend, state.other["params"], t)
    entropy, (logits, _) = losses.classification(params, state.variables, net, batch)
    squares = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
    accuracy = (logits.argmax(-1) == batch.labels).mean()
    return entropy + weight_decay / 2 * squares, (entropy, accuracy)


def at(state: State, t: Array, net: Net) -> Variables:
    """The net at t, with BatchNorm's moments re-estimated on the training images. At 0 it is the
    unchanged suspect."""
    own, other = state.variables, state.other
    moved = {**own, "params": point(own["params"], state.bend, other["params"], t)}
    stats = restate(net, moved, state.train.images)
    keep = lambda mine, new: jnp.where(t == 0, mine, new)
    return {**moved, "batch_stats": jax.tree.map(keep, own["batch_stats"], stats)}
