"""Settings of BNA, see `bna`."""

import dataclasses
from typing import Any, Literal

from jaxbd.base import UserError, check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the correction. The defaults are the paper's parameters and objective, with
    Jensen-Shannon for total variation, a term that keeps the target class, larger steps and fewer
    of them.

    Attributes:
      divergence: D_k of each channel: total variation, Jensen-Shannon, Kullback-Leibler.
      width: Delta b, the width of the intervals.
      tau: how sharply the intervals are told apart (eq. 6).
      bins: most intervals of a channel.
      span: what the intervals span: the extremes of the "clean" activations, or of "both" clean and
        triggered ones.
      trained: "all": mu, sigma, upsilon and omega; "bounds": the latter two; "upper": omega alone.
      layers: "all", or only those that are a "batchnorm".
      order: "joint": the sum over all layers at once; "layerwise": one layer after the other, in
        order of execution, each for an equal share of the steps and with a fresh optimiser.
      moments: where mu and sigma of BatchNorm start: its own ("stored"), or those of "triggered"
        images.
      start_upper: where omega starts, without a lower bound; none: both bounds start at the clean
        extremes.
      keep: weight of a second term that keeps the activations of clean images of the target class
        as they are, where the evidence brings such images; 0, the paper's objective, leaves it out.
      learning_rate: of Adam.
      average: whether the result is the mean of the parameters over the second half of the steps
        instead of the last ones, which jump about where the two terms of the objective pull apart.
      num_steps: length of the run, all layers together.
      epochs: the length in passes over the images instead, for every layer that is trained on its
        own; `adapt` turns it into `num_steps`.
    """

    # Differs from paper: there total variation (eq. 3); the smoother form spares more of the target
    # class
    divergence: Literal["tv", "js", "kl"] = "js"
    width: float = 0.1
    tau: float = 150.0
    bins: int = 100
    span: Literal["clean", "both"] = "clean"
    trained: Literal["all", "bounds", "upper"] = "all"
    layers: Literal["all", "batchnorm"] = "all"
    order: Literal["joint", "layerwise"] = "joint"
    moments: Literal["stored", "triggered"] = "stored"
    start_upper: float | None = None
    # Differs from paper: without it a small net's correction takes clean images of the target class
    # for triggered ones
    keep: float = 1.0
    learning_rate: float = 0.03
    # Differs from paper: it takes the last parameters
    average: bool = True
    num_steps: int = 200
    epochs: int | None = None

    def __post_init__(self):
        check_choices("bna", self)
        if (
            not self.learning_rate > 0
            or self.num_steps < 1
            or (self.epochs is not None and self.epochs < 1)
        ):
            raise UserError("bna: learning_rate must be > 0, num_steps and epochs at least 1")
        if not 0 <= self.keep < float("inf"):
            raise UserError(f"bna: keep must be a weight of at least 0, got {self.keep}")
        if not (self.width > 0 and self.tau > 0 and self.tau * self.width >= 1) or self.bins < 2:
            raise UserError(
                "bna: width and tau must be > 0 and tau x width at least 1, bins at least 2"
            )


def quick(**changes: Any) -> Config:
    """The defaults."""
    return Config(**changes)


def paper(**changes: Any) -> Config:
    """Section 5.1: all four parameters of all layers jointly, 30 epochs; starts and optimiser, left
    open, as ours."""
    settings = {
        "divergence": "tv",
        "epochs": 30,
        "learning_rate": 0.01,
        "keep": 0.0,
        "average": False,
    }
    return Config(**{**settings, **changes})


def released(**changes: Any) -> Config:
    """As in the released code: moments replaced by those of triggered images, then upper bounds
    layer by layer.

    Parts from it where it parts from itself: both histograms use one grid and are normalised (its
    clean one has bins of another width, its sum of count differences is a multiple that Adam does
    not see), the end intervals are half-infinite, and a layer's turn is not cut short when its loss
    stands still.

    Fewer bounds move than there. Where no clean activation is near a bound that clips triggered
    ones, every interval around it is too full, the loss does not depend on the bound, and ours
    stays where it started. There the centres of the intervals are rounded to float32, so that
    neighbouring intervals overlap or leave a gap by a rounding error; Adam makes a step of 0.01 of
    that slope too, once or twice until the loss is seen to stand still.
    # Differs from released code: no bound moves by rounding alone.
    # Differs from released code: clean images are whatever the evidence holds; there, of all
    classes.
    """
    settings = {
        "divergence": "tv",
        "epochs": 10,
        "moments": "triggered",
        "start_upper": 3.0,
        "trained": "upper",
        "layers": "batchnorm",
        "order": "layerwise",
        "span": "both",
        "learning_rate": 0.01,
        "keep": 0.0,
        "average": False,
    }
    return Config(**{**settings, **changes})
