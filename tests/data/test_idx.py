"""IDX files, as MNIST comes."""

import gzip
import struct

import numpy as np
import pytest
from samples import assert_same, pixels, refused

from jaxbd.data import idx, labels, load


def write(place, start, images, numbers, *, zipped=False, dot="-"):
    place.mkdir(parents=True, exist_ok=True)
    parts = {
        f"images{dot}idx3-ubyte": struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes(),
        f"labels{dot}idx1-ubyte": struct.pack(">2I", 0x801, len(numbers)) + bytes(numbers),
    }
    for name, content in parts.items():
        path = place / f"{start}{name}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize(("zipped", "dot"), [(False, "-"), (True, "-"), (False, ".")])
def test_splits_by_name(tmp_path, below, zipped, dot):
    images = pixels(5, 7, 4, 1)
    write(tmp_path / below, "train-", images[:3], [2, 0, 1], zipped=zipped, dot=dot)
    write(tmp_path / below, "t10k-", images[3:], [1, 2], zipped=zipped, dot=dot)
    assert_same(load.load(str(tmp_path), split="train"), images[:3], [2, 0, 1], "012")
    assert_same(load.load(str(tmp_path)), images[3:], [1, 2], "012")
    one = next((tmp_path / below).glob("train*images*"))
    assert_same(load.load(str(one)), images[:3], [2, 0, 1], "012")


def test_plain_files_go_before_packed_ones(tmp_path):
    images = pixels(2, 7, 4, 1)
    write(tmp_path, "t10k-", images[:1], [0], zipped=True)
    write(tmp_path, "t10k-", images, [0, 1])
    assert_same(load.load(str(tmp_path)), images, [0, 1], "01")


def test_limit_draws_the_rows_of_the_seed(tmp_path):
    images = pixels(20, 3, 3, 1)
    write(tmp_path, "t10k-", images, [k % 4 for k in range(20)])
    rows = np.sort(np.random.default_rng(2).permutation(20)[:6])
    found = load.load(str(tmp_path), limit=6, seed=2)
    assert np.array_equal(found.images, images[rows])
    assert found.labels.tolist() == [row % 4 for row in rows]
    assert load.load(str(tmp_path), limit=1).class_names == tuple("0123")


def test_bad_files(tmp_path):
    images = pixels(3, 7, 4, 1)
    write(tmp_path, "emnist-digits-test-", images, [0, 1, 0])
    write(tmp_path, "emnist-letters-test-", images, [0, 1, 0])
    refused("has several test sets", load.load, str(tmp_path))
    one = tmp_path / "emnist-digits-test-images-idx3-ubyte"
    other = tmp_path / "emnist-digits-test-labels-idx1-ubyte"
    refused("has at least 2 classes", idx.load, one, classes=labels.Classes(1))
    content, beside = one.read_bytes(), other.read_bytes()
    for bad in (b"", content[:10], content[:-1], content + b"x", gzip.compress(content)[:-4]):
        one.write_bytes(bad)
        refused("is damaged; fetch it again", idx.load, one)
    one.write_bytes(b"\0\0\x0d\x03" + content[4:])  # floats
    refused("is not a 3-dimensional IDX file of bytes", idx.load, one)
    one.write_bytes(content)
    other.write_bytes(struct.pack(">2I", 0x801, 2) + bytes(2))
    refused("has 3 images, emnist-digits-test-labels-idx1-ubyte 2 labels", idx.load, one)
    other.unlink()
    refused("is missing; put it beside the images", idx.load, one)
    other.write_bytes(beside)
    assert len(idx.load(one).labels) == 3
