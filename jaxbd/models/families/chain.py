"""Nets with layers in one sequence: LeNet and other small nets for MNIST, AlexNet-like nets, VGG
with or without BatchNorm (Simonyan and Zisserman 2015), any number of linear layers.

The order follows the names and is checked against the numbers of channels. Where the net pools is
derived from the width of the first linear layer and the image's size, see `placements`; gaps in the
numbers of a `Sequential` show where it may.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.families import placements
from jaxbd.models.families.layers import (
    Layers,
    Mismatch,
    adaptive_avg_pool,
    avg_pool,
    max_pool,
    natural,
)
from jaxbd.models.norm import Correction

MOST = 64
"""Maximum number of layers; a longer chain is some other net."""
ACTIVATIONS: dict[str, tuple[float, Callable[[Array], Array]]] = {
    "relu": (0.0, nn.relu),
    "elu": (2.0, nn.elu),
    "leaky": (2.5, nn.leaky_relu),
    "leaky0.1": (2.5, functools.partial(nn.leaky_relu, negative_slope=0.1)),
    "leaky0.2": (3.0, functools.partial(nn.leaky_relu, negative_slope=0.2)),
    "tanh": (3.0, jnp.tanh),
    "sigmoid": (3.5, nn.sigmoid),
}
"""Name -> (cost, function); the lower the cost, the likelier. "leaky" has PyTorch's slope, 0.01."""
MAX = {"max": 0.0}
POOLINGS = {**MAX, "avg": 2.0}
"""Name -> cost."""
MOST_FORMS = 96
WORK = 10_000_000_000
"""Maximum number of forms for one size of images, and of multiplications that all of them need for
one image: each form is tried on images, which for a large net takes long."""
ALEXNET = {"padded": True, "stem_stride": 4, "window": 3, "side": 224}
"""Krizhevsky et al. 2012, as in torchvision: 11x11 first convolution, overlapping pooling."""
ORDER = (
    "block",
    "stage",
    "layer",
    "feature",
    "conv",
    "c1",
    "c2",
    "fc",
    "linear",
    "classifier",
    "head",
    "output",
    "out",
)
"""Order of a net's parts, by the first letters of their names."""


class Chain(NamedTuple):
    """Convolutions in order, each with its norm or None; linear layers likewise."""

    convs: tuple[tuple[str, str | None], ...]
    linears: tuple[tuple[str, str | None], ...]


def chain(net: Layers) -> Chain:
    """The layers in order. Raises Mismatch when their numbers of channels do not match."""
    if len(net.shapes) > MOST:
        raise Mismatch("it has more layers than a plain net")
    convs = [name for name, shape in net.shapes.items() if len(shape) == 4]
    linears = [name for name, shape in net.shapes.items() if len(shape) == 2]
    norms = [name for name, shape in net.shapes.items() if len(shape) == 1]
    if not convs or not linears:
        raise Mismatch("it has no convolutions and linear layers")
    ordered = (
        _check_linked(net, sorted(convs, key=_order)),
        _check_linked(net, sorted(linears, key=_order)),
    )
    paired = [[(name, _norm_after(net, name, norms)) for name in part] for part in ordered]
    used = {norm for part in paired for _, norm in part}
    if set(norms) - used:
        raise Mismatch(f"{min(set(norms) - used)} follows no layer")
    last = net.shapes[ordered[0][-1]][0]
    if net.shapes[ordered[1][0]][1] % last:
        raise Mismatch(f"{ordered[1][0]} does not take what {ordered[0][-1]} gives")
    return Chain(tuple(paired[0]), tuple(paired[1]))


def _order(name: str) -> list[Any]:
    known = next((i for i, start in enumerate(ORDER) if name.lower().startswith(start)), 4)
    return [known, natural(name)]


def _check_linked(net: Layers, names: list[str]) -> list[str]:
    """Returns `names` after checking that each layer's input channels match the output channels of
    the one before."""
    for one, other in itertools.pairwise(names):
        if net.shapes[other][1] != net.shapes[one][0]:
            raise Mismatch(f"{other} does not take what {one} gives")
    return names


def _norm_after(net: Layers, name: str, norms: list[str]) -> str | None:
    """The norm that follows a layer: the one with the next number in the same sequence, or with the
    same number under another name; None if there is none."""
    base, _, leaf = name.rpartition(".")
    stem = f"{base}." if base else ""
    guesses = [f"{stem}{int(leaf) + 1}"] if leaf.isdigit() else []
    number = re.search(r"[\d_]*$", leaf)
    tail = number[0] if number else ""
    places = {stem, f"{stem}bn", f"{stem}norm", f"{stem}batchnorm", f"{stem}batch_norm"}
    guesses += [f"{place}{tail}" for place in sorted(places) if place]
    guesses += [f"{stem}{kind}{leaf}" for kind in ("bn_", "norm_")]
    guesses += [f"{stem}{leaf}_{kind}" for kind in ("bn", "norm")]
    return next(
        (g for g in guesses if g in norms and net.shapes[g][0] == net.shapes[name][0]), None
    )


def forms(net: Layers, size: tuple[int, int] | None = None) -> tuple[dict[str, Any], ...]:
    """Possible values of what the weights do not determine, the most likely first, for images of
    `size` (height, width), or of the usual sizes.

    "pools": "1" or "0" per convolution, whether the image is halved after it; "pooling": "max",
    "avg", or "stride" (the convolution itself halves it); "padded": whether the convolutions keep
    the image's size (True, False, or "first"); "activation"; "side" of the images; "stem_stride" of
    the first convolution if not 1; "window" of the pooling if not 2.
    """
    found = chain(net)
    convs = [net.shapes[conv] for conv, _ in found.convs]
    channels, places = convs[-1][0], net.shapes[found.linears[0][0]][1]
    rest = math.isqrt(places // channels)
    if rest**2 * channels != places:
        raise Mismatch(f"{found.linears[0][0]} does not read a square of places")
    if convs[0][-1] == 11:
        return ({**ALEXNET, "pools": "11" + "0" * (len(convs) - 3) + "1", "activation": "relu"},)
    gaps = _find_gaps(found)
    if gaps is None and len(convs) > 8:
        raise Mismatch("its names do not show where it pools")
    plan = placements.Plan(tuple(shape[-1] for shape in convs), gaps, rest, convs[0][1])
    weighed, most = [], {}
    for cost, placed in placements.place(plan, size):
        side = placed["side"]
        work = placements.multiply_adds(convs, placed, size or (side, side))
        most[side] = min(most.get(side, MOST_FORMS), max(4, WORK // work))
        weighed += [(cost + more, {**placed, **kind}) for more, kind in _kinds(placed)]
    chosen, counts = [], collections.Counter()
    for _, form in sorted(weighed, key=lambda each: each[0]):
        counts[form["side"]] += 1
        if counts[form["side"]] <= most[form["side"]]:
            chosen.append({name: value for name, value in form.items() if name != "strided"})
    if not chosen:
        raise Mismatch(f"no pooling leaves the {rest}x{rest} places that its linear layers read")
    return tuple(chosen)


def _kinds(placed: dict[str, Any]) -> Iterator[tuple[float, dict[str, str]]]:
    """(cost, form) of each pooling and activation that fits a placement."""
    poolings = {"stride": 0.0} if placed["strided"] else POOLINGS if "1" in placed["pools"] else MAX
    for (pooling, one), (activation, other) in itertools.product(
        poolings.items(), ACTIVATIONS.items()
    ):
        yield one + other[0], {"pooling": pooling, "activation": activation}


def _find_gaps(found: Chain) -> tuple[int, ...] | None:
    """Numbers of modules, other than norm and activation, between convolutions numbered in one
    `Sequential`; None for other names, or if the numbers leave no place for the activations."""
    names = [conv for conv, _ in found.convs]
    bases = {name.rpartition(".")[0] for name in names}
    numbers = [name.rpartition(".")[2] for name in names]
    if len(bases) != 1 or not all(number.isdigit() for number in numbers) or len(names) < 2:
        return None
    gaps = [
        int(after) - int(number) - (2 if norm is None else 3)
        for (number, after), (_, norm) in zip(
            itertools.pairwise(numbers), found.convs, strict=False
        )
    ]
    return tuple(gaps) if min(gaps) >= 0 else None


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    found, (_, activate) = chain(net), ACTIVATIONS[form["activation"]]
    pooling, window = form.get("pooling", "max"), form.get("window", 2)
    pool = {"max": max_pool, "avg": avg_pool, "stride": lambda y, *_: y}[pooling]
    for index, ((conv, norm), halves) in enumerate(zip(found.convs, form["pools"], strict=True)):
        stride = form.get("stem_stride", 1) if index == 0 else 1
        # only AlexNet has a stem stride, and its first convolution pads by 2
        padding = 2 if stride > 1 else None if placements.is_padded(form["padded"], index) else 0
        stride = 2 if pooling == "stride" and halves == "1" else stride
        x = net.conv(conv, x, stride, padding)
        x = activate(x if norm is None else net.norm(norm, x))
        x = pool(x, window, 2) if halves == "1" else x
    rest = math.isqrt(net.size(found.linears[0][0])[1] // x.shape[-1])
    # torchvision's VGG and AlexNet take images of any size: their pooling may repeat positions
    if min(x.shape[1:3]) < rest and not (window == 3 or rest == placements.HEAD):
        raise Mismatch(f"{found.linears[0][0]} reads more than the {x.shape[1]} places of a side")
    x = adaptive_avg_pool(x, rest)
    # PyTorch flattens channels first
    x = Correction(name="features")(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))
    for index, (linear, norm) in enumerate(found.linears):
        x = net.linear(linear, x)
        x = x if norm is None else net.norm(norm, x)
        x = activate(x) if index < len(found.linears) - 1 else x
    return x


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    return int(forms(net)[0]["side"])


def title(net: Layers) -> str:
    """ "VGG-16", after its number of layers, or "CNN-4" for a small net."""
    found = chain(net)
    # names of VGG nets count the original's three linear layers
    if len(found.convs) > 4:
        return f"VGG-{len(found.convs) + 3}"
    return f"CNN-{len(found.convs) + len(found.linears)}"
