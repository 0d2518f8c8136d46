"""The names that a pickle in a PyTorch file may use, and the inert values they become.

No name resolves to the real object. `torch._utils._rebuild_tensor_v2` becomes a description of a
tensor, a NumPy scalar becomes a Python number, and a name that is not listed becomes a `Foreign`
value, which is never called or inspected. Every builder checks its arguments, because the file
chose them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, final

import ml_dtypes
import numpy as np

from jaxbd.limits import Refusal

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
"""Name of a storage class in module `torch` -> element type."""

OPAQUE_STORAGES: dict[str, int] = {
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "QInt32Storage": 4,
    "QInt8Storage": 1,
    "QUInt2x4Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt8Storage": 1,
    "storage.UntypedStorage": 1,
}
"""Storage classes of types that weights do not have -> bytes per element. These are skipped."""

DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|mlu|musa|xla)(:[0-9]{1,3})?")
"""Devices whose tensors have their values in the file; tensors on "meta" have none."""
NUMPY_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
MAX_RANK = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """`numel` elements of `dtype`, stored in the file under `key`; `location` is the device they
    were saved from."""

    key: str
    dtype: np.dtype
    numel: int
    location: str = "cpu"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; offset and stride are in elements. The bounds are checked, but
    no data has been read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """Placeholder for a value of an unsupported type; its contents are never used.

    Attributes:
      name: the class or function that the file asked for, e.g. "argparse.Namespace".
      is_name: True for the class or function itself, False for the result of calling it.
      held: what it was made from, and its state, for `handed`.
      items: the items that were put into it, for `handed`.
    """

    name: str
    is_name: bool = False
    held: list[Any] = dataclasses.field(default_factory=list, repr=False)
    items: list[Any] = dataclasses.field(default_factory=list, repr=False)


@final
@dataclasses.dataclass(slots=True, eq=False)
class NumpyArray:
    """A NumPy array in the file; `values` and the `raw` bytes that hold them are None until a later
    instruction supplies them."""

    values: np.ndarray | None = None
    raw: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """The meaning of an allowed name: one of our builders, or a constant.

    Attributes:
      build: (machine, arguments) -> value; the `unpickle.Machine` accounts for the cost.
      fact: the constant, e.g. a dtype.
    """

    name: str
    build: Callable[[Any, tuple], Any] | None = None
    fact: Any = None


def is_count(value: Any) -> bool:
    # not isinstance: True is an int too
    return type(value) is int and 0 <= value < 1 << 40


def is_counts(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) <= MAX_RANK
        and all(is_count(number) for number in value)
    )


def _check_bounds(
    storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """Raises Refusal if the view reaches outside its storage."""
    elements = 1
    for size in shape:
        elements *= max(size, 1)
    if elements >= 1 << 40:
        raise Refusal(f"a tensor claims the shape {shape}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise Refusal(
            f"a tensor of shape {shape} reaches outside its storage of {storage.numel} elements"
        )


def _rebuild_tensor(machine: Any, arguments: tuple) -> Tensor | Foreign:
    """torch._utils._rebuild_tensor(storage, offset, size, stride). A tensor of an opaque type
    becomes `Foreign`."""
    if len(arguments) == 4 and type(arguments[0]) is Foreign:
        return Foreign(f"a tensor of {arguments[0].name}", held=[arguments[0]])
    if len(arguments) != 4 or type(arguments[0]) is not Storage:
        raise Refusal("a tensor is rebuilt from something other than a storage")
    storage, offset, shape, stride = arguments[:4]
    if not (
        is_count(offset) and is_counts(shape) and is_counts(stride) and len(shape) == len(stride)
    ):
        raise Refusal("a tensor has a shape, stride or offset that makes no sense")
    _check_bounds(storage, offset, shape, stride)
    if any(extra for extra in arguments[5:]):
        return Foreign("a tensor with hooks or flags", held=[storage])
    return Tensor(storage, offset, shape, stride)


def _rebuild_tensor_v2(machine: Any, arguments: tuple) -> Tensor | Foreign:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[,
    metadata]).

    Hooks, and flags like "negated", change what the stored numbers mean. A tensor that has them
    becomes `Foreign`: it may appear beside the weights, but not among them.
    """
    if len(arguments) not in (6, 7):
        raise Refusal("a tensor is rebuilt from something other than a storage")
    tensor = _rebuild_tensor(machine, arguments[:4])
    metadata = arguments[6] if len(arguments) == 7 else None
    if isinstance(tensor, Foreign):
        return tensor
    _check_gradient(tensor, arguments[4])
    if not _is_empty(arguments[5]) or not (metadata is None or _is_empty(metadata)):
        return Foreign("a tensor with hooks or flags", held=[tensor])
    return tensor


def _rebuild_tensor_v3(machine: Any, arguments: tuple) -> Foreign:
    """torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[,
    metadata]): a tensor of a type that has no storage class, such as uint16 or float8."""
    if len(arguments) not in (7, 8) or type(arguments[6]) not in (Foreign, Symbol):
        raise Refusal("a tensor is rebuilt from something other than a storage and a type")
    return Foreign(f"a tensor of {arguments[6].name}", held=[arguments])


def _rebuild_parameter(machine: Any, arguments: tuple) -> Tensor | Foreign:
    if len(arguments) == 3 and type(arguments[0]) is Foreign:
        return arguments[0]
    if len(arguments) != 3 or type(arguments[0]) is not Tensor or not _is_empty(arguments[2]):
        raise Refusal("a parameter is rebuilt from something other than a tensor")
    _check_gradient(arguments[0], arguments[1])
    return arguments[0]


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _check_gradient(tensor: Tensor, wanted: Any) -> None:
    """Integers and booleans have no gradient: PyTorch refuses a file that asks for one."""
    if type(wanted) is not bool or (wanted and tensor.storage.dtype.kind in "iub"):
        raise Refusal("a tensor's requires_grad makes no sense")


def _ordered_dict(machine: Any, arguments: tuple) -> collections.OrderedDict:
    """OrderedDict() or, as Python 2 wrote it, OrderedDict([[key, value], …])."""
    result = collections.OrderedDict()
    if arguments == ():
        return result
    pairs = arguments[0]
    if len(arguments) != 1 or type(pairs) is not list:
        raise Refusal("an OrderedDict is made from something other than pairs")
    machine.spend(len(pairs))
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise Refusal("an OrderedDict is made from something other than pairs")
    machine.set_items(result, [item for pair in pairs for item in pair])
    return result


def _torch_size(machine: Any, arguments: tuple) -> tuple[int, ...]:
    if len(arguments) != 1 or not is_counts(arguments[0]):
        raise Refusal("a torch.Size is made from something other than counts")
    return arguments[0]


def _torch_device(machine: Any, arguments: tuple) -> Symbol:
    """torch.device("cuda:0") or torch.device("cuda", 0). The arguments are checked, the device is
    not recorded."""
    name = arguments[0] if arguments and type(arguments[0]) is str else ""
    index = arguments[1:] == () or (":" not in name and is_count(arguments[1]))
    if len(arguments) > 2 or not index or not DEVICE.fullmatch(name):
        raise Refusal("a torch.device is made from something other than the name of a device")
    return Symbol("torch.device")


def _numpy_dtype(machine: Any, arguments: tuple) -> Symbol | Foreign:
    if len(arguments) != 3 or type(arguments[0]) is not str:
        raise Refusal("a NumPy type is made from something other than its name")
    if not all(type(flag) in (bool, int) for flag in arguments[1:]):
        raise Refusal("a NumPy type is made from something other than its name")
    if arguments[0] not in NUMPY_SCALARS:
        return Foreign(f"numpy.dtype {arguments[0][:16]}")
    return Symbol("numpy.dtype", fact=np.dtype("<" + arguments[0]))


def _latin1(machine: Any, arguments: tuple) -> bytes:
    """_codecs.encode(text, "latin1"): how pickle protocol 2 writes bytes."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
        raise Refusal("the pickle encodes text for something other than bytes")
    # the file can encode one memoised text any number of times
    machine.spend(len(arguments[0]) // 16)
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        raise Refusal("the pickle encodes text that is not bytes") from None


def _numpy_scalar(machine: Any, arguments: tuple) -> int | float | bool | Foreign:
    """A NumPy number becomes the Python number of the same value."""
    kind, raw = arguments if len(arguments) == 2 else (None, None)
    if type(kind) is Foreign:
        return Foreign(f"a NumPy value of {kind.name}")
    if type(kind) is not Symbol or kind.name != "numpy.dtype" or type(raw) is not bytes:
        raise Refusal("a NumPy number is made from something other than a type and bytes")
    if len(raw) != kind.fact.itemsize or (kind.fact.kind == "b" and raw not in (b"\0", b"\1")):
        raise Refusal("a NumPy number has too many or too few bytes")
    return np.frombuffer(raw, kind.fact)[0].item()


def _numpy_reconstruct(machine: Any, arguments: tuple) -> NumpyArray:
    """_reconstruct(ndarray, (0,), b"b"): an empty array for a later BUILD instruction to fill."""
    if len(arguments) != 3 or type(arguments[0]) is not Symbol:
        raise Refusal("a NumPy array is made from something other than its type")
    return NumpyArray()


def _numpy_frombuffer(machine: Any, arguments: tuple) -> NumpyArray | Foreign:
    """_frombuffer(buffer, dtype, shape, order): how pickle protocol 5 writes an array."""
    if len(arguments) != 4:
        raise Refusal("a NumPy array is made from something other than a buffer, type and shape")
    raw, kind, shape, order = arguments
    if type(kind) is Foreign:
        return Foreign(f"a NumPy array of {kind.name}", held=[raw])
    return NumpyArray(numpy_values(machine, shape, kind, order == "F", raw), raw)


def numpy_values(machine: Any, shape: Any, kind: Any, is_fortran: Any, raw: Any) -> np.ndarray:
    """The array stored in `raw`. Raises Refusal unless type, shape and length agree."""
    if type(kind) is not Symbol or not isinstance(kind.fact, np.dtype) or not is_counts(shape):
        raise Refusal("a NumPy array is described by something other than a shape and a type")
    if type(raw) is not bytes or len(raw) != math.prod(shape) * kind.fact.itemsize:
        raise Refusal(f"a NumPy array of shape {shape} has too many or too few bytes")
    if kind.fact.kind == "b":
        machine.spend(len(raw) // 1024)  # the file can turn one byte string into many arrays
        if np.frombuffer(raw, np.uint8).max(initial=0) > 1:
            raise Refusal("a NumPy array holds booleans that are neither 0 nor 1")
    # `raw` bounds every shape but an empty one; NumPy cannot hold every empty shape either
    if math.prod(max(size, 1) for size in shape) >= 1 << 40:
        raise Refusal(f"a NumPy array claims the shape {shape}")
    return np.frombuffer(raw, kind.fact).reshape(shape, order="F" if is_fortran else "C")


RUNS_CODE = frozenset(
    """
    __main__.__builtins__ _ctypes _pickle _posixsubprocess _pytest asyncio bdb builtins.__import__
    builtins.breakpoint builtins.compile builtins.delattr builtins.eval builtins.exec
    builtins.execfile builtins.globals builtins.input builtins.locals builtins.open
    builtins.setattr builtins.vars cloudpickle code codeop commands ctypes dill distutils ftplib
    gc http httplib importlib io.open io.FileIO joblib marshal multiprocessing nt numpy.load
    numpy.lib.npyio.load numpy.f2py numpy.testing operator.attrgetter operator.methodcaller
    operator.call operator.delitem operator.setitem operator.ior operator.iadd os pdb pickle
    pip pkgutil posix posixpath.os profile pty pydoc requests runpy shelve shutil signal smtplib
    socket socketserver ssl subprocess sys tempfile timeit torch._dynamo torch._inductor
    torch.compile torch.distributed.run torch.hub torch.jit torch.load torch.serialization.load
    torch.storage._load_from_bytes torch.utils.cpp_extension trace types.CodeType
    types.FunctionType urllib urllib2 urllib3 webbrowser xmlrpc zipimport
    """.split()  # noqa: SIM905 (a list of names is read more easily than one of quoted names)
)
"""Modules and names that a model file could only want in order to run code or to tamper with the
loaded values. A file that asks for one is refused outright."""


def runs_code(module: str, name: str) -> bool:
    """Whether `module.name`, or one of its parent modules, is in `RUNS_CODE`. Understands Python
    2's names too."""
    module = {"__builtin__": "builtins", "__builtins__": "builtins"}.get(module, module)
    parts = f"{module}.{name}".split(".")
    return any(".".join(parts[:count]) in RUNS_CODE for count in range(1, len(parts) + 1))


ALLOWED: dict[tuple[str, str], Symbol] = {
    ("collections", "OrderedDict"): Symbol("OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor"): Symbol("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Symbol("_rebuild_tensor_v2", _rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Symbol("_rebuild_tensor_v3", _rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Symbol("_rebuild_parameter", _rebuild_parameter),
    ("torch", "Size"): Symbol("torch.Size", _torch_size),
    ("torch", "device"): Symbol("torch.device", _torch_device),
    ("numpy", "dtype"): Symbol("dtype", _numpy_dtype),
    ("numpy.core.multiarray", "scalar"): Symbol("scalar", _numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Symbol("scalar", _numpy_scalar),
    ("numpy", "ndarray"): Symbol("numpy.ndarray"),
    ("_codecs", "encode"): Symbol("encode", _latin1),
    **{
        (f"numpy.{core}.{module}", name): Symbol(name, build)
        for core in ("core", "_core")
        for module, name, build in (
            ("multiarray", "_reconstruct", _numpy_reconstruct),
            ("numeric", "_frombuffer", _numpy_frombuffer),
        )
    },
    **{
        ("torch", name): Symbol(f"torch.{name}", fact=dtype)
        for name, dtype in STORAGE_TYPES.items()
    },
    **{
        ("torch", name): Symbol(f"torch.{name}")
        for name in (
            "float16",
            "bfloat16",
            "float32",
            "float64",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "bool",
        )
    },
}
"""(module, name) -> what the interpreter makes of it."""
