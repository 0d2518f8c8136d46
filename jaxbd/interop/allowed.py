"""The names a PyTorch file may use, and the inert values of ours that they become.

Nothing here is the thing that the name says: `torch._utils._rebuild_tensor_v2` becomes a description of a tensor, a
NumPy number becomes Python's. Every builder checks its arguments, which the file chose.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxbd.interop.files import Refusal

STORAGE_TYPES: dict[str, np.dtype] = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""Names in module `torch` -> element type."""

NUMPY_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
MAX_RANK = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A run of `numel` elements of `dtype` that lies in the file under `key`."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; offset and stride count elements. Nothing is read yet, bounds are checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """What an allowed name stands for: a builder of ours, or a plain fact.

    Attributes:
      build: (machine, arguments) -> value; `unpickle.Machine` counts what the building costs.
    """

    name: str
    build: Callable[[Any, tuple], Any] | None = None
    fact: Any = None


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def is_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(is_count(number) for number in value)


def _check_bounds(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """No element of the view may lie outside the storage."""
    elements = 1
    for size in shape:
        elements *= max(size, 1)
    if elements >= 1 << 40:
        raise Refusal(f"a tensor claims the shape {shape}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise Refusal(f"a tensor of shape {shape} reaches outside its storage of {storage.numel} elements")


def _rebuild_tensor(machine: Any, arguments: tuple) -> Tensor:
    """torch._utils._rebuild_tensor(storage, offset, size, stride) and _v2(…, requires_grad, hooks[, metadata])."""
    if len(arguments) not in (4, 6, 7) or type(arguments[0]) is not Storage:
        raise Refusal("a tensor is rebuilt from something else than a storage")
    storage, offset, shape, stride = arguments[:4]
    if not (is_count(offset) and is_counts(shape) and is_counts(stride) and len(shape) == len(stride)):
        raise Refusal("a tensor has a shape, stride or offset that makes no sense")
    if any(extra for extra in arguments[5:]):
        # hooks, or flags such as "negated", which change what the stored numbers mean
        raise Refusal("a tensor carries hooks or flags")
    _check_bounds(storage, offset, shape, stride)
    return Tensor(storage, offset, shape, stride)


def _rebuild_parameter(machine: Any, arguments: tuple) -> Tensor:
    if len(arguments) != 3 or type(arguments[0]) is not Tensor or arguments[2]:
        raise Refusal("a parameter is rebuilt from something else than a tensor")
    return arguments[0]


def _ordered_dict(machine: Any, arguments: tuple) -> collections.OrderedDict:
    """OrderedDict() or, as Python 2 wrote it, OrderedDict([[key, value], …])."""
    result = collections.OrderedDict()
    if arguments == ():
        return result
    pairs = arguments[0]
    if len(arguments) != 1 or type(pairs) is not list:
        raise Refusal("an OrderedDict is made from something else than pairs")
    machine.spend(len(pairs))
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise Refusal("an OrderedDict is made from something else than pairs")
    machine.set_items(result, [item for pair in pairs for item in pair])
    return result


def _torch_size(machine: Any, arguments: tuple) -> tuple[int, ...]:
    if len(arguments) != 1 or not is_counts(arguments[0]):
        raise Refusal("a torch.Size is made from something else than counts")
    return arguments[0]


def _torch_device(machine: Any, arguments: tuple) -> Symbol:
    return Symbol("torch.device")


def _numpy_dtype(machine: Any, arguments: tuple) -> Symbol:
    if not arguments or type(arguments[0]) is not str or arguments[0] not in NUMPY_SCALARS:
        raise Refusal("a NumPy value is of a type that is not a plain number")
    return Symbol("numpy.dtype", fact=np.dtype("<" + arguments[0]))


def _latin1(machine: Any, arguments: tuple) -> bytes:
    """How protocol 2 spells bytes."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
        raise Refusal("the pickle encodes text for something else than bytes")
    machine.spend(len(arguments[0]) // 16)
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        raise Refusal("the pickle encodes text that is not bytes") from None


def _numpy_scalar(machine: Any, arguments: tuple) -> int | float | bool:
    """A NumPy number becomes the Python number of the same value."""
    kind, raw = arguments if len(arguments) == 2 else (None, None)
    if type(kind) is not Symbol or kind.name != "numpy.dtype" or type(raw) is not bytes:
        raise Refusal("a NumPy number is made from something else than a type and bytes")
    if len(raw) != kind.fact.itemsize or (kind.fact.kind == "b" and raw not in (b"\0", b"\1")):
        raise Refusal("a NumPy number has too many or too few bytes")
    return np.frombuffer(raw, kind.fact)[0].item()


ALLOWED: dict[tuple[str, str], Symbol] = {
    ("collections", "OrderedDict"): Symbol("OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor"): Symbol("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Symbol("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Symbol("_rebuild_parameter", _rebuild_parameter),
    ("torch", "Size"): Symbol("torch.Size", _torch_size),
    ("torch", "device"): Symbol("torch.device", _torch_device),
    ("numpy", "dtype"): Symbol("dtype", _numpy_dtype),
    ("numpy.core.multiarray", "scalar"): Symbol("scalar", _numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Symbol("scalar", _numpy_scalar),
    ("_codecs", "encode"): Symbol("encode", _latin1),
    **{("torch", name): Symbol(f"torch.{name}", fact=dtype) for name, dtype in STORAGE_TYPES.items()},
    **{
        ("torch", name): Symbol(f"torch.{name}")
        for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
    },
}
"""Everything a file may name, and what we make of it."""
