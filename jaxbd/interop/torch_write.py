"""Writes PyTorch's zip format without PyTorch: a pickle that we emit ourselves and the storages,
uncompressed."""

import collections
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

from jaxbd.files import replacing
from jaxbd.interop.allowed import STORAGE_TYPES

ROOT = "archive"
ALIGNMENT = 64
FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_NAMES = {dtype: name for name, dtype in STORAGE_TYPES.items()}


class StateDict(dict):
    """Marks the dictionary of tensors: it is written as an OrderedDict with `_metadata`, like the
    result of `state_dict()`."""

    metadata: Any = None


def write(path: pathlib.Path, value: Any) -> None:
    """Saves `value`: plain Python values, with NumPy arrays of the types in `STORAGE_TYPES` as
    tensors.

    Every array gets its own dense storage. `torch.load(path, weights_only=True)` reads the result.
    The file is reproducible: it does not depend on the time or the machine.
    """
    pickler = _Pickler()
    pickler.put(value)
    parts = [
        ("data.pkl", pickle.PROTO + b"\x02" + bytes(pickler.out) + pickle.STOP),
        ("byteorder", b"little"),
    ]
    parts += [
        (f"data/{key}", array.reshape(-1).view(np.uint8).data)
        for key, array in enumerate(pickler.arrays)
    ]
    parts.append(("version", b"3\n"))
    with replacing(path) as sibling, zipfile.ZipFile(sibling, "w", zipfile.ZIP_STORED) as archive:
        assert archive.fp is not None  # it is open
        for name, data in parts:
            info = zipfile.ZipInfo(f"{ROOT}/{name}", FIRST_DATE)
            info.extra = _padding(archive.fp.tell() + 30 + len(info.filename))
            archive.writestr(info, data)


def _padding(position: int) -> bytes:
    """A zip extra field that moves data from `position` to the next multiple of `ALIGNMENT`."""
    length = -(position + 4) % ALIGNMENT
    return b"FB" + struct.pack("<H", length) + b"Z" * length


class _Pickler:
    """Emits pickle protocol 2 instructions; `arrays` collects the contents of the storages, in
    order of their keys."""

    def __init__(self):
        self.out = bytearray()
        self.arrays: list[np.ndarray] = []

    def put(self, value: Any) -> None:
        """Emits one value, by its exact type."""
        writers = {
            dict: self._dict,
            collections.OrderedDict: self._write_ordered_dict,
            StateDict: self._state_dict,
            list: self._list,
            tuple: self._tuple,
            np.ndarray: self._tensor,
            str: self._text,
            bytes: self._bytes,
            int: self._integer,
            float: lambda number: self._add(pickle.BINFLOAT, struct.pack(">d", number)),
            bool: lambda flag: self._add(pickle.NEWTRUE if flag else pickle.NEWFALSE),
            type(None): lambda _: self._add(pickle.NONE),
        }
        writers[type(value)](value)

    def _add(self, *parts: bytes) -> None:
        for part in parts:
            self.out += part

    def _global(self, module: str, name: str) -> None:
        self._add(pickle.GLOBAL, f"{module}\n{name}\n".encode())

    def _integer(self, number: int) -> None:
        if -(2**31) <= number < 2**31:
            self._add(pickle.BININT, struct.pack("<i", number))
        else:
            # one bit more than the number's own, for the sign
            data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            self._add(pickle.LONG1, bytes([len(data)]), data)

    def _text(self, text: str) -> None:
        data = text.encode("utf-8")
        self._add(pickle.BINUNICODE, struct.pack("<I", len(data)), data)

    def _bytes(self, data: bytes) -> None:
        """Protocol 2 has no bytes: they are written as text that is encoded when loaded."""
        self._global("_codecs", "encode")
        self.put((data.decode("latin1"), "latin1"))
        self._add(pickle.REDUCE)

    def _items(self, value: dict) -> None:
        self._add(pickle.MARK)
        for name, entry in value.items():
            self.put(name)
            self.put(entry)
        self._add(pickle.SETITEMS)

    def _dict(self, value: dict) -> None:
        self._add(pickle.EMPTY_DICT)
        self._items(value)

    def _write_ordered_dict(self, value: dict) -> None:
        self._global("collections", "OrderedDict")
        self._add(pickle.EMPTY_TUPLE, pickle.REDUCE)
        self._items(value)

    def _state_dict(self, value: StateDict) -> None:
        self._write_ordered_dict(value)
        if value.metadata is not None:
            self.put({"_metadata": value.metadata})
            self._add(pickle.BUILD)

    def _list(self, value: list) -> None:
        self._add(pickle.EMPTY_LIST, pickle.MARK)
        for entry in value:
            self.put(entry)
        self._add(pickle.APPENDS)

    def _tuple(self, value: tuple) -> None:
        self._add(pickle.MARK)
        for entry in value:
            self.put(entry)
        self._add(pickle.TUPLE)

    def _tensor(self, array: np.ndarray) -> None:
        """_rebuild_tensor_v2(storage, offset 0, shape, dense stride, requires_grad False, no
        hooks)."""
        # ascontiguousarray turns a scalar into [1]; reshape undoes that
        array = np.ascontiguousarray(array).reshape(array.shape)
        self._global("torch._utils", "_rebuild_tensor_v2")
        self._add(pickle.MARK, pickle.MARK)
        self.put("storage")
        self._global("torch", _NAMES[array.dtype])
        for part in (str(len(self.arrays)), "cpu", array.size):
            self.put(part)
        self._add(pickle.TUPLE, pickle.BINPERSID)
        stride = tuple(
            int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)
        )
        for part in (0, array.shape, stride, False, collections.OrderedDict()):
            self.put(part)
        self._add(pickle.TUPLE, pickle.REDUCE)
        self.arrays.append(array)
