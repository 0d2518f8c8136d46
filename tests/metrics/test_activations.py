"""DHBE's measures: activation differences, distances between classes, and what triggers change."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toys

from jaxbd.attacks import badnets, blend, sinusoid, steganography
from jaxbd.base import Batch, UserError
from jaxbd.data import load
from jaxbd.metrics import activations, distances
from jaxbd.models import build

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared"
SPEC = build.Spec(
    arch="cnn", classes=toys.CLASSES, image_shape=toys.SHAPE, options={"width": 8, "stages": 2}
)
NET = build.net(SPEC)
ATTACK = badnets.make(
    toys.SHAPE, toys.CLASSES, badnets.Config(target=1, patch=2, pattern="white", place="random")
)


@pytest.fixture(scope="module")
def victim():
    return jax.jit(NET.init)(jax.random.key(0))


def measured(variables, **settings):
    trigger = ATTACK.init(jax.random.key(1))
    return activations.activation_differences(
        NET, variables, toys.stripes(0, 21), ATTACK.stamp, trigger, **settings
    )


# ---- activation differences ---------------------------------------------------------------------


def test_differences_are_the_norms_of_what_the_net_shows(victim):
    """Against NumPy, on a layer with places; the last batch is not full."""
    fixed = lambda _, model, images: jnp.maximum(images, model)
    model = jnp.zeros((1, *toys.SHAPE)).at[:, 2:4, 3:5].set(1)
    data = toys.stripes(0, 21)
    names = list(NET.outputs(victim, jnp.zeros((1, *toys.SHAPE)))[1])
    for layer in (names[0], names[-1], None):
        found = activations.activation_differences(
            NET, victim, data, fixed, model, layer=layer, batch_size=8
        )
        images = data.images.astype(np.float32) / 255
        pairs = [
            NET.outputs(victim, jnp.asarray(each)) for each in (images, np.maximum(images, model))
        ]
        wanted = [
            pairs[1][1][layer or names[-1]] - pairs[0][1][layer or names[-1]],
            pairs[1][0] - pairs[0][0],
        ]
        flat = [np.asarray(each, np.float64).reshape(21, -1) for each in wanted]
        norms = [np.linalg.norm(each, order, axis=1) for each in flat for order in (1, 2)]
        for one, other in zip(found, norms, strict=True):
            assert one.shape == (21,)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_differences_before_and_after_see_the_same_triggers(victim):
    """A net whose last layer is silenced moves as much inside and not at all outside, image by
    image."""
    head = jax.tree.map(jnp.zeros_like, victim["params"]["head"])
    repaired = {**victim, "params": {**victim["params"], "head": head}}
    before, after = measured(victim), measured(repaired)
    assert np.array_equal(before.layer_l1, after.layer_l1) and np.array_equal(
        before.layer_l2, after.layer_l2
    )
    assert (before.logits_l1 > 0).all() and not after.logits_l1.any() and not after.logits_l2.any()
    other = measured(victim, key=jax.random.key(7))
    assert not np.allclose(other.layer_l1, before.layer_l1), "places come from the key"


def test_differences_need_a_layer(victim):
    with pytest.raises(UserError, match="no layer 'nowhere'; it shows"):
        measured(victim, layer="nowhere")
    bare = build.from_apply(lambda variables, images: images.mean((1, 2)) @ jnp.ones((1, 4)))
    trigger = ATTACK.init(jax.random.key(1))
    with pytest.raises(UserError, match="it shows none"):
        activations.activation_differences(bare, {}, toys.stripes(0, 4), ATTACK.stamp, trigger)


def test_boxes_are_those_of_a_box_plot():
    import matplotlib.cbook

    values = np.concatenate([np.random.default_rng(0).normal(size=50), [9.0, -7.0, 3.5]])
    (wanted,) = matplotlib.cbook.boxplot_stats(values)
    boxes = activations.boxes(activations.Differences(values, values, values, -values))
    box = boxes["layer_l1"]
    found = (
        box.low,
        box.lower_quartile,
        box.median,
        box.upper_quartile,
        box.high,
        box.mean,
        box.outliers,
    )
    keys = ("whislo", "q1", "med", "q3", "whishi", "mean")
    assert found == pytest.approx((*(wanted[key] for key in keys), len(wanted["fliers"])))
    assert boxes["logits_l2"].median == -box.median


# ---- between classes ----------------------------------------------------------------------------


def samples(n, m, dimensions=12):
    rng = np.random.default_rng(0)
    one = rng.uniform(size=(n, dimensions)).astype(np.float32)
    return jnp.asarray(one), jnp.asarray(
        (rng.uniform(size=(m, dimensions)) ** 2).astype(np.float32)
    )


@pytest.mark.parametrize(("n", "m"), [(23, 17), (16, 16), (1, 40)])
def test_sliced_wasserstein_is_scipys_averaged_over_directions(n, m):
    one, other = samples(n, m)
    along = distances.directions(jax.random.key(3), 9, 12)
    assert np.allclose(np.linalg.norm(along, axis=1), 1)
    each = [scipy.stats.wasserstein_distance(one @ r, other @ r) for r in np.asarray(along)]
    found = distances.sliced_wasserstein(jax.random.key(3), one, other, projections=9)
    assert float(found) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize(
    ("order", "reference"), [(1, 0.18856627), (2, 0.22985663), (3, 0.26461956)]
)
def test_sliced_wasserstein_of_every_order(order, reference):
    """What POT 0.9.7 answers (`ot.sliced_wasserstein_distance`) to the same samples, directions and
    order."""
    found = distances.sliced_wasserstein(
        jax.random.key(3), *samples(23, 17), projections=50, order=order
    )
    assert float(found) == pytest.approx(reference, rel=1e-5)


def test_sliced_wasserstein_refuses():
    one, other = samples(3, 3)
    for settings in (dict(order=0.5), dict(projections=0)):
        with pytest.raises(UserError, match="at least 1"):
            distances.sliced_wasserstein(jax.random.key(0), one, other, **settings)
    with pytest.raises(UserError, match="empty"):
        distances.sliced_wasserstein(jax.random.key(0), one, other[:0])


@pytest.mark.parametrize("order", [1, 2])
def test_class_distances_are_those_of_the_pairs(order):
    """Classes of 5, 9 and 14 images, uint8; batches and blocks that do not divide evenly."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1, 2], [5, 9, 14])).astype(np.int32)
    images = (rng.integers(0, 90, (28, 4, 4, 3)) + 60 * labels[:, None, None, None]).astype(
        np.uint8
    )
    settings = dict(projections=5, order=order)
    found = distances.class_distances(
        jax.random.key(2), Batch(images, labels), 3, batch_size=10, block=2, **settings
    )
    assert np.array_equal(found, found.T) and not found.diagonal().any()
    keys = [jax.random.fold_in(jax.random.key(2), start) for start in (0, 2, 4)]
    along = np.concatenate(
        [distances.directions(k, n, 48) for k, n in zip(keys, (2, 2, 1), strict=True)]
    )
    values = images.reshape(28, 48) / 255 @ along.T
    grid = (np.arange(5 * 9 * 14) + 0.5) / (5 * 9 * 14)  # finer than every jump, of any two classes
    quantiles = [
        np.sort(values[labels == k], 0)[(grid * n).astype(int)] for k, n in enumerate((5, 9, 14))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        wanted = (np.abs(quantiles[a] - quantiles[b]) ** order).mean() ** (1 / order)
        assert found[a, b] == pytest.approx(wanted, rel=1e-4)
    near = distances.closest(found)
    assert (near.one, near.other) in {(0, 1), (1, 2)} and near.distance == found[
        near.one, near.other
    ]
    assert near.mean == pytest.approx((found[0, 1] + found[0, 2] + found[1, 2]) / 3)


def test_class_distances_compile_once_whatever_the_block_holds():
    data = toys.stripes(0, 50)
    distances._projector.cache_clear()
    distances._pairwise.cache_clear()
    distances.class_distances(jax.random.key(0), data, 4, projections=32, block=8, batch_size=16)
    assert distances._projector().traces == distances._pairwise(1).traces == 1


def test_class_distances_need_every_class():
    with pytest.raises(UserError, match="class 4 has no images"):
        distances.class_distances(jax.random.key(0), toys.stripes(0, 8), 5)


def test_a_uniform_shift_has_the_pixel_changes_that_its_sliced_distance_says():
    """On many directions; and the formula for E|r_1| against the average."""
    images = np.random.default_rng(0).integers(0, 200, (40, 6, 6, 3)).astype(np.uint8)
    data = Batch(np.concatenate([images, images + 51]), np.repeat([0, 1], 40).astype(np.int32))
    found = distances.class_distances(jax.random.key(0), data, 2, projections=2000, block=1000)[
        0, 1
    ]
    assert distances.as_pixel_changes(found, 108) == pytest.approx(108 * 51 / 255, rel=0.05)
    along = np.asarray(distances.directions(jax.random.key(1), 20_000, 7))
    assert distances.as_pixel_changes(np.abs(along).mean(), 7) == pytest.approx(
        np.sqrt(7), rel=0.01
    )


def test_cat_and_dog_are_the_closest_classes_of_cifar10():
    """Table 2's pair. Differs from paper: JPEG copies of the images; the ratio of mean to closest
    there is 3.1."""
    if not (SHARED / "data" / "cifar10").exists():
        pytest.skip("no CIFAR-10 images here")
    dataset = load.load(str(SHARED / "data" / "cifar10"))
    found = distances.class_distances(
        jax.random.key(0), Batch(dataset.images, dataset.labels), 10, projections=32
    )
    near = distances.closest(found)
    assert {dataset.class_names[near.one], dataset.class_names[near.other]} == {"cat", "dog"}
    assert 2 < near.mean / near.distance < 4


# ---- of triggers --------------------------------------------------------------------------------

SHAPE = (32, 32, 3)


def changes(attack):
    """Mean sum of pixel changes on images of independent uniform pixels, as stored in 8 bits."""
    images = np.random.default_rng(0).integers(0, 256, (64, *SHAPE)).astype(np.uint8)
    trigger = attack.init(jax.random.key(0))
    data = Batch(images, np.zeros(64, np.int32))
    return (
        trigger,
        distances.pixel_changes(
            jax.random.key(1), attack.stamp, trigger, data, batch_size=48
        ).mean(),
    )


@pytest.mark.parametrize("side", [1, 3, 7])
def test_patches_change_what_the_formula_says(side):
    pattern = "white" if side == 1 else "checkerboard"
    config = badnets.Config(patch=side, pattern=pattern, place="fixed", row=-1, column=-1)
    trigger, found = changes(badnets.make(SHAPE, 10, config))
    wanted = distances.square(side) if side > 1 else distances.pixel(1)
    assert found == pytest.approx(wanted, rel=0.15 if side == 1 else 0.05)
    assert distances.watermark(
        np.broadcast_to(trigger.pattern, (side, side, 3)), 1.0
    ) == pytest.approx(wanted)


@pytest.mark.parametrize("opacity", [0.1, 0.5])
def test_watermarks_change_what_the_formula_says(opacity):
    trigger, found = changes(blend.make(SHAPE, 10, blend.Config(opacity=opacity)))
    assert found == pytest.approx(distances.watermark(trigger.pattern, opacity), rel=0.01)
    half = np.zeros((32, 32, 1))
    half[:16] = opacity
    assert distances.watermark(trigger.pattern, half) < distances.watermark(
        trigger.pattern, opacity
    )


@pytest.mark.parametrize("size", [20, 40, 120])
def test_sinusoids_change_what_the_formula_says(size):
    _, found = changes(sinusoid.make(SHAPE, 10, sinusoid.Config(size=size, frequency=3)))
    assert found == pytest.approx(distances.sinusoid(SHAPE, size / 255), rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_low_bits_change_what_the_formula_says(bits):
    _, found = changes(steganography.make(SHAPE, 10, steganography.Config(bits=bits)))
    assert found == pytest.approx(distances.steganography(SHAPE, bits, repeated=True), rel=0.02)
    old, new = np.random.default_rng(0).integers(0, 2**bits, (2, 100_000))
    independent = np.abs(old - new).mean() / 255 * 3072
    assert distances.steganography(SHAPE, bits) == pytest.approx(independent, rel=0.02)


def test_largest_square():
    for side in (1, 5, 32):
        assert distances.largest_square(distances.square(side), 3) == side
        assert distances.largest_square(distances.square(side) - 0.01, 3) == side - 1
    assert distances.largest_square(0.0) == 0
