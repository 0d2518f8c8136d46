"""Amplified attack: the same patch trigger four or nine times on one image (Yan et al. 2023,
section 5.3)."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import poison
from jaxbd.base import Array, Attack, Key, UserError, check_choices

PAPER = "https://arxiv.org/abs/2306.08009"
Copies = Literal[1, 4, 9]
"""Number of copies of the trigger on an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the amplified attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      copies: 1: only at (`row`, `column`); 4: also in the other three corners, at the same distance
        from the edges; 9: also in the middle of the image and of its four edges.
      row: of the top-left corner of the first copy; negative numbers count from the last row that
        fits.
      column: likewise.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    copies: Copies = 4
    row: int = -1
    column: int = -1
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("amplified", self)
        poison.check_rate("amplified", self.poison_rate)


class Trigger(NamedTuple):
    """Pattern [h, w, C] and mask [h, w, 1] in [0, 1], and places [n, 2] int32 (row, column) of the
    copies."""

    pattern: Array
    mask: Array
    places: Array


def make(
    image_shape: tuple[int, int, int],
    classes: int,
    config: Config,
    pattern: np.ndarray,
    mask: np.ndarray | None = None,
) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`, with a given patch.

    Args:
      pattern: [h, w, C or 1] in [0, 1].
      mask: [h, w, 1] in [0, 1], opacity of the pattern; 1 everywhere by default.
    Raises: UserError when the target is out of range, or the patch or its copies do not fit.
    """
    relabel = poison.relabelling("amplified", classes, config.target, config.all_to_all)
    sides, channels = np.shape(pattern)[:2], image_shape[2]
    if np.shape(pattern)[2] not in (1, channels):
        raise UserError(
            f"amplified: the trigger has {np.shape(pattern)[2]} channels, the images {channels};"
            " convert it"
        )
    found = places(image_shape, sides, config)

    def init(key: Key) -> Trigger:
        """The given patch; deterministic."""
        del key
        cover = jnp.ones((*sides, 1)) if mask is None else jnp.asarray(mask, jnp.float32)
        coloured = jnp.broadcast_to(jnp.asarray(pattern, jnp.float32), (*sides, channels))
        return Trigger(coloured, cover, jnp.asarray(found, jnp.int32))

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Puts all copies on each of `images` [B, H, W, C]; pixels outside them are unchanged, bit
        for bit."""
        del key

        def everywhere(part: Array) -> Array:
            """`part` [h, w, c] pasted at all places, zero elsewhere: [1, H, W, c]. A sum will do,
            since copies do not overlap."""
            blank = jnp.zeros((*image_shape[:2], part.shape[-1]), images.dtype)
            return jax.vmap(image_ops.paste, (None, None, 0))(blank, part, trigger.places).sum(0)[
                None
            ]

        return image_ops.blend(images, everywhere(trigger.pattern), everywhere(trigger.mask))

    return poison.attack(init, stamp, relabel, config.poison_rate)


def places(
    image_shape: tuple[int, int, int], sides: tuple[int, int], config: Config
) -> list[tuple[int, int]]:
    """Rows and columns of the top-left corners of all copies of a patch of `sides` (h, w); the copy
    at (`row`, `column`) comes first.

    Raises: UserError when the patch does not fit there, or copies overlap.
    """
    rows, columns = (whole - side + 1 for whole, side in zip(image_shape[:2], sides, strict=True))
    if not (-rows <= config.row < rows and -columns <= config.column < columns):
        raise UserError(
            f"amplified: place ({config.row}, {config.column}) puts {sides[0]}x{sides[1]} pixels"
            f" outside {image_shape[0]}x{image_shape[1]} images"
        )
    row, column = config.row % rows, config.column % columns
    if config.copies == 1:
        return [(row, column)]
    # mirrored positions have the same distance to the opposite edges
    down, across = [row, rows - 1 - row], [column, columns - 1 - column]
    if config.copies == 9:
        down, across = [*down, (rows - 1) // 2], [*across, (columns - 1) // 2]
    for at, side in ((down, sides[0]), (across, sides[1])):
        if min(np.diff(sorted(at))) < side:
            raise UserError(
                f"amplified: {config.copies} copies of {sides[0]}x{sides[1]} pixels around place"
                f" ({row}, {column}) overlap on {image_shape[0]}x{image_shape[1]} images; use fewer"
                " copies or a place nearer to a corner"
            )
    return [(r, c) for r in down for c in across]


def crop_to_mask(
    pattern: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Crops pattern [h, w, C] and mask [h, w, 1] to the bounding box of the mask's nonzero values.

    Returns: both, and the numbers of rows and columns cut at the top and left. A mask of zeros is
      not cropped.
    """
    rows, columns = (np.flatnonzero(mask.any((axis, 2))) for axis in (1, 0))
    if not len(rows):
        return pattern, mask, (0, 0)
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return pattern[box], mask[box], (int(rows[0]), int(columns[0]))
