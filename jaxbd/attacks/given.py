"""A trigger that somebody has, as pixels (`interop.trigger` reads it from a file); pasted or added."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.base import Array, Attack, Batch, Key, UserError, check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a given trigger is put on images.

    Attributes:
      target: class every triggered image should become.
      apply: "overwrite": pixels are replaced where the mask is 1, blended where it is between 0 and 1; "add": the
        pattern is added and the sum clipped to [0, 1].
      place: "fixed" at (`row`, `column`), or "random" for a new place on every image.
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
      poison_rate: share of a batch's images that is stamped and relabelled.
    """

    target: int = 0
    apply: Literal["overwrite", "add"] = "overwrite"
    place: Literal["random", "fixed"] = "fixed"
    row: int = 0
    column: int = 0
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("trigger", self)
        if not 0 <= self.poison_rate <= 1:
            raise UserError(f"trigger: poison_rate {self.poison_rate} is not in [0, 1]")


class Loaded(NamedTuple):
    """What is known of a trigger.

    Attributes:
      pattern: [h, w, 1 or 3] float32, in [0, 1] (a trigger that is added may be in [-1, 1]).
      mask: [h, w, 1] float32 in [0, 1], where the pattern covers.
      place: row and column of the top-left corner, "random", or None where unknown.
      target: class it leads to; None where unknown.
      apply: "overwrite", "add", or None where unknown.
    """

    pattern: np.ndarray
    mask: np.ndarray
    place: tuple[int, int] | Literal["random"] | None = None
    target: int | None = None
    apply: str | None = None


class Trigger(NamedTuple):
    """pattern [h, w, C], mask [h, w, 1], place [2] int32 (row, column; unused when places are random)."""

    pattern: Array
    mask: Array
    place: Array


def make(image_shape: tuple[int, int, int], classes: int, config: Config, loaded: Loaded) -> tuple[Attack, Trigger]:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`, and its trigger.

    Raises: UserError when the target is out of range, or the trigger does not fit the images or its place.
    """
    height, width, channels = image_shape
    h, w = loaded.pattern.shape[:2]
    if not 0 <= config.target < classes:
        raise UserError(f"trigger: target {config.target} is out of range; the model has classes 0..{classes - 1}")
    if h > height or w > width:
        raise UserError(f"trigger: {h}x{w} pixels do not fit {height}x{width} images; make it smaller")
    if config.place == "fixed" and not (0 <= config.row <= height - h and 0 <= config.column <= width - w):
        raise UserError(
            f"trigger: place ({config.row}, {config.column}) puts {h}x{w} pixels outside {height}x{width} images; "
            f"the last place that fits is ({height - h}, {width - w})"
        )
    place = jnp.array([config.row, config.column], jnp.int32)
    trigger = Trigger(jnp.asarray(_match(loaded.pattern, channels)), jnp.asarray(loaded.mask), place)

    def init(key: Key) -> Trigger:
        """The given trigger; nothing is random."""
        del key
        return trigger

    def stamp_one(image: Array, trigger: Trigger, place: Array) -> Array:
        mask = image_ops.paste(jnp.zeros((height, width, 1)), trigger.mask, place)
        pattern = image_ops.paste(jnp.zeros_like(image), trigger.pattern, place)
        if config.apply == "add":
            return jnp.clip(image + mask * pattern, 0, 1)
        return image_ops.blend(image, pattern, mask)

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Every image of [B, H, W, C] with the trigger; pixels outside its mask are unchanged, bit for bit."""
        if config.place == "random":
            places = image_ops.random_places(key, images.shape[0], image_shape, (h, w))
        else:
            places = jnp.broadcast_to(trigger.place, (images.shape[0], 2))
        return jax.vmap(stamp_one, (0, None, 0))(images, trigger, places)

    def relabel(labels: Array) -> Array:
        return jnp.full_like(labels, config.target)

    def poison(key: Key, trigger: Trigger, batch: Batch) -> Batch:
        choose_key, stamp_key = jax.random.split(key)
        chosen = jax.random.bernoulli(choose_key, config.poison_rate, batch.labels.shape)
        images = jnp.where(chosen[:, None, None, None], stamp(stamp_key, trigger, batch.images), batch.images)
        return Batch(images, jnp.where(chosen, relabel(batch.labels), batch.labels))

    return Attack(init, stamp, poison, relabel), trigger


def _match(pattern: np.ndarray, channels: int) -> np.ndarray:
    """`pattern` [h, w, 1 or 3] with the images' channels; grey fits colour, and colour that is grey fits grey."""
    if pattern.shape[2] == channels:
        return pattern
    if pattern.shape[2] == 1:
        return np.repeat(pattern, channels, axis=2)
    if channels == 1 and (pattern == pattern[..., :1]).all():
        return pattern[..., :1]
    raise UserError(f"trigger has {pattern.shape[2]} channels, the model takes {channels}; convert the trigger")
