"""Attention maps of a net's layers, and the layers' outputs in training (Zagoruyko and Komodakis
2017; Li et al. 2021)."""

from collections.abc import Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, ArrayTree, Net, UserError, Variables
from jaxbd.repairs import activations, bna_layers

LEAST_NORM = 1e-6
"""Added to a map's norm before division, as released."""


def choose_layers(outputs: Mapping[str, Array]) -> list[Array]:
    """The last layer [B, H, W, C] in `outputs` at each size H x W, in order of execution.

    In a net that halves the image between stages, these layers end the stages. Layers are chosen by
    size, because names do not identify stages in every net. Layers with a single position have no
    attention to compare and are left out.
    # Differs from paper: the paper takes the sums that end the residual groups of a WideResNet. Our
    nets show normalisation layers; the nearest ones are the first of the next group, or the last in
    the group.
    """
    last: dict[tuple[int, ...], Array] = {}
    for values in outputs.values():
        size = values.shape[1:-1]
        if values.ndim == 4 and size != (1, 1):
            # removed first, so that the dictionary is in the order of the last layers
            last.pop(size, None)
            last[size] = values
    return list(last.values())


def count_layers(net: Net, variables: Variables, images: Array, method: str) -> int:
    """Number of layers that `choose_layers` finds in `net`; computes nothing.

    Raises: UserError when there are none; `method` begins the message.
    """
    if net.outputs is None:
        raise UserError(
            f"{method}: a net made from a bare apply function shows no layers to compare; use"
            " another repair, such as ft-sam"
        )
    found = choose_layers(jax.eval_shape(net.outputs, variables, images)[1])
    if not found:
        raise UserError(
            f"{method}: this net shows no layer with places, so it has no attention maps; use"
            " another repair, such as ft-sam"
        )
    return len(found)


def attention_map(values: Array, power: float = 2.0) -> Array:
    """A / (|A|_2 + 1e-6) [B, H, W] in [0, 1], with A = sum_c |values_c|^p of `values` [B, H, W, C]
    and p = `power`; the sum operator of Li et al. 2021, section 3."""
    summed = (jnp.abs(values) ** power).sum(-1)
    square = jnp.square(summed).sum((1, 2), keepdims=True)
    # the gradient of a norm is not finite at 0, where a dead layer is
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return summed / (norm + LEAST_NORM)


def attention_maps(outputs: Mapping[str, Array], power: float) -> list[Array]:
    """The maps of the layers from `choose_layers`, in order of execution."""
    return [attention_map(values, power) for values in choose_layers(outputs)]


def attention_distance(
    student: Sequence[Array], teacher: Sequence[Array], weights: Sequence[float]
) -> Array:
    """sum_l w_l mean (student_l - teacher_l)^2 [] over maps [B, H, W].

    Maps and weights are paired from the last backwards: extra first layers, or extra first weights,
    are ignored.
    """
    total = jnp.zeros(())
    pairs = zip(student, teacher, strict=True)
    for weight, (one, other) in zip(reversed(weights), reversed(list(pairs)), strict=False):
        total += weight * jnp.square(one - other).mean()
    return total


def show_training(
    net: Net, variables: Variables, images: Array
) -> tuple[Array, ArrayTree, dict[str, Array]]:
    """(logits [B, K], new batch_stats, {layer: [B, …, C]}) of `net` in training.

    `Net.outputs` only runs in evaluation. With the batch's own moments in place of the running
    ones, its layers have the values of training, and gradients flow through the moments as in
    training. The net runs twice: once to measure the moments, once with them.
    """
    assert net.outputs is not None, "count_layers refuses nets without"
    _, stats = net.apply(variables, images, train=True)
    if not jax.tree.leaves(stats):
        logits, outputs = net.outputs(variables, images)
        return logits, stats, outputs
    shapes = jax.eval_shape(net.outputs, variables, images)[1]
    layers = bna_layers.flatten(activations.moments_of_batch(net, variables, images))
    for name, moments in layers.items():
        if name in shapes and "var" in moments:
            count = shapes[name].size // shapes[name].shape[-1]
            # stored variances are unbiased, but BatchNorm normalises by biased ones
            moments["var"] = moments["var"] * (max(count - 1, 1) / count)
    nested = flax.traverse_util.unflatten_dict(layers, sep="/")
    logits, outputs = net.outputs({**variables, "batch_stats": nested}, images)
    return logits, stats, outputs


def pool(maps: Array, size: tuple[int, int]) -> Array:
    """Averages `maps` [B, H, W] to [B, *size], as PyTorch's AdaptiveAvgPool2d does; repeats values
    if `size` is larger."""
    rows, columns = (
        jnp.asarray(_averages(*sides), maps.dtype)
        for sides in zip(maps.shape[1:], size, strict=True)
    )
    return jnp.einsum("Hh,Ww,bhw->bHW", rows, columns, maps)


def _averages(inner: int, outer: int) -> np.ndarray:
    """Pooling weights [outer, inner] from `inner` input positions to `outer` output positions."""
    weights = np.zeros((outer, inner))
    for place in range(outer):
        first, last = place * inner // outer, -(-(place + 1) * inner // outer)
        weights[place, first:last] = 1 / (last - first)
    return weights
