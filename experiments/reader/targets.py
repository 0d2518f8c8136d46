"""What is fuzzed: for each kind of file, how one is made from a seeded generator, how jaxbd reads
it, and who else judges it."""

import collections
import io
import json
import pathlib
import random
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.reader import archives, graphs, mutate, oracle, pickles
from jaxbd.interop import container
from jaxbd.interop.layouts import recognition

TYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1}


class Target(NamedTuple):
    """One kind of file.

    Attributes:
      make: (rng) -> a file's content, hostile more often than not.
      read: content -> what jaxbd makes of it; raises UserError or Refusal.
      difference: (what was read, content, a path to write to) -> how another reader differs, or "".
    """

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], Any]
    difference: Callable[[Any, bytes, pathlib.Path], str]


def make_zip(rng: random.Random) -> bytes:
    """An archive: as PyTorch writes it, with a changed pickle, with another layout, or with edited
    bytes."""
    if rng.random() < 0.1:
        return _maybe_edited(rng, genuine(rng, True))
    state = (pickles.program if rng.random() < 0.1 else pickles.state)(rng, 5)
    if rng.random() < 0.25:
        state = state._replace(pickled=mutate.edit(rng, state.pickled, 2))
    members = archives.members(rng, state)
    how = rng.random()
    if how < 0.35:
        return archives.zip_file(members, zip64=rng.random() < 0.8)
    if how < 0.8:
        return archives.changed(rng, members)
    return mutate.edit(rng, archives.zip_file(members), 3)


def make_wrapped(rng: random.Random) -> bytes:
    """An archive around a model file, whose other members are nearly those that PyTorch looks
    for."""
    members = archives.members(rng, pickles.state(rng, 5))
    for at, member in enumerate(members):
        if b"data.pkl" in member.name or rng.random() < 0.2:
            members[at] = member._replace(name=_respelt(rng, member.name))
    folder = rng.choice((members[0].name.partition(b"/")[0] + b"/", b""))
    name = folder + rng.choice((b"good.pth", b"good.pth", b"x.bin", b"x.npy", b"data.pth"))
    inner = archives.Member(name, genuine(rng, rng.random() < 0.8), stated=members[0].stated)
    members.insert(rng.randint(0, len(members)), inner)
    data = archives.zip_file(members, zip64=rng.random() < 0.5)
    how = rng.random()
    if how < 0.2:  # a second directory, or end, behind the first
        return data + data[rng.choice((data.rindex(b"PK\5\6"), data.index(b"PK\1\2"))) :]
    return mutate.edit(rng, data, 2) if how < 0.4 else data


def _respelt(rng: random.Random, name: bytes) -> bytes:
    change = rng.choice(
        (
            bytes.upper,
            bytes.title,
            lambda n: n + b"\0",
            lambda n: n[:-1],
            lambda n: n.replace(b"/", b"\\"),
            lambda n: n,
        )
    )
    return change(name)


def make_stream(rng: random.Random) -> bytes:
    """A stream: right, with a changed pickle, with one wrong part, or with edited bytes."""
    if rng.random() < 0.1:
        return _maybe_edited(rng, genuine(rng, False))
    state = (pickles.program if rng.random() < 0.1 else pickles.state)(rng, 6)
    sizes = _elements(state)
    if rng.random() < 0.25:
        state = state._replace(pickled=mutate.edit(rng, state.pickled, 2))
    data = archives.stream(rng, state, sizes)
    return mutate.edit(rng, data, 3) if rng.random() < 0.25 else data


def genuine(rng: random.Random, as_zip: bool) -> bytes:
    """What torch.save itself writes of a small checkpoint, in one of the pickle protocols."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    base = torch.randn(rng.randint(1, 24), generator=generator).to(rng.choice(kinds))
    state = collections.OrderedDict(w=base, half=base[::2], tail=base[1:])
    if as_zip:
        state["n"] = torch.tensor(7)
    beside = (3, 0.5, "x", None, [1, {"a": True}], (1, 2), b"\0\xff", np.float64(0.25), 2**70)
    value = rng.choice((state, {"net": state, "epoch": rng.choice(beside)}))
    out = io.BytesIO()
    protocol = rng.choice((2, 2, 3, 4, 5) if as_zip else (2, 2, 3))
    torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
    return out.getvalue() if as_zip else _KEY.sub(pickles.text("k"), out.getvalue())


_KEY = re.compile(rb"X[\x05-\x14]\0\0\0[0-9]{5,20}")
"""A stream's storage is called by the place of its memory, which no seed determines; a genuine
stream has one storage, so it is called "k"."""


def _maybe_edited(rng: random.Random, data: bytes) -> bytes:
    return data if rng.random() < 0.4 else mutate.edit(rng, data, 2)


def _elements(state: pickles.State) -> dict[str, int]:
    """Elements of each storage, by the first type that the pickle gives it."""
    sizes = {}
    for key, held in state.storages.items():
        at = state.pickled.find(pickles.text(key) + pickles.text("cpu"))
        at = at if at >= 0 else state.pickled.find(pickles.text(key) + pickles.text("cuda:0"))
        kind = state.pickled[: max(at, 0)].rsplit(b"\n", 2)[-2:][0].decode("utf-8", "replace")
        sizes[key] = len(held) // pickles.SIZES.get(kind, 4)
    return sizes


def make_safetensors(rng: random.Random) -> bytes:
    """A safetensors file, with an edited header or edited bytes more often than not."""
    header: dict[str, Any] = {}
    data = b""
    if rng.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "é": "ü\n"}
    for index in range(rng.randint(1, 4)):
        kind = rng.choice(list(TYPES))
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        size = TYPES[kind]
        for side in shape:
            size *= side
        offsets = [len(data), len(data) + size]
        header[f"w{index}"] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += rng.randbytes(size)
    how = rng.random()
    if how < 0.35:
        header = mutate.edit_json(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if 0.35 <= how < 0.6:
        text = mutate.edit(rng, text, 2)
    text += b" " * (-len(text) % 8 if rng.random() < 0.8 else rng.randint(0, 9))
    made = struct.pack("<Q", len(text)) + text + data
    return mutate.edit(rng, made, 2) if 0.6 <= how < 0.75 else made


def prepare() -> None:
    """Learns the names of all architectures, once: choosing among several dictionaries of tensors
    needs them, and tracing the nets takes seconds."""
    recognition.fits({"layer.weight": (1,)})


def _read(data: bytes) -> container.Container:
    return container.read_bytes(data, name="fuzz")


TARGETS: dict[str, Target] = {
    "zip": Target(make_zip, _read, oracle.difference),
    "stream": Target(make_stream, _read, oracle.difference),
    "wrapped": Target(make_wrapped, _read, oracle.wrapped_difference),
    "safetensors": Target(make_safetensors, _read, oracle.difference),
}
"""Kind of file -> how it is fuzzed. Another reader joins with one line: a maker, a pure function of
bytes, and a judge."""
if read_onnx := graphs.reader_of("read", "read_onnx"):
    TARGETS["onnx"] = Target(graphs.make_onnx, read_onnx, graphs.onnx_difference)
if read_pt2 := graphs.reader_of("pt2", "read_pt2"):
    TARGETS["pt2"] = Target(graphs.make_pt2, read_pt2, graphs.pt2_difference)
