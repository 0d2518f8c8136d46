"""Steganography: writes a message into the lowest bits of all pixels (Li et al. 2020)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.attacks import eight_bit, poison
from jaxbd.base import Array, Attack, Key, UserError

PAPER = "https://arxiv.org/abs/1909.02742"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the steganography attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      bits: number of lowest bits of every value to overwrite; all of them get the same message bit.
        With 1, no value changes by more than 1/255, and nets hardly learn the trigger.
      text: the message, repeated until the image is full: the bits of its UTF-8 bytes, lowest
        first, along the rows of the first channel, then of the next. By default the bits are drawn
        at random.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    bits: int = 1
    text: str | None = None
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("steganography", self.poison_rate)
        if not 1 <= self.bits <= 8:
            raise UserError(f"steganography: bits is {self.bits}; a value has 8, give 1..8")
        if self.text == "":
            raise UserError("steganography: text is empty; give some text, or None for random bits")


class Trigger(NamedTuple):
    """Pattern [H, W, C] with the message's bits, and mask [H, W, 1] of the bits to replace; both in
    steps of 1/255."""

    pattern: Array
    mask: Array


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    Raises: UserError when the target is out of range.
    """
    relabel = poison.relabelling("steganography", classes, config.target, config.all_to_all)
    value = (2**config.bits - 1) / 255

    def init(key: Key) -> Trigger:
        ones = jax.random.bernoulli(key, 0.5, image_shape)
        ones = jnp.asarray(_spread_bits(config.text, image_shape)) if config.text else ones
        return Trigger(
            ones.astype(jnp.float32) * value, jnp.full((*image_shape[:2], 1), value, jnp.float32)
        )

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Writes the message into each of `images` [B, H, W, C]; see `eight_bit.replace_bits`."""
        del key
        return eight_bit.replace_bits(images, trigger.pattern[None], trigger.mask[None])

    return poison.attack(init, stamp, relabel, config.poison_rate)


def _spread_bits(text: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The bits of `text` in the order of `Config.text`: [H, W, C] of 0 and 1."""
    height, width, channels = image_shape
    bits = np.unpackbits(np.frombuffer(text.encode(), np.uint8), bitorder="little")
    # np.resize repeats the bits until the image is full
    return (
        np.resize(bits, math.prod(image_shape)).reshape(channels, height, width).transpose(1, 2, 0)
    )
