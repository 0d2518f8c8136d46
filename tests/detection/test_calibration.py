"""Calibrations: exact p, intervals against SciPy, and files that cannot be trusted."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from jaxbd.base import UserError
from jaxbd.detection import calibration
from jaxbd.detection.calibration import ANOMALY, MARGIN, Calibration, CleanModel
from jaxbd.pipelines import calibrate
from jaxbd.pipelines.scan import PRESETS


def clean_models(count: int, architecture: str = "cnn", start: float = 0.0) -> list[CleanModel]:
    """Models whose statistics are start, start + 1, ...; the last one in five raised an alarm."""
    return [
        CleanModel(
            f"{architecture}-{number}",
            architecture,
            10,
            {MARGIN: start + number, ANOMALY: 0.5},
            {"margin": number % 5 == 4},
        )
        for number in range(count)
    ]


CLEAN = Calibration((*clean_models(39), *clean_models(5, "vgg", 100.0)), {"starts": 4})


@pytest.mark.parametrize(
    "value, p", [(-1.0, 1.0), (0.0, 1.0), (0.5, 39 / 40), (38.0, 2 / 40), (38.5, 1 / 40)]
)
def test_p_is_the_share_of_clean_models_that_score_as_much(value, p):
    found = calibration.compare(CLEAN, MARGIN, value, "cnn")
    assert found == (pytest.approx(p), 39, "cnn")


def test_an_architecture_with_few_models_is_judged_by_all():
    found = calibration.compare(CLEAN, MARGIN, 99.0, "vgg")
    assert found == (pytest.approx(6 / 45), 44, None)
    assert calibration.compare(CLEAN, MARGIN, 99.0, "vgg", least_models=5).p_value == 1.0


def test_the_threshold_is_where_p_reaches_the_level():
    values = calibration.null(CLEAN, MARGIN, "cnn")
    for level in (0.05, 0.1, 0.5):
        limit = calibration.threshold(values, level)
        at, below = (
            calibration.compare(CLEAN, MARGIN, value, "cnn").p_value
            for value in (limit, np.nextafter(limit, -np.inf))
        )
        assert at <= level < below
    assert calibration.threshold(values[:10], 0.05) == math.inf


def test_p_of_clean_models_is_at_most_the_level_as_often_as_it_says():
    """Leaving each model out in turn: of 40 exchangeable models 2 have p <= 0.05."""
    models = clean_models(40)
    p = [
        calibration.compare(
            Calibration(tuple(m for m in models if m is not own)), MARGIN, own.statistics[MARGIN]
        ).p_value
        for own in models
    ]
    assert sum(value <= 0.05 for value in p) == 2


@pytest.mark.parametrize("hits, count", [(0, 30), (1, 30), (15, 30), (30, 30), (0, 1)])
def test_the_interval_is_clopper_and_pearsons(hits, count):
    exact = scipy.stats.binomtest(hits, count).proportion_ci(method="exact")
    np.testing.assert_allclose(calibration.interval(hits, count), exact, atol=1e-9)


def test_the_false_alarm_rate_comes_with_its_interval():
    rate = calibration.false_alarms(CLEAN, "margin", "cnn")
    assert (rate.alarms, rate.models) == (7, 39)
    assert rate.low < rate.rate < rate.high
    with pytest.raises(UserError, match="resnet18"):
        calibration.false_alarms(CLEAN, "margin", "resnet18")


def test_a_calibration_survives_its_file(tmp_path):
    calibration.save(tmp_path / "null.json", CLEAN)
    assert calibration.load(tmp_path / "null.json") == CLEAN
    stored = json.loads((tmp_path / "null.json").read_text())
    assert stored["false_alarms"]["margin"]["models"] == 44


def test_a_statistic_that_is_not_finite_is_left_out():
    model = CleanModel("m", "cnn", 10, {MARGIN: math.inf, ANOMALY: 1.0}, {})
    again = calibration.from_json(calibration.to_json(Calibration((model,))))
    assert again.models[0].statistics == {ANOMALY: 1.0}
    with pytest.raises(UserError, match=MARGIN):
        calibration.compare(again, MARGIN, 1.0)


def test_only_calibrations_of_the_same_settings_are_joined():
    joined = calibration.merge([CLEAN, Calibration(tuple(clean_models(2)), {"starts": 4})])
    assert len(joined.models) == 46 and joined.settings == {"starts": 4}
    with pytest.raises(UserError, match="settings"):
        calibration.merge([CLEAN, Calibration(tuple(clean_models(2)), {"starts": 8})])


def row(**changes):
    good = dict(name="m", architecture="cnn", classes=10, statistics={}, alarms={})
    return {"format": calibration.FORMAT, "models": [{**good, **changes}]}


@pytest.mark.parametrize(
    "value, named",
    [
        (None, "format"),
        ([], "format"),
        ({"format": "other"}, "format"),
        ({"format": calibration.FORMAT}, "models"),
        ({"format": calibration.FORMAT, "models": [3]}, "model 0"),
        ({"format": calibration.FORMAT, "models": [], "settings": []}, "settings"),
        (row(extra=1), "exactly"),
        (row(name=3), "name"),
        (row(architecture="x" * 1000), "architecture"),
        (row(classes=True), "classes"),
        (row(classes=1), "classes"),
        (row(statistics={"a": "1"}), "statistics"),
        (row(statistics={"a": float("nan")}), "statistics"),
        (row(statistics={"a": 10**400}), "statistics"),
        (row(statistics={"a": True}), "statistics"),
        (row(statistics=[1]), "statistics"),
        (row(alarms={"a": 1}), "alarms"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, value, named):
    with pytest.raises(UserError, match=named):
        calibration.from_json(value)
    path = tmp_path / "null.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"null\.json"):
        calibration.load(path)


def test_the_calibration_that_comes_with_the_package_is_of_thirty_clean_nets_or_more():
    known = calibration.load("small-nets")
    names = [model.name for model in known.models]
    assert len(names) >= 30 and len(set(names)) == len(names)
    assert len({model.architecture for model in known.models}) >= 4
    assert all(
        0 <= calibration.false_alarms(known, rule).rate < 0.5 for rule in known.models[0].alarms
    )
    # of a net whose classes hardly reach a positive margin there is no statistic
    for statistic, least in ((MARGIN, 19), (ANOMALY, 30)):
        values = calibration.null(known, statistic)
        assert len(values) >= least and np.isfinite(calibration.threshold(values, 0.05))
    # a scan with the default settings can be compared with these nets
    assert known.settings == calibrate.settings_of(calibrate.for_calibration(PRESETS["quick"]))
