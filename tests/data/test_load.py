"""What a source is called and what fits a model."""

import jax
import numpy as np
from samples import assert_same, pixels, refused

from jaxbd.base import Batch, Dataset
from jaxbd.data import labels, load, pack


def test_digits_by_name():
    assert load.load("digits").images.shape == (1797, 16, 16, 1)
    dataset = load.load("digits", image_shape=(8, 8, 1), limit=100)
    assert dataset.images.shape == (100, 8, 8, 1)
    assert len(dataset.class_names) == 10
    refused("16x16 images, the model takes 28x28", load.load, "digits", image_shape=(28, 28, 1))
    refused("16x16 images, the model takes 4096x", load.load, "digits", image_shape=(4096, 4096, 1))
    refused("1 channel(s), the model takes 3", load.load, "digits", image_shape=(16, 16, 3))


def test_load_names_what_is_missing_empty_or_unknown(tmp_path):
    for spec in ("", "no/such/place", "~nobody-at-all/x", "a\0b", "x" * 5000):
        refused(repr(spec)[1:60], load.load, spec)
    refused("is an empty folder", load.load, str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    refused("is of an unknown kind; give digits", load.load, str(tmp_path / "notes.txt"))
    refused("has no class sub-folders", load.load, str(tmp_path))


def test_load_refuses_arrays_of_another_shape(tmp_path):
    np.savez(tmp_path / "d.npz", images=pixels(2), labels=[0, 1])
    refused(
        "6x5 images, the model takes 32x32",
        load.load,
        str(tmp_path / "d.npz"),
        image_shape=(32, 32, 3),
    )


def test_labels_without_the_last_classes_fit_a_model(tmp_path):
    """Numbers only; the model has more classes than the images show."""
    np.savez(tmp_path / "d.npz", images=pixels(2), labels=[0, 2])
    found = load.load(str(tmp_path / "d.npz"), classes=labels.Classes(4))
    assert_same(found, pixels(2), [0, 2], "0123")


def some(count=10):
    return Dataset(pixels(count), np.arange(count, dtype=np.int32) % 4, tuple("abcd"), "some")


def test_check():
    load.check(some(), (6, 5, 3), 4, at_least=10)
    refused("3 channel(s), the model takes 1", load.check, some(), (6, 5, 1), 4)
    refused("6x5 images, the model takes 5x6", load.check, some(), (5, 6, 3), 4)
    refused("image 3 has label 3, the model has classes 0..2", load.check, some(), (6, 5, 3), 3)
    refused("has 10 images, 11 are needed", load.check, some(), (6, 5, 3), 4, at_least=11)


def test_take_and_split():
    dataset = some()
    part = load.take(dataset, np.array([7, 2]))
    assert_same(part, dataset.images[[7, 2]], [3, 2], "abcd")
    first, second = load.split(dataset, 3, seed=1)
    order = np.random.default_rng(1).permutation(10)
    assert np.array_equal(first.images, dataset.images[order[:3]])
    assert np.array_equal(np.concatenate([first.labels, second.labels]), dataset.labels[order])
    assert not np.array_equal(load.split(dataset, 3, seed=2)[0].images, first.images)
    for wrong in (0, 10, -1):
        refused("cannot be set apart", load.split, dataset, wrong, 0)
    refused("has 1 image(s), too few to divide", load.split, some(1), 0, 0)


def test_as_batch():
    data = load.as_batch(some())
    assert isinstance(data, Batch)
    assert isinstance(data.images, jax.Array)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int32
    assert np.array_equal(data.images, some().images)


def test_smaller_limits_choose_subsets():
    large, small = pack.chosen_rows(100, 50, 0), pack.chosen_rows(100, 20, 0)
    assert set(small) < set(large)
    assert len(set(large)) == 50
    assert np.array_equal(pack.chosen_rows(5, None, 0), np.arange(5))
