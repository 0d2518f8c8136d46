"""The neurons of a net: what scales each of them, under any architecture's names."""

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxbd.base import Array, UserError, Variables

Neurons = dict[str, Array]
"""Layer, such as "layer1_0/bn1" -> a value of each of its neurons [C]."""
KERNEL, SCALE, BIAS = "kernel", "scale", "bias"


def find_neurons(variables: Variables, classes: int) -> Neurons:
    """Ones [C] for every layer with neurons: the BatchNorm layers with a scale; in a net without
    any, its convolutions; without those, the linear layers but the classifier.

    Layers are known by the names of their arrays, which nets of jaxbd, Flax modules and imported
    graphs share: `kernel` with output channels last, `scale` beside `mean` and `var`.

    Raises: UserError where there is none of these.
    """
    params, stats = (_flatten(variables, name) for name in ("params", "batch_stats"))
    layers = {path[:-1] for path in params}
    normalised = [
        layer for layer in layers if (*layer, SCALE) in params and (*layer, "var") in stats
    ]
    kernels = {layer: params[*layer, KERNEL] for layer in layers if (*layer, KERNEL) in params}
    convolutions = [layer for layer, kernel in kernels.items() if kernel.ndim > 2]
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
    """`variables` with every neuron's weight times `weights`, and its bias, where it has one, times
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
    """`variables` without the weights of some neurons, which keep their bias.

    Args:
      value: [] in [0, 1], by "threshold" the mask below which a neuron is pruned, by "number" the
        share of all neurons that is.
    # Differs from released code: a mask at the threshold stays, so that 0 prunes nothing.
    """
    leaves, tree = jax.tree.flatten(masks)
    flat = jnp.concatenate(leaves)
    if by == "number":
        ranks = jnp.argsort(jnp.argsort(flat))
        keep = ranks >= jnp.round(value * flat.size)
    else:
        keep = flat >= value
    ends = [sum(leaf.size for leaf in leaves[: number + 1]) for number in range(len(leaves) - 1)]
    parts = zip(jnp.split(keep, ends), leaves, strict=True)
    kept = [part.astype(leaf.dtype) for part, leaf in parts]
    return scale_neurons(variables, jax.tree.unflatten(tree, kept))


def _flatten(variables: Variables, collection: str) -> dict[tuple[str, ...], Array]:
    tree = dict(variables.get(collection, {}))
    flat: Any = flax.traverse_util.flatten_dict(tree, keep_empty_nodes=True)
    return flat
