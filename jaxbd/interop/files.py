"""What every reader and writer of model files shares: limits, refusals, and files that are whole or absent."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import BinaryIO

from jaxbd.base import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model file may cost to read. Everything above is refused before it is paid for.

    Attributes:
      file_bytes: size of the whole file or folder.
      tensors: tensors in one file.
      entries: members of an archive, values visited beside the tensors.
      depth: nesting of dictionaries, lists and tuples.
      pickle_bytes: size of the pickled description (never the weights).
      header_bytes: size of a JSON header or an archive's directory.
      instructions: pickle instructions, and items moved by them.
      integer_keys: dictionary entries keyed by a number (optimiser state); such keys can be made to collide.
      expansion: unpacked bytes, or bytes of all tensors that share storage, per byte of the file.
      free_bytes: unpacked bytes that are allowed whatever the file's size.
    """

    file_bytes: int = 4 << 30
    tensors: int = 10_000
    entries: int = 100_000
    depth: int = 32
    pickle_bytes: int = 8 << 20
    header_bytes: int = 2 << 20
    instructions: int = 400_000
    integer_keys: int = 4_096
    expansion: int = 8
    free_bytes: int = 64 << 20

    def unpacked(self, file_size: int) -> int:
        """Bytes that a file of `file_size` bytes may become in memory."""
        return max(self.free_bytes, self.expansion * file_size)


class Refusal(Exception):
    """A file is not what it should be. The message says why; the caller adds the file's name (`refusing`)."""


def quote(text: object) -> str:
    """Text from a file, made safe to show on a terminal: ASCII, in quotes, at most 80 characters."""
    shown = ascii(text[:80] if isinstance(text, str) else text)
    return shown if len(shown) <= 80 else shown[:76] + "...'"


@contextlib.contextmanager
def refusing(path: pathlib.Path) -> Iterator[None]:
    """Turns a `Refusal` into a UserError that names the file."""
    try:
        yield
    except Refusal as error:
        raise UserError(f"{path.name}: refused, {error}") from None
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read or written: {error.strerror or error}") from None


@contextlib.contextmanager
def opened(path: pathlib.Path, limits: Limits) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes. A pipe or device is refused: reading one may never end."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refusal("it is not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise Refusal("it is empty")
        if size > limits.file_bytes:
            raise Refusal(f"it has {size:,} bytes; the limit is {limits.file_bytes:,}")
        yield file, size


def read_exactly(file: BinaryIO, offset: int, count: int, what: str) -> bytes:
    """`count` bytes from `offset`; a file that ends before is refused, naming `what` was expected there."""
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise Refusal(f"it ends in the middle of {what}")
    return data


def sha256(file: BinaryIO) -> str:
    """Hexadecimal SHA-256 of the whole file, read in pieces."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
