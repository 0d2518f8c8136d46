"""Anomaly scores and the verdict."""

import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.detection import detect

INF, NAN = float("inf"), float("nan")


def test_mad_scores_by_hand():
    """median 3, deviations 2 1 0 1 7, their median 1."""
    np.testing.assert_allclose(
        detect.mad_scores([1, 2, 3, 4, 10]), np.array([-2, -1, 0, 1, 7]) / 1.4826
    )
    np.testing.assert_allclose(
        detect.mad_scores([1, 2, 3, 4, 10], consistency=1), [-2, -1, 0, 1, 7]
    )


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


@pytest.mark.parametrize(
    "settings", [{"doubt": 0.0}, {"doubt": 0.9}, {"threshold": 1.1}, {"threshold": NAN}]
)
def test_thresholds_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError):
        detect.Config(**settings)


def off_diagonal(values: list[float]) -> np.ndarray:
    """[3, 3] with `values` row by row beside the diagonal."""
    matrix = np.full((3, 3), NAN)
    matrix[~np.eye(3, dtype=bool)] = values
    return matrix


def test_pair_scores_by_hand():
    """Median 3.5, deviations 2.5 1.5 0.5 0.5 1.5 6.5, their median 1.5; what is below the median
    scores 0."""
    scores = detect.pair_scores(off_diagonal([1, 2, 3, 4, 5, 10]))
    np.testing.assert_allclose(scores, off_diagonal([0, 0, 0, 0.5 / 1.5, 1, 6.5 / 1.5]))


def test_pair_scores_leave_out_the_diagonal_what_was_not_searched_and_what_was_not_found():
    """Left: 1 2 3 4 10 with median 3 and deviations 2 1 0 1 7. A number on the diagonal changes
    nothing."""
    statistics = np.full((4, 4), NAN)
    statistics[0, 1:], statistics[1, [0, 2]], statistics[2, :2] = [1, 2, 3], [4, 10], [0, 0]
    np.fill_diagonal(statistics, 99)
    scores = detect.pair_scores(statistics)
    np.testing.assert_allclose(scores[0], [NAN, 0, 0, 0])
    np.testing.assert_allclose(scores[1], [1, NAN, 7, NAN])
    np.testing.assert_allclose(scores[2], [0, 0, NAN, NAN])
    assert np.isnan(scores[3]).all()


def test_pair_scores_without_spread_or_without_anything():
    np.testing.assert_array_equal(
        detect.pair_scores(off_diagonal([5, 5, 5, 5, 9, 1])), off_diagonal([0] * 4 + [INF, 0])
    )
    np.testing.assert_array_equal(detect.pair_scores(off_diagonal([0] * 6)), off_diagonal([0] * 6))
    assert np.isnan(detect.pair_scores(np.full((3, 3), NAN))).all()


def test_centred_scores_find_what_rows_and_columns_do_not_explain():
    """Statistics that are a source's factor times a target's; a permutation's pairs doubled, then
    one column."""
    rng = np.random.default_rng(0)
    statistics = np.exp(
        rng.normal(size=(7, 1)) + rng.normal(size=(1, 7)) + 0.05 * rng.normal(size=(7, 7))
    )
    one_to_one = statistics.copy()
    one_to_one[np.arange(7), (np.arange(7) + 1) % 7] *= 2
    scores = detect.centred_scores(one_to_one)
    assert np.isnan(np.diag(scores)).all()
    assert [tuple(each) for each in np.argwhere(scores > 7)] == [(s, (s + 1) % 7) for s in range(7)]
    column = statistics.copy()
    column[:, 3] *= 2
    np.testing.assert_allclose(
        detect.centred_scores(column), detect.centred_scores(statistics), atol=1e-4
    )


def test_centred_scores_with_gaps():
    """A row that was not searched, a pair without a trigger."""
    statistics = np.exp(np.random.default_rng(1).normal(size=(5, 5)))
    statistics[2], statistics[0, 1] = NAN, 0
    scores = detect.centred_scores(statistics)
    assert (scores[2][[0, 1, 3, 4]] == 0).all() and scores[0, 1] == 0 and np.nanmax(scores) > 0


@pytest.mark.parametrize(
    "pairs, classes, kind",
    [
        ([], 10, None),
        ([(s, 4) for s in range(10) if s != 4], 10, "all-to-one"),
        ([(1, 4), (2, 4)], 10, "all-to-one"),
        ([(1, 4)], 10, "mixed"),
        ([(1, 0)], 2, "all-to-one"),
        ([(s, (s + 1) % 10) for s in range(10)], 10, "all-to-all"),
        ([(s, (s + 1) % 10) for s in range(5)], 10, "all-to-all"),
        ([(s, (s + 1) % 10) for s in range(4)], 10, "mixed"),
        ([(s, (s + 1) % 10) for s in range(10)] + [(8, 1)], 10, "mixed"),
        ([(1, 4), (2, 4), (3, 5)], 10, "mixed"),
    ],
)
def test_the_setting(pairs, classes, kind):
    assert detect.setting(pairs, classes) == kind
