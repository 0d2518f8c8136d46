"""Adversarial neuron pruning: prunes the neurons that misclassify clean images when their weights
change a little (Wu and Wang 2021)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import (
    Array,
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
from jaxbd.repairs.neurons import Neurons, find_neurons, prune, scale_neurons

PAPER = "https://arxiv.org/abs/2110.14430"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the pruning; defaults follow the released code.

    Attributes:
      epsilon: maximum relative change of a neuron's weight and bias.
      ascent_steps: number of ascent steps, of length epsilon / ascent_steps, that find the change.
      project: whether to clip the change to epsilon after each step; otherwise the random start and
        the steps together can reach 2 epsilon.
      clean_weight: alpha, weight of the loss without a change; the other loss has 1 - alpha.
      learning_rate: SGD's, on the masks; constant.
      momentum: SGD's.
      num_steps: length of the search for masks.
      batch_size: images per step.
      by: meaning of the dial: "threshold": prune neurons with a mask below it; "number": prune this
        share of all neurons, smallest masks first.
      most: end of the dial, which begins at 0 (prune nothing).
      points: number of values on the dial.
      max_drop: maximum loss of held-out accuracy from pruning, as a share (0.03 is three points).
      held_share: share of the clean images held out to measure accuracy.
      most_held: maximum number of held-out images.
    """

    epsilon: float = 0.4
    ascent_steps: int = 1
    project: bool = False
    clean_weight: float = 0.2
    learning_rate: float = 0.2
    momentum: float = 0.9
    num_steps: int = 2000
    batch_size: int = 128
    by: Literal["threshold", "number"] = "threshold"
    most: float = 0.95
    points: int = 20
    # Differs from released code: it shows the whole curve on test images and chooses nothing
    max_drop: float = 0.03
    held_share: float = 0.2
    most_held: int = 500

    def __post_init__(self):
        check_choices("anp", self)
        choose.check_held("anp", self.max_drop, self.held_share, self.most_held)
        if not 0 < self.epsilon < float("inf"):
            raise UserError(f"anp: epsilon must be above 0, got {self.epsilon}")
        if not 0 <= self.clean_weight <= 1:
            raise UserError(f"anp: clean_weight must be in [0, 1], got {self.clean_weight}")
        if not (0 < self.learning_rate < float("inf") and 0 <= self.momentum < 1):
            raise UserError("anp: learning_rate must be above 0 and momentum in [0, 1)")
        if not 0 < self.most <= 1 or self.points < 2:
            raise UserError("anp: most must be in (0, 1] and points at least 2")
        for name in ("ascent_steps", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"anp: {name} must be at least 1, got {getattr(self, name)}")


def quick(**changes: Any) -> Config:
    """A tenth of the steps on smaller batches, for small data sets and a CPU."""
    return Config(**{**dict(num_steps=200, batch_size=64), **changes})


def released(**changes: Any) -> Config:
    """The settings of the released code, but for the choice of the threshold and without
    augmentation."""
    return Config(**changes)


def paper(**changes: Any) -> Config:
    """As released, but with the change clipped to the box of the paper's inner problem."""
    return Config(**{**dict(project=True), **changes})


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32.
      masks: m of every neuron, in [0, 1].
      opt: SGD's momentum.
      sweep: accuracies along the dial.
      train, held: images to train on, and images held out.
      variables: the suspect's, which never change.
    """

    step: Array
    masks: Neurons
    opt: optax.OptState
    sweep: choose.Sweep
    train: Batch
    held: Batch
    variables: Variables


class Info(NamedTuple):
    """Losses [] in nats of the masked net without and with the adversarial change, and the mean
    mask []."""

    clean_loss: Array
    changed_loss: Array
    mask: Array


class Change(NamedTuple):
    """Relative changes of weights, delta, and of biases, xi."""

    weights: Neurons
    biases: Neurons


def make(problem: Problem, config: Config) -> Repair:
    """Prunes `problem.net`: first searches masks, then measures each value of the dial on held-out
    images.

    The automatic choice is the highest value of the dial within the budget.

    Raises: UserError from `init` when no neurons are found, see `neurons.find_neurons`.
    """
    net, values = problem.net, jnp.linspace(0, config.most, config.points)
    rule = optax.sgd(config.learning_rate, momentum=config.momentum)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        train, held = choose.split(key, data.clean, config.held_share, config.most_held, "anp")
        masks = find_neurons(variables, problem.classes)
        known = choose.start_sweep(net, variables, held, config.points)
        zero = jnp.zeros((), jnp.int32)
        state = State(zero, masks, rule.init(masks), known, train, held, dict(variables))
        # drivers donate the state, so no two of its leaves may share memory
        return jax.tree.map(jnp.copy, state)

    def step(key: Key, state: State, batch: None) -> tuple[State, Info]:
        del batch
        return search_masks(key, state, net, rule, config)

    def extract(state: State, dial: Array | None = None) -> Variables:
        if dial is None:
            _, known, before = state.sweep
            dial = values[choose.best_within(known, before, config.max_drop)]
        return prune(state.variables, state.masks, dial, config.by)

    search = Phase("mask", step, config.num_steps, Info, draws=None, rows=config.batch_size)
    phases = search, choose.sweep("prune", values, net, extract)
    return Repair(init, phases, extract, dial=values, needs=NEEDS)


def search_masks(
    key: Key, state: State, net: Net, rule: optax.GradientTransformation, config: Config
) -> tuple[State, Info]:
    """One step on the masks: finds the worst change for a batch, then descends the outer loss under
    it."""
    draw_key, change_key = jax.random.split(key)
    batch = draw.uniform(config.batch_size)(draw_key, state.train)
    change = find_change(change_key, state.masks, state.variables, net, batch, config)
    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(
        state.masks, change, state.variables, net, batch, config.clean_weight
    )
    updates, opt = rule.update(gradient, state.opt)
    moved = optax.apply_updates(state.masks, updates)
    masks: Any = jax.tree.map(lambda mask: jnp.clip(mask, 0, 1), moved)
    mean = jnp.concatenate(jax.tree.leaves(masks)).mean()
    return state._replace(step=state.step + 1, masks=masks, opt=opt), Info(parts[0], parts[1], mean)


def loss(
    masks: Neurons,
    change: Change,
    variables: Variables,
    net: Net,
    batch: Batch,
    clean_weight: float,
) -> tuple[Array, tuple[Array, Array]]:
    """alpha L(m w, b) + (1 - alpha) L((m + delta) w, (1 + xi) b), and both L; Wu and Wang 2021, the
    outer problem. BatchNorm uses batch moments, as released."""
    clean = _cross_entropy(scale_neurons(variables, masks), net, batch)
    changed = changed_loss(change, masks, variables, net, batch)
    return clean_weight * clean + (1 - clean_weight) * changed, (clean, changed)


def changed_loss(
    change: Change, masks: Neurons, variables: Variables, net: Net, batch: Batch
) -> Array:
    """L((m + delta) w, (1 + xi) b) [] in nats."""
    weights = jax.tree.map(jnp.add, masks, change.weights)
    biases = jax.tree.map(lambda xi: 1 + xi, change.biases)
    return _cross_entropy(scale_neurons(variables, weights, biases), net, batch)


def find_change(
    key: Key, masks: Neurons, variables: Variables, net: Net, batch: Batch, config: Config
) -> Change:
    """Finds a change that raises `changed_loss`: starts at `draw_change` and steps along the sign
    of the gradient (the inner problem)."""
    change = draw_change(key, masks, config.epsilon)
    length = config.epsilon / config.ascent_steps
    for _ in range(config.ascent_steps):
        gradient = jax.grad(changed_loss)(change, masks, variables, net, batch)
        change = jax.tree.map(lambda v, g: v + length * jnp.sign(g), change, gradient)
        if config.project:
            change = jax.tree.map(lambda v: jnp.clip(v, -config.epsilon, config.epsilon), change)
    return change


def draw_change(key: Key, masks: Neurons, epsilon: float) -> Change:
    """Draws changes from U(-epsilon, epsilon) in the shapes of `masks`."""
    leaves, tree = jax.tree.flatten(Change(masks, masks))
    keys = jax.random.split(key, len(leaves))
    one = lambda key, leaf: jax.random.uniform(key, leaf.shape, leaf.dtype, -epsilon, epsilon)
    return jax.tree.unflatten(tree, map(one, keys, leaves))


def _cross_entropy(variables: Variables, net: Net, batch: Batch) -> Array:
    logits, _ = net.apply(variables, batch.images, train=True)
    return losses.cross_entropy(logits, batch.labels)
