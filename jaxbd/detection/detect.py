"""Turns attack success rates per class into a verdict. NumPy: nothing here is differentiated or
batched."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxbd.base import UserError

Verdict = Literal["backdoored", "clean", "inconclusive"]
Setting = Literal["all-to-one", "all-to-all", "mixed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """When a class counts as attacked.

    Attributes:
      threshold: a class is a target if the mean ASR of its recovered triggers on held-out images is
        at least this. The paper leaves it to the defender (Qiao et al. 2019, section 3.3) and
        reports >= 94.3 % for attacked and <= 5.8 % for other classes (section 4.3).
      doubt: if the highest rate lies between this and `threshold`, the verdict is "inconclusive".
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

    The anomaly index of Wang et al. 2019. Non-finite entries score 0 and are otherwise ignored. If
    the median deviation is 0, a value above (below) the median scores +inf (-inf) and the median
    itself 0.
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


def pair_scores(statistics: np.ndarray) -> np.ndarray:
    """|statistic - median| / median |statistic - median| over all pairs: scores [K, K] of
    `statistics` [K, K].

    Rows are sources, columns targets. A statistic is 1 / (size of the pair's trigger), which is
    large for a backdoor. One-sided: a pair below the median scores 0. The diagonal, pairs without a
    statistic (nan) and pairs for which no trigger was found (0) are not counted; they score nan,
    nan and 0. If the spread is 0, values above the median score inf.
    """
    # Differs from paper: it takes deviations to both sides, but only a trigger that is unusually
    # small indicates a backdoor.
    # As in Li et al. 2023, appendix C, no factor scales the median deviation to a standard
    # deviation.
    statistics = np.array(statistics, float)
    np.fill_diagonal(statistics, np.nan)
    counted = np.where(statistics > 0, statistics, np.nan)
    scores = np.maximum(mad_scores(counted.ravel(), consistency=1.0), 0).reshape(statistics.shape)
    return np.where(np.isnan(statistics), np.nan, scores)


def centred_scores(statistics: np.ndarray, rounds: int = 20) -> np.ndarray:
    """`pair_scores` of `statistics` [K, K] after removing the effects of source and target.

    Some classes are easy to leave and some easy to enter, whatever the other class. Tukey's median
    polish subtracts row and column medians of the logarithms in turn; the residual says how far a
    pair stands out from both its row and its column. An all-to-all trigger makes its pairs stand
    out this way, an all-to-one trigger does not. Pairs that `pair_scores` does not count score 0,
    the diagonal nan.
    """
    rest = np.array(statistics, float)
    np.fill_diagonal(rest, np.nan)
    rest = np.where(rest > 0, np.log(np.where(rest > 0, rest, 1)), np.nan)
    for _ in range(rounds):
        for axis in (1, 0):
            # a row without any value gets the median 0, since NumPy warns about all-nan slices
            known = np.isfinite(rest).any(axis, keepdims=True)
            rest = rest - np.nanmedian(np.where(known, rest, 0), axis, keepdims=True)
    scores = np.maximum(mad_scores(rest.ravel(), consistency=1.0), 0).reshape(rest.shape)
    np.fill_diagonal(scores, np.nan)
    return scores


def setting(pairs: Sequence[tuple[int, int]], classes: int) -> Setting | None:
    """The kind of attack that the detected (source, target) `pairs` of a model with K = `classes`
    indicate; None without pairs.

    "all-to-one": one target, with more than one source or in a model of two classes. "all-to-all":
    at least half of the classes are sources, each with its own target. "mixed": anything else, for
    example a single pair.
    """
    if not pairs:
        return None
    sources, targets = ({pair[side] for pair in pairs} for side in (0, 1))
    if len(targets) == 1 and (len(sources) > 1 or classes == 2):
        return "all-to-one"
    one_to_one = len(sources) == len(targets) == len(set(pairs))
    return "all-to-all" if one_to_one and 2 * len(sources) >= classes else "mixed"


def gain(rates: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(rate - baseline) / (1 - baseline) [K]: the success rate beyond the baseline, rescaled so
    that 1 is the maximum.

    Args:
      rates: [K] attack success rates; nan where not measured.
      baseline: [K] shares of the same images that reach each class without a trigger.
    """
    rates, baseline = np.asarray(rates, float), np.asarray(baseline, float)
    # an untrained net may send every image to one class (baseline 1): its gain is 0, not nan
    left = np.where(baseline < 1, 1 - baseline, np.inf)
    return (rates - baseline) / left


def decide(
    rates: np.ndarray, config: Config = Config(), baseline: np.ndarray | None = None
) -> Decision:
    """Applies the paper's rule to `rates` [K], the attack success rate of each class's recovered
    triggers.

    Scores are (rate - median rate) / (1 - median rate): how far a class stands out from the others,
    at most 1. A class without a rate (nan) scores nan and is never a target; if no target is found,
    it makes the verdict "inconclusive".

    Args:
      baseline: [K] rates without a trigger; only the gain beyond them counts, see `gain`.
    """
    # Differs from paper: it has no baseline and therefore calls an untrained net attacked
    rates = np.asarray(rates, float) if baseline is None else gain(rates, baseline)
    known = rates[np.isfinite(rates)]
    median = float(np.median(known)) if known.size else 0.0
    scores = (rates - median) / max(1 - median, 1e-9)
    targets = [int(k) for k in np.flatnonzero(rates >= config.threshold)]
    if targets:
        return Decision("backdoored", targets, scores.tolist())
    verdict: Verdict = (
        "inconclusive" if known.size < rates.size or known.max() >= config.doubt else "clean"
    )
    return Decision(verdict, [], scores.tolist())
