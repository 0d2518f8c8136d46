"""Classes that stand out: formulas against SciPy, false alarms against the level, odd input."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from jaxbd.base import UserError
from jaxbd.detection import null

QUICK = null.Config(simulations=2000)
HEAVY = null.Config(simulations=2000, family="lognormal")


def usual(seed: int, count: int) -> np.ndarray:
    """Statistics of a model in which no class stands out."""
    return np.random.default_rng(seed).gamma(12, 5, size=count)


def planted(seed: int, count: int, *factors: float) -> np.ndarray:
    """`usual` with the first classes at `factors` times the mean."""
    values = usual(seed, count)
    values[: len(factors)] = np.array(factors) * values[len(factors) :].mean()
    return values


@pytest.mark.parametrize("count, shape", [(2, 3.0), (9, 0.7), (9, 20.0), (42, 5.0)])
def test_the_gamma_fit_is_the_maximum_of_the_likelihood(count, shape):
    values = np.random.default_rng(0).gamma(shape, 3.0, size=count)
    expected, _, scale = scipy.stats.gamma.fit(values, floc=0)
    fitted = null.fit_gamma(values)
    np.testing.assert_allclose([fitted.shape, fitted.scale], [expected, scale], rtol=1e-4)


def test_the_nominal_p_is_the_papers():
    values = usual(3, 10)
    rest = np.sort(values)[:-1]
    shape, _, scale = scipy.stats.gamma.fit(rest, floc=0)
    expected = 1 - scipy.stats.gamma.cdf(values.max(), shape, scale=scale) ** 10
    assert null.find_outliers(values, QUICK).nominal == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("config", [QUICK, HEAVY], ids=["gamma", "lognormal"])
@pytest.mark.parametrize("count", [3, 5, 10, 43])
def test_models_without_an_outlier_raise_no_more_alarms_than_the_level(count, config):
    """400 models, at most 0.05 + 3 standard errors."""
    p = [null.find_outliers(usual(seed, count), config).p_value for seed in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_papers_p_raises_several_times_as_many():
    """What the correction is for; the module's docstring states the rates."""
    for count, rate in ((3, 0.66), (10, 0.25)):
        found = [null.find_outliers(usual(s, count), QUICK).nominal <= 0.05 for s in range(400)]
        assert np.mean(found) == pytest.approx(rate, abs=0.08)


@pytest.mark.parametrize("config", [QUICK, HEAVY], ids=["gamma", "lognormal"])
@pytest.mark.parametrize("count, factor", [(4, 30.0), (6, 12.0), (10, 5.0), (43, 4.0)])
def test_a_class_far_out_is_named_alone(count, factor, config):
    found = [null.find_outliers(planted(seed, count, factor), config) for seed in range(20)]
    named = [each.classes for each in found]
    assert named.count([0]) >= 18, named
    assert all(each.class_p[0] <= 0.05 for each in found if each.classes == [0])


def test_effects_beyond_the_floats_still_differ():
    """With three classes whole tails underflow; the larger class must still have the smaller p."""
    p = [null.find_outliers([1.0, 1.2, far], QUICK).p_value for far in (3.0, 30.0, 3e3, 1e6)]
    assert p == sorted(p, reverse=True) and p[0] > 3 * p[-1]


def test_of_three_classes_the_others_of_an_outlier_cannot_be_tested():
    found = null.find_outliers([1.0, 1.2, 1e6], QUICK)
    assert found.classes == [2] and np.isnan(found.class_p[:2]).all() and found.class_p[2] <= 0.05


def test_two_classes_that_hide_each_other_are_both_named():
    found = null.find_outliers(planted(0, 10, 6.0, 6.1), QUICK)
    alone = null.find_outliers(planted(0, 10, 6.0, 6.1), dataclasses.replace(QUICK, most=1))
    assert found.classes == [1, 0] and found.p_value <= 0.05
    assert alone.classes == [] and alone.p_value > 0.05


def test_a_class_that_stands_out_only_after_the_first_is_a_lead():
    found = null.find_outliers(planted(0, 10, 60.0, 4.0), QUICK)
    assert (found.classes, found.beside) == ([0], [1])


def test_scale_and_order_do_not_matter():
    values = planted(1, 10, 3.0)
    order = np.random.default_rng(0).permutation(10)
    first, second = (null.find_outliers(v, QUICK) for v in (values, 1e-3 * values[order]))
    assert first.p_value == second.p_value and first.excess == pytest.approx(second.excess)
    np.testing.assert_allclose(first.class_p[order], second.class_p)


def test_ties_are_no_outliers():
    assert null.find_outliers(np.full(10, 7.0), QUICK).p_value > 0.5
    nearly = np.full(10, 7.0)
    nearly[4] = 7.1
    assert null.find_outliers(nearly, QUICK).classes == []
    nearly[4] = 70.0
    assert null.find_outliers(nearly, QUICK).classes == [4]


def test_the_needed_statistic_is_where_the_alarm_begins():
    single = dataclasses.replace(QUICK, most=1)
    values = usual(5, 10)
    rest = np.sort(values)[:-1]
    needed = null.find_outliers(values, single).needed
    for factor, alarm in ((1.0001, True), (0.9999, False)):
        found = null.find_outliers(np.append(rest, factor * needed), single)
        assert (found.p_value <= 0.05) is alarm


def test_statistics_that_are_missing_do_not_count():
    values = planted(2, 12, 8.0)
    whole = null.find_outliers(values, QUICK)
    gaps = np.insert(values, [1, 5, 9], [np.nan, np.inf, -np.inf])
    found = null.find_outliers(gaps, QUICK)
    assert found._replace(class_p=0) == whole._replace(class_p=0)
    assert np.isnan(found.class_p[[1, 6, 11]]).all() and found.measured == 12


def test_a_class_that_is_never_reached_does_not_hide_the_outlier():
    values = planted(2, 10, 8.0)
    values[7], values[8] = -30.0, 0.0
    assert null.find_outliers(values, QUICK).classes == [0]


@pytest.mark.parametrize("values", [[], [3.0], [3.0, 50.0], [np.nan, 1.0, np.inf, 9.0]])
def test_too_few_classes_have_no_p(values):
    found = null.find_outliers(values, QUICK)
    assert np.isnan(found.p_value) and not found.classes and found.needed == np.inf


@pytest.mark.parametrize(
    "values", [[-1.0, 0.0, -5.0], [685.0, -4.7, -22.9, -60.0], [9.0, 8.0, -1, -1, -1]]
)
def test_classes_that_are_not_reached_are_nothing_to_compare_with(values):
    """A net that answers nearly every image with one class; more of the search may decide."""
    found = null.find_outliers(values, QUICK)
    assert np.isnan(found.p_value) and not found.classes and found.measured == len(values)


def test_results_repeat_and_depend_on_the_seed_only_in_the_last_digits():
    values = planted(4, 10, 2.0)
    again = [
        null.find_outliers(values, dataclasses.replace(QUICK, seed=s)).p_value for s in (0, 0, 1)
    ]
    assert again[0] == again[1] and again[2] == pytest.approx(again[0], abs=0.04)


@pytest.mark.parametrize(
    "bad, named",
    [
        (dict(level=0.0), "level"),
        (dict(level=float("nan")), "level"),
        (dict(most=0), "most"),
        (dict(least_spread=1.0), "least_spread"),
        (dict(simulations=50), "simulations"),
        (dict(family="normal"), "family"),
    ],
)
def test_settings_out_of_range_are_refused(bad, named):
    with pytest.raises(UserError, match=named):
        null.Config(**bad)


def test_a_thousand_classes_take_seconds():
    found = null.find_outliers(planted(0, 1000, 5.0))
    assert found.classes == [0] and found.p_value < 0.01
