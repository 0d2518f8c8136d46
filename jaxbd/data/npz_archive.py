"""Reads the arrays of an .npz file within limits.

Checks what each header claims before unpacking anything. Of a large array only the chosen rows stay
in memory.
"""

import contextlib
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jaxbd import zips
from jaxbd.base import UserError
from jaxbd.data import bounded
from jaxbd.limits import Refusal, opened

PIECE = 4 << 20
"""Bytes unpacked at a time."""


MAX_ARRAYS = 1000


class Header(NamedTuple):
    """An array's header (shape, type, whether in Fortran order) and the array's name."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    name: str

    @property
    def size(self) -> int:
        """Size of the array in bytes."""
        # Python integers (dtype=object): a hostile shape would overflow int64
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class Archive:
    """An open .npz file.

    Attributes:
      headers: headers of the arrays by name.
    """

    headers: dict[str, Header]

    def __init__(self, path: Path, what: str = "data", most: int | None = None):
        """Checks that `path` is a regular file; entering the context opens it.

        Args:
          what: what the file holds ("data", "trigger"), for messages.
          most: maximum bytes of an array that is read; default: `bounded.max_unpacked` of the
            file's size.
        """
        self.path, self._where, self._most = path, f"{what} {path}", most
        if not path.exists():
            raise UserError(f"{self._where} does not exist; check the path")
        if not bounded.is_regular(path):
            raise UserError(f"{self._where} is not a regular file; give an .npz file")

    def __enter__(self) -> "Archive":
        with refusing(self._where):
            _check_directory(self.path)
            self._zip = zipfile.ZipFile(self.path)
            try:
                entries = self._zip.infolist()
                if len(entries) > MAX_ARRAYS:
                    raise UserError(f"{self._where} holds {len(entries)} arrays; give fewer")
                names = [entry.filename.removesuffix(".npy") for entry in entries]
                # NumPy would read "x.npy.npy" as "x.npy"
                if len({name.removesuffix(".npy") for name in names}) < len(names):
                    raise UserError(f"{self._where} names an array twice; save it again")
                self.headers = {}
                deadline = bounded.LIMITS.deadline("its directory")
                for name, entry in zip(names, entries, strict=True):
                    deadline.check()
                    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise UserError(f"{self._where} has an unusual compression; save it again")
                    with self._zip.open(entry) as file:
                        self.headers[name] = read_header(file, entry.file_size, name)
            except BaseException:
                self._zip.close()
                raise
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray:
        """Reads the whole array `name`."""
        header = self.headers[name]
        self.check(header)
        with refusing(self._where), self._open(name) as file:
            content = bytearray(header.size)
            _fill(file, memoryview(content))
            order = "F" if header.fortran else "C"
            return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)

    def pieces(self, name: str, rows: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Yields the chosen `rows` (ascending) of the array `name` in pieces of at most `PIECE`
        bytes, or of one row if that is larger. Rows in between are unpacked and dropped."""
        header = self.headers[name]
        self.check(header)
        if header.fortran:  # a row's values are scattered over the whole array
            yield self.read(name)[rows]
            return
        row_bytes = max(1, header.size // max(header.shape[0], 1))
        step = max(1, PIECE // row_bytes)
        with refusing(self._where), self._open(name) as file:
            for start in range(0, int(rows.max(initial=-1)) + 1, step):
                count = min(step, header.shape[0] - start)
                content = bytearray(count * row_bytes)
                _fill(file, memoryview(content))
                inside = rows[(rows >= start) & (rows < start + count)]
                if len(inside):
                    piece = np.frombuffer(content, header.dtype)
                    yield piece.reshape(count, *header.shape[1:])[inside - start]

    def _open(self, name: str) -> IO[bytes]:
        """Opens the file of the array `name`, positioned after the header."""
        entry = name if name in self._zip.namelist() else f"{name}.npy"
        file = self._zip.open(entry)
        read_header(file, self._zip.getinfo(entry).file_size, name)
        return file

    def check(self, header: Header) -> None:
        """Raises UserError unless the array holds plain values and unpacks within the limits."""
        if header.dtype.hasobject:
            raise UserError(
                f"{self._where} holds pickled objects, which are never loaded; save plain arrays"
                " (uint8 images, integer labels) instead"
            )
        most = bounded.max_unpacked(self.path.stat().st_size) if self._most is None else self._most
        if header.size > most:
            raise UserError(
                f"{self._where}: array {header.name[:40]!r} claims {header.size:,} bytes, the limit"
                f" for this file is {most:,}; give less"
            )


def _check_directory(path: Path) -> None:
    """Raises ValueError for a zip directory that is too large or could start in two places.

    `zipfile` reads the whole directory at once and trusts the size that the end of the file claims.
    """
    with path.open("rb") as file:
        try:
            count, size, _ = zips.end_record(file, path.stat().st_size)
        except Refusal as refusal:
            raise ValueError("directory") from refusal
    if count > MAX_ARRAYS or size > MAX_ARRAYS << 10:
        raise ValueError("directory")


def read_array(path: Path, most: int) -> np.ndarray:
    """Reads the array in an .npy file of at most `most` bytes.

    Raises: what NumPy raises; ValueError when the array is pickled; Refusal when the file is too
      large.
    """
    with opened(path, bounded.LIMITS, most) as (file, size):
        header = read_header(file, size, path.name)
        if header.dtype.hasobject:
            raise ValueError("pickled objects")
        content = file.read(header.size)
    order = "F" if header.fortran else "C"
    return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)


def read_header(file: IO[bytes], size: int, name: str) -> Header:
    """Reads an array's header from a file of `size` bytes, which must hold this array alone.

    Raises: ValueError if it does not.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError("version of the .npy format")
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy parses the header as Python, which can raise anything
        raise ValueError("header") from error
    header = Header(shape, dtype, fortran, name)
    if any(type(side) is not int or side < 0 for side in header.shape):
        raise ValueError("shape")
    if not header.dtype.hasobject and file.tell() + header.size != size:
        raise ValueError("size")
    return header


def _fill(file: IO[bytes], target: memoryview) -> None:
    """Fills `target` from `file`. Raises: EOFError when the file ends too early."""
    done = 0
    while done < len(target):
        piece = file.read(min(PIECE, len(target) - done))
        if not piece:
            raise EOFError
        target[done : done + len(piece)] = piece
        done += len(piece)


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turns anything that a damaged archive raises into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Refusal as refusal:
        raise UserError(
            f"{where} is not an intact .npz file, {refusal}; write it with np.savez"
        ) from None
    except MemoryError:
        raise UserError(
            f"{where} claims arrays that do not fit into memory; give fewer images"
        ) from None
    except Exception:  # damaged archives, encrypted ones and bare arrays all fail differently
        raise UserError(
            f"{where} is not an intact .npz file; pickles are never loaded, write it with np.savez"
        ) from None
