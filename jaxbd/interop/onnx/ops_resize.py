"""Resize and Upsample: interpolation with precomputed weights, one matrix per axis."""

import numpy as np

from jaxbd.interop.onnx.graph import Node
from jaxbd.interop.onnx.values import Value, axis_of, check_size, library, limit, static, whole
from jaxbd.limits import Refusal, quote


def resize(node: Node, x: Value, *inputs: Value) -> Value:
    """Interpolates along each axis that changes size. Crops (`tf_crop_and_resize`) and antialiasing
    are refused."""
    mode, place = (
        node.get("mode", "nearest"),
        node.get("coordinate_transformation_mode", "half_pixel"),
    )
    if node.opset < 11:
        place = "asymmetric"
    if place == "tf_crop_and_resize" or node.get("antialias", 0) or node.get("exclude_outside", 0):
        raise Refusal(
            "a Resize with tf_crop_and_resize, antialias or exclude_outside is not supported"
        )
    axes, sizes, scales = _read_sizes(node, x, inputs)
    if all(size == x.shape[axis] for axis, size in zip(axes, sizes, strict=True)):
        return x  # as onnxruntime does, whatever the scales
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refusal("a Resize that keeps the aspect ratio is not supported")
    for axis, size, scale in zip(axes, sizes, scales, strict=True):
        if size != x.shape[axis] or scale != 1:
            check_size([size if i == axis else dim for i, dim in enumerate(x.shape)], limit(x))
            spots = _spots(place, x.shape[axis], size, scale)
            if mode == "nearest":
                x = library(x).take(x, _nearest(node, spots, x.shape[axis], scale), axis=axis)
            else:
                matrix = _matrix(mode, node.get("cubic_coeff_a", -0.75), spots, x.shape[axis])
                x = library(x).moveaxis(
                    library(x).tensordot(x, matrix.astype(x.dtype), (axis, 1)), -1, axis
                )
    return x


def _read_sizes(
    node: Node, x: Value, inputs: tuple[Value, ...]
) -> tuple[list[int], list[int], list[np.float32]]:
    """(axes, new sizes, scales), from the input `scales` or `sizes`; opsets 9 and 10 only have
    `scales`. The scales are float32, as onnxruntime's: 0.7 * 10 is then 7, not 6.9999999."""
    roi_scales_sizes = (None, *inputs) if node.opset < 11 else inputs
    _, scales, sizes = (*roi_scales_sizes, None, None, None)[:3]
    axes = [axis_of(axis, x.ndim) for axis in node.get("axes", tuple(range(x.ndim)))]
    if sizes is not None and np.size(sizes):
        new = list(whole(sizes, "the sizes of a Resize"))
        ratio = lambda axis, size: np.float32(size) / np.float32(x.shape[axis])
        return axes, new, [ratio(axis, size) for axis, size in zip(axes, new, strict=True)]
    if scales is None or not np.size(scales):
        raise Refusal("a Resize without sizes or scales")
    factors = list(static(scales, "the scales of a Resize").reshape(-1).astype(np.float32))
    if not all(0 < factor < 1e4 for factor in factors):
        raise Refusal(f"a Resize by {quote([*map(float, factors)])}")
    return (
        axes,
        [int(np.float32(x.shape[axis]) * scale) for axis, scale in zip(axes, factors, strict=True)],
        factors,
    )


def _spots(place: str, old: int, new: int, scale: np.float32) -> np.ndarray:
    """Coordinates of the new positions on the old axis, in float32: rounding decides which of two
    neighbours is the nearest."""
    at, half = np.arange(new, dtype=np.float32), np.float32(0.5)
    if place == "align_corners":
        return at * np.float32(old - 1) / np.float32(max(new - 1, 1))
    if place == "asymmetric":
        return at / scale
    if place == "pytorch_half_pixel" and new == 1:
        return np.zeros(1, np.float32)
    if place == "half_pixel_symmetric":
        size = np.float32(old)
        return half * size * (1 - np.float32(new) / (size * scale)) + (at + half) / scale - half
    if place in ("half_pixel", "pytorch_half_pixel"):
        return (at + half) / scale - half
    raise Refusal(f"a Resize with coordinates {quote(place)} is not supported")


def _nearest(node: Node, spots: np.ndarray, old: int, scale: np.float32) -> np.ndarray:
    """The old position nearest to each coordinate, rounded as the node says."""
    # opset 10 leaves it open; onnxruntime rounds up where the axis shrinks
    default = "round_prefer_floor" if node.opset >= 11 else "ceil" if scale < 1 else "floor"
    rule = node.get("nearest_mode", default)
    rules = {
        "round_prefer_floor": lambda s: np.ceil(s - 0.5),
        "round_prefer_ceil": lambda s: np.floor(s + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    if rule not in rules:
        raise Refusal(f"a Resize that rounds by {quote(rule)} is not supported")
    return np.clip(rules[rule](spots), 0, old - 1).astype(np.int32)


def _matrix(mode: str, a: float, spots: np.ndarray, old: int) -> np.ndarray:
    """Interpolation weights [new, old]; positions outside take the value at the edge."""
    if mode not in ("linear", "cubic"):
        raise Refusal(f"a Resize of mode {quote(mode)} is not supported")
    base = np.floor(spots)
    taps = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    matrix = np.zeros((len(spots), old))
    for tap in taps:
        distance = np.abs(spots - base - tap)
        weight = 1 - distance if mode == "linear" else _cubic(distance, a)
        # add.at, because several taps may be clipped to the same position
        np.add.at(
            matrix, (np.arange(len(spots)), np.clip(base + tap, 0, old - 1).astype(int)), weight
        )
    return matrix


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at distance `t`."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))
