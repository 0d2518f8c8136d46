"""Plain patches: where the box and its colours come to lie, and that the colours are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd.base import Batch, Cell, UserError
from jaxbd.data import draw
from jaxbd.inversion import plain
from jaxbd.models import build
from jaxbd.training.run import Run

SHAPE = (8, 8, 1)
CELL = Cell(jnp.int32(1), jnp.int32(0), jnp.float32(0))


def bright_corner(variables, images):
    """Class 1 where the patch at rows 5..7, columns 2..4 is bright, and by how much; class 0
    otherwise."""
    light = images[:, 5:8, 2:5].mean((1, 2, 3)) * variables["params"]["gain"]
    return jnp.stack([jnp.full_like(light, 0.5), light, jnp.zeros_like(light)], -1)


NET = build.from_apply(bright_corner)
VICTIM = {"params": {"gain": jnp.float32(1.0)}}


def state_of(method, box, colours=None):
    state = method.init(jax.random.key(0))._replace(box=jnp.array(box, jnp.int32))
    return state if colours is None else state._replace(colours=jnp.asarray(colours, jnp.float32))


def logit(values):
    values = np.asarray(values, np.float32)
    return np.log(values / (1 - values))


def test_one_colour_fills_the_box_and_nothing_else():
    method = plain.make(NET, SHAPE, plain.Config())
    images = jnp.asarray(np.random.default_rng(0).random((3, *SHAPE)), jnp.float32)
    stamped = np.asarray(
        method.stamp(None, state_of(method, [5, 2, 8, 4], logit([[[0.9]]])), images)
    )
    expected = np.array(images)
    expected[:, 5:8, 2:4] = 0.9
    np.testing.assert_allclose(stamped, expected, atol=1e-6)
    shown = np.asarray(method.sample(None, state_of(method, [5, 2, 8, 4], logit([[[0.9]]])), 2))
    assert shown.shape == (2, *SHAPE)
    np.testing.assert_allclose(shown.sum((1, 2, 3)), 6 * 0.9, rtol=1e-5)


def test_several_colours_are_bilinear_between_the_centres_of_their_cells():
    method = plain.make(NET, SHAPE, plain.Config(grid=2))
    state = state_of(method, [0, 0, 4, 8], logit([[[0.2], [0.6]], [[0.4], [0.8]]]))
    shown = np.asarray(method.sample(None, state, 1))[0, ..., 0]
    resized = np.asarray(jax.image.resize(jnp.array([[0.2, 0.6], [0.4, 0.8]]), (4, 8), "bilinear"))
    np.testing.assert_allclose(shown[:4], resized, atol=1e-5)
    assert not shown[4:].any()


def test_the_colour_that_works_best_is_found_in_the_box_given():
    method = plain.make(NET, SHAPE, plain.Config())
    data = Batch(jnp.zeros((40, *SHAPE)), jnp.zeros(40, jnp.int32))
    state, infos, _ = Run().fit(
        "plain",
        jax.random.key(1),
        method.step,
        draw.uniform(8),
        data,
        state_of(method, [5, 2, 8, 5]),
        CELL,
        VICTIM,
        info=plain.Info,
        num_steps=60,
    )
    assert jax.nn.sigmoid(state.colours).min() > 0.95
    np.testing.assert_allclose(
        infos.margin[0], 0.0, atol=1e-6
    )  # mid-grey is as bright as class 0 asks
    assert infos.margin[-1] > 0.4 and infos.attack_success_rate[-1] == 1
    np.testing.assert_array_equal(state.box, [5, 2, 8, 5])


def test_the_box_is_the_smallest_around_what_the_mask_covers():
    mask = np.zeros(SHAPE)
    assert plain.box_of(mask) is None
    mask[3, 6], mask[5, 2], mask[7, 7] = 0.3, 0.9, 0.2
    np.testing.assert_array_equal(plain.box_of(mask), [3, 2, 6, 7])


@pytest.mark.parametrize("settings", [{"grid": 0}, {"learning_rate": 0.0}])
def test_bad_settings(settings):
    with pytest.raises(UserError, match="plain"):
        plain.Config(**settings)
