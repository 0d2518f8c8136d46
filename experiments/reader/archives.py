"""Zip archives and streams around a pickle: as PyTorch writes them, or with one part that says
something else."""

import random
import struct
import zlib
from typing import Any, NamedTuple

from experiments.reader import pickles

MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


class Member(NamedTuple):
    """One member, and what its two headers say where that is not the truth.

    Attributes:
      local, listed: field -> value, of its own header and of the directory.
      gap: bytes before it.
      stated: how sizes stand in its own header: "sizes", or "later" with a descriptor behind it.
    """

    name: bytes
    data: bytes
    packed: bool = False
    local: dict[str, Any] = {}  # noqa: RUF012 (read only)
    listed: dict[str, Any] = {}  # noqa: RUF012
    gap: bytes = b""
    stated: str = "later"
    step: int = 64
    extra: bytes | None = None


def zip_file(
    members: list[Member], *, order=None, zip64=True, end: dict[str, Any] | None = None
) -> bytes:
    """The archive, its directory in `order` (indices) and with the end record's fields in `end`."""
    body, lines = b"", []
    for member in members:
        body += member.gap
        header, listed = _member(member, len(body))
        body += header
        lines.append(listed)
    table = b"".join(lines[index] for index in (order or range(len(lines))))
    count = len(order) if order else len(lines)
    facts = {"count": count, "size": len(table), "start": len(body), "comment": b"", **(end or {})}
    out = body + table
    figures = (facts["count"], facts["size"], facts["start"])
    if zip64:
        record = facts.get("record", (figures[0], *figures))
        out += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 798, 45, 0, 0, *record)
        out += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body) + len(table), 1)
    here = facts.get("here", figures[0])
    out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, here, *figures, len(facts["comment"]))
    return out + facts["comment"]


def _member(member: Member, at: int) -> tuple[bytes, bytes]:
    """The member as it lies, and its line of the directory."""
    held = zlib.compress(member.data, 9)[2:-4] if member.packed else member.data
    later = member.stated == "later" and member.data != b""
    truth = {
        "flags": 0x808 if later else 0x800,
        "method": 8 if member.packed else 0,
        "crc": zlib.crc32(member.data),
        "packed": len(held),
        "size": len(member.data),
        "name": member.name,
    }
    local = {**truth, **({"crc": 0, "packed": 0, "size": 0} if later else {}), **member.local}
    listed = {**truth, "at": at, "extra": b"", "attributes": 0, **member.listed}
    extra = member.extra
    if extra is None:
        filling = -(at + 34 + len(local["name"])) % member.step
        extra = b"FB" + struct.pack("<H", filling) + b"Z" * filling
    fields = lambda f: (f["flags"], f["method"], 0, 0, f["crc"], f["packed"], f["size"])
    header = struct.pack("<4sH4H3I2H", b"PK\3\4", 0, *fields(local), len(local["name"]), len(extra))
    header += local["name"] + extra + held
    if later and local["flags"] & 8:
        header += b"PK\x07\x08" + struct.pack("<3I", truth["crc"], len(held), len(member.data))
    sizes = (len(listed["name"]), len(listed["extra"]), 0, 0, 0, listed["attributes"])
    line = struct.pack("<4s2H4H3I5H2I", b"PK\1\2", 0, 0, *fields(listed), *sizes, listed["at"])
    return header, line + listed["name"] + listed["extra"]


def members(rng: random.Random, state: pickles.State) -> list[Member]:
    """The members as one of PyTorch's versions writes them."""
    stated = rng.choice(("later", "later", "sizes"))
    root = rng.choice((b"archive/", b"archive/", b"model/", b"M\xc3\xbc/"))
    made = [(b"data.pkl", state.pickled)]
    if rng.random() < 0.5:
        made += [(b".format_version", b"1"), (b".storage_alignment", b"64")]
    made += [(b"byteorder", b"little")] if rng.random() < 0.8 else []
    made += [
        (b"data/" + key.encode("utf-8", "replace"), held) for key, held in state.storages.items()
    ]
    made += [(b"version", b"3\n"), (b".data/serialization_id", b"0" * 40)]
    return [Member(root + name, data, stated=stated) for name, data in made]


NAMES = (
    b"ByteOrder",
    b"BYTEORDER",
    b"byteorder",
    b"version",
    b"Version",
    b".data/version",
    b"data.pkl",
    b"Data.pkl",
    b"data/0",
    b"DATA/0",
    b"data/1",
    b".format_version",
    b".storage_alignment",
    b"constants.pkl",
    b"code/x.py",
    b".debug_pkl",
    b"x",
    b"data/",
    b"",
    b"data/../data/0",
    b"a\\b",
)
CONTENTS = (b"big", b"little", b"3\n", b"1", b"0", b"11", b"64", b"4", b"", b"x" * 24, b"Big")


def changed(rng: random.Random, members: list[Member]) -> bytes:
    """The archive of `members` with one or two things that are not as PyTorch writes them."""
    members, how = list(members), {}
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(members))
        root = members[0].name.partition(b"/")[0] + b"/"
        member = members[at]
        kind = rng.choice(CHANGES)
        if kind == "add":
            folder = rng.choice((root, root, root, root.upper(), b"other/", b"", b"../"))
            members.insert(
                rng.randint(0, len(members)),
                Member(folder + rng.choice(NAMES), rng.choice(CONTENTS), stated=member.stated),
            )
        elif kind == "rename":
            members[at] = member._replace(
                name=rng.choice(
                    (
                        root + rng.choice(NAMES),
                        member.name.upper(),
                        member.name + b"\0",
                        member.name[1:],
                    )
                )
            )
        elif kind == "remove":
            del members[at]
        elif kind == "content":
            members[at] = member._replace(data=rng.choice(CONTENTS))
        elif kind == "pack":
            members[at] = member._replace(packed=True)
        elif kind in ("local", "listed"):
            members[at] = member._replace(**{kind: _lie(rng, member, members)})
        elif kind == "gap":
            members[at] = member._replace(gap=rng.choice((b"\0", b"PK\3\4", b"x" * 64)))
        elif kind == "step":
            members = [one._replace(step=rng.choice((1, 2, 4, 8, 16, 32, 128))) for one in members]
        elif kind == "extra":
            members[at] = member._replace(extra=_extra(rng))
        elif kind == "stated":
            members[at] = member._replace(stated="sizes" if member.stated == "later" else "later")
        elif kind == "order":
            how["order"] = rng.sample(range(len(members)), len(members))
        elif kind == "shuffle":
            rng.shuffle(members)
        elif kind == "zip64":
            how["zip64"] = False
        elif kind == "end":
            how["end"] = {
                rng.choice(("count", "size", "start", "here")): rng.choice((0, 1, 5, 100, 0xFFFF))
            }
        elif kind == "record":
            how["end"] = {"record": tuple(rng.choice((0, 1, 3, 8, 400)) for _ in range(4))}
        elif kind == "comment":
            how["end"] = {"comment": rng.choice((b"x", b"PK\5\6" + bytes(18)))}
        if not members:
            break
    how["order"] = [i for i in how.get("order", []) if i < len(members)] or None
    data = zip_file(members, **how)
    ends = rng.random()
    if ends < 0.02:
        return data + data
    if ends < 0.04:
        return data + rng.choice((b"\0", b"PK\5\6" + bytes(18)))
    return rng.choice((b"\0", b"PK\3\4", data[:64])) + data if ends < 0.06 else data


CHANGES = (
    "add",
    "add",
    "rename",
    "remove",
    "content",
    "pack",
    "local",
    "listed",
    "gap",
    "step",
    "extra",
    "stated",
    "order",
    "shuffle",
    "zip64",
    "end",
    "record",
    "comment",
)


def _lie(rng: random.Random, member: Member, members: list[Member]) -> dict[str, Any]:
    """One field of a header with another value."""
    other = rng.choice(members)
    return rng.choice(
        (
            {"flags": rng.choice((0, 1, 8, 0x800, 0x809, 0x40, 0x2000, 6))},
            {"method": rng.choice((8, 99, 12))},
            {"crc": zlib.crc32(other.data)},
            {"size": rng.choice((0, 4, len(other.data), 0xFFFFFFFF))},
            {"packed": rng.choice((0, 4, len(other.data), 0xFFFFFFFF))},
            {"packed": len(other.data), "size": len(other.data)},
            {"name": other.name},
            {"name": member.name.upper()},
            {"at": rng.choice((0, 64, 0xFFFFFFFF))},
            {"extra": _extra(rng)},
            {"attributes": rng.choice((0x10, 1, 0o40755 << 16, 0o100644 << 16, 0o120777 << 16))},
        )
    )


def _extra(rng: random.Random) -> bytes:
    """An extra field: filling, sizes anew (zip64), another name (Info-ZIP), or a damaged one."""
    return rng.choice(
        (
            b"",
            b"FB\0\0",
            b"FB\x04\0ZZZZ",
            b"\x01\0\x10\0" + struct.pack("<2Q", 4, 4),
            b"\x01\0\x18\0" + struct.pack("<3Q", 4, 4, 64),
            b"\x75\x70\x09\0\x01" + bytes(8),
            b"FB\xff\xff",
            b"F",
        )
    )


def stream(rng: random.Random, state: pickles.State, sizes: dict[str, int]) -> bytes:
    """A file as torch.save wrote it before 1.6, now and then with one part that is not so.

    Args:
      sizes: elements of each storage.
    """
    odd = rng.random() < 0.4 and rng.choice(
        ("magic", "protocol", "system", "keys", "count", "tail", "twice")
    )
    program = lambda body: b"\x80\x02" + body + b"."
    keys = list(state.storages)
    if odd == "keys":
        keys = rng.choice((keys[::-1], keys[1:], [*keys, "9"], keys + keys[:1]))
    endian = rng.choice((b"\x89", b"N", b"K\x01")) if odd == "system" else b"\x88"
    system = pickles.table((pickles.text("little_endian"), endian))
    parts = [
        program(b"\x8a\x0a" + (MAGIC[::-1] if odd == "magic" else MAGIC)),
        program(pickles.number(1002 if odd == "protocol" else 1001)),
        program(system),
        state.pickled,
        program(b"](" + b"".join(map(pickles.text, keys)) + b"e"),
    ]
    if odd == "twice":
        parts.insert(rng.randrange(5), rng.choice(parts))
    for key in keys:
        held = state.storages.get(key, b"")
        count = sizes.get(key, 0) + (rng.choice((-1, 1, 2**40)) if odd == "count" else 0)
        parts.append(struct.pack("<q", count) + held)
    return b"".join(parts) + (rng.choice((b"x", b"\0" * 512)) if odd == "tail" else b"")
