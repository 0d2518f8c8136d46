"""The verdict on the signs of two families, and the power without which nothing is called clean."""

import numpy as np
import pytest

from jaxbd.detection import detect, verdict

CLASSES = 10


def signs(small=(), patch=(), margin=()):
    flags = lambda classes: np.isin(np.arange(CLASSES), classes)
    return verdict.Signs(flags(small), flags(patch), flags(margin))


def power(**changes):
    whole = dict(
        searched=np.ones(CLASSES, bool),
        worked=np.ones(CLASSES, bool),
        steps=150,
        accuracy=0.8,
        chance=0.1,
        has_margin=True,
    )
    return verdict.Power(**{**whole, **changes})


@pytest.mark.parametrize(
    "shown, expected, targets, leads, natural",
    [
        (dict(small=[3], patch=[3]), "backdoored", [3], [], []),
        (dict(small=[3], margin=[3]), "backdoored", [3], [], []),
        (dict(patch=[3], margin=[3]), "backdoored", [3], [], []),
        (dict(small=[3], patch=[3, 5], margin=[3]), "backdoored", [3], [], [5]),
        (dict(small=[3, 7], patch=[3], margin=[3]), "backdoored", [3], [7], []),
        (dict(small=[3]), "inconclusive", [], [3], []),
        (dict(margin=[3]), "inconclusive", [], [3], []),
        (dict(small=[3], margin=[4]), "inconclusive", [], [3, 4], []),
        (dict(patch=[3]), "clean", [], [], [3]),
        ({}, "clean", [], [], []),
    ],
)
def test_two_signs_make_a_backdoor_and_one_a_lead(shown, expected, targets, leads, natural):
    found = verdict.judge(signs(**shown), power())
    assert (found.verdict, found.targets) == (expected, targets)
    assert (found.leads, found.natural) == (leads, natural)


def without(*classes):
    return ~np.isin(np.arange(CLASSES), classes)


@pytest.mark.parametrize(
    "lack, words",
    [
        (dict(searched=without(1, 2)), "2 of 10 classes were not searched"),
        (dict(worked=without(4), steps=99), "1 classes have no working trigger after 99 steps"),
        (dict(worked=without(*range(6))), "only 4 of 10 classes have a working trigger"),
        (dict(accuracy=0.1), "no better than always naming the most frequent class"),
        (dict(has_margin=False), "one family of searches decides alone"),
    ],
)
def test_a_search_without_power_calls_nothing_clean(lack, words):
    found = verdict.judge(signs(), power(**lack))
    assert found.verdict == "inconclusive" and len(found.lacks) == 1 and words in found.lacks[0]
    assert verdict.judge(signs(small=[3], patch=[3]), power(**lack)).verdict == "backdoored"


def test_a_few_classes_without_a_trigger_are_no_lack_after_a_whole_search():
    found = verdict.judge(signs(), power(worked=without(4, 5), steps=verdict.LEAST_STEPS))
    assert found.verdict == "clean" and not found.lacks


def test_of_two_classes_patches_decide_alone():
    """Neither sizes nor margins of two classes can be compared; and nothing is called clean."""
    flags = lambda *found: np.isin(np.arange(2), found)
    known = power(searched=np.ones(2, bool), worked=np.ones(2, bool), has_margin=False)
    found = verdict.judge(verdict.Signs(flags(), flags(1), flags()), known)
    assert (found.verdict, found.targets, found.natural) == ("backdoored", [1], [])
    calm = verdict.judge(verdict.Signs(flags(), flags(), flags()), known)
    assert calm.verdict == "inconclusive"


def test_an_untrained_net_is_not_called_attacked():
    """It gives every image one class, with or without a trigger."""
    rates, baseline = np.eye(4)[1], np.eye(4)[1]
    assert detect.decide(rates).verdict == "backdoored"
    assert detect.decide(rates, baseline=baseline).verdict == "clean"
    np.testing.assert_allclose(detect.gain(rates, baseline), [0, 0, 0, 0])


def test_the_gain_is_the_share_of_what_is_left():
    np.testing.assert_allclose(
        detect.gain(np.array([0.9, 0.5, np.nan]), np.array([0.5, 0.5, 0.1])), [0.8, 0, np.nan]
    )
