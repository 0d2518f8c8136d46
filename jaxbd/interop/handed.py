"""Refuses a pickle that hands its weights to foreign functions.

Another reader calls these functions, and a function that can reach a weight can change it: that
reader would end up with other weights than those that are read here.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxbd.interop.allowed import Foreign, NumpyArray, Storage, Symbol, Tensor
from jaxbd.limits import Refusal, quote

REBUILDERS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")
"""Prefixes of PyTorch functions that make a tensor of another kind and do not modify their
arguments."""
CALL_THEIR_FIRST = "torch._tensor._rebuild_from_type"
"""Prefix of the functions among them that call their first argument."""
SET_THEIR_LAST = ("torch._utils._rebuild_parameter_with_state", CALL_THEIR_FIRST)
"""Prefixes of the functions among them that set the attributes listed in their last argument."""
IN_PLACE = ("real", "imag")
"""Attributes that, when set, overwrite a tensor's memory."""
CONTAINERS = (dict, list, collections.OrderedDict)

Spend = Callable[[int], None]


class Handed(NamedTuple):
    """What the foreign functions and objects of one pickle were given, as (name, value) pairs.

    Attributes:
      calls: given to a function, which could modify memory.
      fills: put into an object. The object stores it, and could modify only containers.
    """

    calls: list[tuple[str, Any]]
    fills: list[tuple[str, Any]]

    def call(self, function: Foreign, arguments: Any) -> Foreign:
        """Records a call; returns a placeholder for its result."""
        given = (function, arguments)
        (self.fills if _only_rebuilds(function, arguments) else self.calls).append(
            (function.name, given)
        )
        return Foreign(function.name, held=[given])

    def fill(self, target: Foreign, given: Any, *, is_state: bool = False) -> None:
        """Records what `target` is filled with.

        Picklers give items first and the state last. Whatever comes later may be carried out by
        what the object already has: `UserList` passes items on to its attribute `data`.
        """
        if target.held:
            # what was held before the last entry was recorded when that entry was added
            self.calls.append((target.name, target.held[-1]))
        self.fills.append((target.name, given))
        (target.held if is_state else target.items).append(given)

    def check(self, value: Any, spend: Spend) -> None:
        """Raises Refusal if a tensor or array in `value`, or a container of one, was handed on.

        Args:
          spend: accounts for the cost.
        """
        if not (self.calls or self.fills):
            return
        owner: dict[int, str] = {}
        memory: dict[str | int, str] = {}
        seen: set[int] = set()
        # calls first: what was seen there need not be looked at again
        for pairs in (self.calls, self.fills):
            for name, given in pairs:
                for part in parts(given, spend, seen, into_foreign=True):
                    if type(part) in CONTAINERS:
                        owner.setdefault(id(part), name)
                    elif pairs is self.calls:
                        for key in _memory(part):
                            memory.setdefault(key, name)
        for part in parts(value, spend):
            by = owner.get(id(part)) or next(filter(None, map(memory.get, _memory(part))), None)
            if by and any(type(x) in (Tensor, NumpyArray) for x in parts(part, spend)):
                raise Refusal(f"it hands its tensors to {quote(by)}, which is never called here")


def parts(
    value: Any, spend: Spend, seen: set[int] | None = None, *, into_foreign: bool = False
) -> Iterator[Any]:
    """`value` and everything in it.

    Args:
      seen: ids of the containers that were entered; each is entered only once.
      into_foreign: also enter what foreign values hold.
    """
    waiting, seen = [value], set() if seen is None else seen
    while waiting:
        part = waiting.pop()
        spend(1)
        yield part
        if id(part) in seen:
            continue
        if isinstance(part, (dict, list, tuple)) or (into_foreign and type(part) is Foreign):
            seen.add(id(part))
            waiting.extend(_inner(part))


def _inner(part: Any) -> Iterator[Any]:
    if type(part) is Foreign:
        yield from part.held
        yield from part.items
    elif isinstance(part, dict):
        yield from part.values()
        yield from (key for key in part if type(key) is bytes)
        yield getattr(part, "_metadata", None)
    else:
        yield from part


def _memory(part: Any) -> tuple[str | int, ...]:
    """Keys of the memory that a value's numbers are in."""
    if type(part) is Tensor:
        return (part.storage.key,)
    if type(part) is Storage:
        return (part.key,)
    if type(part) is NumpyArray:
        # NumPy reads a long array in place: it shares the memory of its bytes
        return (id(part), *_memory(part.raw))
    # shorter byte strings are shared by the whole interpreter
    return (id(part),) if type(part) is bytes and len(part) > 1 else ()


def _only_rebuilds(function: Foreign, arguments: Any) -> bool:
    """Whether a call only makes a tensor of another kind, see `REBUILDERS`."""
    if not function.is_name or not function.name.startswith(REBUILDERS):
        return False
    if type(arguments) is not tuple or not arguments:
        return False
    if function.name.startswith(CALL_THEIR_FIRST) and type(arguments[0]) is not Symbol:
        return False
    if not function.name.startswith(SET_THEIR_LAST):
        return True
    states = arguments[-1] if type(arguments[-1]) is tuple else (arguments[-1],)
    return all(
        state is None or (isinstance(state, dict) and not any(name in state for name in IN_PLACE))
        for state in states
    )
