"""PyTorch's zip format (1.6 and later): `NAME/data.pkl` describes, `NAME/data/KEY` holds the storages.

The archive is parsed here rather than by `zipfile`, which reads a directory of any size and takes the lenient way
where a file says two things. Members are found by exact name in a table; no name ever becomes a path on disk.
"""

import struct
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxbd.interop.files import Limits, Refusal, quote, read_exactly
from jaxbd.interop.unpickle import Machine

MAGIC = b"PK\x03\x04"
STORED, DEFLATED = 0, 8


class Member(NamedTuple):
    """Where one member lies: offset of its data, bytes packed and unpacked, method, checksum."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int


def read(file: BinaryIO, file_size: int, limits: Limits) -> tuple[Any, "Loader"]:
    """The pickled value with `Tensor`s in it, and what loads their storages."""
    members = directory(file, file_size, limits)
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise Refusal("the zip archive is not one that torch.save wrote (it needs exactly one NAME/data.pkl)")
    root = roots[0]
    if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in members):
        raise Refusal("it is a TorchScript program; save model.state_dict() instead")
    if f"{root}/byteorder" in members and unpack(file, members, f"{root}/byteorder", 16) != b"little":
        raise Refusal("it was written in big-endian byte order, which is not read")
    machine = Machine(bytes(unpack(file, members, f"{root}/data.pkl", limits.pickle_bytes)), 0, limits)
    value = machine.run()
    if machine.position != len(machine.data):
        raise Refusal("bytes follow the end of the pickle")
    return value, Loader(file, members, root, limits)


class Loader(NamedTuple):
    """Loads storages of one archive by key."""

    file: BinaryIO
    members: dict[str, Member]
    root: str
    limits: Limits

    def __call__(self, key: str, size: int) -> np.ndarray:
        """The storage `key` as uint8 [size]."""
        name = f"{self.root}/data/{key}"
        if name not in self.members:
            raise Refusal(f"storage {quote(key)} is not in the archive")
        if self.members[name].size != size:
            raise Refusal(f"storage {quote(key)} has {self.members[name].size} bytes where {size} are described")
        return np.frombuffer(unpack(self.file, self.members, name, size), np.uint8)


def unpack(file: BinaryIO, members: dict[str, Member], name: str, most: int) -> bytearray:
    """Contents of member `name`, at most `most` bytes; its checksum must hold."""
    member = members[name]
    if member.size > most:
        raise Refusal(f"member {quote(name)} has {member.size:,} bytes; the limit is {most:,}")
    data = bytearray(member.packed)
    file.seek(member.offset)
    if file.readinto(data) != member.packed:
        raise Refusal(f"it ends in the middle of member {quote(name)}")
    if member.method == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # one byte more than announced is enough to notice a lie, and nothing beyond it is ever unpacked
            data = bytearray(inflater.decompress(data, member.size + 1))
        except zlib.error:
            raise Refusal(f"member {quote(name)} cannot be unpacked") from None
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise Refusal(f"member {quote(name)} is damaged: its size or checksum does not match")
    return data


def directory(file: BinaryIO, file_size: int, limits: Limits) -> dict[str, Member]:
    """Members by name. Raises Refusal on anything that two readers could understand differently."""
    count, size, start = _end_record(file, file_size)
    if size > limits.header_bytes or count > limits.entries:
        raise Refusal(f"the archive's directory has {count:,} members in {size:,} bytes, more than is read")
    table, position = read_exactly(file, start, size, "the archive's directory"), 0
    members: dict[str, Member] = {}
    spans = []
    for _ in range(count):
        if len(table) - position < 46:
            raise Refusal("the archive's directory is cut off")
        fields = struct.unpack_from("<4s6H3I5H2I", table, position)
        signature, flags, method, crc, packed, unpacked = fields[0], *fields[3:5], *fields[7:10]
        name_size, extra, comment, header = *fields[10:13], fields[16]
        if signature != b"PK\x01\x02":
            raise Refusal("the archive's directory is damaged")
        raw_name = table[position + 46 : position + 46 + name_size]
        position += 46 + name_size + extra + comment
        name = _safe_name(raw_name)
        if flags & 0x2041:
            raise Refusal(f"member {quote(name)} is encrypted")
        if method not in (STORED, DEFLATED) or (method == STORED and packed != unpacked):
            raise Refusal(f"member {quote(name)} is packed in a way that is not read")
        if 0xFFFFFFFF in (packed, unpacked, header):
            raise Refusal(f"member {quote(name)} is larger than 4 GB")
        if name.lower() in members:
            raise Refusal(f"the archive holds member {quote(name)} twice")
        offset = _data_offset(file, header, raw_name, method)
        members[name.lower()] = Member(offset, packed, unpacked, method, crc)
        spans.append((header, offset + packed, name))
    if position != size:
        raise Refusal("the archive's directory does not have the size it states")
    _check_spans(sorted(spans), start)
    total = sum(member.size for member in members.values())
    if total > limits.unpacked(file_size):
        raise Refusal(f"the archive of {file_size:,} bytes unpacks to {total:,}")
    # compared in lower case above because PyTorch's own reader finds members without regard to case
    return {name: members[name.lower()] for _, _, name in spans}


def _end_record(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """(members, bytes, offset) of the directory, which must end where the end records begin."""
    if file_size < 22:
        raise Refusal("the zip archive is cut off")
    end = file_size - 22
    signature, *disks, here, count, size, start, comment = struct.unpack("<4s4H2IH", read_exactly(file, end, 22, "zip"))
    if signature != b"PK\x05\x06" or comment or any(disks) or here != count:
        raise Refusal("the zip archive is cut off or has something after its end")
    records = end
    if end >= 20 and read_exactly(file, end - 20, 4, "zip") == b"PK\x06\x07":
        records = _check_zip64(file, end - 20, (count, size, start))
    if start + size != records:
        raise Refusal("the archive's directory is not where it should be")
    return count, size, start


def _check_zip64(file: BinaryIO, locator: int, stated: tuple[int, int, int]) -> int:
    """Offset of the zip64 record, whose figures must repeat `stated`: readers differ in which of the two they trust."""
    _, _, record, _ = struct.unpack("<4sIQI", read_exactly(file, locator, 20, "zip"))
    if record + 56 != locator:
        raise Refusal("the archive's end records are not where they should be")
    fields = struct.unpack("<4sQ2H2I4Q", read_exactly(file, record, 56, "zip"))
    if fields[0] != b"PK\x06\x06" or fields[1] != 44 or fields[6:10] != (stated[0], *stated):
        raise Refusal("the archive's end records contradict each other")
    return record


def _safe_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("a member's name is not UTF-8") from None
    parts = name.split("/")
    if not name.isprintable() or len(name) > 256 or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
        raise Refusal(f"the archive holds a member named {quote(name)}")
    return name


def _data_offset(file: BinaryIO, header: int, name: bytes, method: int) -> int:
    """Where a member's data begins: behind its own header, which must agree with the directory."""
    fields = struct.unpack("<4s5H3I2H", read_exactly(file, header, 30, "a member's header"))
    if fields[0] != MAGIC or fields[3] != method or fields[9] != len(name):
        raise Refusal(f"member {quote(name.decode())} is described in two different ways")
    if read_exactly(file, header + 30, len(name), "a member's header") != name:
        raise Refusal(f"member {quote(name.decode())} is described in two different ways")
    return header + 30 + len(name) + fields[10]


def _check_spans(spans: list[tuple[int, int, str]], end: int) -> None:
    """Members [begin, end) in the order they lie must not overlap, nor reach into the directory."""
    for (_, stop, name), following in zip(spans, [*[begin for begin, _, _ in spans[1:]], end], strict=True):
        if stop > following:
            raise Refusal(f"member {quote(name)} overlaps what follows it")
