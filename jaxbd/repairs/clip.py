"""Clip: bounds every channel's activation from above, as tightly as clean accuracy allows; needs no
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
"""Added to a standard deviation used as a unit, so that dead channels have a nonzero unit."""
CHUNK = 64
"""Images run through the net at a time when measuring moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the bounds; schedule and initial values follow the paper.

    Attributes:
      max_drop: maximum loss of held-out accuracy, as a share (paper: 0.03).
      first_reach: initial bounds, in standard deviations above the clean mean.
      learning_rate: Adam's, in the same unit.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      first_cost: initial c, the weight of the mean bound.
      cost_multiplier: factor by which c grows after `patience` steps in a row within the budget;
        after as many steps beyond it, c shrinks by this factor to the power 1.5.
      patience: steps in a row after which c changes.
      held_share: share of the clean images held out to measure accuracy.
      most_held: maximum number of held-out images.
      batch_size: images per step.
      num_steps: length of the run.
    """

    # Differs from paper: 0.03; here the budget of the default repair
    max_drop: float = 0.02
    first_reach: float = 4.0
    # Differs from paper: it has 1e-3 in units of the activations; relative steps suit every layer
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
"""Layer -> upper bounds [C], in standard deviations above the mean of the layer's clean
activations."""


class Moments(NamedTuple):
    """Mean and standard deviation [C] of one layer's clean activations."""

    mean: Array
    std: Array


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32.
      reach: the current bounds; opt: their Adam state.
      best: the tightest bounds so far within the accuracy budget; initially the first bounds.
      best_size: [] mean of `best`; inf until a step is within the budget.
      cost: [] c.
      good, bad: [] int32, consecutive steps within, and beyond, the budget.
      least_accuracy: [] minimum accuracy on `held` within the budget.
      moments: by layer.
      train, held: clean images (uint8 or float) and labels, to train on and to measure accuracy.
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
    """Cross-entropy, mean bound and held-out accuracy under the bounds before the step, and c; all
    []."""

    loss: Array
    size: Array
    accuracy: Array
    cost: Array


def make(problem: Problem, config: Config) -> Repair:
    """Bounds for `problem.net`. Changes no weight; `extract` only adds the collection `bounds`.

    Raises: UserError when the net shows no layers (from `init` if only tracing the net can tell).
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
        # judges the bounds before the update, which `best` may store
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
    """(cross-entropy + c * mean bound, cross-entropy), both [], under the bounds `reach`; Cheng et
    al. 2024, eq. (3)."""
    logits, _ = net.apply(bound(state, reach), batch.images, train=False)
    entropy = losses.cross_entropy(logits, batch.labels)
    return entropy + state.cost * mean_bound(reach), entropy


def mean_bound(reach: Bounds) -> Array:
    """Mean over layers of each layer's mean bound; [], in standard deviations.

    # Differs from paper: it measures bounds in units of the activations and weights layers by size.
    """
    return jnp.stack([each.mean() for each in reach.values()]).mean()


def bound(state: State, reach: Bounds) -> Variables:
    """The suspect's variables with upper bounds; existing bounds stay where they are tighter.

    # Differs from paper: one bound per channel, not per element, so that it applies wherever the
    trigger is; placed before the activation function, not after it.
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
    """Mean and standard deviation [C] of every layer over `images` [N, H, W, C] and positions. A
    last chunk that is not full is left out.

    Raises: UserError when the net shows no layers.
    """
    size = min(CHUNK, len(images))
    whole = len(images) // size
    chunks = images[: whole * size].reshape(whole, size, *images.shape[1:])

    def of_chunk(chunk: Array) -> dict[str, tuple[Array, Array]]:
        assert net.outputs is not None, "make refuses nets without"
        _, found = net.outputs(variables, to_float(chunk))
        flat = {layer: z.reshape(-1, z.shape[-1]) for layer, z in found.items()}
        return {layer: (z.mean(0), z.var(0)) for layer, z in flat.items()}

    found = {}
    for layer, (means, variances) in jax.lax.map(of_chunk, chunks).items():
        # E[z^2] - E[z]^2 would cancel where the mean is far larger than the spread
        std = jnp.sqrt(variances.mean(0) + means.var(0))
        found[layer] = Moments(means.mean(0), std + LEAST_STD)
    if not found:
        raise UserError(
            "clip: this net shows no layer whose activations could be bounded; build it with"
            " jaxbd's BatchNorm or Correction, or use another repair"
        )
    return found


def _schedule(state: State, is_good: Array, config: Config) -> dict[str, Array]:
    """The next c and run lengths. c goes up after `patience` steps in a row within the budget, and
    down after as many beyond it."""
    good = jnp.where(is_good, state.good + 1, 0)
    bad = jnp.where(is_good, 0, state.bad + 1)
    up, down = good >= config.patience, bad >= config.patience
    factor = config.cost_multiplier
    cost = jnp.where(up, state.cost * factor, jnp.where(down, state.cost / factor**1.5, state.cost))
    return dict(cost=cost, good=jnp.where(up, 0, good), bad=jnp.where(down, 0, bad))
