"""Converts JAX primitives to ONNX nodes, by functions (tracer, equation, *inputs) -> value."""

import math
from typing import Any

import numpy as np

from jaxbd.interop.onnx.primitives_shape import MOVES, Convert
from jaxbd.interop.onnx.tracer import TO_LAST, Dynamic, Known, Tracer, batch_norm_p
from jaxbd.limits import Refusal


def elementwise(op: str) -> Convert:
    def make(t: Tracer, equation: Any, *inputs: Any) -> Dynamic:
        names, first = t.operands(*inputs)
        return Dynamic(t.add(op, names), first)

    return make


def neutral(op: str, number: float, *sides: int) -> Convert:
    """Arithmetic that is skipped if the input at one of `sides` is its neutral element, i.e.
    `number` everywhere."""

    def make(t: Tracer, equation: Any, *inputs: Any) -> Dynamic:
        for side in sides:
            value, other = inputs[side], inputs[1 - side]
            if (
                isinstance(value, Known)
                and (value.array == number).all()
                and isinstance(other, Dynamic)
            ):
                return other
        return elementwise(op)(t, equation, *inputs)

    return make


def add(t: Tracer, equation: Any, x: Any, y: Any) -> Dynamic:
    """Add. A weight per channel that is added to the layer just emitted becomes its bias."""
    dynamic, other = (x, y) if isinstance(x, Dynamic) else (y, x)
    maker = t.nodes[-1] if t.nodes else None
    if (
        maker is not None
        and isinstance(other, Known)
        and other.origin
        and maker.outputs[0] == dynamic.name
    ):
        by_channel = other.array.size == other.array.shape[-1] if other.array.ndim else False
        if by_channel and maker.op in ("Conv", "Gemm") and len(maker.inputs) == 2:
            t.nodes[-1] = maker._replace(inputs=(*maker.inputs, t.weight(other, shape=(-1,))))
            return dynamic
    return neutral("Add", 0, 0, 1)(t, equation, x, y)


def maximum(t: Tracer, equation: Any, x: Any, y: Any) -> Dynamic:
    """Max, or Relu if the other operand is 0."""
    dynamic, other = (x, y) if isinstance(x, Dynamic) else (y, x)
    if isinstance(other, Known) and not other.origin and not other.array.any():
        return Dynamic(t.add("Relu", [dynamic.name]), dynamic.first)
    return elementwise("Max")(t, equation, x, y)


def conv(t: Tracer, equation: Any, x: Any, kernel: Any) -> Dynamic:
    p = equation.params
    numbers = p["dimension_numbers"]
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != (
        (0, 3, 1, 2),
        (3, 2, 0, 1),
        (0, 3, 1, 2),
    ):
        raise Refusal(
            "a convolution other than of [B, H, W, C] with [h, w, I, O] has no counterpart here"
        )
    if (
        p["batch_group_count"] != 1
        or set(p["lhs_dilation"]) != {1}
        or not isinstance(kernel, Known)
    ):
        raise Refusal(
            "a transposed convolution, or one with a computed kernel, has no counterpart here"
        )
    pads = (*(low for low, _ in p["padding"]), *(high for _, high in p["padding"]))
    if min(pads) < 0:
        raise Refusal("a convolution with negative padding has no counterpart here")
    name = t.add(
        "Conv",
        [t.to_first(x), t.weight(kernel, (3, 2, 0, 1))],
        strides=tuple(p["window_strides"]),
        pads=pads,
        dilations=tuple(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return Dynamic(name, True)


def dot(t: Tracer, equation: Any, x: Any, y: Any) -> Dynamic:
    (left, right), batch = equation.params["dimension_numbers"]
    if (
        not isinstance(x, Dynamic)
        or tuple(map(len, batch)) != (0, 0)
        or len(equation.invars[1].aval.shape) != 2
    ):
        raise Refusal("a product other than of activations with a matrix has no counterpart here")
    if (
        tuple(left) != (len(equation.invars[0].aval.shape) - 1,)
        or tuple(right) != (0,)
        or not isinstance(y, Known)
    ):
        raise Refusal(
            "a product over other axes than the last and the first has no counterpart here"
        )
    if len(equation.invars[0].aval.shape) == 2:
        # stored [O, I], as PyTorch stores linear layers
        return Dynamic(t.add("Gemm", [x.name, t.weight(y, (1, 0))], transB=1))
    return Dynamic(t.add("MatMul", [t.last(x), t.weight(y)]))


def batch_norm(t: Tracer, equation: Any, x: Dynamic, *others: Known) -> Dynamic:
    first = len(equation.invars[0].aval.shape) == 4
    # constant parameters get a name too, so that they are stored as weights
    parts = [other if other.origin else other._replace(origin="norm") for other in others]
    names = [t.weight(part) for part in parts]
    source = t.to_first(x) if first else x.name
    return Dynamic(
        t.add("BatchNormalization", [source, *names], epsilon=equation.params["epsilon"]), first
    )


def select(t: Tracer, equation: Any, which: Any, *cases: Any) -> Dynamic:
    (condition, no, yes), first = t.operands(which, *cases)
    return Dynamic(t.add("Where", [condition, yes, no]), first)


def clamp(t: Tracer, equation: Any, low: Any, x: Any, high: Any) -> Dynamic:
    (low, x, high), first = t.operands(low, x, high)
    # not Clip, which takes only scalar bounds
    return Dynamic(t.add("Min", [t.add("Max", [x, low]), high]), first)


def reduction(op: str) -> Convert:
    def make(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
        axes = [TO_LAST[axis] if x.first else axis for axis in equation.params["axes"]]
        others = [axis for axis in (TO_LAST if x.first else ()) if axis not in axes]
        # transpose first if the remaining axes would come out in another order than the net's
        if others != sorted(others):
            return Dynamic(t.add(op, [t.last(x), t.integers(equation.params["axes"])], keepdims=0))
        return Dynamic(t.add(op, [x.name, t.integers(sorted(axes))], keepdims=0))

    return make


def window(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    """Max or sum pooling over height and width."""
    p = equation.params
    shape, strides, pads = p["window_dimensions"], p["window_strides"], p["padding"]
    outside = (
        (shape[0], shape[3], strides[0], strides[3], *pads[0], *pads[3]) if len(shape) == 4 else ()
    )
    if outside != (1, 1, 1, 1, 0, 0, 0, 0) or set(p["base_dilation"]) | set(
        p["window_dilation"]
    ) != {1}:
        raise Refusal("a window over other axes than height and width has no counterpart here")
    low_high = (pads[1][0], pads[2][0], pads[1][1], pads[2][1])
    kernel, steps = tuple(shape[1:3]), tuple(strides[1:3])
    if equation.primitive.name == "reduce_window_max":
        return Dynamic(
            t.add("MaxPool", [t.to_first(x)], kernel_shape=kernel, strides=steps, pads=low_high),
            True,
        )
    # ONNX has no sum pooling: average pooling, times the size of the window
    mean = t.add(
        "AveragePool",
        [t.to_first(x)],
        kernel_shape=kernel,
        strides=steps,
        pads=low_high,
        count_include_pad=1,
    )
    return Dynamic(t.add("Mul", [mean, t.constant(math.prod(kernel), np.float32)]), True)


def expm1(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    # ONNX has no Expm1
    return Dynamic(t.add("Sub", [t.add("Exp", [x.name]), t.constant(1, np.float32)]), x.first)


def rsqrt(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    return Dynamic(t.add("Reciprocal", [t.add("Sqrt", [x.name])]), x.first)


def power(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    exponent = equation.params.get("y", 2)
    return Dynamic(t.add("Pow", [x.name, t.constant(exponent, np.float32)]), x.first)


def same(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    """The value itself, since all floats are written in one precision; casts to or from bool are
    kept."""
    old, new = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    if np.issubdtype(old, np.bool_) != np.issubdtype(new, np.bool_):
        return Dynamic(
            t.add("Cast", [x.name], to=9 if np.issubdtype(new, np.bool_) else 1), x.first
        )
    return x


PRIMITIVES: dict[str, Convert] = {
    **MOVES,
    **{
        name: elementwise(op)
        for name, op in {
            "min": "Min",
            "neg": "Neg",
            "exp": "Exp",
            "log": "Log",
            "tanh": "Tanh",
            "logistic": "Sigmoid",
            "sqrt": "Sqrt",
            "abs": "Abs",
            "erf": "Erf",
            "sign": "Sign",
            "gt": "Greater",
            "ge": "GreaterOrEqual",
            "lt": "Less",
            "le": "LessOrEqual",
            "eq": "Equal",
            "not": "Not",
            "and": "And",
            "or": "Or",
            "pow": "Pow",
            "floor": "Floor",
            "sin": "Sin",
            "cos": "Cos",
        }.items()
    },
    "add": add,
    "max": maximum,
    "add_any": add,
    "sub": neutral("Sub", 0, 1),
    "mul": neutral("Mul", 1, 0, 1),
    "div": neutral("Div", 1, 1),
    "conv_general_dilated": conv,
    "dot_general": dot,
    batch_norm_p.name: batch_norm,
    "select_n": select,
    "clamp": clamp,
    "reduce_sum": reduction("ReduceSum"),
    "reduce_max": reduction("ReduceMax"),
    "reduce_min": reduction("ReduceMin"),
    "reduce_window_max": window,
    "reduce_window_sum": window,
    "expm1": expm1,
    "rsqrt": rsqrt,
    "integer_pow": power,
    "square": power,
    **dict.fromkeys(
        ("convert_element_type", "stop_gradient", "copy", "copy_p", "optimization_barrier"), same
    ),
}
"""Name of a primitive -> function that converts it."""
