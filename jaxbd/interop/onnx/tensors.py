"""Reads ONNX tensors as NumPy arrays, from the file itself or from external data files beside
it."""

import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from jaxbd.interop.onnx.graph import MOST_AXES, GraphLimits
from jaxbd.limits import Limits, Refusal, opened, quote

TYPES: dict[int, np.dtype] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    16: np.dtype(ml_dtypes.bfloat16),
}
"""Number of an ONNX element type -> NumPy dtype; others (strings, complex, quantised) are
refused."""
FIELDS = {"f": "float_data", "i": "int32_data", "u": "int32_data", "b": "int32_data"}
WIDE = {7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
HALVES = (10, 16)
EXTERNAL = 1


class Reader:
    """Reads the tensors of one file and adds up their cost.

    Attributes:
      folder: folder of external data files; None if they are not allowed.
      files: the external data files that were read.
    """

    def __init__(self, limits: GraphLimits, folder: pathlib.Path | None):
        self.limits, self.folder = limits, folder
        self.count = self.total = 0
        self.files: set[pathlib.Path] = set()
        self.external, self.sizes = 0, dict[pathlib.Path, int]()

    def read(self, tensor: Any, name: str) -> np.ndarray:
        """Converts `tensor`, a TensorProto, to an array. Raises Refusal naming `name`."""
        dtype, shape = self._read_header(tensor, name)
        size = math.prod(shape) * dtype.itemsize
        self.count, self.total = self.count + 1, self.total + size
        if self.count > self.limits.tensors:
            raise Refusal(f"it has more than {self.limits.tensors:,} tensors")
        if self.total > self.limits.unpacked_bytes:
            raise Refusal(
                f"its tensors are larger than {self.limits.unpacked_bytes:,} bytes; first "
                f"{quote(name)}"
            )
        if tensor.data_location == EXTERNAL:
            return np.frombuffer(self._external(tensor, name, size), dtype).reshape(shape)
        if tensor.HasField("raw_data"):
            if dtype == np.bool_ and np.frombuffer(tensor.raw_data, np.uint8).max(initial=0) > 1:
                raise Refusal(f"tensor {quote(name)} holds booleans that are neither 0 nor 1")
            if len(tensor.raw_data) != size:
                raise Refusal(
                    f"tensor {quote(name)} has {len(tensor.raw_data):,} bytes where {size:,} are "
                    "described"
                )
            return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
        return self._read_elements(tensor, dtype, shape, name)

    def _read_header(self, tensor: Any, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        dtype, shape = TYPES.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None:
            raise Refusal(
                f"tensor {quote(name)} has elements of the unsupported type {tensor.data_type}"
            )
        if len(shape) > MOST_AXES or any(dim < 0 for dim in shape) or tensor.HasField("segment"):
            raise Refusal(f"tensor {quote(name)} has the shape {quote(shape)}")
        return dtype, shape

    def _read_elements(
        self, tensor: Any, dtype: np.dtype, shape: tuple[int, ...], name: str
    ) -> np.ndarray:
        """Reads elements that are stored individually, in the field for their type."""
        values = getattr(
            tensor,
            WIDE.get(tensor.data_type)
            or ("int32_data" if tensor.data_type in HALVES else FIELDS[dtype.kind]),
        )
        if len(values) != math.prod(shape):
            raise Refusal(
                f"tensor {quote(name)} has {len(values):,} elements where {math.prod(shape):,} are "
                "described"
            )
        if tensor.data_type in HALVES:  # their bits are stored as integers
            return np.array(values, np.int32).astype(np.uint16).view(dtype).reshape(shape)
        return np.array(values).astype(dtype).reshape(shape)

    def _external(self, tensor: Any, name: str, size: int) -> bytes:
        """Reads `size` bytes of an external data file, which must be inside the model's folder."""
        stated = {entry.key: entry.value for entry in tensor.external_data}
        location = stated.get("location", "")
        if self.folder is None:
            raise Refusal(f"tensor {quote(name)} is in another file, {quote(location)}")
        offset, length = (
            _whole(stated.get(key, str(default)), name)
            for key, default in (("offset", 0), ("length", size))
        )
        if length != size:
            raise Refusal(f"tensor {quote(name)} has {length:,} bytes where {size:,} are described")
        path = _inside(self.folder, location)
        if not path.exists():
            raise Refusal(f"its weights are in {quote(location)}, which is missing from its folder")
        self.files.add(path)
        with opened(path, Limits(file_bytes=self.limits.file_bytes)) as (file, _):
            file.seek(offset)
            data = file.read(size)
        self.sizes[path] = path.stat().st_size
        self.external += size
        # many tensors may refer to the same bytes, so the total is compared with the files' sizes
        if self.external > self.limits.plain.unpacked(sum(self.sizes.values())):
            raise Refusal(f"its tensors are many times larger than its files; first {quote(name)}")
        if len(data) != size:
            raise Refusal(f"{quote(location)} ends in the middle of tensor {quote(name)}")
        return data


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refusal(f"tensor {quote(name)} has {quote(text)} for an offset or length")
    return int(text)


def _inside(folder: pathlib.Path, location: str) -> pathlib.Path:
    """The file `location` in `folder`. Raises Refusal if the name or a link leads outside the
    folder."""
    parts = pathlib.PurePosixPath(location).parts
    path = folder.joinpath(*parts) if parts else folder
    outside = (
        not parts
        or location.startswith("/")
        or ".." in parts
        or "\\" in location
        or ":" in location
    )
    if (
        outside
        or "\0" in location
        # realpath follows links, which may lead outside
        or not os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
    ):
        raise Refusal(f"it asks for data outside its folder, {quote(location)}")
    return path
