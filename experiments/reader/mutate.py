"""Random edits of bytes and of JSON, from a seeded `random.Random`."""

import json
import random
from typing import Any

PIECES = (
    *(bytes([code]) for code in b'\0\x01\xff\x7f\x80(tRbQ\n"{[-.89NPX]}'),
    b"\xff" * 4,
    b"\0\0\0\x80",
    b"\x8a\x08" + b"\xff" * 8,
    b"q\x00",
    b"h\x00",
    b"cos\nsystem\n",
    b"PK\x05\x06",
    b"PK\x01\x02",
    b"PK\x03\x04",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"PK\x07\x08",
    b"9" * 20,
    b"../",
    b"FloatStorage",
    b"DoubleStorage",
    b"HalfStorage",
    b"big",
    b"byteorder",
    b"ByteOrder",
    b"meta",
    b"cuda:0",
    b"F64",
    b"-0",
    b"1e3",
    b"\\ud800",
    b"null",
)
"""What is put into files: instructions, signatures, names and numbers that mean something."""


def edit(rng: random.Random, good: bytes, most: int = 4) -> bytes:
    """One to `most` edits: flips, overwriting, insertion, removal, copies from elsewhere, cutting
    off."""
    data = bytearray(good)
    for _ in range(rng.randint(1, most)):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.randint(1, 12)
        kind = rng.choice(("flip", "flip", "set", "set", "insert", "remove", "copy", "cut", "swap"))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            piece = rng.choice(PIECES) if rng.random() < 0.5 else bytes([rng.randrange(256)])
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = rng.choice(PIECES)
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "copy":
            start = rng.randrange(len(data))
            data[at:at] = data[start : start + length]
        elif kind == "swap":
            other = rng.randrange(len(data))
            data[at], data[other] = data[other], data[at]
        else:
            del data[at:]
    return bytes(data)


NUMBERS = (0, 1, 2, 3, 4, 6, 7, 8, 24, 28, 36, -1, 2**31, 2**40, 2**63, 1.0, True, None, "3")


def edit_json(rng: random.Random, value: Any) -> Any:
    """A copy with one value replaced, removed, doubled or exchanged somewhere inside."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return value
    holder, key = rng.choice(places)
    kind = rng.choice(("number", "number", "remove", "other", "add", "rename"))
    if kind == "number":
        holder[key] = rng.choice(NUMBERS)
    elif kind == "remove":
        del holder[key]
    elif kind == "other":
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif isinstance(holder, dict):
        name = rng.choice(("w", "__metadata__", "dtype", "shape", "code", "W", "é", "\u0000"))
        holder[name] = holder[key] if kind == "add" else holder.pop(key)
    else:
        holder.append(rng.choice(NUMBERS))
    return value


def _places(value: Any):
    """(container, key) of every value inside `value`."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
