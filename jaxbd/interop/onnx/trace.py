"""Converts jaxbd's own nets to graphs: traces the net with JAX and turns each primitive into ONNX
nodes, with weights under PyTorch's names."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Net, UserError, Variables
from jaxbd.interop.onnx.graph import Graph
from jaxbd.interop.onnx.primitives import PRIMITIVES
from jaxbd.interop.onnx.tracer import Dynamic, Known, Tracer, batch_norm_p
from jaxbd.limits import Refusal
from jaxbd.models.norm import BatchNorm

IMAGE = "images"


def to_graph(
    net: Net,
    variables: Variables,
    image_shape: tuple[int, int, int],
    names: Mapping[str, str] | None = None,
) -> Graph:
    """The graph of `net` with `variables`, including input normalisation and activation bounds.

    Args:
      names: path of an array ("params/conv1/kernel") -> name of the tensor ("conv1.weight"). Paths
        without an entry are used themselves, with "." for "/".
    Raises: UserError naming an operation that has no counterpart in ONNX.
    """
    flat: Any = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(variables)), sep="/")
    # a symbolic batch size, so that the graph takes any number of images
    (count,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((count, *image_shape), jnp.float32)
    nest = lambda arrays: {"batch_stats": {}, **flax.traverse_util.unflatten_dict(arrays, sep="/")}
    with nn.intercept_methods(_normalise_in_one):
        traced = jax.make_jaxpr(lambda arrays, images: net.apply(nest(arrays), images)[0])(
            flat, images
        )
    tracer = Tracer(PRIMITIVES)
    order = sorted(flat)  # as JAX flattens a dictionary
    called = lambda path: str((names or {}).get(path, path.replace("/", ".")))
    given = [Known(flat[path], called(path)) for path in order]
    try:
        (logits,) = tracer.run(
            traced.jaxpr, traced.consts, [*given, Dynamic(tracer.name(IMAGE), True)]
        )
    except Refusal as refusal:
        raise UserError(f"the net cannot be written as ONNX: {refusal}") from None
    if not isinstance(logits, Dynamic):
        raise UserError("the net cannot be written as ONNX: its logits do not depend on the image")
    output = tracer.add("Identity", [tracer.last(logits)], "logits")
    height, width, channels = image_shape
    shape = (None, channels, height, width)
    return Graph(
        "jaxbd",
        tuple(tracer.nodes),
        IMAGE,
        shape,
        np.dtype(np.float32),
        (output,),
        output,
        "",
        tracer.tensors,
        {},
        fixed=frozenset(tracer.fixed),
    )


def _normalise_in_one(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Flax interceptor that traces a BatchNorm as a single primitive, followed by its bounds."""
    module = context.module
    if not isinstance(module, BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    if module.has_variable("folded", "shift"):
        raise UserError("folded variables cannot be written; use the variables as they were")
    mean, var = (module.get_variable("batch_stats", name) for name in ("mean", "var"))
    scale, bias = jnp.ones_like(mean), jnp.zeros_like(mean)
    if module.affine:
        scale, bias = (module.get_variable("params", name) for name in ("scale", "bias"))
    x = batch_norm_p.bind(args[0], scale, bias, mean, var, epsilon=module.epsilon)
    if module.has_variable("bounds", "upper"):
        row = (1,) * (x.ndim - 1) + (-1,)
        lower, upper = (
            module.get_variable("bounds", name).reshape(row) for name in ("lower", "upper")
        )
        x = jnp.clip(x, lower, upper)
    return x
