"""Converts the tensors of a PyTorch state_dict to our variables and back."""

import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from jaxbd.base import UserError, Variables
from jaxbd.interop.layouts.naming import AS_IT_IS, Layout, counters


def to_variables(tensors: Mapping[str, np.ndarray], layout: Layout) -> Variables:
    """Converts a state_dict to our variables in float32: convolution kernels OIHW -> HWIO, linear
    layers transposed.

    Raises: UserError as `check` does.
    """
    check(tensors, layout)
    flat = {
        path: jnp.asarray(_to_ours(np.asarray(tensors[name]), layout))
        for path, name in layout.names.items()
    }
    return {"batch_stats": {}, **flax.traverse_util.unflatten_dict(flat, sep="/")}


def to_tensors(
    variables: Variables, layout: Layout, original: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Converts `variables` to a state_dict, the inverse of `to_variables`.

    `original` is the state_dict that the layout was recognised from. If given, the result has its
    names, order and dtypes, tensors with unchanged float32 values are the original arrays
    themselves, and the BatchNorm counters keep their values. Otherwise tensors are float32 and the
    counters 0. Collections other than "params" and "batch_stats", e.g. "bounds", have no place in a
    state_dict and are left out.

    Raises: UserError when `variables` are not the net's, when `original` does not fit the layout,
      or when a new value overflows the original's dtype.
    """
    arrays = _flat_arrays(variables, layout)
    if original is None:
        zeros = {name: np.zeros((), np.int64) for name in counters(layout)}
        ours = {layout.names[path]: _to_torch(array, layout) for path, array in arrays.items()}
        return {name: {**ours, **zeros}[name] for name in sorted({**ours, **zeros}, key=_natural)}
    check(original, layout)
    paths = {name: path for path, name in layout.names.items()}
    return {
        name: _update(name, arrays[paths[name]], tensor, layout) if name in paths else tensor
        for name, tensor in original.items()
    }


def check(tensors: Mapping[str, np.ndarray], layout: Layout) -> None:
    """Raises UserError listing the tensors that are missing, extra, of another shape or not
    floating-point.

    BatchNorm's counters of batches may be absent, since old files have none.
    """
    expected = {
        name: torch_shape(layout.shapes[path], layout) for path, name in layout.names.items()
    }
    counted = counters(layout)
    found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    wrong = [
        f"{name} is {_by(found[name])}, expected {_by(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected and name not in counted],
        "of another shape": wrong,
        "not floating-point": [
            name
            for name in expected
            if name in found and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
        ],
    }
    listed = "; ".join(
        f"{len(names)} {kind} ({few(names)})" for kind, names in problems.items() if names
    )
    if listed:
        title = f"{layout.spec.arch} in {layout.naming} naming"
        raise UserError(
            f"the tensors do not fit {title}: {listed}; give the right architecture or save the"
            " model again"
        )


def torch_shape(shape: tuple[int, ...], layout: Layout | None = None) -> tuple[int, ...]:
    """Our shape -> PyTorch's: convolution kernels [h, w, I, O] -> [O, I, h, w], linear layers
    [I, O] -> [O, I]."""
    if _keeps_axes(layout):
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _keeps_axes(layout: Layout | None) -> bool:
    return layout is not None and layout.naming == AS_IT_IS


def _to_torch(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A copy in PyTorch's order of axes. It is copied because PyTorch needs writeable arrays and
    JAX's are read-only."""
    if _keeps_axes(layout):
        return np.array(array, order="C")
    return np.array(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T, order="C")


def _to_ours(tensor: np.ndarray, layout: Layout) -> np.ndarray:
    """Converts to float32 in our order of axes. Depthwise kernels [C, 1, h, w] -> [h, w, 1, C] need
    no special treatment."""
    with np.errstate(over="ignore"):
        tensor = tensor.astype(np.float32)
    if _keeps_axes(layout):
        return np.ascontiguousarray(tensor).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T)


def _flat_arrays(variables: Variables, layout: Layout) -> dict[str, np.ndarray]:
    """Path -> float32 array, for the two collections that a state_dict holds. Raises UserError when
    they are not the net's."""
    collections = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    flat = {
        p: np.asarray(x, np.float32)
        for p, x in flax.traverse_util.flatten_dict(collections, sep="/").items()
    }
    differing = sorted(
        p for p in {*flat, *layout.shapes} if p not in flat or flat[p].shape != layout.shapes.get(p)
    )
    if differing:
        raise UserError(
            f"the variables are not those of {layout.spec.arch}: {few(differing)} differ in name or"
            " shape"
        )
    return flat


def _update(name: str, array: np.ndarray, original: np.ndarray, layout: Layout) -> np.ndarray:
    """`original` itself if `array` holds its float32 values, otherwise `array` converted to the
    original's order of axes and dtype."""
    # compared in float32, the type of the variables, so that unchanged float16 or float64 tensors
    # stay bit-identical
    if np.array_equal(_to_ours(np.asarray(original), layout), array, equal_nan=True):
        return original
    with np.errstate(over="ignore"):
        new = _to_torch(array, layout).astype(original.dtype)
    if not np.array_equal(
        np.isfinite(new.astype(np.float32)), np.isfinite(_to_torch(array, layout))
    ):
        raise UserError(f"new values of {name} do not fit {original.dtype}; export as float32")
    return new


def _natural(name: str) -> list[Any]:
    """Sort key that orders numbers by value: "conv2" before "conv10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def few(names: list[str], most: int = 4) -> str:
    """The first few names and the number of further ones; long names are truncated, control
    characters escaped."""
    first = [name[:120].encode("unicode_escape").decode() for name in names[:most]]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")


def _by(shape: tuple[int, ...]) -> str:
    """A shape in words: "64x3x7x7", or "a number" for a scalar."""
    return "x".join(map(str, shape)) or "a number"
