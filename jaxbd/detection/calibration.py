"""What clean models of an architecture score: null distributions of statistics, and how often a
rule alarms on them. Pure functions; the JSON form is read from untrusted files."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from jaxbd import files
from jaxbd.base import UserError

FORMAT = "jaxbd calibration 1"
MARGIN, ANOMALY = "margin_excess", "anomaly_index"
"""`null.excess` of the margin's statistics, and the largest anomaly index of the smallest triggers:
both larger for a backdoor."""
MOST_MODELS = 100_000
LONGEST_NAME = 200


class CleanModel(NamedTuple):
    """What one clean model scored.

    Attributes:
      name: for the record.
      architecture: as `build.Spec.arch`.
      classes: K.
      statistics: statistic -> value, larger for a backdoor; absent where it was not computed.
      alarms: rule -> whether it alarmed on this model.
    """

    name: str
    architecture: str
    classes: int
    statistics: Mapping[str, float]
    alarms: Mapping[str, bool]


class Calibration(NamedTuple):
    """Clean models, and the settings that their statistics were computed with."""

    models: tuple[CleanModel, ...]
    settings: Mapping[str, Any] = {}


class Compared(NamedTuple):
    """A model's statistic among those of clean models.

    Attributes:
      p_value: (1 + number of clean models that score at least as much) / (1 + models), an exact p
        where the model at hand is exchangeable with them if clean.
      models: number of clean models compared with.
      architecture: theirs; None where there are too few of the asked-for one, and all stand in.
    """

    p_value: float
    models: int
    architecture: str | None


class Rate(NamedTuple):
    """Alarms among clean models: how many, of how many, the rate, and its interval [low, high]."""

    alarms: int
    models: int
    rate: float
    low: float
    high: float


def null(calibration: Calibration, statistic: str, architecture: str | None = None) -> np.ndarray:
    """Ascending values [N] of `statistic` over clean models, or over those of one architecture."""
    values = [
        model.statistics[statistic]
        for model in calibration.models
        if statistic in model.statistics and architecture in (None, model.architecture)
    ]
    return np.sort(np.asarray(values, float))


def compare(
    calibration: Calibration,
    statistic: str,
    value: float,
    architecture: str | None = None,
    *,
    least_models: int = 19,
) -> Compared:
    """Where `value` lies among the clean models' values of `statistic`.

    Args:
      least_models: an architecture with fewer clean models is judged by all of them; 19 is the
        least from which p can fall to 0.05.
    Raises: UserError when no clean model has the statistic; ValueError when `value` is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"{statistic} is {value}; a model without a statistic has no p")
    values = null(calibration, statistic, architecture)
    if architecture is not None and len(values) < least_models:
        architecture, values = None, null(calibration, statistic)
    if not len(values):
        raise UserError(
            f"the calibration holds no clean model with a {statistic}; make it again with this"
            " version"
        )
    at_least = len(values) - np.searchsorted(values, value, side="left")
    return Compared(float((1 + at_least) / (1 + len(values))), len(values), architecture)


def threshold(values: np.ndarray, level: float) -> float:
    """The least value with a p of at most `level` among clean `values` [N]; inf where N is too
    small."""
    values = np.sort(np.asarray(values, float))
    above = math.floor(level * (1 + len(values)) + 1e-9) - 1
    if above < 0:
        return math.inf
    if above >= len(values):
        return -math.inf
    return float(np.nextafter(values[len(values) - 1 - above], np.inf))


def false_alarms(
    calibration: Calibration, rule: str, architecture: str | None = None, confidence: float = 0.95
) -> Rate:
    """How often `rule` alarmed on clean models, or on those of one architecture.

    Raises: UserError when it was run on none.
    """
    alarms = [
        model.alarms[rule]
        for model in calibration.models
        if rule in model.alarms and architecture in (None, model.architecture)
    ]
    if not alarms:
        of = "" if architecture is None else f" of architecture {architecture}"
        raise UserError(f"the calibration holds no clean model{of} that was judged by {rule}")
    return Rate(
        sum(alarms),
        len(alarms),
        sum(alarms) / len(alarms),
        *interval(sum(alarms), len(alarms), confidence),
    )


def interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a rate of which `hits` of `count` were seen; it covers at
    least as often as it says.

    Raises: ValueError unless 0 <= hits <= count and count >= 1.
    """
    if not (count >= 1 and 0 <= hits <= count):
        raise ValueError(f"{hits} of {count} is no rate")
    half = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, count - hits + 1, half))
    high = 1.0 if hits == count else float(special.betaincinv(hits + 1, count - hits, 1 - half))
    return low, high


def merge(parts: Sequence[Calibration]) -> Calibration:
    """The models of all `parts`. Raises: UserError when they were made with different settings."""
    if not parts:
        return Calibration(())
    first = dict(parts[0].settings)
    if any(dict(part.settings) != first for part in parts):
        raise UserError("calibrations made with different settings cannot be joined; make one anew")
    return Calibration(tuple(model for part in parts for model in part.models), first)


def to_json(calibration: Calibration) -> dict[str, Any]:
    """The form of `null.json`: what each model scored, and for people each rule's false alarms.

    Statistics that are not finite are left out.
    """
    rules = sorted({rule for model in calibration.models for rule in model.alarms})
    models = [
        model._replace(
            statistics={k: float(v) for k, v in model.statistics.items() if math.isfinite(v)},
            alarms={rule: bool(alarm) for rule, alarm in model.alarms.items()},
        )._asdict()
        for model in calibration.models
    ]
    return {
        "format": FORMAT,
        "settings": files.plain(dict(calibration.settings)),
        "false_alarms": {rule: false_alarms(calibration, rule)._asdict() for rule in rules},
        "models": models,
    }


def from_json(value: Any) -> Calibration:
    """The inverse of `to_json`. Raises: UserError naming what is wrong with it."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f'not a calibration: "format" must be "{FORMAT}"')
    models, settings = value.get("models"), value.get("settings", {})
    if not isinstance(models, list) or not isinstance(settings, dict):
        raise UserError('calibration: "models" must be a list and "settings" an object')
    if len(models) > MOST_MODELS:
        raise UserError(f"calibration: at most {MOST_MODELS} models, got {len(models)}")
    return Calibration(tuple(_model(row, n) for n, row in enumerate(models)), settings)


def _model(row: Any, number: int) -> CleanModel:
    where = f"calibration: model {number}"
    if not isinstance(row, dict) or set(row) != set(CleanModel._fields):
        raise UserError(f"{where} must have exactly {', '.join(CleanModel._fields)}")
    for field in ("name", "architecture"):
        if not isinstance(row[field], str) or len(row[field]) > LONGEST_NAME:
            raise UserError(f"{where}: {field} must be text of at most {LONGEST_NAME} characters")
    if type(row["classes"]) is not int or row["classes"] < 2:
        raise UserError(f"{where}: classes must be a whole number of at least 2")
    for field, is_right, kind in (
        ("statistics", _is_finite, "finite numbers"),
        ("alarms", lambda x: isinstance(x, bool), "true or false"),
    ):
        if not isinstance(row[field], dict) or not all(map(is_right, row[field].values())):
            raise UserError(f"{where}: {field} must be an object of {kind}")
    return CleanModel(**row)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def save(path: str | os.PathLike, calibration: Calibration) -> None:
    """Writes `null.json`. Raises: UserError when the folder cannot be written."""
    files.write_json(path, to_json(calibration))


def load(path: str | os.PathLike) -> Calibration:
    """Reads `null.json`. Raises: UserError naming the file when it is missing or no calibration."""
    try:
        return from_json(files.read_json(path))
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
