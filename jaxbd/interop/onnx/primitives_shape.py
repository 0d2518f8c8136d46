"""Converts JAX primitives that reshape and join values to ONNX nodes; see `primitives`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxbd.interop.onnx.tracer import TO_FIRST, Dynamic, Known, Tracer
from jaxbd.limits import Refusal

Convert = Callable[..., Any]


def transpose(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    perm = tuple(equation.params["permutation"])
    if x.first and perm == TO_FIRST:  # in the graph, channels already come first
        return Dynamic(x.name)
    return Dynamic(t.add("Transpose", [t.last(x)], perm=perm))


def reshape(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    """Reshape to a shape with at most one open dimension, the number of images."""
    sizes = [size if isinstance(size, int) else -1 for size in equation.outvars[0].aval.shape]
    if sizes.count(-1) > 1:
        raise Refusal("a shape with two open sizes has no counterpart here")
    return Dynamic(t.add("Reshape", [t.last(x), t.integers(sizes)]))


def broadcast(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    """Adds axes of size 1. Larger ones need no node: ONNX operators broadcast implicitly."""
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    old = equation.invars[0].aval.shape
    new = [i for i in range(len(shape)) if i not in places]
    if any(shape[i] != 1 for i in new) or any(shape[i] != old[k] for k, i in enumerate(places)):
        raise Refusal("an activation that is broadcast along an axis has no counterpart here")
    return Dynamic(t.add("Unsqueeze", [t.last(x), t.integers(new)])) if new else x


def squeeze(t: Tracer, equation: Any, x: Dynamic) -> Dynamic:
    return Dynamic(t.add("Squeeze", [t.last(x), t.integers(equation.params["dimensions"])]))


def gather(t: Tracer, equation: Any, x: Any, places: Any) -> Dynamic:
    """Entries at known indices along one axis."""
    numbers = equation.params["dimension_numbers"]
    (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (None,)
    rank = len(equation.invars[0].aval.shape)
    rest = tuple(i for i in range(rank) if i != axis)
    plain = (
        numbers.collapsed_slice_dims == (axis,)
        and numbers.offset_dims == rest
        and not numbers.operand_batching_dims
    )
    if axis is None or not plain or not isinstance(places, Known) or places.array.ndim != 2:
        raise Refusal(
            "a gather along several axes, or at computed indices, has no counterpart here"
        )
    index = t.constant(places.array.reshape(-1), np.int64)
    return Dynamic(t.add("Gather", [x.name, index], axis=_place(x, axis)), x.first)


def _place(x: Dynamic, axis: int) -> int:
    """Position of the net's `axis` in the graph's value."""
    return TO_FIRST.index(axis) if x.first else axis


def concatenate(t: Tracer, equation: Any, *values: Any) -> Dynamic:
    names, first = t.operands(*values)
    axis = equation.params["dimension"]
    return Dynamic(t.add("Concat", names, axis=TO_FIRST.index(axis) if first else axis), first)


MOVES: dict[str, Convert] = {
    "transpose": transpose,
    "reshape": reshape,
    "broadcast_in_dim": broadcast,
    "squeeze": squeeze,
    "gather": gather,
    "concatenate": concatenate,
}
"""Name of a primitive -> function that converts it."""
