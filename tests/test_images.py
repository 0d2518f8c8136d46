"""What the image operations guarantee, on every pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbd import images as ops
from jaxbd.attacks import badnets, given
from jaxbd.base import ANY_SOURCE, Batch
from jaxbd.data import draw


@pytest.fixture
def image():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(7, 9, 3)), jnp.float32)


def test_paste_changes_the_patch_and_no_other_bit(image):
    patch = np.random.default_rng(1).uniform(size=(3, 2, 3)).astype(np.float32)
    for row, column in [(0, 0), (4, 7), (2, 3)]:
        expected = np.array(image)
        expected[row : row + 3, column : column + 2] = patch
        np.testing.assert_array_equal(
            ops.paste(image, jnp.asarray(patch), jnp.array([row, column])), expected
        )


def test_paste_moves_a_place_that_is_too_far_back_to_the_last_one(image):
    patch = jnp.zeros((3, 3, 3))
    far = ops.paste(image, patch, jnp.array([100, 100]))
    np.testing.assert_array_equal(far, ops.paste(image, patch, jnp.array([4, 6])))


@pytest.mark.parametrize("channels", [1, 3])
def test_blend_is_the_weighted_mean_and_exact_at_the_ends(image, channels):
    mask = np.random.default_rng(2).uniform(size=(7, 9, channels)).astype(np.float32)
    mask[:3], mask[3:5] = 0, 1
    pattern = 1 - image
    out = np.asarray(ops.blend(image, pattern, jnp.asarray(mask)))
    np.testing.assert_allclose(
        out, (1 - mask) * np.asarray(image) + mask * np.asarray(pattern), atol=1e-6
    )
    np.testing.assert_array_equal(out[:3], image[:3])
    np.testing.assert_array_equal(out[3:5], pattern[3:5])


def test_to_float_scales_bytes_and_passes_floats():
    np.testing.assert_allclose(
        ops.to_float(jnp.array([0, 51, 255], jnp.uint8)), [0, 0.2, 1], rtol=1e-6
    )
    wide = jnp.array([0.3], jnp.bfloat16)
    assert ops.to_float(wide) is wide


def test_to_uint8_grid_is_what_storing_gives():
    values = jnp.linspace(-0.2, 1.2, 999)
    stored = np.round(np.clip(np.asarray(values), 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(ops.to_uint8_grid(values), ops.to_float(jnp.asarray(stored)))


def test_random_places_are_uniform_over_all_places_and_reach_the_last():
    places = np.asarray(ops.random_places(jax.random.key(0), 12_000, (5, 6, 1), (3, 3)))
    counts = np.zeros((3, 4))
    np.add.at(counts, tuple(places.T), 1)
    assert counts.sum() == 12_000
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_edge_places_are_oftener_in_corners_and_along_edges():
    """5 and 4 places; two and one more beyond each end: 3/9, 1/9, 1/9, 1/9, 3/9 and 2/6, 1/6, 1/6,
    2/6."""
    places = np.asarray(ops.edge_places(jax.random.key(0), 20_000, (7, 6, 1), (3, 3)))
    assert places.dtype == np.int32
    rows, columns = (np.bincount(places[:, axis]) / len(places) for axis in (0, 1))
    np.testing.assert_allclose(rows, [3 / 9, 1 / 9, 1 / 9, 1 / 9, 3 / 9], atol=0.015)
    np.testing.assert_allclose(columns, [2 / 6, 1 / 6, 1 / 6, 2 / 6], atol=0.015)
    joint = np.mean((places[:, 0] == 4) & (places[:, 1] == 3))
    assert abs(joint - 1 / 9) < 0.015
    np.testing.assert_array_equal(
        ops.edge_places(jax.random.key(0), 5, (3, 3, 1), (3, 3)), np.zeros((5, 2))
    )


def test_random_places_of_a_patch_as_large_as_the_image():
    np.testing.assert_array_equal(
        ops.random_places(jax.random.key(0), 5, (3, 3, 1), (3, 3)), np.zeros((5, 2))
    )


def test_random_crop_pads_with_zeros_and_reaches_every_offset(image):
    padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    windows = {padded[r : r + 7, c : c + 9].tobytes() for r in range(3) for c in range(3)}
    keys = jax.random.split(jax.random.key(0), 100)
    crops = np.asarray(jax.vmap(ops.random_crop, (0, None, None))(keys, image, 1))
    assert {crop.tobytes() for crop in crops} == windows


def test_random_flip_mirrors_left_and_right_half_of_the_time(image):
    keys = jax.random.split(jax.random.key(0), 400)
    out = np.asarray(jax.vmap(ops.random_flip, (0, None))(keys, image))
    mirrored = (out == np.asarray(image)[None, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (out == np.asarray(image)[None]).all((1, 2, 3))).all()
    assert abs(mirrored.mean() - 0.5) < 0.1


def test_augment_off_changes_nothing_and_on_treats_every_image_on_its_own(image):
    batch = jnp.stack([image] * 40)
    np.testing.assert_array_equal(ops.augment(jax.random.key(0), batch), batch)
    out = np.asarray(ops.augment(jax.random.key(0), batch, crop_padding=2, flip=True))
    assert out.shape == batch.shape and len({one.tobytes() for one in out}) > 20


@pytest.mark.parametrize("place", ["random", "fixed"])
def test_stamping_leaves_every_pixel_outside_the_patch_alone(place):
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(30, 8, 8, 3)), jnp.float32)
    patch = badnets.make((8, 8, 3), 4, badnets.Config(place=place, row=1, column=2))
    trigger = patch.init(jax.random.key(1))
    changed = np.asarray(patch.stamp(jax.random.key(2), trigger, images) != images).any(-1)
    corners = set()
    for one in changed:
        rows, columns = np.nonzero(one)
        assert len(rows) == 9 and np.ptp(rows) == np.ptp(columns) == 2
        corners.add((rows.min(), columns.min()))
    assert corners == {(1, 2)} if place == "fixed" else len(corners) > 10


def test_negative_places_count_from_the_last_that_fits():
    patch = badnets.make(
        (8, 9, 1), 4, badnets.Config(place="fixed", row=-1, column=-2, pattern="white")
    )
    out = np.asarray(
        patch.stamp(jax.random.key(0), patch.init(jax.random.key(0)), jnp.zeros((1, 8, 9, 1)))
    )[0, ..., 0]
    expected = np.zeros((8, 9))
    expected[5:8, 5:8] = 1
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("apply", ["overwrite", "add"])
def test_a_given_trigger_leaves_pixels_outside_its_mask_alone(apply):
    mask = np.zeros((2, 2, 1), np.float32)
    mask[0, 0] = 1
    loaded = given.Loaded(np.full((2, 2, 1), 0.25, np.float32), mask)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 5, 5, 1)), jnp.float32)
    attack, trigger = given.make((5, 5, 1), 3, given.Config(apply=apply, row=3, column=1), loaded)
    expected = np.array(images)
    expected[:, 3, 1] = 0.25 if apply == "overwrite" else np.minimum(expected[:, 3, 1] + 0.25, 1)
    np.testing.assert_array_equal(attack.stamp(jax.random.key(0), trigger, images), expected)


def test_drawn_batches_are_uniform_and_keep_images_with_their_labels():
    labels = np.arange(10, dtype=np.int32) % 3
    data = Batch(
        jnp.asarray(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)), jnp.asarray(labels)
    )
    batch = draw.uniform(10_000)(jax.random.key(0), data)
    rows = np.round(np.asarray(batch.images).ravel() * 255).astype(int)
    np.testing.assert_array_equal(batch.labels, labels[rows])
    assert np.abs(np.bincount(rows, minlength=10) - 1000).max() < 5 * np.sqrt(900)


def test_a_source_class_draws_all_of_its_images_alike_and_no_other():
    labels = np.array([2, 0, 1, 0, 2, 2, 0, 2], np.int32)
    data = Batch(jnp.asarray(np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)), jnp.asarray(labels))
    for source in (0, 1, 2, ANY_SOURCE):
        batch = draw.uniform(6_000)(jax.random.key(1), data, jnp.int32(source))
        rows = np.round(np.asarray(batch.images).ravel() * 255).astype(int)
        wanted = np.flatnonzero((labels == source) | (source == ANY_SOURCE))
        counts = np.bincount(rows, minlength=8)
        assert set(np.flatnonzero(counts)) == set(wanted)
        mean = 6_000 / len(wanted)
        assert np.abs(counts[wanted] - mean).max() <= 5 * np.sqrt(mean)
