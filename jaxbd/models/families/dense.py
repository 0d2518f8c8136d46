"""DenseNet (Huang et al. 2017) of any depth and growth, with the layer names of torchvision,
kuangliu/pytorch-cifar, weiaicunzai/pytorch-cifar100 and andreasveit/densenet-pytorch."""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.families.layers import Layers, Mismatch, avg_pool, max_pool


class Naming(NamedTuple):
    """Layer names of one style, as regular expressions except for `stem` and `last`.

    Attributes:
      stem: first convolution, and its norm or None.
      stages: dense blocks; layers: layers within a block.
      transitions: transitions between two blocks.
      last: the norm before the head.
      newest_first: whether a layer's output is concatenated before its input.
      bare: whether a transition has no ReLU.
    """

    stem: tuple[str, str | None]
    stages: str
    layers: str
    transitions: str
    last: str
    newest_first: bool = False
    bare: bool = False


NAMINGS = (
    Naming(
        ("features.conv0", "features.norm0"),
        r"features\.denseblock\d+",
        r"\.denselayer\d+",
        r"features\.transition\d+",
        "features.norm5",
    ),
    Naming(("conv1", None), r"dense\d+", r"\.\d+", r"trans\d+", "bn", newest_first=True),
    Naming(
        ("conv1", None),
        r"features\.dense_block\w*?\d+",
        r"\.bottle_neck_layer_\d+",
        r"features\.transition_layer_\d+",
        "features.bn",
        bare=True,
    ),
    Naming(("conv1", None), r"block\d+", r"\.layer\.\d+", r"trans\d+", "bn1"),
    Naming(
        ("features.conv0", None),
        r"features\.denseblock\d+",
        r"\.denselayer\d+",
        r"features\.transition\d+",
        "features.norm_final",
    ),
)


def naming(net: Layers) -> Naming:
    """The style of the names. Raises Mismatch when it is unknown."""
    for style in NAMINGS:
        stages = net.matching(style.stages)
        has_ends = style.stem[0] in net.shapes and style.last in net.shapes
        if has_ends and stages and net.matching(style.stages + style.layers):
            return style
    raise Mismatch("it has no dense blocks")


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Possible values of "pool" (max-pooling after the stem) and "stem_stride"."""
    style = naming(net)
    side = net.size(style.stem[0])[-1]
    # the styles without a norm in the stem are those of CIFAR nets
    if style.stem[1] is None:
        return ({"stem_stride": 1, "pool": False},)
    if side == 7:
        return ({"stem_stride": 2, "pool": True},)
    return ({"stem_stride": 1, "pool": True}, {"stem_stride": 1, "pool": False})


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    style = naming(net)
    x = net.conv(style.stem[0], x, form["stem_stride"])
    x = nn.relu(net.norm(style.stem[1], x)) if style.stem[1] else x
    x = max_pool(x, 3, 2, 1) if form["pool"] else x
    between = net.matching(style.transitions)
    stages = sorted(net.matching(style.stages), key=lambda name: int(re.findall(r"\d+", name)[-1]))
    for index, stage in enumerate(stages):
        for layer in net.matching(stage.replace(".", r"\.") + style.layers):
            y = _layer(net, layer, x)
            x = jnp.concatenate([y, x] if style.newest_first else [x, y], -1)
        if index < len(between):
            x = _transition(net, between[index], x, style.bare)
    return net.head(nn.relu(net.norm(style.last, x)))


def _layer(net: Layers, name: str, x: Array) -> Array:
    """Applies norm, ReLU, conv, once or twice."""
    inner = net.within(name)
    convs = [key for key in inner if len(net.shapes[key]) == 4]
    norms = [key for key in inner if len(net.shapes[key]) == 1]
    if not convs or len(convs) != len(norms):
        raise Mismatch(f"{name} is not a layer of a dense block")
    for norm, conv in zip(norms, convs, strict=True):
        x = net.conv(conv, nn.relu(net.norm(norm, x)))
    return x


def _transition(net: Layers, name: str, x: Array, bare: bool) -> Array:
    inner = net.within(name)
    norm, conv = (
        next((key for key in inner if len(net.shapes[key]) == axes), "") for axes in (1, 4)
    )
    x = net.norm(norm, x)
    return avg_pool(net.conv(conv, x if bare else nn.relu(x)), 2, 2)


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    return 224 if net.size(naming(net).stem[0])[-1] == 7 else 32


def title(net: Layers) -> str:
    """ "DenseNet-121", after its number of layers."""
    return f"DenseNet-{sum(len(shape) in (2, 4) for shape in net.shapes.values())}"
