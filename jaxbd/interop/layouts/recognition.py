"""Recognises the architecture of a PyTorch state_dict from the names and shapes of its tensors."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from jaxbd.base import UserError
from jaxbd.interop.layouts import families
from jaxbd.interop.layouts.convert import check, few, torch_shape
from jaxbd.interop.layouts.naming import (
    AS_IT_IS,
    COUNTER,
    Layout,
    lay_out,
    lay_out_function,
    namings,
    translate,
)
from jaxbd.models import build, own

FIRST = {"cnn": "conv0", "vgg": "conv0_0"}
"""Name of the first convolution, if it is not conv1. Its shape gives width, channels and stem."""

CLOSE = 0.5
"""Minimum share of common names for a file to count as a damaged or modified version of an
architecture, so that the error message lists the differences."""


def recognise(
    tensors: Mapping[str, np.ndarray],
    *,
    arch: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    exact: bool = False,
) -> Layout:
    """The layout of a state_dict, from its names and shapes.

    Args:
      tensors: name -> array of the whole state_dict.
      arch: the architecture to compare the file with; recognised from the names if None.
      image_shape: (H, W, C) of the images that the net takes. If None, C comes from the first
        convolution, and the side from the classifier's width (small VGG) or the stem: 32 for
        CIFAR's, 64 for the 64-pixel one, 224 for ImageNet's.
      exact: do not search for the nearest architecture, which is slow, if none has exactly these
        names.
    Raises: UserError when no architecture fits, listing missing, extra and mis-shaped tensors of
      the nearest one, or when the images have other channels than the net.
    """
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise UserError(f"the file's tensors {few(empty)} are empty; save the model again")
    if arch is not None and own.is_own(arch):
        layout = _own_layout(arch, shapes, image_shape)
    elif (forms := _as_family(shapes, arch, image_shape)) and not _is_known(shapes, arch):
        layout = lay_out(forms[0], "plain")._replace(forms=forms)
    else:
        name, naming = _nearest(shapes, arch, exact)
        spec = _spec(name, naming, shapes, image_shape)
        layout = _lay_out_known(spec, naming)._replace(forms=_known_forms(spec))
    check(tensors, layout)
    return layout


def _own_layout(
    arch: str, shapes: Mapping[str, tuple[int, ...]], image_shape: tuple[int, int, int] | None
) -> Layout:
    """The layout of the user's own architecture, with the names of its modules."""
    if image_shape is None:
        raise UserError(f"--arch {arch} is your own; give the images' size with --image-shape")
    height, width, channels = image_shape
    # the number of classes is known only after the net has been traced
    spec = build.Spec(arch=arch, classes=1, image_shape=(height, width, channels))
    is_function = own.is_function(arch)
    layout = lay_out_function(spec, shapes) if is_function else lay_out(spec, "plain")
    abstract = {
        path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in layout.shapes.items()
    }
    variables = {"params": {}, "batch_stats": {}}
    if layout.naming == AS_IT_IS:
        for path, leaf in abstract.items():
            collection, _, name = path.partition("/")
            variables[collection][name] = leaf
    else:
        variables |= flax.traverse_util.unflatten_dict(abstract, sep="/")
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    try:
        logits = jax.eval_shape(lambda v, x: build.net(spec).apply(v, x)[0], variables, images)
    except Exception as error:  # the user's code can raise anything
        why = str(error).partition("\n")[0]
        raise UserError(
            f"--arch {arch} does not take the file's tensors: {type(error).__name__}: {why}"
        ) from None
    if logits.ndim != 2:
        raise UserError(f"--arch {arch} returns {logits.ndim} axes; it must return logits [B, K]")
    return layout._replace(spec=dataclasses.replace(spec, classes=logits.shape[-1]))


def _as_family(
    shapes: Mapping[str, tuple[int, ...]],
    arch: str | None,
    image_shape: tuple[int, int, int] | None,
) -> tuple[build.Spec, ...]:
    if arch is not None and arch not in build.families.FAMILIES:
        return ()
    if arch is None and _is_known(shapes, None):
        return ()
    return families.recognise(shapes, arch, image_shape)


def _is_known(shapes: Mapping[str, tuple[int, ...]], arch: str | None) -> bool:
    """Whether names and shapes are exactly those of a fixed architecture (one of `build.MODULES`,
    not of a family)."""
    exact = None if arch in build.families.FAMILIES else _find_exact(shapes, arch)
    if exact is None:
        return False
    layout = _lay_out_known(_spec(*exact, shapes, None), exact[1])
    return all(
        shapes[name] == torch_shape(layout.shapes[path]) for path, name in layout.names.items()
    )


def _find_exact(shapes: Mapping[str, tuple[int, ...]], arch: str | None) -> tuple[str, str] | None:
    """The architecture and naming scheme with exactly the tensor names of `shapes`, or None."""
    names = {name for name in shapes if not name.endswith(f".{COUNTER}")}
    for candidate in sorted(build.MODULES) if arch is None else [arch]:
        for naming in namings(candidate):
            # look for two names first: tracing the net to get all of them is slow
            if names.issuperset(_ends(candidate, naming)) and (
                names == _known_names(candidate, naming, _stages(candidate, shapes))
            ):
                return candidate, naming
    return None


def _ends(arch: str, naming: str) -> tuple[str, str]:
    """Names of the weights of the first and the last layer."""
    first, last = (translate(end, naming) for end in (FIRST.get(arch, "conv1"), "head"))
    return f"{first}.weight", f"{last}.weight"


def _lay_out_known(spec: build.Spec, naming: str) -> Layout:
    """`lay_out` for a fixed architecture, cached; possible because its options are hashable."""
    return _trace(spec.arch, naming, spec.classes, spec.image_shape, tuple(spec.options.items()))


@functools.lru_cache(maxsize=64)
def _trace(
    arch: str,
    naming: str,
    classes: int,
    image_shape: tuple[int, int, int],
    options: tuple[tuple[str, Any], ...],
) -> Layout:
    spec = build.Spec(arch=arch, classes=classes, image_shape=image_shape, options=dict(options))
    return lay_out(spec, naming)


def _known_forms(spec: build.Spec) -> tuple[build.Spec, ...]:
    """The forms of a spec: max-pooling after a 3x3 stem and the activation of the small VGG leave
    no trace in the weights."""
    open_options = {"stem": ("cifar", "cifar-pool"), "activation": ("elu", "relu")}
    for name, values in open_options.items():
        if spec.options.get(name) == values[0]:
            options = [{**spec.options, name: value} for value in values]
            return tuple(dataclasses.replace(spec, options=each) for each in options)
    return (spec,)


def fits(
    shapes: Mapping[str, tuple[int, ...]],
    loose: bool = True,
    *,
    arch: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> bool:
    """Whether names and shapes are exactly those of an architecture (of `arch`, if given). Plain
    chains of layers count only if `loose`."""
    blank = {name: _blank(name, shape) for name, shape in shapes.items()}
    try:
        found = recognise(blank, arch=arch, image_shape=image_shape, exact=True)
    except UserError:
        return False
    return loose or arch is not None or found.spec.arch != families.PLAIN


def architectures() -> list[str]:
    """Names of all architectures and families."""
    return [*sorted(build.MODULES), *build.families.FAMILIES]


def _blank(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of the given shape that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def _nearest(
    shapes: Mapping[str, tuple[int, ...]], arch: str | None, exact: bool
) -> tuple[str, str]:
    """The architecture and naming scheme with the tensor names most similar to those of `shapes`.
    An exact match is preferred, and required if `exact`."""
    if arch in build.families.FAMILIES:
        raise UserError(f"the tensors do not form a net of the family {arch}")
    if arch is not None and arch not in build.MODULES:
        raise UserError(f"unknown architecture {arch!r}; known: {', '.join(architectures())}")
    if found := _find_exact(shapes, arch):
        return found
    if exact:
        raise UserError("no known architecture has tensors of exactly these names")
    names = {name for name in shapes if not name.endswith(f".{COUNTER}")}
    best, best_share = None, -1.0
    for candidate in sorted(build.MODULES) if arch is None else [arch]:
        for naming in namings(candidate):
            # skip nets of which both first and last layer are missing: tracing all takes seconds
            if arch is None and not any(end in names for end in _ends(candidate, naming)):
                continue
            known = _known_names(candidate, naming, _stages(candidate, shapes))
            share = len(names & known) / len(names | known)
            if share > best_share:
                best, best_share = (candidate, naming), share
    if arch is None and best_share < CLOSE:
        example = f"; its tensors are {few(list(shapes))}" if shapes else ""
        if title := families.hint(shapes):
            raise UserError(
                f"it looks like {title}, which cannot be read from its weights alone{example};"
                " export the whole model as ONNX (torch.onnx.export)"
            )
        raise UserError(
            f"no known architecture has this file's tensors{example}; known:"
            f" {', '.join(architectures())}; export the whole model as ONNX (torch.onnx.export), or"
            " give your own with --arch"
        )
    assert best is not None  # every architecture has a naming scheme
    return best


@functools.lru_cache(maxsize=64)
def _known_names(arch: str, naming: str, stages: int | None) -> frozenset[str]:
    """Names of the tensors of `arch`. They do not depend on width, stem, classes or image size."""
    options = {} if stages is None else {"stages": stages}
    spec = build.Spec(arch=arch, classes=2, image_shape=(32, 32, 3), options=options)
    return frozenset(lay_out(spec, naming).names.values())


def _spec(
    arch: str,
    naming: str,
    shapes: Mapping[str, tuple[int, ...]],
    image_shape: tuple[int, int, int] | None,
) -> build.Spec:
    """The spec of `arch`, with classes, channels and options taken from the tensors' shapes.

    If a tensor is missing or mis-shaped, a default is used; `check` then reports the tensor.
    """
    first = shapes.get(translate(FIRST.get(arch, "conv1"), naming) + ".weight", ())
    head = shapes.get(translate("head", naming) + ".weight", ())
    width, channels, kernel = first[:3] if len(first) == 4 else (8, 3, 3)
    classes, features = head if len(head) == 2 else (2, 0)
    options: dict[str, Any] = {"width": width}
    if arch in ("resnet18", "resnet34"):
        options["stem"] = {3: "cifar", 5: "64px", 7: "imagenet"}.get(kernel, "cifar")
    if arch == "cnn":
        options["stages"] = _stages(arch, shapes)
    if arch == "vgg":
        options["activation"] = "elu"
    side = {"imagenet": 224, "64px": 64}.get(options.get("stem", ""), 32)
    if arch == "vgg" and features:
        side = _vgg_side(features // (4 * width), image_shape)
    height, width, given = image_shape or (side, side, channels)
    if given != channels:
        raise UserError(
            f"the model takes images of {channels} channels, not {given}; give matching images"
        )
    shape = (height, width, channels)
    return build.Spec(arch=arch, classes=classes, image_shape=shape, options=options)


def _vgg_side(places: int, image_shape: tuple[int, int, int] | None) -> int:
    """Side of square images for which the small VGG, which pools by 8, has `places` positions left.

    Raises: UserError when images of `image_shape` give another number of positions.
    """
    side = max(8, 8 * math.isqrt(places))
    if image_shape is not None and (image_shape[0] // 8) * (image_shape[1] // 8) != places:
        raise UserError(
            f"the model was made for {side}x{side} images, not {image_shape[0]}x{image_shape[1]};"
            " resize the images"
        )
    return side


def _stages(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Number of stages of the small CNN in a file, from 1 to 8; None for other architectures."""
    if arch != "cnn":
        return None
    return min(
        8, max(1, sum(re.fullmatch(r"conv\d+\.weight", name) is not None for name in shapes))
    )
