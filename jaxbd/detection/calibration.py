"""Calibration on clean models: null distributions of statistics, and false-alarm rates of rules.

Pure functions. The JSON form is read from untrusted files, so every field is checked.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from jaxbd import files
from jaxbd.base import UserError

FORMAT = "jaxbd calibration 1"
MARGIN, ANOMALY = "margin_excess", "anomaly_index"
"""Names of statistics: `null.excess` of the margins, and the largest anomaly index of the trigger
sizes. A backdoor makes both larger."""
SHIPPED = {"small-nets": pathlib.Path(__file__).with_name("small_nets.json")}
"""Name of a calibration that comes with the package -> its file."""
MOST_MODELS = 100_000
LONGEST_NAME = 200


class CleanModel(NamedTuple):
    """Scores of one clean model.

    Attributes:
      name: label for the record.
      architecture: as in `build.Spec.arch`.
      classes: K.
      statistics: {statistic: value}, larger for a backdoor; only those that were computed.
      alarms: {rule: whether it raised an alarm on this model}.
    """

    name: str
    architecture: str
    classes: int
    statistics: Mapping[str, float]
    alarms: Mapping[str, bool]


class Calibration(NamedTuple):
    """Scores of clean models, and the settings they were computed with."""

    models: tuple[CleanModel, ...]
    settings: Mapping[str, Any] = {}


class Compared(NamedTuple):
    """A model's statistic compared with those of clean models.

    Attributes:
      p_value: (1 + number of clean models that score at least as high) / (1 + models). Exact if the
        model, when clean, is exchangeable with them.
      models: number of clean models compared with.
      architecture: architecture of these models; None if the requested one had too few and all
        models were used.
    """

    p_value: float
    models: int
    architecture: str | None


class Rate(NamedTuple):
    """False alarms of a rule: count, number of clean models, rate, and its interval [low, high]."""

    alarms: int
    models: int
    rate: float
    low: float
    high: float


def null(calibration: Calibration, statistic: str, architecture: str | None = None) -> np.ndarray:
    """Sorted values [N] of `statistic` over all clean models, or those of one architecture."""
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
    """Compares `value` with the clean models' values of `statistic`.

    Args:
      least_models: below this many clean models of the architecture, all models are used instead.
        19 is the smallest number for which p can be as low as 0.05.
    Raises: UserError when no clean model has the statistic; ValueError when `value` is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"{statistic} is {value}; a model without a statistic has no p")
    values = null(calibration, statistic, architecture)
    if architecture is not None and len(values) < least_models:
        architecture, values = None, null(calibration, statistic)
    if not len(values):
        raise UserError(
            f"the calibration holds no clean model with a {statistic}; run the calibration again"
            " with this version"
        )
    at_least = len(values) - np.searchsorted(values, value, side="left")
    return Compared(float((1 + at_least) / (1 + len(values))), len(values), architecture)


def threshold(values: np.ndarray, level: float) -> float:
    """The smallest value whose p among clean `values` [N] is at most `level`; inf if N is too
    small."""
    values = np.sort(np.asarray(values, float))
    # p = (1 + above) / (1 + N) <= level; the 1e-9 absorbs rounding errors of the product
    above = math.floor(level * (1 + len(values)) + 1e-9) - 1
    if above < 0:
        return math.inf
    if above >= len(values):
        return -math.inf
    return float(np.nextafter(values[len(values) - 1 - above], np.inf))


def false_alarms(
    calibration: Calibration, rule: str, architecture: str | None = None, confidence: float = 0.95
) -> Rate:
    """How often `rule` raised an alarm on clean models, or on those of one architecture.

    Raises: UserError when the rule was applied to none.
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
    """Clopper-Pearson interval of a rate estimated by `hits` of `count`.

    Its coverage is at least `confidence`.

    Raises: ValueError unless 0 <= hits <= count and count >= 1.
    """
    if not (count >= 1 and 0 <= hits <= count):
        raise ValueError(f"need 0 <= hits <= count and count >= 1, got {hits} of {count}")
    half = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, count - hits + 1, half))
    high = 1.0 if hits == count else float(special.betaincinv(hits + 1, count - hits, 1 - half))
    return low, high


def merge(parts: Sequence[Calibration]) -> Calibration:
    """Joins the models of all `parts`. Raises: UserError when their settings differ."""
    if not parts:
        return Calibration(())
    first = dict(parts[0].settings)
    if any(dict(part.settings) != first for part in parts):
        raise UserError("calibrations with different settings cannot be joined; make a new one")
    return Calibration(tuple(model for part in parts for model in part.models), first)


def to_json(calibration: Calibration) -> dict[str, Any]:
    """The content of `null.json`: every model's scores, and for human readers the false-alarm rate
    of each rule.

    Statistics that are not finite are omitted.
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
    """The inverse of `to_json`. Raises: UserError naming what is wrong with `value`."""
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
    if isinstance(value, bool) or not isinstance(value, int | float):  # True is an int in Python
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def save(path: str | os.PathLike, calibration: Calibration) -> None:
    """Writes `null.json`. Raises: UserError when the folder cannot be written."""
    files.write_json(path, to_json(calibration))


def load(path: str | os.PathLike) -> Calibration:
    """Reads `null.json`, or the calibration of a name in `SHIPPED`.

    Raises: UserError naming a file that is missing or not a calibration.
    """
    path = SHIPPED.get(os.fspath(path), path)
    try:
        return from_json(files.read_json(path))
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
