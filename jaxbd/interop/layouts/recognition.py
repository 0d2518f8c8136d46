"""Which architecture a PyTorch state_dict holds, from the names and shapes of its tensors."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbd.base import UserError
from jaxbd.interop.layouts.convert import check, few
from jaxbd.interop.layouts.naming import COUNTER, Layout, lay_out, namings, translate
from jaxbd.models import build, resnet

FIRST = {"cnn": "conv0", "vgg": "conv0_0"}
"""The first convolution where it is not called conv1: it tells width, channels and stem."""

CLOSE = 0.5
"""Share of common names from which a file counts as an attempt at an architecture, so that differences are listed."""


def recognise(
    tensors: Mapping[str, np.ndarray], *, arch: str | None = None, image_shape: tuple[int, int, int] | None = None
) -> Layout:
    """The layout of a state_dict, from its names and shapes.

    Args:
      tensors: name -> array of the whole state_dict.
      arch: the architecture to hold the file against; found from the names otherwise.
      image_shape: (H, W, C) of the images the net is for. Otherwise C comes from the first convolution and the side
        from the classifier's width (small VGG) or the stem: 32 for CIFAR's, 224 for ImageNet's.
    Raises: UserError when no architecture fits, listing missing, extra and mis-shaped tensors of the nearest one, or
      when the images have other channels than the net.
    """
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise UserError(f"the file's tensors {few(empty)} are empty; save the model again")
    arch, naming = _nearest(shapes, arch)
    layout = lay_out(_spec(arch, naming, shapes, image_shape), naming)
    check(tensors, layout)
    return layout


def _nearest(shapes: Mapping[str, tuple[int, ...]], arch: str | None) -> tuple[str, str]:
    """The architecture and naming whose tensor names are most like those of `shapes`; exactly alike wherever one is."""
    if arch is not None and arch not in build.MODULES:
        raise UserError(f"unknown architecture {arch!r}; known: {', '.join(sorted(build.MODULES))}")
    names = {name for name in shapes if not name.endswith(f".{COUNTER}")}
    best, best_share = None, -1.0
    for candidate in sorted(build.MODULES) if arch is None else [arch]:
        for naming in namings(candidate):
            known = _known_names(candidate, naming, _stages(candidate, shapes))
            share = len(names & known) / len(names | known)
            if share > best_share:
                best, best_share = (candidate, naming), share
    if arch is None and best_share < CLOSE:
        example = f"; its tensors are {few(list(shapes))}" if shapes else ""
        raise UserError(f"no known architecture has this file's tensors{example}; known: {', '.join(build.MODULES)}")
    return best


@functools.lru_cache(maxsize=64)
def _known_names(arch: str, naming: str, stages: int | None) -> frozenset[str]:
    """Names of the tensors of `arch`; they do not depend on its width, stem, classes or images."""
    options = {} if stages is None else {"stages": stages}
    spec = build.Spec(arch=arch, classes=2, image_shape=(32, 32, 3), options=options)
    return frozenset(lay_out(spec, naming).names.values())


def _spec(
    arch: str, naming: str, shapes: Mapping[str, tuple[int, ...]], image_shape: tuple[int, int, int] | None
) -> build.Spec:
    """The spec of `arch` with classes, channels and options read off the tensors; what cannot be read gets a default.

    A default stands in only where a tensor is missing or mis-shaped, which `check` then reports.
    """
    first = shapes.get(translate(FIRST.get(arch, "conv1"), naming) + ".weight", ())
    head = shapes.get(translate("head", naming) + ".weight", ())
    width, channels, kernel = first[:3] if len(first) == 4 else (8, 3, 3)
    classes, features = head if len(head) == 2 else (2, 0)
    options: dict[str, Any] = {"width": width}
    if arch in ("resnet18", "resnet34"):
        options["stem"] = {side: stem for stem, (side, _, _) in resnet.STEMS.items()}.get(kernel, "cifar")
    if arch == "cnn":
        options["stages"] = _stages(arch, shapes)
    side = {"imagenet": 224, "64px": 64}.get(options.get("stem"), 32)
    if arch == "vgg" and features:
        side = _vgg_side(features // (4 * width), image_shape)
    image_shape = (side, side, channels) if image_shape is None else tuple(image_shape)
    if image_shape[-1] != channels:
        raise UserError(f"the model takes images of {channels} channels, not {image_shape[-1]}; give matching images")
    return build.Spec(arch=arch, classes=classes, image_shape=image_shape, options=options)


def _vgg_side(places: int, image_shape: tuple[int, int, int] | None) -> int:
    """Side of the square images of which the small VGG's pooling, by 8, leaves `places` places.

    Raises: UserError when images of `image_shape` leave another number.
    """
    side = max(8, 8 * math.isqrt(places))
    if image_shape is not None and (image_shape[0] // 8) * (image_shape[1] // 8) != places:
        raise UserError(
            f"the model was made for {side}x{side} images, not {image_shape[0]}x{image_shape[1]}; resize the images"
        )
    return side


def _stages(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many stages a file has of the small CNN, at least 1; None for architectures of fixed depth."""
    if arch != "cnn":
        return None
    return min(8, max(1, sum(re.fullmatch(r"conv\d+\.weight", name) is not None for name in shapes)))
