"""The directory of a zip archive lies in one place, whoever looks for it, or it is refused."""

import io
import struct

import pytest

from jaxbd import zips
from jaxbd.limits import Refusal

SIZE, DIRECTORY = 5 << 30, 100


class Large(io.RawIOBase):
    """A file of 5 GB that is zeros but for its end."""

    def __init__(self, end: bytes):
        self._end, self._at = end, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        begin = self._at - (SIZE - len(self._end))
        return self._end[begin : begin + size]


def ends(stated: tuple[int, int, int], facts: tuple[int, int, int]) -> bytes:
    """The three records at the end, the oldest of which says `stated`."""
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, facts[0], *facts)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, SIZE - 22 - 20 - 56, 1)
    return record + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, stated[0], *stated, 0)


FACTS = (2, DIRECTORY, SIZE - 22 - 20 - 56 - DIRECTORY)


@pytest.mark.parametrize("stated", [(2, 100, 0xFFFFFFFF), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)])
def test_figures_that_are_too_large_stand_in_the_newer_record(stated):
    assert zips.end_record(Large(ends(stated, FACTS)), SIZE) == FACTS  # pyright: ignore


def test_figures_that_differ_are_refused():
    with pytest.raises(Refusal, match="contradict each other"):
        zips.end_record(Large(ends((3, 100, 0xFFFFFFFF), FACTS)), SIZE)  # pyright: ignore


def test_a_small_archive_has_no_figures_that_are_too_large():
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, 0, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
    for stated, is_read in (
        ((0, 0, 0), True),
        ((0xFFFF, 0, 0), False),
        ((0, 0xFFFFFFFF, 0), False),
    ):
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, stated[0], *stated, 0)
        data = record + locator + end
        if is_read:
            assert zips.end_record(io.BytesIO(data), len(data)) == stated
            continue
        with pytest.raises(Refusal, match="contradict each other"):
            zips.end_record(io.BytesIO(data), len(data))
