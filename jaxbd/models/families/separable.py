"""MobileNet v1 (Howard et al. 2017) with other layer names than kuangliu's: pairs of depthwise and
1x1 convolutions in one chain."""

from typing import Any

import flax.linen as nn

from jaxbd.base import Array
from jaxbd.models.families.layers import Layers, Mismatch, natural

PARTS = ("stem", "features", "model", "conv1", "conv2", "conv3", "conv4", "layers")


def units(net: Layers) -> list[tuple[str, str]]:
    """(convolution, norm) in order. Raises Mismatch when the layers are not such a chain."""
    key = lambda name: (_part(name), natural(name))
    convs = sorted((n for n, shape in net.shapes.items() if len(shape) == 4), key=key)
    norms = sorted((n for n, shape in net.shapes.items() if len(shape) == 1), key=key)
    if len(convs) != len(norms) or len(convs) < 7:
        raise Mismatch("it is not a chain of depthwise convolutions")
    deep = [net.shapes[name][1] == 1 for name in convs[1:]]
    if deep != [index % 2 == 0 for index in range(len(deep))]:
        raise Mismatch("it is not a chain of depthwise convolutions")
    return list(zip(convs, norms, strict=True))


def _part(name: str) -> int:
    return PARTS.index(name.split(".")[0]) if name.split(".")[0] in PARTS else len(PARTS)


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Possible values of "stem_stride" and "activation", the most likely first."""
    units(net)
    return (
        {"stem_stride": 1, "activation": "relu"},
        {"stem_stride": 2, "activation": "relu"},
        {"stem_stride": 1, "activation": "relu6"},
    )


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]. A pair that increases the number of
    channels halves the image, except the first pair."""
    activate = nn.relu if form["activation"] == "relu" else nn.relu6
    (conv, norm), *pairs = units(net)
    x = activate(net.norm(norm, net.conv(conv, x, form["stem_stride"])))
    for index, (depthwise, pointwise) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        widens = net.size(pointwise[0])[0] > net.size(depthwise[0])[0]
        x = activate(net.unit(*depthwise, x, 2 if index and widens else 1, grouped=True))
        x = activate(net.unit(*pointwise, x))
    return net.head(x)


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    return 32


def title(net: Layers) -> str:
    """ "MobileNet"."""
    return "MobileNet"
