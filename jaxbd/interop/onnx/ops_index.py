"""Operators that read or write entries at indices."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.values import (
    Value,
    aligned,
    axis_of,
    check_size,
    is_static,
    library,
    limit,
    static,
    whole,
)
from jaxbd.limits import Refusal, quote


def slice_(node: Node, x: Value, *bounds: Value) -> Value:
    """Slice; the bounds are attributes up to opset 9 and inputs from 10 on."""
    if node.opset < 10:
        starts, ends, axes, steps = node.get("starts"), node.get("ends"), node.get("axes"), None
    else:
        given = [None if value is None else whole(value, "a bound of a Slice") for value in bounds]
        starts, ends, axes, steps = [*given, None, None][:4]
    axes = range(len(starts)) if axes is None else axes
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        axis = axis_of(axis, x.ndim)
        if step < 0 and end < -x.shape[axis]:
            end = None  # ONNX means "to the start"; in Python a negative end counts from the end
        if step < 0 and start < -x.shape[axis]:
            start = 0  # ONNX starts at the first entry, Python before it
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def gather(node: Node, x: Value, indices: Value) -> Value:
    axis = axis_of(node.get("axis", 0), x.ndim)
    if is_static(indices):
        # checked here, because JAX does not raise for indices out of range
        outside = (indices < -x.shape[axis]) | (indices >= x.shape[axis])
        if outside.any():
            raise Refusal(f"a Gather of index {int(indices[outside][0])} among {x.shape[axis]}")
        indices = np.where(indices < 0, indices + x.shape[axis], indices)
        check_size((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), limit(x))
    return library(x, indices).take(x, indices, axis=axis)


def gather_elements(node: Node, x: Value, indices: Value) -> Value:
    return library(x, indices).take_along_axis(
        x, _within(indices), axis_of(node.get("axis", 0), x.ndim)
    )


def gather_nd(node: Node, x: Value, indices: Value) -> Value:
    if node.get("batch_dims", 0):
        raise Refusal("a GatherND with batch_dims is not supported")
    return x[tuple(_within(indices)[..., i] for i in range(indices.shape[-1]))]


def scatter_nd(node: Node, x: Value, indices: Value, updates: Value) -> Value:
    if node.get("reduction", "none") != "none":
        raise Refusal(f"a ScatterND with reduction {quote(node.get('reduction'))} is not supported")
    places = tuple(
        static(indices, "where a ScatterND writes")[..., i] for i in range(indices.shape[-1])
    )
    if is_static(x, updates):
        result = np.array(x)
        result[places] = updates
        return result
    x = jnp.asarray(x)
    return x.at[places].set(jnp.asarray(updates, x.dtype))


def _within(indices: Value) -> Value:
    return np.asarray(indices, np.int32) if is_static(indices) else indices


def trilu(node: Node, x: Value, k: Value = None) -> Value:
    xp, shift = (
        library(x),
        0 if k is None else int(static(k, "the diagonal of a Trilu").reshape(())),
    )
    return (xp.triu if node.get("upper", 1) else xp.tril)(x, shift)


def one_hot(node: Node, indices: Value, depth: Value, values: Value) -> Value:
    count = int(static(depth, "the depth of a OneHot").reshape(()))
    axis = axis_of(node.get("axis", -1), indices.ndim + 1)
    check_size((*indices.shape, count), limit(indices))
    places = np.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    # negative indices count from the end; those out of range match no place
    indices = library(indices).where(indices < 0, indices + count, indices)
    xp, (found, places) = aligned(library(indices).expand_dims(indices, axis), places)
    return xp.where(found == places, values[1], values[0]).astype(values.dtype)


INDEX: dict[str, Callable[..., Any]] = {
    "Slice": slice_,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
    "Trilu": trilu,
    "OneHot": one_hot,
}
"""Name of an operator -> function that computes it."""
