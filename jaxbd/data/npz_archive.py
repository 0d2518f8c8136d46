"""The arrays of an .npz file, read within limits.

What a header claims is checked before anything is unpacked, and of a large array only the chosen
rows are kept.
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
"""Bytes that are unpacked at a time."""


MAX_ARRAYS = 1000


class Header(NamedTuple):
    """What an array's header says: shape, type, whether its order is Fortran's; its name."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    name: str

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class Archive:
    """An open .npz file; `headers` of its arrays by name, checked against the limits."""

    headers: dict[str, Header]

    def __init__(self, path: Path, what: str = "data", most: int | None = None):
        """Names `path` as the file that `what` ("data", "trigger") is in; the arrays of it that are
        read may have at most `most` bytes each, by default `bounded.max_unpacked` of its size."""
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
                # NumPy takes "x.npy.npy" for "x.npy"
                if len({name.removesuffix(".npy") for name in names}) < len(names):
                    raise UserError(f"{self._where} names an array twice; save it again")
                self.headers = {}
                deadline = bounded.LIMITS.deadline("its directory")
                for name, entry in zip(names, entries, strict=True):
                    deadline.check()
                    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise UserError(f"{self._where} is packed in an unusual way; save it again")
                    with self._zip.open(entry) as file:
                        self.headers[name] = read_header(file, entry.file_size, name)
            except BaseException:
                self._zip.close()
                raise
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray:
        """The whole array `name`."""
        header = self.headers[name]
        self.check(header)
        with refusing(self._where), self._open(name) as file:
            content = bytearray(header.size)
            _fill(file, memoryview(content))
            order = "F" if header.fortran else "C"
            return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)

    def pieces(self, name: str, rows: np.ndarray) -> Generator[np.ndarray, None, None]:
        """The chosen `rows` of the array `name` in order, in pieces of at most `PIECE` bytes or a
        row. The rows between are unpacked and dropped."""
        header = self.headers[name]
        self.check(header)
        if header.fortran:
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
        """The file of the array `name`, read up to where its values begin."""
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
    """Raises ValueError for a directory of more members than any archive of arrays has, or one that
    could be looked for in two places.

    `zipfile` reads all of it at once, by what the end of the file claims.
    """
    with path.open("rb") as file:
        try:
            count, size, _ = zips.end_record(file, path.stat().st_size)
        except Refusal as refusal:
            raise ValueError("directory") from refusal
    if count > MAX_ARRAYS or size > MAX_ARRAYS << 10:
        raise ValueError("directory")


def read_array(path: Path, most: int) -> np.ndarray:
    """The array in an .npy file of at most `most` bytes. Raises: as numpy, and ValueError where it
    is larger or pickled."""
    with opened(path, bounded.LIMITS, most) as (file, size):
        header = read_header(file, size, path.name)
        if header.dtype.hasobject:
            raise ValueError("pickled objects")
        content = file.read(header.size)
    order = "F" if header.fortran else "C"
    return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)


def read_header(file: IO[bytes], size: int, name: str) -> Header:
    """Reads the header of an array, from a file of `size` bytes that holds nothing else.

    Raises: ValueError on anything else.
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
    except Exception as error:  # NumPy parses it as Python, which fails in every way
        raise ValueError("header") from error
    header = Header(shape, dtype, fortran, name)
    if any(type(side) is not int or side < 0 for side in header.shape):
        raise ValueError("shape")
    if not header.dtype.hasobject and file.tell() + header.size != size:
        raise ValueError("size")
    return header


def _fill(file: IO[bytes], target: memoryview) -> None:
    """Reads exactly as many bytes as `target` has."""
    done = 0
    while done < len(target):
        piece = file.read(min(PIECE, len(target) - done))
        if not piece:
            raise EOFError
        target[done : done + len(piece)] = piece
        done += len(piece)


@contextlib.contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turns what a damaged archive raises into one line."""
    try:
        yield
    except UserError:
        raise
    except Refusal as refusal:
        raise UserError(
            f"{where} is no intact .npz file, {refusal}; write it with np.savez"
        ) from None
    except MemoryError:
        raise UserError(
            f"{where} claims arrays that do not fit into memory; give fewer images"
        ) from None
    except Exception:  # damaged archives, encrypted ones and bare arrays all fail differently
        raise UserError(
            f"{where} is no intact .npz file; pickles are never loaded, write it with np.savez"
        ) from None
