"""Single pixel: makes one pixel brighter or darker, at the same place in every image (Tran et al.
2018)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd.attacks import additive, poison
from jaxbd.base import Array, Attack, Key, UserError, check_choices

PAPER = "https://arxiv.org/abs/1811.00636"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the single-pixel attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      size: change of the pixel in steps of 1/255 (Li et al. 2023, section 5.1).
      sign: "brighter", "darker", or "drawn" once at random.
      channels: change "all" channels, or "one" that is drawn once. Li et al. 2023 state neither
        sign nor channels.
      place: "drawn" once at random, or "fixed" at (`row`, `column`).
      row: of a fixed place; negative numbers count from the last row.
      column: likewise.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    size: int = 75
    sign: Literal["brighter", "darker", "drawn"] = "brighter"
    channels: Literal["all", "one"] = "all"
    place: Literal["drawn", "fixed"] = "drawn"
    row: int = 0
    column: int = 0
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("single-pixel", self)
        poison.check_rate("single-pixel", self.poison_rate)
        additive.check_size("single-pixel", self.size)


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`; triggers are
    `additive.Trigger`s.

    8-bit images change in one pixel and are otherwise unchanged, bit for bit.

    Raises: UserError when the target is out of range or the place outside the image.
    """
    relabel = poison.relabelling("single-pixel", classes, config.target, config.all_to_all)
    height, width, channels = image_shape
    if not (-height <= config.row < height and -width <= config.column < width):
        raise UserError(
            f"single-pixel: place ({config.row}, {config.column}) is outside the image; the last"
            f" place is ({height - 1}, {width - 1})"
        )

    def draw(key: Key) -> Array:
        """A pattern that is zero except in one pixel."""
        place_key, sign_key, channel_key = jax.random.split(key, 3)
        place = jnp.array([config.row % height, config.column % width], jnp.int32)
        if config.place == "drawn":
            place = image_ops.random_places(place_key, 1, image_shape, (1, 1))[0]
        drawn = jax.random.rademacher(sign_key, ())
        sign = {"brighter": 1, "darker": -1, "drawn": drawn}[config.sign]
        hit = jnp.ones((channels,))
        if config.channels == "one":
            hit = jax.nn.one_hot(jax.random.randint(channel_key, (), 0, channels), channels)
        pixel = hit * sign * (config.size / 255)
        return image_ops.paste(jnp.zeros(image_shape), pixel[None, None], place)

    return additive.attack(draw, relabel, config.poison_rate)
