"""Values that flow through a graph: NumPy arrays if they depend on neither image nor weights, JAX
arrays otherwise."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import MOST_AXES, MOST_COMPUTED, MOST_ELEMENTS, MOST_STATIC
from jaxbd.limits import Refusal

Value = Any
"""np.ndarray (static) or jax.Array."""


def is_static(*values: Value) -> bool:
    """Whether all `values` are known without image and weights; None is ignored."""
    return all(isinstance(value, np.ndarray | np.generic) for value in values if value is not None)


def library(*values: Value) -> Any:
    """The library to compute with: NumPy if all `values` are static, otherwise jax.numpy."""
    return np if is_static(*values) else jnp


def static(value: Value, what: str) -> np.ndarray:
    """`value` as a NumPy array. Raises Refusal if it depends on image or weights."""
    if not is_static(value):
        raise Refusal(f"{what} depends on the image or the weights")
    return np.asarray(value)


def whole(value: Value, what: str) -> tuple[int, ...]:
    """A static vector as a tuple of integers. Raises Refusal, naming `what`, if it is not
    static."""
    return tuple(int(number) for number in static(value, what).reshape(-1))


def check_size(shape: Sequence[int], most: int = MOST_ELEMENTS) -> None:
    """Raises Refusal if a value of `shape` would have too many axes or elements."""
    if len(shape) > MOST_AXES or any(dim < 0 for dim in shape) or math.prod(map(int, shape)) > most:
        raise Refusal(f"a value of shape {'x'.join(str(dim)[:12] for dim in shape)} is too large")


def limit(*values: Value) -> int:
    """Maximum elements of a result computed from `values`; lower for static results, which are
    computed immediately."""
    return MOST_STATIC if is_static(*values) else MOST_ELEMENTS


def aligned(*values: Value) -> tuple[Any, list[Value]]:
    """(library, values brought to the same rank and float type), for an operator that broadcasts
    like NumPy.

    Static floats take the type of the others, so that a float64 constant does not change the
    precision.
    """
    # before anything of the broadcast size is allocated
    check_size(np.broadcast_shapes(*(np.shape(value) for value in values)), limit(*values))
    rank = max(np.ndim(value) for value in values)
    ranked = [
        value.reshape((1,) * (rank - np.ndim(value)) + np.shape(value))
        for value in map(_array, values)
    ]
    xp = library(*ranked)
    if xp is np:
        return np, ranked
    kinds = [
        value.dtype
        for value in ranked
        if not is_static(value) and jnp.issubdtype(value.dtype, jnp.floating)
    ]
    if kinds:
        kind = jnp.result_type(*kinds)
        ranked = [
            value.astype(kind) if jnp.issubdtype(value.dtype, jnp.floating) else value
            for value in ranked
        ]
    return jnp, [jnp.asarray(value) for value in ranked]


def _array(value: Value) -> Value:
    return np.asarray(value) if isinstance(value, np.generic) else value


def computed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an operator written in JAX: with static inputs it is computed immediately and gives
    NumPy arrays."""

    def run(node: Any, *inputs: Value) -> Any:
        if not is_static(*inputs):
            return function(
                node, *(jnp.asarray(v) if is_static(v) and v is not None else v for v in inputs)
            )
        with jax.ensure_compile_time_eval():
            result = function(
                node, *(None if value is None else jnp.asarray(value) for value in inputs)
            )
            return jax.tree.map(np.asarray, result)

    return run


def axis_of(axis: int, rank: int) -> int:
    """Converts a possibly negative axis to one in 0..rank-1."""
    if not -rank <= axis < max(rank, 1):
        raise Refusal(f"axis {axis} of a value with {rank} axes")
    return axis % max(rank, 1)


class Budget:
    """Adds up the elements of all computed values, so that many large values are refused as
    well."""

    def __init__(self, images: int = 1):
        self._images, self._static, self._computed = images, 0, 0

    def spend(self, value: Value) -> None:
        """Adds `value`. Raises Refusal if the sum is too large."""
        size = math.prod(np.shape(value))
        if is_static(value):
            self._static += size
        else:
            self._computed += size
        if self._static > MOST_STATIC:
            raise Refusal(f"its constants have more than {MOST_STATIC:,} elements")
        if self._computed > MOST_COMPUTED * self._images:
            raise Refusal(f"its values have more than {MOST_COMPUTED:,} elements for one image")
