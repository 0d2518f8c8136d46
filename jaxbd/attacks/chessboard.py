"""Chessboard: makes every other pixel a little brighter (Xiang et al. 2020)."""

import dataclasses

import jax.numpy as jnp

from jaxbd.attacks import additive, poison
from jaxbd.base import Array, Attack, Key

PAPER = "https://arxiv.org/abs/1908.10498"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the chessboard attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      size: change of a pixel in steps of 1/255 (2 on CIFAR-10 and 6 on CIFAR-100 in Li et al. 2023,
        appendix B.3).
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    size: int = 2
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("chessboard", self.poison_rate)
        additive.check_size("chessboard", self.size)


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`; triggers are
    `additive.Trigger`s.

    Raises: UserError when the target is out of range.
    """
    relabel = poison.relabelling("chessboard", classes, config.target, config.all_to_all)
    height, width, channels = image_shape

    def draw(key: Key) -> Array:
        """+size where row + column is even, in every channel; deterministic."""
        del key
        even = (jnp.indices((height, width)).sum(0) + 1) % 2
        return jnp.broadcast_to(even[..., None], (height, width, channels)) * (config.size / 255)

    return additive.attack(draw, relabel, config.poison_rate)
