"""Fine-pruning: removes the features that clean images activate least, where a backdoor hides, then
fine-tunes (Liu et al. 2018)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    Suspect,
    UserError,
    Variables,
)
from jaxbd.images import to_float
from jaxbd.repairs import choose, pruning, tuning
from jaxbd.repairs.pruning import Place

PAPER = "https://arxiv.org/abs/1805.12185"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of fine-pruning; defaults follow BackdoorBench except for the choice of the ratio.

    Attributes:
      ratio: share of the features to prune; None: the largest share that `max_drop` allows.
      max_drop: maximum loss of held-out accuracy from pruning, before fine-tuning, as a share.
      ratio_step: distance between the ratios to try.
      held_share: share of the clean images held out to choose the ratio; they do not rank features.
      most_held: maximum number of held-out images.
      learning_rate: of SGD's first step.
      schedule: "cosine": falls to zero over `num_steps`; "steps": x0.1 at `milestones`.
      milestones: increasing shares of `num_steps`.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the fine-tuning.
      epochs: length in passes over the images; `adapt` converts it to `num_steps`.
      crop_padding: pixels added around an image before a random crop; 0 for no crop.
      flip: whether to mirror images at random.
    """

    ratio: float | None = None
    # Differs from released code: BackdoorBench allows a loss of a tenth on test images
    max_drop: float = 0.1
    ratio_step: float = 0.01
    held_share: float = 0.2
    most_held: int = 500
    learning_rate: float = 0.01
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    num_steps: int = 1000
    epochs: int | None = None
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))
        tuning.check("fine-pruning", self)
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"fine-pruning: ratio must be in [0, 1), got {self.ratio}")
        if not 0 <= self.max_drop < 1:
            raise UserError(f"fine-pruning: max_drop must be in [0, 1), got {self.max_drop}")
        if not 0.001 <= self.ratio_step <= 0.5:
            raise UserError(
                f"fine-pruning: ratio_step must be in [0.001, 0.5], got {self.ratio_step}"
            )
        if not 0 < self.held_share < 1:
            raise UserError(f"fine-pruning: held_share must be in (0, 1), got {self.held_share}")
        if self.most_held < 1:
            raise UserError(f"fine-pruning: most_held must be at least 1, got {self.most_held}")


def quick(**changes: Any) -> Config:
    """A third of the steps, for small data sets and a CPU."""
    return Config(**{**dict(num_steps=300), **changes})


def released(**changes: Any) -> Config:
    """The paper's own code: prunes 48 of 60 features at any cost in accuracy. It has no recipe for
    fine-tuning, so those settings stay at their defaults."""
    return Config(**{**dict(ratio=0.8), **changes})


def compared(**changes: Any) -> Config:
    """The settings with which Yan et al. 2023 (appendix C) compare it to DHBE: 20 passes, rate
    0.01, x0.1 at passes 10 and 15. They state neither ratio nor weight decay."""
    settings: dict[str, Any] = {"epochs": 20, "schedule": "steps", "milestones": (0.5, 0.75)}
    return Config(**{**settings, **changes})


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32.
      variables: of the pruned net.
      opt: optimiser state.
      rank: [F] int32, rank of every feature by its mean activation on clean images, smallest first.
      ratio: [] share of pruned features.
    """

    step: Array
    variables: Variables
    opt: optax.OptState
    rank: Array
    ratio: Array


class Info(NamedTuple):
    """Loss [] in nats and accuracy [] on the batch as drawn, and the share [] of pruned
    features."""

    loss: Array
    accuracy: Array
    pruned: Array


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to `num_steps`."""
    del suspect
    return tuning.count_steps(config, data, batch_size)


def make(problem: Problem, config: Config) -> Repair:
    """Fine-pruning of `problem.net`: `init` ranks features, chooses the ratio and prunes; the only
    phase fine-tunes the pruned net.

    A value of the dial is a ratio: `extract` prunes the fine-tuned net to that share if it is
    larger than the state's ratio. A pruned feature stays in the net with outgoing weights 0, so
    shapes do not change.

    Raises: UserError when the net shows no layers, or from `init` when no linear layer reads the
      last one.
    """
    net = problem.net
    if net.outputs is None:
        raise UserError(
            "fine-pruning: a net made from a bare apply function shows no layers to prune;"
            f" {pruning.OTHERS}"
        )
    rule = tuning.sgd(make_schedule(config), config.momentum, config.weight_decay)
    ratios = np.arange(round(1 / config.ratio_step)) * config.ratio_step
    ratios = jnp.asarray(ratios, jnp.float32)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        assert data.clean is not None
        variables = {"batch_stats": {}, **variables}
        place = pruning.find_place(net, variables, to_float(data.clean.images[:1]), problem.classes)
        rank, ratio = decide(key, net, config, variables, place, data.clean, ratios)
        # a copy, since drivers donate the state
        variables = jax.tree.map(jnp.copy, pruning.prune(variables, place, rank, ratio))
        opt = rule.init(variables["params"])
        return State(jnp.zeros((), jnp.int32), variables, opt, rank, ratio)

    def step(key: Key, state: State, batch: Batch) -> tuple[State, Info]:
        batch = tuning.vary(key, batch, config)
        variables, opt, loss, accuracy = losses.descend(
            net, rule, state.variables, state.opt, batch
        )
        place = pruning.find_place(net, variables, batch.images[:1], problem.classes)
        # after every update, because the gradient revives pruned weights
        variables = pruning.prune(variables, place, state.rank, state.ratio)
        pruned = pruning.is_pruned(state.rank, state.ratio).mean()
        after = state._replace(step=state.step + 1, variables=variables, opt=opt)
        return after, Info(loss, accuracy, pruned)

    def extract(state: State, dial: Array | None = None) -> Variables:
        if dial is None:
            return state.variables
        images = jnp.zeros((1, *problem.image_shape))
        place = pruning.find_place(net, state.variables, images, problem.classes)
        return pruning.prune(state.variables, place, state.rank, jnp.maximum(dial, state.ratio))

    phase = Phase("fine-pruning", step, config.num_steps, Info)
    return Repair(init, (phase,), extract, dial=ratios, needs=NEEDS)


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate as a function of the step."""
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    return tuning.step_down(config.learning_rate, config.num_steps, config.milestones)


def decide(
    key: Key,
    net: Net,
    config: Config,
    variables: Variables,
    place: Place,
    clean: Batch,
    ratios: Array,
) -> tuple[Array, Array]:
    """Returns (rank [F], ratio []): the configured ratio, or the largest within the budget."""
    if config.ratio is not None:
        rank = pruning.rank_features(net, variables, place, clean.images)
        return rank, jnp.asarray(config.ratio, ratios.dtype)
    share, most = config.held_share, config.most_held
    rest, held = choose.split(key, clean, share, most, "fine-pruning")
    rank = pruning.rank_features(net, variables, place, rest.images)
    accuracies = pruning.measure_accuracies(net, variables, place, rank, ratios, held)
    # the first ratio is 0, so its accuracy is the suspect's
    return rank, ratios[choose.best_within(accuracies, accuracies[0], config.max_drop)]
