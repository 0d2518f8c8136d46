"""Variants of a trigger: what they are made of, and that half of the images bear none."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.repairs import vary

KEY = jax.random.key(3)
PLACE = (6, 9)


def stamp_pixel(key, value, images):
    """One pixel becomes `value`; nothing is random."""
    return images.at[:, PLACE[0], PLACE[1]].set(value)


def stamped(count: int, value: float, grey: float) -> np.ndarray:
    images = jnp.full((count, 16, 16, 1), grey)
    return np.asarray(vary.vary(stamp_pixel)(KEY, value, images))


def test_half_of_the_images_bear_the_trigger_as_it_is():
    images = stamped(2000, 0.6, 0.2)
    exact = np.asarray(stamp_pixel(KEY, 0.6, jnp.full((1, 16, 16, 1), 0.2)))
    plain = (images == exact).all((1, 2, 3)).mean()
    # a variant is never of the trigger's own strength
    assert abs(plain - (1 - vary.CHANGED)) < 0.04


def test_variants_move_grow_and_gain_within_their_bounds():
    change = jnp.zeros((2000, 16, 16, 1)).at[:, PLACE[0], PLACE[1]].set(0.1)
    changed = np.asarray(vary.change_variant(KEY, change))[..., 0]
    rows, columns = np.nonzero(changed.any(0))
    most = vary.MOST_SHIFT
    assert {*rows} == {*range(PLACE[0] - most, PLACE[0] + most + 1)}
    assert {*columns} == {*range(PLACE[1] - most, PLACE[1] + most + 1)}
    total = changed.sum((1, 2))
    grown = total > 0.1 * vary.MOST_GAIN + 1e-6
    # of the grown ones those of a gain above 1 / 2 of its range show it
    assert total.min() >= 0.1 - 1e-6 and total.max() <= 0.2 * vary.MOST_GAIN + 1e-6
    assert 0.4 < grown.mean() < 0.6
    # two copies seldom fall on one pixel
    pixels = (changed > 0).sum((1, 2))
    assert {*pixels} == {1, 2} and abs((pixels == 2).mean() - vary.GROWN * 24 / 25) < 0.04


def test_variants_are_images_and_one_function_for_one_stamp():
    images = stamped(500, 1.0, 0.5)
    assert images.min() >= 0 and images.max() == 1
    assert vary.vary(stamp_pixel) is vary.vary(stamp_pixel)
    dark = stamped(500, 0.0, 0.5)
    assert dark.min() == 0 and dark.max() == 0.5
