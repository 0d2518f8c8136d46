"""Locates the central directory of a zip archive.

Zip readers search for the directory in different ways, so a crafted archive can show each of them a
different one. An archive in which that is possible is refused.
"""

import struct

from jaxbd.limits import BinaryFile, Refusal, read_exactly

TOO_LARGE = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
"""Values that the old end record holds for figures too large for its fields: members, bytes,
offset."""


def end_record(file: BinaryFile, file_size: int) -> tuple[int, int, int]:
    """(members, bytes, offset) of the directory, which must end where the end records begin.

    Raises: Refusal when readers could look for the directory in more than one place.
    """
    if file_size < 22:
        raise Refusal("the zip archive is cut off")
    # archive comments are refused, so the end record is in a fixed place
    end = file_size - 22
    signature, *disks, here, count, size, start, comment = struct.unpack(
        "<4s4H2IH", read_exactly(file, end, 22, "zip")
    )
    if signature != b"PK\x05\x06" or comment or any(disks) or here != count:
        raise Refusal("the zip archive is cut off or has something after its end")
    records = end
    if end >= 20 and read_exactly(file, end - 20, 4, "zip") == b"PK\x06\x07":
        records, (count, size, start) = _zip64(file, end - 20, (count, size, start))
    if start + size != records:
        raise Refusal("the archive's directory is not where it should be")
    return count, size, start


def _zip64(
    file: BinaryFile, locator: int, stated: tuple[int, int, int]
) -> tuple[int, tuple[int, int, int]]:
    """The zip64 record's offset and its (members, bytes, offset), which must repeat `stated`:
    readers differ in which of the two records they trust."""
    _, disk, record, disks = struct.unpack("<4sIQI", read_exactly(file, locator, 20, "zip"))
    if record + 56 != locator or disk or disks != 1:
        raise Refusal("the archive's end records are not where they should be")
    fields = struct.unpack("<4sQ2H2I4Q", read_exactly(file, record, 56, "zip"))
    signature, length, disks, facts = fields[0], fields[1], fields[4:6], fields[7:10]
    if signature != b"PK\x06\x06" or length != 44 or disks != (0, 0) or fields[6] != facts[0]:
        raise Refusal("the archive's end records contradict each other")
    # above 4 GB the old record may hold the placeholder for "too large" instead of the figure
    figures = zip(stated, facts, TOO_LARGE if record > TOO_LARGE[1] else facts, strict=True)
    if any(figure not in (fact, special) for figure, fact, special in figures):
        raise Refusal("the archive's end records contradict each other")
    return record, facts
