"""From one statistic per class to a p-value: does the largest stand out of the others? NumPy only.

Wang et al. 2024 fit a gamma distribution to all statistics but the largest and call a model
backdoored where p = 1 - F(largest)^(n + 1) is at most 0.05, n being the number of fitted values.
That p is far too small for few classes: the fit has seen only n values, and not the largest, so its
tail is too short. Of clean models whose statistics are gamma variates, as assumed, it alarms on 25
of 100 with 10 classes, and on 66 of 100 with 3. Here p is therefore corrected: it is compared with
the p of simulated models without an outlier, which makes the false-alarm rate the level asked for.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jaxbd.base import UserError, check_choices

Family = Literal["gamma", "lognormal"]
LEAST_CLASSES = 3
"""Statistics that a test needs: the one that is tested and two to fit to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How classes are tested.

    Attributes:
      level: highest p that is an alarm (Wang et al. 2024: 0.05).
      family: null distribution of a clean model's statistics. The lognormal has the heavier tail.
      most: most classes that may stand out together; at most a third of all are tried.
      least_spread: smallest coefficient of variation of the null, so that classes which tie do not
        make a class that is a little larger stand out.
      least_excess: `Outliers.excess` below which nothing stands out, from clean models of the same
        kind where there are some (`detection.calibration`); 0 asks for none.
      simulations: simulated models that p is compared with, fewer from 200 classes on; p is at
        least 1 / (simulations + 1).
      seed: of the simulation.
    """

    level: float = 0.05
    family: Family = "gamma"
    most: int = 3
    least_spread: float = 0.05
    least_excess: float = 0.0
    simulations: int = 20_000
    seed: int = 0

    def __post_init__(self):
        check_choices("null", self)
        if not 0 < self.level < 1:
            raise UserError(f"null: level must be in (0, 1), got {self.level}")
        if self.most < 1:
            raise UserError(f"null: most must be at least 1 class, got {self.most}")
        if not 0 <= self.least_spread < 1:
            raise UserError(f"null: least_spread must be in [0, 1), got {self.least_spread}")
        if not 0 <= self.least_excess < float("inf"):
            raise UserError(f"null: least_excess must be at least 0, got {self.least_excess}")
        if self.simulations < 100 or self.seed < 0:
            raise UserError(
                "null: simulations must be at least 100 and seed at least 0, got"
                f" {self.simulations} and {self.seed}"
            )


class Outliers(NamedTuple):
    """What the statistics of one model say.

    Attributes:
      p_value: corrected p that no class stands out; nan where too few classes have a statistic, see
        `find_outliers`. That is no evidence of a clean model.
      nominal: p as Wang et al. 2024 compute it, of the largest against all others.
      classes: the classes that stand out, largest first; empty unless p_value <= level and excess
        >= least_excess.
      beside: further classes, largest first, that stand out once those are set aside. They are
        often what a trigger excites besides its target, so they are leads, not targets.
      class_p: [K] corrected p of each class against all others that do not stand out; nan without a
        statistic, or where fewer than two others remain.
      excess: log(largest / median of the others), the size of the effect; 0 where nothing is
        positive.
      needed: the statistic from which a single class would have raised an alarm; inf where none
        could.
      measured: number of classes with a statistic.
    """

    p_value: float
    nominal: float
    classes: list[int]
    beside: list[int]
    class_p: np.ndarray
    excess: float
    needed: float
    measured: int


def find_outliers(
    statistics: np.ndarray | Sequence[float],
    config: Config = Config(),
) -> Outliers:
    """Tests whether classes stand out of `statistics` [K], large for a backdoor's target.

    Statistics that are not finite do not count. Those that are not positive, of classes that the
    search did not reach, count as the smallest positive one, so that they do not widen the null;
    where half of the classes besides the largest are such, there is nothing to compare with and p
    is nan.

    Up to `config.most` classes are tried as outliers: with j - 1 largest set aside, the largest of
    the remaining m is tested against the others, and compared with simulated models of m classes.
    The smallest of these p is in turn compared with that of simulated models, since it was chosen.
    """
    statistics = np.asarray(statistics, float)
    known = np.flatnonzero(np.isfinite(statistics))
    nothing = np.full(statistics.shape, np.nan)
    if len(known) < LEAST_CLASSES or 2 * (statistics[known] > 0).sum() < len(known) + 1:
        return Outliers(np.nan, np.nan, [], [], nothing, 0.0, np.inf, len(known))
    values = _positive(statistics[known])
    order = np.argsort(-values, kind="stable")
    tried = _count_outliers(len(known), config)
    references = [_reference(len(known) - j, config) for j in range(tried)]
    singles = [
        float(_compare(_log_nominal(values[order[j:]], config), reference))
        for j, reference in enumerate(references)
    ]
    p_value = min(singles)
    if tried > 1:  # choosing raises p; the simulation's noise must not lower it
        p_value = max(p_value, float(_compare(p_value, _smallest_of(tried, len(known), config))))
    alarms = [j + 1 for j, p in enumerate(singles) if p <= config.level]
    is_alarm = p_value <= config.level and excess(values) >= config.least_excess
    first, last = (alarms[0], alarms[-1]) if is_alarm else (0, 0)
    nothing[known] = _of_classes(values, order[:last], config)
    return Outliers(
        p_value=p_value,
        nominal=float(np.exp(_log_nominal(values[order], config))),
        classes=known[order[:first]].tolist(),
        beside=known[order[first:last]].tolist(),
        class_p=nothing,
        excess=excess(values),
        needed=_find_alarm_level(values[order], references[0], config),
        measured=len(known),
    )


def excess(statistics: np.ndarray) -> float:
    """log(largest / median of the others) of `statistics` [K]; 0 where fewer than two are finite or
    none is positive."""
    values = np.asarray(statistics, float)
    values = values[np.isfinite(values)]
    if len(values) < 2 or not (values > 0).any():
        return 0.0
    values = np.sort(_positive(values))
    return float(np.log(values[-1] / np.median(values[:-1])))


def _positive(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, values[values > 0].min())


def _count_outliers(count: int, config: Config) -> int:
    """How many classes may be outliers, so that at least two thirds of `count` make the null."""
    return max(1, min(config.most, count // 3))


class Null(NamedTuple):
    """A fitted null: shape and scale [...] of a gamma, or deviation and mean [...] of
    logarithms."""

    shape: np.ndarray
    scale: np.ndarray


def _fit(values: np.ndarray, config: Config) -> Null:
    """The null fitted to positive `values` [..., n], with at least the least spread."""
    if config.family == "lognormal":
        logs = np.log(values)
        return Null(np.maximum(logs.std(-1, ddof=1), config.least_spread), logs.mean(-1))
    return fit_gamma(values, config.least_spread)


def fit_gamma(values: np.ndarray, least_spread: float = 0.0) -> Null:
    """Maximum-likelihood shape and scale [...] of gamma distributions from 0, for positive `values`
    [..., n].

    # Differs from released code: that fits where the distribution begins, too, which moves into the
    # data when there are nine values.

    Args:
      least_spread: the coefficient of variation, 1 / sqrt(shape), is at least so large.
    """
    most = 1 / max(least_spread, 1e-4) ** 2
    gap = np.maximum(np.log(values.mean(-1)) - np.log(values).mean(-1), 1 / (2 * most))
    # Minka 2002, the closed form near the maximum, and Newton steps on 1 / shape
    shape = (3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(5):
        slope = shape**2 * (1 / shape - special.polygamma(1, shape))
        shape = 1 / (1 / shape + (np.log(shape) - special.digamma(shape) - gap) / slope)
    shape = np.minimum(shape, most)
    return Null(shape, values.mean(-1) / shape)


def _log_tail(value: np.ndarray, null: Null, config: Config) -> np.ndarray:
    """log(1 - F(value)) [...], also where 1 - F is too small for a float."""
    if config.family == "lognormal":
        return special.log_ndtr(-(np.log(value) - null.scale) / null.shape)
    shape, value = null.shape, value / null.scale
    tail = special.gammaincc(shape, value)
    # the first term of the expansion for large values
    far = (shape - 1) * np.log(value) - value - special.gammaln(shape)
    far = far - np.log1p(-np.minimum((shape - 1) / value, 0.5))
    return np.where(tail > 1e-290, np.log(np.maximum(tail, 1e-300)), np.minimum(far, -667.0))


def _log_nominal(descending: np.ndarray, config: Config) -> np.ndarray:
    """log p, p = 1 - F(r_1)^(n + 1), [...] of statistics [..., m] in descending order, F fitted to
    the n = m - 1 others; Wang et al. 2024, section 3.3."""
    null = _fit(descending[..., 1:], config)
    return _of_largest(_log_tail(descending[..., 0], null, config), descending.shape[-1])


def _of_largest(log_tail: np.ndarray, count: int) -> np.ndarray:
    """log(1 - (1 - tail)^count), exact for small tails."""
    tail = np.minimum(np.exp(log_tail), 1 - 1e-16)
    near = np.log(-np.expm1(count * np.log1p(-np.maximum(tail, 1e-300))))
    return np.where(log_tail > -600, near, np.log(count) + log_tail)


LEAST_SIMULATIONS, MOST_VALUES = 2000, 4_000_000
"""Fewer models are simulated where there are hundreds of classes, for memory and time."""
SHAPE = 10.0
"""Shape of simulated gamma variates. The nominal p of a sample without an outlier does not depend
on scale and hardly on shape: from shape 2 to 50 the false-alarm rate at level 0.05 stays within a
point of itself."""


def _draws(count: int, config: Config, stream: int) -> np.ndarray:
    """[simulations, count] statistics of models without an outlier, descending in each row."""
    rng = np.random.default_rng((config.seed, stream, count))
    size = (min(config.simulations, max(LEAST_SIMULATIONS, MOST_VALUES // count)), count)
    values = rng.gamma(SHAPE, size=size) if config.family == "gamma" else rng.lognormal(size=size)
    return -np.sort(-values, axis=-1)


@functools.lru_cache(64)
def _reference(count: int, config: Config) -> np.ndarray:
    """Ascending log nominal p [simulations] of models of `count` classes without an outlier."""
    return np.sort(
        _log_nominal(_draws(count, config, 0), dataclasses.replace(config, least_spread=0))
    )


@functools.lru_cache(64)
def _smallest_of(tried: int, count: int, config: Config) -> np.ndarray:
    """Ascending smallest p over the numbers of outliers tried [simulations], without an outlier."""
    draws, free = _draws(count, config, 1), dataclasses.replace(config, least_spread=0)
    each = [
        _compare(_log_nominal(draws[:, j:], free), _reference(count - j, config))
        for j in range(tried)
    ]
    return np.sort(np.min(each, axis=0))


def _compare(value: ArrayLike, reference: np.ndarray) -> np.ndarray:
    """Share [...] of `reference` [S], ascending, that is at most `value` [...], the model at hand
    counted in."""
    rank = np.searchsorted(reference, np.asarray(value), side="right")
    return np.asarray((rank + 1) / (len(reference) + 1))


def _of_classes(values: np.ndarray, outside: np.ndarray, config: Config) -> np.ndarray:
    """Corrected p [m] of each of `values` [m] against the others that are not `outside`; nan where
    those are fewer than two."""
    usual = np.setdiff1d(np.arange(len(values)), outside)
    found = np.empty(len(values))
    for index, value in enumerate(values):
        rest = usual[usual != index]
        if len(rest) < LEAST_CLASSES - 1:
            found[index] = np.nan
            continue
        log_tail = _log_tail(value, _fit(values[rest], config), config)
        reference = _reference(len(rest) + 1, config)
        found[index] = _compare(_of_largest(log_tail, len(rest) + 1), reference)
    return found


def _find_alarm_level(descending: np.ndarray, reference: np.ndarray, config: Config) -> float:
    """The largest statistic at which the single-outlier test alarms, the others as they are."""
    limit = reference[max(int(config.level * (len(reference) + 1)) - 2, 0)]
    tail = -np.expm1(np.log1p(-np.exp(limit)) / len(descending))
    null = _fit(descending[1:], config)
    if not tail > 0:
        return np.inf
    if config.family == "lognormal":
        return float(np.exp(null.scale - null.shape * special.ndtri(tail)))
    return float(null.scale * special.gammainccinv(null.shape, tail))
