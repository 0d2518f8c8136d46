"""Reads the pickle inside a PyTorch file without Python's unpickler, with an allow-list of
instructions and names.

`pickle.Unpickler` with a strict `find_class` runs no foreign code, but it still hashes, allocates
and grows its memo as the file dictates, which a hostile file can turn into hours or gigabytes.
Instead, the few instructions that model files need are interpreted here; each checks its arguments
and accounts for its cost.

`find_class` is the only place where a name from the file gets a meaning: by exact look-up in
`ALLOWED`, and as an inert value of ours, never the real object. Any other name becomes a `Foreign`
value, and any operation on a `Foreign` value gives another one, because settings and schedulers may
be stored beside the weights. Names that only serve to run code are refused.
"""

import collections
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.allowed import (
    ALLOWED,
    DEVICE,
    OPAQUE_STORAGES,
    Foreign,
    NumpyArray,
    Storage,
    Symbol,
    is_count,
    numpy_values,
    runs_code,
)
from jaxbd.interop.handed import Handed, parts
from jaxbd.limits import Limits, Refusal, quote

MAX_INTEGER_BYTES = 255
CHECKED = 64
"""Number of simple steps between two checks of the deadline; calls and groups check it each
time."""
MOST_NAME = 256
"""Maximum length in characters of a name that a pickle asks for."""
SMALL_KEY = 1 << 20
"""Integer keys below this are too few to be chosen so that they collide."""
NO_HASH = (dict, collections.OrderedDict, list, NumpyArray)
"""Types that are not hashable, so neither they nor a tuple containing one can be a dictionary
key."""
_LITTLE_ENDIAN = [
    (version, order, None, None, None, -1, -1, 0) for version in (3, 4) for order in ("<", "|")
]
"""The pickled states of a NumPy dtype in little-endian or irrelevant byte order."""


class Machine:
    """Interprets one pickle in `data` from `start`.

    Attributes:
      reference: number of parts in a reference to a storage: 5 in a zip archive, 6 in a stream, 0
        where references are not allowed.
      storages: key -> every storage that was referred to, in order of first reference.
      position: once `run` has returned, the index after the last instruction.
    """

    def __init__(self, data: bytes, start: int, limits: Limits, reference: int = 5):
        self.data, self.position, self.limits = data, start, limits
        self.reference = reference
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.left, self.integer_keys = limits.instructions, limits.integer_keys
        self.deadline = limits.deadline("the pickle", len(data))
        self.handed = Handed([], [])

    def run(self) -> Any:
        """Returns the pickled value. Raises Refusal at the first thing that a tensor file does not
        need."""
        while True:
            self.spend(1)
            code = self.take(1)
            if code == pickle.STOP:
                value = self.pop()
                self.handed.check(value, self.spend)
                return value
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise Refusal(
                    f"the pickle uses the instruction {_instruction_name(code)}, which no model"
                    " file needs"
                )
            instruction(self)

    def spend(self, cost: int) -> None:
        """Accounts for `cost` steps. Raises Refusal when the steps or the time run out."""
        self.left -= cost
        if self.left < 0:
            raise Refusal(f"the pickle takes more than {self.limits.instructions:,} steps")
        if cost > 1 or self.left % CHECKED == 0:
            self.deadline.check()

    def take(self, count: int) -> bytes:
        """The next `count` bytes. A length claimed by the file is checked against the bytes left
        before it is used."""
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
            raise Refusal("the pickle takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise Refusal("the pickle takes a value from an empty stack")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise Refusal("the pickle closes a group that it never opened")
        items, self.stack = self.stack, self.below.pop()
        return items

    def find_class(self, module: Any, name: Any) -> Symbol | Foreign:
        """The only way in for names: exact matches in `ALLOWED`. Any other name becomes inert or is
        refused."""
        if type(module) is not str or type(name) is not str:
            raise Refusal("the pickle asks for a name that is not text")
        symbol = ALLOWED.get((module, name))
        if symbol is not None:
            return symbol
        full = f"{module[:MOST_NAME]}.{name[:MOST_NAME]}"
        if module == "torch" and name in OPAQUE_STORAGES:
            return Foreign(full, is_name=True)
        if len(module) + len(name) >= MOST_NAME or not _is_plain_name(full):
            raise Refusal(f"the pickle asks for {quote(full)}, which is not the name of a type")
        if runs_code(module, name):
            raise Refusal(
                f"the pickle asks for {quote(full)}, which can run code; do not load this file"
                " with anything else, and ask where it comes from"
            )
        return Foreign(full, is_name=True)

    def remember(self, index: int) -> None:
        # picklers number the memo 0, 1, 2, …; other numbers could only serve to cause hash
        # collisions
        if index > len(self.memo) + 1:
            raise Refusal("the pickle numbers its values out of order")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refusal("the pickle refers to a value that it never made")
        self.push(self.memo[index])

    def set_items(self, target: Any, items: list[Any]) -> None:
        self.spend(len(items))
        if type(target) is Foreign:
            self.fill(target, items)
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Refusal("the pickle puts entries into something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if self._is_cheap(key):
                if key in target:
                    raise Refusal("the pickle puts two entries under one key of a dictionary")
                target[key] = value
            else:
                if any(type(part) in NO_HASH for part in parts(key, self.spend)):
                    raise Refusal("a dictionary has a key that is not hashable")
                # hashing a key that the file chose could take hours: the entry is dropped and
                # reported as such
                dropped = [key, value, target.get(ODD_KEY)]
                name = f"an entry under a {type(key).__name__}"
                target[ODD_KEY] = Foreign(name, items=dropped)

    def _is_cheap(self, key: Any) -> bool:
        """Whether the file cannot drive up the cost of `key` as a dictionary key."""
        if type(key) in (str, bytes, bool, type(None)):
            return True
        if type(key) is int and abs(key) < SMALL_KEY:
            return True
        # beyond 2**61 different numbers can have the same hash
        if type(key) not in (int, float) or not abs(key) < 1 << 60:
            return False
        self.integer_keys -= 1
        return self.integer_keys >= 0

    def append_items(self, target: Any, items: list[Any]) -> None:
        self.spend(len(items))
        if type(target) is Foreign:
            self.fill(target, items)
            return
        if type(target) is not list:
            raise Refusal("the pickle appends to something that is not a list")
        target.extend(items)

    def add_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not Foreign:
            raise Refusal("the pickle adds to something that is not a set")
        self.spend(len(items))
        self.fill(target, items)

    def fill(self, target: Foreign, given: Any, *, is_state: bool = False) -> None:
        """Records what a foreign object is filled with. Filling a class instead of an instance is
        refused: other readers fail there."""
        if target.is_name:
            raise Refusal(f"the pickle fills {quote(target.name)}, which is not an instance")
        self.handed.fill(target, given, is_state=is_state)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.spend(8)  # a call costs about as much as 8 other instructions
        if type(function) is Foreign:
            self.push(self.handed.call(function, arguments))
            return
        if type(function) is not Symbol or function.build is None or type(arguments) is not tuple:
            raise Refusal("the pickle calls something that cannot be called")
        self.push(function.build(self, arguments))

    def new_object(self, parts: int) -> None:
        """NEWOBJ and NEWOBJ_EX: an instance of a foreign class. No allowed value is made this
        way."""
        given = [self.pop() for _ in range(parts)]
        made = self.pop()
        if type(made) is not Foreign:
            raise Refusal("the pickle makes an object of something that is not a class")
        self.push(self.handed.call(made, given))

    def build(self) -> None:
        """BUILD: sets the state of an object. Accepted are a state_dict's `_metadata`, the byte
        order of a NumPy dtype and the contents of a NumPy array; the state of a foreign object is
        dropped."""
        state, target = self.pop(), self.top()
        if type(target) is Foreign:
            self.fill(target, state, is_state=True)
        elif (
            type(target) is collections.OrderedDict
            and type(state) is dict
            and len(state) == 1
            and "_metadata" in state
        ):
            target._metadata = state["_metadata"]  # pyright: ignore[reportAttributeAccessIssue]
        elif type(target) is Symbol and isinstance(target.fact, np.dtype) and type(state) is tuple:
            if state not in _LITTLE_ENDIAN:
                raise Refusal("a number is stored in a byte order that is not supported")
        elif type(target) is NumpyArray and type(state) is tuple and len(state) == 5:
            self._fill(target, state)
        else:
            raise Refusal("the pickle sets attributes on an object")

    def _fill(self, target: NumpyArray, state: tuple) -> None:
        """Fills an array from the state (version, shape, type, is_fortran, bytes) of NumPy's
        `__setstate__`."""
        _, shape, kind, is_fortran, raw = state
        if target.values is not None:
            raise Refusal("a NumPy array is filled twice")
        target.raw = raw if type(raw) is bytes else None
        if type(kind) is not Foreign:
            target.values = numpy_values(self, shape, kind, is_fortran, raw)

    def persistent(self) -> None:
        """("storage", type, key, device, numel[, None]) -> Storage."""
        value = self.pop()
        parts = len(value) if type(value) is tuple else 0
        if not parts or parts != self.reference or value[0] != "storage":
            raise Refusal("a persistent reference in the pickle is not one to a storage")
        if len(value) == 6 and value[5] is not None:
            raise Refusal(
                "it uses storage views, which PyTorch gave up before 0.4; save it again with a"
                " newer version"
            )
        kind, key, numel = value[1], value[2], value[4]
        if type(key) is not str or len(key) > 64 or not is_count(numel):
            raise Refusal("a storage is described by something other than a key and a count")
        if type(kind) is Foreign:
            self.push(self._opaque(kind, value))
            return
        if (
            type(kind) is not Symbol
            or not isinstance(kind.fact, np.dtype)
            or not kind.name.endswith("Storage")
        ):
            raise Refusal("a storage has a type that is not supported")
        if type(value[3]) is not str or not DEVICE.fullmatch(value[3]):
            raise Refusal(f"storage {quote(key)} is on {quote(value[3])}, which is not a device")
        storage = Storage(key, kind.fact, numel, value[3])
        self._register(storage)
        self.push(storage)

    def _opaque(self, kind: Foreign, value: tuple) -> Foreign:
        """A storage of an unsupported type. It is registered so that a stream can skip it."""
        size = OPAQUE_STORAGES.get(kind.name.removeprefix("torch."), 0)
        if not size:
            raise Refusal(f"a storage is of type {quote(kind.name)}, which is not supported")
        _, _, key, device, numel = value[:5]
        self._register(Storage(key, np.dtype(f"V{size}"), numel, str(device)[:64]))
        return Foreign(kind.name)

    def _register(self, storage: Storage) -> None:
        """Records a storage. Raises Refusal if an earlier reference describes it differently:
        PyTorch uses the type, size and device of the first reference for all of them."""
        key = storage.key
        if self.storages.setdefault(key, storage) != storage:
            raise Refusal(f"storage {quote(key)} is described with two types, sizes or devices")


ODD_KEY = Foreign("a key that is not text or a number")
"""Key that replaces all unsupported keys of a dictionary."""


def _instruction_name(code: bytes) -> str:
    # the type stubs lack `code2op`
    known = pickletools.code2op.get(  # pyright: ignore[reportAttributeAccessIssue]
        code.decode("latin1")
    )
    return known.name if known else quote(code)


def _is_plain_name(full: str) -> bool:
    """Whether `full` is the dotted name of a class or function, without special attributes like
    `__globals__`."""
    parts = full.split(".")
    return all(part.isidentifier() and part.isascii() for part in parts) and not any(
        part.startswith("__") and part not in ("__main__", "__builtin__", "__import__")
        for part in parts
    )


def _integer(machine: Machine) -> None:
    size = machine.number("<B")
    if size > MAX_INTEGER_BYTES:
        raise Refusal("the pickle holds an integer of unreasonable size")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _long_integer(machine: Machine) -> None:
    size = machine.number("<i")
    if size < 0:
        raise Refusal("the pickle holds an integer of unreasonable size")
    machine.take(size)
    machine.push(Foreign("an integer of more than 255 bytes"))


def _pop_group(machine: Machine) -> None:
    machine.since_mark()


def _frozen_set(machine: Machine) -> None:
    made = Foreign("builtins.frozenset")
    machine.fill(made, machine.since_mark())
    machine.push(made)


def _add_all(machine: Machine) -> None:
    items = machine.since_mark()
    machine.add_items(machine.top(), items)


def _protocol(machine: Machine) -> None:
    if machine.number("<B") > 5:
        raise Refusal("the pickle has an unknown protocol")


def _frame(machine: Machine) -> None:
    """Frames have no effect here, but Python refuses one that is longer than the rest of the
    data."""
    if machine.number("<Q") > len(machine.data) - machine.position:
        raise Refusal("the pickle is cut off or claims more bytes than there are")


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
    pickle.FRAME: _frame,
    pickle.MARK: _mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: _integer,
    pickle.LONG4: _long_integer,
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.BINUNICODE: lambda m: m.push(m.text(m.number("<I"))),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.number("<B"))),
    # byte strings as Python 2 wrote them
    pickle.SHORT_BINSTRING: lambda m: m.push(m.text(m.number("<B"))),
    pickle.BINSTRING: lambda m: m.push(m.text(m.number("<I"))),
    pickle.BINUNICODE8: lambda m: m.push(m.text(m.number("<Q"))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.POP: lambda m: m.pop() and None,
    pickle.POP_MARK: _pop_group,
    pickle.EMPTY_SET: lambda m: m.push(Foreign("builtins.set")),
    pickle.ADDITEMS: _add_all,
    pickle.FROZENSET: _frozen_set,
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
    pickle.NEWOBJ: lambda m: m.new_object(1),
    pickle.NEWOBJ_EX: lambda m: m.new_object(2),
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.persistent,
}
"""The instructions that Python's pickler emits for protocols 2 to 5; all others (EXT, INST, OBJ,
NEXT_BUFFER, …) are refused."""
