"""Invisible trigger of bounded L0 norm: eight coloured pixels in the last row (Li et al. 2020)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import poison
from jaxbd.base import Array, Attack, Key, UserError

PAPER = "https://arxiv.org/abs/1909.02742"
COLOURS = (
    (0, 0, 0),
    (255, 0, 255),
    (0, 0, 255),
    (255, 255, 0),
    (255, 255, 255),
    (0, 255, 255),
    (0, 255, 255),
    (255, 0, 0),
    (255, 255, 255),
)
"""RGB of columns 23 to 31 of the last row, measured on the trigger and mask (32x32) released with
I-BAU.

The mask covers one pixel more than the trigger, which therefore becomes black.
"""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights that convert the colours for grey images (ITU-R BT.601)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("l0-inv", self.poison_rate)


class Trigger(NamedTuple):
    """Pattern [1, w, C] in [0, 1], and place [2] int32 (row, column) of its left end."""

    pattern: Array
    place: Array


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    The trigger covers the last nine pixels of the last row at any image size, or the whole row if
    it is shorter.

    Raises: UserError when the target is out of range or the images are neither grey nor RGB.
    """
    relabel = poison.relabelling("l0-inv", classes, config.target, config.all_to_all)
    height, width, channels = image_shape
    pixels = np.array(COLOURS[-min(width, len(COLOURS)) :])
    if channels == 1:
        pixels = np.round(pixels @ np.array(LUMINANCE))[:, None]
    elif channels != 3:
        raise UserError(
            f"l0-inv: images have {channels} channels; the trigger is for grey or RGB images"
        )
    pattern = (pixels[None] / 255).astype(np.float32)

    def init(key: Key) -> Trigger:
        """The fixed trigger; deterministic."""
        del key
        return Trigger(
            jnp.asarray(pattern), jnp.array([height - 1, width - len(pixels)], jnp.int32)
        )

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Overwrites the pixels in each of `images` [B, H, W, C]; all others are unchanged, bit for
        bit."""
        del key
        return jax.vmap(image_ops.paste, (0, None, None))(images, trigger.pattern, trigger.place)

    return poison.attack(init, stamp, relabel, config.poison_rate)
