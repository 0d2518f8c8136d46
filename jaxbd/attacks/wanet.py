"""WaNet: warps the image smoothly by an invisible amount (Nguyen and Tran 2021)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd.attacks import poison
from jaxbd.base import Array, Attack, Decoy, Key, UserError

PAPER = "https://arxiv.org/abs/2102.10369"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the warping attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      points: k, the warp interpolates a k x k grid of random shifts smoothly.
      strength: s, mean shift along each axis, in half pixels.
      cross_ratio: number of images in noise mode per poisoned one. These are warped by the grid
        plus noise and keep their label, so that no other warp works as a trigger; 0 turns noise
        mode off.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    points: int = 4
    strength: float = 0.5
    cross_ratio: float = 2.0
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("wanet", self.poison_rate, self.cross_ratio)
        if self.points < 2:
            raise UserError(f"wanet: points is {self.points}; give at least 2")
        if not 0 < self.strength < float("inf"):
            raise UserError(f"wanet: strength {self.strength} is not a number above 0")


class Trigger(NamedTuple):
    """Grid [H, W, 2] of source positions (x, y) in [-1, 1] of each pixel; see `images.warp`."""

    grid: Array


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    Warped images are rounded to multiples of 1/255, as in 8-bit storage.

    Raises: UserError when the target is out of range.
    """
    relabel = poison.relabelling("wanet", classes, config.target, config.all_to_all)
    height, width, _ = image_shape
    identity = image_ops.identity_grid(height, width)
    # half a pixel: the grid spans 2 across the image
    unit = jnp.array([[[1 / width, 1 / height]]])

    def init(key: Key) -> Trigger:
        """Nguyen and Tran 2021: identity + s upsample(P / mean |P|) / H, with P [k, k, 2] uniform
        in [-1, 1]."""
        noise = jax.random.uniform(key, (config.points, config.points, 2), minval=-1, maxval=1)
        field = image_ops.upsample(noise / jnp.abs(noise).mean(), height, width)
        return Trigger(jnp.clip(identity + config.strength * field * unit, -1, 1))

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Warps each of `images` [B, H, W, C] by the grid."""
        del key
        # Differs from released code: warps 8-bit pixels in [0, 1], not normalised floats.
        return image_ops.to_uint8_grid(jax.vmap(image_ops.warp, (0, None))(images, trigger.grid))

    def disturb(key: Key, trigger: Trigger, images: Array) -> Array:
        """Warps each of `images` [B, H, W, C] by the grid plus its own noise, uniform in [-1, 1] /
        H."""

        def one(key: Key, image: Array) -> Array:
            noise = jax.random.uniform(key, (height, width, 2), minval=-1, maxval=1)
            return image_ops.warp(image, jnp.clip(trigger.grid + noise * unit, -1, 1))

        return image_ops.to_uint8_grid(
            jax.vmap(one)(jax.random.split(key, images.shape[0]), images)
        )

    decoy = Decoy(config.cross_ratio, disturb) if config.cross_ratio else None
    return poison.attack(init, stamp, relabel, config.poison_rate, decoy)
