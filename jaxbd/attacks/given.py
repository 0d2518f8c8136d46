"""A given trigger, loaded from a file by `interop.trigger`: pixels to paste or add, or a warp."""

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
    """How to put a given trigger on images.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      apply: "overwrite": replace pixels where the mask is 1, blend where it is between 0 and 1;
        "add": add the pattern and clip the sum to [0, 1]; "blend": as "overwrite", rounded to 8
        bits; "bits": replace the bits of the 8-bit image that are set in the mask (see
        `eight_bit`); "warp": resample the image by the grid.
      place: "fixed": at (`row`, `column`); "random": a new place on every image.
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
      poison_rate: share of a batch's images to stamp and relabel.
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
    """A trigger as read from a file: pattern and mask of pixels, or the grid of a warp.

    Attributes:
      pattern: [h, w, 1 or 3] float32, in [0, 1] (a trigger to add may be in [-1, 1]); None for a
        warp.
      mask: [h, w, 1] float32 in [0, 1], opacity of the pattern; None for a warp.
      place: row and column of the top-left corner, "random", or None if unknown.
      target: class the trigger leads to, or "all-to-all" if class c leads to c + 1 mod K; None if
        unknown.
      apply: one of `Config.apply`; None if unknown.
      grid: [H, W, 2] float32 in [-1, 1], see `images.warp`; None for a trigger made of pixels.
    """

    pattern: np.ndarray | None = None
    mask: np.ndarray | None = None
    place: tuple[int, int] | Literal["random"] | None = None
    target: int | Literal["all-to-all"] | None = None
    apply: Apply | None = None
    grid: np.ndarray | None = None


class Trigger(NamedTuple):
    """Pattern [h, w, C], mask [h, w, 1], place [2] int32 (row, column; unused when places are
    random)."""

    pattern: Array
    mask: Array
    place: Array


class Warp(NamedTuple):
    """Grid [H, W, 2], see `images.warp`."""

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
            "trigger: a grid must be applied as a warp, and only a grid can be; leave `apply` as"
            " the trigger has it"
        )
    if loaded.grid is not None:
        stamp, trigger = _warping(image_shape, loaded.grid)
    else:
        stamp, trigger = _pixels(image_shape, config, loaded)

    def init(key: Key) -> Trigger | Warp:
        """The given trigger; deterministic."""
        del key
        return trigger

    return poison.attack(init, stamp, relabel, config.poison_rate), trigger


def _warping(
    image_shape: tuple[int, int, int], grid: np.ndarray
) -> tuple[Callable[..., Array], Warp]:
    """Stamp and trigger of a warp. Raises: UserError when the grid and the images differ in
    size."""
    if grid.shape[:2] != tuple(image_shape[:2]):
        raise UserError(
            f"trigger: a grid for {grid.shape[0]}x{grid.shape[1]} images does not fit"
            f" {list(image_shape)}"
        )

    def stamp(key: Key, trigger: Warp, images: Array) -> Array:
        """Warps each of `images` [B, H, W, C] and rounds it to multiples of 1/255."""
        del key
        return image_ops.to_uint8_grid(jax.vmap(image_ops.warp, (0, None))(images, trigger.grid))

    return stamp, Warp(jnp.asarray(grid))


def _pixels(
    image_shape: tuple[int, int, int], config: Config, loaded: Loaded
) -> tuple[Callable[..., Array], Trigger]:
    """Stamp and trigger of pixels. Raises: UserError when they do not fit the images at their
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
        """Puts the trigger on each of `images` [B, H, W, C]; pixels outside its mask are unchanged,
        bit for bit."""
        if config.place == "random":
            places = image_ops.random_places(key, images.shape[0], image_shape, (h, w))
        else:
            places = jnp.broadcast_to(trigger.place, (images.shape[0], 2))
        return jax.vmap(stamp_one, (0, None, 0))(images, trigger, places)

    return stamp, trigger


def _match(pattern: np.ndarray, channels: int) -> np.ndarray:
    """Converts `pattern` [h, w, 1 or 3] to the images' channels: grey is repeated, and an RGB
    pattern with equal channels fits grey images."""
    if pattern.shape[2] == channels:
        return pattern
    if pattern.shape[2] == 1:
        return np.repeat(pattern, channels, axis=2)
    if channels == 1 and (pattern == pattern[..., :1]).all():
        return pattern[..., :1]
    raise UserError(
        f"trigger has {pattern.shape[2]} channels, the model takes {channels}; convert the trigger"
    )
