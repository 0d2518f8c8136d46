"""Folds BatchNormalization into the preceding convolution, for graphs with frozen weights."""

import functools
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Variables
from jaxbd.interop.onnx.graph import readers
from jaxbd.interop.onnx.parameters import Layout
from jaxbd.interop.onnx.tidying import BATCH_NORM


def freezing(layout: Layout) -> Callable[[Variables], Variables] | None:
    """The function that folds a net's normalisations, see `Net.frozen`; None if there are none to
    fold."""
    pairs = _pairs(layout)
    return functools.partial(_fold, pairs) if pairs else None


def _pairs(layout: Layout) -> dict[str, tuple[str, float]]:
    """Layer of a BatchNormalization -> (layer of the convolution before it, epsilon). A pair is
    only made if nothing else reads the convolution's output or its weights."""
    after = readers(layout.nodes)
    makers = {value: node for node in layout.nodes for value in node.outputs}
    uses: dict[str, int] = {}
    for node in layout.nodes:
        for value in node.inputs:
            uses[value] = uses.get(value, 0) + 1
    pairs = {}
    for node in layout.nodes:
        before = (
            makers.get(node.inputs[0])
            if node.op == BATCH_NORM and node.outputs[0] in layout.norms
            else None
        )
        if before is None or before.op != "Conv" or len(after[node.inputs[0]]) != 1:
            continue
        slots: list[Any] = [layout.slots.get(value) for value in before.inputs[1:] if value]
        if all(
            slot is not None and uses[value] == 1
            for slot, value in zip(slots, before.inputs[1:], strict=True)
        ):
            pairs[layout.norms[node.outputs[0]]] = (slots[0].path[1], node.get("epsilon", 1e-5))
    return pairs


def _fold(pairs: dict[str, tuple[str, float]], variables: Variables) -> Variables:
    """Rewrites y = (w * x + b - mu) s / sqrt(var + eps) + t as y = w' * x + shift, with the shift
    in the collection `folded`."""
    flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(
        jax.tree.map(np.asarray, dict(variables))
    )
    for norm, (conv, epsilon) in pairs.items():
        if ("folded", norm, "shift") in flat:  # folded before
            continue
        scale, bias = (flat.pop(("params", norm, leaf)) for leaf in ("scale", "bias"))
        mean, variance = (flat.pop(("batch_stats", norm, leaf)) for leaf in ("mean", "var"))
        factor = scale / np.sqrt(variance + np.asarray(epsilon, variance.dtype))
        shift = bias - mean * factor
        kernel = ("params", conv, "kernel")
        flat[kernel] = flat[kernel] * factor.reshape((1,) * (flat[kernel].ndim - 1) + (-1,))
        if ("params", conv, "bias") in flat:
            shift = shift + flat["params", conv, "bias"] * factor
            # the bias is part of the shift now
            flat["params", conv, "bias"] = np.zeros_like(shift)
        flat["folded", norm, "shift"] = shift
    return {"batch_stats": {}, **jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat))}
