"""Writes a guarded net as one ONNX graph: the suspect, and a corrected copy for every detected
target."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxbd.base import Variables
from jaxbd.interop.onnx.graph import Graph, needed
from jaxbd.interop.onnx.open import Opened
from jaxbd.interop.onnx.write import (
    Parts,
    as_model,
    make_node,
    prepare,
    ranks_of,
    save,
    with_variables,
)

SUSPECT = "suspect_logits"
"""Name of the output with the suspect's own logits."""


def write_guarded(
    path: pathlib.Path,
    found: Opened,
    suspect: Variables,
    corrected: Sequence[Variables],
    targets: Sequence[int],
) -> None:
    """Writes the guarded net of a graph that was read; see `combine`."""
    graph, layout = prepare(found)
    fill = lambda variables: with_variables(graph, layout, variables, ranks_of(found, variables))
    save_guarded(
        path, graph, fill(suspect), [fill(each) for each in corrected], targets, found.classes
    )


def save_guarded(
    path: pathlib.Path,
    graph: Graph,
    suspect: Parts,
    corrected: Sequence[Parts],
    targets: Sequence[int],
    classes: int,
) -> None:
    """Writes the guarded net: if `suspect` predicts `targets[i]`, the logits are those of
    `corrected[i]`.

    The suspect's own logits are an additional last output, "suspect_logits". An input for which the
    two predicted classes differ is flagged as triggered (Li et al. 2023, section 4.2). Every net is
    computed for every image.
    """
    whole = combine(graph, suspect, corrected, targets)
    save(path, as_model(graph, whole, classes, more=(SUSPECT,)))


def combine(
    graph: Graph, suspect: Parts, corrected: Sequence[Parts], targets: Sequence[int]
) -> Parts:
    """The suspect's nodes, a copy of the corrected net for every target, and the nodes that choose
    between them."""
    # the name of the logits goes to the chosen answer, so that nodes after it (a softmax) use that
    rename = lambda value: SUSPECT if value == graph.logits else value
    nodes = [node._replace(outputs=tuple(map(rename, node.outputs))) for node in suspect.nodes]
    # the copies go right after the suspect's logits, before the nodes that read the chosen answer
    position = 1 + next(i for i, node in enumerate(nodes) if SUSPECT in node.outputs)
    tensors, chosen = dict(suspect.tensors), SUSPECT
    added = [make_node("ArgMax", (SUSPECT,), "guard.label", graph, axis=1, keepdims=1)]
    for number, (parts, target) in enumerate(zip(corrected, targets, strict=True)):
        prefix = f"target{target}"
        copy = _copy_parts(parts, tensors, prefix, graph)
        tensors |= copy.tensors | {f"{prefix}.class": np.array(target, np.int64)}
        result = graph.logits if number == len(targets) - 1 else f"{prefix}.chosen"
        answer = f"{prefix}.{graph.logits}"
        added += [
            *copy.nodes,
            make_node("Equal", ("guard.label", f"{prefix}.class"), f"{prefix}.asked", graph),
            make_node("Where", (f"{prefix}.asked", answer, chosen), result, graph),
        ]
        chosen = result
    return Parts([*nodes[:position], *added, *nodes[position:]], tensors)


def _copy_parts(
    parts: Parts, tensors: Mapping[str, np.ndarray], prefix: str, graph: Graph
) -> Parts:
    """A copy of the nodes and tensors that the logits depend on, with `prefix` before their names.
    Tensors equal to those in `tensors` stay shared."""
    own = {
        n
        for n, array in parts.tensors.items()
        if n not in tensors or not np.array_equal(array, tensors[n])
    }
    shared = (set(parts.tensors) - own) | {graph.image, ""}
    name = lambda value: value if value in shared else f"{prefix}.{value}"
    nodes = [
        node._replace(
            name=f"{prefix}.{node.name}",
            inputs=tuple(map(name, node.inputs)),
            outputs=tuple(map(name, node.outputs)),
        )
        for node in needed(graph._replace(nodes=tuple(parts.nodes)), graph.logits)
    ]
    return Parts(nodes, {f"{prefix}.{n}": parts.tensors[n] for n in own})
