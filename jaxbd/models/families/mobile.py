"""Depthwise nets of any width: MobileNet v1 and v2 (Howard et al. 2017, Sandler et al. 2018),
EfficientNet (Tan and Le 2019), with the layer names of torchvision, kuangliu/pytorch-cifar and
weiaicunzai/pytorch-cifar100; timm's MobileNetV2 and MNASNet (Tan et al. 2019).

timm's EfficientNets are not read: variants with the same names and shapes differ in padding and in
BatchNorm's epsilon."""

from typing import Any, NamedTuple

import flax.linen as nn

from jaxbd.base import Array
from jaxbd.models.families.layers import Layers, Mismatch, natural, squeeze

SEVEN = {"imagenet": "1222121", "cifar": "1122121", "small": "1222111"}
"""Strides of the seven stages of MobileNetV2: in the paper, kuangliu's and weiaicunzai's nets."""
BLOCKS = (
    (r"features\.(?:[1-9]|\d\d)(?=\.conv)", ("features.0.0", "features.0.1")),
    (r"layers\.\d+", ("conv1", "bn1")),
    (r"stage\d+(?:\.\d+)?(?=\.residual)", ("pre.0", "pre.1")),
    (r"features\.[1-7]\.\d+(?=\.block)", ("features.0.0", "features.0.1")),
    (r"blocks\.\d+\.\d+", ("conv_stem", "bn1")),
)
"""Name patterns of the blocks, with the names of the stem's convolution and norm."""


class Inverted(NamedTuple):
    """The layers of one block: (convolution, norm) in order, squeeze-and-excitation, shortcut."""

    units: tuple[tuple[str, str], ...]
    squeeze: tuple[str, str] | None
    shortcut: tuple[str, str] | None


def blocks(net: Layers) -> tuple[list[str], tuple[str, str]]:
    """Names of the blocks and of the stem's two layers."""
    for pattern, stem in BLOCKS:
        if stem[0] not in net.shapes:
            continue
        found = net.matching(pattern)
        if len(found) > 4 and all(_has_depthwise(net, name) for name in found):
            return found, stem
    raise Mismatch("it has no depthwise blocks")


def _has_depthwise(net: Layers, name: str) -> bool:
    return any(len(net.shapes[key]) == 4 and net.shapes[key][1] == 1 for key in net.within(name))


def _is_depthwise(net: Layers, conv: str) -> bool:
    return net.size(conv)[1] == 1 and net.size(conv)[-1] > 1


def block(net: Layers, name: str) -> Inverted:
    """The layers of the block `name`."""
    inner = net.within(name)
    excite = [key for key in inner if any(f".{part}." in key for part in ("se", "fc1", "fc2"))]
    aside = [key for key in inner if ".shortcut." in key]
    main = [key for key in inner if key not in excite and key not in aside]
    excite = excite or [
        key for key in main if len(net.shapes[key]) == 4 and key in net.biased and ".se" in key
    ]
    convs = sorted((k for k in main if len(net.shapes[k]) == 4 and k not in excite), key=natural)
    norms = [key for key in main if len(net.shapes[key]) == 1]
    if len(convs) != len(norms) or len(convs) not in (2, 3):
        raise Mismatch(f"{name} is not an inverted residual block")
    # timm's names sort the depthwise convolution first, but it comes before the last one
    deep = [key for key in convs if _is_depthwise(net, key)]
    others = [key for key in convs if key not in deep]
    if len(deep) == 1:
        convs = [*others[:-1], *deep, *others[-1:]]
    pair = tuple(sorted(excite, key=natural))
    return Inverted(
        tuple(zip(convs, sorted(norms, key=natural), strict=True)),
        (pair[0], pair[1]) if len(pair) == 2 else None,
        (aside[0], aside[1]) if len(aside) == 2 else None,
    )


def runs(net: Layers) -> list[list[str]]:
    """The blocks in stages; consecutive blocks with equally many output channels form a stage."""
    stages: list[list[str]] = []
    last = 0
    for name in blocks(net)[0]:
        channels = net.shapes[block(net, name).units[-1][0]][0]
        stages = [*stages, [name]] if channels != last else [*stages[:-1], [*stages[-1], name]]
        last = channels
    return stages


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Possible values of "strides" (of the stages), "stem_stride" and "activation" ("relu6", "relu"
    or "swish"), the most likely first."""
    _, stem = blocks(net)
    count = len(runs(net))
    if count != 7:
        raise Mismatch(f"it has {count} stages of inverted residuals where seven are known")
    if stem[0] == "pre.0":
        return ({"strides": SEVEN["small"], "stem_stride": 1, "activation": "relu6"},)
    # kuangliu's names
    if stem[0] == "conv1":
        if any(block(net, name).squeeze for name in blocks(net)[0]):
            return ({"strides": SEVEN["imagenet"], "stem_stride": 1, "activation": "swish"},)
        return tuple(
            {"strides": strides, "stem_stride": 1, "activation": act}
            for act in ("relu", "relu6")
            for strides in (SEVEN["cifar"], SEVEN["imagenet"])
        )
    excited = any(block(net, name).squeeze for name in blocks(net)[0])
    if excited and stem[0] == "conv_stem":
        raise Mismatch("timm's EfficientNets differ in padding and in BatchNorm's epsilon")
    if excited:
        return ({"strides": SEVEN["imagenet"], "stem_stride": 2, "activation": "swish"},)
    activations = ("relu6",)
    if stem[0] == "conv_stem":
        # timm's MNASNet has 5x5 convolutions and ReLU, its MobileNetV2 neither
        activations = ("relu", "relu6") if _has_large(net) else ("relu6", "relu")
    strides = ((SEVEN["imagenet"], 2), (SEVEN["imagenet"], 1), (SEVEN["cifar"], 1))
    return tuple(
        {"strides": each, "stem_stride": first, "activation": act}
        for act in activations
        for each, first in strides
    )


def _has_large(net: Layers) -> bool:
    """Whether any convolution is larger than 3x3."""
    return any(len(shape) == 4 and shape[-1] > 3 for shape in net.shapes.values())


ACTIVATIONS = {"relu": nn.relu, "relu6": nn.relu6, "swish": nn.swish}


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    activate = ACTIVATIONS[form["activation"]]
    stem = blocks(net)[1]
    # weiaicunzai's stem pads its 1x1 convolution
    padding = 1 if stem[0] == "pre.0" else None
    x = activate(net.norm(stem[1], net.conv(stem[0], x, form["stem_stride"], padding)))
    for stage, stride in zip(runs(net), form["strides"], strict=True):
        for index, name in enumerate(stage):
            x = _apply_inverted(
                net, block(net, name), x, int(stride) if index == 0 else 1, activate
            )
    x = _last(net, x, activate)
    return _head(net, x)


def _apply_inverted(net: Layers, at: Inverted, x: Array, stride: int, activate: Any) -> Array:
    units, y = list(at.units), x
    if activate is nn.swish and len(units) == 3 and _same(net, units[0][0]):
        # in kuangliu's EfficientNet a block that does not expand has these layers but skips them
        net.unused(units[0][0])
        net.unused(units[0][1])
        units = units[1:]
    for index, (conv, norm) in enumerate(units):
        is_depthwise = _is_depthwise(net, conv)
        y = net.unit(conv, norm, y, stride if is_depthwise else 1, is_depthwise)
        y = activate(y) if index < len(units) - 1 else y
        if is_depthwise and at.squeeze:
            y = squeeze(net, at.squeeze, y, activate)
    if at.shortcut is not None:
        return y + net.unit(*at.shortcut, x)
    return y + x if stride == 1 and x.shape == y.shape else y


def _same(net: Layers, conv: str) -> bool:
    outputs, inputs, *sides = net.size(conv)
    return outputs == inputs and sides == [1, 1]


def _last(net: Layers, x: Array, activate: Any) -> Array:
    """Applies the 1x1 convolution after the blocks, if there is one."""
    names = [
        name
        for name, shape in net.shapes.items()
        if len(shape) == 4 and name not in net.used and shape[1] == x.shape[-1]
    ]
    norms = [name for name, shape in net.shapes.items() if len(shape) == 1 and name not in net.used]
    if not norms:
        return x
    if len(norms) != 1 or not names:
        raise Mismatch("what follows its blocks is not known")
    return activate(net.norm(norms[0], net.conv(sorted(names, key=natural)[0], x)))


def _head(net: Layers, x: Array) -> Array:
    left = [name for name, shape in net.shapes.items() if len(shape) == 4 and name not in net.used]
    if len(left) == 1:
        return net.conv(left[0], net.pool(x)[:, None, None])[:, 0, 0]
    return net.head(x)


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    return 224 if blocks(net)[1][0].startswith(("features", "conv_stem")) else 32


def title(net: Layers) -> str:
    """ "EfficientNet" or "MobileNetV2"."""
    excited = any(block(net, name).squeeze for name in blocks(net)[0])
    return "EfficientNet" if excited else "MobileNetV2"
