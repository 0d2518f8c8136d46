"""Clean models' scores, and the thresholds that follow."""

import dataclasses

import numpy as np
import pytest

from jaxbd.detection import calibration as nulls
from jaxbd.pipelines import calibrate
from jaxbd.pipelines.class_scan import ScanConfig


def clean(number, excess, anomaly, architecture="cnn", **alarms):
    statistics = {nulls.MARGIN: excess, nulls.ANOMALY: anomaly}
    return nulls.CleanModel(f"m{number}", architecture, 10, statistics, alarms)


def test_a_class_has_to_stand_out_of_clean_models():
    """Of 39 clean models two may score as much, 5 % of 40."""
    models = tuple(clean(n, n / 10, n / 5) for n in range(39))
    config = calibrate.apply(ScanConfig(), nulls.Calibration(models), "cnn")
    assert 3.6 < config.margin.test.least_excess <= np.nextafter(3.7, 4)
    assert 7.2 < config.anomaly_threshold <= np.nextafter(7.4, 8)
    assert config == dataclasses.replace(
        ScanConfig(),
        anomaly_threshold=config.anomaly_threshold,
        margin=dataclasses.replace(
            ScanConfig().margin,
            test=dataclasses.replace(
                ScanConfig().margin.test, least_excess=config.margin.test.least_excess
            ),
        ),
    )


@pytest.mark.parametrize("architecture, expected", [("cnn", 1.0), ("vgg", 5.0), ("other", 5.0)])
def test_too_few_models_of_an_architecture_are_judged_by_all(architecture, expected):
    models = [clean(n, 1.0, 1.0) for n in range(19)]
    models += [clean(n, 5.0, 5.0, "vgg") for n in range(18)]
    config = calibrate.apply(ScanConfig(), nulls.Calibration(tuple(models)), architecture)
    assert config.anomaly_threshold == pytest.approx(expected)


def test_too_few_models_leave_the_thresholds_alone():
    models = tuple(clean(n, 9.0, 9.0) for n in range(18))
    assert calibrate.apply(ScanConfig(), nulls.Calibration(models), "cnn") == ScanConfig()


def test_settings_that_change_no_statistic_may_differ():
    whole = calibrate.for_calibration(ScanConfig(targets=(1,), look=40))
    assert whole.targets == () and whole.look == 0
    assert calibrate.settings_of(whole) == calibrate.settings_of(ScanConfig(look=9))
    assert calibrate.settings_of(whole) != calibrate.settings_of(ScanConfig(steps=9))
