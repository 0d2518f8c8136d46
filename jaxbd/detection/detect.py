"""From attack success rates per class to a verdict. NumPy; nothing here is differentiated or
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
      threshold: mean ASR of a class's recovered triggers on held-out images from which it is called
        a target. The paper leaves it to the defender (Qiao et al. 2019, section 3.3) and reports >=
        94.3 % for attacked and <= 5.8 % for other classes (section 4.3).
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

    The anomaly index of Wang et al. 2019. Entries that are not finite score 0 and do not count;
    where the deviation is 0, a value above (below) the median scores +inf (-inf) and the median
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

    Rows are sources, columns targets; a statistic is 1 / (size of the pair's trigger), large for a
    backdoor's. One-sided: a pair below the median scores 0. The diagonal, pairs without a statistic
    (nan) and pairs for which no trigger was found (0) do not count; they score nan, nan and 0.
    Without spread, what is above the median scores inf.
    """
    # Differs from paper: it takes deviations to both sides; only a trigger that is too small tells
    # of a backdoor
    # Li et al. 2023, appendix C: no factor that makes the median deviation estimate a standard
    # deviation
    statistics = np.array(statistics, float)
    np.fill_diagonal(statistics, np.nan)
    counted = np.where(statistics > 0, statistics, np.nan)
    scores = np.maximum(mad_scores(counted.ravel(), consistency=1.0), 0).reshape(statistics.shape)
    return np.where(np.isnan(statistics), np.nan, scores)


def centred_scores(statistics: np.ndarray, rounds: int = 20) -> np.ndarray:
    """`pair_scores` of `statistics` [K, K] freed of what their source and their target contribute.

    Some classes are left easily and some entered easily, whoever the partner is. The logarithms are
    stripped of their rows' and columns' medians in turns (Tukey's median polish); what is left
    tells how far a pair stands out of both its row and its column. That is what a trigger does
    which sends every class to a target of its own, and what one that sends all to one target does
    not. Pairs that `pair_scores` does not count score 0, the diagonal nan.
    """
    rest = np.array(statistics, float)
    np.fill_diagonal(rest, np.nan)
    rest = np.where(rest > 0, np.log(np.where(rest > 0, rest, 1)), np.nan)
    for _ in range(rounds):
        for axis in (1, 0):
            known = np.isfinite(rest).any(axis, keepdims=True)
            rest = rest - np.nanmedian(np.where(known, rest, 0), axis, keepdims=True)
    scores = np.maximum(mad_scores(rest.ravel(), consistency=1.0), 0).reshape(rest.shape)
    np.fill_diagonal(scores, np.nan)
    return scores


def setting(pairs: Sequence[tuple[int, int]], classes: int) -> Setting | None:
    """What kind of attack the detected (source, target) `pairs` of a model with K = `classes` tell
    of; None for none.

    "all-to-one": one target, and more than one source or no other class. "all-to-all": at least
    half of the classes are sources, each of one target, and no two of the same. "mixed": anything
    else, such as a single pair.
    """
    if not pairs:
        return None
    sources, targets = ({pair[side] for pair in pairs} for side in (0, 1))
    if len(targets) == 1 and (len(sources) > 1 or classes == 2):
        return "all-to-one"
    one_to_one = len(sources) == len(targets) == len(set(pairs))
    return "all-to-all" if one_to_one and 2 * len(sources) >= classes else "mixed"


def gain(rates: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(rate - baseline) / (1 - baseline) [K]: the share of what is left that the triggers win.

    Args:
      rates: [K] attack success rates; nan where not measured.
      baseline: [K] shares of the same images that reach each class without a trigger.
    """
    rates, baseline = np.asarray(rates, float), np.asarray(baseline, float)
    # nothing is left to win where every image is of the class already, as in an untrained net
    left = np.where(baseline < 1, 1 - baseline, np.inf)
    return (rates - baseline) / left


def decide(
    rates: np.ndarray, config: Config = Config(), baseline: np.ndarray | None = None
) -> Decision:
    """The paper's rule on `rates` [K], the attack success rate of each class's recovered triggers.

    Scores are (rate - median rate) / (1 - median rate): how far a class stands out of its peers, 1
    at most. A class without a rate (nan) scores nan and is no target; where nothing else is found
    it leaves the verdict open.

    Args:
      baseline: [K] rates without a trigger; what they explain does not count, see `gain`.
    """
    # Differs from paper: it knows no baseline, and so calls an untrained net attacked
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
