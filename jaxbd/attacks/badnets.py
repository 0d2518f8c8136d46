"""BadNets: a patch overwrites part of the image, and the attacker sets the label (Gu et al.
2017)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import patch, poison
from jaxbd.attacks.patch import Kind, Trigger, bits_to_pattern
from jaxbd.base import Array, Attack, Key, check_choices

PAPER = "https://arxiv.org/abs/1708.06733"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the patch attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      patch: side of the square patch, in pixels.
      pattern: "color": uniform random values, independent per channel; "binary": random black and
        white, the same in all channels; "checkerboard", black in the top-left corner, or
        "inverse-checkerboard", white there (tri1 and tri2 of Yan et al. 2023, released code);
        "white"; or a number: the bits of a black-and-white square, row by row, most significant
        bit at the top left (Qiao et al. 2019, section 4.3; see `binary_patterns`).
      place: "random": a new place on every image; "fixed": at (`row`, `column`); "drawn": a place
        drawn once with the pattern, the same on all images (Li et al. 2023, section 5.1).
      row: of the top-left corner of a fixed place; negative numbers count from the last row that
        fits.
      column: likewise.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    patch: int = 3
    pattern: Kind | int = "color"
    place: Literal["random", "fixed", "drawn"] = "random"
    row: int = -1
    column: int = -1
    poison_rate: float = 0.01

    def __post_init__(self):
        check_choices("badnets", self)
        poison.check_rate("badnets", self.poison_rate)
        patch.check("badnets", self.patch, self.pattern)


def make(image_shape: tuple[int, int, int], classes: int, config: Config) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`.

    Raises: UserError when the target is out of range or the patch or its place does not fit.
    """
    side, channels = config.patch, image_shape[2]
    relabel = poison.relabelling("badnets", classes, config.target, config.all_to_all)
    place_of = patch.fixed("badnets", image_shape, side, config.row, config.column)

    def init(key: Key) -> Trigger:
        place = jnp.array(place_of, jnp.int32)
        if config.place == "drawn":
            # a key of its own, so that the pattern is the same for every kind of place
            place = image_ops.random_places(
                jax.random.fold_in(key, 1), 1, image_shape, (side, side)
            )[0]
        return Trigger(patch.draw(key, config.pattern, side, channels), place)

    def stamp(key: Key, trigger: Trigger, images: Array) -> Array:
        """Puts the patch on each of `images` [B, H, W, C]; pixels outside it are unchanged, bit for
        bit."""
        if config.place == "random":
            places = image_ops.random_places(key, images.shape[0], image_shape, (side, side))
        else:
            places = jnp.broadcast_to(trigger.place, (images.shape[0], 2))
        return jax.vmap(image_ops.paste, (0, None, 0))(images, trigger.pattern, places)

    return poison.attack(init, stamp, relabel, config.poison_rate)


def binary_patterns(side: int = 3) -> list[int]:
    """One black-and-white pattern of each class that is equal up to rotation, reflection and colour
    inversion.

    For 3x3 these are the 51 triggers of Qiao et al. 2019, section 4.3: the 512 patterns have 51
    orbits under the square's symmetry group times inversion. Each orbit is represented by its
    smallest number.
    """
    weights = 1 << np.arange(side * side - 1, -1, -1).reshape(side, side)

    def representative(bits: int) -> int:
        grid = bits_to_pattern(bits, side).astype(int)
        turned = [np.rot90(flip, turns) for flip in (grid, grid.T) for turns in range(4)]
        return int(min(min((g * weights).sum(), ((1 - g) * weights).sum()) for g in turned))

    return sorted({representative(bits) for bits in range(2 ** (side * side))})
