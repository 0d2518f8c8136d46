"""Writes graphs as ONNX files, with repaired weights instead of the stored ones and activation
bounds as nodes."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import UserError, Variables
from jaxbd.files import replacing, versions
from jaxbd.interop.onnx import interpret
from jaxbd.interop.onnx.graph import Graph, Node
from jaxbd.interop.onnx.open import Opened
from jaxbd.interop.onnx.parameters import Layout, lay_out, look_up
from jaxbd.interop.onnx.read import import_onnx
from jaxbd.interop.onnx.tensors import TYPES
from jaxbd.interop.onnx.tidying import tidy

MOST_BYTES = (2 << 30) - (1 << 20)
"""Size limit of a file: a protocol buffer cannot exceed 2 GiB."""
OPEN = 1e38
"""Bounds beyond this do not clip and get no node."""


class Parts(NamedTuple):
    """Nodes and tensors of a graph to write."""

    nodes: list[Node]
    tensors: dict[str, np.ndarray]


def parts_of(graph: Graph) -> Parts:
    """The nodes and tensors of a graph, unchanged."""
    return Parts(list(graph.nodes), graph.tensors)


def write(path: pathlib.Path, found: Opened, variables: Variables) -> None:
    """Writes the graph of `found` with `variables` instead of its own weights, moments and bounds.

    Raises: UserError if the package onnx is missing, the file would be too large, or onnx rejects
      the graph.
    """
    graph, layout = prepare(found)
    parts = with_variables(graph, layout, variables, ranks_of(found, variables))
    save(path, as_model(graph, parts, found.classes))


def prepare(found: Opened) -> tuple[Graph, Layout]:
    """The tidied graph and its layout."""
    graph = tidy(found.graph)
    return graph, lay_out(graph)


def ranks_of(found: Opened, variables: Variables) -> dict[str, int]:
    """Number of axes of every layer's output; empty if there are no bounds to place."""
    if not variables.get("bounds"):
        return {}
    net, _ = interpret.to_net(found.graph, channels_first=found.channels_first, batch=found.batch)
    images = jax.ShapeDtypeStruct((found.batch, *found.image_shape), jnp.float32)
    plain = {name: tree for name, tree in variables.items() if name != "bounds"}
    assert net.outputs is not None
    outputs = jax.eval_shape(net.outputs, plain, images)[1]
    return {name: values.ndim for name, values in outputs.items()}


def with_variables(
    graph: Graph, layout: Layout, variables: Variables, ranks: Mapping[str, int]
) -> Parts:
    """Nodes and tensors of `graph` with the arrays of `variables`; bounds become nodes after their
    layers."""
    tensors = {
        name: updated(graph.tensors[name], layout, name, variables) for name in graph.tensors
    }
    bounds = variables.get("bounds", {})
    at_value = {layer.value: layer for layer in layout.layers if bounds.get(layer.name)}
    unknown = sorted(set(bounds) - {layer.name for layer in layout.layers})
    if unknown:
        raise UserError(f"the graph has no layer {unknown[0]!r}, which has bounds")
    kinds = {slot.path[1]: graph.tensors[name].dtype for name, slot in layout.slots.items()}
    common = next(iter(kinds.values()), np.dtype(np.float32))
    nodes: list[Node] = []
    for node in graph.nodes:
        layer = next((at_value[value] for value in node.outputs if value in at_value), None)
        if layer is None:
            nodes.append(node)
            continue
        dtype = kinds.get(layer.name, common)
        # the layer's own output is renamed, so that all its readers get the corrected one
        raw = f"{layer.value}.uncorrected"
        nodes.append(
            node._replace(outputs=tuple(raw if v == layer.value else v for v in node.outputs))
        )
        shape = (-1,) if layer.axis == -1 else (-1, *(1,) * (ranks[layer.name] - 2))
        steps = _corrections(bounds[layer.name])
        for number, (op, leaf, array) in enumerate(steps):
            constant = f"{layer.name}.bounds.{leaf}"
            tensors[constant] = np.asarray(array, np.float32).reshape(shape).astype(dtype)
            result = layer.value if number == len(steps) - 1 else f"{layer.value}.{leaf}"
            nodes.append(Node(op, constant, (raw, constant), (result,), {}, graph.opset))
            raw = result
        if not steps:
            nodes[-1] = node
    return Parts(nodes, tensors)


def _corrections(bounds: Mapping[str, Any]) -> list[tuple[str, str, np.ndarray]]:
    """The steps (operator, name, constant) of h(z) = max(min((z - mean) / std, upper), lower), in
    the order in which jaxbd computes them."""
    steps = []
    if "mean" in bounds:
        steps += [("Sub", "mean", bounds["mean"]), ("Div", "std", bounds["std"])]
    if "upper" in bounds and np.any(np.asarray(bounds["lower"]) > -OPEN):
        # Max and Min, because Clip takes only scalar bounds
        steps.append(("Max", "lower", bounds["lower"]))
    if "upper" in bounds and np.any(np.asarray(bounds["upper"]) < OPEN):
        steps.append(("Min", "upper", bounds["upper"]))
    return steps


def updated(original: np.ndarray, layout: Layout, name: str, variables: Variables) -> np.ndarray:
    """The tensor's new value in its original type. An unchanged tensor is returned as stored, bit
    by bit."""
    slot = layout.slots.get(name)
    if slot is None:
        return original
    array = look_up(variables, slot.path)
    if array is None:
        raise UserError(
            f"the variables have no {'/'.join(slot.path)}; folded variables cannot be written"
        )
    array = np.asarray(array)
    if array.shape != slot.to_variable(original).shape:
        raise UserError(
            f"{'/'.join(slot.path)} has the shape {array.shape}, not the one in the graph"
        )
    if np.array_equal(slot.to_variable(original), array, equal_nan=True):
        return original
    with np.errstate(over="ignore"):
        new = np.ascontiguousarray(slot.to_tensor(array)).astype(original.dtype)
    if not np.array_equal(np.isfinite(new.astype(np.float32)), np.isfinite(slot.to_tensor(array))):
        raise UserError(f"new values of {name} do not fit {original.dtype}")
    return new


def make_node(
    op: str, inputs: tuple[str, ...], output: str, graph: Graph, **attributes: Any
) -> Node:
    return Node(op, output, inputs, (output,), attributes, graph.opset)


def as_model(graph: Graph, parts: Parts, classes: int, more: tuple[str, ...] = ()) -> Any:
    """The model as a protocol buffer; `more` names additional outputs."""
    onnx = import_onnx()
    from onnx import helper, numpy_helper

    numbers = {dtype: number for number, dtype in TYPES.items()}
    dims = [
        size or name
        for size, name in zip(graph.image_shape, ("batch", "d1", "d2", "d3"), strict=True)
    ]
    image = helper.make_tensor_value_info(graph.image, numbers[np.dtype(graph.image_type)], dims)
    logits = lambda name: helper.make_tensor_value_info(
        name, onnx.TensorProto.FLOAT, [dims[0], classes]
    )
    stated = [onnx.ValueInfoProto.FromString(info) for info in graph.output_info]
    # a file may omit the shapes of its outputs, but onnx's checker refuses to write it that way
    complete = [
        value if value.type.tensor_type.HasField("shape") else logits(value.name)
        for value in stated
    ]
    outputs = [*(complete or map(logits, graph.outputs)), *map(logits, more)]
    nodes = [_proto(helper, numpy_helper, node) for node in _drop_repeated_names(parts.nodes)]
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in parts.tensors.items()
    ]
    proto = helper.make_graph(nodes, "jaxbd", [image], outputs, stored)
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=max(graph.ir_version, 4),
        producer_name="jaxbd",
        producer_version=versions()["jaxbd"],
    )
    helper.set_model_props(model, graph.metadata)
    return model


def _drop_repeated_names(nodes: list[Node]) -> list[Node]:
    """`nodes` with repeated names removed, since onnxruntime refuses duplicate node names."""
    seen: set[str] = set()
    named = []
    for node in nodes:
        named.append(node if node.name not in seen else node._replace(name=""))
        seen.add(node.name)
    return named


def _proto(helper: Any, numpy_helper: Any, node: Node) -> Any:
    as_proto = lambda value: (
        numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
    )
    attributes = {name: as_proto(value) for name, value in node.attributes.items()}
    made = helper.make_node(node.op, node.inputs, node.outputs, node.name or None)
    # the type of an empty list cannot be inferred: only lists of integers (7) occur empty
    made.attribute.extend(
        helper.make_attribute(
            name, value, attr_type=7 if isinstance(value, tuple) and not value else None
        )
        for name, value in attributes.items()
    )
    return made


def save(path: pathlib.Path, model: Any) -> None:
    onnx = import_onnx()
    if model.ByteSize() > MOST_BYTES:
        raise UserError(
            f"{path.name}: the model has {model.ByteSize():,} bytes, but an ONNX file holds at most"
            " 2 GiB; write .safetensors"
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path.name}: not written, onnx rejects the graph: {reason}") from None
    with replacing(path) as sibling:
        sibling.write_bytes(model.SerializeToString())
