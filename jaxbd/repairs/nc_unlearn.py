"""Neural Cleanse's unlearning: fine-tunes on clean images with true labels, a fifth of them stamped
with the recovered trigger (Wang et al. 2019)."""

import dataclasses
from typing import Any

from jaxbd.base import Problem, Repair, RepairData, Suspect, UserError
from jaxbd.repairs.stamping import NEEDS, Info, State, fine_tune, optimiser

__all__ = ["NEEDS", "PAPER", "Config", "Info", "State", "adapt", "make", "paper", "quick"]
PAPER = "https://ieeexplore.ieee.org/document/8835365"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the unlearning. The paper states the share of stamped images, and one epoch on a
    tenth of the training images; all else follows the fine-tuning of Yan et al. 2023 (App. C).

    Attributes:
      stamp_rate: probability of stamping an image of the batch.
      learning_rate: SGD's, constant.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the run.
      epochs: length in passes over the clean images instead; `adapt` converts it to `num_steps`.
    """

    # Differs from paper: stamps with this probability every time an image is drawn; the paper fixes
    # the stamped fifth beforehand
    stamp_rate: float = 0.2
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    num_steps: int = 300
    epochs: int | None = None

    def __post_init__(self):
        if not 0 < self.stamp_rate <= 1:
            raise UserError(f"nc-unlearn: stamp_rate must be in (0, 1], got {self.stamp_rate}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"nc-unlearn: learning_rate must be > 0, got {self.learning_rate}")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("nc-unlearn: momentum must be in [0, 1) and weight_decay >= 0")
        if self.num_steps < 1 or (self.epochs is not None and self.epochs < 1):
            raise UserError("nc-unlearn: num_steps and epochs must be at least 1")


def quick(**changes: Any) -> Config:
    """A fixed number of steps, since one epoch over few images is only a handful of steps."""
    return Config(**changes)


def paper(**changes: Any) -> Config:
    """One epoch over the clean images, whatever their number; the paper uses a tenth of the
    training images."""
    return Config(**{**dict(epochs=1), **changes})


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to `num_steps` for these images."""
    del suspect
    if config.epochs is None or data.clean is None:
        return config
    steps = -(-len(data.clean.labels) // batch_size)
    return dataclasses.replace(config, num_steps=config.epochs * steps, epochs=None)


def make(problem: Problem, config: Config) -> Repair:
    """Unlearning of the trigger that `problem.stamp` puts on images. Pass a `config` from `adapt`.

    Raises: UserError when the problem has no stamp.
    """
    rule = optimiser(config.learning_rate, config.momentum, config.weight_decay)
    return fine_tune("nc-unlearn", problem, rule, config.stamp_rate, config.num_steps)
