"""Shared parts of attacks that add a fixed pattern to the whole image: the trigger, the stamp, and
a check that the pattern survives 8 bits."""

from collections.abc import Callable
from typing import NamedTuple

from jaxbd import images as image_ops
from jaxbd.attacks import poison
from jaxbd.base import Array, Attack, Key, UserError


class Trigger(NamedTuple):
    """Pattern [H, W, C] in [-1, 1] to add to an image; multiples of 1/255."""

    pattern: Array


def check_size(method: str, size: int) -> None:
    """Raises UserError unless `size` is an integer from 1 to 255, in steps of 1/255; a smaller
    change vanishes in 8 bits."""
    if size not in range(1, 256):
        raise UserError(
            f"{method}: size {size} is not a whole number of steps of 1/255; give 1..255, such as 2"
            " for 2/255"
        )


def attack(draw: Callable[[Key], Array], relabel: Callable[[Array], Array], rate: float) -> Attack:
    """The attack that adds the pattern [H, W, C] from `draw(key)` and rounds the image to 8
    bits."""

    def init(key: Key) -> Trigger:
        return Trigger(draw(key))

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Adds the pattern to each of `images` [B, H, W, C], on the 8-bit grid; see
        `images.add_on_grid`."""
        del key
        return image_ops.add_on_grid(images, trigger.pattern[None])

    return poison.attack(init, stamp, relabel, rate)
