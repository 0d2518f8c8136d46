"""Shared parts of attacks that paste a square patch: its pattern, the trigger, and the places where
it fits."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Key, UserError

Kind = Literal["color", "binary", "checkerboard", "inverse-checkerboard", "white"]
"""Patterns by name, see `draw`."""


class Trigger(NamedTuple):
    """Pattern [h, w, C] in [0, 1] and place [2] int32 (row, column; unused when places are
    random)."""

    pattern: Array
    place: Array


def check(method: str, side: int, pattern: Kind | int) -> None:
    """Raises UserError if the side is below 1, or if a numeric pattern has more bits than the patch
    has pixels."""
    if side < 1:
        raise UserError(f"{method}: patch is {side}; give a side of at least 1 pixel")
    if isinstance(pattern, int) and not 0 <= pattern < 2 ** (side**2):
        raise UserError(f"{method}: pattern {pattern} has more bits than a {side}x{side} patch")


def fixed(
    method: str, image_shape: tuple[int, int, int], side: int, row: int, column: int
) -> tuple[int, int]:
    """Row and column of the top-left corner of a patch at a fixed place.

    Negative numbers count from the last place that fits: (-1, -1) is the bottom-right corner.

    Raises: UserError when the patch or its place does not fit images of `image_shape` (H, W, C).
    """
    height, width, _ = image_shape
    if side > min(height, width):
        raise UserError(
            f"{method}: a {side}x{side} patch does not fit {height}x{width} images; make it smaller"
        )
    rows, columns = height - side + 1, width - side + 1
    if not (-rows <= row < rows and -columns <= column < columns):
        raise UserError(
            f"{method}: place ({row}, {column}) puts the patch outside the image; the last place"
            f" that fits is ({rows - 1}, {columns - 1})"
        )
    return row % rows, column % columns


def draw(key: Key, pattern: Kind | int, side: int, channels: int) -> Array:
    """A patch [side, side, channels] in [0, 1]; only "color" and "binary" are random."""
    if isinstance(pattern, int):
        grey = jnp.asarray(bits_to_pattern(pattern, side))
    elif pattern == "color":
        return jax.random.uniform(key, (side, side, channels))
    elif pattern == "binary":
        grey = jax.random.bernoulli(key, 0.5, (side, side)).astype(jnp.float32)
    elif pattern == "white":
        grey = jnp.ones((side, side))
    else:
        grey = (jnp.indices((side, side)).sum(0) + (pattern == "inverse-checkerboard")) % 2 * 1.0
    return jnp.broadcast_to(grey[..., None], (side, side, channels)).astype(jnp.float32)


def bits_to_pattern(bits: int, side: int = 3) -> np.ndarray:
    """[side, side] float32 of 0 (black) and 1 (white); the most significant bit is the top-left
    pixel, row-major."""
    flat = [(bits >> (side * side - 1 - i)) & 1 for i in range(side * side)]
    return np.array(flat, np.float32).reshape(side, side)
