"""PyTorch's stream format (before 1.6): five consecutive pickles, then the storages.

The pickles are a magic number, the protocol version, facts about the writer's machine, the value,
and the list of storage keys. The storages follow in the order of that list, each as its element
count (int64) and its elements.
"""

import tarfile
from typing import Any, NamedTuple

import numpy as np

from jaxbd.interop.allowed import Storage
from jaxbd.interop.unpickle import Machine
from jaxbd.limits import BinaryFile, Limits, Refusal, quote, read_exactly

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_NUMBER = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little") + b"."
MAGICS = (
    b"\x80\x02" + _NUMBER,
    b"\x80\x03" + _NUMBER,
    *(bytes([0x80, protocol, 0x95, 13, 0, 0, 0, 0, 0, 0, 0]) + _NUMBER for protocol in (4, 5)),
)
"""First bytes of a stream, for each pickle protocol it may be written in."""
PROTOCOL = 1001


class Loader(NamedTuple):
    """Loads storages of one stream by key; `places` holds the offset of each in the file."""

    file: BinaryFile
    places: dict[str, int]

    def __call__(self, key: str, size: int) -> np.ndarray:
        """The storage `key` as uint8 [size]. Sizes were checked when the stream was opened."""
        data = bytearray(size)
        self.file.seek(self.places[key])
        if self.file.readinto(data) != size:
            raise Refusal("it ends in the middle of a storage")
        return np.frombuffer(data, np.uint8)


def read(file: BinaryFile, file_size: int, limits: Limits) -> tuple[Any, Loader]:
    """The pickled value, with `Tensor`s in it, and a loader for their storages."""
    window = read_exactly(file, 0, min(file_size, limits.pickle_bytes), "the stream")
    if _is_tar(window):
        raise Refusal(
            "it is a stream and a tar archive at once; readers differ in which of the two they see"
        )
    values, position, left, storages = [], 0, limits.instructions, {}
    for part in range(5):
        # PyTorch accepts references to storages only in the value
        machine = Machine(window, position, limits, reference=6 if part == 3 else 0)
        # all five pickles share one limit on instructions
        machine.left = left
        values.append(machine.run())
        position, left, storages = machine.position, machine.left, storages or machine.storages
    magic, protocol, system, value, keys = values
    if magic != MAGIC_NUMBER or protocol != PROTOCOL or type(system) is not dict:
        raise Refusal("it is not a stream that torch.save wrote")
    if system.get("little_endian") is not True:
        raise Refusal("it was written in big-endian byte order, which is not supported")
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise Refusal("its list of storages is damaged")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise Refusal("the storages listed are not those that the tensors use")
    return value, Loader(file, _places(file, file_size, position, [storages[key] for key in keys]))


def _is_tar(window: bytes) -> bool:
    """Whether the first block is a valid tar header: PyTorch tries tar before the stream format."""
    try:
        tarfile.TarInfo.frombuf(window[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _places(
    file: BinaryFile, file_size: int, position: int, storages: list[Storage]
) -> dict[str, int]:
    """Offset of each storage's elements. They must fill the rest of the file exactly."""
    places = {}
    for storage in storages:
        stated = int.from_bytes(read_exactly(file, position, 8, "a storage"), "little", signed=True)
        if stated != storage.numel:
            raise Refusal(
                f"storage {quote(storage.key)} has {stated} elements where {storage.numel} are"
                " described"
            )
        places[storage.key] = position + 8
        position += 8 + storage.numel * storage.dtype.itemsize
        if position > file_size:
            raise Refusal(f"it ends in the middle of storage {quote(storage.key)}")
    if position != file_size:
        raise Refusal(f"{file_size - position:,} bytes follow the last storage")
    return places
