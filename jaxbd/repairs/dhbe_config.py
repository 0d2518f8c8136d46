"""Settings of DHBE, see `dhbe`."""

import dataclasses
import itertools
from typing import Any, Literal

from jaxbd.base import UserError, check_choices
from jaxbd.models.synthesis import TRIGGER_SIDES, layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DHBE. Defaults follow the released code; `paper()` follows the paper's text.

    Attributes:
      regularisation: lambda in eq. (8), weight of the student's change under generated triggers.
      inner_steps: k, student updates per iteration.
      batch_size: fake images, and as many triggers, per update.
      num_steps: number of iterations; the schedule depends on it.
      milestones: increasing shares of `num_steps` at which all three rates drop x0.1.
      trigger_size: side of the generated triggers in pixels; 3..9 or a doubling of one of these.
      trigger_scale: factor on the triggers, which bounds their L1 norm by scale * side^2 * C in
        pixel units.
      place: where triggers are added. "batch": one random place per mini-batch (released); "image":
        one per image; "edges": one per image, more often in corners and along edges than a uniform
        draw, see `images.edge_places`.
      prior_weight: weight of the fake images' total variation in the sample generator's loss; 0 in
        the paper.
      learning_rate: SGD's, on the student.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      generator_rate: Adam's learning rate, on the sample generator.
      trigger_rate: Adam's learning rate, on the trigger generator.
      noise_dim: noise values per image and per trigger, N(0, 1).
      width: of both generators, see `models.synthesis`.
      average: share of the iterations, at the end of the run, over which the student's weights and
        running moments are averaged into the repaired net; 0 takes the last student (released). The
        average suffers less than a single student from the noise of a high learning rate.
      mean: mean per channel of the generated images, in [0, 1] units, or one number for all
        channels. The generator works in a net's normalised input space, so for a net with input
        normalisation these are its constants.
      std: the same for the standard deviation. The defaults are typical of photographs, for nets
        without input normalisation.
      pure: plain adversarial distillation: makes no triggers and passes no triggered images through
        the student. This differs from regularisation 0, under which triggered images still enter
        the student's running moments (Yan et al. 2023, 5.4.1).
      inner: compile the k student updates "unrolled" or as a "scan"; the result is the same.
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
    """The settings in the paper's text; settings that it omits stay as released.

    The text also omits the constant that scales the triggers: `trigger_scale` is the released 1
    unless given.
    """
    settings: dict[str, Any] = {"inner_steps": 3, "batch_size": 128, "prior_weight": 0.0}
    return Config(**{**settings, **changes})


def quick(**changes: Any) -> Config:
    """Sixty iterations instead of 15,000, for a CPU: a departure from paper and released code.

    The student's learning rate is a fifth and its weight decay is lower, because otherwise a short
    run with small batches would destroy its accuracy. The rate is constant, and the last students
    are averaged. The student gets twice as many updates per generator update; with fewer it falls
    behind the generators and loses accuracy. Triggers are small and strong, because large ones hide
    the image. The trigger generator learns ten times as fast, and every image gets its own place,
    often in a corner or at an edge. The sample generator is slower and smoother; otherwise it
    learns to draw the trigger, and the student learns the trigger again.
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
