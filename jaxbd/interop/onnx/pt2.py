"""Reads torch.export archives (.pt2) as graphs: a zip with a JSON program and raw weights. No
pickle is read."""

from typing import Any

import numpy as np

from jaxbd.interop.onnx.archive import PROGRAM, Archive, field, meta_of
from jaxbd.interop.onnx.aten import Converter, Meta
from jaxbd.interop.onnx.aten_activations import ACTIVATIONS
from jaxbd.interop.onnx.aten_arguments import Tensor, decode, read_arguments
from jaxbd.interop.onnx.aten_constants import CONSTANTS, OPERATORS
from jaxbd.interop.onnx.aten_layers import LAYERS
from jaxbd.interop.onnx.aten_math import MATH
from jaxbd.interop.onnx.aten_norms import NORMS
from jaxbd.interop.onnx.aten_pixels import HOLDING
from jaxbd.interop.onnx.aten_resize import RESIZES
from jaxbd.interop.onnx.aten_shape import SHAPES
from jaxbd.interop.onnx.graph import Graph, GraphLimits, before_answer
from jaxbd.interop.onnx.stated import kind_of
from jaxbd.limits import Refusal, quote

HANDLERS = {**SHAPES, **CONSTANTS, **MATH, **ACTIVATIONS, **LAYERS, **NORMS, **RESIZES}


def is_pt2(names: Any) -> bool:
    """Whether an archive with these member names comes from torch.export."""
    return any(name.endswith(PROGRAM) for name in names)


def read_pt2(data: bytes, limits: GraphLimits = GraphLimits()) -> Graph:
    """Reads the graph in `data`, the bytes of an archive written by `torch.export.save`.

    Raises: Refusal saying what in the archive is wrong or not supported.
    """
    archive = Archive(data, limits)
    program = archive.json(PROGRAM[1:])
    module = field(program, "graph_module", dict)
    graph, signature = field(module, "graph", dict), field(module, "signature", dict)
    weights, moments, image = _inputs(signature, archive)
    metas = {name: meta_of(entry) for name, entry in field(graph, "tensor_values", dict).items()}
    stored = {name: array for _, (name, array) in weights.items()}
    converter = Converter({n: a for n, a in stored.items() if n not in archive.constants}, metas)
    converter.known |= {n: np.array(a) for n, a in stored.items() if n in archive.constants}
    converter.taken |= set(converter.known)
    converter.values |= {argument: name for argument, (name, _) in weights.items()}
    converter.values[image] = converter.name(image)
    _check_image(converter.metas.get(image))
    if kind_of(converter.metas[image].dtype) != "f":
        converter.pixels.add(image)
    for name in [*weights, image]:
        converter.expect(name)
    _convert(converter, field(graph, "nodes", list), limits)
    return _graph(converter, image, _output(signature, converter), moments, archive)


def _check_image(meta: Meta | None) -> None:
    """Raises Refusal if the input is not stated to be an image, of floats or of pixels 0..255."""
    if meta is None or len(meta.shape) != 4:
        count = 0 if meta is None else len(meta.shape)
        raise Refusal(f"its input has {count} axes; images have four")
    if kind_of(meta.dtype) != "f" and meta.dtype not in HOLDING:
        raise Refusal(f"its images are of type {meta.dtype}, which does not hold pixels of 0..255")


def _inputs(
    signature: dict[str, Any], archive: Archive
) -> tuple[dict[str, tuple[str, np.ndarray]], set[str], str]:
    """(argument -> (name and array of its tensor), names of buffers, argument for the image)."""
    found, buffers, images = {}, set(), []
    for spec in field(signature, "input_specs", list):
        if type(spec) is not dict or len(spec) != 1:
            raise Refusal(f"an input is {quote(spec)}")
        ((kind, value),) = spec.items()
        if kind == "user_input":
            images.append(decode(field(value, "arg", dict)))
            continue
        keys = {
            "parameter": "parameter_name",
            "buffer": "buffer_name",
            "tensor_constant": "tensor_constant_name",
        }
        if kind not in keys:
            raise Refusal(f"an input of kind {quote(kind)} is not supported")
        argument, name = (
            field(field(value, "arg", dict), "name", str),
            field(value, keys[kind], str),
        )
        # buffers that are not persistent are stored among the constants
        is_constant = kind == "tensor_constant" or (
            kind == "buffer" and name not in archive.tables["weights"]
        )
        found[argument] = name, archive.tensor("constants" if is_constant else "weights", name)
        if kind == "buffer":
            buffers.add(name)
        if kind == "tensor_constant":
            archive.constants.add(name)
    if len(images) != 1 or not isinstance(images[0], Tensor):
        raise Refusal(f"it has {len(images)} inputs; a classifier takes only images")
    return found, buffers, images[0].name


def _convert(converter: Converter, nodes: list[Any], limits: GraphLimits) -> None:
    if len(nodes) > limits.nodes:
        raise Refusal(f"it has {len(nodes):,} nodes; the limit is {limits.nodes:,}")
    deadline = limits.plain.deadline("its program")
    for node in nodes:
        deadline.check()
        if type(node) is not dict:
            raise Refusal(f"a node is {quote(node)}")
        target = field(node, "target", str)
        arguments = read_arguments(field(node, "inputs", list))
        outputs = []
        for output in field(node, "outputs", list):
            made = decode(output)
            outputs += made if isinstance(made, list) else [made]
        if not all(each is None or isinstance(each, Tensor) for each in outputs):
            raise Refusal(f"operator {quote(target)} makes {quote(outputs)}")
        outputs = ["" if each is None else each.name for each in outputs]
        handlers = OPERATORS if target.startswith("_operator.") else HANDLERS
        if not target.startswith(("torch.ops.aten.", "_operator.")):
            raise Refusal(f"operator {quote(target)} is not one of PyTorch's own (aten)")
        converter.run(target, arguments, outputs, handlers)


def _output(signature: dict[str, Any], converter: Converter) -> str:
    """The program's first output with two axes, taken to be the logits."""
    for spec in field(signature, "output_specs", list):
        output = spec.get("user_output") if type(spec) is dict else None
        value = decode(field(output, "arg", dict)) if type(output) is dict else None
        if isinstance(value, Tensor) and converter.rank(value) == 2:
            return converter.value(value)
    raise Refusal("none of its outputs has two axes, as a classifier's logits have")


def _graph(
    converter: Converter, image: str, output: str, buffers: set[str], archive: Archive
) -> Graph:
    nodes = tuple(converter.nodes)
    moments = {
        value for node in nodes if node.op == "BatchNormalization" for value in node.inputs[3:5]
    }
    # buffers other than running moments are settings, not weights
    fixed = frozenset(converter.fixed | (buffers - moments))
    meta = converter.metas[image]
    logits, answer = before_answer(nodes, output)
    read = {value for node in nodes for value in node.inputs}
    tensors = {name: array for name, array in converter.tensors.items() if name in read}
    return Graph(
        "pt2",
        nodes,
        converter.values[image],
        meta.shape,
        meta.dtype,
        (output,),
        logits,
        answer,
        tensors,
        {},
        10,
        fixed,
        stated=converter.stated,
    )
