"""Operators that reshape, split and join values or compute shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.graph import MOST_STATIC, Node
from jaxbd.interop.onnx.ops_resize import resize
from jaxbd.interop.onnx.values import (
    Value,
    axis_of,
    check_size,
    is_static,
    library,
    limit,
    static,
    whole,
)
from jaxbd.limits import Refusal, quote


def listed(node: Node, values: tuple[Value, ...], position: int, attribute: str, since: int) -> Any:
    """Integers that are an attribute before opset `since` and an input from then on; None if
    omitted."""
    if node.opset < since:
        return node.get(attribute)
    given = values[position] if len(values) > position else None
    return None if given is None else whole(given, f"the input {attribute}")


def shape(node: Node, x: Value) -> Value:
    found = np.array(x.shape, np.int64)
    return found[slice(node.get("start", 0), node.get("end"))] if node.opset >= 15 else found


def reshape(node: Node, x: Value, dims: Value) -> Value:
    """Reshape; 0 copies the input's dimension (unless `allowzero`), -1 is inferred."""
    wanted = list(whole(dims, "the shape of a Reshape"))
    if not node.get("allowzero", 0):
        wanted = [x.shape[i] if dim == 0 and i < x.ndim else dim for i, dim in enumerate(wanted)]
    return x.reshape(tuple(wanted))


def flatten(node: Node, x: Value) -> Value:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if not 0 <= axis <= x.ndim:
        raise Refusal(f"axis {axis} of a value with {x.ndim} axes")
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)


def transpose(node: Node, x: Value) -> Value:
    return x.transpose(node.get("perm", tuple(reversed(range(x.ndim)))))


def concat(node: Node, *values: Value) -> Value:
    xp = library(*values)
    # values that depend on the image decide the type, so that constants do not change precision
    kind = next((value.dtype for value in values if not is_static(value)), values[0].dtype)
    return xp.concatenate(
        [xp.asarray(value, kind) for value in values], axis_of(node.get("axis", 0), values[0].ndim)
    )


def split(node: Node, x: Value, *more: Value) -> tuple[Value, ...]:
    axis = axis_of(node.get("axis", 0), x.ndim)
    sizes = listed(node, (x, *more), 1, "split", 13)
    if sizes is None:
        parts = node.get("num_outputs", len(node.outputs))
        size = -(-x.shape[axis] // parts)
        # the last part may be smaller
        sizes = [min(size, x.shape[axis] - size * i) for i in range(parts)]
    if sum(sizes) != x.shape[axis] or min(sizes) < 0 or len(sizes) != len(node.outputs):
        raise Refusal(f"a Split of {x.shape[axis]} into {quote(tuple(sizes))}")
    return tuple(library(x).split(x, np.cumsum(sizes)[:-1], axis))


def squeeze(node: Node, x: Value, *more: Value) -> Value:
    axes = listed(node, (x, *more), 1, "axes", 13)
    axes = [i for i, dim in enumerate(x.shape) if dim == 1] if axes is None else axes
    return library(x).squeeze(x, tuple(axis_of(axis, x.ndim) for axis in axes))


def unsqueeze(node: Node, x: Value, *more: Value) -> Value:
    axes = listed(node, (x, *more), 1, "axes", 13)
    return library(x).expand_dims(x, tuple(axis_of(axis, x.ndim + len(axes)) for axis in axes))


def expand(node: Node, x: Value, dims: Value) -> Value:
    wanted = np.broadcast_shapes(x.shape, whole(dims, "the shape of an Expand"))
    check_size(wanted, limit(x))
    return library(x).broadcast_to(x.reshape((1,) * (len(wanted) - x.ndim) + x.shape), wanted)


def tile(node: Node, x: Value, repeats: Value) -> Value:
    times = whole(repeats, "the repeats of a Tile")
    check_size([dim * count for dim, count in zip(x.shape, times, strict=True)], limit(x))
    return library(x).tile(x, times)


def pad(node: Node, x: Value, *more: Value) -> Value:
    """Pad; widths and fill value are attributes up to opset 10 and inputs from 11 on. Negative
    widths crop."""
    widths = listed(node, (x, *more), 1, "pads", 11)
    axes = (
        whole(more[2], "the axes of a Pad")
        if len(more) > 2 and more[2] is not None
        else range(x.ndim)
    )
    fill = (
        np.float32(node.get("value", 0.0))
        if node.opset < 11
        else more[1]
        if len(more) > 1
        else None
    )
    fill = (
        0.0
        if fill is None or not np.size(fill)
        else float(static(fill, "the value of a Pad").reshape(()))
    )
    pairs = [(0, 0)] * x.ndim
    for axis, low, high in zip(axes, widths[: len(axes)], widths[len(axes) :], strict=True):
        pairs[axis_of(axis, x.ndim)] = (low, high)
    check_size(
        [max(dim + low + high, 0) for dim, (low, high) in zip(x.shape, pairs, strict=True)],
        limit(x),
    )
    x = x[
        tuple(
            slice(max(-low, 0), dim - max(-high, 0))
            for dim, (low, high) in zip(x.shape, pairs, strict=True)
        )
    ]
    pairs, mode = [(max(low, 0), max(high, 0)) for low, high in pairs], node.get("mode", "constant")
    if mode == "constant":
        return library(x).pad(x, pairs, constant_values=np.asarray(fill).astype(x.dtype))
    if mode not in ("reflect", "edge", "wrap"):
        raise Refusal(f"a Pad of mode {quote(mode)} is not supported")
    return library(x).pad(x, pairs, mode=mode)


def range_(node: Node, start: Value, limit: Value, delta: Value) -> Value:
    low, high, step = (
        static(value, "a bound of a Range").reshape(()) for value in (start, limit, delta)
    )
    if not step:
        raise Refusal("a Range with a step of 0")
    check_size((max(int(-((low - high) // step)), 0),), MOST_STATIC)
    bounds: Any = (low, high, step)
    return np.arange(*bounds, dtype=low.dtype)


def constant_of_shape(node: Node, dims: Value) -> Value:
    wanted, fill = (
        whole(dims, "the shape of a ConstantOfShape"),
        node.get("value", np.zeros(1, np.float32)),
    )
    check_size(wanted, MOST_STATIC)
    return np.full(wanted, fill.reshape(()), fill.dtype)


def depth_to_space(node: Node, x: Value) -> Value:
    b, c, h, w = x.shape
    size = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        x = x.reshape(b, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(b, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, c // size**2, h * size, w * size)


def space_to_depth(node: Node, x: Value) -> Value:
    b, c, h, w = x.shape
    size = node.get("blocksize")
    x = x.reshape(b, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * size**2, h // size, w // size)


def einsum(node: Node, *values: Value) -> Value:
    return library(*values).einsum(node.get("equation"), *values)


SHAPE: dict[str, Callable[..., Any]] = {
    "Shape": shape,
    "Size": lambda node, x: np.array(x.size, np.int64),
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Einsum": einsum,
    "Resize": resize,
    "Upsample": resize,
}
"""Name of an operator -> function that computes it."""
