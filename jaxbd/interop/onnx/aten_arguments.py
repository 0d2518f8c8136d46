"""Arguments of a torch.export program's operators, read from JSON."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxbd.limits import Refusal, quote

Arguments = Mapping[str, Any]
"""Name of an argument -> its value, as `decode` gives it."""
TYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float16),
    7: np.dtype(np.float32),
    8: np.dtype(np.float64),
    12: np.dtype(np.bool_),
    13: np.dtype(ml_dtypes.bfloat16),
}
"""Number of an element type in torch.export's schema -> NumPy dtype."""
IGNORED = ("as_device", "as_layout", "as_memory_format")
NEUTRAL = frozenset(
    [
        "copy",
        "cudnn_enable",
        "cudnn_enabled",
        "device",
        "generator",
        "half_to_float",
        "implicit",
        "layout",
        "memory_format",
        "non_blocking",
        "pin_memory",
    ]
)
"""Arguments that say where or how a result is computed and stored, not what it is."""


class Tensor(NamedTuple):
    """A tensor argument, by its name in the program."""

    name: str


class Recorded(Mapping[str, Any]):
    """Arguments that remember which of them a handler has read."""

    def __init__(self, given: Arguments):
        self._given, self._unread = given, set(given)

    def __getitem__(self, name: str) -> Any:
        self._unread.discard(name)
        return self._given[name]

    def __contains__(self, name: object) -> bool:
        return name in self._given  # asking is not reading

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def check_all_read(self) -> None:
        """Raises Refusal naming an argument that was given but not read, unless it cannot change
        the result."""
        for name in self._given:
            if name in self._unread - NEUTRAL and self._given[name] is not None:
                raise Refusal(
                    f"its argument {quote(name)} = {quote(self._given[name])} is not supported"
                )


def source(a: Arguments) -> Tensor:
    """The operator's main argument."""
    return a["self"] if "self" in a else a["input"]


def read_arguments(inputs: list[Any]) -> dict[str, Any]:
    """The arguments in an operator's JSON."""
    found = {}
    for given in inputs:
        name = given.get("name") if type(given) is dict else None
        if type(name) is not str or name in found:
            raise Refusal(f"an argument is {quote(given)}")
        found[name] = decode(given.get("arg"))
    return found


def decode(argument: Any) -> Any:
    """An argument's value: a number, string, None, `Tensor`, or a list of these. Raises Refusal for
    other kinds."""
    if type(argument) is not dict or len(argument) != 1:
        raise Refusal(f"an argument is {quote(argument)}")
    ((kind, value),) = argument.items()
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return _read_value(value)
    if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors", "as_sym_floats"):
        return [_read_value(each) for each in _list(value)]
    if kind == "as_none" or kind in IGNORED:
        return None
    plain = {
        "as_int": int,
        "as_float": float,
        "as_bool": bool,
        "as_string": str,
        "as_scalar_type": int,
    }
    if kind == "as_float" and type(value) in (int, str):
        return float(value)  # "Infinity" and "NaN" are stored as strings
    if kind in plain and type(value) is plain[kind]:
        return value
    lists = {"as_ints": int, "as_floats": float, "as_bools": bool}
    if kind in lists and all(type(each) in (int, float, bool) for each in _list(value)):
        return [lists[kind](each) for each in value]
    raise Refusal(f"an argument of kind {quote(kind)} is not supported")


def _read_value(value: Any) -> Any:
    """A tensor or symbolic number: {"name": …}, {"as_name": …}, {"as_int": …}, {"as_tensor": …} or
    {"as_none": …}."""
    if type(value) is dict and type(value.get("name", value.get("as_name"))) is str:
        return Tensor(str(value.get("name", value.get("as_name"))))
    if type(value) is dict and len(value) == 1:
        return decode(value)
    raise Refusal(f"an argument is {quote(value)}")


def _list(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > 4096:
        raise Refusal(f"an argument is {quote(value)}")
    return value
