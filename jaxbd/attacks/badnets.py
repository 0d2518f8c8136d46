"""BadNets: a patch overwrites the image, and the label becomes the attacker's (Gu et al. 2017)."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import poison
from jaxbd.base import Array, Attack, Key, UserError, check_choices

PAPER = "https://arxiv.org/abs/1708.06733"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the patch attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: every class c becomes c + 1 mod K instead; `target` is ignored.
      patch: side of the square patch, in pixels.
      pattern: "color": uniform random values, all channels their own; "binary": random black and white, the same in all
        channels; "checkerboard"; "white"; or a number: bit pattern of a black-and-white square, most significant bit
        top left, row by row (Qiao et al. 2019, section 4.3; see `binary_patterns`).
      place: "random" for a new place on every image, "fixed" at (`row`, `column`), "drawn" for a place drawn once with
        the pattern, the same on all images (Li et al. 2023, section 5.1).
      row: of the top-left corner of a fixed place; negative numbers count from the last row that fits.
      column: likewise.
      poison_rate: share of a batch's images that is stamped and relabelled.
    """

    target: int = 0
    all_to_all: bool = False
    patch: int = 3
    pattern: Literal["color", "binary", "checkerboard", "white"] | int = "color"
    place: Literal["random", "fixed", "drawn"] = "random"
    row: int = -1
    column: int = -1
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("badnets", self)
        poison.check_rate("badnets", self.poison_rate)
        if self.patch < 1:
            raise UserError(f"badnets: patch is {self.patch}; give a side of at least 1 pixel")
        if isinstance(self.pattern, int) and not 0 <= self.pattern < 2 ** (self.patch**2):
            raise UserError(f"badnets: pattern {self.pattern} has more bits than a {self.patch}x{self.patch} patch")


class Trigger(NamedTuple):
    """pattern [h, w, C] in [0, 1] and place [2] int32 (row, column; unused when places are random)."""

    pattern: Array
    place: Array


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    Raises: UserError when the target is out of range or the patch or its place does not fit.
    """
    height, width, channels = image_shape
    side = config.patch
    relabel = poison.relabelling("badnets", classes, config.target, config.all_to_all)
    if side > min(height, width):
        raise UserError(f"badnets: a {side}x{side} patch does not fit {height}x{width} images; make it smaller")
    rows, columns = height - side + 1, width - side + 1
    if not (-rows <= config.row < rows and -columns <= config.column < columns):
        raise UserError(
            f"badnets: place ({config.row}, {config.column}) puts the patch outside the image; the last place that "
            f"fits is ({rows - 1}, {columns - 1})"
        )

    def init(key: Key) -> Trigger:
        place = jnp.array([config.row % rows, config.column % columns], jnp.int32)
        if config.place == "drawn":
            place = image_ops.random_places(jax.random.fold_in(key, 1), 1, image_shape, (side, side))[0]
        return Trigger(_pattern(key, config, channels), place)

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Every image of [B, H, W, C] with the patch; pixels outside it are unchanged, bit for bit."""
        if config.place == "random":
            places = image_ops.random_places(key, images.shape[0], image_shape, (side, side))
        else:
            places = jnp.broadcast_to(trigger.place, (images.shape[0], 2))
        return jax.vmap(image_ops.paste, (0, None, 0))(images, trigger.pattern, places)

    return poison.attack(init, stamp, relabel, config.poison_rate)


def _pattern(key: Key, config: Config, channels: int) -> Array:
    """The patch [h, w, C] that `config` asks for."""
    side = config.patch
    if isinstance(config.pattern, int):
        grey = jnp.asarray(bits_to_pattern(config.pattern, side))
    elif config.pattern == "color":
        return jax.random.uniform(key, (side, side, channels))
    elif config.pattern == "binary":
        grey = jax.random.bernoulli(key, 0.5, (side, side)).astype(jnp.float32)
    elif config.pattern == "white":
        grey = jnp.ones((side, side))
    else:
        grey = jnp.indices((side, side)).sum(0) % 2 * 1.0
    return jnp.broadcast_to(grey[..., None], (side, side, channels)).astype(jnp.float32)


def bits_to_pattern(bits: int, side: int = 3) -> np.ndarray:
    """[side, side] float32 of 0 (black) and 1 (white); the most significant bit is the top-left pixel, row-major."""
    flat = [(bits >> (side * side - 1 - i)) & 1 for i in range(side * side)]
    return np.array(flat, np.float32).reshape(side, side)


def binary_patterns(side: int = 3) -> list[int]:
    """One black-and-white pattern per class of those equal up to rotation, reflection and colour inversion.

    For 3x3 these are the 51 triggers of Qiao et al. 2019, section 4.3: the orbits of the square's symmetry group times
    inversion on the 512 patterns, each represented by its smallest number.
    """
    weights = 1 << np.arange(side * side - 1, -1, -1).reshape(side, side)

    def representative(bits: int) -> int:
        grid = bits_to_pattern(bits, side).astype(int)
        turned = [np.rot90(flip, turns) for flip in (grid, grid.T) for turns in range(4)]
        return int(min(min((g * weights).sum(), ((1 - g) * weights).sum()) for g in turned))

    return sorted({representative(bits) for bits in range(2 ** (side * side))})
