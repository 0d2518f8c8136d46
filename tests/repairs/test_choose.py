"""The choice of a setting by accuracy on held images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.base import Batch, UserError
from jaxbd.repairs import choose


@pytest.mark.parametrize(
    "accuracies, before, max_drop, expected",
    [
        ([0.9, 0.9, 0.8, 0.5], 0.9, 0.05, 1),
        ([0.9, 0.9, 0.8, 0.5], 0.9, 0.1, 2),
        ([0.9, 0.7, 0.8, 0.5], 0.9, 0.1, 2),
        ([0.9, 0.9, 0.8, 0.9], 0.9, 0.0, 3),
        ([0.7, 0.6, 0.5, 0.4], 0.9, 0.1, 0),
        ([0.8, 0.7, 0.6, 0.5], 0.9, 1.0, 3),
        # in float32 0.3 - 0.1 is more than 0.2
        ([0.3, 0.2, 0.1, 0.0], 0.3, 0.1, 1),
    ],
)
def test_the_strongest_setting_within_the_budget_is_chosen(accuracies, before, max_drop, expected):
    chosen = choose.best_within(jnp.array(accuracies), jnp.float32(before), max_drop)
    assert chosen == expected


def numbered(count: int) -> Batch:
    labels = np.arange(count, dtype=np.int32)
    return Batch(jnp.asarray(labels[:, None, None, None], jnp.float32), jnp.asarray(labels))


def test_held_images_are_apart_and_keep_their_labels():
    rest, held = choose.split(jax.random.key(0), numbered(20), 0.3, 100, "mine")
    assert len(held.labels) == 6 and sorted([*rest.labels, *held.labels]) == list(range(20))
    for part in (rest, held):
        np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.labels)
    assert len(choose.split(jax.random.key(0), numbered(20), 0.3, 4, "mine")[1].labels) == 4


@pytest.mark.parametrize("count, share", [(1, 0.5), (3, 0.1), (3, 0.99)])
def test_too_few_images_are_refused(count, share):
    with pytest.raises(UserError, match=f"mine: {count} clean images cannot be divided"):
        choose.split(jax.random.key(0), numbered(count), share, 100, "mine")
