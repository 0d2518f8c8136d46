"""Watermark: blends a picture into the whole image (Chen et al. 2017)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import eight_bit, poison
from jaxbd.base import Array, Attack, Key, UserError

PAPER = "https://arxiv.org/abs/1712.05526"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the watermark attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      opacity: weight of the picture in the triggered image (0.2 in BackdoorBench; 0.1 in the
        released DHBE code).
      points: draw the picture as a grid of this many by this many random values and interpolate
        smoothly; by default every pixel is drawn independently.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    opacity: float = 0.2
    points: int | None = None
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("blend", self.poison_rate)
        if not 1 / 255 <= self.opacity <= 1:
            raise UserError(
                f"blend: opacity {self.opacity} is not in [1/255, 1]; less is lost in 8 bits"
            )
        if self.points is not None and self.points < 2:
            raise UserError(f"blend: points is {self.points}; give at least 2")


class Trigger(NamedTuple):
    """The picture, pattern [H, W, C], and its opacity, mask [H, W, 1]; both in [0, 1]."""

    pattern: Array
    mask: Array


def make(
    image_shape: tuple[int, int, int],
    classes: int,
    config: Config,
    picture: np.ndarray | None = None,
    cover: np.ndarray | None = None,
) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    Args:
      picture: [H, W, C] in [0, 1]; drawn at random by default.
      cover: [H, W, 1] in [0, 1], alpha channel of the picture; 1 everywhere by default.
    Raises: UserError when the target is out of range, or the shape or range of picture or cover is
      wrong.
    """
    relabel = poison.relabelling("blend", classes, config.target, config.all_to_all)
    height, width, channels = image_shape
    if picture is not None:
        _check(picture, (height, width, channels))
    if cover is not None:
        _check(cover, (height, width, 1))

    def init(key: Key) -> Trigger:
        """The given picture, or one drawn uniformly, on the 8-bit grid."""
        side = (height, width) if config.points is None else (config.points, config.points)
        pattern = jax.random.uniform(key, (*side, channels))
        if config.points is not None:
            pattern = image_ops.upsample(pattern, height, width)
        pattern = pattern if picture is None else jnp.asarray(picture, jnp.float32)
        whole = jnp.ones((height, width, 1)) if cover is None else jnp.asarray(cover, jnp.float32)
        return Trigger(image_ops.to_uint8_grid(pattern), config.opacity * whole)

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """x' = (1 - a) x + a p for each of `images` [B, H, W, C], on the 8-bit grid; see
        `eight_bit.blend`."""
        del key
        return eight_bit.blend(images, trigger.pattern[None], trigger.mask[None])

    return poison.attack(init, stamp, relabel, config.poison_rate)


def _check(picture: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Raises UserError unless `picture` has the given shape and lies in [0, 1]."""
    if np.shape(picture) != shape:
        raise UserError(
            f"blend: the picture is {list(np.shape(picture))}, but must be {list(shape)}; resize it"
        )
    if not (np.isfinite(picture).all() and np.min(picture) >= 0 and np.max(picture) <= 1):
        raise UserError("blend: the picture has values outside [0, 1]; give pixels in [0, 1]")
