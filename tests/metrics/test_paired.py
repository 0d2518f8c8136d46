"""The interval of a change of accuracy: its level, and what it depends on."""

import numpy as np
import pytest

from jaxbd.metrics import paired


def pairs(gained, lost, same):
    """Images that became right, became wrong, and stayed right."""
    before = [False] * gained + [True] * (lost + same)
    after = [True] * gained + [False] * lost + [True] * same
    return np.array(before), np.array(after)


def test_the_change_is_gained_less_lost():
    found = paired.compare(*pairs(10, 30, 460))
    assert found.change == pytest.approx(-0.04)
    # by hand: (10 - 30) / 502 = -.03984, sqrt(41 / 502 - .03984^2) / sqrt(502) = .01263
    assert (found.low, found.high) == (
        pytest.approx(-0.0646, abs=1e-4),
        pytest.approx(-0.0151, abs=1e-4),
    )


def test_images_that_stay_as_they_were_do_not_widen_it():
    width = lambda found: found.high - found.low
    few, many = paired.compare(*pairs(5, 5, 490)), paired.compare(*pairs(50, 50, 400))
    assert few.change == many.change == 0 and width(few) < width(many) / 2


def test_no_difference_in_a_few_images_is_not_certainty():
    found = paired.compare(*pairs(0, 0, 10))
    assert found.change == 0 and found.low < -0.1 and found.high > 0.1


def test_it_holds_the_true_change_in_95_of_100():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        before = rng.random(300) < 0.8
        after = np.where(before, rng.random(300) < 0.92, rng.random(300) < 0.2)
        found = paired.compare(before, after)
        held += found.low <= 0.8 * 0.92 + 0.2 * 0.2 - 0.8 <= found.high
    assert 0.935 <= held / 2000 <= 0.965


def test_pairs_are_needed():
    for before, after in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="pairs"):
            paired.compare(np.array(before), np.array(after))
