"""How a graph uses the image: integer pixels, and whether the logits follow small changes of it.

A search follows gradients. Where a graph rounds, the gradient is exactly 0: no trigger would be
found, and a backdoored net would pass for a clean one.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Graph, Node
from jaxbd.interop.onnx.tensors import TYPES
from jaxbd.limits import Refusal, quote

SIZES = ("Shape", "Size")
MOVES = frozenset(
    [
        *("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
        *("Slice", "Gather", "Concat", "Split", "Pad", "Expand", "Tile", "MaxPool"),
        *("DepthToSpace", "SpaceToDepth"),
    ]
)
"""Operators that return numbers of their input unchanged."""
STEPS = frozenset(
    [
        *("Floor", "Ceil", "Round", "Sign", "ArgMax", "ArgMin", "OneHot"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not"),
    ]
)
"""Operators whose derivative is 0 wherever it exists."""


def as_floats(graph: Graph, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """`nodes`, for an image of floats in 0..255 instead of integers.

    Casts between integer types, on the image's way to its first cast to float, become Identity:
    they change no number, but as casts they would have no gradient. A torch.export program stays
    as it is: `aten_pixels` has followed its integers.

    Raises: Refusal naming a node that computes with integer pixels.
    """
    kind = np.dtype(graph.image_type)
    if kind.kind not in "iu" or graph.kind != "onnx":
        return tuple(nodes)
    if kind == np.int8:
        raise Refusal("it takes int8 images, which cannot hold pixels of 0..255")
    whole, found = {graph.image}, []
    for node in nodes:
        read = [i for i, value in enumerate(node.inputs) if value in whole]
        if read and node.op not in SIZES and not (node.op == "CastLike" and read == [1]):
            if _is_whole(_cast_to(node, graph)):
                node = node._replace(op="Identity", inputs=node.inputs[:1], attributes={})
            if node.op in MOVES and (read == [0] or node.op == "Concat"):
                whole |= set(node.outputs)
            elif not _is_float(_cast_to(node, graph)):
                raise Refusal(
                    f"operator {node.op} of node {quote(node.name or node.outputs[0])} computes "
                    "with the image as integers; cast it to float first"
                )
        found.append(node)
    return tuple(found)


def _cast_to(node: Node, graph: Graph) -> np.dtype | None:
    """The type that `node` casts to; None if it is no cast. A CastLike of a computed value is taken
    for one to float."""
    if node.op == "Cast":
        return TYPES.get(node.get("to"))
    if node.op == "CastLike":
        return graph.tensors.get(node.inputs[1], np.zeros(0, np.float32)).dtype
    return None


def _is_whole(kind: np.dtype | None) -> bool:
    """Whether `kind` is an integer type that holds 0..255."""
    return kind is not None and kind.kind in "iu" and kind != np.int8


def _is_float(kind: np.dtype | None) -> bool:
    return kind is not None and jnp.issubdtype(kind, jnp.floating)


def check_gradient(graph: Graph, nodes: Sequence[Node]) -> None:
    """Raises Refusal naming an operator that rounds, if the image reaches the logits only through
    such operators."""
    smooth, step = {graph.image}, None
    for node in nodes:
        if not smooth & set(node.inputs) or node.op in SIZES:
            continue
        kind = _cast_to(node, graph)
        if node.op in STEPS or (kind is not None and not _is_float(kind)):
            step = node
        else:
            smooth |= set(node.outputs)
    if step is not None and graph.logits not in smooth:
        raise Refusal(
            f"operator {step.op} of node {quote(step.name or step.outputs[0])} rounds what the "
            "logits are computed from, so no trigger can be searched; export the model without it"
        )
