"""aten operators that are activations, as functions (converter, arguments) -> name of the
result."""

import numpy as np

from jaxbd.interop.onnx.aten import Converter
from jaxbd.interop.onnx.aten_arguments import Arguments
from jaxbd.interop.onnx.aten_math import Handler, times, unary
from jaxbd.limits import Refusal


def clamp(c: Converter, a: Arguments) -> str:
    x = a["self"]
    bounds = ["" if a.get(key) is None else c.value(a[key], x) for key in ("min", "max")]
    return c.add("Clip", [c.value(x), *bounds])


def hardtanh(c: Converter, a: Arguments) -> str:
    return clamp(c, {"self": a["self"], "min": a.get("min_val", -1), "max": a.get("max_val", 1)})


def relu6(c: Converter, a: Arguments) -> str:
    return clamp(c, {"self": a["self"], "min": 0.0, "max": 6.0})


def leaky_relu(c: Converter, a: Arguments) -> str:
    return c.add("LeakyRelu", [c.value(a["self"])], alpha=float(a.get("negative_slope", 0.01)))


def elu(c: Converter, a: Arguments) -> str:
    """scale x for x > 0, otherwise scale alpha (exp(input_scale x) - 1)."""
    x, alpha = c.value(a["self"]), float(a.get("alpha", 1))
    scale, inner = float(a.get("scale", 1)), float(a.get("input_scale", 1))
    if inner <= 0:
        raise Refusal(f"an input_scale of {inner:g} is not supported")
    y = c.add("Elu", [times(c, x, inner)], alpha=alpha)
    if inner != 1:
        y = c.add("Where", [c.add("Greater", [x, c.constant(0, np.float32)]), x, y])
    return times(c, y, scale)


def softplus(c: Converter, a: Arguments) -> str:
    """log(1 + exp(beta x)) / beta, or x where beta x is above the threshold."""
    x, beta = c.value(a["self"]), float(a.get("beta", 1))
    threshold, inner = float(a.get("threshold", 20)), times(c, x, beta)
    y = times(c, c.add("Softplus", [inner]), 1 / beta)
    if threshold >= 20:  # above it, the formula gives x in float32
        return y
    is_above = c.add("Greater", [inner, c.constant(threshold, np.float32)])
    return c.add("Where", [is_above, x, y])


def log_sigmoid(c: Converter, a: Arguments) -> list[str]:
    """-log(1 + exp(-x)). The second output of `log_sigmoid_forward` gets no name."""
    return [c.add("Neg", [c.add("Softplus", [c.add("Neg", [c.value(a["self"])])])]), ""]


def silu(c: Converter, a: Arguments) -> str:
    x = c.value(a["self"])
    return c.add("Mul", [x, c.add("Sigmoid", [x])])


def gelu(c: Converter, a: Arguments) -> str:
    return c.add("Gelu", [c.value(a["self"])], approximate=a.get("approximate", "none"))


def _by_channel(c: Converter, a: Arguments) -> str:
    """PReLU's slopes [C], reshaped to broadcast along the channels."""
    return c.add(
        "Reshape", [c.value(a["weight"]), c.integers([-1, *(1,) * (c.rank(a["self"]) - 2)])]
    )


ACTIVATIONS: dict[str, Handler] = {
    "relu": unary("Relu"),
    "sigmoid": unary("Sigmoid"),
    "tanh": unary("Tanh"),
    "hardswish": unary("HardSwish"),
    "mish": unary("Mish"),
    "selu": unary("Selu"),
    "hardsigmoid": lambda c, a: c.add("HardSigmoid", [c.value(a["self"])], alpha=1 / 6, beta=0.5),
    "celu": lambda c, a: c.add("Celu", [c.value(a["self"])], alpha=float(a.get("alpha", 1))),
    "prelu": lambda c, a: c.add("PRelu", [c.value(a["self"]), _by_channel(c, a)]),
    "clamp": clamp,
    "clip": clamp,
    "hardtanh": hardtanh,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "softplus": softplus,
    "log_sigmoid": log_sigmoid,
    "log_sigmoid_forward": log_sigmoid,
    "silu": silu,
    "gelu": gelu,
}
"""Name of an aten operator, without overload -> its handler."""
