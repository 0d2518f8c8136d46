"""A corpus of hostile model files, and a runner that reads each in a process of its own and
measures what it did.

`build(folder)` writes them; `python hostile.py FOLDER` reads every entry of a folder and prints one
JSON line each. All of them carry the same payload where they can: create the file `CANARY`. Nobody
may ever see it.
"""

import collections
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib

CANARY = "canary"
MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
WEIGHTS = struct.pack("<6f", *range(6))


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# instructions by hand


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def group(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + group(*arguments) + b"R"


def storage(key: str = "0", numel: int = 6, kind: bytes | None = None) -> bytes:
    return (
        group(
            text("storage"),
            kind or name("torch", "FloatStorage"),
            text(key),
            text("cpu"),
            number(numel),
        )
        + b"Q"
    )


def tensor(
    shape=(2, 3),
    stride=(3, 1),
    offset: int = 0,
    held: bytes | None = None,
    hooks: bytes = b"}",
    more: bytes = b"",
) -> bytes:
    counts = [group(*map(number, values)) for values in (shape, stride)]
    parts = (storage() if held is None else held, number(offset), *counts, b"\x89", hooks, more)
    return call("torch._utils", "_rebuild_tensor_v2", *parts)


def table(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def with_weights(body: bytes) -> bytes:
    """A good state_dict under "net", and `body` beside it."""
    return program(table((text("net"), table((text("w"), tensor()))), (text("extra"), body)))


# containers by hand


def archive(
    data: bytes, storages=None, *, deflate: bool = False, root: str = "archive", more=()
) -> bytes:
    """A zip file as torch.save lays it out; `more` are further (name, bytes)."""
    out = io.BytesIO()
    members = [(f"{root}/data.pkl", data)]
    members += [(f"{root}/data/{key}", held) for key, held in (storages or {"0": WEIGHTS}).items()]
    members += [(f"{root}/version", b"3\n"), *more]
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for member, held in members:
            info = zipfile.ZipInfo(member)
            info.compress_type = method
            filling = -(out.tell() + 34 + len(member.encode())) % 64
            info.extra = b"FB" + struct.pack("<H", filling) + b"Z" * filling
            file.writestr(info, held)
    return out.getvalue()


def stream(
    value: bytes, keys=("0",), storages: bytes | None = None, system: bytes | None = None
) -> bytes:
    """A file as torch.save wrote it before 1.6."""
    # a stream's reference to a storage has a sixth part, which is None
    value = re.sub(rb"(?<!N)tQ", b"NtQ", value)
    system = table((text("little_endian"), b"\x88")) if system is None else system
    listed = b"](" + b"".join(map(text, keys)) + b"e"
    held = struct.pack("<q", 6) + WEIGHTS if storages is None else storages
    return b"".join(
        [
            program(b"\x8a\x0a" + MAGIC),
            program(number(1001)),
            program(system),
            value,
            program(listed),
            held,
        ]
    )


def safetensors(header, data: bytes = WEIGHTS, length: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def plain_state() -> bytes:
    return program(table((text("w"), tensor())))


def entry(shape=(2, 3), offsets=(0, 24), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# the corpus

INERT = {
    f"{label}{ending}.pth"
    for label in (
        "trick_codecs_decode",
        "trick_numpy_reconstruct",
        "trick_object_dtype",
        "trick_whole_model",
        "cost_colliding_keys",
        "cost_cyclic_dict",
        "cost_cyclic_list",
        "cost_deep_dicts",
        "cost_deep_lists",
        "cost_deep_lists_shallow_file",
        "cost_deep_tuples",
        "cost_hashed_tuples",
        "cost_long_integer",
    )
    for ending in ("", "_stream")
}
"""Good weights beside an entry that is of no use but does no harm: the weights are read, the entry
is left out."""


def calls() -> dict[str, bytes]:
    """Files that ask for something to be run."""
    command = f"touch {CANARY}"
    source = f"open({CANARY!r}, 'w').close()"
    wanted = {
        "os_system": Call(os.system, command),
        "eval": Call(eval, source),
        "exec": Call(exec, source),
        "import": Call(__import__, "os"),
        "open": Call(open, CANARY, "w"),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "nested_reduce": collections.OrderedDict(a=[({"b": Call(eval, source)},)]),
        "partial": Call(map, Call(eval, source), [1]),
        "unlink": Call(os.unlink, "anything"),
    }
    files = {}
    for label, value in wanted.items():
        for protocol in (2, 4):
            inner = (
                pickle.dumps(value, protocol)[2:-1]
                if protocol == 2
                else pickle.dumps(value, 4)[11:-1]
            )
            files[f"call_{label}_{protocol}.pth"] = archive(
                program(table((text("w"), tensor()), (text("x"), inner)), protocol)
            )
        files[f"call_{label}_stream.pth"] = stream(pickle.dumps({"w": 1, "x": value}, 2))
    files["call_bare_pickle.pth"] = pickle.dumps(Call(os.system, command))
    run = group(text(command))
    tricks = {
        "stack_global": text("os") + text("system") + b"\x93" + run + b"R",
        "stack_global_split": (
            text("os") + b"\x94" + text("system") + b"\x94" + b"\x93" + run + b"R"
        ),
        "stack_global_number": b"K\x01K\x02\x93",
        "stack_global_list": b"]]\x93",
        "dotted": name("collections", "OrderedDict.__init__.__globals__"),
        "dotted_module": name("torch._utils._rebuild_tensor_v2", "__globals__"),
        "builtins_py2": call("__builtin__", "eval", text(source)),
        "posix": call("posix", "system", text(command)),
        "nested_torch_load": call("torch.storage", "_load_from_bytes", text("x")),
        "numpy_load": call("numpy", "load", text("x")),
        "numpy_reconstruct": call(
            "numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b")", text("b")
        ),
        "codecs_zip": call("_codecs", "encode", text("x" * 8), text("zip")),
        "codecs_decode": call("_codecs", "decode", text("x"), text("rot13")),
        "inst": b"(" + text(command) + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + text(command) + b"o",
        "obj_allowed": b"(" + name("collections", "OrderedDict") + b"o",
        "newobj": name("collections", "OrderedDict") + b")\x81",
        "newobj_ex": name("collections", "OrderedDict") + b")}\x92",
        "ext1": b"\x82\x01",
        "ext2": b"\x83\x01\x00",
        "ext4": b"\x84\x01\x00\x00\x00",
        "persistent_text": b"Pos.system\n",
        "whole_model": call("torchvision.models.resnet", "ResNet"),
        "call_a_type": name("torch", "FloatStorage") + run + b"R",
        "call_a_text": text("os.system") + run + b"R",
        "build_hides_items": (
            call("collections", "OrderedDict") + table((text("items"), text("x"))) + b"b"
        ),
        "build_two": (
            call("collections", "OrderedDict")
            + table((text("_metadata"), b"N"), (text("a"), b"N"))
            + b"b"
        ),
        "build_slots": (
            call("collections", "OrderedDict") + b"N" + table((text("a"), b"N")) + b"\x86b"
        ),
        "build_on_type": (
            name("collections", "OrderedDict") + table((text("__init__"), b"N")) + b"b"
        ),
        "object_dtype": call("numpy", "dtype", text("O8"), b"\x89", b"\x88"),
        "escape_in_name": name("os\x1b[2J", "system\x07"),
    }
    for label, body in tricks.items():
        files[f"trick_{label}.pth"] = archive(with_weights(body))
        files[f"trick_{label}_stream.pth"] = stream(with_weights(body))
    return files


def costs() -> dict[str, bytes]:
    """Small files that would take hours or gigabytes."""
    doubled = b"]\x94" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)
    )
    hashed = b")\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60)
    )
    many_pairs = b"](" + b"".join(text(f"{i}") + b"N\x86" for i in range(9_000)) + b"e\x94"
    collide = b"}(" + b"".join(number(i << 61) + b"N" for i in range(100_000)) + b"u"
    bodies = {
        "doubled_lists": doubled,
        "hashed_tuples": group(hashed, b"}h\x3cNs"),
        "colliding_keys": collide,
        "sparse_memo": b"Nr" + struct.pack("<I", 2**31 - 1),
        "deep_lists": b"]" * 200_000 + b"a" * 199_999,
        "deep_lists_shallow_file": b"]" * 300 + b"a" * 299,
        "deep_tuples": b")" + b"\x85" * 200_000,
        "deep_dicts": b"}" + (text("a") + b"}") * 5_000 + b"s" * 5_000,
        "many_dicts": b"](" + b"}" * 3_000_000 + b"e",
        "many_calls": (
            b"](" + name("collections", "OrderedDict") + b"\x94" + b"h\x00)R" * 500_000 + b"e"
        ),
        "repeated_pairs": (
            many_pairs
            + b"]("
            + (name("collections", "OrderedDict") + b"h\x00\x85R") * 20_000
            + b"e"
        ),
        "cyclic_list": b"]\x94h\x00a",
        "cyclic_dict": b"}\x94" + text("a") + b"h\x00s",
        "claims_text": b"X\xff\xff\xff\xff",
        "claims_text8": b"\x8d" + struct.pack("<Q", 10 << 30),
        "claims_bytes8": b"\x8e" + struct.pack("<Q", 10 << 30),
        "claims_bytearray8": b"\x96" + struct.pack("<Q", 10 << 30),
        "claims_integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "long_integer": b"\x8a\xff" + b"\x7f" * 255,
        "claims_frame_then_text": b"\x95" + struct.pack("<Q", 10 << 30) + b"X\xff\xff\xff\x7f",
        "long_encode": (
            (b"]" + call("_codecs", "encode", text("x" * 60_000), text("latin1")) + b"a") * 100
        ),
        "duplicate_top": b"]" + b"2" * 1000,
        "dots": text("." * 4_000_000) + text("x") + b"\x93",
        "endless_line": b"c" + b"a" * 100_000,
    }
    files = {f"cost_{label}.pth": archive(with_weights(body)) for label, body in bodies.items()}
    files |= {
        f"cost_{label}_stream.pth": stream(with_weights(body)) for label, body in bodies.items()
    }
    files["cost_zip_bomb_pickle.pth"] = archive(b"\0" * (100 << 20), deflate=True)
    files["cost_zip_bomb_storage.pth"] = archive(
        plain_state(), {"0": b"\0" * (100 << 20)}, deflate=True
    )
    flat = lambda i: tensor(held=storage(str(i), 1 << 22), shape=(1 << 22,), stride=(1,))
    wide = program(table(*[(text(f"w{i}"), flat(i)) for i in range(5)]))
    files["cost_zip_bomb_many.pth"] = archive(
        wide, {str(i): b"\0" * (16 << 20) for i in range(5)}, deflate=True
    )
    lie = bytearray(archive(plain_state(), {"0": b"\0" * (80 << 20)}, deflate=True))
    files["cost_zip_bomb_lying.pth"] = bytes(
        lie.replace(struct.pack("<I", 80 << 20), struct.pack("<I", 24))
    )
    files["cost_many_members.pth"] = archive(
        plain_state(), more=[(f"archive/x{i}", b"") for i in range(40_000)]
    )
    return files


def loops() -> dict[str, bytes]:
    """Files that lead a reader into a loop whose length their size hardly bounds."""
    frombuffer = name("numpy._core.numeric", "_frombuffer") + b"q\x00"
    truth = call("numpy", "dtype", text("b1"), b"\x89", b"\x88") + b"q\x01"
    held = b"B" + struct.pack("<I", 4_000_000) + bytes(4_000_000) + b"q\x02"
    shape = number(4_000_000) + b"\x85q\x03" + text("C") + b"q\x04"
    again = b"h\x00(h\x02h\x01h\x03h\x04tR"
    dotted = ".".join("a" * 500_000)
    of_one = table((text("a"), text("b")), (text("w"), b"h\x00"))
    state = lambda key: program(table((text(key), tensor())))
    files = {
        "loop_truth_values.pth": archive(
            with_weights(b"](" + frombuffer + truth + held + shape + again * 40_000 + b"e")
        ),
        "loop_dotted_name.pth": archive(with_weights(text(dotted) + text("x") + b"\x93")),
        "loop_long_name.pth": archive(with_weights(text("x") + text("a" * 4_000_000) + b"\x93")),
        "loop_dots_of_a_tensor.pth": archive(state("." * 200_000)),
        "loop_modules_of_a_tensor.pth": archive(state("module." * 200_000)),
        "loop_many_nets.pth": archive(
            program(b"(" + tensor() + b"q\x001" + b"](" + of_one * 25_000 + b"e")
        ),
        "loop_dots_of_an_array.npz": npz({"." * 60_000: array(), "a.b": array(), "a.c": array()}),
    }
    return files


def array(count: int = 6, kind: bytes = b"<f4", head: bytes | None = None) -> bytes:
    """An .npy file of zeros, whose header may say anything."""
    if head is None:
        head = b"{'descr': '%b', 'fortran_order': False, 'shape': (%d,), }" % (kind, count)
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    data = bytes(count * int(kind[2:]))
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data


def npz(arrays: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name_, data in arrays.items():
            file.writestr(f"{name_}.npy", data)
    return out.getvalue()


def wrapped() -> dict[str, bytes]:
    """Zip archives around a model file, in which PyTorch sees another model, and such that are
    unpacked without end."""
    inner = archive(plain_state())
    # PyTorch finds archive/Data.pkl by its name in lower case
    capitals = archive(plain_state(), more=[("archive/good.pth", inner)])
    capitals = capitals.replace(b"archive/data.pkl", b"archive/Data.pkl")
    around = lambda members, method=zipfile.ZIP_STORED: _zip(members, method)
    plain = around({"good.pth": inner})
    end = plain.rindex(b"PK\5\6")
    count, size, start = struct.unpack_from("<H2I", plain, end + 10)
    # readers that go by the stated place find another directory than those that look before the end
    moved = plain[:end] + plain[start:end] + plain[end:]
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    elsewhere = record[:40] + struct.pack("<2Q", size, 0)
    huge = (
        b"".join(
            b"PK\1\2" + struct.pack("<6H3I5H2I", *(0,) * 6, 0, 0, 0, 4, *(0,) * 6) + b"%04x" % i
            for i in range(60_000)
        )
        * 5
    )
    told = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 300_000, 300_000, len(huge), end)
    told += struct.pack("<4sIQI", b"PK\6\7", 0, end + len(huge), 1)
    return {
        "wrapped_data_in_capitals.pth": capitals,
        "wrapped_two_directories.pth": moved,
        "wrapped_two_records.pth": plain[:end] + record + elsewhere + locator + plain[end:],
        "wrapped_comment.pth": plain[:-2] + struct.pack("<H", 22) + plain[end:],
        "wrapped_huge_directory.pth": plain[:end] + huge + told + plain[end:],
        "wrapped_twice.pth": around({"a.pth": plain}),
        "wrapped_bzip2.pth": around({"good.pth": inner}, zipfile.ZIP_BZIP2),
        "wrapped_lzma.pth": around({"good.pth": inner}, zipfile.ZIP_LZMA),
        "wrapped_zeros.pth": around({"a.pth": bytes(80 << 20)}, zipfile.ZIP_DEFLATED),
        "wrapped_doubled_ending.npz": _zip({"x.npy": array(), "x.npy.npy": array(5)}),
        **{
            f"header_{label}.npz": npz({"x": array(head=head)})
            for label, head in {
                "open_text": b"{'descr': '''",
                "open_brackets": b"(" * 9_000,
                "signs": b"{'descr': " + b"-" * 9_000 + b"1}",
                "zeros": bytes(50),
                "fields": b"{'descr': '" + b"<f4," * 2_000 + b"'}",
                "objects": b"{'descr': 'O', 'fortran_order': False, 'shape': (6,)}",
                "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-6,)}",
                "truth": b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 6)}",
                "big_endian": b"{'descr': '>f4', 'fortran_order': False, 'shape': (6,)}",
            }.items()
        },
        "header_truth_values.npz": npz({"x": array(24, b"|b1")[:-24] + b"\2" * 24}),
        "wrapped_arrays_of_zeros.npz": _zip({"x.npy": array(20 << 20)}, zipfile.ZIP_DEFLATED),
    }


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name_, data in members.items():
            file.writestr(name_, data)
    return out.getvalue()


def views() -> dict[str, bytes]:
    """Tensors that reach for what is not theirs."""
    ten_gb = 10 << 30
    parts = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(6))
    bodies = {
        "claims_10gb": tensor(shape=(ten_gb // 4,), stride=(1,)),
        "claims_10gb_storage": tensor(
            shape=(ten_gb // 4,), stride=(1,), held=storage(numel=ten_gb // 4)
        ),
        "repeats_10gb": tensor(shape=(ten_gb // 4,), stride=(0,)),
        "repeats_by_strides": tensor(shape=(1 << 13, 1 << 13, 1 << 13), stride=(0, 0, 0)),
        "overflow": tensor(shape=(1 << 32, 1 << 32), stride=(0, 0)),
        "overflow_empty": tensor(shape=(0, 1 << 39, 1 << 39), stride=(1, 1, 1)),
        "beyond": tensor(shape=(2, 3), stride=(4, 1)),
        "beyond_far": tensor(shape=(2,), stride=(1 << 39,)),
        "offset": tensor(offset=1),
        "offset_far": tensor(shape=(1,), stride=(1,), offset=1 << 39),
        "offset_before": tensor(shape=(1,), stride=(1,), offset=-1),
        "stride_back": tensor(shape=(3,), stride=(-1,), offset=2),
        "shape_negative": tensor(shape=(-1,), stride=(1,)),
        "stride_short": tensor(shape=(2, 3), stride=(1,)),
        "rank": tensor(shape=(1,) * 60, stride=(1,) * 60),
        "shape_of_text": call(
            "torch._utils",
            "_rebuild_tensor_v2",
            storage(),
            number(0),
            group(text("2")),
            b")",
            b"\x89}",
        ),
        "hooks": tensor(hooks=table((text("a"), b"N"))),
        "negated": tensor(more=table((text("neg"), b"\x88"))),
        "no_storage": tensor(held=text("storage")),
        "other_key": tensor(held=storage("1")),
        "path_key": tensor(held=storage("../../../../etc/passwd")),
        "absolute_key": tensor(held=storage("/etc/passwd")),
        "wrong_count": tensor(held=storage(numel=7)),
        "two_sizes": table(
            (text("a"), tensor()),
            (text("b"), tensor(shape=(1,), stride=(1,), held=storage(numel=1))),
        ),
        "quantised": call("torch._utils", "_rebuild_qtensor", storage()),
        "complex": tensor(held=storage(kind=name("torch", "ComplexFloatStorage"), numel=3)),
        "type_is_text": tensor(held=storage(kind=text("FloatStorage"))),
        "type_is_dtype": tensor(
            held=storage(kind=call("numpy", "dtype", text("f4"), b"\x89", b"\x88"))
        ),
        "short_reference": tensor(held=group(text("storage")) + b"Q"),
        "module_reference": group(text("module"), b"N", text("source"), text("import os")) + b"Q",
        "view_reference": tensor(held=group(*parts, group(text("1"), number(0), number(6))) + b"Q"),
        "name_is_number": table((number(1), tensor())),
        "name_with_escape": table((text("w\x1b[2J"), tensor())),
        "name_reversed": table((text("w\u202e"), tensor())),
        "name_long": table((text("w" * 300), tensor())),
        "bad_booleans": tensor(
            held=storage(kind=name("torch", "BoolStorage"), numel=24), shape=(24,), stride=(1,)
        ),
    }
    files = {}
    for label, body in bodies.items():
        value = program(
            body
            if label in ("two_sizes",) or label.startswith("name_")
            else table((text("w"), body))
        )
        files[f"view_{label}.pth"] = archive(value)
        files[f"view_{label}_stream.pth"] = stream(value)
    several = table(
        (text("left"), table((text("w"), tensor()))), (text("right"), table((text("w"), tensor())))
    )
    files["view_two_models.pth"] = archive(program(several))
    files["view_no_model.pth"] = archive(program(table((text("w"), number(1)))))
    files["view_list.pth"] = archive(program(b"](" + tensor() + b"e"))
    return files


def archives() -> dict[str, bytes]:
    """Damaged and two-faced archives and streams."""
    good, old = archive(plain_state()), stream(plain_state())
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    swapped = archive(
        program(
            table(
                (text("a"), tensor()),
                (text("b"), tensor(shape=(1,), stride=(1,), held=storage("1", 1))),
            )
        ),
        {"0": WEIGHTS[:4], "1": WEIGHTS},
    )
    inside = good[good.index(b"PK\x03\x04", 1) :][: 30 + len("archive/data/0") + len(WEIGHTS)]
    hidden = archive(plain_state(), {"1": b"....." + inside, "0": WEIGHTS})
    overlapping = bytearray(hidden)
    listed = hidden.rindex(b"archive/data/0") - 46
    overlapping[listed + 42 : listed + 46] = struct.pack("<I", hidden.index(b".....") + 5)
    end = good.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<H2I", good, end + 10)
    record = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start - 1
    )
    record += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    polyglot = bytearray(
        stream(
            plain_state(), system=table((text("little_endian"), b"\x88"), (text("p" * 600), b"N"))
        )
    )
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)
    polyglot[100:512] = header[100:512]
    polyglot[148:156] = b"%06o\0 " % (sum(polyglot[:148]) + 8 * 32 + sum(polyglot[156:512]))
    files = {
        "empty.pth": b"",
        "empty.safetensors": b"",
        "one_byte.pth": b"P",
        "wrong_magic.pth": b"\0" * 1000,
        "text.pth": b"These are not the weights you are looking for.\n" * 10,
        "page.pth": b"<!DOCTYPE html><html>404</html>",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "gzip.pth": b"\x1f\x8b" + b"\0" * 100,
        "zip_magic_only.pth": b"PK\x03\x04",
        "zip_without_pickle.pth": good.replace(b"data.pkl", b"data.txt"),
        "zip_two_pickles.pth": archive(plain_state(), more=[("other/data.pkl", plain_state())]),
        "zip_script.pth": archive(
            plain_state(), more=[("archive/code/__torch__.py", b"import os")]
        ),
        "zip_traversal.pth": archive(plain_state(), more=[("../../" + CANARY, b"x")]),
        "zip_traversal_inside.pth": archive(
            plain_state(), more=[("archive/../../" + CANARY, b"x")]
        ),
        "zip_absolute.pth": archive(plain_state(), more=[("/tmp/" + CANARY, b"x")]),
        "zip_backslash.pth": good.replace(b"archive/version", b"archive\\version"),
        "zip_drive.pth": good.replace(b"archive/version", b"archive:version"),
        "zip_case_twins.pth": archive(plain_state(), more=[("archive/DATA/0", WEIGHTS[::-1])]),
        "zip_twins.pth": (
            archive(plain_state(), more=[("archive/data/1", WEIGHTS[::-1])]).replace(
                b"data/1", b"data/0"
            )
        ),
        "zip_encrypted.pth": bytes(encrypted),
        "zip_overlapping.pth": bytes(overlapping),
        "zip_trailing.pth": good + b"x",
        "zip_leading.pth": b"PK\x03\x04" + good,
        "zip_comment.pth": good[:-2] + b"\x04\x00abcd",
        "zip_header_differs.pth": good.replace(b"archive/data/0", b"archive/data/7", 1),
        "zip_contradicting_ends.pth": good[:end] + record + good[end:],
        "zip_flipped_weight.pth": good.replace(WEIGHTS, WEIGHTS[:-1] + b"\x7f"),
        "zip_swapped_sizes.pth": swapped,
        "zip_big_endian.pth": archive(plain_state(), more=[("archive/byteorder", b"big")]),
        "zip_pickle_trailing.pth": archive(plain_state() + b"cos\nsystem\n."),
        "stream_trailing.pth": old + b"x",
        "stream_big_endian.pth": stream(
            plain_state(), system=table((text("little_endian"), b"\x89"))
        ),
        "stream_other_protocol.pth": old.replace(program(number(1001)), program(number(1002))),
        "stream_other_keys.pth": stream(plain_state(), keys=("1",)),
        "stream_twin_keys.pth": stream(
            plain_state(), keys=("0", "0"), storages=2 * (struct.pack("<q", 6) + WEIGHTS)
        ),
        "stream_claims.pth": stream(plain_state(), storages=struct.pack("<q", 10 << 30) + WEIGHTS),
        "stream_claims_negative.pth": stream(
            plain_state(), storages=struct.pack("<q", -1) + WEIGHTS
        ),
        "stream_and_tar.pth": bytes(polyglot),
    }
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        files[f"zip_truncated_{share}.pth"] = good[: int(share * len(good))]
        files[f"stream_truncated_{share}.pth"] = old[: int(share * len(old))]
    return files


def headers() -> dict[str, bytes]:
    """safetensors files that are not what they say."""
    two = {"a": entry((2,), (0, 8)), "b": entry((4,), (8, 24))}
    return {
        f"st_{label}.safetensors": data
        for label, data in {
            "claims_header": safetensors({"w": entry()}, length=1 << 62),
            "claims_header_10gb": safetensors({"w": entry()}, length=10 << 30),
            "claims_10gb": safetensors({"w": entry((10 << 28,), (0, 10 << 30))}),
            "claims_10gb_shape": safetensors({"w": entry((10 << 28,))}),
            "overflow": safetensors({"w": entry((1 << 32, 1 << 32))}),
            "overflow_empty": safetensors({"w": entry((0, 1 << 47, 1 << 47), (0, 0))}, b""),
            "negative": safetensors({"w": entry((-2, -3))}),
            "fraction": safetensors({"w": entry((2.0, 3))}),
            "truth": safetensors({"w": entry((True, 6))}),
            "swapped_offsets": safetensors({"w": entry((2, 3), (24, 0))}),
            "swapped_sizes": safetensors({"a": entry((4,), (0, 8)), "b": entry((2,), (8, 24))}),
            "overlap": safetensors({**two, "b": entry((6,), (0, 24))}),
            "gap": safetensors({"a": entry((2,), (0, 8)), "b": entry((2,), (16, 24))}),
            "trailing": safetensors({"w": entry()}, WEIGHTS + b"x"),
            "truncated": safetensors({"w": entry()})[:-1],
            "twins": safetensors(b'{"w": %b, "w": %b}' % ((json.dumps(entry()).encode(),) * 2)),
            "deep": safetensors(b'{"a":' * 100_000),
            "empty_objects": safetensors(b'{"w":[' + b"{}," * 660_000 + b"{}]}"),
            "small_objects": safetensors(b'{"w":[' + b'{"a":{"b":0}},' * 140_000 + b"{}]}"),
            "one_long_name": safetensors({"w" * 1_900_000: entry()}),
            "dots": safetensors(
                {
                    "." * 256: entry((1,), (0, 4)),
                    **{f"{'a.' * 120}{i}": entry((0,), (4, 4)) for i in range(5_000)},
                },
                WEIGHTS[:4],
            ),
            "escaped_twins": safetensors(
                b'{"w": %b, "\\u0077": %b}' % ((json.dumps(entry()).encode(),) * 2)
            ),
            "mark_of_order": safetensors(b"\xef\xbb\xbf" + json.dumps({"w": entry()}).encode()),
            "wide_letters": safetensors(json.dumps({"w": entry()}).encode("utf-16-le")),
            "after_the_end": safetensors(json.dumps({"w": entry()}).encode() + b"{}"),
            "comment": safetensors(json.dumps({"w": entry()}).encode()[:-1] + b"/* */}"),
            "leading_zero": safetensors(
                b'{"w":{"dtype":"F32","shape":[06],"data_offsets":[0,24]}}'
            ),
            "text_as_number": safetensors({"w": {**entry(), "shape": ["6"]}}),
            "null_notes": safetensors({"__metadata__": None, "w": entry()}),
            "empty_name": safetensors({"": entry()}),
            "header_of_zeros": safetensors(b"{" + bytes(1_000)),
            "deep_list": safetensors(b'{"a":' + b"[" * 1_000_000),
            "many": safetensors({f"w{i}": entry((0,), (0, 0)) for i in range(12_000)}, b""),
            "wide": safetensors(b'{"w":[' + b"{}," * 600_000 + b"{}]}"),
            "long_number": safetensors(b'{"w":' + b"9" * 1_000_000 + b"}"),
            "infinity": safetensors(
                b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'
            ),
            "not_utf8": safetensors(b'{"\xff": 1}'),
            "no_tensors": safetensors({}, b""),
            "other_type": safetensors({"w": entry(dtype="F8_E4M3", shape=(24,))}),
            "type_is_list": safetensors({"w": {**entry(), "dtype": ["F32"]}}),
            "more_fields": safetensors({"w": {**entry(), "code": "x"}}),
            "notes_not_text": safetensors({"__metadata__": {"a": {}}, "w": entry()}),
            "name_with_escape": safetensors({"w\x1b[2J": entry()}),
            "bad_booleans": safetensors({"w": entry((24,), dtype="BOOL")}),
        }.items()
    }


def folders(root: pathlib.Path) -> None:
    """Folders that are not models, or lie."""
    (root / "folder_empty").mkdir()
    weights = safetensors({"params/w": entry()})
    good = dict(
        format="jaxbd-model",
        version=1,
        arch="cnn",
        classes=2,
        image_shape=[8, 8, 3],
        mean=[0],
        std=[1],
        options={},
        dtype="float32",
        class_names=[],
    )
    configs = {
        "nothing": b"",
        "not_json": b"{",
        "deep": b"[" * 1_000_000,
        "other_format": json.dumps({**good, "format": "x"}).encode(),
        "version": json.dumps({**good, "version": 99}).encode(),
        "arch": json.dumps({**good, "arch": "os.system"}).encode(),
        "classes": json.dumps({**good, "classes": 10**12}).encode(),
        "image_shape": json.dumps({**good, "image_shape": [1 << 40, 1, 1]}).encode(),
        "std_zero": json.dumps({**good, "std": [0]}).encode(),
        "mean_nan": json.dumps({**good, "mean": [float("nan")]}).encode(),
        "endless_depth": json.dumps({**good, "options": {"stages": 10**9}}).encode(),
        "overflowing_depth": json.dumps({**good, "options": {"stages": 64}}).encode(),
        "depth_of_fixed": (
            json.dumps({**good, "arch": "wrn16-1", "options": {"depth": 6 * 10**6 + 4}}).encode()
        ),
        "blocks": (
            json.dumps({**good, "arch": "resnet18", "options": {"blocks": [60] * 60}}).encode()
        ),
        "parent": json.dumps({**good, "options": {"parent": 1}}).encode(),
        "unknown_option": json.dumps({**good, "options": {"x": 1}}).encode(),
        "options_list": json.dumps({**good, "options": []}).encode(),
        "dtype_object": json.dumps({**good, "dtype": "object"}).encode(),
        "other_tensors": json.dumps(good).encode(),
    }
    for label, config in configs.items():
        (root / f"folder_{label}").mkdir()
        (root / f"folder_{label}" / "config.json").write_bytes(config)
        (root / f"folder_{label}" / "model.safetensors").write_bytes(weights)
    _guards(root, {**good, "options": {"width": 1, "stages": 1}, "version": 2})
    _orbax(root)


SMALL_CNN = {
    "params/conv0/kernel": (3, 3, 3, 1),
    "params/norm0/scale": (1,),
    "params/norm0/bias": (1,),
    "params/head/kernel": (1, 2),
    "params/head/bias": (2,),
    "batch_stats/norm0/mean": (1,),
    "batch_stats/norm0/var": (1,),
}
"""Every array of a cnn of width 1 in one stage, for two classes."""


def arrays(shapes: dict[str, tuple[int, ...]], values: dict[str, float] = {}) -> bytes:  # noqa: B006 (read only)
    """A safetensors file of float32 arrays that hold 1 throughout, or what `values` says."""
    header, data = {}, b""
    for name_, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        header[name_] = entry(list(shape), [len(data), len(data) + 4 * size])
        data += struct.pack(f"<{size}f", *[values.get(name_, 1.0)] * size)
    return safetensors(header, data)


def _guards(root: pathlib.Path, config: dict) -> None:
    """Guarded models, whole but for their guard."""
    moments = {
        name_: shape for name_, shape in SMALL_CNN.items() if name_.startswith("batch_stats/")
    }
    bounds = {"bounds/norm0/lower": (1,), "bounds/norm0/upper": (1,)}
    features = {f"bounds/features/{part}": (1,) for part in ("mean", "std", "lower", "upper")}
    of = lambda target, shapes: {f"{target}/{name_}": shape for name_, shape in shapes.items()}
    good, model, named = of(1, moments | bounds), arrays(SMALL_CNN), {"targets": [1]}
    digest, files = (
        lambda data: hashlib.sha256(data).hexdigest(),
        ("model.safetensors", "guard.safetensors"),
    )
    guards: dict[str, tuple[bytes | None, object]] = {
        "missing": (None, named),
        "empty": (b"", named),
        "no_tensors": (safetensors({}, b""), named),
        "claims_10gb": (
            safetensors({"1/bounds/norm0/upper": entry((10 << 28,), (0, 10 << 30))}),
            named,
        ),
        "pickle": (archive(plain_state()), named),
        "not_spoken_of": (arrays(good), None),
        "is_a_list": (arrays(good), [1]),
        "no_targets": (arrays(good), {"targets": []}),
        "target_outside": (arrays(of(2, moments)), {"targets": [2]}),
        "target_negative": (arrays(of(-1, moments)), {"targets": [-1]}),
        "target_twice": (arrays(good), {"targets": [1, 1]}),
        "target_true": (arrays(of("True", moments)), {"targets": [True]}),
        "targets_endless": (arrays(good), {"targets": [1] * 100_000}),
        "target_without_arrays": (arrays(good), {"targets": [1, 0]}),
        "another_target": (arrays(good | of(0, moments)), named),
        "bare_name": (arrays(good | {"x": (1,)}), named),
        "weights": (arrays(good | {"1/params/head/bias": (2,)}), named),
        "no_moments": (arrays(of(1, bounds)), named),
        "shape": (arrays(good | {"1/batch_stats/norm0/mean": (2,)}), named),
        "one_bound": (arrays(of(1, moments) | {"1/bounds/norm0/upper": (1,)}), named),
        "no_spread": (arrays(of(1, moments | dict(list(features.items())[2:]))), named),
        "unknown_layer": (arrays(good | {"1/bounds/conv0/upper": (1,)}), named),
        "traversal": (arrays(good | {"1/../../x": (1,)}), named),
        "targets_differ": (arrays(good | of(0, moments)), {"targets": [1, 0]}),
        "nan_bound": (arrays(good, {"1/bounds/norm0/upper": float("nan")}), named),
        "endless_moment": (arrays(good, {"1/batch_stats/norm0/var": float("inf")}), named),
        "endless_spread": (
            arrays(of(1, moments | features), {"1/bounds/features/std": float("inf")}),
            named,
        ),
        "other_file": (arrays(good), {**named, "sha256": dict.fromkeys(files, "0" * 64)}),
        "odd_hash": (arrays(good), {**named, "sha256": "0"}),
        "more_files": (arrays(good), {**named, "sha256": {"../../etc/passwd": "0" * 64}}),
    }
    for label, (data, spoken) in guards.items():
        place = root / f"folder_guard_{label}"
        place.mkdir()
        (place / "model.safetensors").write_bytes(model)
        if data is not None:
            (place / "guard.safetensors").write_bytes(data)
        if isinstance(spoken, dict):
            spoken = {
                "sha256": dict(zip(files, map(digest, (model, data or b"")), strict=True)),
                **spoken,
            }
        (place / "config.json").write_text(
            json.dumps(config if spoken is None else {**config, "guard": spoken})
        )
    plain = root / "folder_guard_plain_config"
    plain.mkdir()
    for name_, content in zip(files, (model, arrays(good)), strict=True):
        (plain / name_).write_bytes(content)
    (plain / "config.json").write_text(json.dumps({**config, "version": 1}))


def _orbax(root: pathlib.Path) -> None:
    """Orbax folders in zarr files, without OCDBT, whose arrays claim too much."""
    steps = [{"key": "params", "key_type": 2}, {"key": "w", "key_type": 2}]
    row = {
        "key_metadata": steps,
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
    array = dict(
        zarr_format=2,
        shape=[10 << 28],
        chunks=[16],
        dtype="<f4",
        compressor=None,
        fill_value=0,
        order="C",
        filters=None,
    )
    up = [{"key": "params", "key_type": 2}, {"key": "../../x", "key_type": 2}]
    contents = {
        "claims": ({"tree_metadata": {"w": row}}, array),
        "claims_block": (
            {"tree_metadata": {"w": row}},
            {**array, "shape": [1], "chunks": [10 << 28]},
        ),
        "object_type": ({"tree_metadata": {"w": row}}, {**array, "dtype": "|O"}),
        "python_filter": ({"tree_metadata": {"w": row}}, {**array, "filters": [{"id": "pickle"}]}),
        "absent": ({"tree_metadata": {"w": row}}, None),
        "traversal": ({"tree_metadata": {"w": {**row, "key_metadata": up}}}, None),
        "no_params": ({"tree_metadata": {}}, None),
        "not_orbax": ([], None),
        "odd_rows": ({"tree_metadata": {"w": []}}, None),
        "no_database": ({"tree_metadata": {"w": row}, "use_ocdbt": True}, None),
        "many_arrays": (
            {
                "tree_metadata": {
                    f"w{i}": {**row, "key_metadata": [steps[0], {"key": f"w{i}"}]}
                    for i in range(9_000)
                }
            },
            None,
        ),
        **{
            f"unpacks_{codec}": (
                {"tree_metadata": {"w": row}},
                {**array, "shape": [16], "compressor": {"id": codec}},
            )
            for codec in ("zlib", "gzip")
        },
        "link": ({"tree_metadata": {"w": row}}, {**array, "shape": [16]}),
    }
    zeros = bytes(400 << 20)
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = {"zlib": zlib.compress(zeros, 1), "gzip": packer.compress(zeros) + packer.flush()}
    for label, (table_of_contents, zarray) in contents.items():
        place = root / f"orbax_{label}"
        (place / "params.w").mkdir(parents=True)
        (place / "_METADATA").write_text(json.dumps(table_of_contents))
        if zarray is not None:
            (place / "params.w" / ".zarray").write_text(json.dumps(zarray))
        if label.startswith("unpacks_"):
            (place / "params.w" / "0").write_bytes(packed[label.removeprefix("unpacks_")])
    (root / "orbax_link" / "params.w" / "0").symlink_to("/dev/zero")


def _files() -> dict[str, bytes]:
    made = {}
    for make in (calls, costs, loops, views, archives, wrapped, headers):
        made |= make()
    return made


def build(root: pathlib.Path) -> list[str]:
    """Writes the corpus into `root`; the names of its entries."""
    for name_, data in {**_files()}.items():
        (root / name_).write_bytes(data)
    folders(root)
    os.mkfifo(root / "pipe.pth")
    (root / "device.pth").symlink_to("/dev/zero")
    with (root / "sparse.pth").open("wb") as file:
        file.write(archive(plain_state())[:64])
        file.truncate(10 << 30)
    return sorted(entry.name for entry in root.iterdir())


# the runner

WATCHED = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "os.remove",
}
WATCHED |= {
    "os.rename",
    "os.mkdir",
    "shutil.rmtree",
    "ctypes.dlopen",
    "socket.connect",
    "code.__new__",
}
WORKER = [
    *(sys.executable, "-I"),
    str(pathlib.Path(__file__).parents[1] / "jaxbd" / "interop" / "orbax_worker.py"),
]
TOGETHER = 24
"""Cheap files that share a process; those that aim at time or memory get one each."""


def _watch(events: list[str]) -> None:
    """Notes every process started but the reader's own worker, every unpickler's look-up, and every
    file opened for writing."""

    def hook(event, arguments):
        if event == "subprocess.Popen" and list(arguments[1]) == WORKER:
            return
        if event in WATCHED or (
            event == "open"
            and not isinstance(arguments[0], int)  # a pipe to a worker, open already
            and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            events.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)


def _read(path: pathlib.Path, events: list[str]) -> dict:
    """Reads one file the way a person would: what came of it, processor seconds, peak megabytes
    beyond the start."""
    from jaxbd.base import UserError
    from jaxbd.interop import container, folder, guarded

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, started, first = _memory("VmRSS"), time.process_time(), len(events)
    try:
        model = guarded if guarded.is_guarded(path) else folder
        model.load(path) if folder.is_model(path) else container.read(path)
        outcome, message = "accepted", ""
    except UserError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = "crashed", f"{type(error).__name__}: {error}"[:500]
    report = {"name": path.name, "outcome": outcome, "message": message, "events": events[first:]}
    return {
        **report,
        "seconds": time.process_time() - started,
        "megabytes": _memory("VmHWM") - before,
    }


def _memory(field: str) -> float:
    """Megabytes that Linux states for this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _in_child(paths: list[pathlib.Path]) -> None:
    """Reads `paths` in a forked process and prints a line for each."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        events: list[str] = []
        _watch(events)
        for path in paths:
            print(json.dumps(_read(path, events)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def main(root: pathlib.Path) -> None:
    # what reading needs is imported before processes are forked, so that only reading is measured
    from jaxbd.interop import fit, guarded  # noqa: F401
    from jaxbd.models import build as nets

    fit.expected_shapes(nets.Spec(arch="cnn", classes=2, image_shape=(8, 8, 3)))
    paths = sorted(root.iterdir())
    alone = [
        path
        for path in paths
        if path.name.startswith(
            ("cost_", "loop_", "wrapped_", "sparse", "orbax_", "folder_", "st_")
        )
    ]
    rest = [path for path in paths if path not in alone]
    for group in [
        *([path] for path in alone),
        *(rest[i : i + TOGETHER] for i in range(0, len(rest), TOGETHER)),
    ]:
        _in_child(group)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
