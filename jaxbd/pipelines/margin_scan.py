"""The scan without data: the largest margin of every class, and whether one stands out (Wang et al.
2024)."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxbd.base import Inversion, Key, Net, Suspect, UserError
from jaxbd.caching import cached
from jaxbd.detection import null
from jaxbd.inversion import margin
from jaxbd.training import slots, sweep
from jaxbd.training.program import Seconds
from jaxbd.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the scan.

    Attributes:
      starts: random initial images per class (Wang et al. 2024: 30).
      steps: gradient steps per start (Wang et al. 2024: 300).
      search: settings of the search from one start.
      test: settings of the test of the largest statistic.
    """

    # Differs from paper: fewer and shorter searches name the same classes, see
    # experiments/margin_published.py
    starts: int = 4
    steps: int = 150
    search: margin.Config = margin.Config()
    test: null.Config = null.Config()

    def __post_init__(self):
        if self.starts < 1 or self.steps < 1:
            raise UserError(
                f"margin: starts and steps must be at least 1, got {self.starts} and {self.steps}"
            )


class MarginScan(NamedTuple):
    """Result of the scan.

    Attributes:
      statistics: [K], the largest margin of each class, in logits; nan if none was finite.
      outliers: result of the test, see `null.find_outliers`.
      images: [K, H, W, C] in [0, 1], the image with the largest margin of each class.
      reached: [K] bool, whether the margin of the class's best start had converged: it no longer
        grew by more than 1 % per step.
      image_steps: images pushed through the net, forward and backward.
      seconds: compile and run time.
    """

    statistics: np.ndarray
    outliers: null.Outliers
    images: np.ndarray
    reached: np.ndarray
    image_steps: int
    seconds: Seconds


def scan(
    run: Run,
    key: Key,
    suspect: Suspect,
    config: Config = Config(),
    **search: Any,
) -> MarginScan:
    """Searches the largest margin of every class of the suspect. Needs no data.

    Args:
      search: `slots` and `memory_budget` of `sweep.search`.
    Raises: UserError for a suspect with fewer than three classes; FloatingPointError when a margin
      is not finite; Stopped after a stop request.
    """
    cells = margin.cells(suspect.classes, config.starts)
    inversion = _make(suspect.net, suspect.image_shape, config.search)
    variables = suspect.freeze().variables
    settings = {"num_steps": config.steps, "slots": min(64, len(cells.target)), **search}
    found: slots.Found = sweep.search(
        run, "margin", key, inversion, margin.no_batch, None, cells, variables, **settings
    )
    state = found.states
    margins = np.asarray(state.best_margin).reshape(suspect.classes, config.starts)
    best = margins.argmax(1) + config.starts * np.arange(suspect.classes)
    statistics = margin.statistics(state.best_margin, cells.target, suspect.classes)
    return MarginScan(
        statistics=statistics,
        outliers=null.find_outliers(statistics, config.test),
        images=np.asarray(state.best)[best],
        reached=np.asarray(state.change)[best] < 0.01,
        image_steps=found.image_steps,
        seconds=found.seconds,
    )


@cached(32)
def _make(net: Net, image_shape: tuple[int, int, int], config: margin.Config) -> Inversion:
    """Makes the search; cached, so that the same net is compiled once."""
    return margin.make(net, image_shape, config)
