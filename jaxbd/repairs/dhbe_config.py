"""Settings of DHBE, see `dhbe`."""

import dataclasses
import itertools
from typing import Any, Literal

from jaxbd.base import UserError, check_choices
from jaxbd.models.synthesis import TRIGGER_SIDES, layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DHBE. Defaults follow the released code; `paper()` gives the paper's wording.

    Attributes:
      regularisation: lambda in eq. (8), weight of the student's change under generated triggers.
      inner_steps: k, student updates per iteration.
      batch_size: fake images, and as many triggers, per update.
      num_steps: iterations the schedule is laid out for.
      milestones: shares of them, increasing, at which all three rates drop x0.1.
      trigger_size: side of the generated triggers in pixels; 3..9 or a doubling of one of these.
      trigger_scale: factor on the triggers, which bounds their L1 norm by scale * side^2 * C in
        pixel units.
      place: where triggers are added. "batch": one random place per mini-batch (released); "image":
        one per image; "edges": one per image, in corners and along edges oftener than a uniform
        draw, see `images.edge_places`.
      prior_weight: of the total variation of fake images in the sample generator's loss; 0 in the
        paper.
      learning_rate: of the student's SGD.
      momentum: of SGD.
      weight_decay: of SGD, added to the gradient.
      generator_rate: of the sample generator's Adam.
      trigger_rate: of the trigger generator's Adam.
      noise_dim: noise values per image and per trigger, N(0, 1).
      width: of both generators, see `models.synthesis`.
      average: share of the iterations, the last ones, whose students are averaged, weights and
        running moments alike, into the repaired net; 0 takes the last student (released). The
        average loses less than a student does to the noise of a high learning rate.
      mean: per channel, of the generated images in [0, 1] units; one number stands for all
        channels. The generator makes what a net sees behind its input normalisation, so where a net
        has one these are its constants.
      std: likewise. The defaults are about those of photographs, for nets without a normalisation
        of their own.
      pure: plain adversarial distillation: no trigger is made and no triggered image passes the
        student. Weight 0 is not the same, since triggered images then still enter the student's
        running moments (Yan et al. 2023, 5.4.1).
      inner: the k student updates "unrolled" in the program or as a "scan"; the result is the same.
        Unrolled is for XLA:CPU, where a convolution's weight gradient inside a compiled loop is
        more than twenty times slower.
    """

    regularisation: float = 0.1
    inner_steps: int = 5
    batch_size: int = 256
    num_steps: int = 15_000
    milestones: tuple[float, ...] = (0.6, 0.8)
    trigger_size: int = 5
    trigger_scale: float = 1.0
    place: Literal["batch", "image", "edges"] = "batch"
    prior_weight: float = 1e-4
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_rate: float = 1e-3
    trigger_rate: float = 1e-3
    noise_dim: int = 256
    width: int = 64
    average: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    pure: bool = False
    inner: Literal["unrolled", "scan"] = "unrolled"

    def __post_init__(self):
        check_choices("dhbe", self)
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if (
            min(self.inner_steps, self.num_steps, self.noise_dim, self.width) < 1
            or self.batch_size < 2
        ):
            raise UserError(
                "dhbe: inner_steps, num_steps, noise_dim and width must be at least 1, batch_size 2"
            )
        if not (self.regularisation >= 0 and self.prior_weight >= 0 and self.trigger_scale > 0):
            raise UserError(
                "dhbe: regularisation and prior_weight must be >= 0 and trigger_scale > 0"
            )
        if not (self.learning_rate > 0 and self.generator_rate > 0 and self.trigger_rate > 0):
            raise UserError("dhbe: learning_rate, generator_rate and trigger_rate must be > 0")
        if not all(one < other for one, other in itertools.pairwise((0.0, *self.milestones, 1.0))):
            raise UserError("dhbe: milestones must increase and lie between 0 and 1")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("dhbe: momentum must be in [0, 1) and weight_decay >= 0")
        if not 0 <= self.average <= 1:
            raise UserError("dhbe: average is a share of the iterations, from 0 to 1")
        if not (self.mean and self.std and all(value > 0 for value in self.std)):
            raise UserError(
                "dhbe: mean and std need one number, or one per channel, and std must be > 0"
            )
        layout(self.trigger_size, TRIGGER_SIDES)


def released(**changes: Any) -> Config:
    """The settings of the released code."""
    return Config(**changes)


def paper(**changes: Any) -> Config:
    """The settings the paper's text states; everything it does not state stays as released.

    Its text leaves out the constant that scales the triggers: `trigger_scale` is the released 1
    unless given.
    """
    settings: dict[str, Any] = {"inner_steps": 3, "batch_size": 128, "prior_weight": 0.0}
    return Config(**{**settings, **changes})


def quick(**changes: Any) -> Config:
    """Sixty iterations instead of 15,000, for a CPU: a departure from paper and released code.

    The student learns at a fifth of the rate and decays less, or a short run with small batches
    would wreck what it knows; the rate stays, and the last students are averaged. It has twice the
    updates for each of the generators', or it falls behind them and loses accuracy. Triggers are
    small and strong, for large ones hide the image; they learn ten times as fast and lie at a place
    of their own on every image, often in a corner or at an edge. The sample generator is slower and
    smoother, or it learns to draw the trigger, and the student is taught it again.
    """
    settings: dict[str, Any] = {
        "num_steps": 60,
        "milestones": (),
        "inner_steps": 10,
        "batch_size": 32,
        "width": 16,
        "learning_rate": 0.02,
        "weight_decay": 1e-4,
        "generator_rate": 2e-4,
        "prior_weight": 1e-2,
        "trigger_rate": 1e-2,
        "trigger_size": 3,
        "trigger_scale": 2.5,
        "place": "edges",
        "average": 0.25,
    }
    return Config(**{**settings, **changes})
