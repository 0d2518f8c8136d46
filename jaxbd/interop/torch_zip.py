"""PyTorch's zip format (1.6 and later): `NAME/data.pkl` describes the tensors, `NAME/data/KEY`
holds the storages.

The archive is parsed here instead of with `zipfile`, which is lenient when a file contradicts
itself. PyTorch's own reader is lenient too: it ignores the case of member names, takes the first of
two duplicates, verifies no checksums, and with `mmap=True` uses the raw bytes in the file. To make
all readers agree, only archives in the layout of `torch.save` are read: known member names in one
folder, stored without compression, one after the other from the first byte up to the directory.
"""

import re
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from jaxbd import zips
from jaxbd.interop.allowed import Storage
from jaxbd.interop.unpickle import Machine
from jaxbd.limits import BinaryFile, Limits, Refusal, quote, read_exactly

MAGIC = b"PK\x03\x04"
DESCRIPTOR = b"PK\x07\x08"
HAS_DESCRIPTOR, IS_UTF8 = 0x8, 0x800
"""The only flags that `torch.save` sets."""
PERMISSIONS = 0o100777 << 16
"""Attributes of a member that have no effect: the Unix mode of a regular file."""
FACTS = {
    "version": rb"([1-9]|10)\n?",
    ".data/version": rb"([1-9]|10)\n?",
    "byteorder": rb"little|big",
    ".format_version": rb"[0-9]{1,4}",
    ".storage_alignment": rb"[1-9][0-9]{0,6}",
    ".data/serialization_id": rb"[0-9]{0,64}",
}
"""Name of a member other than the pickle and the storages -> pattern for its contents."""
ALIGNMENT = 64


class Member(NamedTuple):
    """One member of the archive: offsets of its header and its data, its size and checksum."""

    header: int
    offset: int
    size: int
    crc: int


def read(file: BinaryFile, file_size: int, limits: Limits) -> tuple[Any, "Loader"]:
    """The pickled value, with `Tensor`s in it, and a loader for their storages."""
    members = directory(file, file_size, limits)
    _check_names(members)
    root = next(iter(members)).partition("/")[0]
    facts = _facts(file, members, root)
    pickled = unpack(file, members, f"{root}/data.pkl", limits.pickle_bytes)
    machine = Machine(bytes(pickled), 0, limits)
    value = machine.run()
    if machine.position != len(machine.data):
        raise Refusal("bytes follow the end of the pickle")
    loader = Loader(file, members, root)
    for storage in machine.storages.values():
        loader.check(storage)
    if ".format_version" in facts:
        _check_calculated(loader, list(machine.storages), int(facts.get(".storage_alignment", 64)))
    return value, loader


class Loader(NamedTuple):
    """Loads storages of one archive by key."""

    file: BinaryFile
    members: dict[str, Member]
    root: str

    def check(self, storage: Storage) -> None:
        """Raises Refusal unless the storage has as many bytes as the pickle describes."""
        member = self.members.get(f"{self.root}/data/{storage.key}")
        size = storage.numel * storage.dtype.itemsize
        if member is None:
            raise Refusal(f"storage {quote(storage.key)} is not in the archive")
        if member.size != size:
            raise Refusal(
                f"storage {quote(storage.key)} has {member.size} bytes where {size} are described"
            )

    def __call__(self, key: str, size: int) -> np.ndarray:
        """The storage `key` as uint8 [size]."""
        return np.frombuffer(
            unpack(self.file, self.members, f"{self.root}/data/{key}", size), np.uint8
        )


def unpack(file: BinaryFile, members: dict[str, Member], name: str, most: int) -> bytearray:
    """Reads the member `name` of at most `most` bytes and verifies its checksum."""
    member = members[name]
    if member.size > most:
        raise Refusal(f"member {quote(name)} has {member.size:,} bytes; the limit is {most:,}")
    data = bytearray(member.size)
    file.seek(member.offset)
    if file.readinto(data) != member.size:
        raise Refusal(f"it ends in the middle of member {quote(name)}")
    if zlib.crc32(data) != member.crc:
        raise Refusal(f"member {quote(name)} is damaged: its checksum does not match")
    return data


def directory(file: BinaryFile, file_size: int, limits: Limits) -> dict[str, Member]:
    """The archive's members by name, in file order; there is at least one. Raises Refusal on
    anything that two readers could understand differently."""
    count, size, start = zips.end_record(file, file_size)
    if size > limits.header_bytes or count > limits.entries:
        raise Refusal(
            f"the archive's directory has {count:,} members in {size:,} bytes, more than the limit"
        )
    table, position = read_exactly(file, start, size, "the archive's directory"), 0
    members: dict[str, Member] = {}
    seen: set[str] = set()
    lies_at, deadline = 0, limits.deadline("the archive's directory", size)
    for _ in range(count):
        deadline.check()
        entry, position = _entry(table, position)
        if entry.name.lower() in seen:
            # in lower case, since PyTorch ignores case when it looks up members
            raise Refusal(f"the archive holds member {quote(entry.name)} twice")
        seen.add(entry.name.lower())
        if entry.header != lies_at:
            raise Refusal(f"member {quote(entry.name)} does not follow the one listed before it")
        members[entry.name], lies_at = _locate(file, entry)
    if position != size:
        raise Refusal("the archive's directory does not have the size it states")
    if lies_at != start or not members:
        raise Refusal("something lies between the archive's last member and its directory")
    return members


class _Entry(NamedTuple):
    """One entry of the directory."""

    name: str
    flags: int
    method: int
    crc: int
    size: int
    header: int


def _entry(table: bytes, position: int) -> tuple[_Entry, int]:
    """The entry at `position`, and the position of the next one."""
    if len(table) - position < 46:
        raise Refusal("the archive's directory is cut off")
    fields = struct.unpack_from("<4s6H3I5H2I", table, position)
    signature, flags, method, crc, packed, unpacked = fields[0], *fields[3:5], *fields[7:10]
    name_size, extra, comment, disk, _, attributes, header = fields[10:17]
    if signature != b"PK\x01\x02":
        raise Refusal("the archive's directory is damaged")
    name = _safe_name(table[position + 46 : position + 46 + name_size])
    if flags & ~(HAS_DESCRIPTOR | IS_UTF8):
        raise Refusal(f"member {quote(name)} is encrypted or otherwise not as torch.save writes it")
    if method or packed != unpacked:
        raise Refusal(
            f"member {quote(name)} is compressed, and PyTorch can read such a file in two different"
            " ways; save the weights again with torch.save"
        )
    # a placeholder: the real figure would be in a zip64 field
    if 0xFFFFFFFF in (packed, header):
        raise Refusal(f"member {quote(name)} is larger than 4 GB")
    begin = position + 46 + name_size
    # the low bits are MS-DOS attributes, and 16 marks a folder: PyTorch then returns whatever is in
    # memory as the member's contents
    if attributes & ~PERMISSIONS:
        raise Refusal(f"member {quote(name)} is not marked as a plain file")
    if comment or disk or not _is_padding(table[begin : begin + extra]):
        raise Refusal(f"member {quote(name)} carries fields that torch.save does not write")
    return _Entry(name, flags, method, crc, unpacked, header), begin + extra


def _is_padding(extra: bytes) -> bool:
    """Whether an extra field is only torch.save's padding. Other fields can override sizes or
    names."""
    return not extra or (len(extra) >= 4 and extra[:4] == b"FB" + struct.pack("<H", len(extra) - 4))


def _locate(file: BinaryFile, entry: _Entry) -> tuple[Member, int]:
    """The member of a directory entry, and the offset where the next one begins. Raises Refusal
    unless the member's own header agrees with the directory."""
    twofold = Refusal(f"member {quote(entry.name)} is described in two different ways")
    raw = entry.name.encode()
    head = read_exactly(file, entry.header, 30 + len(raw), "a member's header")
    fields = struct.unpack_from("<4s5H3I2H", head)
    stated = (entry.crc, entry.size, entry.size)
    # with a descriptor, size and checksum may follow the data and be zero in the header
    later = entry.flags & HAS_DESCRIPTOR and fields[6:9] == (0, 0, 0)
    if fields[0] != MAGIC or fields[2:4] != (entry.flags, entry.method) or head[30:] != raw:
        raise twofold
    if fields[9] != len(raw) or not (later or fields[6:9] == stated):
        raise twofold
    if not _is_padding(read_exactly(file, entry.header + len(head), fields[10], "a header")):
        raise Refusal(f"member {quote(entry.name)} carries fields that torch.save does not write")
    offset = entry.header + len(head) + fields[10]
    end = offset + entry.size
    if entry.flags & HAS_DESCRIPTOR:
        if read_exactly(file, end, 16, "a member") != DESCRIPTOR + struct.pack("<3I", *stated):
            raise twofold
        end += 16
    return Member(entry.header, offset, entry.size, entry.crc), end


def _safe_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("a member's name is not UTF-8") from None
    parts = name.split("/")
    if (
        not name.isprintable()
        or len(name) > 256
        or "\\" in name
        or ":" in name
        or {"", ".", ".."} & set(parts)
    ):
        raise Refusal(f"the archive holds a member named {quote(name)}")
    return name


def _check_names(members: dict[str, Member]) -> None:
    """Raises Refusal unless all names are ones that torch.save writes, in one folder: readers may
    resolve other names differently."""
    names = [name.partition("/") for name in members]
    inside = [inner for _, _, inner in names]
    if any(name.startswith("code/") or name == "constants.pkl" for name in inside):
        raise Refusal("it is a TorchScript program; save model.state_dict() instead")
    if "data.pkl" not in inside or len({folder for folder, _, _ in names}) != 1:
        raise Refusal(
            "the zip archive is not one that torch.save wrote (it needs exactly one NAME/data.pkl,"
            " and everything under NAME)"
        )
    for name in inside:
        if name not in FACTS and name != "data.pkl" and not re.fullmatch(r"data/[^/]+", name):
            raise Refusal(
                f"the archive holds a member {quote(name)}, which torch.save never writes"
            )


def _facts(file: BinaryFile, members: dict[str, Member], root: str) -> dict[str, bytes]:
    """Contents of the members in `FACTS`. Raises Refusal if PyTorch would refuse the file, or would
    swap the byte order of its numbers."""
    facts = {}
    for name, form in FACTS.items():
        if f"{root}/{name}" in members:
            facts[name] = bytes(unpack(file, members, f"{root}/{name}", 64))
            if not re.fullmatch(form, facts[name]):
                raise Refusal(f"its member {quote(name)} holds {quote(facts[name])}")
    if not {"version", ".data/version"} & facts.keys():
        raise Refusal("its member 'version' is missing, without which PyTorch does not read it")
    if facts.get("byteorder") == b"big":
        raise Refusal("it was written in big-endian byte order, which is not supported")
    step = int(facts.get(".storage_alignment", ALIGNMENT))
    if step < 8 or step & (step - 1):
        raise Refusal(f"its storages are aligned to {step} bytes, not a power of two from 8 on")
    for name, member in members.items():
        if name.startswith(f"{root}/data/") and member.offset % step:
            raise Refusal(
                f"member {quote(name)} does not begin at a multiple of {step} bytes, as torch.save"
                " lays storages out; save the weights again with torch.save"
            )
    return facts


def _check_calculated(loader: Loader, keys: list[str], step: int) -> None:
    """Raises Refusal unless the storages have the offsets that PyTorch would calculate.

    PyTorch can calculate the offsets instead of looking them up
    (`torch.utils.serialization.config.load.calculate_storage_offsets`); both must agree.

    Args:
      keys: keys of the storages, in the order in which the pickle refers to them.
    """
    cursor = None
    for key in keys:
        name = f"{loader.root}/data/{key}"
        member = loader.members[name]
        if cursor is not None:
            # local header of 30 bytes, the name, and a padding field of at least 4 bytes
            least = cursor + 30 + len(name.encode()) + 4
            if member.offset != least + -least % step:
                raise Refusal(f"storage {quote(key)} is not at the offset that its order implies")
        cursor = member.offset + member.size + (16 if member.size else 0)
