"""Normalises a graph so that its weights can be found."""

import jax.numpy as jnp
import numpy as np

from jaxbd.interop.onnx.graph import Graph, Node
from jaxbd.interop.onnx.names import unique

BATCH_NORM = "BatchNormalization"


def tidy(graph: Graph) -> Graph:
    """Gives every weight of `graph` its own tensor.

    Constant nodes that hold weights become tensors. An Identity of a tensor (exporters store equal
    tensors once) becomes a tensor with the copy's name. Parameters that a normalisation shares
    with others, or with another operator, are copied for it.
    """
    tensors, nodes = dict(graph.tensors), list[Node]()
    for node in graph.nodes:
        array = node.get("value") if node.op == "Constant" else None
        if (
            isinstance(array, np.ndarray)
            and array.size > 1
            and jnp.issubdtype(array.dtype, jnp.floating)
        ):
            tensors[node.outputs[0]] = array
            continue
        if (
            node.op == "Identity"
            and node.inputs[0] in tensors
            and node.outputs[0] not in graph.outputs
        ):
            tensors[node.outputs[0]] = tensors[node.inputs[0]]
            continue
        nodes.append(node)
    # folding takes a normalisation's parameters away, and repairs change them on their own
    used = set(graph.outputs).union(*(node.inputs for node in nodes if node.op != BATCH_NORM))
    for i, node in enumerate(nodes):
        if node.op == BATCH_NORM:
            inputs = [_claim(name, used, tensors) for name in node.inputs[1:]]
            nodes[i] = node._replace(inputs=(node.inputs[0], *inputs))
    read = {value for node in nodes for value in node.inputs} | set(graph.outputs)
    needed = {name: array for name, array in tensors.items() if name in read}
    return graph._replace(nodes=tuple(nodes), tensors=needed)


def _claim(name: str, used: set[str], tensors: dict[str, np.ndarray]) -> str:
    """`name`, or the name of a new copy if another operator already uses the tensor."""
    if name in used and name in tensors:
        copy = unique(f"{name}_copy", tensors)
        tensors[copy], name = tensors[name], copy
    used.add(name)
    return name
