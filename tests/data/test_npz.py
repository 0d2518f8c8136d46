"""NumPy archives come out as they went in; hostile ones end in one line."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from samples import Canary, assert_same, pixels, refused

from jaxbd.data import load, npz, npz_archive


def test_npz_keeps_uint8_and_names(tmp_path):
    images = pixels(4)
    np.savez(
        tmp_path / "d.npz",
        images=images,
        labels=np.array([1, 0, 2, 1]),
        class_names=["a", "b", "c"],
    )
    assert_same(load.load(str(tmp_path / "d.npz")), images, [1, 0, 2, 1], "abc")


def test_npz_floats_round_to_the_pixel_they_came_from(tmp_path):
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    for kind in (np.float32, np.float64):
        np.savez_compressed(
            tmp_path / "d.npz", images=(images / 255).astype(kind), labels=np.zeros((4, 1), np.int8)
        )
        assert_same(npz.load(tmp_path / "d.npz"), images, [0] * 4, ["0"])


def test_npz_layouts(tmp_path):
    path, images = tmp_path / "d.npz", pixels(2)
    np.savez(path, images=images[..., 0], labels=[0, 1])
    assert_same(npz.load(path), images[..., :1], [0, 1], "01")
    np.savez(path, images=images.transpose(0, 3, 1, 2), labels=[0, 1])
    assert_same(npz.load(path), images, [0, 1], "01")
    for shape in ((2, 3, 9, 3), (2, 1, 1, 1)):
        np.savez(path, images=np.zeros(shape, np.uint8), labels=[0, 1])
        refused("could have its channels first or last", npz.load, path)
    for shape in ((2, 9, 9, 4), (2, 9), (2, 3, 9, 9, 3)):
        np.savez(path, images=np.zeros(shape, np.uint8), labels=[0, 1])
        refused("give [N, H, W, C] with 1 or 3 channels", npz.load, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=np.zeros((2, 4, 4, 3), np.int64)), "int64 with only 0 and 1"),
        (dict(images=np.full((2, 4, 4, 3), 256)), "int64 and neither floats in [0, 1] nor whole"),
        (dict(images=np.full((2, 4, 4, 3), -1)), "int64 and neither floats in [0, 1] nor whole"),
        (dict(images=np.full((2, 4, 4, 3), 1.5)), "neither floats in [0, 1]"),
        (dict(images=np.full((2, 4, 4, 3), np.nan)), "not finite"),
        (dict(images=np.zeros((2, 4, 4, 3), bool)), "images are bool"),
        (dict(images=np.zeros((2, 48), np.uint8)), "is not a batch of images"),
        (dict(images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.zeros(0, int)), "holds no images"),
        (dict(labels=[0]), "2 images but 1 labels"),
        (dict(labels=[0.0, 0.5]), "labels are float64 with fractions"),
        (dict(labels=np.ones((2, 2), int)), "labels are int64 [2, 2] without exactly one 1"),
        (dict(labels=[-1, 0]), "labels run from -1 to 0"),
        (dict(labels=[0, 2**31 - 1]), "give class numbers"),
        (dict(labels=[0, 2], class_names=["a", "b"]), "label 2 has no name"),
        (dict(class_names=[1, 2]), "class_names is int64"),
        (
            dict(labels=None, kinds=[0, 1]),
            "has no array 'images' and 'labels', it has images, kinds",
        ),
    ],
)
def test_npz_bad_arrays(tmp_path, change, message):
    arrays = {**dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1]), **change}
    np.savez(
        tmp_path / "d.npz", **{name: value for name, value in arrays.items() if value is not None}
    )
    refused(message, load.load, str(tmp_path / "d.npz"))


def test_npz_refuses_pickles_without_running_them(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "d.npz"
    evil = np.array([Canary(canary)], dtype=object)
    for arrays in (dict(images=evil, labels=[0]), dict(images=pixels(1), labels=evil)):
        np.savez(path, **arrays)
        refused("holds pickled objects", load.load, str(path))
    path.write_bytes(pickle.dumps(Canary(canary)))
    refused("pickles are never loaded", load.load, str(path))
    np.savez(path, images=pixels(1), labels=[0], other=evil)
    assert len(npz.load(path).labels) == 1
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary must be able to sing"


def test_npz_damaged_files(tmp_path):
    good, path = tmp_path / "good.npz", tmp_path / "d.npz"
    np.savez_compressed(good, images=pixels(50), labels=np.zeros(50, int))
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    np.save(tmp_path / "bare.npy", pixels(1))
    for bad in (
        b"",
        b"PK",
        content[: len(content) // 2],
        bytes(flipped),
        (tmp_path / "bare.npy").read_bytes(),
    ):
        path.write_bytes(bad)
        refused("write it with np.savez", npz.load, path)
    refused("does not exist", npz.load, tmp_path / "missing.npz")


def test_npz_claimed_size_is_not_believed(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    refused("d.npz", npz.load, tmp_path / "d.npz")


NAMES = {
    "Keras": ("x_{}", "y_{}"),
    "MedMNIST": ("{}_images", "{}_labels"),
    "joined": ("X{}", "y{}"),
    "other": ("data_{}", "targets_{}"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_splits_under_the_names_of_others(tmp_path, names):
    arrays, images = {}, pixels(5)
    for part, rows in (("train", slice(0, 3)), ("test", slice(3, 5))):
        arrays |= {
            names[0].format(part): images[rows],
            names[1].format(part): np.arange(5)[rows] % 2,
        }
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    assert_same(load.load(str(tmp_path / "d.npz")), images[3:], [1, 0], "01")
    assert_same(load.load(str(tmp_path / "d.npz"), split="train"), images[:3], [0, 1, 0], "01")
    refused(
        "has no split 'val'; it has test, train", load.load, str(tmp_path / "d.npz"), split="val"
    )


@pytest.mark.parametrize(
    "names", [("X", "Y"), ("data", "labels"), ("images", "targets"), ("Image", "Label")]
)
def test_whole_sets_under_the_names_of_others(tmp_path, names):
    images = pixels(3)
    np.savez(tmp_path / "d.npz", **dict(zip(names, (images, np.eye(3)[[2, 0, 1]]), strict=True)))
    assert_same(load.load(str(tmp_path / "d.npz")), images, [2, 0, 1], "012")


@pytest.mark.parametrize("kind", [np.int64, np.int16, np.float32, np.float64, ">f4", ">i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_whole_numbers_in_0_to_255(tmp_path, kind, order):
    images = pixels(4)
    np.savez(tmp_path / "d.npz", images=np.asarray(images, kind, order=order), labels=[0, 1, 1, 0])
    assert_same(load.load(str(tmp_path / "d.npz")), images, [0, 1, 1, 0], "01")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_only_the_chosen_rows_are_kept(tmp_path, save, monkeypatch):
    monkeypatch.setattr(npz_archive, "PIECE", 1000)
    images = pixels(50)
    save(tmp_path / "d.npz", images=images, labels=np.arange(50) % 7)
    rows = np.sort(np.random.default_rng(4).permutation(50)[:9])
    found = load.load(str(tmp_path / "d.npz"), limit=9, seed=4)
    assert_same(found, images[rows], rows % 7, "0123456")


def test_a_directory_that_claims_much_is_not_read(tmp_path):
    np.savez(tmp_path / "d.npz", images=pixels(1), labels=[0])
    content = bytearray((tmp_path / "d.npz").read_bytes())
    end = content.rindex(b"PK\5\6")
    content[end + 10 : end + 12] = b"\xff\xff"
    (tmp_path / "d.npz").write_bytes(content)
    refused("is not an intact .npz file", npz.load, tmp_path / "d.npz")


def test_a_member_named_twice(tmp_path):
    np.savez(tmp_path / "d.npz", images=pixels(1), labels=[0])
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("labels.npy", b"x")
    refused("d.npz", npz.load, tmp_path / "d.npz")
