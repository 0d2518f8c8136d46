"""Limits shared by every reader of files, models and data alike, and the text and files that pass
them.

A reader opens files with `opened`, compares every size a file claims with `Limits` before it
allocates, and raises `Refusal`. Text from a file reaches a terminal, JSON or HTML through
`clean_text`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import reprlib
import stat
import time
import unicodedata
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxbd.base import UserError

BinaryFile = io.BufferedReader | io.BytesIO
"""A file on disk or in memory, open for reading."""


BYTES_PER_SECOND = 100 << 20
"""What reading, unpacking and hashing get through on any machine, in a second of a processor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may cost to read. Everything above is refused before memory is allocated for it.

    Attributes:
      file_bytes: size of the whole file or folder.
      tensors: tensors in one model file.
      entries: members of an archive, files in a folder.
      values: values of a pickle visited beside the tensors.
      depth: nesting of dictionaries, lists, tuples and JSON.
      pickle_bytes: size of the pickled description (never the weights).
      header_bytes: size of a JSON header or an archive's directory.
      instructions: pickle instructions, and items moved by them.
      integer_keys: dictionary entries keyed by a large number, which can be made to collide; more
        are dropped.
      expansion: unpacked bytes, or bytes of all tensors that share storage, per byte of the file.
      free_bytes: unpacked bytes that are allowed whatever the file's size.
      image_bytes: size of one encoded image.
      image_pixels: height times width of one image, compared before it is decoded.
      images: images in one data set.
      data_bytes: all images of a data set together, encoded or decoded.
      seconds: processor time for one image, table or description, beyond what its size explains
        (`deadline`).
    """

    file_bytes: int = 4 << 30
    tensors: int = 10_000
    entries: int = 100_000
    values: int = 300_000
    depth: int = 32
    pickle_bytes: int = 32 << 20
    header_bytes: int = 2 << 20
    instructions: int = 800_000
    integer_keys: int = 4_096
    expansion: int = 8
    free_bytes: int = 64 << 20
    image_bytes: int = 64 << 20
    image_pixels: int = 40_000_000
    images: int = 10_000_000
    data_bytes: int = 8 << 30
    seconds: float = 1.5

    def unpacked(self, file_size: int) -> int:
        """Bytes that a file of `file_size` bytes may become in memory."""
        return max(self.free_bytes, self.expansion * file_size)

    def deadline(self, what: str, size: int = 0) -> "Deadline":
        """For work on `what` that also reads `size` bytes."""
        return Deadline(self.seconds + size / BYTES_PER_SECOND, what)


class Refusal(Exception):
    """A file is not what it should be. The message says why; the caller adds the file's name
    (`refusing`)."""


# text


def clean_text(text: str, most: int | None = None, allow: str = "") -> str:
    """Text from a file as it may be printed, or written to JSON or HTML.

    Whatever is not printable becomes an escape such as `\\x1b`: control characters of C0 and C1
    (carriage returns and line ends among them), controls of the writing direction, invisible and
    unassigned characters, halves of surrogate pairs. Spaces of every width stay.

    Args:
      most: longest text that is returned whole; of a longer one the end is cut off.
      allow: control characters that stay, e.g. line ends of a text of several lines.
    """
    if most is not None and len(text) > most:
        text = text[: max(most - 1, 0)] + "…"
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) or c in allow else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def clean_tree(value: Any) -> Any:
    """A copy of JSON values in which every text, keys included, went through `clean_text`."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_tree(key): clean_tree(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean_tree(entry) for entry in value]
    return value


def quote(text: object) -> str:
    """Text from a file for an error message: ASCII, in quotes, at most 80 characters."""
    shown = ascii(text[:80]) if isinstance(text, str) else clean_text(_BRIEF.repr(text))
    return shown if len(shown) <= 80 else shown[:76] + "...'"


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxtuple, _BRIEF.maxlist, _BRIEF.maxdict = 3, 8, 8, 8
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80
"""Shows a value of the file's own making in bounded time, however large or deep it is."""


# files


@contextlib.contextmanager
def refusing(path: pathlib.Path) -> Iterator[None]:
    """Turns a `Refusal` into a UserError that names the file."""
    try:
        yield
    except Refusal as error:
        raise UserError(f"{clean_text(path.name)}: refused, {error}") from None
    except OSError as error:
        why = clean_text(str(error.strerror or error))
        raise UserError(f"{clean_text(path.name)}: cannot be read or written: {why}") from None


def check_regular(path: pathlib.Path) -> os.stat_result:
    """Facts on a regular file. Raises Refusal for folders, pipes, devices and sockets, which may
    never end, and UserError where there is nothing."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{clean_text(str(path))}: no such file or folder") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{clean_text(str(path))}: not a name of a file") from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise Refusal(f"it is {what}, not a regular file")
    return found


@contextlib.contextmanager
def opened(
    path: pathlib.Path, limits: Limits, most: int | None = None
) -> Iterator[tuple[io.BufferedReader, int]]:
    """A regular file, opened for reading, and its size in bytes.

    Pipes, devices and sockets are never waited for. A file that is larger than `most` (by default
    `limits.file_bytes`), empty, or mostly hollow is refused before it is read.

    Raises: Refusal; UserError when there is no such file.
    """
    check_regular(path)
    # no waiting, even where the file was replaced by a pipe since it was looked at
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Refusal("it is not a regular file")
        most = limits.file_bytes if most is None else most
        if found.st_size == 0:
            raise Refusal("it is empty")
        if found.st_size > most:
            raise Refusal(f"it has {found.st_size:,} bytes; the limit is {most:,}")
        check_filled(file, found.st_size, limits)
        yield file, found.st_size


def check_filled(file: BinaryIO, size: int, limits: Limits) -> None:
    """Raises Refusal for a large file of which nearly nothing is stored: a few bytes on disk would
    take gigabytes of memory."""
    if size <= limits.free_bytes or not hasattr(os, "SEEK_DATA"):
        return
    stored = _count_stored(file.fileno(), size, size // limits.expansion)
    file.seek(0)
    if stored * limits.expansion < size:
        raise Refusal(
            f"it is hollow: of its {size:,} bytes {stored:,} are stored, the rest was never written"
        )


def _count_stored(file: int, size: int, enough: int) -> int:
    """Bytes of the file outside its holes, counted until they are `enough`, over 4,096 pieces at
    most."""
    position = stored = 0
    for _ in range(4096):
        if position >= size or stored > enough:
            return stored
        try:
            begin = os.lseek(file, position, os.SEEK_DATA)
            position = os.lseek(file, begin, os.SEEK_HOLE)
        except OSError:  # no more data
            return stored
        stored += position - begin
    return stored


def read_bounded(path: pathlib.Path, limits: Limits, most: int) -> bytes:
    """A whole regular file of at most `most` bytes. Raises: as `opened`."""
    with opened(path, limits, most) as (file, size):
        return read_exactly(file, 0, size, "the file")


def read_exactly(file: BinaryIO, offset: int, count: int, what: str) -> bytes:
    """`count` bytes from `offset`; a file that ends before is refused, naming `what` was expected
    there."""
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise Refusal(f"it ends in the middle of {what}")
    return data


def walk(folder: pathlib.Path, limits: Limits) -> list[pathlib.Path]:
    """Every regular file below `folder`, in order of their paths.

    Raises: Refusal for links, pipes, devices and sockets, by name, for more than `limits.entries`
      entries, and for folders nested more than `limits.depth` deep.
    """
    found, waiting, count = [], [(folder, 0)], 0
    deadline = limits.deadline("the folder")
    while waiting:
        inside, depth = waiting.pop()
        if depth > limits.depth:
            raise Refusal(f"its folders are nested more than {limits.depth} deep")
        with os.scandir(inside) as entries:
            for entry in entries:
                count += 1
                deadline.check()
                if count > limits.entries:
                    raise Refusal(f"the folder holds more than {limits.entries:,} files")
                path = inside / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((path, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
                else:
                    what = "a link" if entry.is_symlink() else "a pipe, device or socket"
                    name = quote(path.relative_to(folder).as_posix())
                    raise Refusal(f"the folder holds {what}, {name}; give one of plain files")
    return sorted(found)


def sha256(file: BinaryIO) -> str:
    """Hexadecimal SHA-256 of the whole file, read in pieces."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


# descriptions


def parse_json(text: bytes, what: str, limits: Limits = Limits()) -> Any:
    """JSON that every reader understands alike: UTF-8, no name twice, finite numbers, bounded
    nesting.

    Args:
      what: how messages call the text, e.g. "config.json".
    Raises: Refusal.
    """
    if len(text) > limits.header_bytes:
        raise Refusal(f"{what} has {len(text):,} bytes; the limit is {limits.header_bytes:,}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, what),
            parse_constant=lambda name: _finite(name, what),
            parse_float=lambda number: _finite(number, what),
            parse_int=lambda number: -0.0 if number == "-0" else int(number),
        )
        if b"\\u" in text:  # half a surrogate pair can be spelt, but is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Refusal(f"{what} is not valid JSON") from None
    _check_depth(value, what, limits.depth)
    return value


def _check_depth(value: Any, what: str, most: int) -> None:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise Refusal(f"{what} is nested more than {most} deep")


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise Refusal(f"{what} names {quote(name)} twice")
        table[name] = value
    return table


def _finite(number: str, what: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise Refusal(f"{what} holds the number {quote(number)}, which is not finite")
    return value


# time


class Deadline:
    """A time after which reading is given up: `deadline.check()` between pieces of work.

    It is time of the processor that this thread used, so that a busy machine refuses nothing that
    an idle one reads.
    """

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what = seconds, what
        self._start = time.thread_time()

    def used(self) -> float:
        """Seconds that this thread has worked since."""
        return time.thread_time() - self._start

    def check(self) -> None:
        """Raises Refusal once the time is over."""
        if self.used() > self.seconds:
            raise Refusal(f"{self.what} takes more than {self.seconds:.3g} seconds")


class _Watched(io.RawIOBase):
    """A file each of whose pieces is read before a deadline."""

    def __init__(self, file: BinaryIO, deadline: Deadline):
        self._file, self._deadline = file, deadline

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        self._deadline.check()
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def watched(file: BinaryIO, deadline: Deadline) -> io.BufferedReader:
    """`file` for a library that reads it in a loop of its own: once the time is over, the next read
    raises Refusal."""
    return io.BufferedReader(_Watched(file, deadline))
