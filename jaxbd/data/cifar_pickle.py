"""Reads the pickles of CIFAR's Python archives without executing anything.

Understands only plain containers, integers, strings and integer arrays. The few NumPy names that
such files mention resolve to stand-ins defined here, so no other code runs. Every other name is
refused.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from jaxbd.base import UserError
from jaxbd.data import bounded
from jaxbd.limits import Refusal

MAX_OPERATIONS = 800_000
"""Maximum pickle operations per file (CIFAR-100's training file has about 400,000)."""
FREE_ENCODED = 1 << 20
"""Bytes that calls to `encode` may produce in total, beyond the size of the file."""
_NEEDED = (
    "PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE"
    " TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 STRING BINSTRING"
    " SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES"
    " BINBYTES8 GLOBAL STACK_GLOBAL REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET"
    " LONG_BINGET"
)
_OPERATIONS = frozenset(_NEEDED.split())


def read(content: bytes, where: str) -> dict[str, Any]:
    """Reads a pickled dictionary; keys become text and arrays NumPy arrays.

    Python 2 strings are decoded as latin1.

    Args:
      where: the file's name in messages.
    Raises: UserError when the pickle mentions a name that is not allowed, or is broken.
    """
    try:
        _check_operations(content)
        batch = _Unpickler(content, where).load()
    except UserError:
        raise
    except Refusal as refusal:
        raise UserError(f"data {where}: {refusal}; fetch it again") from None
    except Exception:  # a broken pickle makes the parser raise anything; none of its code ran
        raise UserError(f"data {where} is not a readable CIFAR batch; fetch it again") from None
    if not isinstance(batch, dict):
        raise UserError(f"data {where} holds no dictionary; fetch it again")
    unwrap = lambda value: value.array if isinstance(value, _Array) else value
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: unwrap(value)
        for key, value in batch.items()
    }


def _check_operations(content: bytes) -> None:
    """Raises ValueError on an operation that no batch needs, or on too many operations."""
    deadline = bounded.LIMITS.deadline("its pickle", len(content))
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        del argument
        deadline.check()
        if operation.name not in _OPERATIONS or count > MAX_OPERATIONS:
            raise ValueError(operation.name)


class _Array:
    """Stand-in for a pickled ndarray.

    `array` is built from the pickled state (version, shape, dtype, fortran, bytes).
    """

    array: np.ndarray | None = None

    def __init__(self, budget: "_Budget"):
        self._budget = budget

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        content = self._budget.encode(content, "latin1") if isinstance(content, str) else content
        if not (
            isinstance(kind, _Dtype)
            and isinstance(content, bytes)
            and all(type(n) is int for n in shape)
        ):
            raise ValueError("not a plain array")
        self.array = np.frombuffer(content, kind.code).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stand-in for a pickled dtype: one of three integer types, little-endian."""

    def __init__(self, code: Any):
        if code not in ("u1", "i4", "i8"):
            raise ValueError("not a whole-number type")
        self.code = f"<{code}"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError("not little-endian")


class _Callable:
    """Stand-in for a pickled global: callable, but rejects state."""

    __slots__ = ("_answer",)

    def __init__(self, answer: Callable[..., Any]):
        self._answer = answer

    def __call__(self, *arguments: Any) -> Any:
        return self._answer(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function has no state")


class _Budget:
    """Encodes strings up to a total budget based on the file's size.

    Without it a small pickle could encode one memoized string again and again.
    """

    def __init__(self, size: int):
        self._left = size + FREE_ENCODED

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Stand-in for `_codecs.encode`, by which Python 3 writes bytes in old protocols."""
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("not latin1 text")
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("more encoded bytes than the file has")
        return text.encode("latin1")


def _answers(budget: _Budget) -> dict[tuple[str, str], Callable[..., Any]]:
    """{(module, name): its stand-in}."""
    array = lambda *_: _Array(budget)
    return {
        ("numpy.core.multiarray", "_reconstruct"): array,
        ("numpy._core.multiarray", "_reconstruct"): array,
        ("numpy", "ndarray"): array,
        ("numpy", "dtype"): lambda code, *_: _Dtype(code),
        ("_codecs", "encode"): budget.encode,
    }


# Python's unpickler, not the C one, which allocates as large a memo as the file claims.
class _Unpickler(pickle._Unpickler):
    """Resolves only the names in `_answers` and allows only strings as dictionary keys.

    Raises: UserError for any other name.
    """

    # attributes of the Python unpickler that the type stubs omit
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes, where: str):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._where, self._answers = where, _answers(_Budget(len(content)))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._answers:
            wanted = f"{module}.{name}"[:80]
            raise UserError(
                f"data {self._where} is refused, its pickle asks for {wanted!r}; fetch the"
                " original one"
            )
        return _Callable(self._answers[module, name])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        # hashing deeply nested tuples can take forever or exhaust the C stack
        if not isinstance(self.stack[-1], dict) or not all(
            isinstance(key, str | bytes) for key in items[::2]
        ):
            raise ValueError("keys must be strings")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }
