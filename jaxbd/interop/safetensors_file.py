"""safetensors: a JSON header, then the tensors' bytes, without gaps. Nothing in it can be executed."""

import json
import math
import pathlib
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxbd.interop.files import Limits, Refusal, quote, read_exactly
from jaxbd.record import replacing

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


def looks_like(head: bytes, file_size: int) -> bool:
    """Whether a file that begins with `head` [>= 9 bytes] may be safetensors: a plausible length, then JSON."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= file_size - 8


def read(file: BinaryIO, file_size: int, limits: Limits) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors in the header's order, and the file's own notes (`__metadata__`).

    The bytes come from the open file whose hash is recorded. The header is checked here before anything is allocated:
    its size, its nesting, double names, and that the tensors tile the rest of the file exactly.
    """
    length = struct.unpack("<Q", read_exactly(file, 0, 8, "the header"))[0]
    if length > min(limits.header_bytes, file_size - 8):
        raise Refusal(
            f"its header claims {length:,} bytes; the file has {file_size:,}, the limit is {limits.header_bytes:,}"
        )
    header = _parse(read_exactly(file, 8, length, "the header"))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or any(type(note) is not str for note in notes.values()):
        raise Refusal("its __metadata__ is not a table of texts")
    if not header:
        raise Refusal("it holds no tensors")
    if len(header) > limits.tensors:
        raise Refusal(f"it holds {len(header):,} tensors; the limit is {limits.tensors:,}")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    _check_tiling(spans, file_size - 8 - length)
    return {name: _load(file, 8 + length, name, header[name], span) for name, span in spans.items()}, notes


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise Refusal("its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise Refusal("its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise Refusal("its header names something twice")
    return table


def _span(name: str, entry: Any) -> tuple[int, int]:
    """[begin, end) of one tensor, which must fit its shape and type."""
    if not name.isprintable() or not 0 < len(name) <= 256:
        raise Refusal(f"a tensor is named {quote(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"tensor {quote(name)} is not described by dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if type(kind) is not str or kind not in DTYPES:
        raise Refusal(f"tensor {quote(name)} is of type {quote(kind)}, which is not read")
    if not (_are_counts(shape) and _are_counts(offsets)) or len(shape) > 16 or len(offsets) != 2:
        raise Refusal(f"tensor {quote(name)} has a shape or offsets that make no sense")
    # sizes of 0 are left out of the guard's product, so that NumPy can hold every shape that passes
    if math.prod(max(size, 1) for size in shape) >= 1 << 40:
        raise Refusal(f"tensor {quote(name)} claims the shape {tuple(shape)}")
    if math.prod(shape) * DTYPES[kind].itemsize != offsets[1] - offsets[0]:
        raise Refusal(f"tensor {quote(name)} of shape {tuple(shape)} does not have the bytes that its shape needs")
    return offsets[0], offsets[1]


def _are_counts(value: Any) -> bool:
    return type(value) is list and all(type(number) is int and 0 <= number < 1 << 48 for number in value)


def _check_tiling(spans: dict[str, tuple[int, int]], size: int) -> None:
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1]):
        if span[0] != end:
            raise Refusal(f"tensor {quote(name)} overlaps another or leaves a gap")
        end = span[1]
    if end != size:
        raise Refusal(f"its tensors take {end:,} bytes where the file has {size:,}")


def _load(file: BinaryIO, start: int, name: str, entry: dict[str, Any], span: tuple[int, int]) -> np.ndarray:
    data = bytearray(read_exactly(file, start + span[0], span[1] - span[0], f"tensor {quote(name)}"))
    if entry["dtype"] == "BOOL" and max(data, default=0) > 1:
        raise Refusal(f"tensor {quote(name)} holds truth values that are neither 0 nor 1")
    return np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write(path: pathlib.Path, tensors: dict[str, np.ndarray], notes: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the `safetensors` library, whole or not at all."""
    import safetensors.numpy

    dense = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}
    with replacing(path) as sibling:
        safetensors.numpy.save_file(dense, sibling, metadata=notes or None)
        sibling.chmod(0o644)  # the library makes it readable for its owner only
