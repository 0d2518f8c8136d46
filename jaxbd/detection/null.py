"""Tests whether the largest of K statistics, one per class, is an outlier. NumPy only.

Wang et al. 2024 fit a gamma distribution to all statistics but the largest and call a model
backdoored if p = 1 - F(largest)^(n + 1) is at most 0.05, where n is the number of fitted values.
With few classes that p is far too small: the fit sees only n values and excludes the largest, so
its tail is too short. On clean models with gamma-distributed statistics, as the paper assumes, it
raises an alarm for 25 of 100 models with 10 classes and for 66 of 100 with 3. This module therefore
corrects p: it ranks p among those of simulated models without an outlier, which makes the
false-alarm rate equal to the requested level.
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
"""Minimum number of statistics for a test: the tested one and two to fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the test.

    Attributes:
      level: raise an alarm if p is at most this (Wang et al. 2024: 0.05).
      family: null distribution of a clean model's statistics. The lognormal has the heavier tail.
      most: maximum number of classes that may stand out together; never more than a third of all.
      least_spread: minimum coefficient of variation of the null. Without it, a slightly larger
        class would stand out from classes that tie.
      least_excess: minimum `Outliers.excess` for an alarm, calibrated on clean models of the same
        kind if available (`detection.calibration`); 0 for no minimum.
      simulations: number of simulated models to rank p among, fewer from 200 classes on; p is at
        least 1 / (simulations + 1).
      seed: seed of the simulation.
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
    """Result of the test on one model.

    Attributes:
      p_value: corrected p of the hypothesis that no class stands out; nan if too few classes have a
        statistic, see `find_outliers`. A nan is no evidence of a clean model.
      nominal: p as in Wang et al. 2024, of the largest statistic against all others.
      classes: classes that stand out, largest first; empty unless p_value <= level and excess >=
        least_excess.
      beside: further classes, largest first, that stand out once `classes` are set aside. A trigger
        often excites classes besides its target, so these are leads, not targets.
      class_p: [K] corrected p of each class against all others that do not stand out; nan without a
        statistic, or with fewer than two such others.
      excess: effect size log(largest / median of the others); 0 if nothing is positive.
      needed: smallest statistic with which a single class would have raised an alarm; inf if none
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
    """Tests whether classes stand out in `statistics` [K], which are large for a backdoor's target.

    Non-finite statistics are ignored. Non-positive ones belong to classes that the search did not
    reach; they count as the smallest positive one, so that they do not widen the null. If more than
    half of the classes besides the largest are such, there is nothing to compare with and p is nan.

    Up to `config.most` classes are tried as outliers: for each j, the j - 1 largest are set aside
    and the largest of the remaining m is tested against the others, relative to simulated models of
    m classes. Taking the smallest of these p is a selection, so it is in turn ranked among the
    smallest p of simulated models.
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
    if tried > 1:  # correcting for the selection can only raise p; simulation noise may lower it
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
    """log(largest / median of the others) of `statistics` [K]; 0 if fewer than two are finite or
    none is positive."""
    values = np.asarray(statistics, float)
    values = values[np.isfinite(values)]
    if len(values) < 2 or not (values > 0).any():
        return 0.0
    values = np.sort(_positive(values))
    return float(np.log(values[-1] / np.median(values[:-1])))


def _positive(values: np.ndarray) -> np.ndarray:
    """Raises non-positive values to the smallest positive one."""
    return np.maximum(values, values[values > 0].min())


def _count_outliers(count: int, config: Config) -> int:
    """Maximum number of outliers, such that at least two thirds of `count` classes form the
    null."""
    return max(1, min(config.most, count // 3))


class Null(NamedTuple):
    """A fitted null: shape and scale [...] of a gamma, or standard deviation and mean [...] of the
    logarithms."""

    shape: np.ndarray
    scale: np.ndarray


def _fit(values: np.ndarray, config: Config) -> Null:
    """Fits the null to positive `values` [..., n], with at least `config.least_spread`."""
    if config.family == "lognormal":
        logs = np.log(values)
        return Null(np.maximum(logs.std(-1, ddof=1), config.least_spread), logs.mean(-1))
    return fit_gamma(values, config.least_spread)


def fit_gamma(values: np.ndarray, least_spread: float = 0.0) -> Null:
    """Maximum-likelihood shape and scale [...] of gamma distributions that start at 0, for positive
    `values` [..., n].

    # Differs from released code: it also fits the location, which moves into the data when there
    # are nine values.

    Args:
      least_spread: minimum coefficient of variation, 1 / sqrt(shape).
    """
    most = 1 / max(least_spread, 1e-4) ** 2
    gap = np.maximum(np.log(values.mean(-1)) - np.log(values).mean(-1), 1 / (2 * most))
    # Minka 2002: a closed form close to the maximum, then Newton steps on 1 / shape
    shape = (3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(5):
        slope = shape**2 * (1 / shape - special.polygamma(1, shape))
        shape = 1 / (1 / shape + (np.log(shape) - special.digamma(shape) - gap) / slope)
    shape = np.minimum(shape, most)
    return Null(shape, values.mean(-1) / shape)


def _log_tail(value: np.ndarray, null: Null, config: Config) -> np.ndarray:
    """log(1 - F(value)) [...], even where 1 - F underflows."""
    if config.family == "lognormal":
        return special.log_ndtr(-(np.log(value) - null.scale) / null.shape)
    shape, value = null.shape, value / null.scale
    tail = special.gammaincc(shape, value)
    # log of the first terms of the asymptotic expansion for large values
    far = (shape - 1) * np.log(value) - value - special.gammaln(shape)
    far = far - np.log1p(-np.minimum((shape - 1) / value, 0.5))
    return np.where(tail > 1e-290, np.log(np.maximum(tail, 1e-300)), np.minimum(far, -667.0))


def _log_nominal(descending: np.ndarray, config: Config) -> np.ndarray:
    """log p [...] of statistics [..., m] in descending order: p = 1 - F(r_1)^(n + 1), F fitted to
    the n = m - 1 others; Wang et al. 2024, section 3.3."""
    null = _fit(descending[..., 1:], config)
    return _of_largest(_log_tail(descending[..., 0], null, config), descending.shape[-1])


def _of_largest(log_tail: np.ndarray, count: int) -> np.ndarray:
    """log(1 - (1 - tail)^count), exact for small tails."""
    tail = np.minimum(np.exp(log_tail), 1 - 1e-16)
    near = np.log(-np.expm1(count * np.log1p(-np.maximum(tail, 1e-300))))
    return np.where(log_tail > -600, near, np.log(count) + log_tail)


LEAST_SIMULATIONS, MOST_VALUES = 2000, 4_000_000
"""With hundreds of classes fewer models are simulated, to save memory and time."""
SHAPE = 10.0
"""Shape of the simulated gamma variates. The nominal p of a sample without an outlier does not
depend on the scale and hardly on the shape: for shapes 2 to 50 the false-alarm rate at level 0.05
varies by less than one percentage point."""


def _draws(count: int, config: Config, stream: int) -> np.ndarray:
    """Simulates statistics [simulations, count] of models without an outlier, each row
    descending."""
    rng = np.random.default_rng((config.seed, stream, count))
    size = (min(config.simulations, max(LEAST_SIMULATIONS, MOST_VALUES // count)), count)
    values = rng.gamma(SHAPE, size=size) if config.family == "gamma" else rng.lognormal(size=size)
    return -np.sort(-values, axis=-1)


@functools.lru_cache(64)
def _reference(count: int, config: Config) -> np.ndarray:
    """Sorted log nominal p [simulations] of models of `count` classes without an outlier."""
    return np.sort(
        _log_nominal(_draws(count, config, 0), dataclasses.replace(config, least_spread=0))
    )


@functools.lru_cache(64)
def _smallest_of(tried: int, count: int, config: Config) -> np.ndarray:
    """Sorted smallest p [simulations] over the numbers of outliers tried, of models without an
    outlier."""
    draws, free = _draws(count, config, 1), dataclasses.replace(config, least_spread=0)
    each = [
        _compare(_log_nominal(draws[:, j:], free), _reference(count - j, config))
        for j in range(tried)
    ]
    return np.sort(np.min(each, axis=0))


def _compare(value: ArrayLike, reference: np.ndarray) -> np.ndarray:
    """Share [...] of the sorted `reference` [S] that is at most `value` [...]; counts the tested
    model itself, so it is never 0."""
    rank = np.searchsorted(reference, np.asarray(value), side="right")
    return np.asarray((rank + 1) / (len(reference) + 1))


def _of_classes(values: np.ndarray, outside: np.ndarray, config: Config) -> np.ndarray:
    """Corrected p [m] of each of `values` [m] against the others that are not in `outside`; nan if
    fewer than two remain."""
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
    """How large the largest statistic must be, given the others, for the single-outlier test to
    raise an alarm."""
    # the largest simulated log p that still gives a corrected p <= level
    limit = reference[max(int(config.level * (len(reference) + 1)) - 2, 0)]
    tail = -np.expm1(np.log1p(-np.exp(limit)) / len(descending))
    null = _fit(descending[1:], config)
    if not tail > 0:
        return np.inf
    if config.family == "lognormal":
        return float(np.exp(null.scale - null.shape * special.ndtri(tail)))
    return float(null.scale * special.gammainccinv(null.shape, tail))
