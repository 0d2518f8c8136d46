"""Anomaly scores and the verdict."""

import numpy as np
import pytest

from jaxbd import detect
from jaxbd.base import UserError

INF, NAN = float("inf"), float("nan")


def test_mad_scores_by_hand():
    """median 3, deviations 2 1 0 1 7, their median 1."""
    np.testing.assert_allclose(detect.mad_scores([1, 2, 3, 4, 10]), np.array([-2, -1, 0, 1, 7]) / 1.4826)
    np.testing.assert_allclose(detect.mad_scores([1, 2, 3, 4, 10], consistency=1), [-2, -1, 0, 1, 7])


def test_mad_scores_find_the_outlier_of_a_normal_sample():
    values = np.random.default_rng(0).normal(5, 2, 4001)
    scores = detect.mad_scores(np.append(values, 25))
    assert abs(scores[:-1].std() - 1) < 0.05 and scores[-1] > 9


def test_mad_scores_without_spread():
    np.testing.assert_array_equal(detect.mad_scores([5, 5, 5, 5]), [0, 0, 0, 0])
    np.testing.assert_array_equal(detect.mad_scores([5, 5, 5, 9, 1]), [0, 0, 0, INF, -INF])


def test_mad_scores_leave_out_what_is_not_finite():
    scores = detect.mad_scores([1, NAN, 2, 3, INF, 4, 10])
    np.testing.assert_allclose(scores, np.array([-2, 0, -1, 0, 0, 1, 7]) / 1.4826)
    np.testing.assert_array_equal(detect.mad_scores([NAN, NAN]), [0, 0])


@pytest.mark.parametrize(
    "rates, verdict, targets",
    [
        ([0.01, 0.95, 0.02], "backdoored", [1]),
        ([0.9, 0.95, 0.02, 0.0], "backdoored", [0, 1]),
        ([0.8, 0.1, 0.1], "backdoored", [0]),
        ([0.7999, 0.1, 0.1], "inconclusive", []),
        ([0.4, 0.1, 0.1], "inconclusive", []),
        ([0.3999, 0.1, 0.1], "clean", []),
        ([0.0, 0.0], "clean", []),
        ([0.1, NAN, 0.0], "inconclusive", []),
        ([NAN, NAN], "inconclusive", []),
        ([0.99, NAN, 0.0], "backdoored", [0]),
    ],
)
def test_the_verdict_at_and_between_the_thresholds(rates, verdict, targets):
    decision = detect.decide(np.array(rates), detect.Config(threshold=0.8, doubt=0.4))
    assert (decision.verdict, decision.targets) == (verdict, targets)
    assert len(decision.scores) == len(rates)


def test_scores_measure_how_far_a_class_stands_out():
    decision = detect.decide(np.array([0.2, 0.2, 1.0, 0.2, NAN]))
    np.testing.assert_allclose(decision.scores, [0, 0, 1, 0, NAN])


@pytest.mark.parametrize("settings", [{"doubt": 0.0}, {"doubt": 0.9}, {"threshold": 1.1}, {"threshold": NAN}])
def test_thresholds_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError):
        detect.Config(**settings)
