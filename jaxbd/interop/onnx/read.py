"""Reads ONNX files as graphs. Nothing in a file is executed; unsupported features are refused by
name."""

import pathlib
from typing import Any

import numpy as np

from jaxbd.base import UserError
from jaxbd.interop.onnx import ops, scan, schema
from jaxbd.interop.onnx.graph import Graph, GraphLimits, Node, before_answer
from jaxbd.interop.onnx.outputs import choose_output
from jaxbd.interop.onnx.tensors import TYPES, Reader
from jaxbd.limits import Refusal, quote

OLDEST_OPSET, NEWEST_OPSET = 9, 28
DOMAINS = ("", "ai.onnx")
CONTROL = ("If", "Loop", "Scan", "SequenceMap")
QUANTISED = (
    "QLinear",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantize",
    "ConvInteger",
    "MatMulInteger",
)


def import_onnx() -> Any:
    """The `onnx` package. If it is missing, raises UserError with the command that installs it."""
    try:
        import onnx
    except ImportError:
        raise UserError(
            "ONNX files need the package onnx; install it with `pip install jaxbd[onnx]`"
        ) from None
    return onnx


def read_onnx(
    data: bytes,
    limits: GraphLimits = GraphLimits(),
    folder: pathlib.Path | None = None,
    output: str | None = None,
) -> Graph:
    """Reads the graph in `data`, the bytes of an ONNX file.

    Args:
      folder: folder of external data files; if None, external data is refused.
      output: name of the output with the logits, if there are several; see `choose_output`.
    Raises: Refusal saying what in the file is wrong or not supported.
    """
    return read_with_files(data, limits, folder, output)[0]


def read_with_files(
    data: bytes, limits: GraphLimits, folder: pathlib.Path | None, output: str | None = None
) -> tuple[Graph, tuple[pathlib.Path, ...]]:
    """Like `read_onnx`, but also returns the external data files that were read."""
    onnx = import_onnx()
    if len(data) > limits.file_bytes:
        raise Refusal(f"it has {len(data):,} bytes; the limit is {limits.file_bytes:,}")
    scan.check_size(data, onnx.ModelProto.DESCRIPTOR, limits)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # the exception type differs between versions of the library
        raise Refusal("it is damaged, or not an ONNX file") from None
    if not model.HasField("graph") or not model.graph.node:
        raise Refusal("it holds no graph")
    opset = _opset(model)
    _check_plain(model)
    reader = Reader(limits, folder)
    tensors = _tensors(model.graph, reader, limits)
    nodes = _nodes(model.graph, opset, reader, limits)
    _check_order(model.graph, nodes, tensors)
    return _graph(model, nodes, tensors, limits, output), tuple(sorted(reader.files))


def _opset(model: Any) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted(domain for domain in versions if domain not in DOMAINS)
    used = {node.domain for node in model.graph.node} - set(DOMAINS)
    if used:
        node = next(node for node in model.graph.node if node.domain not in DOMAINS)
        raise Refusal(
            f"operator {quote(node.op_type)} of node {quote(node.name)} is from the custom domain "
            f"{quote(node.domain)}; "
            "export it with standard operators"
        )
    stated = [versions[domain] for domain in DOMAINS if domain in versions]
    if len(stated) != 1 or len(versions) != len(model.opset_import):
        raise Refusal(
            f"it states {len(stated)} opsets of ONNX, and {len(foreign)} of other domains"
        )
    if not OLDEST_OPSET <= stated[0] <= NEWEST_OPSET:
        raise Refusal(
            f"it uses opset {stated[0]}; opsets {OLDEST_OPSET} to {NEWEST_OPSET} are supported"
        )
    return stated[0]


def _check_plain(model: Any) -> None:
    """Refuses features that a classifier does not need: functions, training graphs, sparse and
    quantised weights."""
    graph = model.graph
    if model.functions:
        raise Refusal(
            f"it defines functions of its own (first {quote(model.functions[0].name)}); export "
            "them inlined"
        )
    if model.training_info:
        raise Refusal("it holds a training graph; export the model for inference")
    if graph.sparse_initializer:
        raise Refusal("it holds sparse weights")
    if graph.quantization_annotation:
        raise Refusal("it is quantised; export the model in floating point")


def _tensors(graph: Any, reader: Reader, limits: GraphLimits) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        name = _text(tensor.name, limits)
        if not name or name in found:
            raise Refusal(
                f"it stores tensor {quote(name)} twice"
                if name
                else "it stores a tensor without a name"
            )
        found[name] = reader.read(tensor, name)
    return found


def _nodes(graph: Any, opset: int, reader: Reader, limits: GraphLimits) -> tuple[Node, ...]:
    if len(graph.node) > limits.nodes:
        raise Refusal(f"it has {len(graph.node):,} nodes; the limit is {limits.nodes:,}")
    return tuple(_node(node, opset, reader, limits) for node in graph.node)


def _node(node: Any, opset: int, reader: Reader, limits: GraphLimits) -> Node:
    op, name = _text(node.op_type, limits), _text(node.name, limits)
    inputs, outputs = (
        tuple(_text(v, limits) for v in values) for values in (node.input, node.output)
    )
    place = f"operator {quote(op)} of node {quote(name or ''.join(outputs[:1]))}"
    if op in CONTROL:
        raise Refusal(f"{place} is control flow; export the model with its branches resolved")
    if op.startswith(QUANTISED):
        raise Refusal(f"{place} belongs to a quantised model; export it in floating point")
    if op not in ops.TABLE:
        raise Refusal(f"{place} is not known (the file uses opset {opset})")
    attributes = {
        _text(a.name, limits): _attribute(a, place, reader, limits) for a in node.attribute
    }
    if len(attributes) != len(node.attribute):
        raise Refusal(f"{place} has an attribute twice")
    schema.check(import_onnx(), node, opset, place)
    return Node(op, name, inputs, outputs, attributes, opset)


def _attribute(attribute: Any, place: str, reader: Reader, limits: GraphLimits) -> Any:
    kind, name = attribute.type, f"{place}, attribute {quote(attribute.name)}"
    if attribute.ref_attr_name:
        raise Refusal(f"{name} refers to a function's")
    if kind == attribute.FLOAT:
        return float(attribute.f)
    if kind == attribute.INT:
        return int(attribute.i)
    if kind == attribute.STRING:
        return _decode(attribute.s, limits)
    if kind == attribute.TENSOR:
        return reader.read(attribute.t, name)
    lists = {
        attribute.FLOATS: attribute.floats,
        attribute.INTS: attribute.ints,
        attribute.STRINGS: attribute.strings,
    }
    if kind not in lists:
        raise Refusal(f"{name} is a graph or of another type that is not supported")
    if len(lists[kind]) > limits.numbers:
        raise Refusal(f"{name} has {len(lists[kind]):,} values; the limit is {limits.numbers:,}")
    return tuple(
        _decode(value, limits) if kind == attribute.STRINGS else value for value in lists[kind]
    )


def _text(text: str, limits: GraphLimits) -> str:
    if type(text) is not str:  # protobuf returns bytes for text that is not UTF-8
        raise Refusal("it holds a name that is not text")
    if len(text) > min(limits.text_bytes, 1024):
        raise Refusal(f"it holds a name of {len(text):,} characters, {quote(text)}")
    return text


def _decode(text: bytes, limits: GraphLimits) -> str:
    if len(text) > limits.text_bytes:
        raise Refusal(f"it holds an attribute of {len(text):,} bytes of text")
    return text.decode("utf-8", "replace")


def _check_order(graph: Any, nodes: tuple[Node, ...], tensors: dict[str, np.ndarray]) -> None:
    """Raises Refusal unless every value is computed once, and before it is read."""
    known = {*tensors, *(value.name for value in graph.input)}
    for node in nodes:
        if not any(node.outputs[:1]):
            raise Refusal(f"node {quote(node.name)} ({node.op}) makes nothing")
        for value in node.inputs:
            if value and value not in known:
                raise Refusal(
                    f"node {quote(node.name)} ({node.op}) reads {quote(value)}, which nothing "
                    "makes before it"
                )
        for value in node.outputs:
            if value in known:
                raise Refusal(f"value {quote(value)} is made twice")
            if value:
                known.add(value)
    for output in graph.output:
        if output.name not in known:
            raise Refusal(f"output {quote(output.name)} is made by no node")


def _graph(
    model: Any,
    nodes: tuple[Node, ...],
    tensors: dict[str, np.ndarray],
    limits: GraphLimits,
    wanted: str | None,
) -> Graph:
    graph = model.graph
    # before IR version 4 the stored tensors are listed among the inputs
    inputs = [value for value in graph.input if value.name not in tensors]
    if len(inputs) != 1:
        names = ", ".join(quote(value.name) for value in inputs[:3])
        raise Refusal(f"it has {len(inputs)} inputs ({names}); a classifier takes only images")
    shape, dtype = _shape(inputs[0])
    outputs = tuple(output.name for output in graph.output)
    chosen = choose_output(graph.output, nodes, wanted)
    logits, answer = before_answer(nodes, chosen)
    notes = {
        _text(entry.key, limits): entry.value[: limits.text_bytes] for entry in model.metadata_props
    }
    stated = tuple(output.SerializeToString() for output in graph.output)
    return Graph(
        "onnx",
        nodes,
        inputs[0].name,
        shape,
        dtype,
        outputs,
        logits,
        answer,
        tensors,
        notes,
        max(model.ir_version, 3),
        output_info=stated,
        output=chosen,
    )


def _shape(value: Any) -> tuple[tuple[int | None, ...], np.dtype]:
    """Stated dimensions and element type of the graph's input; open dimensions are None."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in TYPES:
        raise Refusal(f"its input {quote(value.name)} is not a tensor of numbers")
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in kind.shape.dim
    )
    if len(dims) != 4:
        raise Refusal(f"its input {quote(value.name)} has {len(dims)} axes; images have four")
    return dims, TYPES[kind.elem_type]
