"""Reads torch.export archives: zip members, JSON, and weights as arrays. No pickle is read."""

import io
import math
from typing import Any

import numpy as np

from jaxbd.interop import torch_zip
from jaxbd.interop.onnx.aten import Meta
from jaxbd.interop.onnx.aten_arguments import TYPES
from jaxbd.interop.onnx.graph import MOST_AXES, GraphLimits
from jaxbd.limits import Refusal, parse_json, quote

PROGRAM = "/models/model.json"
MOST_VALUES = 1_000_000
"""Maximum number of values in a program; each takes up to two hundred bytes of memory."""


class Archive:
    """The members of a torch.export archive and its tensors by name; `constants` names the tensors
    that are neither parameters nor buffers."""

    def __init__(self, data: bytes, limits: GraphLimits):
        self.file, self.limits = io.BytesIO(data), limits
        self.most = min(limits.unpacked_bytes, limits.plain.unpacked(len(data)))
        if len(data) > limits.file_bytes:
            raise Refusal(f"it has {len(data):,} bytes; the limit is {limits.file_bytes:,}")
        self.members = torch_zip.directory(self.file, len(data), limits.plain)
        roots = {name.removesuffix(PROGRAM) for name in self.members if name.endswith(PROGRAM)}
        if len(roots) != 1 or "/" in next(iter(roots)):
            old = (
                " (an older form; save it again with PyTorch 2.9 or newer)"
                if "version" in self.members
                else ""
            )
            raise Refusal(f"the archive does not hold exactly one program, NAME{PROGRAM}{old}")
        self.root = roots.pop()
        inner = [name.removeprefix(f"{self.root}/") for name in self.members]
        if any(name.startswith("data/aotinductor") for name in inner):
            raise Refusal(
                "the archive holds compiled code (data/aotinductor), which is never run; export the"
                " model without it"
            )
        if len([name for name in inner if name.startswith("models/")]) != 1:
            raise Refusal("the archive holds more than one program")
        if (
            self._bytes("byteorder", 16, b"little") != b"little"
            or self._bytes("archive_format", 16, b"pt2") != b"pt2"
        ):
            raise Refusal("the archive is big-endian, or not in the pt2 format")
        self.tensors, self.total = {}, 0
        self.tables = {kind: self._table(kind) for kind in ("weights", "constants")}
        self.constants: set[str] = set()

    def _bytes(self, name: str, most: int, default: bytes | None = None) -> bytes:
        full = f"{self.root}/{name}"
        if full not in self.members:
            if default is None:
                raise Refusal(f"the archive has no member {quote(name)}")
            return default
        return bytes(torch_zip.unpack(self.file, self.members, full, most))

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in the member `name`."""
        text = self._bytes(name, self.limits.json_bytes)
        # bounds the number of values before parsing allocates memory for them
        if text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_VALUES:
            raise Refusal(f"{quote(name)} holds more than {MOST_VALUES:,} values")
        value = parse_json(text, quote(name), self.limits.plain)
        if type(value) is not dict:
            raise Refusal(f"{quote(name)} is not an object")
        return value

    def _table(self, kind: str) -> dict[str, Any]:
        return field(self.json(f"data/{kind}/model_{kind}_config.json"), "config", dict)

    def tensor(self, kind: str, name: str) -> np.ndarray:
        """The tensor `name` in the table `kind`, "weights" or "constants"."""
        entry = self.tables[kind].get(name)
        if type(entry) is not dict:
            raise Refusal(f"tensor {quote(name)} is not in the archive")
        meta, path = field(entry, "tensor_meta", dict), field(entry, "path_name", str)
        if entry.get("use_pickle") is not False:
            raise Refusal(
                f"tensor {quote(name)} is pickled, which cannot be read without running code"
            )
        found, strides = meta_of(meta), sizes(meta, "strides")
        offset = sizes({"": [meta.get("storage_offset")]}, "")[0]
        shape = found.shape
        if (
            None in shape
            or None in strides
            or offset is None
            or len(strides) != len(shape)
            or min((0, *strides)) < 0
        ):
            raise Refusal(
                f"tensor {quote(name)} has the shape {quote(shape)} and strides {quote(strides)}"
            )
        self.total += math.prod(shape) * found.dtype.itemsize
        if self.total > self.most or len(self.tensors) > self.limits.tensors:
            raise Refusal(f"its tensors are larger than {self.most:,} bytes; first {quote(name)}")
        return strided(
            self._storage(f"data/{kind}/{path}"), found.dtype, shape, strides, offset, name
        )

    def _storage(self, path: str) -> bytes:
        if path not in self.tensors:
            self.tensors[path] = self._bytes(path, self.limits.file_bytes)
        return self.tensors[path]


def strided(
    data: bytes, dtype: np.dtype, shape: Any, strides: Any, offset: int, name: str
) -> np.ndarray:
    """A contiguous copy of a tensor stored in `data`; strides and offset are in elements."""
    last = offset + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    if offset < 0 or (math.prod(shape) and (last + 1) * dtype.itemsize > len(data)):
        raise Refusal(f"tensor {quote(name)} reaches beyond its {len(data):,} bytes")
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    flat = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)[offset:]
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.array(np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False), order="C")


def field(value: Any, name: str, kind: type) -> Any:
    """The field `name` of a JSON object. Raises Refusal unless it has the type `kind`."""
    found = value.get(name) if type(value) is dict else None
    if type(found) is not kind:
        raise Refusal(f"its field {quote(name)} is {quote(found)}")
    return found


def sizes(value: dict[str, Any], name: str) -> tuple[Any, ...]:
    """A list of sizes as numbers; None for symbolic sizes."""
    found = []
    for size in field(value, name, list):
        if type(size) is not dict or len(size) != 1:
            raise Refusal(f"a size is {quote(size)}")
        number = size.get("as_int")
        if "as_int" in size and (type(number) is not int or not -1 << 40 < number < 1 << 40):
            raise Refusal(f"a size is {quote(number)}")
        found.append(number)
    return tuple(found)


def meta_of(value: Any) -> Meta:
    """Shape and element type from a tensor's JSON description."""
    number = value.get("dtype") if type(value) is dict else None
    if type(number) is not int or number not in TYPES:
        raise Refusal(f"a tensor is of element type {quote(number)}, which is not supported")
    # 7 is torch.strided
    if value.get("layout") not in [None, 7]:
        raise Refusal("a tensor is sparse")
    shape = sizes(value, "sizes")
    if len(shape) > MOST_AXES or any(size is not None and size < 0 for size in shape):
        raise Refusal(f"a tensor has the shape {quote(shape)}")
    return Meta(shape, TYPES[value["dtype"]])
