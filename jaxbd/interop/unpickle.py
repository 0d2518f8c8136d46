"""Reads the pickle inside a PyTorch file without Python's unpickler: an allow-list of instructions and of names.

`pickle.Unpickler` with a strict `find_class` runs no foreign code, but it still hashes, allocates and grows its memo
as the file says, which a hostile file turns into hours or gigabytes. So the few instructions that tensor files need
are interpreted here, each with its arguments checked and its cost counted. `find_class` keeps its meaning: the only
place where a name from the file becomes something, by exact look-up in `ALLOWED`, and what it becomes is ours, never
the thing the name says.
"""

import collections
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.allowed import ALLOWED, Storage, Symbol, is_count
from jaxbd.interop.files import Limits, Refusal, quote

MAX_INTEGER_BYTES = 32


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
        if type(key) is not str or len(key) > 64 or not is_count(numel):
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
