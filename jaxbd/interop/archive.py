"""Zip archives that torch.save did not write: a zipped model file, or an .npz of weights."""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxbd import zips
from jaxbd.data import npz_archive
from jaxbd.limits import BinaryFile, Limits, Refusal, quote

MODEL_ENDINGS = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin", ".safetensors", ".npz")
PASSED_OVER = ("__macosx/", ".ds_store")
PROGRAMS = {
    "/constants.pkl": "a TorchScript program, which is code; save model.state_dict() instead",
    "/code/": "a TorchScript program, which is code; save model.state_dict() instead",
    "models/model.json": "an exported program of PyTorch (.pt2); give it a name that ends in .pt2",
    "serialized_exported_program.json": (
        "an exported program (.pt2) of an old PyTorch; export it again, or save model.state_dict()"
    ),
}
"""Substring of a member's name -> what the archive is, as the error message says it."""


def check_no_program(file: BinaryFile, size: int, limits: Limits) -> None:
    """Raises Refusal if the archive is a compiled or exported program."""
    for name in [member.filename for member in _members(file, size, limits)]:
        for part, what in PROGRAMS.items():
            if part in name:
                raise Refusal(f"it is {what}")


def foreign_members(file: BinaryFile, size: int, limits: Limits) -> list[zipfile.ZipInfo]:
    """Members of an archive that torch.save did not write. Empty for an archive that it did write,
    which is left to `torch_zip` to read or refuse."""
    members = _members(file, size, limits)
    names = [member.filename for member in members]
    # in lower case, since PyTorch ignores case when it looks up members
    if len(set(names)) < len(names) or any(
        name.lower().rpartition("/")[2] == "data.pkl" for name in names
    ):
        return []
    return members


def _members(file: BinaryFile, size: int, limits: Limits) -> list[zipfile.ZipInfo]:
    """The archive's directory; empty if it is damaged, or too large for a model file."""
    try:
        count, table, _ = zips.end_record(file, size)
    except Refusal:  # readers could disagree about where the directory is
        return []
    if table > limits.header_bytes or count > limits.entries:
        return []
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        return []
    return members


def is_npz(members: list[zipfile.ZipInfo]) -> bool:
    """Whether all members are arrays. "x.npy.npy" does not count: NumPy reads it as "x.npy"."""
    names = [member.filename for member in members]
    return all(n.endswith(".npy") and not n.endswith(".npy.npy") for n in names)


def read_npz(file: BinaryFile, size: int, limits: Limits) -> tuple[dict[str, np.ndarray], Any]:
    """Reads the arrays by name. Object arrays are refused: only a pickle can describe them."""
    members = foreign_members(file, size, limits)
    if len(members) > limits.tensors:
        raise Refusal(f"it holds {len(members):,} arrays; the limit is {limits.tensors:,}")
    if sum(member.file_size for member in members) > limits.unpacked(size):
        raise Refusal("it unpacks to more than a file of this size can hold")
    arrays, deadline = {}, limits.deadline("the archive", limits.unpacked(size))
    with zipfile.ZipFile(file) as archive:
        for member in members:
            deadline.check()
            name = member.filename.removesuffix(".npy")
            arrays[name] = _array(name, _unpack(archive, member, member.file_size))
    return arrays, {}


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    """Unpacks a member of at most `most` bytes and verifies its checksum."""
    if member.flag_bits & 0x1:
        raise Refusal(f"member {quote(member.filename)} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refusal(f"member {quote(member.filename)} uses an unsupported compression")
    try:
        with archive.open(member) as file:
            data = file.read(most + 1)
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError):
        raise Refusal(f"member {quote(member.filename)} is damaged") from None
    if len(data) != member.file_size:
        raise Refusal(f"member {quote(member.filename)} does not have the size it states")
    return data


def _array(name: str, data: bytes) -> np.ndarray:
    buffer = io.BytesIO(data)
    try:
        shape, dtype, is_fortran, _ = npz_archive.read_header(buffer, len(data), name)
    except (ValueError, EOFError):
        raise Refusal(
            f"array {quote(name)} has a damaged header, or not as many bytes as its shape needs"
        ) from None
    if dtype.kind not in "fiub" or dtype.byteorder == ">":
        raise Refusal(f"array {quote(name)} is of type {quote(str(dtype))}, which is not supported")
    rest = data[buffer.tell() :]
    if dtype.kind == "b" and np.frombuffer(rest, np.uint8).max(initial=0) > 1:
        raise Refusal(f"array {quote(name)} holds booleans that are neither 0 nor 1")
    # bytearray: frombuffer on bytes would give a read-only array
    return np.frombuffer(bytearray(rest), dtype).reshape(shape, order="F" if is_fortran else "C")


@contextlib.contextmanager
def only_model(
    file: BinaryFile, members: list[zipfile.ZipInfo], size: int, limits: Limits
) -> Iterator[tuple[io.BytesIO, int]]:
    """Unpacks in memory the one model file inside an archive of `size` bytes; yields it and its
    size.

    Raises: Refusal if the archive holds no model file, several, or another archive.
    """
    models = [
        member
        for member in members
        if member.filename.lower().endswith(MODEL_ENDINGS)
        and not member.filename.lower().startswith(PASSED_OVER)
    ]
    if len(models) != 1:
        names = ", ".join(quote(member.filename) for member in (models or members)[:4])
        raise Refusal(
            "it is a zip archive that torch.save did not write, and it does not hold one model file"
            f" ({names}); unpack it and give the file"
        )
    if models[0].file_size > limits.unpacked(size):
        raise Refusal("it unpacks to more than a file of this size can hold")
    with zipfile.ZipFile(file) as archive:
        data = _unpack(archive, models[0], models[0].file_size)
    inner = io.BytesIO(data)
    if data.startswith(b"PK") and foreign_members(inner, len(data), limits):
        raise Refusal(f"member {quote(models[0].filename)} is an archive too; unpack it")
    yield inner, len(data)
