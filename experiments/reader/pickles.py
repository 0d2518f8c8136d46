"""Pickles of state_dicts, written instruction by instruction, right or slightly wrong."""

import random
import struct
from typing import NamedTuple

SIZES = {
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "CharStorage": 1,
    "ShortStorage": 2,
    "IntStorage": 4,
    "LongStorage": 8,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
"""Types of storages -> bytes of an element."""
ODD_TYPES = ("ComplexFloatStorage", "UntypedStorage", "QInt8Storage", "Float", "XStorage")


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def table(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


class Storage(NamedTuple):
    """A storage as a reference to it describes it."""

    key: str
    kind: str
    numel: int
    place: str = "cpu"


class State(NamedTuple):
    """A pickled state_dict and the bytes of its storages by key, in order."""

    pickled: bytes
    storages: dict[str, bytes]


def reference(storage: Storage, parts: int) -> bytes:
    """The instructions that refer to a storage; it has 5 parts in an archive, 6 in a stream."""
    facts = [text("storage"), name("torch", storage.kind), text(storage.key), text(storage.place)]
    return group(*facts, number(storage.numel), *[b"N"] * (parts - 5)) + b"Q"


def tensor(rng: random.Random, storage: Storage, parts: int, odd: bool) -> bytes:
    """A view of `storage`; an odd one mostly reaches outside it, or is made with odd arguments."""
    offset = rng.randint(0, min(storage.numel, 3))
    room = max(storage.numel - offset, 0)
    shape = rng.choice([(room,), (room,), (1, room), (room, 1), (room // 2, 2), (2, room // 2)])
    shape = () if room and rng.random() < 0.1 else shape
    stride = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        stride[axis] = stride[axis + 1] * max(shape[axis + 1], 1)
    if rng.random() < 0.1:
        stride = [rng.choice((0, 1, 1)) for _ in shape]
    gradient = b"\x88" if storage.kind in FRACTIONS and rng.random() < 0.2 else b"\x89"
    hooks, more = rng.choice((b"ccollections\nOrderedDict\n)R", b"}")), b""
    function = rng.choices(("_rebuild_tensor_v2", "_rebuild_tensor"), (9, 1))[0]
    if odd:
        kind = rng.choice(("stride", "shape", "offset", "gradient", "hooks", "more", "function"))
        if kind == "stride":
            stride = [rng.choice((0, 1, 2, 3, 6, -1, 2**40)) for _ in shape]
        elif kind == "shape":
            shape = tuple(rng.choice((0, 1, 2, 5, 2**33, -1)) for _ in range(rng.randint(0, 4)))
        elif kind == "offset":
            offset = rng.choice((room + 1, 2**40, -1, 5, 3))
        elif kind == "gradient":
            gradient = rng.choice((b"\x88", b"N", b"K\x01", b"K\x00"))
        elif kind == "hooks":
            hooks = rng.choice((b"N", b"]", b"}K\x01Ns", b"\x89", b")"))
        elif kind == "more":
            more = rng.choice((b"}", b"N", table((text("neg"), b"\x88")), b"\x89"))
        else:
            function = rng.choice(("_rebuild_tensor_v3", "_rebuild_tensor", "_rebuild_qtensor"))
    counts = [group(*map(number, values)) for values in (shape, stride)]
    plain = function == "_rebuild_tensor" and not (odd and rng.random() < 0.3)
    tail = b"" if plain else gradient + hooks + more
    arguments = group(reference(storage, parts), number(offset), *counts, tail)
    made = name("torch._utils", function) + arguments + b"R"
    if rng.random() < 0.1:
        made = name("torch._utils", "_rebuild_parameter") + group(made, gradient, hooks) + b"R"
    return made


FRACTIONS = ("HalfStorage", "BFloat16Storage", "FloatStorage", "DoubleStorage")


def state(rng: random.Random, parts: int) -> State:
    """A state_dict of one to four storages and the tensors in them; in four of ten, some references
    describe their storage otherwise, or tensors are odd."""
    entries, held = [], {}
    odd = 0.15 if rng.random() < 0.4 else 0.0
    for index in range(rng.randint(1, 4)):
        kind = rng.choice(ODD_TYPES if rng.random() < odd / 3 else list(SIZES))
        key = rng.choice(("A", "a", "x/y", "", "é", "0\0")) if rng.random() < odd else str(index)
        storage = Storage(key, kind, rng.randint(0, 7), "cuda:0" if rng.random() < 0.1 else "cpu")
        size = storage.numel * SIZES.get(kind, 4)
        held[key] = bytes(size) if kind == "BoolStorage" else rng.randbytes(size)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            other = _redescribed(rng, storage) if rng.random() < odd else storage
            label = rng.choice(("w", "b", "layer.weight", "module.x", "ü")) + str(len(entries))
            entries.append((text(label), tensor(rng, other, parts, rng.random() < odd)))
    if rng.random() < 0.1:
        rng.shuffle(entries)
    body = table(*entries)
    if rng.random() < 0.3:
        body = name("collections", "OrderedDict") + b")R" + b"q\x00" + body[1:]
    if rng.random() < 0.4:
        beside = rng.choice((b"K\x03", text("x"), b"G?\xf0\0\0\0\0\0\0", b"N", b"\x88", b"]", b")"))
        body = table((text(rng.choice(("net", "state_dict"))), body), (text("epoch"), beside))
    return State(b"\x80\x02" + body + b".", held)


def _redescribed(rng: random.Random, storage: Storage) -> Storage:
    """The same storage with another type, size, device or key."""
    kind = rng.choice(list(SIZES))
    size = storage.numel * SIZES.get(storage.kind, 4)
    return rng.choice(
        (
            storage._replace(kind=kind, numel=size // SIZES[kind]),
            storage._replace(kind=kind),
            storage._replace(numel=rng.randint(0, 9)),
            storage._replace(place=rng.choice(("meta", "cuda:1", "mps", "nowhere", ""))),
            storage._replace(key=rng.choice(("0", "1", "9"))),
        )
    )


INSTRUCTIONS = b"cN(}]).\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95GJKMRXbehjqrstu0122QU"
WORDS = ("w", "storage", "0", "cpu", "_metadata", "latin1", "f4", "<")
NAMES = (
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "FloatStorage"),
    ("numpy.core.multiarray", "scalar"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
)


def program(rng: random.Random, parts: int) -> State:
    """Instructions strung together at random around a good tensor."""
    storage = Storage("0", "FloatStorage", 6)
    good = tensor(rng, storage, parts, False)
    often = (
        b"K\x02",
        b"K\x03\x86",
        b")",
        b"}",
        b"]",
        b"(",
        b"(",
        b"u",
        b"s",
        b"t",
        b"e",
        b"a",
        b"R",
        b"b",
    )
    body = b""
    for _ in range(rng.randint(0, 24)):
        body += rng.choice(
            (
                text(rng.choice(WORDS)),
                name(*rng.choice(NAMES)),
                good,
                table((text("w"), good)),
                rng.choice(often),
                rng.choice(often),
                bytes([rng.choice(INSTRUCTIONS)]),
                rng.choice((b"q", b"h")) + bytes([rng.randint(0, 5)]),
            )
        )
    if rng.random() < 0.7:
        body = table((text("net"), table((text("w"), good))), (text("x"), body))
    return State(b"\x80" + bytes([rng.choice((2, 2, 4))]) + body + b".", {"0": rng.randbytes(24)})
