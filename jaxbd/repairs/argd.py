"""ARGD: distils the attention of a fine-tuned copy into the suspect, layer by layer and also the
relations between layers (Xia et al. 2022)."""

import dataclasses
import functools
from typing import Any, Literal

from jaxbd.base import Array, Need, Problem, Repair, RepairData, Suspect, UserError
from jaxbd.repairs import argd_losses, attention, distill, tuning
from jaxbd.repairs.distill import Info, State, TeacherInfo

__all__ = ["Config", "Info", "State", "TeacherInfo", "adapt", "make", "paper", "quick", "released"]
PAPER = "https://arxiv.org/abs/2204.09975"
NEEDS: frozenset[Need] = frozenset({"clean"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of ARGD; defaults are those of the released code for 5 % of CIFAR-10, without
    augmentation.

    Attributes:
      weights: weight of the node loss per layer, in order of execution; see `nad.Config`.
      edge_weight: weight of the edge loss.
      embedding_weight: weight of the embedding loss.
      embedding_dim: q, dimensions of the embedding.
      embedding: whether the embedding's parameters are "learned" with the student (paper) or stay
        "random" (released).
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

    weights: tuple[float, ...] = (2000.0, 5000.0, 2000.0)
    edge_weight: float = 1.0
    embedding_weight: float = 1.0
    embedding_dim: int = 128
    embedding: Literal["learned", "random"] = "random"
    power: float = 2.0
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    num_steps: int = 400
    milestones: tuple[float, ...] = (0.3, 0.6)
    teacher_steps: int = 400
    teacher_milestones: tuple[float, ...] = (0.3, 0.6)
    epochs: int | None = None
    teacher_epochs: int | None = None
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        for name in ("weights", "milestones", "teacher_milestones"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        tuning.check("argd", self)
        weights = (*self.weights, self.edge_weight, self.embedding_weight)
        if not self.weights or not all(0 <= each < float("inf") for each in weights):
            raise UserError(
                "argd: weights, edge_weight and embedding_weight must be numbers of at least 0, got"
                f" {weights}"
            )
        if not 1 <= self.power < float("inf"):
            raise UserError(f"argd: power must be at least 1, got {self.power}")
        if self.embedding_dim < 1:
            raise UserError(f"argd: embedding_dim must be at least 1, got {self.embedding_dim}")


def quick(**changes: Any) -> Config:
    """Half the steps of the student and a quarter of the teacher's, for small data sets and a
    CPU."""
    return Config(**{**dict(num_steps=200, teacher_steps=100), **changes})


def released(**changes: Any) -> Config:
    """The released code: 10 passes at rate 0.1 for three, 0.01 for three and 0.001 after that, with
    crops and flips; the embedding's parameters are not trained.

    # Differs from released code: cuts no 2x2 square out of images, and returns the last student;
    the released code returns the last one with an accuracy on test images above a threshold.
    """
    settings = dict(epochs=10, teacher_epochs=10, crop_padding=4, flip=True)
    return Config(**{**settings, **changes})


def paper(**changes: Any) -> Config:
    """As released, but the embedding is trained with the student, as in the paper's text."""
    return released(**{**dict(embedding="learned"), **changes})


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """`config` with its epochs, if set, converted to steps."""
    del suspect
    return tuning.count_steps(config, data, batch_size)


def make(problem: Problem, config: Config) -> Repair:
    """ARGD for `problem.net`: phases "teacher" and "student", see `distill.assemble`. Relates the
    maps of all layers; a net with one layer has no edges.

    Raises: UserError from `init` when the net shows no layer with spatial positions.
    """
    init = lambda key, layers: argd_losses.start_embedding(key, layers, config.embedding_dim)
    measure = functools.partial(graph_distance, config)
    distance = distill.Distance(init, measure, config.embedding == "learned")
    return distill.assemble(problem, config, distance, "argd")


def graph_distance(
    config: Config,
    embedding: argd_losses.Embedding,
    student: list[Array],
    teacher: list[Array],
) -> Array:
    """Nodes + edge_weight * edges + embedding_weight * embedding []; Xia et al. 2022, section 3."""
    nodes = attention.attention_distance(student, teacher, config.weights)
    edges = argd_losses.edge_loss(student, teacher)
    related = argd_losses.embedding_loss(embedding, student, teacher)
    return nodes + config.edge_weight * edges + config.embedding_weight * related
