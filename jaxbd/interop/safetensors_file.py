"""Reads and writes safetensors: a JSON header, then the tensors' bytes without gaps. The format
contains nothing executable."""

import math
import os
import pathlib
import re
import struct
from typing import Any

import ml_dtypes
import numpy as np

from jaxbd.files import replacing
from jaxbd.limits import BinaryFile, Limits, Refusal, parse_json, quote, read_exactly

DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
OPAQUE = {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
"""Types that weights do not have -> bytes per element."""
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | OPAQUE


def looks_like(head: bytes, file_size: int) -> bool:
    """Whether a file beginning with `head` [>= 9 bytes] may be safetensors: a plausible header
    length, then JSON."""
    return (
        len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= file_size - 8
    )


def read(
    file: BinaryFile, file_size: int, limits: Limits, opaque: dict[str, str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors in the header's order, and the file's `__metadata__`.

    Tensors of a type in `OPAQUE` are refused or, given a dictionary `opaque`, left out and added to
    it: name -> type.

    The bytes are read from the same open file whose hash is recorded. Before anything is allocated,
    the header is checked: its size, its nesting, duplicate names, and that the tensors fill the
    rest of the file exactly.
    """
    length = struct.unpack("<Q", read_exactly(file, 0, 8, "the header"))[0]
    if length > min(limits.header_bytes, file_size - 8):
        raise Refusal(
            f"its header claims {length:,} bytes; the file has {file_size:,}, the limit is"
            f" {limits.header_bytes:,}"
        )
    header = parse_json(read_exactly(file, 8, length, "the header"), "its header", limits)
    if not isinstance(header, dict):
        raise Refusal("its header is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or any(type(note) is not str for note in notes.values()):
        raise Refusal("its __metadata__ is not a table of strings")
    if not header:
        raise Refusal("it holds no tensors")
    if len(header) > limits.tensors:
        raise Refusal(f"it holds {len(header):,} tensors; the limit is {limits.tensors:,}")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    _check_tiling(spans, file_size - 8 - length)
    skipped = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] in OPAQUE}
    if skipped and (opaque is None or len(skipped) == len(header)):
        name, kind = next(iter(skipped.items()))
        raise Refusal(f"tensor {quote(name)} is of type {quote(kind)}, which is not supported")
    if opaque is not None:
        opaque |= skipped
    return {
        name: _load(file, 8 + length, name, header[name], span)
        for name, span in spans.items()
        if name not in skipped
    }, notes


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Byte range [begin, end) of one tensor. Raises Refusal unless it fits the shape and type."""
    if not name.isprintable() or not 0 < len(name) <= 256:
        raise Refusal(f"a tensor is named {quote(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"tensor {quote(name)} is not described by dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if type(kind) is not str or kind not in SIZES:
        raise Refusal(f"tensor {quote(name)} is of type {quote(kind)}, which is not supported")
    if not (_are_counts(shape) and _are_counts(offsets)) or len(shape) > 16 or len(offsets) != 2:
        raise Refusal(f"tensor {quote(name)} has a shape or offsets that make no sense")
    # count sizes of 0 as 1: NumPy cannot hold every empty shape either
    if math.prod(max(size, 1) for size in shape) >= 1 << 40:
        raise Refusal(f"tensor {quote(name)} claims the shape {tuple(shape)}")
    if math.prod(shape) * SIZES[kind] != offsets[1] - offsets[0]:
        raise Refusal(
            f"tensor {quote(name)} of shape {tuple(shape)} does not have as many bytes as its shape"
            " needs"
        )
    return offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    return type(value) is list and all(
        type(number) is int and 0 <= number < 1 << 48 for number in value
    )


def _check_tiling(spans: dict[str, tuple[int, int]], size: int) -> None:
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        if span[0] != end:
            raise Refusal(f"tensor {quote(name)} overlaps another or leaves a gap")
        end = span[1]
    if end != size:
        raise Refusal(f"its tensors take {end:,} bytes where the file has {size:,}")


def _load(
    file: BinaryFile, start: int, name: str, entry: dict[str, Any], span: tuple[int, int]
) -> np.ndarray:
    # a bytearray, so that the array over it is writeable
    data = bytearray(span[1] - span[0])
    file.seek(start + span[0])
    if file.readinto(data) != len(data):
        raise Refusal(f"it ends in the middle of tensor {quote(name)}")
    if entry["dtype"] == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise Refusal(f"tensor {quote(name)} holds booleans that are neither 0 nor 1")
    return np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write(
    path: pathlib.Path, tensors: dict[str, np.ndarray], notes: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with the `safetensors` library, atomically.

    Raises: OSError when the disk is full or cannot be written.
    """
    import safetensors.numpy

    dense = {
        # ascontiguousarray turns a scalar into [1]; reshape undoes that
        name: np.ascontiguousarray(tensor).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
    with replacing(path) as sibling:
        try:
            safetensors.numpy.save_file(dense, sibling, metadata=notes or None)
        except safetensors.SafetensorError as error:  # it only has the system's error in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        sibling.chmod(0o644)  # the library makes the file readable only by its owner
