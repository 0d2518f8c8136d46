"""Nets with layers in one sequence: LeNet and other small nets for MNIST, AlexNet-like nets, VGG
with or without BatchNorm (Simonyan and Zisserman 2015), any number of linear layers.

The order follows the names and is checked against the numbers of channels. Gaps in the numbers of a
`Sequential` show where pooling is. If the names show nothing, pooling is derived from the width of
the first linear layer and the image's size.
"""

import itertools
import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.families.layers import Layers, Mismatch, adaptive_avg_pool, max_pool, natural
from jaxbd.models.norm import Correction

MOST = 64
"""Maximum number of layers; a longer chain is some other net."""
ACTIVATIONS = {
    "relu": nn.relu,
    "elu": nn.elu,
    "tanh": jnp.tanh,
    "leaky": nn.leaky_relu,
    "sigmoid": nn.sigmoid,
}
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


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Possible values of what the weights do not determine, the most likely first.

    "pools": "1" or "0" per convolution, whether max-pooling follows it; "padded": whether the
    convolutions keep the image's size; "activation"; "side" of the images; "stem_stride" of the
    first convolution if not 1; "window" of the pooling if not 2.
    """
    found = chain(net)
    convs = [conv for conv, _ in found.convs]
    channels, places = net.shapes[convs[-1]][0], net.shapes[found.linears[0][0]][1]
    if math.isqrt(places // channels) ** 2 * channels != places:
        raise Mismatch(f"{found.linears[0][0]} does not read a square of places")
    rest = math.isqrt(places // channels)
    if net.shapes[convs[0]][-1] == 11:
        return ({**ALEXNET, "pools": "11" + "0" * (len(convs) - 3) + "1", "activation": "relu"},)
    activations = ("relu", "elu") if len(convs) > 3 else ("relu", "elu", "tanh")
    shapes = _sequence(net, found, rest) or _small(net, found, rest)
    if not shapes:
        raise Mismatch(f"no pooling leaves the {rest}x{rest} places that its linear layers read")
    return tuple({**shape, "activation": act} for act in activations for shape in shapes)


def _sequence(net: Layers, found: Chain, rest: int) -> list[dict[str, Any]]:
    """Forms of nets with convolutions numbered in one sequence, where a gap means pooling."""
    names = [conv for conv, _ in found.convs]
    bases = {name.rpartition(".")[0] for name in names}
    numbers = [name.rpartition(".")[2] for name in names]
    if len(bases) != 1 or not all(number.isdigit() for number in numbers) or len(names) < 2:
        return []
    usual = 3 if found.convs[0][1] else 2
    gaps = [int(b) - int(a) - usual for a, b in itertools.pairwise(numbers)]
    if min(gaps) < 0 or not any(gaps):
        return []
    pools = "".join("1" if gap else "0" for gap in gaps)
    return [
        {"pools": f"{pools}{last}", "padded": True, "side": rest * 2 ** (pools + last).count("1")}
        for last in ("1", "0")
    ]


def _small(net: Layers, found: Chain, rest: int) -> list[dict[str, Any]]:
    """Forms of small nets: pooling and padding that reduce an image of a usual size to `rest` x
    `rest` positions."""
    convs = [conv for conv, _ in found.convs]
    if len(convs) > 8:
        return []
    grey = net.shapes[convs[0]][1] == 1
    solutions = []
    for side in (28, 32, 16, 8, 64) if grey else (32, 28, 64, 96, 224, 16):
        for padded in (False, True):
            for pools in _likely_pools(len(convs)):
                if _places(net, convs, side, padded, pools) == rest:
                    solutions.append({"pools": pools, "padded": padded, "side": side})
        # sides are in order of likelihood: stop at the first that fits
        if solutions:
            break
    return solutions[:3]


def _likely_pools(count: int) -> list[str]:
    """Likely pooling: after every convolution; every second; only the last; all except the first;
    none."""
    every = "1" * count
    second = "".join("1" if index % 2 else "0" for index in range(count))
    last = "0" * (count - 1) + "1"
    return list(dict.fromkeys([every, second, last, "0" + "1" * (count - 1), "0" * count]))


def _places(net: Layers, convs: list[str], side: int, padded: bool, pools: str) -> int:
    for conv, pool in zip(convs, pools, strict=True):
        kernel = net.shapes[conv][-1]
        side = side - kernel + 1 + 2 * (kernel // 2) * padded
        side = side // 2 if pool == "1" else side
        if side < 1:
            return 0
    return side


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    found, activate = chain(net), ACTIVATIONS[form["activation"]]
    stride, window = form.get("stem_stride", 1), form.get("window", 2)
    for index, ((conv, norm), pool) in enumerate(zip(found.convs, form["pools"], strict=True)):
        # only AlexNet has a stem stride, and its first convolution pads by 2
        padding = (None if stride == 1 or index else 2) if form["padded"] else 0
        x = net.conv(conv, x, stride if index == 0 else 1, padding)
        x = activate(x if norm is None else net.norm(norm, x))
        x = max_pool(x, window, 2) if pool == "1" else x
    rest = math.isqrt(net.size(found.linears[0][0])[1] // x.shape[-1])
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
