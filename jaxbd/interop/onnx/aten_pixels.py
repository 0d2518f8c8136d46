"""Follows the integers of an integer image through a torch.export program."""

from collections.abc import Callable, Set
from typing import Any

from jaxbd.interop.onnx.aten_arguments import TYPES, Arguments, Tensor
from jaxbd.interop.onnx.stated import kind_of
from jaxbd.limits import Refusal, quote

HOLDING = tuple(TYPES[number] for number in (1, 3, 4, 5))
"""Integer types that can hold pixels of 0..255."""
VIEWS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "t",
        "contiguous",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "narrow",
        "dropout",
        "to",
    ]
)
"""Operators that may return a view of their input's memory."""
MOVING = VIEWS - {"dropout", "to"} | {"clone", "flip", "roll", "index", "index_select", "repeat"}
"""Operators that move or copy elements and leave them as they are."""
COMPARING = frozenset(["eq", "ne", "lt", "le", "gt", "ge", "_assert_tensor_metadata"])
ADDING = frozenset(["add", "sub", "rsub", "mul"])
CONVERTING = frozenset(["to", "_to_copy"])


def passes_on(
    base: str, arguments: Arguments, pixels: Set[str], kind: Callable[[Any], str]
) -> bool:
    """Whether the operator `base` passes an image's integers on as they are.

    Args:
      pixels: names of the values that hold them.
      kind: the kind of an argument's elements, "f" for floats.
    Raises: Refusal if PyTorch would compute the operator in integers, or not at all: the net
      computes it in floats.
    """
    given = [each for value in arguments.values() for each in _flat(value)] if pixels else []
    taken = [each for each in given if isinstance(each, Tensor) and each.name in pixels]
    if not taken or base in COMPARING:
        return False
    own, dtype = arguments.get("self"), arguments.get("dtype")
    if base == "div" or (base in ADDING and "f" in map(kind, (own, arguments.get("other")))):
        return False
    if base in CONVERTING and dtype is not None and kind_of(TYPES[dtype]) == "f":
        return False
    holds = base in MOVING or (base in CONVERTING and (dtype is None or TYPES[dtype] in HOLDING))
    if taken != [own] or not holds:
        raise Refusal(
            f"it takes the image's integers ({quote(taken[0].name)}), which must be converted to "
            "floats first"
        )
    return True


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
