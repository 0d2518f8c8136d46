"""Residual nets of any depth and width: ResNet, ResNeXt, RegNet, SENet, PreActResNet, WideResNet.

He et al. 2016a and 2016b, Xie et al. 2017, Radosavovic et al. 2020, Hu et al. 2018, Zagoruyko and
Komodakis 2016; with the layer names of torchvision, kuangliu/pytorch-cifar,
akamaster/pytorch_resnet_cifar10, weiaicunzai/pytorch-cifar100, meliketoy/wide-resnet.pytorch and
xternalz/WideResNet-pytorch.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxbd.base import Array
from jaxbd.models.families.layers import Layers, Mismatch, max_pool, natural, squeeze

STAGES = (
    r"(layer\d+)\.\d+",
    r"(conv\d+_x)\.\d+",
    r"(block\d+)\.layer\.\d+",
    r"(stage\d+)\.\d+",
    r"(conv[2-9])\.\d+",
    r"(layers\.\d+)\.\d+",
    r"(stages\.\d+)\.\d+",
    r"(group\d+)\.(?:block)?\d+",
    r"(stage_\d+)\.\d+",
    r"(features\.stage\d+)\.(?:unit)?\d+",
)
"""Name patterns of the blocks; the group in brackets is the stage."""
STEMS = (
    ("conv1", "bn1"),
    ("conv1.0", "conv1.1"),
    ("pre.0", "pre.1"),
    ("init_conv", "init_bn"),
    ("conv", "bn"),
    ("stem.0", "stem.1"),
    ("stem.conv", "stem.bn"),
    ("conv0", "bn0"),
    ("conv_1_3x3", "bn_1"),
    ("features.init_block.conv.conv", "features.init_block.conv.bn"),
)
SHORTCUTS = (
    ("shortcut.0", "shortcut.1"),
    ("downsample.0", "downsample.1"),
    ("downsample.1", "downsample.2"),
    ("convShortcut", "bnShortcut"),
    ("shortcut", "shortcut_bn"),
    ("shortcut.conv", "shortcut.bn"),
    ("shortcut.shortcut_conv", "shortcut.shortcut_bn"),
    ("skip.0", "skip.1"),
    ("downsample.conv", "downsample.bn"),
)
SQUEEZES = (
    ("fc1", "fc2"),
    ("se.se1", "se.se2"),
    ("se.fc1", "se.fc2"),
    ("se.fc.0", "se.fc.2"),
    ("squeeze.0", "squeeze.2"),
    ("excitation.0", "excitation.2"),
)

NUMBERED = re.compile(r"([a-z_]+\.)?(conv_?|bn_?|norm_?|bn)?\d+(_\d+x\d+|\.(conv|bn))?")


class Block(NamedTuple):
    """The layers of one block: convolutions and norms in order, shortcut (convolution, norm), and
    the two layers of squeeze-and-excitation."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    shortcut: tuple[str | None, str | None]
    squeeze: tuple[str, str] | None


def stages(net: Layers) -> list[list[str]]:
    """Names of the blocks, stage by stage. Raises Mismatch when there are none."""
    for pattern in STAGES:
        found: dict[str, list[str]] = {}
        for name in net.matching(pattern):
            match = re.match(pattern, name)
            convs = [key for key in net.within(name) if len(net.shapes[key]) == 4]
            if match is not None and len(convs) >= 2:
                found.setdefault(match[1], []).append(name)
        if found:
            return [found[stage] for stage in sorted(found, key=natural)]
    raise Mismatch("it has no blocks in stages")


def block(net: Layers, name: str) -> Block:
    """The layers of the block `name`."""
    inner = {key[len(name) + 1 :]: key for key in net.within(name)}
    for pair in SHORTCUTS:
        if pair[0] in inner and len(net.shapes[inner[pair[0]]]) == 4:
            shortcut = (inner.pop(pair[0]), inner.pop(pair[1], None))
            break
    else:
        shortcut = (None, None)
    pair = next((pair for pair in SQUEEZES if pair[0] in inner and pair[1] in inner), None)
    excited = None if pair is None else (inner.pop(pair[0]), inner.pop(pair[1]))
    # layers are ordered by number, so a name without a known number cannot be placed
    if not all(NUMBERED.fullmatch(part) for part in inner):
        raise Mismatch(f"{name} has layers that are not numbered")
    convs = tuple(key for key in inner.values() if len(net.shapes[key]) == 4)
    norms = tuple(key for key in inner.values() if len(net.shapes[key]) == 1)
    if len(convs) not in (2, 3) or len(norms) != len(convs):
        raise Mismatch(f"{name} is not a residual block")
    return Block(convs, norms, shortcut, excited)


def is_preactivated(net: Layers) -> bool:
    """Whether BatchNorm comes before each convolution, judged by its size, which is then the number
    of the convolution's input channels."""
    before = after = 0
    for name in [name for stage in stages(net) for name in stage]:
        found = block(net, name)
        channels = net.shapes[found.norms[0]][0]
        outputs, inputs = net.shapes[found.convs[0]][:2]
        # a block votes only if its input and output widths differ
        before += channels == inputs and channels != outputs
        after += channels == outputs and channels != inputs
    return before > after


def forms(net: Layers) -> tuple[dict[str, Any], ...]:
    """Possible values of what the weights do not determine, the most likely first.

    "pool": max-pooling after the stem; "stem_stride"; "strides" of the stages; "late": the second
    convolution has the stride (in a bottleneck, the 1x1 before the 3x3); "raw": the shortcut of a
    pre-activated block starts from the input; "pad": where channels of zeros are added.
    """
    found = stages(net)
    blocks = [block(net, name) for stage in found for name in stage]
    stem = next((conv for conv, _ in STEMS if conv in net.shapes), None)
    side = net.shapes[stem][-1] if stem else 3
    preactivated = is_preactivated(net)
    strides = "1" + "2" * (len(found) - 1)
    base = {"strides": strides, "stem_stride": 2 if side == 7 else 1, "pool": side == 7}
    choices: list[dict[str, Any]] = [base]
    # the weights do not show whether pooling follows a 3x3 stem
    if side == 3 and len(found) == 4 and not preactivated and net.has("fc"):
        choices.append({**base, "pool": True})
        choices.append({**base, "pool": True, "stem_stride": 2})
    if side == 5:
        choices = [{**base, "stem_stride": 2}, base]
    if _is_wide_inside(net, blocks) and side == 3:
        regnet = {**base, "strides": "11" + strides[2:]}
        choices = [regnet, base] if _is_regnet(net, blocks) else [*choices, regnet]
    if preactivated:
        biased = blocks[0].convs[0] in net.biased
        sequence = ".residual." in blocks[0].convs[0]
        late = biased and not sequence and len(blocks[0].convs) == 2
        wide = [{"raw": biased, "late": late}, {"raw": not biased, "late": late}]
        choices = [{**each, **more} for each in choices for more in wide]
    if len(blocks[0].convs) == 3 and preactivated and blocks[0].convs[0] in net.biased:
        choices = [{**each, "late": True} for each in choices]
    elif len(blocks[0].convs) == 3 and not preactivated and side == 7:
        choices = [*choices, {**choices[0], "late": True}]
    if any(_widens(net, each) and each.shortcut[0] is None for each in blocks):
        choices = [{**each, "pad": pad} for each in choices for pad in ("both", "end")]
    return tuple(choices)


def _is_regnet(net: Layers, blocks: list[Block]) -> bool:
    """Whether it is a RegNet: those read here are kuangliu's, with a 3x3 stem and no `fc`.
    torchvision's resnext101_32x8d has such wide bottlenecks too."""
    stem = next((conv for conv, _ in STEMS if conv in net.shapes), None)
    small = stem is None or net.shapes[stem][-1] == 3
    return small and not net.has("fc") and _is_wide_inside(net, blocks)


def _is_wide_inside(net: Layers, blocks: list[Block]) -> bool:
    """Whether the bottlenecks are not narrower inside."""
    last = blocks[-1]
    return len(last.convs) == 3 and net.shapes[last.convs[0]][0] == net.shapes[last.convs[2]][0]


def _widens(net: Layers, found: Block) -> bool:
    outputs = net.shapes[found.convs[-1]][0]
    return len(found.convs) == 2 and net.shapes[found.convs[0]][1] != outputs


def forward(net: Layers, x: Array, form: dict[str, Any]) -> Array:
    """Images [B, H, W, C], already normalised -> logits [B, K]."""
    preactivated, found = is_preactivated(net), stages(net)
    x = _stem(net, x, form, preactivated)
    for stage, stride in zip(found, form["strides"], strict=True):
        for index, name in enumerate(stage):
            step = int(stride) if index == 0 else 1
            apply = _apply_preactivated if preactivated else _apply_postactivated
            x = apply(net, block(net, name), x, step, form)
    if preactivated:
        last = [
            name
            for name, shape in net.shapes.items()
            if shape == (x.shape[-1],) and name not in net.used and name.count(".") <= 1
        ]
        x = nn.relu(net.norm(last[0], x)) if last else x
    return net.head(x)


def _stem(net: Layers, x: Array, form: dict[str, Any], preactivated: bool) -> Array:
    stem = next((pair for pair in STEMS if pair[0] in net.shapes), None)
    if stem is None or net.size(stem[0])[-1] not in (1, 3, 5, 7):
        raise Mismatch("it has no first convolution of a known size")
    conv, norm = stem
    x = net.conv(conv, x, form["stem_stride"])
    # in a pre-activated net `bn1` may be the last norm, which is wider
    if norm in net.shapes and net.shapes[norm] == (x.shape[-1],) and not _is_last(net, norm):
        x = nn.relu(net.norm(norm, x))
    elif not preactivated and norm in net.shapes:
        raise Mismatch(f"{norm} does not follow {conv}")
    return max_pool(x, 3, 2, 1) if form["pool"] else x


def _is_last(net: Layers, norm: str) -> bool:
    """Whether a top-level norm is the one before the head. WideResNets have one there, which in a
    net of factor 1 and one stage could be as wide as the stem."""
    linear = [shape for shape in net.shapes.values() if len(shape) == 2]
    return len(linear) == 1 and net.shapes[norm][0] == linear[0][1] and is_preactivated(net)


def _apply_postactivated(
    net: Layers, at: Block, x: Array, stride: int, form: dict[str, Any]
) -> Array:
    """Applies conv, norm, ReLU, …, norm; adds the shortcut; applies ReLU."""
    y = x
    bearer = _bearer(at, form)
    for index, (conv, norm) in enumerate(zip(at.convs, at.norms, strict=True)):
        y = net.unit(conv, norm, y, stride if index == bearer else 1, _may_group(at, index))
        if index < len(at.convs) - 1:
            y = nn.relu(y)
        if at.squeeze and index == _find_excitation(net, at):
            # weiaicunzai's blocks have another ReLU before the excitation
            y = nn.relu(y) if ".excitation." in at.squeeze[0] else y
            y = squeeze(net, at.squeeze, y, nn.relu)
    return nn.relu(y + _shortcut(net, at, x, y, stride, form))


def _find_excitation(net: Layers, at: Block) -> int:
    """Index of the convolution before squeeze-and-excitation. In a bottleneck it is the second if
    the excitation is as wide as that one (RegNet), else the last."""
    outputs = [net.size(conv)[0] for conv in at.convs]
    wide = net.size((at.squeeze or ("", ""))[1])[0]
    return 1 if len(outputs) == 2 or outputs[1] == wide else 2


def _apply_preactivated(
    net: Layers, at: Block, x: Array, stride: int, form: dict[str, Any]
) -> Array:
    """Applies norm, ReLU, conv, …; adds the shortcut."""
    y = activated = nn.relu(net.norm(at.norms[0], x))
    bearer = _bearer(at, form)
    for index, conv in enumerate(at.convs):
        y = y if index == 0 else nn.relu(net.norm(at.norms[index], y))
        y = net.unit(conv, None, y, stride if index == bearer else 1, _may_group(at, index))
    if at.squeeze:
        y = squeeze(net, at.squeeze, y, nn.relu)
    start = x if form.get("raw") or at.shortcut[0] is None else activated
    return y + _shortcut(net, at, start, y, stride, form)


def _may_group(at: Block, index: int) -> bool:
    """Whether a convolution may have groups: the second of a bottleneck, as in ResNeXt."""
    return len(at.convs) == 3 and index == 1


def _bearer(at: Block, form: dict[str, Any]) -> int:
    """Index of the block's convolution that has the stride."""
    late = bool(form.get("late"))
    return int(late) if len(at.convs) == 2 else int(not late)


def _shortcut(net: Layers, at: Block, x: Array, like: Array, stride: int, form: Any) -> Array:
    conv, norm = at.shortcut
    if conv is not None:
        # "downsample.1" shows that pooling comes first and takes the place of "downsample.0"
        pooled = conv.endswith("downsample.1") and stride > 1
        if pooled:
            x, stride = nn.avg_pool(x, (2, 2), (2, 2)), 1
        return net.unit(conv, norm, x, stride)
    if stride > 1:
        x = x[:, ::stride, ::stride]
    more = like.shape[-1] - x.shape[-1]
    if more < 0 or x.shape[1:3] != like.shape[1:3]:
        raise Mismatch("a block has no shortcut where its shape changes")
    if more:
        # He et al. 2016a, option A: no weights, zeros for the new channels
        before = more // 2 if form.get("pad") == "both" else 0
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, more - before)))
    return x


def side(net: Layers) -> int:
    """Typical side of the images for such a net, in pixels."""
    stem = next((conv for conv, _ in STEMS if conv in net.shapes), None)
    return {7: 224, 5: 64}.get(net.shapes[stem][-1] if stem else 3, 32)


def title(net: Layers) -> str:
    """The net's usual name, for example "ResNet-50" or "WRN-16-4"."""
    found = stages(net)
    blocks = [block(net, name) for stage in found for name in stage]
    convs = sum(len(each.convs) for each in blocks) + 2
    if is_preactivated(net) and len(found) == 3 and len(blocks[0].convs) == 2:
        stem = next(net.shapes[conv][0] for conv, _ in STEMS if conv in net.shapes)
        return f"WRN-{convs + 2}-{net.shapes[blocks[0].convs[0]][0] // stem}"
    kind = "PreActResNet" if is_preactivated(net) else "ResNet"
    if blocks[0].squeeze:
        kind = "SENet"
    grouped = len(blocks[0].convs) == 3 and (
        net.shapes[blocks[0].convs[1]][1] != net.shapes[blocks[0].convs[0]][0]
    )
    if grouped:
        kind = "RegNet" if _is_regnet(net, blocks) else "ResNeXt"
    return f"{kind}-{convs}"
