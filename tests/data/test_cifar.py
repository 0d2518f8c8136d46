"""CIFAR's archives; nothing in their pickles is executed."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from samples import Canary, assert_same, pixels, refused

from jaxbd.data import (
    cifar,
    load,
)

NAMES10 = [f"kind{k}" for k in range(10)]
NAMES100 = [f"kind{k}" for k in range(100)]


def records(images, *label_columns):
    """CIFAR's binary form: label bytes, then the image channel by channel."""
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return np.concatenate(
        [*(np.array(column, np.uint8)[:, None] for column in label_columns), flat], 1
    ).tobytes()


def batch(images, labels, key="labels"):
    return {
        "data": images.transpose(0, 3, 1, 2).reshape(len(images), 3072),
        key: list(labels),
        "filenames": ["x.png"],
    }


def python2_batch(images, labels, key=b"labels"):
    """The opcodes Python 2 wrote: byte strings, `numpy.core`, protocol 2."""
    short = lambda text: b"U" + bytes([len(text)]) + text
    flat = images.transpose(0, 3, 1, 2).tobytes()
    count = b"K" + bytes([len(images)])
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    )
    array += (
        b"(K\x01"
        + count
        + b"M\x00\x0c\x86"
        + dtype
        + b"\x89T"
        + struct.pack("<i", len(flat))
        + flat
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + short(b"data") + array + short(key) + numbers + b"u."


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def put(tmp_path, form, top, files):
    """The files as a folder, as a folder with the published sub-folder, or as an archive."""
    if form == "archive":
        tar(tmp_path / "c.tar.gz", {f"{top}/{name}": content for name, content in files.items()})
        return str(tmp_path / "c.tar.gz")
    place = tmp_path / "c" / (top if form == "below" else "")
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return str(tmp_path / "c")


@pytest.mark.parametrize("form", ["folder", "below", "archive"])
def test_cifar10_binary(tmp_path, form):
    images = pixels(7, 32, 32)
    files = {
        "data_batch_2.bin": records(images[3:5], [9, 0]),
        "data_batch_1.bin": records(images[:3], [1, 2, 3]),
        "test_batch.bin": records(images[5:], [5, 4]),
        "batches.meta.txt": "\n".join(NAMES10).encode() + b"\n\n",
    }
    path = put(tmp_path, form, "cifar-10-batches-bin", files)
    assert_same(load.load(path, split="train"), images[:5], [1, 2, 3, 9, 0], NAMES10)
    assert_same(load.load(path), images[5:], [5, 4], NAMES10)
    refused("no split 'val'", load.load, path, split="val")
    assert_same(load.load(path, split="train", limit=5), images[:5], [1, 2, 3, 9, 0], NAMES10)
    assert len(load.load(path, split="train", limit=2).labels) == 2


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar100_binary_takes_the_fine_labels(tmp_path, form):
    images = pixels(4, 32, 32)
    files = {
        "train.bin": records(images[:3], [1, 1, 1], [99, 0, 42]),
        "test.bin": records(images[3:], [1], [7]),
        "fine_label_names.txt": "\n".join(NAMES100).encode(),
    }
    path = put(tmp_path, form, "cifar-100-binary", files)
    assert_same(load.load(path, split="train"), images[:3], [99, 0, 42], NAMES100)
    assert_same(load.load(path), images[3:], [7], NAMES100)


@pytest.mark.parametrize("form", ["folder", "below", "archive"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_python(tmp_path, form, protocol):
    images = pixels(5, 32, 32)
    if protocol == 0:  # the published bytes, rather than what Python 3 makes of them
        train, test = python2_batch(images[:3], [1, 2, 3]), python2_batch(images[3:], [5, 4])
    else:
        train = pickle.dumps(batch(images[:3], [1, 2, 3]), protocol)
        test = pickle.dumps(batch(images[3:], [5, 4]), protocol)
    meta = pickle.dumps({"label_names": NAMES10, "num_cases_per_batch": 10000}, 2)
    files = {"data_batch_1": train, "test_batch": test, "batches.meta": meta}
    path = put(tmp_path, form, "cifar-10-batches-py", files)
    assert_same(load.load(path, split="train"), images[:3], [1, 2, 3], NAMES10)
    assert_same(load.load(path), images[3:], [5, 4], NAMES10)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_cifar10_python2_bytes_are_what_pickle_reads():
    images = pixels(2, 32, 32)
    read = pickle.loads(python2_batch(images, [3, 4]), encoding="bytes")
    assert np.array_equal(read[b"data"], batch(images, [])["data"])
    assert read[b"labels"] == [3, 4]


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_cifar100_python(tmp_path, form):
    images = pixels(3, 32, 32)
    train = {**batch(images[:2], [99, 0], "fine_labels"), "coarse_labels": [1, 2]}
    in_bytes = {key.encode(): value for key, value in batch(images[2:], [7], "fine_labels").items()}
    in_bytes[b"fine_labels"] = np.array([7])
    files = {"train": pickle.dumps(train, 2), "test": pickle.dumps(in_bytes, 3)}
    files["meta"] = pickle.dumps({b"fine_label_names": [name.encode() for name in NAMES100]}, 2)
    path = put(tmp_path, form, "cifar-100-python", files)
    assert_same(load.load(path, split="train"), images[:2], [99, 0], NAMES100)
    assert_same(load.load(path), images[2:], [7], NAMES100)


def evil_pickles(canary):
    """(name that the refusal tells or None, pickle) pairs, each of which makes the folder `canary`
    when it is run."""
    path = str(canary).encode()
    call = b"(V" + path + b"\ntR."
    nested = pickle.dumps({"data": [{"deep": Canary(canary)}], "labels": []}, 2)
    yield "posix.mkdir", pickle.dumps(Canary(canary), 2)
    yield "posix.mkdir", pickle.dumps(Canary(canary), 4)
    yield "posix.mkdir", nested
    yield "os.mkdir", b"cos\nmkdir\n" + call
    yield "builtins.eval", b"cbuiltins\neval\n(V__import__('os').mkdir('" + path + b"')\ntR."
    yield "numpy.load", b"cnumpy\nload\n" + call
    yield "numpy.core.multiarray._reconstruct.x", b"cnumpy.core.multiarray\n_reconstruct.x\n" + call
    yield "numpy.f2py.os.mkdir", b"\x80\x04\x8c\x05numpy\x8c\x0df2py.os.mkdir\x93" + call
    yield None, b"(V" + path + b"\nios\nmkdir\n."  # INST
    yield None, b"(cos\nmkdir\nV" + path + b"\no."  # OBJ
    yield None, b"\x80\x02cos\nmkdir\nV" + path + b"\n\x85\x81."  # NEWOBJ


def test_cifar_pickles_are_refused_without_running_them(tmp_path):
    canary, root = tmp_path / "canary", tmp_path / "c"
    root.mkdir()
    for name, content in evil_pickles(canary):
        (root / "test_batch").write_bytes(content)
        refused(
            f"asks for {name!r}" if name else "not a readable CIFAR batch", load.load, str(root)
        )
        tar(tmp_path / "c.tar.gz", {"test_batch": content})
        refused("test_batch", load.load, str(tmp_path / "c.tar.gz"))
    (root / "test_batch").write_bytes(pickle.dumps(batch(pixels(1, 32, 32), [0]), 2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": Canary(canary)}, 2))
    refused("asks for 'posix.mkdir'", load.load, str(root))
    assert not canary.exists()


def with_data(data, labels):
    return pickle.dumps({"data": data, "labels": labels}, 2)


ROW = np.zeros((1, 3072), np.uint8)
BAD_BATCHES = {
    "empty": b"",
    "stop": b".",
    "no keys": b"\x80\x02}.",
    "a list": b"\x80\x02].",
    "data a list": with_data([1, 2], [0]),
    "data too narrow": with_data(ROW[:, :9], [0]),
    "data int64": with_data(ROW.astype(np.int64), [0]),
    "data float": with_data(ROW.astype(np.float32), [0]),
    "data objects": with_data(np.array([None]), [0]),
    "too few labels": with_data(np.zeros((2, 3072), np.uint8), [0]),
    "label a float": with_data(ROW, [0.5]),
    "label a bool": with_data(ROW, [True]),
    "label too large": with_data(ROW, [10]),
    "label negative": with_data(ROW, [-1]),
    "array never filled": b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)Rs.",
    "state for a function": b"\x80\x02cnumpy\ndtype\n}b.",
    "memo of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "short number": b"\x80\x02\x8a\xff.",
    "2 GiB that are not there": b"\x80\x02B\xff\xff\xff\x7f.",
    "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "key that doubles 60 times": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "too many operations": b"\x80\x02]" + b"Na" * 1_100_000 + b".",
}


@pytest.mark.parametrize("content", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_cifar_hostile_and_wrong_batches(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    refused("test_batch", load.load, str(tmp_path))


def test_cifar_truncations_never_crash(tmp_path):
    good = pickle.dumps(batch(pixels(1, 32, 32), [0]), 2)
    for stop in range(0, len(good), 97):
        (tmp_path / "test_batch").write_bytes(good[:stop])
        refused("test_batch", cifar.load, tmp_path)


def test_cifar_bad_binaries_and_archives(tmp_path):
    good = records(pixels(2, 32, 32), [0, 1])
    for content, message in (
        (b"", "is empty"),
        (good[:-1], "not a multiple of 3073"),
        (records(pixels(1, 32, 32), [10]), "has label 10, not in 0..9"),
    ):
        (tmp_path / "test_batch.bin").write_bytes(content)
        refused(message, load.load, str(tmp_path))
    refused("no train batches", load.load, str(tmp_path), split="train")
    (tmp_path / "test_batch.bin").write_bytes(good)
    (tmp_path / "batches.meta.txt").write_text("one two")
    refused("does not name 10 classes", load.load, str(tmp_path))
    archive = tmp_path / "c.tar.gz"
    tar(archive, {"readme": b"nothing"})
    refused("has no CIFAR batches", load.load, str(archive))
    tar(archive, {"x/test_batch.bin": good})
    whole = archive.read_bytes()
    for bad in (b"", b"\x1f\x8b", whole[: len(whole) // 2], b"no archive" * 99):
        archive.write_bytes(bad)
        refused("not a readable .tar.gz", load.load, str(archive))
    refused("does not exist", cifar.load, tmp_path / "missing")


def test_cifar_archives_that_mislead(tmp_path, monkeypatch):
    archive, outside = tmp_path / "c.tar.gz", tmp_path / "outside"
    outside.write_bytes(records(pixels(1, 32, 32), [0]))
    with tarfile.open(archive, "w:gz") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("test_batch.bin")
            member.type, member.linkname = kind, str(outside)
            file.addfile(member)
    refused("has no CIFAR batches", load.load, str(archive))
    before = sorted(tmp_path.rglob("*"))
    tar(archive, {"../../test_batch.bin": outside.read_bytes()})
    assert len(load.load(str(archive)).labels) == 1
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(cifar, "MAX_ARCHIVE", 1000)
    archive.write_bytes(gzip.compress(bytes(2000)))
    refused("unpacks to more than", load.load, str(archive))
