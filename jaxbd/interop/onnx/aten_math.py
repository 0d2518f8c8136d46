"""aten operators that work element by element or reduce, as functions (converter, arguments) ->
name of the result."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import Converter
from jaxbd.interop.onnx.aten_arguments import TYPES, Arguments, Tensor, source
from jaxbd.interop.onnx.aten_shape import first
from jaxbd.interop.onnx.stated import kind_of
from jaxbd.interop.onnx.tensors import TYPES as ONNX_TYPES
from jaxbd.limits import Refusal

Handler = Callable[[Converter, Arguments], Any]


def unary(op: str) -> Handler:
    """Handler that emits one ONNX operator without attributes."""
    return lambda c, a: c.add(op, [c.value(source(a))])


def operands(c: Converter, x: Any, y: Any) -> list[str]:
    """Two operands, each a tensor or a number, as values of one type, as ONNX wants it."""
    sides = [
        c.value(x, y if isinstance(y, Tensor) else None),
        c.value(y, x if isinstance(x, Tensor) else None),
    ]
    kinds = [c.kind(x), c.kind(y)]
    common = np.dtype(np.float32 if "f" in kinds else np.int64)
    if len(set(kinds)) > 1:
        sides = [
            cast(c, side, common) if isinstance(each, Tensor) and kind != common.kind else side
            for side, each, kind in zip(sides, (x, y), kinds, strict=True)
        ]
    return sides


def binary(op: str, other: str = "other") -> Handler:
    """Handler for arithmetic and comparisons of `self` with the argument named by `other`."""
    return lambda c, a: c.add(op, operands(c, a["self"], a[other]))


def addition(op: str, is_reversed: bool = False) -> Handler:
    """Handler for self + alpha other and self - alpha other; if reversed, other - alpha self."""

    def make(c: Converter, a: Arguments) -> str:
        x, y = (a["other"], a["self"]) if is_reversed else (a["self"], a["other"])
        sides, alpha = operands(c, x, y), a.get("alpha", 1)
        if alpha != 1:
            like = next(side for side in (y, x) if isinstance(side, Tensor))
            sides[1] = c.add("Mul", [sides[1], c.value(alpha, like)])
        return c.add(op, sides)

    return make


def divide(c: Converter, a: Arguments) -> str:
    """Quotient. PyTorch divides integers as floats, ONNX rounds towards zero."""
    x, y = a["self"], a["other"]
    sides = operands(c, x, y)
    if "f" not in (c.kind(x), c.kind(y)):
        sides = [c.add("Cast", [side], to=1) for side in sides]
    if a.get("rounding_mode") is not None:
        raise Refusal("a division that rounds is not supported")
    return c.add("Div", sides)


def not_equal(c: Converter, a: Arguments) -> str:
    return c.add("Not", [binary("Equal")(c, a)])


def rsqrt(c: Converter, a: Arguments) -> str:
    return c.add("Reciprocal", [c.add("Sqrt", [c.value(a["self"])])])


def times(c: Converter, x: str, factor: float) -> str:
    return x if factor == 1 else c.add("Mul", [x, c.constant(factor, np.float32)])


def log1p(c: Converter, a: Arguments) -> str:
    return c.add("Log", [c.add("Add", [c.value(a["self"]), c.constant(1, np.float32)])])


def expm1(c: Converter, a: Arguments) -> str:
    """exp(x) - 1; for x < 0 it is Elu, which does not lose digits."""
    x, (zero, one) = c.value(a["self"]), (c.constant(n, np.float32) for n in (0, 1))
    above = c.add("Sub", [c.add("Exp", [x]), one])
    return c.add("Where", [c.add("Less", [x, zero]), c.add("Elu", [x]), above])


def masked_fill(c: Converter, a: Arguments) -> str:
    return c.add("Where", [c.value(a["mask"]), c.value(a["value"], a["self"]), c.value(a["self"])])


def where(c: Converter, a: Arguments) -> str:
    return c.add("Where", [c.value(a["condition"]), *operands(c, a["self"], a["other"])])


def cast(c: Converter, name: str, dtype: np.dtype) -> str:
    numbers = {each: number for number, each in ONNX_TYPES.items()}
    return c.add("Cast", [name], to=numbers[dtype])


def convert(c: Converter, a: Arguments) -> str:
    """Casts to the stated element type, or to that of `other`; without one, passes the value
    through."""
    dtype = None if a.get("dtype") is None else TYPES[a["dtype"]]
    if a.get("other") is not None:
        dtype = c.meta(a["other"]).dtype
    return first(c, a) if dtype is None else cast(c, c.value(a["self"]), dtype)


def reduction(op: str) -> Handler:
    def make(c: Converter, a: Arguments) -> str:
        x = a["self"]
        name, is_keeping = c.value(x), int(a.get("keepdim", False))
        if a.get("dtype") is not None:
            name = cast(c, name, TYPES[a["dtype"]])
        elif op == "ReduceSum" and kind_of(c.meta(x).dtype) != "f":
            name = cast(c, name, np.dtype(np.int64))  # the type in which PyTorch adds integers
        return c.add(op, [name, c.integers(axes_of(c, x, a.get("dim")))], keepdims=is_keeping)

    return make


def truth(op: str) -> Handler:
    """Handler for whether all or any of the values over some axes are true."""

    def make(c: Converter, a: Arguments) -> str:
        numbers = c.add("Cast", [cast(c, c.value(a["self"]), np.dtype(np.bool_))], to=1)
        axes, is_keeping = axes_of(c, a["self"], a.get("dim")), int(a.get("keepdim", False))
        found = c.add(op, [numbers, c.integers(axes)], keepdims=is_keeping)
        return cast(c, found, np.dtype(np.bool_))

    return make


def axes_of(c: Converter, x: Tensor, given: Any) -> list[int]:
    """The axes that a reduction is over, from its argument `dim`; all if there are none."""
    if given is None or given == []:
        return list(range(c.rank(x)))
    return [c.axis(x, axis) for axis in (given if isinstance(given, list) else [given])]


MATH: dict[str, Handler] = {
    **{
        name: unary(op)
        for name, op in {
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "erf": "Erf",
            "abs": "Abs",
            "neg": "Neg",
            "reciprocal": "Reciprocal",
            "floor": "Floor",
            "logical_not": "Not",
            "sin": "Sin",
            "cos": "Cos",
        }.items()
    },
    **{
        name: binary(op)
        for name, op in {
            "mul": "Mul",
            "eq": "Equal",
            "lt": "Less",
            "le": "LessOrEqual",
            "gt": "Greater",
            "ge": "GreaterOrEqual",
            "maximum": "Max",
            "minimum": "Min",
            "logical_and": "And",
            "logical_or": "Or",
        }.items()
    },
    **dict.fromkeys(("to", "_to_copy"), convert),
    "add": addition("Add"),
    "sub": addition("Sub"),
    "rsub": addition("Sub", is_reversed=True),
    "div": divide,
    "pow": binary("Pow", "exponent"),
    "log1p": log1p,
    "expm1": expm1,
    "ne": not_equal,
    "rsqrt": rsqrt,
    "masked_fill": masked_fill,
    "where": where,
    "mean": reduction("ReduceMean"),
    "sum": reduction("ReduceSum"),
    "amax": reduction("ReduceMax"),
    "amin": reduction("ReduceMin"),
    "any": truth("ReduceMax"),
    "all": truth("ReduceMin"),
}
"""Name of an aten operator, without overload -> its handler."""
