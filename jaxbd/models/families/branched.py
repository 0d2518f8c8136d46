"""Nets of kuangliu/pytorch-cifar whose blocks branch: GoogLeNet (Szegedy et al. 2015), DPN (Chen et
al. 2017), DLA (Yu et al. 2018), ShuffleNet v1 and v2 (Zhang et al. 2018, Ma et al. 2018), PNASNet
(Liu et al. 2018)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.families.layers import (
    Layers,
    Mismatch,
    avg_pool,
    max_pool,
    shuffle,
)

INCEPTIONS = (("a3", "b3"), ("a4", "b4", "c4", "d4", "e4"), ("a5", "b5"))


def kind(net: Layers) -> str:
    """Identifies the net. Raises Mismatch when it is none of the branched nets."""
    if net.has("pre_layers.0") and net.has("a3.b1.0"):
        return "GoogLeNet"
    if net.has("base.0") and net.has("layer3.root.conv"):
        return "SimpleDLA" if net.has("layer3.left_tree") else "DLA"
    if net.has("layer1.0.sep_conv1.conv1") and net.has("layer2.sep_conv1.conv1"):
        return "PNASNet"
    if net.has("layer1.0.conv5"):
        return "ShuffleNetV2"
    if net.has("layer1.0.conv3") and net.has("layer3.0") and not net.has("layer4"):
        depthwise = net.size("layer1.0.conv2")[1] == 1
        if depthwise and net.size("layer1.1.conv1")[1] < net.size("layer1.0.conv3")[0] * 2:
            return "ShuffleNet"
    has_blocks = net.has("layer4.0.shortcut.0") and net.has("layer1.0.conv3") and net.has("linear")
    if has_blocks and net.size("layer1.1.conv1")[1] != net.size("layer1.0.conv3")[0]:
        return "DPN"
    raise Mismatch("it is none of the branched nets")


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Only the repository's form, whose strides `forward` knows."""
    kind(net)
    return ({},)


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    del form
    nets = {
        "GoogLeNet": _googlenet,
        "DLA": _dla,
        "SimpleDLA": _dla,
        "PNASNet": _pnasnet,
        "ShuffleNetV2": _shufflenet2,
        "ShuffleNet": _shufflenet,
        "DPN": _dpn,
    }
    return nets[kind(net)](net, x)


def _sequence(net: Layers, name: str, x: Array) -> Array:
    """Applies conv, norm, ReLU repeatedly, in the order of the names."""
    inner = net.within(name)
    for conv, norm in zip(inner[::2], inner[1::2], strict=True):
        x = nn.relu(net.unit(conv, norm, x))
    return x


def _googlenet(net: Layers, x: Array) -> Array:
    x = _sequence(net, "pre_layers", x)
    for stage, names in enumerate(INCEPTIONS):
        x = max_pool(x, 3, 2, 1) if stage else x
        for name in names:
            parts = [_sequence(net, f"{name}.b{branch}", x) for branch in (1, 2, 3)]
            parts.append(_sequence(net, f"{name}.b4", max_pool(x, 3, 1, 1)))
            x = jnp.concatenate(parts, -1)
    return net.head(x)


def _basic(net: Layers, name: str, x: Array, stride: int) -> Array:
    y = nn.relu(net.unit(f"{name}.conv1", f"{name}.bn1", x, stride))
    y = net.unit(f"{name}.conv2", f"{name}.bn2", y)
    if net.has(f"{name}.shortcut.0"):
        x = net.unit(f"{name}.shortcut.0", f"{name}.shortcut.1", x, stride)
    return nn.relu(x + y)


def _dla(net: Layers, x: Array) -> Array:
    for name in ("base", "layer1", "layer2"):
        x = _sequence(net, name, x)
    tree = _simple_tree if net.has("layer3.left_tree") else _tree
    for name, stride in (("layer3", 1), ("layer4", 2), ("layer5", 2), ("layer6", 2)):
        x = tree(net, name, x, stride)
    return net.head(x)


def _root(net: Layers, name: str, parts: list[Array]) -> Array:
    return nn.relu(net.unit(f"{name}.root.conv", f"{name}.root.bn", jnp.concatenate(parts, -1)))


def _simple_tree(net: Layers, name: str, x: Array, stride: int) -> Array:
    inner = _simple_tree if net.has(f"{name}.left_tree.root") else _basic
    left = inner(net, f"{name}.left_tree", x, stride)
    return _root(net, name, [left, inner(net, f"{name}.right_tree", left, 1)])


def _tree(net: Layers, name: str, x: Array, stride: int) -> Array:
    parts = []
    if net.has(f"{name}.prev_root"):
        parts.append(_basic(net, f"{name}.prev_root", x, stride))
    for level in reversed(net.matching(rf"{name}\.level_\d+")):
        x = _tree(net, level, x, stride)
        parts.append(x)
    # the previous root or a subtree has already applied the stride
    x = _basic(net, f"{name}.left_node", x, 1 if parts else stride)
    parts.append(x)
    parts.append(_basic(net, f"{name}.right_node", x, 1))
    return _root(net, name, parts)


def _dpn(net: Layers, x: Array) -> Array:
    x = nn.relu(net.unit("conv1", "bn1", x))
    for stage in net.matching(r"layer\d+"):
        for index, name in enumerate(net.children(stage)):
            x = _dual(net, name, x, 2 if stage != "layer1" and index == 0 else 1)
    return net.head(x)


def _dual(net: Layers, name: str, x: Array, stride: int) -> Array:
    """A dual path block: the first d channels are added, the others concatenated."""
    y = nn.relu(net.unit(f"{name}.conv1", f"{name}.bn1", x))
    y = nn.relu(net.unit(f"{name}.conv2", f"{name}.bn2", y, stride, grouped=True))
    y = net.unit(f"{name}.conv3", f"{name}.bn3", y)
    stage = name.rpartition(".")[0]
    if net.has(f"{name}.shortcut.0"):
        x = net.unit(f"{name}.shortcut.0", f"{name}.shortcut.1", x, stride)
    blocks = net.children(stage)
    # every block widens a stage by the same amount; the other channels of its output are added
    widths = [net.size(f"{each}.conv1")[1] for each in blocks]
    outputs = net.size(f"{blocks[0]}.conv3")[0]
    grown = widths[1] - outputs if len(blocks) > 1 else 0
    added = outputs - grown
    parts = [x[..., :added] + y[..., :added], x[..., added:], y[..., added:]]
    return nn.relu(jnp.concatenate(parts, -1))


def _shufflenet(net: Layers, x: Array) -> Array:
    x = nn.relu(net.unit("conv1", "bn1", x))
    for stage in net.matching(r"layer\d+"):
        for index, name in enumerate(net.children(stage)):
            x = _apply_shuffle_unit(net, name, x, 2 if index == 0 else 1)
    return net.head(x)


def _apply_shuffle_unit(net: Layers, name: str, x: Array, stride: int) -> Array:
    groups = x.shape[-1] // net.size(f"{name}.conv1")[1]
    unit = lambda number, value, stride=1: net.unit(
        f"{name}.conv{number}", f"{name}.bn{number}", value, stride, grouped=True
    )
    y = nn.relu(unit(1, x))
    y = nn.relu(unit(2, shuffle(y, groups), stride))
    y = unit(3, y)
    if stride == 2:
        return nn.relu(jnp.concatenate([y, avg_pool(x, 3, 2, 1)], -1))
    return nn.relu(y + x)


def _shufflenet2(net: Layers, x: Array) -> Array:
    x = nn.relu(net.unit("conv1", "bn1", x))
    for stage in net.matching(r"layer\d+"):
        for name in net.children(stage):
            x = _down(net, name, x) if net.has(f"{name}.conv5") else _half(net, name, x)
    return net.head(nn.relu(net.unit("conv2", "bn2", x)))


def _half(net: Layers, name: str, x: Array) -> Array:
    # half of the channels pass through unchanged
    still, y = jnp.split(x, 2, -1)
    y = nn.relu(net.unit(f"{name}.conv1", f"{name}.bn1", y))
    y = net.unit(f"{name}.conv2", f"{name}.bn2", y, grouped=True)
    y = nn.relu(net.unit(f"{name}.conv3", f"{name}.bn3", y))
    return shuffle(jnp.concatenate([still, y], -1), 2)


def _down(net: Layers, name: str, x: Array) -> Array:
    unit = lambda number, value, stride=1: net.unit(
        f"{name}.conv{number}", f"{name}.bn{number}", value, stride, grouped=number in (1, 4)
    )
    left = nn.relu(unit(2, unit(1, x, 2)))
    right = nn.relu(unit(5, unit(4, nn.relu(unit(3, x)), 2)))
    return shuffle(jnp.concatenate([left, right], -1), 2)


def _pnasnet(net: Layers, x: Array) -> Array:
    x = nn.relu(net.unit("conv1", "bn1", x))
    for stage in net.matching(r"layer\d+"):
        cells = net.children(stage)
        # a stage without children is itself one cell that halves the image
        for name in cells or [stage]:
            x = _cell(net, name, x, 1 if cells else 2)
    return net.head(x)


def _cell(net: Layers, name: str, x: Array, stride: int) -> Array:
    separable = lambda number: net.unit(
        f"{name}.sep_conv{number}.conv1", f"{name}.sep_conv{number}.bn1", x, stride, grouped=True
    )
    pooled = max_pool(x, 3, stride, 1)
    if net.has(f"{name}.conv1"):
        pooled = net.unit(f"{name}.conv1", f"{name}.bn1", pooled)
    if not net.has(f"{name}.conv2"):
        return nn.relu(separable(1) + pooled)
    both = [nn.relu(separable(1) + separable(2)), nn.relu(pooled + separable(3))]
    return nn.relu(net.unit(f"{name}.conv2", f"{name}.bn2", jnp.concatenate(both, -1)))


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    return 32


def title(net: Layers) -> str:
    """The net's name in the repository."""
    return kind(net)
