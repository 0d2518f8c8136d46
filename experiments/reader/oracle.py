"""What the formats' own readers make of a file that jaxbd accepted: PyTorch in every mode it has,
safetensors.

A file that asks for names beyond `weights_only=True` (NumPy's numbers, settings) is read by PyTorch
with an unpickler of ours, in which every name but PyTorch's own ones becomes an inert stand-in.
"""

import collections
import contextlib
import importlib
import pathlib
import pickle
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors
import torch

from jaxbd.interop.container import Container


class Inert:
    """Stands for an object of any class: takes every argument, state and item, and does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__): ...
    def __setstate__(self, state): ...
    def __setitem__(self, key, value): ...
    def append(self, item): ...
    def extend(self, items): ...
    def add(self, item): ...
    def __call__(self, *_, **__):
        return self


torch_utils: Any = importlib.import_module("torch._utils")
multiarray: Any = importlib.import_module("numpy._core.multiarray")


def _of_genuine(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but that what is made of something inert is inert."""

    def call(*arguments: Any) -> Any:
        inert = any(each is Inert or isinstance(each, Inert) for each in arguments)
        return Inert() if inert else function(*arguments)

    return call


GENUINE = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, coding: text.encode("latin1"),
    ("torch._utils", "_rebuild_tensor"): _of_genuine(torch_utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _of_genuine(torch_utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _of_genuine(torch_utils._rebuild_parameter),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("numpy", "dtype"): _of_genuine(np.dtype),
    ("numpy.core.multiarray", "scalar"): _of_genuine(multiarray.scalar),
    ("numpy._core.multiarray", "scalar"): _of_genuine(multiarray.scalar),
}


class Confined(pickle.Unpickler):
    """Python's own interpreter of pickles, with no names to call but those above."""

    def find_class(self, module: str, name: str) -> Any:
        return GENUINE.get((module, name), Inert)


CONFINED = types.SimpleNamespace(
    __name__="confined",
    Unpickler=Confined,
    load=lambda file, **how: Confined(file, **how).load(),
    UnpicklingError=pickle.UnpicklingError,
)
ONLY_WEIGHTS: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
MODES: dict[str, Callable[[pathlib.Path], Any]] = {
    "weights_only": lambda path: torch.load(path, **ONLY_WEIGHTS),
    "mapped": lambda path: torch.load(path, **ONLY_WEIGHTS, mmap=True),
    "mapped, offsets calculated": lambda path: _calculated(path),
    "any names": lambda path: torch.load(
        path, map_location="cpu", weights_only=False, pickle_module=CONFINED
    ),
}
"""How PyTorch can be asked to read a file. A stream cannot be mapped."""
OTHER_MODES = ("mapped, offsets calculated", "any names")
"""Asked about one file in four, and about those that `weights_only` refuses."""
NARROWER = ("Unsupported global", "Unsupported operand", "Unsupported class")
"""What `weights_only` says of files that are sound but hold more than it takes."""


def _calculated(path: pathlib.Path) -> Any:
    from torch.utils.serialization import config

    with _set(config.load, "calculate_storage_offsets", True):
        return torch.load(path, **ONLY_WEIGHTS, mmap=True)


@contextlib.contextmanager
def _set(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def difference(read: Container, data: bytes, path: pathlib.Path) -> str:
    """How another reader understands the file `data` otherwise; "" where all agree.

    Args:
      read: what jaxbd read.
      path: where the file may be written for readers that want one.
    """
    if read.kind == "safetensors":
        return _safetensors(read, data)
    path.write_bytes(data)
    accepted, complaints = [], []
    every = zlib.crc32(data) % 4 == 0
    for mode, load in MODES.items():
        if read.kind == "torch-legacy" and mode.startswith("mapped"):
            continue
        if mode in OTHER_MODES and accepted and not every:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = load(path)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                if mode == "mapped, offsets calculated" or any(word in said for word in NARROWER):
                    continue
                complaints.append(f"{mode}: refused, {said[-300:]}")
                continue
        accepted.append(mode)
        if wrong := _unequal(read, theirs):
            complaints.append(f"{mode}: {wrong}")
    if not accepted:
        complaints.append("no mode of PyTorch reads it")
    return "; ".join(complaints)


def wrapped_difference(read: Container, data: bytes, path: pathlib.Path) -> str:
    """How PyTorch understands an archive in which jaxbd found a model file to unpack: it should not
    read the archive itself, or find the same in it."""
    path.write_bytes(data)
    for mode, load in MODES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = load(path)
            except Exception:
                continue
        try:
            wrong = _unequal(read, theirs)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            wrong = f"is built otherwise, {error!r}"
        if wrong:
            return f"{mode}: {wrong}"
    return ""


def _unequal(read: Container, theirs: Any) -> str:
    for name in read.nesting:
        theirs = theirs[int(name) if isinstance(theirs, list | tuple) else name]
    tensors = {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)}
    if set(tensors) != {read.prefix + name for name in read.tensors}:
        return f"its tensors are {sorted(map(str, tensors))[:5]}"
    for name, array in read.tensors.items():
        tensor = tensors[read.prefix + name].detach()
        if tuple(tensor.shape) != array.shape or str(tensor.dtype) != f"torch.{array.dtype.name}":
            return f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}"
        if _bytes(tensor) != array.tobytes():  # as bytes, since NaN does not equal itself
            return f"{name!r} holds other values"
    return ""


def _bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's values in dense order."""
    if not tensor.numel():
        return b""
    dense = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes()


def _safetensors(read: Container, data: bytes) -> str:
    try:
        theirs = dict(safetensors.deserialize(data))
    except Exception as error:
        return f"safetensors: refused, {error}"
    if set(theirs) != {read.prefix + name for name in read.tensors}:
        return f"safetensors: its tensors are {sorted(theirs)[:5]}"
    for name, array in read.tensors.items():
        other = theirs[read.prefix + name]
        if tuple(other["shape"]) != array.shape or bytes(other["data"]) != array.tobytes():
            return f"safetensors: {name!r} is {other['dtype']} {other['shape']} of other values"
    return ""
