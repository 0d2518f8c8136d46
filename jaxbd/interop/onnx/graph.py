"""The graph representation of ONNX files and torch.export archives, with ONNX's operators and
semantics."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbd.interop.onnx.stated import Stated
from jaxbd.limits import Limits

MOST_ELEMENTS = 1 << 28
"""Maximum elements of one value of a graph, for a batch of the exported size."""
MOST_STATIC = 1 << 24
"""Maximum total elements of the values that do not depend on an image."""
MOST_COMPUTED = 1 << 31
"""Maximum total elements of the values that are computed for one image."""
MOST_AXES = 10

MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Exceptions that code raises for arguments it was not written for, as found in hostile files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """Upper bounds on what reading a graph may cost. A graph that needs more is refused before the
    cost arises.

    Attributes:
      file_bytes: size of the file, and of each file of external data.
      fields: fields of the protocol buffer, counted before it is parsed.
      packed_bytes: size of packed integer lists in the protocol buffer, which unpack to eight times
        as much.
      depth: nesting of messages, or of JSON.
      nodes, tensors: number of operators and of named arrays.
      text_bytes: size of one string attribute, or one name.
      numbers: length of one list attribute.
      unpacked_bytes: total size of all tensors. `Limits.unpacked` of the files applies as well: a
        tensor may repeat one element, or many tensors one part of a file.
      json_bytes: size of a JSON program.
      seconds: CPU time for reading, as `Limits.seconds`.
      tracing_seconds: CPU time for tracing all operators and computing constants; larger, because a
        net of a thousand operators takes a while.
    """

    file_bytes: int = 2 << 30
    fields: int = 1_000_000
    packed_bytes: int = 16 << 20
    depth: int = 24
    nodes: int = 20_000
    tensors: int = 20_000
    text_bytes: int = 1 << 16
    numbers: int = 4_096
    unpacked_bytes: int = 4 << 30
    json_bytes: int = 16 << 20
    seconds: float = Limits().seconds
    tracing_seconds: float = 10.0

    @property
    def plain(self) -> Limits:
        """The general `Limits`, with the values above for the file and its program."""
        return dataclasses.replace(
            Limits(),
            file_bytes=self.file_bytes,
            header_bytes=self.json_bytes,
            depth=self.depth,
            entries=4 * self.tensors,
            seconds=self.seconds,
        )


class Node(NamedTuple):
    """One operator.

    Attributes:
      op: the operator's name in ONNX's own domain, e.g. "Conv".
      name: the node's name in the file; may be empty.
      inputs, outputs: names of values; "" for one that is omitted.
      attributes: name -> int, float, str, tuple of these, or NumPy array.
      opset: version of the operator's semantics.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, attribute: str, default: Any = None) -> Any:
        """The attribute's value, or `default`."""
        return self.attributes.get(attribute, default)

    def has(self, position: int) -> bool:
        """Whether the input at `position` is given."""
        return len(self.inputs) > position and bool(self.inputs[position])


class Graph(NamedTuple):
    """A network that takes one batch of images.

    Attributes:
      kind: where it comes from: "onnx", "pt2", or "jaxbd".
      nodes: the operators, in an order in which they can be computed.
      image: name of the one input.
      image_shape: stated dimensions of the input; None for open ones.
      image_type: element type of the input.
      outputs: names of the outputs, in file order.
      logits: name of the value with the classifier's logits, before a final softmax or sigmoid.
      answer: the operator applied to the logits in the file, e.g. "Softmax", or "".
      tensors: name -> array stored in the file (weights, moments, constants).
      fixed: names of tensors that are not weights, if the file says so.
      metadata: the file's metadata, {key: text}.
      ir_version: version of ONNX's file format.
      output_info: an ONNX file's serialised descriptions of its outputs; empty for other graphs.
      output: the output that the logits are taken from; empty for the first.
      stated: name of a value -> shape and type that the file states, compared with the real ones
        when the graph is computed.
    """

    kind: str
    nodes: tuple[Node, ...]
    image: str
    image_shape: tuple[int | None, ...]
    image_type: np.dtype
    outputs: tuple[str, ...]
    logits: str
    answer: str
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    ir_version: int = 10
    fixed: frozenset[str] = frozenset()
    output_info: tuple[bytes, ...] = ()
    output: str = ""
    stated: Mapping[str, Stated] = {}

    @property
    def chosen(self) -> str:
        """Name of the output that the logits are taken from."""
        return self.output or self.outputs[0]

    @property
    def opset(self) -> int:
        """Version of the operators' semantics."""
        return self.nodes[0].opset if self.nodes else 0


ANSWERS = ("Softmax", "LogSoftmax", "Sigmoid")
PASSING = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators after a softmax that leave its numbers as they are."""
FLOATS = (1, 10, 11, 16)
"""ONNX's numbers of the float types."""


def before_answer(nodes: tuple[Node, ...], output: str) -> tuple[str, str]:
    """(value with the logits from which `output` is computed, operator applied to them); (output,
    "") if the output already is the logits."""
    chain = answer_chain(nodes, output)
    return (chain[-1].inputs[0], chain[0].op) if chain else (output, "")


def answer_chain(nodes: tuple[Node, ...], output: str) -> list[Node]:
    """The softmax or sigmoid that ends in `output`, through casts and changes of shape; empty if
    there is none. A softmax of a softmax, which orders the classes alike, gives both, the last one
    first."""
    makers = {value: node for node in nodes for value in node.outputs if value}
    chain: list[Node] = []
    while output in makers and makers[output].has(0):
        node = makers[output]
        if node.op in ANSWERS:
            if chain and "Sigmoid" in (node.op, chain[0].op):
                break  # of one number, it would move the border between the classes
            chain.append(node)
        elif node.op not in PASSING or (node.op == "Cast" and node.get("to") not in FLOATS):
            break
        output = node.inputs[0]
    return chain


def needed(graph: Graph, value: str) -> tuple[Node, ...]:
    """The nodes that `value` depends on, in order."""
    return needed_by(graph.nodes, value)


def needed_by(nodes: tuple[Node, ...], value: str) -> tuple[Node, ...]:
    """Those of `nodes` that `value` depends on, in order."""
    values, found = {value}, []
    for node in reversed(nodes):
        if values & set(node.outputs):
            found.append(node)
            values |= set(node.inputs)
    return tuple(reversed(found))


def depends_on(nodes: tuple[Node, ...], value: str) -> tuple[Node, ...]:
    """Those of `nodes` that depend on `value`, in order."""
    values, found = {value}, []
    for node in nodes:
        if values & set(node.inputs):
            found.append(node)
            values |= set(node.outputs)
    return tuple(found)


def readers(nodes: tuple[Node, ...]) -> dict[str, list[Node]]:
    """Value -> the nodes that read it."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            if value:
                found.setdefault(value, []).append(node)
    return found
