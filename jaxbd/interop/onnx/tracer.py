"""Converts a jaxpr to an ONNX graph, given a converter for each primitive.

Inside the graph activations are [B, C, H, W], as ONNX expects; a BatchNorm stays a single node.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jaxbd.interop.onnx.build import Builder
from jaxbd.limits import Refusal

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
INNER = ("call_jaxpr", "jaxpr", "fun_jaxpr")
"""Parameters of an equation that hold an inner jaxpr."""

batch_norm_p = Primitive("jaxbd_batch_norm")
batch_norm_p.def_abstract_eval(lambda x, *others, epsilon: x)


class Dynamic(NamedTuple):
    """A value that depends on the image.

    Attributes:
      name: its name in the graph.
      first: whether it is [B, C, H, W] in the graph while the net has [B, H, W, C].
    """

    name: str
    first: bool = False


class Known(NamedTuple):
    """An array that does not depend on the image. `origin` is the name of the weight that it equals
    up to axes of size 1, or ""."""

    array: np.ndarray
    origin: str = ""


class Tracer(Builder):
    """A graph under construction from a jaxpr.

    Args:
      convert: name of a primitive -> (tracer, equation, *inputs) -> value.
    """

    def __init__(self, convert: Mapping[str, Callable[..., Any]]):
        super().__init__()
        self._convert = convert

    def run(self, jaxpr: Any, consts: Any, given: list[Any]) -> list[Any]:
        """Converts `jaxpr` with the inputs `given`; returns its outputs. Raises Refusal naming a
        primitive that is not known."""
        values = dict(zip(jaxpr.constvars, (Known(np.asarray(c)) for c in consts), strict=True))
        values |= dict(zip(jaxpr.invars, given, strict=True))
        read = lambda atom: (
            values[atom] if not hasattr(atom, "val") else Known(np.asarray(atom.val))
        )
        for equation in jaxpr.eqns:
            inputs, name = [read(atom) for atom in equation.invars], equation.primitive.name
            inner = next((equation.params[key] for key in INNER if key in equation.params), None)
            if inner is not None:
                results = self.run(inner.jaxpr, inner.consts, inputs)
            # batch_norm_p cannot be computed, it has no implementation
            elif all(isinstance(x, Known) for x in inputs) and name != batch_norm_p.name:
                results = self._compute_known(equation, inputs)
            elif name in self._convert:
                results = [self._convert[name](self, equation, *inputs)]
            else:
                raise Refusal(f"JAX's operation {name} has no counterpart here")
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _compute_known(self, equation: Any, inputs: list[Known]) -> list[Known]:
        """Computes an equation with known inputs."""
        with jax.ensure_compile_time_eval():
            made = equation.primitive.bind(
                *(jnp.asarray(x.array) for x in inputs), **equation.params
            )
        arrays = [np.asarray(x) for x in (made if equation.primitive.multiple_results else [made])]
        # still the same weight if only axes of size 1 were added or removed
        origin = (
            inputs[0].origin
            if inputs and equation.primitive.name in ("reshape", "convert_element_type", "squeeze")
            else ""
        )
        same = origin and [d for d in arrays[0].shape if d != 1] == [
            d for d in inputs[0].array.shape if d != 1
        ]
        return [Known(array, origin if same else "") for array in arrays]

    def weight(
        self,
        value: Known,
        axes: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> str:
        """The name of a tensor that holds `value`, with its axes permuted or its shape changed."""
        array = value.array if axes is None else value.array.transpose(axes)
        array = np.ascontiguousarray(array if shape is None else array.reshape(shape))
        array = array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
        if not value.origin:
            name = self.constant(array)
            self.store(name)
            return name
        # a shared weight is stored once
        if value.origin in self.tensors and self.tensors[value.origin].shape == array.shape:
            return value.origin
        name = self.name(value.origin)
        self.tensors[name] = array
        return name

    def operands(self, *values: Any) -> tuple[list[str], bool]:
        """(names, whether channels come first) of the operands of an elementwise operator, all
        brought to the same order of axes."""
        first = any(isinstance(value, Dynamic) and value.first for value in values)
        names = []
        for value in values:
            if isinstance(value, Dynamic):
                names.append(
                    value.name
                    if value.first == first
                    else self.add("Transpose", [value.name], perm=TO_FIRST)
                )
            # JAX broadcasts explicitly: constants of any other rank are scalars
            elif first and value.array.ndim == 4:
                names.append(self.weight(value, TO_FIRST))
            else:
                names.append(self.weight(value))
        return names, first

    def last(self, value: Dynamic) -> str:
        """The name of `value` with the net's own order of axes (channels last)."""
        return self.add("Transpose", [value.name], perm=TO_LAST) if value.first else value.name

    def to_first(self, value: Any) -> str:
        """The name of a 4-D value with channels first."""
        if isinstance(value, Known):
            return self.weight(value, TO_FIRST)
        return value.name if value.first else self.add("Transpose", [value.name], perm=TO_FIRST)
