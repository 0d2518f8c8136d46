"""The largest margin of each class: nets whose answer is known, and what the search promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.base import Cell, UserError
from jaxbd.detection import null
from jaxbd.inversion import margin
from jaxbd.models import build
from jaxbd.training import sweep
from jaxbd.training.run import Run

TARGET, STARTS = 2, 3
SEARCH = margin.make(toys.NET, toys.SHAPE, margin.Config(learning_rate=0.1))
CELLS = margin.cells(toys.CLASSES, STARTS)


def found(victim, num_steps=100, search=SEARCH):
    return sweep.search(
        Run(),
        "margin",
        jax.random.key(0),
        search,
        margin.no_batch,
        None,
        CELLS,
        victim,
        num_steps=num_steps,
    )


def of_classes(states) -> np.ndarray:
    return margin.statistics(states.best_margin, CELLS.target, toys.CLASSES)


def test_the_margin_is_the_logit_over_the_largest_other():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for target in range(4):
        expected = logits[:, target] - np.delete(logits, target, axis=1).max(1)
        got = margin.margin(jnp.asarray(logits), jnp.int32(target))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_hand_built_backdoor_stands_out_and_its_clean_twin_does_not():
    """A trigger that adds 20 to a logit; without it no margin can exceed 8."""
    planted = null.find_outliers(of_classes(found(toys.victim(TARGET)).states))
    clean = of_classes(found(toys.victim(TARGET, gain=0.0)).states)
    assert planted.classes == [TARGET]
    assert null.find_outliers(clean).p_value > 0.2
    assert clean.max() <= 8 + 1e-4


def test_the_maximum_of_a_linear_net_is_found_in_the_box():
    """Class k reads only its own pixels, with positive weights: the best image is 1 there, 0
    elsewhere."""
    weights = np.random.default_rng(1).uniform(0.5, 1, (toys.CLASSES, 16)).astype(np.float32)
    net = build.from_apply(
        lambda variables, images: jnp.einsum(
            "bkp,kp->bk", images.reshape(-1, toys.CLASSES, 16), variables["params"]
        )
    )
    search = margin.make(net, toys.SHAPE, margin.Config(learning_rate=0.1))
    states = found({"params": jnp.asarray(weights)}, 200, search).states
    np.testing.assert_allclose(of_classes(states), weights.sum(1), rtol=1e-3)
    assert states.best.min() >= 0 and states.best.max() <= 1


def test_the_best_image_has_the_best_margin():
    states = found(toys.victim(TARGET), num_steps=30).states
    logits, _ = toys.NET.apply(toys.victim(TARGET), jnp.asarray(states.best))
    for index, target in enumerate(np.asarray(CELLS.target)):
        value = margin.margin(logits[index : index + 1], jnp.int32(target))[0]
        np.testing.assert_allclose(value, states.best_margin[index], rtol=1e-5)


def test_cells_that_converged_stop_early_with_the_margin_of_a_full_run():
    full = margin.make(toys.NET, toys.SHAPE, margin.Config(learning_rate=0.1, stop_change=0))
    assert full.converged is None
    victim = toys.victim(TARGET, gain=0.0)
    stopped, whole = found(victim, 300), found(victim, 300, full)
    assert (stopped.steps < 300).any() and (whole.steps == 300).all()
    assert stopped.image_steps == stopped.steps.sum()
    np.testing.assert_allclose(of_classes(stopped.states), of_classes(whole.states), rtol=1e-3)


def test_the_starts_of_a_class_differ_and_the_batch_does_not_matter():
    first = found(toys.victim(TARGET), num_steps=1).states.best
    assert not np.allclose(first[0], first[1])
    cell = Cell(jnp.int32(1), jnp.int32(-1), jnp.float32(0))
    state = SEARCH.init(jax.random.key(1))
    images = toys.quadrants(0, 8, np.float32)
    step = lambda batch: SEARCH.step(jax.random.key(2), state, batch, cell, toys.victim(TARGET))
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), step(None), step(images)))
    )
    assert (SEARCH.stamp(jax.random.key(3), state, images.images) == images.images).all()


@pytest.mark.parametrize(
    "classes, starts, targets, message",
    [
        (2, 4, None, "at least 3 classes, the model has 2"),
        (4, 0, None, "starts must be at least 1, got 0"),
        (4, 1, [4], "target 4 is out of range"),
        (4, 1, [], "no target"),
    ],
)
def test_what_cannot_be_searched_is_refused(classes, starts, targets, message):
    with pytest.raises(UserError, match=message):
        margin.cells(classes, starts, targets)


def test_a_class_without_a_finite_margin_has_no_statistic():
    got = margin.statistics([1.0, 3.0, np.nan, np.inf, 2.0], [0, 0, 1, 1, 2], 4)
    np.testing.assert_array_equal(got, [3.0, np.nan, 2.0, np.nan])
