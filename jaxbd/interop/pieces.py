"""Weights that a file stores in parts, and normalisation constants stored among the weights.

Pruning stores `weight_orig` and `weight_mask`, weight_norm `weight_g` and `weight_v`, adversarial
neuron pruning a mask per channel of a BatchNorm layer. The state_dict of a net that normalises its
own input holds the mean and standard deviation. All of them are recognised by name.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbd.limits import Refusal, quote

ANP = ("neuron_mask", "neuron_noise", "neuron_noise_bias")
"""Parameters that Wu and Wang 2021 (adversarial neuron pruning) add to a BatchNorm layer."""
MEANS = ("mean", "mu", "means", "new_mean", "norm_mean", "pixel_mean", "image_mean", "_mean")
STDS = ("std", "sigma", "stds", "new_std", "norm_std", "pixel_std", "image_std", "_std")
MOST_CHANNELS = 16
COUNTS = ("total_ops", "total_params")
"""Buffers in which thop counts a module's operations and parameters."""
STATISTICS = ("running_mean", "running_var")


class Piece(NamedTuple):
    """The parts of one weight.

    Attributes:
      keys: names of the parts in the file; a single key is the weight itself.
      how: how the parts are combined: "" (a single part), "mask", "weight_norm" or "anp".
    """

    keys: tuple[str, ...]
    how: str


def pieces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """Name of each weight -> its parts, in file order. A part without its counterpart keeps its own
    name, which matches no architecture."""
    found: dict[str, Piece] = {}
    for name in shapes:
        whole, keys, how = _weight_of(name, shapes)
        if whole not in found:
            found[whole] = Piece(keys, how)
    # a list, because the loop removes entries from `found`
    for name in [name for name in found if name.rpartition(".")[2] == ANP[0]]:
        _add_neuron_mask(found, name)
    return found


def _weight_of(name: str, shapes: Mapping[str, Any]) -> tuple[str, tuple[str, ...], str]:
    """(the weight that `name` belongs to, the names of its parts, how they are combined)."""
    module, _, leaf = name.rpartition(".")
    base = f"{module}." if module else ""
    for first, second, how in (("_orig", "_mask", "mask"), ("_g", "_v", "weight_norm")):
        whole = leaf.removesuffix(first).removesuffix(second)
        keys = (f"{base}{whole}{first}", f"{base}{whole}{second}")
        if whole != leaf and keys[0] in shapes and keys[1] in shapes:
            return base + whole, keys, how
    inner = re.fullmatch(r"(.*\.)?parametrizations\.(\w+)\.original[01]", name)
    halves = (f"{name[:-1]}0", f"{name[:-1]}1")
    if inner is not None and halves[0] in shapes and halves[1] in shapes:
        return f"{inner[1] or ''}{inner[2]}", halves, "weight_norm"
    return name, (name,), ""


def _add_neuron_mask(found: dict[str, Piece], name: str) -> None:
    """Combines a layer's mask with its scale, and drops the noise: it is used only in training."""
    layer = name.rpartition(".")[0]
    base = f"{layer}." if layer else ""
    weight = found.get(f"{base}weight")
    if weight is None or weight.how:
        return
    found[f"{base}weight"] = Piece((*weight.keys, name), "anp")
    for part in ANP:
        found.pop(f"{base}{part}", None)


def may_be_part(name: str) -> bool:
    """Whether a tensor of that name may decide what a net computes: a weight, a part of one, a
    moment or a constant."""
    module, _, leaf = name.rpartition(".")
    return (
        any(word in leaf for word in ("weight", "bias"))
        or leaf in (*STATISTICS, *ANP, *MEANS, *STDS)
        or "parametrizations" in module.split(".")
    )


def put_together(name: str, piece: Piece, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Combines the parts of the weight `name`; the result has the type of the parts.

    Raises: Refusal if the shapes of the parts do not match.
    """
    if not piece.how:
        return arrays[piece.keys[0]]
    first, second = (arrays[key] for key in piece.keys)
    if piece.how == "weight_norm":
        return _normalise(name, first, second)
    if first.shape != second.shape:
        raise Refusal(f"{quote(name)} and its mask have different shapes")
    return (first * second.astype(first.dtype)).astype(first.dtype)


def _normalise(name: str, length: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """w = g v / |v| (Salimans and Kingma 2016, eq. 2); the norm is taken over the axes where g has
    one element."""
    if length.ndim != direction.ndim or any(
        size not in (1, whole) for size, whole in zip(length.shape, direction.shape, strict=True)
    ):
        # weight_norm with dim=None has one length for the whole weight
        if length.size != 1:
            raise Refusal(f"{quote(name)} has a length that does not fit its direction")
        length = length.reshape((1,) * direction.ndim)
    axes = tuple(axis for axis, size in enumerate(length.shape) if size == 1)
    wide = direction.astype(np.float64)
    norm = np.sqrt(np.square(wide).sum(axes, keepdims=True))
    # a direction of 0 gives NaN, which is refused as not finite
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = wide * (length.astype(np.float64) / norm)
    return whole.astype(direction.dtype)


def normalisation(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """Names of the tensors with the input's mean and standard deviation, or None.

    Both are in the same module, have names that belong together (`MEANS`, `STDS`), and hold one
    number per channel.
    """
    for name, shape in shapes.items():
        base, leaf = _split(name)
        if leaf not in MEANS:
            continue
        other = base + STDS[MEANS.index(leaf)]
        # a module with a weight is a layer: its mean and std are not the input's
        if shapes.get(other) == shape and _is_per_channel(shape) and f"{base}weight" not in shapes:
            return name, other
    return None


def _split(name: str) -> tuple[str, str]:
    base, dot, leaf = name.rpartition(".")
    return base + dot, leaf


def _is_per_channel(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of one number per channel: [C], [C, 1, 1], [1, C, 1, 1] or []."""
    sizes = [size for size in shape if size != 1]
    return len(shape) <= 4 and len(sizes) <= 1 and all(0 < size <= MOST_CHANNELS for size in sizes)
