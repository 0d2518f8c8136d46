"""The graph form that ONNX files and torch.export archives are read into, in ONNX's operators and
meanings."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbd.limits import Limits

MOST_ELEMENTS = 1 << 28
"""Elements that one value of a graph may have, for the images of a batch as exported."""
MOST_STATIC = 1 << 24
"""Elements of all values together that are computed before an image is there."""
MOST_COMPUTED = 1 << 31
"""Elements of all values together that are computed for one image."""
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
"""What code raises that is given arguments it was not written for, as hostile files do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """What a graph may cost to read. Everything above is refused before it is paid for.

    Attributes:
      file_bytes: size of the file, and of each file of external data.
      fields: fields of the protocol buffer, counted before it is parsed.
      packed_bytes: lists of integers packed in the protocol buffer, which unpack to eight times as
        much.
      depth: nesting of messages, or of JSON.
      nodes, tensors: operators and named arrays.
      text_bytes: one attribute that is text, or one name.
      numbers: numbers in one attribute that is a list.
      unpacked_bytes: bytes of all tensors together, and never more than `Limits.unpacked` of the
        files: a tensor may repeat one element, or many one part of a file.
      json_bytes: size of a program in JSON.
      seconds: processor time for reading, as `Limits.seconds`.
      tracing_seconds: processor time for tracing all operators, with what is constant computed; a
        net of a thousand operators takes some.
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
        """The limits of all readers, with these for the file and its program."""
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
      op: its name in ONNX's own domain, "Conv".
      name: what the file calls this node; may be empty.
      inputs, outputs: names of values; "" where one is left out.
      attributes: name -> int, float, str, tuple of these, or NumPy array.
      opset: version of the operators' meanings.
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
    """A network for one batch of images.

    Attributes:
      kind: what it was read from: "onnx", "pt2", or "jaxbd".
      nodes: in an order in which they can be computed.
      image: name of the one input; image_shape: its four dimensions as stated, None where open.
      image_type: element type of the input.
      outputs: names of the outputs in the file's order; logits: name of the value that is the
        classifier's answer before a last softmax or sigmoid.
      answer: operator that the logits go through in the file ("Softmax"), or "".
      tensors: name -> array, what the file stores (weights, moments, constants).
      fixed: names of tensors that are no weights, where the file tells.
      metadata: the file's own notes, text by text.
      ir_version: version of ONNX's file format.
      output_info: what an ONNX file says of each of its outputs, as stored; empty for graphs from
        elsewhere.
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

    @property
    def opset(self) -> int:
        """Version of the operators' meanings."""
        return self.nodes[0].opset if self.nodes else 0


ANSWERS = ("Softmax", "LogSoftmax", "Sigmoid")


def before_answer(nodes: tuple[Node, ...], output: str) -> tuple[str, str]:
    """(value that holds the logits behind `output`, operator that makes the output of them, or
    "")."""
    makers = {value: node for node in nodes for value in node.outputs if value}
    value, answer = output, ""
    while value in makers and makers[value].op in (*ANSWERS, "Identity") and makers[value].has(0):
        if makers[value].op != "Identity":
            if answer:  # a softmax of a softmax is no answer made of logits
                break
            answer = makers[value].op
        value = makers[value].inputs[0]
    return (value, answer) if answer else (output, "")


def needed(graph: Graph, value: str) -> tuple[Node, ...]:
    """The nodes that `value` depends on, in order."""
    wanted, kept = {value}, []
    for node in reversed(graph.nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted |= set(node.inputs)
    return tuple(reversed(kept))


def readers(nodes: tuple[Node, ...]) -> dict[str, list[Node]]:
    """Value -> the nodes that read it."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            if value:
                found.setdefault(value, []).append(node)
    return found
