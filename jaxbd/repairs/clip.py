"""Clip: an upper bound on every channel's activation, as tight as clean accuracy allows; needs no
trigger (Cheng et al. 2024)."""

import dataclasses
from typing import NamedTuple

import flax.traverse_util
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
)
from jaxbd.images import to_float
from jaxbd.repairs import bna_layers, choose

PAPER = "https://arxiv.org/abs/2407.11372"
NEEDS: frozenset[Need] = frozenset({"clean"})
LEAST_STD = 1e-5
"""Added to a deviation that is a unit, so that a dead channel has one."""
CHUNK = 64
"""Images pushed through the net at a time where nothing is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the bounds; schedule and start follow the paper.

    Attributes:
      max_drop: points of held-out accuracy, as a share, that the bounds may cost (paper: 0.03).
      first_reach: where bounds start, in standard deviations above the clean mean.
      learning_rate: of Adam, in the same unit.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      first_cost: c, weight of the mean bound, at the start.
      cost_multiplier: c grows by it after `patience` steps in a row within the budget, and shrinks
        by its power 1.5 after as many beyond it.
      patience: steps in a row after which c changes.
      held_share: share of the clean images that measures accuracy and trains nothing.
      most_held: at most so many images of those.
      batch_size: images of a step.
      num_steps: length of the run.
    """

    max_drop: float = 0.02
    first_reach: float = 4.0
    # Differs from paper: 1e-3 in units of the activations; relative steps suit every layer
    learning_rate: float = 0.02
    b1: float = 0.5
    b2: float = 0.9
    first_cost: float = 1e-3
    cost_multiplier: float = 2.0
    patience: int = 5
    held_share: float = 0.2
    most_held: int = 500
    batch_size: int = 64
    num_steps: int = 300

    def __post_init__(self):
        if not 0 <= self.max_drop < 1:
            raise UserError(f"clip: max_drop must be in [0, 1), got {self.max_drop}")
        if not 0 < self.held_share < 1:
            raise UserError(f"clip: held_share must be in (0, 1), got {self.held_share}")
        for name in ("first_reach", "learning_rate", "first_cost"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"clip: {name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.cost_multiplier > 1):
            raise UserError("clip: need b1 and b2 in [0, 1) and cost_multiplier above 1")
        for name in ("patience", "most_held", "batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"clip: {name} must be at least 1, got {getattr(self, name)}")


Bounds = dict[str, Array]
"""Layer -> upper bounds [C], in standard deviations above the mean of its clean activations."""


class Moments(NamedTuple):
    """Of one layer's clean activations: mean and standard deviation [C]."""

    mean: Array
    std: Array


class State(NamedTuple):
    """What the repair needs to go on.

    Attributes:
      step: [] int32.
      reach: the current bounds; opt: their Adam state.
      best: the tightest bounds so far that kept accuracy; the first ones before that.
      best_size: [] mean of `best`; inf as long as no step was within the budget.
      cost: [] c.
      good, bad: [] int32, consecutive steps within, and beyond, the budget.
      least_accuracy: [] on `held`, that the budget leaves.
      moments: by layer.
      train, held: clean images (uint8 or float) and labels; those that train, those that measure.
      variables: the suspect's.
    """

    step: Array
    reach: Bounds
    opt: optax.OptState
    best: Bounds
    best_size: Array
    cost: Array
    good: Array
    bad: Array
    least_accuracy: Array
    moments: dict[str, Moments]
    train: Batch
    held: Batch
    variables: Variables


class Info(NamedTuple):
    """Cross-entropy, mean bound, held-out accuracy under the bounds before the step, c; all []."""

    loss: Array
    size: Array
    accuracy: Array
    cost: Array


def make(problem: Problem, config: Config) -> Repair:
    """Bounds for `problem.net`. No weight is touched: what `extract` adds is the collection
    `bounds`.

    Raises: UserError when the net shows no layers (at `init` where that takes a trace).
    """
    net = problem.net
    if net.outputs is None:
        raise UserError(
            "clip: a net made from a bare apply function shows no layers to clip; use another"
            " repair"
        )
    rule = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        train, held = choose.split(key, data.clean, config.held_share, config.most_held, "clip")
        moments = measure_moments(net, variables, train.images)
        reach = {layer: jnp.full_like(m.mean, config.first_reach) for layer, m in moments.items()}
        zero = jnp.zeros((), jnp.int32)
        accuracy = choose.measure_accuracy(net, variables, held)
        cost = jnp.full_like(accuracy, config.first_cost)
        size = jnp.full_like(accuracy, jnp.inf)
        least = accuracy - config.max_drop
        state = State(
            zero,
            reach,
            rule.init(reach),
            reach,
            size,
            cost,
            zero,
            zero,
            least,
            moments,
            train,
            held,
            dict(variables),
        )
        # drivers donate the state, so no two of its leaves may share memory
        return jax.tree.map(jnp.copy, state)

    def step(key: Key, state: State, batch: None) -> tuple[State, Info]:
        del batch
        rows = jax.random.randint(key, (config.batch_size,), 0, len(state.train.labels))
        drawn = Batch(to_float(state.train.images[rows]), state.train.labels[rows])
        grad = jax.value_and_grad(loss, has_aux=True)
        (_, entropy), gradient = grad(state.reach, state, net, drawn)
        accuracy = choose.measure_accuracy(net, bound(state, state.reach), state.held)
        size = mean_bound(state.reach)
        is_good = accuracy >= state.least_accuracy
        better = is_good & (size < state.best_size)
        updates, opt = rule.update(gradient, state.opt)
        keep = lambda now, before: jnp.where(better, now, before)
        state = state._replace(
            step=state.step + 1,
            reach=optax.apply_updates(state.reach, updates),
            opt=opt,
            best=jax.tree.map(keep, state.reach, state.best),
            best_size=keep(size, state.best_size),
            **_schedule(state, is_good, config),
        )
        return state, Info(entropy, size, accuracy, state.cost)

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return bound(state, state.best)

    phase = Phase("clip", step, config.num_steps, Info, draws=None, rows=config.batch_size)
    return Repair(init, (phase,), extract, needs=NEEDS)


def loss(reach: Bounds, state: State, net: Net, batch: Batch) -> tuple[Array, Array]:
    """(cross-entropy + c * mean bound, cross-entropy) under the bounds `reach`; Cheng et al. 2024,
    eq. (3)."""
    logits, _ = net.apply(bound(state, reach), batch.images, train=False)
    entropy = losses.cross_entropy(logits, batch.labels)
    return entropy + state.cost * mean_bound(reach), entropy


def mean_bound(reach: Bounds) -> Array:
    """Mean over layers of the mean bound of each; [], in standard deviations.

    # Differs from paper: there in units of the activations, and every layer counts by its size.
    """
    return jnp.stack([each.mean() for each in reach.values()]).mean()


def bound(state: State, reach: Bounds) -> Variables:
    """The suspect's variables with upper bounds in place; bounds that it had already stay where
    they are tighter.

    # Differs from paper: one bound per channel, not per element, so that it holds wherever a
    trigger lies; before the activation function, not after.
    """
    had = bna_layers.flatten(state.variables.get("bounds", {}))
    bounds = dict(had)
    for layer, (mean, std) in state.moments.items():
        upper = mean + std * reach[layer]
        old = had.get(layer, {})
        lower = old.get("lower", jnp.full_like(upper, bna_layers.UNBOUNDED))
        upper = jnp.minimum(upper, old["upper"]) if "upper" in old else upper
        bounds[layer] = {**old, "lower": lower, "upper": upper}
    nested = flax.traverse_util.unflatten_dict(bounds, sep="/")
    return {**state.variables, "bounds": nested}


def measure_moments(net: Net, variables: Variables, images: Array) -> dict[str, Moments]:
    """Mean and deviation [C] of every layer over `images` [N, H, W, C] and positions; what is over
    of whole chunks is left out.

    Raises: UserError when the net shows no layers.
    """
    size = min(CHUNK, len(images))
    whole = len(images) // size
    chunks = images[: whole * size].reshape(whole, size, *images.shape[1:])

    def of_chunk(chunk: Array) -> dict[str, tuple[Array, Array]]:
        assert net.outputs is not None, "make refuses nets without"
        _, found = net.outputs(variables, to_float(chunk))
        flat = {layer: z.reshape(-1, z.shape[-1]) for layer, z in found.items()}
        return {layer: (z.mean(0), jnp.square(z).mean(0)) for layer, z in flat.items()}

    found = {}
    for layer, (first, second) in jax.lax.map(of_chunk, chunks).items():
        mean = first.mean(0)
        variance = jnp.maximum(second.mean(0) - jnp.square(mean), 0)
        found[layer] = Moments(mean, jnp.sqrt(variance) + LEAST_STD)
    if not found:
        raise UserError(
            "clip: this net shows no layer whose activations could be bounded; build it with"
            " jaxbd's BatchNorm or Correction, or use another repair"
        )
    return found


def _schedule(state: State, is_good: Array, config: Config) -> dict[str, Array]:
    """The next c and run lengths: up after `patience` steps within the budget, down after as many
    beyond it."""
    good = jnp.where(is_good, state.good + 1, 0)
    bad = jnp.where(is_good, 0, state.bad + 1)
    up, down = good >= config.patience, bad >= config.patience
    factor = config.cost_multiplier
    cost = jnp.where(up, state.cost * factor, jnp.where(down, state.cost / factor**1.5, state.cost))
    return dict(cost=cost, good=jnp.where(up, 0, good), bad=jnp.where(down, 0, bad))
