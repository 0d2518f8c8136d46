"""Recognises the family of architectures of a state_dict, and its possible forms, from names and
shapes."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbd.base import UserError
from jaxbd.models import build, families
from jaxbd.models.families import chain

PLAIN = "chain"
"""The family that accepts any names."""
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
NORM = {"running_mean", "running_var"}
UNKNOWN = {
    r"(.*\.)?(attn|attention|encoder\.layers?\.\d+\.self_attention|blocks\.\d+\.norm1)\.": (
        "a transformer (ViT, Swin)"
    ),
    r".*(layer_scale|dwconv\.|\.gamma$)": "ConvNeXt",
    r"Mixed_[567]|Conv2d_1a": "Inception",
    r"features\.\d+\.(\d+\.)?block\.": "MobileNetV3 or EfficientNet of torchvision",
    r"(blocks\.\d+\.\d+\.|conv_stem)": "EfficientNet or MobileNet of timm",
    r"features\.\d+\.squeeze": "SqueezeNet",
    r"inception\d[a-z]": "GoogLeNet of torchvision",
}
"""Pattern for the beginning of a name -> the net it indicates; such nets can only be read as
graphs."""


def table_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The layers of a state_dict in the notation of `models.families`; None if a tensor does not
    belong to a convolution, linear layer or BatchNorm."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if not module or leaf not in LEAVES:
            return None
        modules.setdefault(module, {})[leaf] = shape
    table = {}
    for module, leaves in modules.items():
        size = _size(leaves)
        if size is None:
            return None
        table[module] = size
    return table


def _size(leaves: dict[str, tuple[int, ...]]) -> str | None:
    """One layer's entry in the table, "64x3x7x7" or "64", with "+" for a bias or affine parameters;
    None if the tensors do not form a layer."""
    if leaves.keys() >= NORM:
        shape = leaves["running_mean"]
        affine = "weight" in leaves
        same = all(leaves[leaf] == shape for leaf in leaves if leaf != "num_batches_tracked")
        if len(shape) != 1 or not same or affine != ("bias" in leaves):
            return None
        return f"{shape[0]}{'+' * affine}"
    shape = leaves.get("weight", ())
    if len(shape) not in (2, 4) or leaves.keys() - {"weight", "bias"}:
        return None
    if leaves.get("bias", shape[:1]) != shape[:1]:
        return None
    return "x".join(map(str, shape)) + "+" * ("bias" in leaves)


def recognise(
    shapes: Mapping[str, tuple[int, ...]],
    arch: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[build.Spec, ...]:
    """The forms of the first family (or of `arch`) that has exactly these layers; empty if none
    does."""
    table = table_of(shapes)
    if table is None or not table:
        return ()
    key = tuple(table.items())
    names = list(families.FAMILIES) if arch is None else [arch]
    for name in names:
        found = _forms(name, key, image_shape)
        if found:
            return found
    return ()


@functools.lru_cache(maxsize=64)
def _forms(
    name: str, items: tuple[tuple[str, str], ...], image_shape: tuple[int, int, int] | None
) -> tuple[build.Spec, ...]:
    family, table = families.FAMILIES.get(name), dict(items)
    if family is None:
        return ()
    try:
        net = families.open_table(table)
        channels, side = _channels(net), family.side(net)
    except (UserError, IndexError, KeyError, ValueError, StopIteration):
        return ()
    try:
        forms = _list_forms(name, net, image_shape)
    except (families.Mismatch, IndexError, KeyError, ValueError, StopIteration):
        return ()
    classes = _classes(net)
    shape = image_shape or (side, side, channels)
    if shape[2] != channels:
        raise UserError(
            f"the model takes images of {channels} channels, not {shape[2]}; give matching images"
        )
    specs = [_spec(name, table, form, classes, shape, image_shape is None) for form in forms]
    while specs and not _fits(specs[0]):  # the likeliest form comes first and must be buildable
        specs.pop(0)
    return tuple(specs)


def _list_forms(
    name: str, net: families.Layers, image_shape: tuple[int, int, int] | None
) -> tuple[dict[str, Any], ...]:
    """The forms of a net; for a plain net those that take images of `image_shape`, if given."""
    if name != PLAIN or image_shape is None:
        return families.FAMILIES[name].forms(net)
    usual = chain.forms(net)
    try:
        return chain.forms(net, image_shape[:2])
    except families.Mismatch:
        sides = ", ".join(str(side) for side in dict.fromkeys(form["side"] for form in usual))
        raise UserError(
            f"the model takes no images of {image_shape[0]}x{image_shape[1]}, but of side {sides};"
            " resize the images"
        ) from None


def _spec(
    name: str,
    table: dict[str, str],
    form: dict[str, Any],
    classes: int,
    shape: tuple[int, int, int],
    may_resize: bool,
) -> build.Spec:
    """The spec of one form. A form may state the side of its images, used if `may_resize`."""
    form = dict(form)
    side = form.pop("side", None)
    if side is not None and may_resize:
        shape = (side, side, shape[2])
    return build.Spec(
        arch=name, classes=classes, image_shape=shape, options={"layers": table, **form}
    )


def _fits(spec: build.Spec) -> bool:
    """Whether the net can be built from exactly these layers. It is traced, not computed."""
    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    try:
        module = build.module(spec)
        jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), images)
    except (UserError, ZeroDivisionError, TypeError, ValueError):
        return False
    return True


def _channels(net: families.Layers) -> int:
    """Channels of the images: the input channels (1 or 3) of the first convolution that can be at
    the start; 3 if there is none."""
    convs = {name: shape for name, shape in net.shapes.items() if len(shape) == 4}
    few = [shape[1] for name, shape in convs.items() if shape[1] in (1, 3) and _is_first(name)]
    return few[0] if few else 3


def _is_first(name: str) -> bool:
    return re.search(r"(^|\.)(conv|features|stem|pre|init|base|layer|block|0)", name) is not None


def _classes(net: families.Layers) -> int:
    linear = [shape for shape in net.shapes.values() if len(shape) == 2]
    convs = [shape for shape in net.shapes.values() if len(shape) == 4]
    return linear[-1][0] if linear else convs[-1][0]


def hint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What an unknown net seems to be, for an error message; "" if there is no clue."""
    for pattern, title in UNKNOWN.items():
        if any(re.match(pattern, name) for name in shapes):
            return title
    return ""
