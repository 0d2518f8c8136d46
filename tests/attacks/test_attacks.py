"""Patches, poison rates and relabelling, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd.attacks import badnets, poison
from jaxbd.base import Batch, UserError
from jaxbd.data import draw

SHAPE = (4, 4, 1)
PAPER_PATTERNS = [
    0,
    1,
    2,
    3,
    5,
    7,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
    19,
    21,
    23,
    26,
    27,
    28,
    29,
    30,
    40,
    41,
    42,
    43,
    45,
    56,
    57,
    58,
    59,
    61,
    68,
    69,
    70,
    78,
    84,
    85,
    86,
    94,
    97,
    98,
    99,
    101,
    106,
    108,
    113,
    114,
    170,
    186,
]


def data(count: int, classes: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
    return Batch(images, (np.arange(count) % classes).astype(np.int32))


def test_the_51_binary_patterns_of_the_paper():
    assert badnets.binary_patterns() == PAPER_PATTERNS


def test_binary_patterns_of_a_2x2_patch_counted_by_hand():
    """Up to symmetry and inversion: none (all), one, two beside each other, two across."""
    assert badnets.binary_patterns(2) == [0b0000, 0b0001, 0b0011, 0b0110]


def test_bits_run_row_by_row_from_the_top_left():
    np.testing.assert_array_equal(
        badnets.bits_to_pattern(0b100_010_011), [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    )
    np.testing.assert_array_equal(badnets.bits_to_pattern(170), toys.PATTERN)


def pattern(**settings) -> np.ndarray:
    attack = badnets.make((6, 6, 3), 4, badnets.Config(**settings))
    return np.asarray(attack.init(jax.random.key(3)).pattern)


def test_patterns_by_name():
    assert (pattern(pattern="white") == 1).all()
    board = pattern(pattern="checkerboard", patch=4)
    assert (board == (np.indices((4, 4)).sum(0) % 2)[..., None]).all() and board.shape == (4, 4, 3)
    binary = pattern(pattern="binary")
    assert set(np.unique(binary)) == {0, 1} and (binary == binary[..., :1]).all()
    color = pattern(pattern="color")
    assert color.min() >= 0 and color.max() <= 1 and len(np.unique(color)) == 27
    assert (pattern(pattern=170) == toys.PATTERN[..., None]).all()


def test_color_patterns_differ_from_key_to_key():
    attack = badnets.make((6, 6, 3), 4, badnets.Config())
    one, other = (attack.init(jax.random.key(seed)).pattern for seed in (0, 1))
    assert (one != other).all()


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_poison_hits_rows_at_its_rate_whatever_their_label_and_leaves_the_others_alone(rate):
    count = 8_000
    batch = Batch(jnp.full((count, *SHAPE), 0.5), jnp.arange(count) % 4)
    attack = badnets.make(SHAPE, 4, badnets.Config(target=2, pattern="white", poison_rate=rate))
    out = jax.jit(attack.poison)(jax.random.key(0), attack.init(jax.random.key(1)), batch)
    stamped = np.asarray((out.images == 1).sum((1, 2, 3)))
    assert set(np.unique(stamped)) <= {0, 9}
    hit = stamped == 9
    np.testing.assert_array_equal(out.labels, np.where(hit, 2, batch.labels))
    np.testing.assert_array_equal(out.images[~hit], batch.images[~hit])
    for label in range(4):
        of_label = hit[np.asarray(batch.labels) == label]
        assert abs(of_label.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(of_label))


def test_dynamic_poison_takes_other_rows_in_every_batch():
    attack = badnets.make(SHAPE, 4, badnets.Config(pattern="white", poison_rate=0.2))
    drawn = jax.jit(poison.dynamic(attack, draw.uniform(100)))
    clean = data(60)
    both = (
        jax.tree.map(jnp.asarray, Batch(clean.images // 2, clean.labels)),
        attack.init(jax.random.key(0)),
    )
    one, other = (
        np.asarray((drawn(jax.random.key(k), both).images == 1).any((1, 2, 3))) for k in (1, 2)
    )
    assert 5 < one.sum() < 40 and (one != other).any()


def test_all_to_all_moves_every_class_on_by_one():
    attack = badnets.make(SHAPE, 4, badnets.Config(all_to_all=True))
    np.testing.assert_array_equal(attack.relabel(jnp.array([0, 1, 2, 3])), [1, 2, 3, 0])


@pytest.mark.parametrize("all_to_all", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_static_poison_stamps_the_asked_count_among_rows_that_change_label(all_to_all, per_class):
    clean = data(80)
    config = badnets.Config(target=1, pattern="white", all_to_all=all_to_all)
    attack = badnets.make(SHAPE, 4, config)
    before = clean.images.copy()
    out = poison.static(
        jax.random.key(0), attack, attack.init(jax.random.key(1)), clean, 7, per_class=per_class
    )
    changed = out.labels != clean.labels
    sources = [0, 1, 2, 3] if all_to_all else [0, 2, 3]
    assert changed.sum() == 7 * (len(sources) if per_class else 1)
    if per_class:
        np.testing.assert_array_equal(np.bincount(clean.labels[changed], minlength=4)[sources], 7)
    np.testing.assert_array_equal(
        out.labels[changed], np.asarray(attack.relabel(clean.labels))[changed]
    )
    np.testing.assert_array_equal(out.images[~changed], clean.images[~changed])
    assert ((out.images == 255).sum((1, 2, 3))[changed] >= 9).all() and out.images.dtype == np.uint8
    np.testing.assert_array_equal(clean.images, before)


def test_static_poison_of_float_images_stores_the_same_bytes():
    clean = data(20)
    attack = badnets.make(SHAPE, 4, badnets.Config())
    trigger = attack.init(jax.random.key(1))
    floats = Batch(clean.images.astype(np.float32) / 255, clean.labels)
    one, other = (
        poison.static(jax.random.key(0), attack, trigger, each, 5) for each in (clean, floats)
    )
    np.testing.assert_array_equal(one.images, other.images)
    assert other.images.dtype == np.uint8


def test_static_poison_refuses_more_rows_than_there_are():
    attack = badnets.make(SHAPE, 4, badnets.Config(target=1))
    with pytest.raises(UserError, match="only 15"):
        poison.static(jax.random.key(0), attack, attack.init(jax.random.key(1)), data(20), 16)
