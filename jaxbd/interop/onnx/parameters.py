"""Decides which of a graph's tensors are weights, and maps them to variables by name and order of
axes.

Variables have the names and axes of jaxbd's own nets, so that all defences work on them:
convolution kernels [h, w, I, O] and linear ones [I, O] are `<layer>/kernel`; BatchNormalization has
`scale` and `bias`, with `mean` and `var` in `batch_stats`. A weight with another role becomes a
parameter with the name and axes it has in the file.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbd.base import Variables
from jaxbd.interop.onnx.graph import Graph, Node, needed, readers
from jaxbd.interop.onnx.names import layer_name, safe, unique
from jaxbd.interop.onnx.tidying import BATCH_NORM

STATIC_INPUTS: dict[str, frozenset[int]] = {
    **dict.fromkeys(("Min", "Max"), frozenset(range(8))),
    **dict.fromkeys(("Sub", "Div"), frozenset({1})),
    **dict.fromkeys(
        ("Clip", "Pow", "Pad", "Resize", "Upsample", "Dropout", "Where", "Range", "OneHot"),
        frozenset({1, 2, 3, 4}),
    ),
}
"""Operator -> positions of inputs that are settings or bounds, not weights."""
NORMS = ("LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization")
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
PASSING = ("Identity", "Cast", "Transpose")


class Slot(NamedTuple):
    """A tensor's place among the variables.

    Attributes:
      path: collection, then the names below it.
      axes: permutation of the tensor's axes that gives the variable's; None for no change.
    """

    path: tuple[str, ...]
    axes: tuple[int, ...] | None = None

    def to_variable(self, tensor: np.ndarray) -> np.ndarray:
        """Converts a file's tensor to a float32 array in the variables' order of axes."""
        with np.errstate(over="ignore"):
            array = np.asarray(tensor).astype(np.float32)
        return np.ascontiguousarray(array if self.axes is None else array.transpose(self.axes))

    def to_tensor(self, array: Any) -> Any:
        """The inverse permutation of axes, for a NumPy or JAX array."""
        return (
            array
            if self.axes is None
            else array.transpose(tuple(int(i) for i in np.argsort(self.axes)))
        )


class Layer(NamedTuple):
    """A layer with an output that `Net.outputs` returns and that activation bounds can correct.

    Attributes:
      name: the layer's name, without slashes.
      node: the node that computes the layer's output.
      value: name of the output, after a bias.
      axis: the output's channel axis.
    """

    name: str
    node: Node
    value: str
    axis: int


class Layout(NamedTuple):
    """Slots and layers of a graph.

    Attributes:
      slots: name of a tensor -> its slot.
      layers: the layers that `Net.outputs` returns, in order.
      norms: name of a BatchNormalization's output -> its layer's name.
      nodes: the nodes that the logits depend on.
    """

    slots: dict[str, Slot]
    layers: tuple[Layer, ...]
    norms: dict[str, str]
    nodes: tuple[Node, ...]


def lay_out(graph: Graph) -> Layout:
    """Determines slots and layers of a tidied graph."""
    nodes = needed(graph, graph.logits)
    after, slots, taken = readers(nodes), {}, set()
    constant = _find_image_constants(graph, after) | graph.fixed
    weights = {name: array for name, array in graph.tensors.items() if name not in constant}
    turned = {
        node.outputs[0]: node.inputs[0]
        for node in nodes
        if node.op == "Transpose" and node.get("perm") == (1, 0)
    }
    makers = {value: node for node in nodes for value in node.outputs if value}
    answers = _same_values(graph.logits, makers)
    layers: list[Layer] = []
    norms: dict[str, str] = {}
    for node in nodes:
        parts, value = _parts(node, weights, after, turned)
        if not parts:
            continue
        layer = unique(layer_name(node, parts), taken)
        taken.add(layer)
        for tensor, leaf, axes in parts:
            collection = "batch_stats" if leaf in ("mean", "var") else "params"
            # a weight that layers share keeps the place of the first one
            slots.setdefault(tensor, Slot((collection, layer, leaf), axes))
        if node.op == BATCH_NORM:
            norms[node.outputs[0]] = layer
        if _is_returned(node, value, answers, after):
            last = node.op in ("Gemm", "MatMul", "LayerNormalization", "RMSNormalization")
            layers.append(Layer(layer, node, value, -1 if last else 1))
        elif value in answers and node.op in ("Gemm", "MatMul"):
            layers += _features(node, makers, layers, taken)
    for name, array in weights.items():
        if name not in slots and _is_weight(name, array, after):
            own = unique(safe(name), taken)
            taken.add(own)
            slots[name] = Slot(("params", own))
    return Layout(slots, tuple(layers), norms, nodes)


def _parts(
    node: Node,
    tensors: Mapping[str, np.ndarray],
    after: Mapping[str, list[Node]],
    turned: Mapping[str, str],
) -> tuple[list[tuple[str, str, Any]], str]:
    """(tensors of a layer, each with its leaf name and axes as in `Slot`; name of the layer's
    output). Without tensors the node is not a layer.

    Args:
      turned: value -> name of the tensor it is the transpose of.
    """
    has = lambda position, rank: (
        node.has(position)
        and node.inputs[position] in tensors
        and tensors[node.inputs[position]].ndim in rank
    )
    value = node.outputs[0]
    parts: list[tuple[str, str, Any]]
    if node.op == "Conv" and has(1, (3, 4, 5)):
        rank = tensors[node.inputs[1]].ndim
        parts = [(node.inputs[1], "kernel", (*range(2, rank), 1, 0))]
        return parts + ([(node.inputs[2], "bias", None)] if has(2, (1,)) else []), value
    if node.op == "Gemm" and has(1, (2,)):
        parts = [(node.inputs[1], "kernel", (1, 0) if node.get("transB", 0) else None)]
        return parts + ([(node.inputs[2], "bias", None)] if has(2, (1,)) else []), value
    # a linear layer without Gemm: MatMul, perhaps with a transposed weight, then Add
    if node.op == "MatMul" and (has(1, (2,)) or turned.get(node.inputs[1]) in tensors):
        kernel = node.inputs[1]
        parts = [
            (kernel, "kernel", None) if kernel in tensors else (turned[kernel], "kernel", (1, 0))
        ]
        adds = after.get(value, [])
        if len(adds) == 1 and adds[0].op == "Add":
            bias = next(
                (name for name in adds[0].inputs if name in tensors and tensors[name].ndim == 1),
                None,
            )
            if bias is not None:
                return [*parts, (bias, "bias", None)], adds[0].outputs[0]
        return parts, value
    if node.op == BATCH_NORM and all(has(position, (1,)) for position in (1, 2, 3, 4)):
        leaves = ("scale", "bias", "mean", "var")
        return [(node.inputs[i + 1], leaf, None) for i, leaf in enumerate(leaves)], value
    if node.op in NORMS and has(1, (1, 2, 3, 4)):
        parts = [(node.inputs[1], "scale", None)]
        return parts + ([(node.inputs[2], "bias", None)] if has(2, (1, 2, 3, 4)) else []), value
    return [], value


def _features(
    classifier: Node, makers: Mapping[str, Node], layers: list[Layer], taken: set[str]
) -> list[Layer]:
    """A layer "features" for the classifier's input, as jaxbd's own nets have it; none if another
    layer's output already is that input."""
    value = classifier.inputs[0]
    if value not in makers or any(layer.value == value for layer in layers):
        return []
    name = unique("features", taken)
    taken.add(name)
    return [Layer(name, makers[value], value, -1)]


def _same_values(logits: str, makers: Mapping[str, Node]) -> set[str]:
    """Names of the logits and of the values that they are a copy of."""
    found = {logits}
    while logits in makers and makers[logits].op in ("Identity", "Cast") and makers[logits].has(0):
        logits = makers[logits].inputs[0]
        found.add(logits)
    return found


def _is_returned(
    node: Node, value: str, answers: set[str], after: Mapping[str, list[Node]]
) -> bool:
    """Whether `Net.outputs` returns this layer. It omits the classifier itself, and layers that
    only a BatchNormalization reads, since that one is returned instead."""
    if value in answers:
        return False
    return node.op == BATCH_NORM or {reader.op for reader in after.get(value, [])} != {BATCH_NORM}


def _is_weight(name: str, array: np.ndarray, after: Mapping[str, list[Node]]) -> bool:
    """Whether a tensor outside all layers is trainable: floats that are not an operator's
    settings."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.ndim or array.size < 2:
        return False
    roles = [
        (node.op, i)
        for node in after.get(name, [])
        for i, value in enumerate(node.inputs)
        if value == name
    ]
    return bool(roles) and all(i not in STATIC_INPUTS.get(op, ()) for op, i in roles)


def _find_image_constants(graph: Graph, after: Mapping[str, list[Node]]) -> set[str]:
    """Names of the tensors that normalise the image: settings, not weights."""
    found, value = set(), graph.image
    while len(nodes := after.get(value, [])) == 1 and nodes[0].op in (*ARITHMETIC, *PASSING):
        found |= set(nodes[0].inputs) - {value}
        value = nodes[0].outputs[0]
    return found


def variables_of(graph: Graph, layout: Layout) -> Variables:
    """The graph's weights and moments as float32 variables."""
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, slot in layout.slots.items():
        place = found
        for part in slot.path[:-1]:
            place = place.setdefault(part, {})
        place[slot.path[-1]] = jnp.asarray(slot.to_variable(graph.tensors[name]))
    return found


def look_up(variables: Variables, path: tuple[str, ...]) -> Any:
    """The array at `path`, or None."""
    found: Any = variables
    for part in path:
        if part not in found:
            return None
        found = found[part]
    return found
