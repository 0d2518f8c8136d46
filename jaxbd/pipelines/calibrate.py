"""Calibrates a scan: scores models known to be clean, and derives thresholds for other models."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbd import files
from jaxbd.detection import calibration as nulls
from jaxbd.detection.calibration import Calibration, CleanModel
from jaxbd.detection.verdict import COMPARABLE
from jaxbd.pipelines.class_scan import Scan, ScanConfig

MARGIN_RULE, SMALL_RULE, PATCH_RULE = "margin", "small trigger", "patch"
VERDICT_RULE, NOT_CLEAN_RULE = "backdoored", "not clean"
"""Rules whose alarms are counted: the three signs, the verdict, and any verdict but "clean"."""
VARYING = ("targets", "memory_budget", "look")
"""Settings that do not change the statistics of a complete search."""


def settings_of(config: ScanConfig) -> dict[str, Any]:
    """The settings that statistics depend on; only calibrations with equal settings can be
    joined."""
    settings = files.plain(dataclasses.asdict(config))
    return {name: value for name, value in settings.items() if name not in VARYING}


def for_calibration(config: ScanConfig) -> ScanConfig:
    """`config` that searches every class to the end, so that statistics are comparable across
    models."""
    return dataclasses.replace(config, method="auto", targets=(), look=0, with_margin=True)


def score(name: str, architecture: str, found: Scan) -> CleanModel:
    """Statistics and alarms of the scan `found` of one clean model."""
    statistics, judgement = _statistics(found), found.judgement
    assert judgement is not None and found.located is not None
    alarms = {
        VERDICT_RULE: judgement.verdict == "backdoored",
        NOT_CLEAN_RULE: judgement.verdict != "clean",
        PATCH_RULE: bool(judgement.natural),
    }
    if nulls.ANOMALY in statistics:
        alarms[SMALL_RULE] = found.signs is not None and bool(found.signs.small.any())
    if nulls.MARGIN in statistics and found.margin is not None:
        alarms[MARGIN_RULE] = bool(found.margin.outliers.classes)
    return CleanModel(name, architecture, len(found.rates), statistics, alarms)


def apply(config: ScanConfig, calibration: Calibration, architecture: str) -> ScanConfig:
    """`config` with thresholds from clean models of the architecture, or from all clean models if
    it has too few.

    With them a class must stand out more than in all but a share `margin.test.level` of the clean
    models.
    """
    level = config.margin.test.level
    of = lambda statistic: _threshold(calibration, statistic, architecture, level)
    anomaly, excess = of(nulls.ANOMALY), of(nulls.MARGIN)
    if np.isfinite(anomaly):
        config = dataclasses.replace(config, anomaly_threshold=anomaly)
    if np.isfinite(excess):
        test = dataclasses.replace(config.margin.test, least_excess=max(excess, 0.0))
        config = dataclasses.replace(config, margin=dataclasses.replace(config.margin, test=test))
    return config


def _threshold(calibration: Calibration, statistic: str, architecture: str, level: float) -> float:
    """Threshold from the architecture's clean models if they suffice for `level`, else from all."""
    own = nulls.threshold(nulls.null(calibration, statistic, architecture), level)
    return own if np.isfinite(own) else nulls.threshold(nulls.null(calibration, statistic), level)


def describe(
    calibration: Calibration, found: Scan, architecture: str, rules: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of a scan compared with clean models: p of its statistics, and the false-alarm
    rates of the rules."""
    known = sorted({rule for model in calibration.models for rule in model.alarms})
    record: dict[str, Any] = {
        "models": len(calibration.models),
        "of_architecture": sum(m.architecture == architecture for m in calibration.models),
        "false_alarms": {
            rule: nulls.false_alarms(calibration, rule)._asdict()
            for rule in (rules or known)
            if rule in known
        },
    }
    for statistic, value in _statistics(found).items():
        if len(nulls.null(calibration, statistic)):
            compared = nulls.compare(calibration, statistic, value, architecture)
            record[statistic] = {"value": value, **compared._asdict()}
    return record


def _statistics(found: Scan) -> dict[str, float]:
    """The statistics of a scan; some are missing after an early end."""
    statistics = {}
    if found.margin is not None and np.isfinite(found.margin.outliers.p_value):
        statistics[nulls.MARGIN] = found.margin.outliers.excess
    if found.located is not None and np.isfinite(found.located.norms).sum() >= COMPARABLE:
        statistics[nulls.ANOMALY] = float(np.max(found.located.scores))
    return statistics
