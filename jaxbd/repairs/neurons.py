"""Finds a net's neurons and the weights that scale them, in any architecture."""

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxbd.base import Array, UserError, Variables

Neurons = dict[str, Array]
"""Layer, for example "layer1_0/bn1" -> one value per neuron [C]."""
KERNEL, SCALE, BIAS = "kernel", "scale", "bias"


def find_neurons(variables: Variables, classes: int) -> Neurons:
    """Ones [C] for every layer with neurons: the BatchNorm layers with a scale; without any, the
    convolutions; without these, the linear layers except the classifier.

    Layers are recognised by the names of their arrays, which jaxbd's nets, Flax modules and
    imported graphs share: `kernel` with output channels last, `scale` beside `mean` and `var`.

    Raises: UserError when there are none of these.
    """
    params, stats = (_flatten(variables, name) for name in ("params", "batch_stats"))
    layers = {path[:-1] for path in params}
    normalised = [
        layer for layer in layers if (*layer, SCALE) in params and (*layer, "var") in stats
    ]
    kernels = {layer: params[*layer, KERNEL] for layer in layers if (*layer, KERNEL) in params}
    convolutions = [layer for layer, kernel in kernels.items() if kernel.ndim > 2]
    # a linear layer with one output per class counts as the classifier
    linear = [
        layer
        for layer, kernel in kernels.items()
        if kernel.ndim == 2 and kernel.shape[-1] != classes
    ]
    for found, leaf in ((normalised, SCALE), (convolutions, KERNEL), (linear, KERNEL)):
        if found:
            ones = lambda weight: jnp.ones(weight.shape[-1:], weight.dtype)
            return {"/".join(layer): ones(params[*layer, leaf]) for layer in sorted(found)}
    raise UserError(
        "anp: this net names no BatchNorm scale and no kernel, so its neurons are not known; use"
        " another repair, such as finetune or ibau"
    )


def scale_neurons(
    variables: Variables, weights: Neurons, biases: Neurons | None = None
) -> Variables:
    """`variables` with every neuron's weight multiplied by `weights`, and its bias, if any, by
    `biases`."""
    params = _flatten(variables, "params")
    for layer, factor in weights.items():
        path = tuple(layer.split("/"))
        leaf = (*path, SCALE) if (*path, SCALE) in params else (*path, KERNEL)
        params[leaf] = params[leaf] * factor.reshape((1,) * (params[leaf].ndim - 1) + (-1,))
        if biases is not None and (*path, BIAS) in params:
            params[*path, BIAS] = params[*path, BIAS] * biases[layer]
    return {**variables, "params": flax.traverse_util.unflatten_dict(params)}


def prune(variables: Variables, masks: Neurons, value: Array, by: str) -> Variables:
    """`variables` with the weights of pruned neurons set to 0; their biases stay.

    Args:
      value: [] in [0, 1]. By "threshold": prune neurons with a mask below it. By "number": prune
        this share of all neurons, smallest masks first.
    # Differs from released code: a mask equal to the threshold stays, so that 0 prunes nothing.
    """
    leaves, tree = jax.tree.flatten(masks)
    flat = jnp.concatenate(leaves)
    if by == "number":
        # argsort of argsort gives ranks
        ranks = jnp.argsort(jnp.argsort(flat))
        keep = ranks >= jnp.round(value * flat.size)
    else:
        keep = flat >= value
    ends = [sum(leaf.size for leaf in leaves[: number + 1]) for number in range(len(leaves) - 1)]
    parts = zip(jnp.split(keep, ends), leaves, strict=True)
    weights = [part.astype(leaf.dtype) for part, leaf in parts]
    return scale_neurons(variables, jax.tree.unflatten(tree, weights))


def _flatten(variables: Variables, collection: str) -> dict[tuple[str, ...], Array]:
    tree = dict(variables.get(collection, {}))
    flat: Any = flax.traverse_util.flatten_dict(tree, keep_empty_nodes=True)
    return flat
