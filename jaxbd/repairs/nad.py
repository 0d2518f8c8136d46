"""NAD: distils the attention of a fine-tuned copy into the suspect, so that it attends to what
matters in clean images (Li et al. 2021)."""

import dataclasses
from typing import Any

from jaxbd.base import Need, Problem, Repair, RepairData, Suspect, UserError
from jaxbd.repairs import attention, distill, tuning
from jaxbd.repairs.distill import Info, State, TeacherInfo

__all__ = [
    "Config",
    "Info",
    "State",
    "TeacherInfo",
    "adapt",
    "compared",
    "make",
    "quick",
    "released",
]
PAPER = "https://arxiv.org/abs/2101.05930"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of NAD; defaults are those of the released code for 5 % of CIFAR-10, without
    augmentation.

    Attributes:
      weights: beta of the attention loss per layer, in order of execution. They apply to the last
        layers; a net with fewer layers uses the last weights.
      power: p, exponent of activations in the attention maps.
      learning_rate: of SGD with Nesterov momentum, at the start of each phase.
      momentum: SGD's.
      weight_decay: SGD's, added to the gradient.
      num_steps: length of the student's phase.
      milestones: increasing shares of that length at which the rate drops x0.1.
      teacher_steps: length of the teacher's phase, which fine-tunes.
      teacher_milestones: the same for the teacher's phase.
      epochs: length of the student's phase in passes over the images; `adapt` converts it to
        `num_steps`.
      teacher_epochs: the same for the teacher's phase.
      crop_padding: pixels added around an image before a random crop; 0 for no crop.
      flip: whether to mirror images at random.
    """

    weights: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    num_steps: int = 800
    milestones: tuple[float, ...] = (0.1,)
    teacher_steps: int = 400
    teacher_milestones: tuple[float, ...] = (0.2,)
    epochs: int | None = None
    teacher_epochs: int | None = None
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        for name in ("weights", "milestones", "teacher_milestones"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        tuning.check("nad", self)
        if not self.weights or not all(0 <= each < float("inf") for each in self.weights):
            raise UserError(f"nad: weights must be numbers of at least 0, got {self.weights}")
        if not 1 <= self.power < float("inf"):
            raise UserError(f"nad: power must be at least 1, got {self.power}")


def quick(**changes: Any) -> Config:
    """A quarter of the steps, for small data sets and a CPU."""
    return Config(**{**dict(num_steps=200, teacher_steps=100), **changes})


def released(**changes: Any) -> Config:
    """The released code: 20 passes at rate 0.1 for two and 0.01 after that, with crops and flips;
    10 passes at the same rates for the teacher.

    # Differs from released code: cuts no 2x2 square out of images, and returns the last student;
    the released code returns the last one with an accuracy on test images above a threshold.
    """
    settings = dict(epochs=20, teacher_epochs=10, crop_padding=4, flip=True)
    return Config(**{**settings, **changes})


def compared(**changes: Any) -> Config:
    """The settings with which Yan et al. 2023 (appendix C) compare NAD to DHBE: rate 0.01, x0.1 at
    passes 10 and 15 of 20, an attention loss at each of four stages. Settings that they do not
    state are as released."""
    settings: dict[str, Any] = {
        "weights": (500.0, 1000.0, 1000.0, 1000.0),
        "learning_rate": 0.01,
        "epochs": 20,
        "milestones": (0.5, 0.75),
        "teacher_epochs": 20,
        "teacher_milestones": (0.5, 0.75),
    }
    return Config(**{**settings, **changes})


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to steps."""
    del suspect
    return tuning.count_steps(config, data, batch_size)


def make(problem: Problem, config: Config) -> Repair:
    """NAD for `problem.net`: phases "teacher" and "student", see `distill.assemble`.

    Raises: UserError from `init` when the net shows no layer with spatial positions.
    """
    measure = lambda _, student, teacher: attention.attention_distance(
        student, teacher, config.weights
    )
    distance = distill.Distance(lambda key, layers: {}, measure)
    return distill.assemble(problem, config, distance, "nad")
