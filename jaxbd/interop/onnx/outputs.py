"""Which output of a graph holds the logits, and what the graph applies to them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxbd.interop.onnx.graph import (
    FLOATS,
    PASSING,
    Graph,
    Node,
    answer_chain,
    before_answer,
    depends_on,
    needed_by,
)
from jaxbd.interop.onnx.values import axis_of
from jaxbd.limits import Refusal, quote

MOST_OUTPUTS = 64
PRODUCTS = ("Gemm", "MatMul", "Conv", "Einsum")
PROBABILITIES = ("Softmax", "Sigmoid")
BLENDS = frozenset(
    [
        *PASSING,
        *("Add", "Sub", "Mul", "Div", "Pow", "Sum", "Mean", "Min", "Max", "Clip", "Neg"),
        *("Concat", "Split", "Slice", "Gather", "Transpose", "Expand"),
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"),
    ]
)
"""Operators that turn probabilities into other probabilities, e.g. into those of an ensemble."""


def choose_output(
    outputs: Iterable[Any], nodes: tuple[Node, ...], wanted: str | None = None
) -> str:
    """Name of the output that the logits are taken from, see `before_answer`: a float with two
    axes, or with no stated shape.

    Of several, one that depends on all others is taken: a file that also returns features returns
    the logits made of them. Outputs with the same logits (logits and probabilities) count once.

    Args:
      outputs: the file's descriptions of its outputs.
      wanted: name of the output, if the user chose one.
    Raises: Refusal naming the outputs if none fits or several do.
    """
    made = {value for node in nodes for value in node.outputs if value}
    kinds = {
        output.name: output.type.tensor_type
        for output in outputs
        if output.name in made and output.type.WhichOneof("value") in (None, "tensor_type")
    }
    if wanted is not None and wanted not in kinds:
        raise Refusal(f"it has no output {quote(wanted)}; it has {_listed(kinds)}")
    asked = kinds if wanted is None else {wanted: kinds[wanted]}
    floats = [name for name, kind in asked.items() if kind.elem_type in (0, *FLOATS)]
    whole = [name for name in asked if name not in floats]
    if whole and not floats:
        raise Refusal(
            f"its output {quote(whole[0])} is not float but a class number or the like; export the "
            "logits"
        )
    if wanted is not None:
        return wanted
    has_two_axes = lambda kind: not kind.HasField("shape") or len(kind.shape.dim) == 2
    fitting = [name for name in floats if has_two_axes(kinds[name])]
    if not fitting:
        raise Refusal("none of its outputs has two axes, as a classifier's logits have")
    narrow = {name for name in fitting if _columns(kinds[name]) == 1}
    # tracing what each depends on takes time, and no classifier has that many
    found = _last(nodes, fitting, narrow) if len(fitting) <= MOST_OUTPUTS else fitting
    if len(found) > 1:
        raise Refusal(
            f"it has {len(found)} outputs that may be logits, {_listed(found)}; choose one with "
            "--key NAME"
        )
    return found[0]


def _last(nodes: tuple[Node, ...], names: Sequence[str], narrow: set[str]) -> list[str]:
    """Of the outputs `names`, the one that depends on all others; if there is none, all that
    differ.

    Args:
      narrow: outputs with one column. One that no product separates from another output sums it
        up, like the largest probability, and is left out.
    """
    by_logits: dict[str, str] = {}
    for name in names:
        by_logits.setdefault(before_answer(nodes, name)[0], name)
    if len(by_logits) == 1:
        return list(by_logits.values())
    behind = {value: needed_by(nodes, value) for value in by_logits}
    read = {value: {name for node in behind[value] for name in node.inputs} for value in behind}
    is_behind = lambda early, late: early in read[late]
    sums_up = lambda early, late: (
        by_logits[late] in narrow
        and by_logits[early] not in narrow
        and is_behind(early, late)
        and not any(node.op in PRODUCTS for node in depends_on(behind[late], early))
    )
    left = [v for v in by_logits if not any(sums_up(u, v) for u in by_logits if u != v)]
    last = [v for v in left if all(is_behind(u, v) for u in left if u != v)]
    return [by_logits[value] for value in last or left]


def _columns(kind: Any) -> int:
    """Stated size of the second axis; 0 if it is open."""
    return kind.shape.dim[1].dim_value if len(kind.shape.dim) == 2 else 0


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(quote, names[:4])) + (", …" if len(names) > 4 else "")


def check_answer(graph: Graph, shape: Sequence[int]) -> None:
    """Raises Refusal unless the softmax that is left out runs over the classes.

    Args:
      shape: shape of the logits, as the graph computes them.
    """
    chain = answer_chain(graph.nodes, graph.chosen)
    if not chain or chain[-1].op == "Sigmoid":
        return
    node = chain[-1]
    flattens = node.opset < 13
    axis = axis_of(node.get("axis", 1 if flattens else -1), len(shape))
    over = math.prod(shape[axis:] if flattens else shape[axis : axis + 1])
    if (axis == 0 and graph.image_shape[0] != 1) or over != math.prod(shape[1:]):
        raise Refusal(f"its last {node.op} runs over axis {axis}, not over the classes")
    if over == 1:
        raise Refusal(f"its last {node.op} has only one class, whose probability is always 1")


def check_logits(graph: Graph) -> None:
    """Raises Refusal if the logits are probabilities under another name, e.g. those of an ensemble
    or one column of a softmax. Probabilities near 0 and 1 hide every trigger from a search."""
    varying, made = {graph.image}, dict[str, Node]()
    for node in needed_by(graph.nodes, graph.logits):
        inputs = [value for value in node.inputs if value in varying]
        if not inputs:
            continue
        varying |= set(node.outputs)
        if node.op in PROBABILITIES:
            made[node.outputs[0]] = node
        elif node.op in BLENDS and all(value in made for value in inputs):
            made |= dict.fromkeys(node.outputs, made[inputs[0]])
    if graph.logits in made:
        node = made[graph.logits]
        raise Refusal(
            f"its output {quote(graph.chosen)} is made of the probabilities of {node.op} "
            f"{quote(node.outputs[0])}; export the logits"
        )


def remark(graph: Graph) -> str:
    """A note for the user which of several outputs is used; empty if there is only one."""
    others = [name for name in graph.outputs if name != graph.chosen]
    if not others:
        return ""
    return (
        f"the file has {len(graph.outputs)} outputs; the logits are taken from "
        f"{quote(graph.chosen)} (--key chooses another of {_listed(others)})"
    )
