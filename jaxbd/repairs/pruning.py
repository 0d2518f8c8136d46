"""Finds, ranks and prunes the features of a net that clean images activate least (Liu et al.
2018)."""

from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxbd.base import Array, Batch, Net, UserError, Variables
from jaxbd.repairs import activations, choose

GROUP = 20
"""Ratios tried at a time; they share the computation of the layers below the pruned one."""
OTHERS = "use another repair, such as ft-sam"


class Place(NamedTuple):
    """Where to prune features: the last `layer` that the net shows, and the path of the `kernel`
    [F, O] that reads it."""

    layer: str
    kernel: tuple[str, ...]


def find_place(net: Net, variables: Variables, images: Array, classes: int) -> Place:
    """Finds the place to prune; computes nothing. In nets that end in a mean over positions and a
    linear layer, a feature is the mean activation of a channel of the last convolution.

    # Differs from paper: if activations are flattened instead, a feature is one position of a
    channel, as in BackdoorBench, and channels are not pruned as a whole.

    Raises: UserError when the last layer that the net shows is read by no linear layer, or by none
      that its shape identifies.
    """
    widths: list[tuple[str, int]] = []

    def look(variables: Variables, images: Array) -> None:
        assert net.outputs is not None, "make refuses nets without"
        layers = net.outputs(variables, images)[1]
        widths.extend((name, values.shape[-1]) for name, values in layers.items())

    jax.eval_shape(look, variables, images)
    if not widths:
        raise UserError(f"fine-pruning: this net shows no layers to prune; {OTHERS}")
    layer, features = widths[-1]
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(dict(variables["params"]))
    readers = {
        path: leaf.shape
        for path, leaf in flat.items()
        if path[-1] == "kernel" and leaf.ndim == 2 and leaf.shape[0] == features
    }
    if len(readers) > 1:
        readers = {path: shape for path, shape in readers.items() if shape[1] == classes}
    if len(readers) != 1:
        raise UserError(
            f"fine-pruning: {len(readers) or 'no'} linear layers could read the {features} features"
            f" of {layer!r}, the last layer that this net shows; {OTHERS}"
        )
    return Place(layer, next(iter(readers)))


def is_pruned(rank: Array, ratio: Array) -> Array:
    """Whether each feature [F] is in the share `ratio` [] with the smallest mean activations."""
    # the 1e-3 because 0.29 of 100 is 28.999… in floating point
    return rank < jnp.floor(ratio * len(rank) + 1e-3)


def prune(variables: Variables, place: Place, rank: Array, ratio: Array) -> Variables:
    """`variables` with the outgoing weights of the features in `is_pruned` set to 0."""
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(dict(variables["params"]))
    kernel = flat[place.kernel]
    flat[place.kernel] = jnp.where(is_pruned(rank, ratio)[:, None], 0, kernel)
    return {**variables, "params": flax.traverse_util.unflatten_dict(flat)}


def rank_features(net: Net, variables: Variables, place: Place, images: Array) -> Array:
    """Rank [F] int32 of every feature by its mean activation over `images` [N, H, W, C] and
    positions, smallest first."""

    def last(_: Array, chunk: Array) -> dict[str, Array]:
        assert net.outputs is not None, "make refuses nets without"
        return {place.layer: net.outputs(variables, chunk)[1][place.layer]}

    means = activations.means(last, images)[place.layer]
    # argsort of argsort gives ranks
    return jnp.argsort(jnp.argsort(means)).astype(jnp.int32)


def measure_accuracies(
    net: Net, variables: Variables, place: Place, rank: Array, ratios: Array, held: Batch
) -> Array:
    """Accuracy [n] on `held` of the net pruned to each of the `ratios` [n]."""
    measure = lambda ratio: choose.measure_accuracy(net, prune(variables, place, rank, ratio), held)
    return jax.lax.map(measure, ratios, batch_size=GROUP)
