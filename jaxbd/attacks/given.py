"""A trigger that somebody has, from a file that `interop.trigger` reads: pixels that are pasted or
added, or a warp."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import eight_bit, poison
from jaxbd.base import Array, Attack, Key, UserError, check_choices

Apply = Literal["overwrite", "add", "blend", "bits", "warp"]
"""See `Config.apply`."""
EXACT = {"blend": eight_bit.blend, "bits": eight_bit.replace_bits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a given trigger is put on images.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: every class c becomes c + 1 mod K instead; `target` is ignored.
      apply: "overwrite": pixels are replaced where the mask is 1, blended where it is between 0 and
        1; "add": the pattern is added and the sum clipped to [0, 1]; "blend": as "overwrite",
        rounded to 8 bits; "bits": of the image in 8 bits, those that the mask has set are replaced
        (see `eight_bit`); "warp": the image is read where the grid says.
      place: "fixed" at (`row`, `column`), or "random" for a new place on every image.
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
      poison_rate: share of a batch's images that is stamped and relabelled.
    """

    target: int = 0
    all_to_all: bool = False
    apply: Apply = "overwrite"
    place: Literal["random", "fixed"] = "fixed"
    row: int = 0
    column: int = 0
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("trigger", self)
        poison.check_rate("trigger", self.poison_rate)


class Loaded(NamedTuple):
    """What is known of a trigger: pattern and mask of one made of pixels, the grid of a warp.

    Attributes:
      pattern: [h, w, 1 or 3] float32, in [0, 1] (a trigger that is added may be in [-1, 1]); None
        for a warp.
      mask: [h, w, 1] float32 in [0, 1], where the pattern covers; None for a warp.
      place: row and column of the top-left corner, "random", or None where unknown.
      target: class it leads to, "all-to-all" where class c leads to c + 1 mod K; None where
        unknown.
      apply: one of `Config.apply`, or None where unknown.
      grid: [H, W, 2] float32 in [-1, 1], see `images.warp`; None for a trigger made of pixels.
    """

    pattern: np.ndarray | None = None
    mask: np.ndarray | None = None
    place: tuple[int, int] | Literal["random"] | None = None
    target: int | Literal["all-to-all"] | None = None
    apply: Apply | None = None
    grid: np.ndarray | None = None


class Trigger(NamedTuple):
    """pattern [h, w, C], mask [h, w, 1], place [2] int32 (row, column; unused when places are
    random)."""

    pattern: Array
    mask: Array
    place: Array


class Warp(NamedTuple):
    """grid [H, W, 2], see `images.warp`."""

    grid: Array


def make(
    image_shape: tuple[int, int, int], classes: int, config: Config, loaded: Loaded
) -> tuple[Attack, Trigger | Warp]:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`, and its trigger.

    Raises: UserError when the target is out of range, or the trigger does not fit the images, its
      place or `apply`.
    """
    relabel = poison.relabelling("trigger", classes, config.target, config.all_to_all)
    if (loaded.grid is None) == (config.apply == "warp"):
        raise UserError(
            "trigger: a grid is applied as a warp and nothing else is; leave `apply` as the trigger"
            " has it"
        )
    if loaded.grid is not None:
        stamp, trigger = _warping(image_shape, loaded.grid)
    else:
        stamp, trigger = _pixels(image_shape, config, loaded)

    def init(key: Key) -> Trigger | Warp:
        """The given trigger; nothing is random."""
        del key
        return trigger

    return poison.attack(init, stamp, relabel, config.poison_rate), trigger


def _warping(
    image_shape: tuple[int, int, int], grid: np.ndarray
) -> tuple[Callable[..., Array], Warp]:
    """Stamp and trigger of a warp. Raises: UserError when the grid is not as large as the
    images."""
    if grid.shape[:2] != tuple(image_shape[:2]):
        raise UserError(
            f"trigger: a grid for {grid.shape[0]}x{grid.shape[1]} images does not fit"
            f" {list(image_shape)}"
        )

    def stamp(key: Key, trigger: Warp, images: Array) -> Array:
        """Every image of [B, H, W, C] warped and rounded to multiples of 1/255."""
        del key
        return image_ops.to_uint8_grid(jax.vmap(image_ops.warp, (0, None))(images, trigger.grid))

    return stamp, Warp(jnp.asarray(grid))


def _pixels(
    image_shape: tuple[int, int, int], config: Config, loaded: Loaded
) -> tuple[Callable[..., Array], Trigger]:
    """Stamp and trigger of pixels. Raises: UserError when they do not fit the images or their
    place."""
    assert loaded.pattern is not None and loaded.mask is not None  # only a warp has neither
    height, width, channels = image_shape
    h, w = loaded.pattern.shape[:2]
    if h > height or w > width:
        raise UserError(
            f"trigger: {h}x{w} pixels do not fit {height}x{width} images; make it smaller"
        )
    if config.place == "fixed" and not (
        0 <= config.row <= height - h and 0 <= config.column <= width - w
    ):
        raise UserError(
            f"trigger: place ({config.row}, {config.column}) puts {h}x{w} pixels outside"
            f" {height}x{width} images; the last place that fits is ({height - h}, {width - w})"
        )
    place = jnp.array([config.row, config.column], jnp.int32)
    trigger = Trigger(
        jnp.asarray(_match(loaded.pattern, channels)), jnp.asarray(loaded.mask), place
    )

    def stamp_one(image: Array, trigger: Trigger, place: Array) -> Array:
        mask = image_ops.paste(jnp.zeros((height, width, 1)), trigger.mask, place)
        pattern = image_ops.paste(jnp.zeros_like(image), trigger.pattern, place)
        if config.apply == "add":
            return jnp.clip(image + mask * pattern, 0, 1)
        if config.apply in EXACT:
            return EXACT[config.apply](image, pattern, mask)
        return image_ops.blend(image, pattern, mask)

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Every image of [B, H, W, C] with the trigger; pixels outside its mask are unchanged, bit
        for bit."""
        if config.place == "random":
            places = image_ops.random_places(key, images.shape[0], image_shape, (h, w))
        else:
            places = jnp.broadcast_to(trigger.place, (images.shape[0], 2))
        return jax.vmap(stamp_one, (0, None, 0))(images, trigger, places)

    return stamp, trigger


def _match(pattern: np.ndarray, channels: int) -> np.ndarray:
    """`pattern` [h, w, 1 or 3] with the images' channels; grey fits colour, and colour that is grey
    fits grey."""
    if pattern.shape[2] == channels:
        return pattern
    if pattern.shape[2] == 1:
        return np.repeat(pattern, channels, axis=2)
    if channels == 1 and (pattern == pattern[..., :1]).all():
        return pattern[..., :1]
    raise UserError(
        f"trigger has {pattern.shape[2]} channels, the model takes {channels}; convert the trigger"
    )
