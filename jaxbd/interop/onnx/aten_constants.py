"""aten operators that make constants or compute sizes, as functions (converter, arguments) ->
name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import Converter, widened
from jaxbd.interop.onnx.aten_arguments import TYPES, Arguments, Tensor
from jaxbd.interop.onnx.graph import MOST_STATIC
from jaxbd.interop.onnx.stated import kind_of
from jaxbd.interop.onnx.values import check_size
from jaxbd.limits import Refusal, quote


def full(fill: float | str) -> Callable[[Converter, Arguments], str]:
    """Handler for a constant tensor filled with the number `fill`, or with the argument of that
    name. Without a `dtype` it has the type of `self`, if there is one."""

    def make(c: Converter, a: Arguments) -> str:
        like, number = a.get("self"), a[fill] if isinstance(fill, str) else fill
        shape = a["size"] if "size" in a else () if like is None else c.meta(like).shape
        if not isinstance(number, int | float):
            raise Refusal("a constant filled with a tensor is not supported")
        if a.get("dtype") is not None:
            dtype = TYPES[a["dtype"]]
        elif like is not None:
            dtype = widened(c.meta(like).dtype)
        else:  # only `full` takes the type of its number
            is_whole = fill == "fill_value" and isinstance(number, int)
            dtype = np.asarray(number).dtype if is_whole else np.dtype(np.float32)
        if "size" not in a and None in shape:
            return c.add("Expand", [c.constant(number, dtype), c.add("Shape", [c.value(like)])])
        if not all(isinstance(size, int) for size in shape):
            raise Refusal("a constant of symbolic size is not supported")
        check_size(shape, MOST_STATIC)
        return c.constant(np.full(shape, number, dtype))

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


def assert_metadata(c: Converter, a: Arguments) -> list[str]:
    """Checks what the program asserts about a tensor; it has no output."""
    x, dtype = c.meta(a["a"]), a.get("dtype")
    a.get("stride")
    shape = a.get("size") or [None] * len(x.shape)
    fits = len(shape) == len(x.shape) and all(
        size is None or own is None or size == own or isinstance(size, Tensor)
        for size, own in zip(shape, x.shape, strict=True)
    )
    if not fits or (dtype is not None and kind_of(TYPES[dtype]) != kind_of(x.dtype)):
        raise Refusal(f"it does not hold for {quote(a['a'].name)}")
    return []


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
    **dict.fromkeys(("full", "new_full", "full_like"), full("fill_value")),
    "scalar_tensor": full("s"),
    "arange": arange,
    "_assert_tensor_metadata": assert_metadata,
    "fill": full("value"),
    "fill_": fill,
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
