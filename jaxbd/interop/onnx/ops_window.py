"""Convolution and pooling: operators that slide a window over [B, C, …]."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.values import Value, check_size, computed
from jaxbd.limits import Refusal, quote

Pairs = list[tuple[int, int]]


def conv(node: Node, x: Value, w: Value, b: Value = None) -> Value:
    """Convolution of x [B, C, …] with kernels w [O, C / group, …]."""
    kernel, rank = w.shape[2:], x.ndim - 2
    if tuple(node.get("kernel_shape", kernel)) != tuple(kernel):
        raise Refusal(f"its kernel_shape is {quote(node.get('kernel_shape'))}, not {kernel}")
    strides, dilations = node.get("strides", (1,) * rank), node.get("dilations", (1,) * rank)
    spread = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = padding(node, x.shape[2:], spread, strides)
    check_size([dim + sum(pair) for dim, pair in zip(x.shape[2:], pads, strict=True)])
    spatial = "DHW"[3 - rank :]
    names = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
    group = node.get("group", 1)
    y = jax.lax.conv_general_dilated(
        x,
        w.astype(x.dtype),
        strides,
        pads,
        rhs_dilation=dilations,
        dimension_numbers=names,
        feature_group_count=group,
    )
    return y if b is None else y + b.astype(y.dtype).reshape((1, -1) + (1,) * rank)


def padding(
    node: Node, dims: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> Pairs:
    """Padding before and after each axis, explicit or from `auto_pad`."""
    rule = node.get("auto_pad", "NOTSET")
    if rule == "VALID":
        return [(0, 0)] * len(dims)
    if rule in ("SAME_UPPER", "SAME_LOWER"):
        if set(node.get("dilations", ())) - {1}:  # onnxruntime ignores or refuses them
            raise Refusal(f"dilations with a padding of {rule} are not supported; state the pads")
        totals = [
            max((-(-d // s) - 1) * s + k - d, 0)
            for d, k, s in zip(dims, window, strides, strict=True)
        ]
        less = [(total // 2, total - total // 2) for total in totals]
        return less if rule == "SAME_UPPER" else [(high, low) for low, high in less]
    if rule not in ("NOTSET", ""):
        raise Refusal(f"a padding of {quote(rule)} is not supported")
    widths = node.get("pads", (0,) * 2 * len(dims))
    return list(zip(widths[: len(dims)], widths[len(dims) :], strict=True))


def _windows(node: Node, x: Value) -> tuple[tuple[int, ...], ...]:
    """(kernel, strides, dilations) of a pooling, each with ones for batch and channels."""
    rank, kernel = x.ndim - 2, node.get("kernel_shape")
    if len(kernel) != rank or math.prod(kernel) > 1 << 20:
        raise Refusal(f"a pooling window of {quote(kernel)}")
    strides, dilations = node.get("strides", (1,) * rank), node.get("dilations", (1,) * rank)
    return tuple((1, 1, *each) for each in (kernel, strides, dilations))


def _with_ceiling(
    node: Node, x: Value, spread: Sequence[int], strides: Sequence[int], pads: Pairs
) -> list[int]:
    """Additional padding at the end of each axis when output sizes are rounded up (`ceil_mode`).

    As in PyTorch, a window that would start in the end padding is dropped.
    """
    more = []
    for dim, window, stride, (low, high) in zip(x.shape[2:], spread, strides, pads, strict=True):
        count = -(-(dim + low + high - window) // stride) + 1 if node.get("ceil_mode", 0) else 0
        count -= int((count - 1) * stride >= dim + low)
        more.append(max((count - 1) * stride + window - dim - low - high, 0))
    return more


def _read_window(node: Node, x: Value) -> tuple[tuple[tuple[int, ...], ...], Pairs, Pairs]:
    """((kernel, strides, dilations), stated padding, additional padding from rounding up), for all
    axes."""
    kernel, strides, dilations = windows = _windows(node, x)
    spread = [(k - 1) * d + 1 for k, d in zip(kernel[2:], dilations[2:], strict=True)]
    pads = padding(node, x.shape[2:], spread, strides[2:])
    if any(p >= k for pair, k in zip(pads, spread, strict=True) for p in pair):
        raise Refusal(f"a pooling window of {quote(kernel[2:])} is no larger than its padding")
    extra = [(0, more) for more in _with_ceiling(node, x, spread, strides[2:], pads)]
    return windows, [(0, 0), (0, 0), *pads], [(0, 0), (0, 0), *extra]


def _join(pads: Pairs, extra: Pairs) -> Pairs:
    return [(low + a, high + b) for (low, high), (a, b) in zip(pads, extra, strict=True)]


def max_pool(node: Node, x: Value) -> Value:
    if len([output for output in node.outputs if output]) > 1 or node.get("storage_order", 0):
        raise Refusal("a MaxPool that returns positions is not supported")
    (kernel, strides, dilations), pads, extra = _read_window(node, x)
    least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return jax.lax.reduce_window(
        x, least, jax.lax.max, kernel, strides, _join(pads, extra), None, dilations
    )


def average_pool(node: Node, x: Value) -> Value:
    """The mean over the window; padding counts only with `count_include_pad`."""
    (kernel, strides, dilations), pads, extra = _read_window(node, x)
    add = lambda v, p: jax.lax.reduce_window(
        v, 0.0, jax.lax.add, kernel, strides, p, None, dilations
    )
    total = add(x, _join(pads, extra))
    if not any(map(any, _join(pads, extra))):
        return total / math.prod(kernel)
    counted = np.ones((1, 1, *x.shape[2:]), np.float32)
    # stated padding counts as pixels here, padding from rounding up never does
    if node.get("count_include_pad", 0):
        counted, pads = np.pad(counted, pads, constant_values=1), [(0, 0)] * x.ndim
    # the number of pixels in each window is a constant: compute it now, not in the traced program
    with jax.ensure_compile_time_eval():
        counts = np.asarray(add(jnp.asarray(counted), _join(pads, extra)))
    return total / counts.astype(x.dtype)


def global_pool(reduce: Callable[..., Value]) -> Callable[..., Value]:
    return lambda node, x: reduce(x, axis=tuple(range(2, x.ndim)), keepdims=True)


def local_response(node: Node, x: Value) -> Value:
    """LRN: x / (bias + alpha / size * sum of squares over neighbouring channels) ** beta."""
    size = node.get("size")
    low, high = (size - 1) // 2, size - 1 - (size - 1) // 2
    rest = ((0, 0),) * (x.ndim - 2)
    squares = jax.lax.reduce_window(
        jnp.square(x),
        0.0,
        jax.lax.add,
        (1, size, *(1 for _ in rest)),
        (1,) * x.ndim,
        ((0, 0), (low, high), *rest),
    )
    return x / (node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * squares) ** node.get(
        "beta", 0.75
    )


WINDOW: dict[str, Callable[..., Any]] = {
    "Conv": computed(conv),
    "MaxPool": computed(max_pool),
    "AveragePool": computed(average_pool),
    "GlobalAveragePool": computed(global_pool(jnp.mean)),
    "GlobalMaxPool": computed(global_pool(jnp.max)),
    "LRN": computed(local_response),
}
"""Name of an operator -> function that computes it."""
