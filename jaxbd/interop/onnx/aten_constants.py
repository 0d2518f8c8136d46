"""aten operators that make constants or compute sizes, as functions (converter, arguments) ->
name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import TYPES, Converter, Tensor
from jaxbd.interop.onnx.aten_shape import Arguments
from jaxbd.interop.onnx.graph import MOST_STATIC
from jaxbd.interop.onnx.values import check_size
from jaxbd.limits import Refusal


def full(fill: float | None) -> Callable[[Converter, Arguments], str]:
    """Handler for a constant tensor filled with `fill`, or with the operator's own value."""

    def make(c: Converter, a: Arguments) -> str:
        like = a.get("self")
        shape = a.get("size", c.meta(like).shape if like is not None else ())
        if not all(isinstance(size, int) for size in shape):
            raise Refusal("a constant of symbolic size is not supported")
        check_size(shape, MOST_STATIC)
        number = a.get("fill_value", a.get("value", 0)) if fill is None else fill
        given = (
            TYPES[a["dtype"]]
            if a.get("dtype") is not None
            else c.meta(like).dtype
            if like is not None
            else None
        )
        return c.constant(np.full(shape, number, given or np.asarray(number, np.float32).dtype))

    return make


def arange(c: Converter, a: Arguments) -> str:
    start, end, step = a.get("start", 0), a["end"], a.get("step", 1)
    if not all(isinstance(bound, int | float) for bound in (start, end, step)) or not step:
        raise Refusal("an arange of symbolic size is not supported")
    check_size((max(int((end - start) / step) + 1, 0),), MOST_STATIC)
    default = (
        np.int64 if all(isinstance(bound, int) for bound in (start, end, step)) else np.float32
    )
    dtype = TYPES[a["dtype"]] if a.get("dtype") is not None else default
    bounds: Any = (start, end, step)
    return c.constant(np.arange(*bounds, dtype=dtype))


def fill(c: Converter, a: Arguments) -> str:
    """Fills a constant in place. Everything that shares its memory changes too."""
    # the array may still change: it becomes part of the graph only when a node uses it
    name, value = c.value(a["self"]), a["value"]
    value = c.known.get(c.value(value)) if isinstance(value, Tensor) else value
    if name not in c.known or value is None or not c.known[name].flags.writeable:
        raise Refusal("a tensor that depends on the image is filled in place")
    c.known[name][...] = value
    return name


def sym_size(c: Converter, a: Arguments) -> str:
    axis = c.axis(a["self"], a["dim"])
    shape = c.add("Shape", [c.value(a["self"])])
    return c.add("Gather", [shape, c.constant(axis, np.int64)], axis=0)


def arithmetic(op: str) -> Callable[[Converter, Arguments], str]:
    """Handler for arithmetic on sizes."""

    def make(c: Converter, a: Arguments) -> str:
        sides = [
            c.value(x) if isinstance(x, Tensor) else c.constant(x, np.int64)
            for x in (a["a"], a["b"])
        ]
        return c.add(op, sides)

    return make


CONSTANTS: dict[str, Callable[[Converter, Arguments], Any]] = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), full(0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), full(1)),
    **dict.fromkeys(("full", "new_full", "full_like", "scalar_tensor"), full(None)),
    "arange": arange,
    "fill": fill,
    "sym_size": sym_size,
}
"""Name of an aten operator, without overload -> its handler."""
OPERATORS = {
    "mul": arithmetic("Mul"),
    "add": arithmetic("Add"),
    "sub": arithmetic("Sub"),
    "floordiv": arithmetic("Div"),
}
"""Name of a Python operator on sizes -> its handler."""
