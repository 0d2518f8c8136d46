"""From attack success rates per class to a verdict. NumPy; nothing here is differentiated or batched."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from jaxbd.base import UserError

Verdict = Literal["backdoored", "clean", "inconclusive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """When a class counts as attacked.

    Attributes:
      threshold: mean ASR of a class's recovered triggers on held-out images from which it is called a target. The
        paper leaves it to the defender (Qiao et al. 2019, section 3.3) and reports >= 94.3 % for attacked and <= 5.8 %
        for other classes (section 4.3).
      doubt: a highest rate between this and `threshold` makes the verdict "inconclusive".
    """

    threshold: float = 0.8
    doubt: float = 0.4

    def __post_init__(self):
        if not 0 < self.doubt <= self.threshold <= 1:
            raise UserError("detection: need 0 < doubt <= threshold <= 1")


class Decision(NamedTuple):
    """verdict; targets: the classes called attacked; scores: anomaly score of every class."""

    verdict: Verdict
    targets: list[int]
    scores: list[float]


def mad_scores(values: np.ndarray, consistency: float = 1.4826) -> np.ndarray:
    """(x - median) / (consistency * median |x - median|) of `values` [N]; signed, NaN-safe.

    The anomaly index of Wang et al. 2019. Entries that are not finite score 0 and do not count; where the
    deviation is 0, a value above (below) the median scores +inf (-inf) and the median itself 0.
    """
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros_like(values)
    centred = np.where(finite, values - np.median(values[finite]), 0.0)
    spread = consistency * np.median(np.abs(centred[finite]))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(centred == 0, 0.0, centred / spread)
    return np.where(finite, scores, 0.0)


def decide(rates: np.ndarray, config: Config = Config()) -> Decision:
    """The paper's rule on `rates` [K], the attack success rate of each class's recovered triggers.

    Scores are (rate - median rate) / (1 - median rate): how far a class stands out of its peers, 1 at most. A class
    without a rate (nan) scores nan and is no target; where nothing else is found it leaves the verdict open.
    """
    rates = np.asarray(rates, float)
    known = rates[np.isfinite(rates)]
    median = float(np.median(known)) if known.size else 0.0
    scores = (rates - median) / max(1 - median, 1e-9)
    targets = [int(k) for k in np.flatnonzero(rates >= config.threshold)]
    if targets:
        return Decision("backdoored", targets, scores.tolist())
    verdict: Verdict = "inconclusive" if known.size < rates.size or known.max() >= config.doubt else "clean"
    return Decision(verdict, [], scores.tolist())
