"""Unlearning: fine-tunes on images that are stamped with recovered triggers and keep their true
labels (Qiao et al. 2019, eq. 5)."""

import dataclasses
from typing import Any, Literal

from jaxbd.base import Array, ArrayTree, Problem, Repair, UserError, check_choices
from jaxbd.repairs.mixture import Mixture, only
from jaxbd.repairs.stamping import NEEDS, Info, State, fine_tune, optimiser

__all__ = ["NEEDS", "PAPER", "Config", "Info", "State", "make", "quick", "released"]
PAPER = "https://arxiv.org/abs/1910.04749"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of unlearning; defaults follow the released code.

    Attributes:
      stamp_rate: r in eq. (5), probability of stamping an image of the batch. 0.01 in the paper;
        with small data sets that rate stamps too few images.
      learning_rate: SGD's, constant.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the run (the released code: 10 epochs of 62 batches).
      mixing: how the models of a mixture alternate. "sampled": each stamped image draws its model
        by the weights (the paper's mixture); "epoch": one model for `epoch_steps` steps, then the
        next (released).
      epoch_steps: length of one turn when mixing by epoch.
    """

    stamp_rate: float = 0.01
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    num_steps: int = 620
    mixing: Literal["sampled", "epoch"] = "sampled"
    epoch_steps: int = 62

    def __post_init__(self):
        check_choices("unlearn", self)
        if not 0 < self.stamp_rate <= 1:
            raise UserError(f"unlearn: stamp_rate must be in (0, 1], got {self.stamp_rate}")
        if not self.learning_rate > 0 or self.num_steps < 1 or self.epoch_steps < 1:
            raise UserError(
                "unlearn: learning_rate must be > 0, num_steps and epoch_steps at least 1"
            )


def quick(**changes: Any) -> Config:
    """About half as many steps, larger ones, and more stamped images, for small data sets and a
    CPU."""
    return Config(**{**dict(stamp_rate=0.2, learning_rate=5e-3, num_steps=300), **changes})


def rounds(**changes: Any) -> Config:
    """For a repair in rounds, see `pipelines.hold`: stamps half of the images, because several
    triggers and their variants share them; larger steps with the weight decay of fine-tuning."""
    return Config(
        **{
            **dict(stamp_rate=0.5, learning_rate=1e-2, weight_decay=5e-4, num_steps=300),
            **changes,
        }
    )


def released(**changes: Any) -> Config:
    """The settings of the released code."""
    return Config(**{**dict(mixing="epoch"), **changes})


def make(problem: Problem, config: Config) -> Repair:
    """Unlearning of the trigger that `problem.stamp` puts on images.

    BatchNorm uses batch moments and re-estimates its running ones, as released. `mixing` has an
    effect if `trigger_params` is a `Mixture` and `problem.stamp` was made by `mixture.mix`; any
    other trigger is stamped unchanged.

    Raises: UserError when the problem has no stamp.
    """
    rule = optimiser(config.learning_rate, config.momentum, config.weight_decay)

    def choose(triggers: ArrayTree, step: Array) -> ArrayTree:
        if config.mixing == "epoch" and isinstance(triggers, Mixture):
            # Differs from released code: starts with the first level given; the release with 0.9
            return only(triggers, step // config.epoch_steps % triggers.weights.shape[0])
        return triggers

    return fine_tune("unlearn", problem, rule, config.stamp_rate, config.num_steps, choose)
