"""Reads the arrays of an Orbax checkpoint folder (StandardCheckpointer of {"params": …, "batch_stats": …}).

Orbax's own restore looks up handlers by names that the folder states. Here only its table of contents (JSON) is
parsed, and each array is opened through TensorStore, whose formats hold data and nothing that could run.
"""

import hashlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from jaxbd.interop.files import Limits, Refusal, opened, quote
from jaxbd.interop.safetensors_file import DTYPES

CONTENTS = "_METADATA"
COLLECTIONS = ("params", "batch_stats", "bounds")


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether the folder has Orbax's table of contents."""
    return (path / CONTENTS).is_file()


def read(path: pathlib.Path, limits: Limits) -> tuple[dict[str, np.ndarray], tuple[str, ...], str, int]:
    """Arrays by path ("params/conv0/kernel"), names of other entries, SHA-256 over all files, bytes of all files.

    The hash is that of the lines "<sha256> <path>" of all files in order of their paths.
    """
    digest, size = _hash(path, limits)
    contents = _contents(path, limits)
    names = [keys for keys in _entries(contents) if keys[0] in COLLECTIONS]
    others = tuple(sorted({keys[0] for keys in _entries(contents)} - set(COLLECTIONS)))
    if not any(keys[0] == "params" for keys in names):
        raise Refusal('the Orbax checkpoint has no "params" at its top; save {"params": …, "batch_stats": …}')
    opened_arrays, total = {}, 0
    for keys in names:
        array = _open(path, keys, contents)
        total += _cost(array, keys)
        if total > limits.unpacked(size):
            raise Refusal(f"array {quote('/'.join(keys))} of shape {array.shape} claims more than the folder can hold")
        opened_arrays["/".join(keys)] = array
    try:
        return {name: np.asarray(array.read().result()) for name, array in opened_arrays.items()}, others, digest, size
    except ValueError as error:
        raise Refusal(f"an array is damaged: {quote(str(error))}") from None


def _hash(path: pathlib.Path, limits: Limits) -> tuple[str, int]:
    digest, total = hashlib.sha256(), 0
    for count, entry in enumerate(sorted(path.rglob("*"))):
        if count > limits.entries or entry.is_symlink():
            raise Refusal("the folder holds too many files" if count > limits.entries else "the folder holds links")
        if entry.is_dir() or not entry.stat().st_size:
            continue
        with opened(entry, limits) as (file, size):
            total += size
            if total > limits.file_bytes:
                raise Refusal(f"the folder has more than {limits.file_bytes:,} bytes")
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {entry.relative_to(path)}\n".encode())
    return digest.hexdigest(), total


def _contents(path: pathlib.Path, limits: Limits) -> dict[str, Any]:
    with opened(path / CONTENTS, limits) as (file, size):
        if size > limits.header_bytes:
            raise Refusal(f"{CONTENTS} has {size:,} bytes; the limit is {limits.header_bytes:,}")
        try:
            contents = json.loads(file.read().decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refusal(f"{CONTENTS} is not valid JSON") from None
    if not isinstance(contents, dict) or not isinstance(contents.get("tree_metadata"), dict):
        raise Refusal(f"{CONTENTS} is not that of an Orbax checkpoint")
    if len(contents["tree_metadata"]) > limits.tensors:
        raise Refusal(f"it holds {len(contents['tree_metadata']):,} arrays; the limit is {limits.tensors:,}")
    return contents


def _entries(contents: dict[str, Any]) -> list[tuple[str, ...]]:
    """Keys that lead to each array; branches without arrays are left out."""
    found = []
    for entry in contents["tree_metadata"].values():
        try:
            keys = tuple(step["key"] for step in entry["key_metadata"])
            empty = entry["value_metadata"]["skip_deserialize"]
        except (KeyError, TypeError):
            raise Refusal(f"{CONTENTS} is not that of an Orbax checkpoint") from None
        if not keys or not all(type(key) is str and key.isprintable() and 0 < len(key) <= 256 for key in keys):
            raise Refusal(f"{CONTENTS} holds an array without a proper name")
        if any("/" in key or key in (".", "..") for key in keys):
            raise Refusal(f"{CONTENTS} names an array {quote('/'.join(keys))}")
        if not empty:
            found.append(keys)
    return found


def _open(path: pathlib.Path, keys: tuple[str, ...], contents: dict[str, Any]) -> Any:
    """The TensorStore of one array: its shape and type are known, nothing is read yet."""
    import tensorstore

    base = {"driver": "file", "path": f"{path.resolve()}/"}
    name = ".".join(keys) + "/"
    if contents.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": base, "path": name}
    else:
        store = {**base, "path": base["path"] + name}
    driver = "zarr3" if contents.get("use_zarr3") else "zarr"
    try:
        return tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
    except ValueError as error:
        raise Refusal(f"array {quote('/'.join(keys))} cannot be opened: {quote(str(error))}") from None


def _cost(array: Any, keys: tuple[str, ...]) -> int:
    """Bytes that reading the array takes: its own, or those of one stored block where that is larger."""
    dtype = array.dtype.numpy_dtype
    if dtype not in DTYPES.values():
        raise Refusal(f"array {quote('/'.join(keys))} is of type {quote(str(dtype))}, which is not read")
    block = array.chunk_layout.read_chunk.shape
    return dtype.itemsize * max(math.prod(array.shape), math.prod(block))
