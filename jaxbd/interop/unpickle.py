"""Reads the pickle inside a PyTorch file without Python's unpickler: an allow-list of instructions and of names.

`pickle.Unpickler` with a strict `find_class` runs no foreign code, but it still hashes, allocates and grows its memo
as the file says, which a hostile file turns into hours or gigabytes. So the few instructions that tensor files need
are interpreted here, each with its arguments checked and its cost counted. `find_class` keeps its meaning: the only
place where a name from the file becomes something, by exact look-up in `ALLOWED`, and what it becomes is ours, never
the thing the name says.
"""

import collections
import dataclasses
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxbd.interop.files import Limits, Refusal, quote

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
MAX_INTEGER_BYTES = 32


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
    """What an allowed name stands for: a builder of ours (machine, arguments) -> value, or a plain fact."""

    name: str
    build: Callable[["Machine", tuple], Any] | None = None
    fact: Any = None


class Machine:
    """Interprets one pickle in `data` from `start`.

    Attributes:
      storages: key -> Storage of everything that was referred to.
      position: index after the last instruction once `run` returned.
    """

    def __init__(self, data: bytes, start: int, limits: Limits):
        self.data, self.position, self.limits = data, start, limits
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.left, self.integer_keys = limits.instructions, limits.integer_keys

    def run(self) -> Any:
        """The pickled value. Raises Refusal on the first thing that a tensor file has no need of."""
        while True:
            self.spend(1)
            code = self.take(1)
            if code == pickle.STOP:
                return self.pop()
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise Refusal(f"the pickle uses the instruction {_instruction_name(code)}, which no tensor file needs")
            instruction(self)

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise Refusal(f"the pickle takes more than {self.limits.instructions:,} steps")

    def take(self, count: int) -> bytes:
        """The next `count` bytes; a length claimed by the file is held against what is there before it is used."""
        if count > len(self.data) - self.position:
            raise Refusal("the pickle is cut off or claims more bytes than there are")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, count: int) -> str:
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise Refusal("the pickle holds text that is not UTF-8") from None

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise Refusal("the pickle holds a name without an end")
        text = self.text(end - self.position)
        self.position += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise Refusal("the pickle takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Refusal("the pickle takes a value that is not there")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise Refusal("the pickle closes a group that it never opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def find_class(self, module: Any, name: Any) -> Symbol:
        """The one door for names: exact matches of `ALLOWED` only."""
        if type(module) is not str or type(name) is not str:
            raise Refusal("the pickle asks for a name that is not text")
        symbol = ALLOWED.get((module, name))
        if symbol is None:
            raise Refusal(f"the pickle asks for {quote(f'{module}.{name}')}, {_advice(module)}")
        return symbol

    def remember(self, index: int) -> None:
        # writers number the memo 0, 1, 2, …; other numbers would only serve to make the table collide
        if index > len(self.memo) + 1:
            raise Refusal("the pickle numbers its values out of order")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refusal("the pickle refers to a value that it never made")
        self.push(self.memo[index])

    def set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise Refusal("the pickle puts entries into something that is not a dictionary")
        self.spend(len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is int:
                self.integer_keys -= 1
                if self.integer_keys < 0:
                    raise Refusal(f"more than {self.limits.integer_keys:,} dictionary entries are keyed by numbers")
            elif type(key) is not str:
                raise Refusal(f"a dictionary is keyed by a {type(key).__name__}; only text and numbers are read")
            target[key] = value

    def append_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not list:
            raise Refusal("the pickle appends to something that is not a list")
        self.spend(len(items))
        target.extend(items)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Symbol or function.build is None or type(arguments) is not tuple:
            raise Refusal("the pickle calls something that cannot be called")
        self.push(function.build(self, arguments))

    def build(self) -> None:
        """State set on an object: a state_dict's `_metadata`, and the byte order of a NumPy type; nothing else."""
        state, target = self.pop(), self.top()
        if type(target) is collections.OrderedDict and type(state) is dict and len(state) == 1 and "_metadata" in state:
            target._metadata = state["_metadata"]
        elif type(target) is Symbol and isinstance(target.fact, np.dtype) and type(state) is tuple:
            if len(state) < 2 or type(state[1]) is not str or state[1] not in ("<", "|"):
                raise Refusal("a number is stored in a byte order that is not read")
        else:
            raise Refusal("the pickle sets attributes on an object")

    def persistent(self) -> None:
        """("storage", type, key, device, numel[, None]) -> Storage."""
        value = self.pop()
        if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
            raise Refusal("a reference out of the pickle is not one to a storage")
        if len(value) == 6 and value[5] is not None:
            raise Refusal("it uses storage views, which PyTorch gave up before 0.4; save it again with a newer one")
        kind, key, numel = value[1], value[2], value[4]
        if type(kind) is not Symbol or not isinstance(kind.fact, np.dtype) or not kind.name.endswith("Storage"):
            raise Refusal("a storage has a type that is not read")
        if type(key) is not str or len(key) > 64 or not _is_count(numel):
            raise Refusal("a storage is described by something else than a key and a count")
        storage = Storage(key, kind.fact, numel)
        known = self.storages.setdefault(key, storage)
        if known.numel * known.dtype.itemsize != numel * storage.dtype.itemsize:
            raise Refusal(f"storage {quote(key)} is described with two different sizes")
        self.push(storage)


def _instruction_name(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode("latin1"))
    return known.name if known else quote(code)


def _advice(module: str) -> str:
    if module.partition(".")[0] in sys.stdlib_module_names | {"__builtin__"}:
        return "which is not a tensor type"
    return "which is not a tensor type; if this is a whole pickled model, save model.state_dict() instead"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _is_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_RANK and all(_is_count(number) for number in value)


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


def _rebuild_tensor(machine: Machine, arguments: tuple) -> Tensor:
    """torch._utils._rebuild_tensor(storage, offset, size, stride) and _v2(…, requires_grad, hooks[, metadata])."""
    if len(arguments) not in (4, 6, 7) or type(arguments[0]) is not Storage:
        raise Refusal("a tensor is rebuilt from something else than a storage")
    storage, offset, shape, stride = arguments[:4]
    if not (_is_count(offset) and _is_counts(shape) and _is_counts(stride) and len(shape) == len(stride)):
        raise Refusal("a tensor has a shape, stride or offset that makes no sense")
    if any(extra for extra in arguments[5:]):
        # hooks, or flags such as "negated", which change what the stored numbers mean
        raise Refusal("a tensor carries hooks or flags")
    _check_bounds(storage, offset, shape, stride)
    return Tensor(storage, offset, shape, stride)


def _rebuild_parameter(machine: Machine, arguments: tuple) -> Tensor:
    if len(arguments) != 3 or type(arguments[0]) is not Tensor or arguments[2]:
        raise Refusal("a parameter is rebuilt from something else than a tensor")
    return arguments[0]


def _ordered_dict(machine: Machine, arguments: tuple) -> collections.OrderedDict:
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


def _torch_size(machine: Machine, arguments: tuple) -> tuple[int, ...]:
    if len(arguments) != 1 or not _is_counts(arguments[0]):
        raise Refusal("a torch.Size is made from something else than counts")
    return arguments[0]


def _torch_device(machine: Machine, arguments: tuple) -> Symbol:
    return Symbol("torch.device")


def _numpy_dtype(machine: Machine, arguments: tuple) -> Symbol:
    if not arguments or type(arguments[0]) is not str or arguments[0] not in NUMPY_SCALARS:
        raise Refusal("a NumPy value is of a type that is not a plain number")
    return Symbol("numpy.dtype", fact=np.dtype("<" + arguments[0]))


def _latin1(machine: Machine, arguments: tuple) -> bytes:
    """How protocol 2 spells bytes; only the few bytes of one number are needed."""
    if len(arguments) != 2 or type(arguments[0]) is not str or len(arguments[0]) > 8 or arguments[1] != "latin1":
        raise Refusal("the pickle encodes text for something else than a number")
    try:
        return arguments[0].encode("latin1")
    except UnicodeEncodeError:
        raise Refusal("the pickle encodes text that is not bytes") from None


def _numpy_scalar(machine: Machine, arguments: tuple) -> int | float | bool:
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


def _integer(machine: Machine) -> None:
    size = machine.number("<B")
    if size > MAX_INTEGER_BYTES:
        raise Refusal("the pickle holds an integer of unreasonable size")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _protocol(machine: Machine) -> None:
    if machine.number("<B") > 5:
        raise Refusal("the pickle is of an unknown protocol")


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.find_class(module, name))


def _mark(machine: Machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def instruction(machine: Machine) -> None:
        machine.push(tuple(reversed([machine.pop() for _ in range(count)])))

    return instruction


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.top(), [key, value])


def _set_items(machine: Machine) -> None:
    items = machine.since_mark()
    machine.set_items(machine.top(), items)


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.append_items(machine.top(), [value])


def _append_all(machine: Machine) -> None:
    items = machine.since_mark()
    machine.append_items(machine.top(), items)


INSTRUCTIONS: dict[bytes, Callable[[Machine], None]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: lambda m: m.number("<Q"),
    pickle.MARK: _mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: _integer,
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.BINUNICODE: lambda m: m.push(m.text(m.number("<I"))),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.number("<B"))),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.text(m.number("<B"))),
    pickle.BINSTRING: lambda m: m.push(m.text(m.number("<I"))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: _tuple_of(1),
    pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.APPEND: _append,
    pickle.APPENDS: _append_all,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.BINPUT: lambda m: m.remember(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
    pickle.BINGET: lambda m: m.recall(m.number("<B")),
    pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
    pickle.GLOBAL: lambda m: m.push(m.find_class(m.line(), m.line())),
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: Machine.reduce,
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.persistent,
}
"""The instructions that PyTorch's writers emit; all others (EXT, INST, OBJ, NEWOBJ, BYTEARRAY8, …) are refused."""
