"""aten operators that work element by element or reduce, as functions (converter, arguments) ->
name of the result."""

from collections.abc import Callable
from typing import Any

from jaxbd.interop.onnx.aten import TYPES, Converter, Tensor
from jaxbd.interop.onnx.aten_shape import Arguments, first
from jaxbd.interop.onnx.tensors import TYPES as ONNX_TYPES
from jaxbd.limits import Refusal

Handler = Callable[[Converter, Arguments], Any]


def source(a: Arguments) -> Tensor:
    """The operator's first tensor argument."""
    return a["self"] if "self" in a else a["input"]


def unary(op: str, **defaults: Any) -> Handler:
    """Handler that emits one ONNX operator.

    Args:
      defaults: name of an attribute -> (name of the argument it comes from, default).
    """

    def make(c: Converter, a: Arguments) -> str:
        attributes = {name: float(a.get(key, default)) for name, (key, default) in defaults.items()}
        return c.add(op, [c.value(source(a))], **attributes)

    return make


def binary(op: str) -> Handler:
    """Handler for arithmetic and comparisons with a tensor or number; `alpha` scales the second
    operand."""

    def make(c: Converter, a: Arguments) -> str:
        x, y = a.get("self", a.get("input")), a.get("other", a.get("exponent"))
        sides = [
            c.value(x, y if isinstance(y, Tensor) else None),
            c.value(y, x if isinstance(x, Tensor) else None),
        ]
        if a.get("alpha", 1) != 1:
            sides[1] = c.add("Mul", [sides[1], c.value(a["alpha"], x)])
        # PyTorch divides integers as floats, ONNX rounds towards zero
        if op == "Div" and isinstance(x, Tensor) and c.meta(x).dtype.kind in "iu":
            sides = [c.add("Cast", [side], to=1) for side in sides]
        if a.get("rounding_mode") is not None:
            raise Refusal("a division that rounds is not supported")
        return c.add(op, sides)

    return make


def reversed_subtraction(c: Converter, a: Arguments) -> str:
    return c.add("Sub", [c.value(a["other"], a["self"]), c.value(a["self"])])


def not_equal(c: Converter, a: Arguments) -> str:
    return c.add("Not", [binary("Equal")(c, a)])


def rsqrt(c: Converter, a: Arguments) -> str:
    return c.add("Reciprocal", [c.add("Sqrt", [c.value(a["self"])])])


def clamp(c: Converter, a: Arguments) -> str:
    """Clip. The bounds are the arguments `min` and `max`, or hardtanh's `min_val` and `max_val`."""
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    x = source(a)
    return c.add(
        "Clip", [c.value(x), *("" if bound is None else c.value(bound, x) for bound in (low, high))]
    )


def hardtanh(c: Converter, a: Arguments) -> str:
    return clamp(
        c, {"self": source(a), "min": a.get("min_val", -1.0), "max": a.get("max_val", 1.0)}
    )


def relu6(c: Converter, a: Arguments) -> str:
    return clamp(c, {"self": source(a), "min": 0.0, "max": 6.0})


def silu(c: Converter, a: Arguments) -> str:
    x = c.value(source(a))
    return c.add("Mul", [x, c.add("Sigmoid", [x])])


def gelu(c: Converter, a: Arguments) -> str:
    return c.add("Gelu", [c.value(source(a))], approximate=a.get("approximate", "none"))


def masked_fill(c: Converter, a: Arguments) -> str:
    return c.add("Where", [c.value(a["mask"]), c.value(a["value"], a["self"]), c.value(a["self"])])


def where(c: Converter, a: Arguments) -> str:
    return c.add(
        "Where", [c.value(a["condition"]), c.value(a["self"]), c.value(a["other"], a["self"])]
    )


def convert(c: Converter, a: Arguments) -> str:
    """Casts to the stated element type; without one, passes the value through."""
    if a.get("dtype") is None:
        return first(c, a)
    numbers = {dtype: number for number, dtype in ONNX_TYPES.items()}
    return c.add("Cast", [c.value(a["self"])], to=numbers[TYPES[a["dtype"]]])


def reduction(op: str) -> Handler:
    def make(c: Converter, a: Arguments) -> str:
        x, axes = a["self"], a.get("dim")
        axes = (
            list(range(c.rank(x)))
            if axes is None or axes == []
            else axes
            if isinstance(axes, list)
            else [axes]
        )
        axes = [c.axis(x, axis) for axis in axes]
        return c.add(op, [c.value(x), c.integers(axes)], keepdims=int(a.get("keepdim", False)))

    return make


MATH: dict[str, Handler] = {
    **{
        name: unary(op)
        for name, op in {
            "relu": "Relu",
            "sigmoid": "Sigmoid",
            "tanh": "Tanh",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "erf": "Erf",
            "abs": "Abs",
            "neg": "Neg",
            "reciprocal": "Reciprocal",
            "floor": "Floor",
            "hardswish": "HardSwish",
            "mish": "Mish",
            "softplus": "Softplus",
            "logical_not": "Not",
            "sin": "Sin",
            "cos": "Cos",
        }.items()
    },
    **{
        name: binary(op)
        for name, op in {
            "add": "Add",
            "sub": "Sub",
            "mul": "Mul",
            "div": "Div",
            "pow": "Pow",
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
    **dict.fromkeys(("clamp", "clip"), clamp),
    "hardsigmoid": lambda c, a: c.add("HardSigmoid", [c.value(a["self"])], alpha=1 / 6, beta=0.5),
    "leaky_relu": unary("LeakyRelu", alpha=("negative_slope", 0.01)),
    "elu": unary("Elu", alpha=("alpha", 1.0)),
    "rsub": reversed_subtraction,
    "ne": not_equal,
    "rsqrt": rsqrt,
    "hardtanh": hardtanh,
    "relu6": relu6,
    "silu": silu,
    "gelu": gelu,
    "masked_fill": masked_fill,
    "where": where,
    "mean": reduction("ReduceMean"),
    "sum": reduction("ReduceSum"),
    "amax": reduction("ReduceMax"),
    "amin": reduction("ReduceMin"),
    "prelu": lambda c, a: c.add("PRelu", [c.value(a["self"]), _by_channel(c, a)]),
}
"""Name of an aten operator, without overload -> its handler."""


def _by_channel(c: Converter, a: Arguments) -> str:
    """PReLU's slopes [C], reshaped to broadcast along the channels."""
    return c.add(
        "Reshape", [c.value(a["weight"]), c.integers([-1, *(1,) * (c.rank(a["self"]) - 2)])]
    )
