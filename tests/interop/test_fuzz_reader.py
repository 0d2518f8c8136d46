"""Mutated good files: the reader answers with a model or with the one clean error, never with
anything else.

What it accepts it must understand as PyTorch and safetensors do: a checked file that loads as other
weights elsewhere would be worse than none.
"""

import pathlib
import struct
import time
import warnings

import hostile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxbd.base import UserError
from jaxbd.interop import container, safetensors_file
from jaxbd.interop.unpickle import INSTRUCTIONS

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

QUICK, SLOW = 250, 3_400
"""Examples for each of the six mutators: 1,500 by default, 20,400 in the slow run."""
MOST_SECONDS = 1.0
PARTS = ("w", "b", "n")
STORAGES = {"0": hostile.WEIGHTS, "1": b"\0\x3c\0\x40", "2": struct.pack("<q", 7)}


def state() -> bytes:
    """The pickle of {"net": OrderedDict(w float32 [3, 2] strided, b float16 [2], n int64 []),
    "epoch": 3}."""
    half, long = hostile.name("torch", "HalfStorage"), hostile.name("torch", "LongStorage")
    tensors = [
        hostile.tensor(shape=(3, 2), stride=(1, 3)),
        hostile.tensor(shape=(2,), stride=(1,), held=hostile.storage("1", 2, half)),
        hostile.tensor(shape=(), stride=(), held=hostile.storage("2", 1, long)),
    ]
    items = (
        b"("
        + b"".join(hostile.text(name) + tensor for name, tensor in zip(PARTS, tensors, strict=True))
        + b"u"
    )
    net = hostile.call("collections", "OrderedDict") + b"q\x00" + items
    return hostile.program(
        hostile.table((hostile.text("net"), net), (hostile.text("epoch"), b"K\x03"))
    )


def stream_of(value: bytes) -> bytes:
    sizes = (6, 2, 1)
    held = b"".join(
        struct.pack("<q", n) + data for n, data in zip(sizes, STORAGES.values(), strict=True)
    )
    return hostile.stream(value, tuple(STORAGES), held)


HEADER = {
    "w": hostile.entry((3, 2), (0, 24)),
    "b": hostile.entry((2,), (24, 28), "F16"),
    "n": hostile.entry((), (28, 36), "I64"),
}
GOOD = {
    "zip": hostile.archive(state(), STORAGES),
    "stream": stream_of(state()),
    "safetensors": hostile.safetensors(HEADER, b"".join(STORAGES.values())),
}

INTERESTING = st.sampled_from(
    [bytes([code]) for code in b'\0\xff\x7f\x80(tRbQ\n"{[-.']
    + [b"\xff" * 4, b"\0\0\0\x80", b"\x8a\x08" + b"\xff" * 8, b"q\x00", b"h\x00", b"cos\nsystem\n"]
    + [b"PK\x05\x06", b"PK\x01\x02", b"9" * 20, b"../"]
)


@st.composite
def mutations(draw, good: bytes) -> bytes:
    """One to six random edits of `good`: flips, overwriting, insertion, removal, copies from
    elsewhere, cutting off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, 12))
        kind = draw(st.sampled_from(("flip", "set", "insert", "remove", "copy", "cut", "swap")))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            piece = draw(INTERESTING | st.binary(min_size=1, max_size=4))
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = draw(INTERESTING | st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "copy":
            start = draw(st.integers(0, len(data) - 1))
            data[at:at] = data[start : start + length]
        elif kind == "swap":
            other = draw(st.integers(0, len(data) - 1))
            data[at], data[other] = data[other], data[at]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def programs(draw) -> bytes:
    """Instructions strung together at random, most of them allowed ones, with small operands."""
    number = st.integers(0, 6)
    words = [
        hostile.text(word) for word in ("w", "storage", "0", "cpu", "_metadata", "latin1", "f4")
    ]
    names = [
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("torch", "Size"),
    ]
    names += [("torch", "FloatStorage"), ("numpy.core.multiarray", "scalar")]
    names += [("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")]
    values = [
        hostile.tensor(),
        hostile.storage(),
        hostile.table((hostile.text("w"), hostile.tensor())),
    ]
    often = [b"K\x02", b"K\x03\x86", *(bytes([code]) for code in b")}]((usteaRbQ\x93\x94")]
    whole = st.sampled_from(words + [hostile.name(*pair) for pair in names] + values + often)
    memo = st.builds(
        lambda code, index: code + bytes([index]), st.sampled_from((b"q", b"h")), number
    )
    single = st.sampled_from(sorted(INSTRUCTIONS))
    parts = draw(st.lists(whole | memo | single, max_size=30))
    return hostile.program(b"".join(parts), draw(st.sampled_from((2, 4))))


def safetensors_of(head: bytes) -> bytes:
    return hostile.safetensors(head, b"".join(STORAGES.values()))


MUTATORS = {
    "zip": mutations(GOOD["zip"]),
    "zip_pickle": mutations(state()).map(lambda pickled: hostile.archive(pickled, STORAGES)),
    "zip_program": programs().map(lambda pickled: hostile.archive(pickled, STORAGES)),
    "stream": mutations(GOOD["stream"]),
    "safetensors": mutations(GOOD["safetensors"]),
    "safetensors_header": mutations(GOOD["safetensors"][8:-36]).map(safetensors_of),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def answer(path: pathlib.Path, data: bytes) -> container.Container | None:
    """The container read from `data`, or None where it was refused. Anything else fails the
    test."""
    path.write_bytes(data)
    started = time.process_time()
    try:
        read = container.read(path)
    except UserError as error:
        assert str(error).startswith(f"{path.name}: ") and str(error).isprintable()
        return None
    finally:
        assert time.process_time() - started < MOST_SECONDS
    assert read.bytes == len(data)
    for tensor in read.tensors.values():
        assert tensor.nbytes < 1 << 26
        tensor.tobytes()  # touches every byte: a view outside its storage would show
    return read


def understood_alike(path: pathlib.Path, read: container.Container) -> None:
    """PyTorch (or safetensors) either refuses the file as well, or sees the same tensors, bit for
    bit."""
    try:
        if read.kind == "safetensors":
            theirs = safetensors_numpy.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = torch.load(path, weights_only=True)
    except Exception:
        return
    for name in read.nesting:
        theirs = theirs[int(name) if isinstance(theirs, (list, tuple)) else name]
    for name, tensor in read.tensors.items():
        other = theirs[read.prefix + name]
        if hasattr(other, "numpy"):
            other = other.detach().contiguous()
            other = (other.view(torch.int16) if other.dtype is torch.bfloat16 else other).numpy()
        assert other.shape == tensor.shape and other.tobytes() == tensor.tobytes(), name


def fuzz(place: pathlib.Path, mutator: str, examples: int) -> None:
    seen = {"accepted": 0, "refused": 0}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(MUTATORS[mutator])
    def check(data):
        path = place / f"{mutator}.bin"
        read = answer(path, data)
        seen["refused" if read is None else "accepted"] += 1
        if read is not None:
            understood_alike(path, read)

    check()
    assert sum(seen.values()) >= examples and seen["refused"] > examples // 4


@pytest.mark.parametrize("kind", GOOD)
def test_the_files_that_are_mutated_are_good(place, kind):
    read = answer(place / "good.bin", GOOD[kind])
    assert read is not None and tuple(read.tensors) == PARTS
    strided = np.arange(6, dtype=np.float32).reshape(2, 3).T
    expected = strided.reshape(-1, order="F").reshape(3, 2) if kind == "safetensors" else strided
    np.testing.assert_array_equal(read.tensors["w"], expected)
    assert read.tensors["b"].dtype == np.float16 and read.tensors["n"] == 7
    understood_alike(place / "good.bin", read)


@pytest.mark.parametrize("mutator", MUTATORS)
def test_mutated_files_are_read_or_refused(place, mutator):
    fuzz(place, mutator, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("mutator", MUTATORS)
def test_many_mutated_files_are_read_or_refused(place, mutator):
    fuzz(place, mutator, SLOW)


def test_safetensors_types_are_the_library_s():
    """Every type that is read is one the library writes under the same name."""
    for name, dtype in safetensors_file.DTYPES.items():
        assert f'"dtype":"{name}"'.encode() in safetensors_numpy.save({"x": np.zeros(2, dtype)})
