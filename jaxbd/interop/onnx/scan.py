"""Counts the contents of a protocol buffer before it is parsed, so that a small file cannot become
gigabytes of objects."""

from typing import Any

from jaxbd.interop.onnx.graph import GraphLimits
from jaxbd.limits import Refusal

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
INTEGERS = frozenset({3, 4, 5, 8, 13, 14, 17, 18})
"""Numbers of the protocol buffer types that are stored as varints."""
MESSAGE = 11


def check_size(data: bytes, descriptor: Any, limits: GraphLimits) -> None:
    """Raises Refusal unless `data`, a message of type `descriptor`, stays within the limits.

    An unknown field is refused: a reader of another version could give it a meaning.
    """
    fields = packed = 0
    deadline = limits.plain.deadline("it", len(data))
    # (position, end, type, fields seen so far) of each open message; no recursion, since the file
    # decides how deep messages are nested
    stack: list[tuple[int, int, Any, set[int]]] = [(0, len(data), descriptor, set())]
    while stack:
        position, end, kind, seen = stack.pop()
        while position < end:
            fields += 1
            if fields > limits.fields:
                raise Refusal(f"it has more than {limits.fields:,} fields")
            if fields % 64 == 0:
                deadline.check()
            tag, position = _varint(data, position, end)
            wire, field = tag & 7, kind.fields_by_number.get(tag >> 3)
            if field is None:
                raise Refusal(
                    f"it is damaged, or not an ONNX file: {kind.name} has no field {tag >> 3}"
                )
            start, position = _value(data, position, end, wire)
            if field.type != MESSAGE:
                packed += position - start if wire == LENGTH and field.type in INTEGERS else 0
                continue
            if wire != LENGTH:
                raise Refusal(f"field {field.name} of {kind.name} is not a message")
            if not field.is_repeated and field.number in seen:
                raise Refusal(f"{kind.name} has its field {field.name} twice")
            seen.add(field.number)
            if start < position:
                stack += [(position, end, kind, seen), (start, position, field.message_type, set())]
                break
        if len(stack) > limits.depth:
            raise Refusal(f"it is nested deeper than {limits.depth} levels")
        if packed > limits.packed_bytes:
            raise Refusal(f"it has more than {limits.packed_bytes:,} bytes of packed integers")


def _value(data: bytes, position: int, end: int, wire: int) -> tuple[int, int]:
    """(begin, end) of the value of a field with wire type `wire`."""
    start = position
    if wire == VARINT:
        position = _varint(data, position, end)[1]
    elif wire == LENGTH:
        size, start = _varint(data, position, end)
        position = start + size
    elif wire in (EIGHT_BYTES, FOUR_BYTES):
        position += 8 if wire == EIGHT_BYTES else 4
    else:
        raise Refusal("it is not a protocol buffer (or is damaged)")
    if position > end:
        raise Refusal("it is cut off, or not an ONNX file")
    return start, position


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise Refusal("it is cut off, or not an ONNX file")
