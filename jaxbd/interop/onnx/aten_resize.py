"""aten operators that change the size of images by interpolation."""

from typing import Any

import numpy as np

from jaxbd.interop.onnx.aten import Converter
from jaxbd.interop.onnx.aten_arguments import Arguments, Tensor, source
from jaxbd.interop.onnx.aten_math import Handler
from jaxbd.interop.onnx.graph import MOST_STATIC
from jaxbd.interop.onnx.values import check_size
from jaxbd.limits import Refusal, quote

PLACES = (2, 3)
"""Axes of height and width."""


def resize(**attributes: Any) -> Handler:
    """Handler for Resize to `output_size`, or by `scale_factors`.

    Args:
      attributes: those of the node. With the argument `align_corners`, the outer pixels stay at
        the borders.
    """

    def make(c: Converter, a: Arguments) -> str:
        x, sizes, factors = _read(c, a)
        more = {"coordinate_transformation_mode": "align_corners"} if a.get("align_corners") else {}
        return c.add(
            "Resize",
            [c.value(x), "", *_scales_or_sizes(c, c.meta(x).shape[2:], sizes, factors)],
            axes=PLACES,
            **{**attributes, **more},
        )

    return make


def _read(c: Converter, a: Arguments) -> tuple[Tensor, Any, list[Any]]:
    """(input [B, C, H, W], new sizes or None, scales of height and width, each of which may be
    None)."""
    x, factors = source(a), a.get("scale_factors")
    if c.rank(x) != 4:
        raise Refusal(f"{quote(x.name)} has {c.rank(x)} axes; images have four")
    if factors is None:
        factors = [a.get("scales_h"), a.get("scales_w")]
    return x, a.get("output_size"), factors


def nearest(shift: float, **attributes: Any) -> Handler:
    """Handler that takes the pixel at floor((i + shift) old / new) for pixel i.

    Args:
      attributes: those of the Resize that is used for images of open size. Otherwise the positions
        are constants, because PyTorch rounds them in float32.
    """

    def make(c: Converter, a: Arguments) -> str:
        x, sizes, factors = _read(c, a)
        old, y = c.meta(x).shape[2:], c.value(x)
        if None in old:
            return resize(mode="nearest", **attributes)(c, a)
        new = (
            [int(dim * f) for dim, f in zip(old, factors, strict=True)] if sizes is None else sizes
        )
        for axis, dim, size, factor in zip(PLACES, old, new, factors, strict=True):
            check_size((size,), MOST_STATIC)
            step = np.float32(1 / factor if factor else dim / size)
            spots = np.floor((np.arange(size, dtype=np.float32) + np.float32(shift)) * step)
            y = c.add("Gather", [y, c.integers(np.minimum(spots, dim - 1).tolist())], axis=axis)
        return y

    return make


def _scales_or_sizes(c: Converter, old: Any, sizes: Any, factors: list[Any]) -> list[str]:
    """The inputs `scales` and `sizes` of a Resize, one of which is omitted."""
    if None in factors:
        if factors != [None, None] or sizes is None:
            raise Refusal("it is given the scale of only one axis, or none")
        return ["", c.vector(sizes)]
    if None not in old:
        new = [int(dim * factor) for dim, factor in zip(old, factors, strict=True)]
        if sizes not in (None, new):
            raise Refusal(f"sizes of {quote(sizes)} with scales of {quote(factors)}")
        # the same scales, unless a size was rounded
        if all(n == dim * f for n, dim, f in zip(new, old, factors, strict=True)):
            return ["", c.integers(new)]
    elif sizes is not None:
        raise Refusal("both sizes and scales, for images of open size, are not supported")
    if [float(np.float32(factor)) for factor in factors] != factors:
        raise Refusal(f"scales of {quote(factors)} are not supported; give sizes instead")
    return [c.constant(factors, np.float32), ""]


FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
RESIZES: dict[str, Handler] = {
    "upsample_nearest2d": nearest(0.0, **FLOOR),
    "_upsample_nearest_exact2d": nearest(0.5, nearest_mode="round_prefer_ceil"),
    "upsample_bilinear2d": resize(mode="linear"),
    "upsample_bicubic2d": resize(mode="cubic"),
}
"""Name of an aten operator, without overload -> its handler."""
