"""Limits shared by all readers of model and data files, and safe helpers for files and text.

A reader opens files with `opened`, checks every size that a file claims against `Limits` before it
allocates memory, and raises `Refusal`. Text from a file must pass through `clean_text` before it
reaches a terminal, JSON or HTML.
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
"""Throughput, per second of CPU time, that reading, unpacking and hashing reach on any machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds on what reading a file may cost. A file that claims more is refused before any
    memory is allocated for it.

    Attributes:
      file_bytes: size of the whole file or folder.
      tensors: number of tensors in one model file.
      entries: members of an archive, or files in a folder.
      values: values visited in a pickle, not counting the tensors.
      depth: nesting of dictionaries, lists, tuples and JSON.
      pickle_bytes: size of the pickled description (never the weights).
      header_bytes: size of a JSON header or an archive's directory.
      instructions: pickle instructions, plus the items they move.
      integer_keys: dictionary entries keyed by a large integer; such keys can be chosen to collide,
        so further ones are dropped.
      expansion: unpacked bytes, or bytes of all tensors that share storage, per byte of the file.
      free_bytes: unpacked bytes allowed regardless of the file's size.
      image_bytes: size of one encoded image.
      image_pixels: height times width of one image, checked before it is decoded.
      images: number of images in one data set.
      data_bytes: total size of a data set's images, encoded or decoded.
      seconds: CPU time for one image, table or description, on top of the time its size explains
        (see `deadline`).
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
        """How many bytes a file of `file_size` bytes may unpack to in memory."""
        return max(self.free_bytes, self.expansion * file_size)

    def deadline(self, what: str, size: int = 0) -> "Deadline":
        """A `Deadline` for work on `what`, extended by the time it takes to read `size` bytes."""
        return Deadline(self.seconds + size / BYTES_PER_SECOND, what)


class Refusal(Exception):
    """Raised when a file is not what it should be. The message says why; `refusing` adds the file's
    name."""


# text


def clean_text(text: str, most: int | None = None, allow: str = "") -> str:
    """Text from a file, made safe to print or to write to JSON or HTML.

    Every character that is not printable becomes an escape like `\\x1b`: C0 and C1 control
    characters (including carriage returns and newlines), bidirectional controls, invisible and
    unassigned characters, and lone surrogates. Spaces of any width stay.

    Args:
      most: length limit in characters; longer text is truncated and ends in "…".
      allow: control characters to leave as they are, e.g. newlines in a text of several lines.
    """
    if most is not None and len(text) > most:
        text = text[: max(most - 1, 0)] + "…"
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) or c in allow else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def clean_tree(value: Any) -> Any:
    """A copy of a JSON value with `clean_text` applied to every string, keys included."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_tree(key): clean_tree(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean_tree(entry) for entry in value]
    return value


def quote(text: object) -> str:
    """Text from a file, quoted for an error message: ASCII, at most 80 characters."""
    # cut before escaping: the text may be megabytes long
    quoted = ascii(text[:80]) if isinstance(text, str) else clean_text(_BRIEF.repr(text))
    return quoted if len(quoted) <= 80 else quoted[:76] + "...'"


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxtuple, _BRIEF.maxlist, _BRIEF.maxdict = 3, 8, 8, 8
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80
"""Formats a value from a file in bounded time, no matter how large or deep it is."""


# files


@contextlib.contextmanager
def refusing(path: pathlib.Path) -> Iterator[None]:
    """Turns a `Refusal` or an OSError into a UserError that names the file."""
    try:
        yield
    except Refusal as error:
        raise UserError(f"{clean_text(path.name)}: refused, {error}") from None
    except OSError as error:
        why = clean_text(str(error.strerror or error))
        raise UserError(f"{clean_text(path.name)}: cannot be read or written: {why}") from None


def check_regular(path: pathlib.Path) -> os.stat_result:
    """The `stat` of a regular file.

    Raises: Refusal for folders, pipes, devices and sockets, because reading those may never end;
      UserError when there is no such file.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{clean_text(str(path))}: no such file or folder") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{clean_text(str(path))}: not a valid file name") from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise Refusal(f"it is {what}, not a regular file")
    return found


@contextlib.contextmanager
def opened(
    path: pathlib.Path, limits: Limits, most: int | None = None
) -> Iterator[tuple[io.BufferedReader, int]]:
    """Opens a regular file for reading; yields the file and its size in bytes.

    Never blocks on pipes, devices or sockets. Refuses, before reading anything, a file that is
    empty, larger than `most` bytes (default `limits.file_bytes`), or mostly holes.

    Raises: Refusal; UserError when there is no such file.
    """
    check_regular(path)
    # O_NONBLOCK: opening must not block if the file was replaced by a pipe since the check above
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            # checked again: by now the path may name something else
            raise Refusal("it is not a regular file")
        most = limits.file_bytes if most is None else most
        if found.st_size == 0:
            raise Refusal("it is empty")
        if found.st_size > most:
            raise Refusal(f"it has {found.st_size:,} bytes; the limit is {most:,}")
        check_filled(file, found.st_size, limits)
        yield file, found.st_size


def check_filled(file: BinaryIO, size: int, limits: Limits) -> None:
    """Raises Refusal for a large sparse file: a few bytes on disk would take gigabytes of
    memory."""
    if size <= limits.free_bytes or not hasattr(os, "SEEK_DATA"):
        return
    stored = _count_stored(file.fileno(), size, size // limits.expansion)
    file.seek(0)
    if stored * limits.expansion < size:
        raise Refusal(
            f"it is hollow: only {stored:,} of its {size:,} bytes are stored, the rest was never"
            " written"
        )


def _count_stored(file: int, size: int, enough: int) -> int:
    """Bytes of the file outside its holes. Stops counting at `enough`, or after 4,096 pieces."""
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
    """Reads a whole regular file of at most `most` bytes. Raises: as `opened`."""
    with opened(path, limits, most) as (file, size):
        return read_exactly(file, 0, size, "the file")


def read_exactly(file: BinaryIO, offset: int, count: int, what: str) -> bytes:
    """Reads `count` bytes from `offset`. Raises Refusal, naming `what` was expected there, when the
    file ends early."""
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise Refusal(f"it ends in the middle of {what}")
    return data


def walk(folder: pathlib.Path, limits: Limits) -> list[pathlib.Path]:
    """Every regular file below `folder`, sorted by path.

    Raises: Refusal for more than `limits.entries` entries, for folders nested more than
      `limits.depth` deep, and for a link, pipe, device or socket, which the message names.
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
                # links could lead outside the folder or in circles
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((path, depth + 1))
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
                else:
                    what = "a link" if entry.is_symlink() else "a pipe, device or socket"
                    name = quote(path.relative_to(folder).as_posix())
                    raise Refusal(f"the folder holds {what}, {name}; only plain files are read")
    return sorted(found)


def sha256(file: BinaryIO) -> str:
    """SHA-256 of the whole file in hexadecimal, read in pieces."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


# descriptions


def parse_json(text: bytes, what: str, limits: Limits = Limits()) -> Any:
    """Parses JSON that all parsers read the same way: UTF-8, no duplicate names, finite numbers,
    bounded nesting.

    Args:
      what: what error messages call the text, e.g. "config.json".
    Raises: Refusal.
    """
    if len(text) > limits.header_bytes:
        raise Refusal(f"{what} has {len(text):,} bytes; the limit is {limits.header_bytes:,}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=lambda pairs: _build_object(pairs, what),
            parse_constant=lambda name: _parse_finite(name, what),
            parse_float=lambda number: _parse_finite(number, what),
            # "-0" is a float in other parsers; int would lose its sign
            parse_int=lambda number: -0.0 if number == "-0" else int(number),
        )
        if b"\\u" in text:  # an escape can spell a lone surrogate, which UTF-8 cannot encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    # deeply nested JSON exhausts the parser's stack
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


def _build_object(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise Refusal(f"{what} names {quote(name)} twice")
        table[name] = value
    return table


def _parse_finite(number: str, what: str) -> float:
    # "1e999" is valid JSON, but becomes infinite
    value = float(number)
    if not math.isfinite(value):
        raise Refusal(f"{what} holds the number {quote(number)}, which is not finite")
    return value


# time


class Deadline:
    """A limit on the time that reading may take; call `check()` between pieces of work.

    It counts this thread's CPU time, not wall-clock time: otherwise a busy machine would refuse
    files that an idle one reads.
    """

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what = seconds, what
        self._start = time.thread_time()

    def used(self) -> float:
        """CPU seconds that this thread has used since the deadline was created."""
        return time.thread_time() - self._start

    def check(self) -> None:
        """Raises Refusal once the time is up."""
        if self.used() > self.seconds:
            raise Refusal(f"{self.what} takes more than {self.seconds:.3g} seconds")


class _Watched(io.RawIOBase):
    """A file that checks a deadline before every read."""

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
    """Wraps `file` for a library that reads it in its own loop: once the time is up, the next read
    raises Refusal."""
    return io.BufferedReader(_Watched(file, deadline))
