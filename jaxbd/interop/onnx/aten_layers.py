"""aten operators that are layers: convolution, matrix products, pooling, softmax, attention."""

from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import Converter
from jaxbd.interop.onnx.aten_arguments import TYPES, Arguments
from jaxbd.interop.onnx.aten_math import Handler, cast
from jaxbd.interop.onnx.stated import kind_of
from jaxbd.limits import Refusal


def conv(c: Converter, a: Arguments) -> str:
    if a.get("transposed") or any(a.get("output_padding", [])):
        raise Refusal("a transposed convolution is not supported")
    inputs = [c.value(a["input"]), c.value(a["weight"])]
    rank = c.rank(a["weight"]) - 2
    spread = lambda name, default: tuple(_each(a.get(name, default), rank))
    strides, dilations = spread("stride", 1), spread("dilation", 1)
    padding = a.get("padding", 0)
    attributes: dict[str, Any] = {
        "strides": strides,
        "dilations": dilations,
        "group": a.get("groups", 1),
    }
    if isinstance(padding, str):
        attributes["auto_pad"] = {"same": "SAME_UPPER", "valid": "VALID"}[padding]
    else:
        attributes["pads"] = spread("padding", 0) * 2
    if a.get("bias") is not None:
        inputs.append(c.value(a["bias"]))
    return c.add("Conv", inputs, "", 1, **attributes)


def _each(value: Any, rank: int) -> list[int]:
    """`value` as one number for every axis."""
    values = value if isinstance(value, list) else [value]
    return values * rank if len(values) == 1 else values


def linear(c: Converter, a: Arguments) -> str:
    """Gemm for a matrix input; with more axes, MatMul with the transposed weight, then Add."""
    x, weight, bias = a["input"], c.value(a["weight"]), a.get("bias")
    if c.rank(x) == 2:
        return c.add(
            "Gemm", [c.value(x), weight, *([] if bias is None else [c.value(bias)])], transB=1
        )
    y = c.add("MatMul", [c.value(x), c.add("Transpose", [weight], perm=(1, 0))])
    return y if bias is None else c.add("Add", [y, c.value(bias)])


def addmm(c: Converter, a: Arguments) -> str:
    scales = {"alpha": float(a.get("alpha", 1)), "beta": float(a.get("beta", 1))}
    return c.add("Gemm", [c.value(a["mat1"]), c.value(a["mat2"]), c.value(a["self"])], **scales)


def matmul(c: Converter, a: Arguments) -> str:
    return c.add("MatMul", [c.value(a["self"]), c.value(a.get("other", a.get("mat2")))])


def pooling(op: str) -> Handler:
    def make(c: Converter, a: Arguments) -> Any:
        x = a["self"]
        rank = c.rank(x) - 2
        kernel = _each(a["kernel_size"], rank)
        attributes: dict[str, Any] = {
            "kernel_shape": tuple(kernel),
            # an empty stride stands for the size of the window
            "strides": tuple(_each(a.get("stride") or kernel, rank)),
            "pads": tuple(_each(a.get("padding", 0), rank)) * 2,
            "ceil_mode": int(a.get("ceil_mode", False)),
        }
        if op == "MaxPool":
            attributes["dilations"] = tuple(_each(a.get("dilation", 1), rank))
        else:
            attributes["count_include_pad"] = int(a.get("count_include_pad", True))
            if a.get("divisor_override") is not None:
                raise Refusal("a pooling with a divisor of its own is not supported")
        return c.add(op, [c.value(x)], "", 1, **attributes)

    return make


def max_pool_with_indices(c: Converter, a: Arguments) -> list[str]:
    """Max pooling. The second output, the positions, is not supported and gets no name."""
    return [pooling("MaxPool")(c, a), ""]


def adaptive_average(c: Converter, a: Arguments) -> str:
    """Means over parts of the image. Parts of equal size become ordinary pooling; otherwise each
    axis is multiplied by a matrix of weights."""
    x = a["self"]
    name, wanted = c.value(x), _each(a["output_size"], c.rank(x) - 2)
    if all(size == 1 for size in wanted):
        return c.add("GlobalAveragePool", [name])
    sizes = [c.size(x, axis) for axis in range(2, c.rank(x))]
    if all(size % part == 0 for size, part in zip(sizes, wanted, strict=True)):
        kernel = tuple(size // part for size, part in zip(sizes, wanted, strict=True))
        return c.add("AveragePool", [name], "", 1, kernel_shape=kernel, strides=kernel)
    if len(sizes) != 2:
        raise Refusal("an adaptive pooling over other than two axes is not supported")
    rows, columns = (_shares(size, part) for size, part in zip(sizes, wanted, strict=True))
    wide = c.add("MatMul", [name, c.constant(columns.T)])
    return c.add("MatMul", [c.constant(rows), wide])


def _shares(size: int, parts: int) -> np.ndarray:
    """Weights [parts, size]: row i takes the mean over the positions from floor(i size / parts) to
    ceil((i + 1) size / parts) - 1."""
    shares = np.zeros((parts, size), np.float32)
    for i in range(parts):
        low, high = i * size // parts, -(-(i + 1) * size // parts)
        shares[i, low:high] = 1 / (high - low)
    return shares


def softmax(op: str) -> Handler:
    def make(c: Converter, a: Arguments) -> str:
        x = c.value(a["self"])
        if a.get("dtype") is not None:
            x = cast(c, x, TYPES[a["dtype"]])
        return c.add(op, [x], axis=c.axis(a["self"], a["dim"]))

    return make


def attention(c: Converter, a: Arguments) -> list[str]:
    """softmax(q k^T scale + mask) v."""
    q, k, v = (a[key] for key in ("query", "key", "value"))
    if a.get("is_causal") or a.get("enable_gqa"):
        raise Refusal("a causal or grouped attention is not supported")
    if a.get("dropout_p", 0) != 0:
        raise Refusal("an attention with dropout is not supported; export the model after .eval()")
    scale = c.size(q, -1) ** -0.5 if a.get("scale") is None else float(a["scale"])
    perm = [*range(c.rank(k) - 2), c.rank(k) - 1, c.rank(k) - 2]
    scores = c.add("MatMul", [c.value(q), c.add("Transpose", [c.value(k)], perm=tuple(perm))])
    scores = c.add("Mul", [scores, c.constant(scale, np.float32)])
    if a.get("attn_mask") is not None:
        if kind_of(c.meta(a["attn_mask"]).dtype) == "b":
            scores = c.add(
                "Where", [c.value(a["attn_mask"]), scores, c.constant(-np.inf, np.float32)]
            )
        else:
            scores = c.add("Add", [scores, c.value(a["attn_mask"])])
    return [c.add("MatMul", [c.add("Softmax", [scores], axis=-1), c.value(v)]), ""]


LAYERS: dict[str, Handler] = {
    **dict.fromkeys(("conv1d", "conv2d", "convolution", "conv3d"), conv),
    **dict.fromkeys(("mm", "bmm", "matmul"), matmul),
    **dict.fromkeys(("max_pool2d_with_indices",), max_pool_with_indices),
    **dict.fromkeys(
        ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool1d"), adaptive_average
    ),
    **dict.fromkeys(("softmax", "_softmax"), softmax("Softmax")),
    **dict.fromkeys(("log_softmax", "_log_softmax"), softmax("LogSoftmax")),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), attention
    ),
    "linear": linear,
    "addmm": addmm,
    "max_pool2d": pooling("MaxPool"),
    "avg_pool2d": pooling("AveragePool"),
}
"""Name of an aten operator, without overload -> its handler."""
