"""Files that two readers would understand as two models are refused, and say why.

Each kind of file is written by hand; where PyTorch reads it as other weights, that is shown too.
"""

import hashlib
import io
import json
import random
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxbd.base import UserError
from jaxbd.interop import container

torch = pytest.importorskip("torch")

from experiments.reader import archives, oracle, part, pickles, targets  # noqa: E402 (need torch)
from experiments.reader.archives import Member, zip_file  # noqa: E402
from experiments.reader.pickles import Storage, group, name, number, table, text  # noqa: E402

SEEN, HIDDEN = struct.pack("<6f", *range(6)), struct.pack("<6f", *range(10, 16))
FLOATS = Storage("0", "FloatStorage", 6)
ROOT = b"archive/"


def tensor(storage=FLOATS, parts=5, shape=(6,), offset=0, more=b"\x89}") -> bytes:
    counts = [group(*map(number, values)) for values in (shape, (1,) * len(shape))]
    arguments = group(pickles.reference(storage, parts), number(offset), *counts, more)
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def pickled(*entries: bytes) -> bytes:
    pairs = [(text(label), entry) for label, entry in zip("wabcde", entries, strict=False)]
    return b"\x80\x02" + table(*pairs) + b"."


STATE = pickled(tensor())


def members(value=STATE, storages=None, **facts: bytes) -> list[Member]:
    """An archive as PyTorch lays it out; `facts` are further members by name."""
    storages = {"0": SEEN} if storages is None else storages
    rows = [("data.pkl", value), *facts.items()]
    rows += [(f"data/{key}", held) for key, held in storages.items()]
    return [Member(ROOT + label.encode(), held) for label, held in [*rows, ("version", b"3\n")]]


def archive(value=STATE, storages=None, more=(), **facts: bytes) -> bytes:
    return zip_file([*members(value, storages, **facts), *more])


def altered(index: int, **how) -> bytes:
    """The good archive with one member otherwise: 0 the pickle, 1 the storage, 2 the version."""
    rows = members()
    rows[index] = rows[index]._replace(**how)
    return zip_file(rows)


def stream(value: bytes | None = None, **how) -> bytes:
    """A stream; `how` replaces system, keys, tail."""
    facts = {"system": table((text("little_endian"), b"\x88")), "keys": ("0",), "tail": b"", **how}
    listed = b"](" + b"".join(map(text, facts["keys"])) + b"e"
    program = lambda body: b"\x80\x02" + body + b"."
    parts = [program(b"\x8a\x0a" + archives.MAGIC), program(number(1001)), program(facts["system"])]
    parts += [pickled(tensor(parts=6)) if value is None else value, program(listed)]
    return b"".join(parts) + struct.pack("<q", 6) + SEEN + facts["tail"]


def safetensors(head: str) -> bytes:
    return struct.pack("<Q", len(head)) + head.encode() + SEEN


ONE = '"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'
DOUBLES = Storage("0", "DoubleStorage", 3)
ZIP64 = b"\x01\0\x10\0" + struct.pack("<2Q", 24, 24)
OTHER_NAME = b"\x75\x70\x0f\0\x01" + bytes(4) + b"archive/x\0"

LOCATOR = archive()[-42:-22]
"""Where the wide form of an archive's end record is said to be; its last field counts disks."""


def pickled_items(module: str, label: str) -> bytes:
    """Weights, and beside them a class that items are put into."""
    beside = name(module, label) + b"(" + text("a") + number(1) + b"u"
    return archive(b"\x80\x02" + table((text("w"), tensor()), (text("x"), beside)) + b".")


KINDS = {
    # one storage, two descriptions
    "two types": (archive(pickled(tensor(DOUBLES, shape=(3,)), tensor())), "two types, sizes or"),
    "two types of one size": (
        archive(pickled(tensor(), tensor(FLOATS._replace(kind="IntStorage")))),
        "two types, sizes or",
    ),
    "two sizes": (
        archive(pickled(tensor(), tensor(FLOATS._replace(numel=3), shape=(3,)))),
        "two types, sizes or",
    ),
    "two places": (
        archive(pickled(tensor(), tensor(FLOATS._replace(place="cuda:0")))),
        "two types, sizes or",
    ),
    "two types in a stream": (
        stream(pickled(tensor(DOUBLES, 6, (3,)), tensor(parts=6))),
        "two types, sizes or",
    ),
    "no type": (
        archive(pickled(tensor(FLOATS._replace(kind="UntypedStorage", numel=24), shape=(24,)))),
        "'torch.UntypedStorage'",
    ),
    "no values": (archive(pickled(tensor(FLOATS._replace(place="meta")))), "'meta', which is no"),
    "no place": (archive(pickled(tensor(FLOATS._replace(place="")))), "'', which is not a device"),
    "a reference of a stream": (archive(pickled(tensor(parts=6))), "not one to a storage"),
    "a reference of an archive": (stream(pickled(tensor())), "not one to a storage"),
    "a reference before the value": (
        stream(system=table((text("little_endian"), b"\x88"), (text("x"), tensor(parts=6)))),
        "not one to a storage",
    ),
    "a key that ends early": (
        archive(pickled(tensor(FLOATS._replace(key="0\0x")))),
        "is not in the archive",
    ),
    # names that PyTorch resolves otherwise
    "ByteOrder": (archive(more=[Member(ROOT + b"ByteOrder", b"big")]), "'ByteOrder'"),
    "BYTEORDER": (archive(more=[Member(ROOT + b"BYTEORDER", b"big")]), "'BYTEORDER'"),
    "Data.pkl first": (
        zip_file([Member(ROOT + b"Data.pkl", pickled(number(1))), *members()]),
        "twice",
    ),
    "DATA/0": (archive(more=[Member(ROOT + b"DATA/0", HIDDEN)]), "'archive/DATA/0' twice"),
    "a storage twice": (archive(more=[Member(ROOT + b"data/0", HIDDEN)]), "twice"),
    "a version in capitals": (archive(more=[Member(ROOT + b".DATA/version", b"3")]), "'.DATA/ver"),
    "another folder first": (zip_file([Member(b"b/data.pkl", STATE), *members()]), "exactly one"),
    "another folder last": (archive(more=[Member(b"b/version", b"3\n")]), "everything under NAME"),
    "no folder": (archive(more=[Member(b"byteorder", b"big")]), "everything under NAME"),
    "a program": (archive(more=[Member(ROOT + b"constants.pkl", b"")]), "TorchScript"),
    "big endian": (archive(byteorder=b"big"), "big-endian"),
    "odd endian": (archive(byteorder=b"Little"), "holds b'Little'"),
    "no version": (zip_file(members()[:-1]), "'version' is missing"),
    "a later version": (altered(2, data=b"11"), "'version' holds b'11'"),
    # bytes that lie otherwise than torch.save lays them
    "a packed storage": (altered(1, packed=True, data=bytes(4096)), "is compressed"),
    "a packed pickle": (altered(0, packed=True), "is compressed"),
    "a storage said to be packed": (altered(1, listed={"method": 8}), "is compressed"),
    "packed in its own header": (altered(1, local={"method": 8}), "in two different ways"),
    "not aligned": (altered(1, step=2), "does not begin at a multiple of 64"),
    "aligned to less": (altered(1, step=2, extra=b"FB\1\0Z"), "does not begin at a multiple"),
    "an odd alignment": (archive(**{".storage_alignment": b"3"}), "aligned to 3 bytes"),
    "an alignment of nothing": (archive(**{".storage_alignment": b"0"}), "'.storage_alignment'"),
    "a folder's attributes": (altered(1, listed={"attributes": 0x10}), "not marked as a plain"),
    "a link's attributes": (altered(1, listed={"attributes": 0o120777 << 16}), "not marked as"),
    "encrypted": (altered(1, listed={"flags": 0x809}, local={"flags": 0x809}), "encrypted"),
    "masked": (altered(1, listed={"flags": 0x2808}, local={"flags": 0x2808}), "encrypted"),
    "encrypted in its own header": (altered(1, local={"flags": 0x809}), "in two different ways"),
    "another name in its own header": (
        altered(1, local={"name": ROOT + b"data/1"}),
        "in two different ways",
    ),
    "another size in its own header": (altered(1, local={"size": 20}), "in two different ways"),
    "no disks": (
        archive().replace(LOCATOR, LOCATOR[:-4] + bytes(4)),
        "not where they should be",
    ),
    "items of a class": (
        pickled_items("torch", "Tensor_"),
        r"fills .torch\.Tensor_., which is not an instance",
    ),
    "another checksum": (altered(1, listed={"crc": 0}, stated="sizes"), "in two different ways"),
    "no descriptor": (altered(1, listed={"flags": 0x800}), "in two different ways"),
    "sizes anew": (altered(1, listed={"extra": ZIP64}), "fields that torch.save does not write"),
    "sizes anew in its own header": (altered(1, extra=ZIP64), "fields that torch.save does not"),
    "half a field": (altered(1, extra=b"FB\0"), "fields that torch.save does not write"),
    "half a field in the directory": (
        altered(1, listed={"extra": b"FB"}),
        "fields that torch.save",
    ),
    "a name anew": (altered(1, listed={"extra": OTHER_NAME}), "fields that torch.save does not"),
    "more than 4 GB": (altered(1, listed={"packed": 2**32 - 1, "size": 2**32 - 1}), "4 GB"),
    "a gap": (altered(1, gap=b"PK\3\4"), "does not follow"),
    "another order": (zip_file(members(), order=[0, 2, 1]), "does not follow"),
    "one not listed": (zip_file(members(), order=[0, 1]), "between the archive's last member"),
    "two ends": (zip_file(members(), end={"record": (3, 3, 0, 0)}), "contradict each other"),
    "a comment": (zip_file(members(), end={"comment": b"PK\5\6"}), "after its end"),
    "something before": (b"PK\3\4" + archive(), "not where"),
    "something behind": (archive() + b"\0", "after its end"),
    "two archives": (archive() + archive(storages={"0": HIDDEN}), "not where|does not lie"),
    "offsets that are calculated": (
        archive(
            pickled(tensor(FLOATS._replace(key="1")), tensor()),
            {"0": SEEN, "1": HIDDEN},
            **{".format_version": b"1"},
        ),
        "at the offset that its order implies",
    ),
    # arguments that PyTorch refuses
    "a gradient of integers": (
        archive(pickled(tensor(FLOATS._replace(kind="IntStorage"), more=b"\x88}"))),
        "requires_grad",
    ),
    "a gradient of 1": (archive(pickled(tensor(more=b"K\x01}"))), "requires_grad"),
    "hooks that are none": (archive(pickled(tensor(more=b"\x89N"))), "hooks or flags"),
    "negated": (archive(pickled(tensor(more=b"\x89}" + table((text("neg"), b"\x88"))))), "hooks"),
    "an endless frame": (archive(STATE[:2] + b"\x95" + b"\xff" * 8 + STATE[2:]), "cut off or"),
    "more than the storage": (archive(pickled(tensor(shape=(7,)))), "outside its storage"),
    "beyond the storage": (archive(pickled(tensor(offset=1))), "outside its storage"),
    # streams
    "a big-endian stream": (stream(system=table((text("little_endian"), b"\x89"))), "big-endian"),
    "a stream with a tail": (stream(tail=b"x"), "1 bytes follow"),
    "keys twice": (stream(keys=("0", "0")), "storages listed"),
    "keys of others": (stream(keys=("1",)), "storages listed"),
    # safetensors
    "a negative zero": (safetensors("{" + ONE.replace("[0,", "[-0,") + "}"), "no sense"),
    "an exponent": (safetensors("{" + ONE.replace("24", "24e0") + "}"), "no sense"),
    "half a pair in a note": (
        safetensors('{"__metadata__": {"a": "\\ud800"}, ' + ONE + "}"),
        "not valid JSON",
    ),
    "notes twice": (
        safetensors('{"__metadata__": {"a": "1", "a": "2"}, ' + ONE + "}"),
        "names 'a' twice",
    ),
    "a tensor twice": (safetensors("{" + ONE + ", " + ONE + "}"), "names 'w' twice"),
    "a field twice": (
        safetensors("{" + ONE.replace('"shape"', '"shape": [6], "shape"') + "}"),
        "names 'shape' twice",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_two_meanings_is_refused(kind):
    data, said = KINDS[kind]
    with pytest.raises(UserError, match=said):
        container.read_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        archive(),
        archive(byteorder=b"little", **{".data/version": b"3", ".storage_alignment": b"64"}),
        archive(storages={"0": SEEN}, **{".format_version": b"1"}),
        zip_file([member._replace(stated="sizes") for member in members()], zip64=False),
        zip_file([member._replace(step=4096) for member in members()]),
        stream(),
        safetensors("{" + ONE + "}   "),
    ],
    ids=["archive", "all facts", "calculated", "sizes first", "wide", "stream", "safetensors"],
)
def test_the_files_that_are_changed_are_good(tmp_path, data):
    read = container.read_bytes(data)
    np.testing.assert_array_equal(read.tensors["w"], np.arange(6, dtype=np.float32))
    assert oracle.difference(read, data, tmp_path / "file.pth") == ""
    assert read.sha256 == hashlib.sha256(data).hexdigest() == read.files["bytes"]


@pytest.mark.parametrize(
    "kind, how",
    [
        ("two types of one size", {}),
        ("ByteOrder", {}),
        ("DATA/0", {}),
        ("a packed storage", {"mmap": True}),
        ("a folder's attributes", {}),
        ("another checksum", {}),
        ("big endian", {}),
        ("a big-endian stream", {}),
        ("a stream with a tail", {}),
    ],
)
def test_pytorch_does_read_it(tmp_path, kind, how):
    """Why these must be refused: torch.load takes them without a word."""
    (tmp_path / "m.pth").write_bytes(KINDS[kind][0])
    assert "w" in torch.load(tmp_path / "m.pth", weights_only=True, **how)


@pytest.mark.parametrize("data", [b"\x81", b"\x08", b"\xde", b"\x80", b"\x0a", b"P"])
def test_a_file_of_one_byte_is_no_model(data):
    with pytest.raises(UserError, match=r"^bytes: refused, "):
        container.read_bytes(data)


def test_streams_of_every_protocol_are_read(tmp_path):
    state = {"w": torch.arange(6.0), "h": torch.ones(2, dtype=torch.half)}
    for protocol in (2, 3, 4, 5):
        out = io.BytesIO()
        torch.save(state, out, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        read = container.read_bytes(out.getvalue())
        assert read.kind == "torch-legacy" and set(read.tensors) == {"w", "h"}
        assert oracle.difference(read, out.getvalue(), tmp_path / "file") == ""


def numbered(keys) -> bytes:
    beside = b"}(" + b"".join(number(key) + b"N" for key in keys) + b"u"
    return archive(
        b"\x80\x02" + table((text("net"), table((text("w"), tensor()))), (text("x"), beside)) + b"."
    )


def test_numbers_that_collide_in_a_table_cost_nothing():
    """Keys a multiple of 2**61 - 1 apart have one hash and are not kept; smaller ones share a few
    bits only."""
    for step in (2**61 - 1, 1 << 47):
        started = time.thread_time()
        read = container.read_bytes(numbered(i * step for i in range(1, 4000)))
        assert time.thread_time() - started < 1.0
        np.testing.assert_array_equal(read.tensors["w"], np.arange(6, dtype=np.float32))
        assert all(key < 2**60 for key in read.outer.get("x", {}))


# the differential fuzzer


COUNTS = {"zip": 1_200, "stream": 1_500, "safetensors": 3_000}


@pytest.mark.parametrize("kind", targets.TARGETS)
def test_mutated_files_are_refused_or_understood_as_others_do(tmp_path, kind):
    """Files 2,000,000 and on, which the long run does not reach."""
    targets.prepare()
    target, watch = targets.TARGETS[kind], part.Watch()
    found = {"refused": 0, "equal": 0}
    for index in range(COUNTS.get(kind, 300)):
        data = target.make(random.Random(f"{kind}-{2_000_000 + index}"))
        said, seconds = part.judge(target, data, tmp_path / "file", watch)
        assert said in found, f"{kind}-{2_000_000 + index}: {said}"
        assert seconds < 2.0
        found[said] += 1
    assert watch.events == [] and min(found.values()) > 20


def test_the_judge_sees_a_difference(tmp_path):
    """Other values, another shape, another type, a tensor more: each is reported."""
    data = archive(storages={"0": SEEN})
    read = container.read_bytes(data)
    good = read.tensors["w"]
    for other in (good + 1, good.reshape(2, 3), good.view(np.int32)):
        wrong = oracle.difference(read._replace(tensors={"w": other}), data, tmp_path / "x")
        assert wrong.count("w") >= 3
    assert oracle.difference(read._replace(tensors={"w": good, "v": good}), data, tmp_path / "x")
    refused = KINDS["no version"][0]
    assert "no mode of PyTorch reads it" in oracle.difference(read, refused, tmp_path / "x")
    plain = safetensors("{" + ONE + "}")
    read = container.read_bytes(plain)
    assert "other values" in oracle.difference(
        read._replace(tensors={"w": good + 1}), plain, tmp_path / "file"
    )


def test_a_reader_that_runs_or_fails_is_caught(tmp_path):
    """A target whose reader opens a file to write, crashes, hangs or prints is not passed over."""
    watch = part.Watch()

    def writes(data: bytes):
        (tmp_path / "written").write_bytes(data)
        raise UserError("refused")

    target = targets.TARGETS["zip"]
    said, _ = part.judge(target._replace(read=writes), b"x", tmp_path / "file", watch)
    assert said == "refused" and len(watch.events) == 1 and "written" in watch.events[0]

    def fails(data: bytes):
        raise ZeroDivisionError("no")

    said, _ = part.judge(target._replace(read=fails), b"x", tmp_path / "file", watch)
    assert said == "crashed ZeroDivisionError: no"

    def speaks(data: bytes):
        raise UserError("a\x1b[2Jb")

    said, _ = part.judge(target._replace(read=speaks), b"x", tmp_path / "file", watch)
    assert said.startswith("crashed")


def test_a_part_that_dies_or_hangs_is_a_result(monkeypatch):
    """A crash of a reader ends its part only, and is not waited for."""
    from experiments.reader import nursery

    script = (
        "import os, sys, types; from experiments.reader import nursery, part, targets\n"
        "targets.prepare = lambda: None\n"
        "ends = {'dies': os.abort, 'hangs': lambda: __import__('time').sleep(600)}\n"
        "part.main = lambda kind, first, count: ends.get(kind, dict)() or {'files': count}\n"
        "nursery.serve()"
    )
    started = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **how: started([sys.executable, "-c", script], **how)
    )
    found = nursery.Nursery()
    assert found.run("zip", 0, 7, 60) == {"files": 7}
    assert found.run("dies", 0, 7, 60) == {"died": -signal.SIGABRT}
    assert found.run("zip", 0, 8, 60) == {"files": 8}
    assert found.run("hangs", 0, 7, 0.5) == {"died": nursery.ENDED}
    assert found.run("zip", 0, 9, 60) == {"files": 9}
    found.end()


def test_parts_are_kept_and_give_the_same_again(tmp_path, monkeypatch):
    from experiments import units
    from experiments.reader import fuzz

    monkeypatch.setattr(units, "RUNS", tmp_path)
    first = fuzz.unit("safetensors", 3_000_000, 50)
    assert first["files"] == 50 and not first["crashed"] and not first["executed"]
    assert fuzz.finished("safetensors", 3_000_000, 50)
    monkeypatch.setattr(fuzz, "run_part", lambda *_: pytest.fail("run again"))
    assert fuzz.unit("safetensors", 3_000_000, 50) == first
    assert json.loads((tmp_path / "reader" / "safetensors-3000000.json").read_text())["result"]
    plan = fuzz.plan(100_000)
    graphs = sum(count for kind, _, count in plan if kind in fuzz.RARER)
    assert sum(count for _, _, count in plan) == 100_000 + graphs and len(set(plan)) == len(plan)
    assert {kind for kind, _, _ in plan[:8]} == set(fuzz.SHARES)
