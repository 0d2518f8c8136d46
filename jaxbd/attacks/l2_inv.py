"""Invisible trigger of bounded L2 norm: a smooth, faint pattern over the whole image (Li et al.
2020)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import images as image_ops
from jaxbd.attacks import additive, poison
from jaxbd.base import Array, Attack, Key, UserError

PAPER = "https://arxiv.org/abs/1909.02742"
NORM = 3.22
"""L2 norm of the pattern released with I-BAU, on 32x32x3 pixels in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the attack.

    Attributes:
      target: class every triggered image should become (all-to-one).
      all_to_all: map every class c to c + 1 mod K instead; `target` is ignored.
      norm: maximum L2 norm of the pattern, for pixels in [0, 1]; by default 3.22 on 32x32x3 images,
        scaled with the square root of the number of values on others.
      points: the pattern interpolates a grid of this many by this many random values smoothly.
      poison_rate: share of a batch's images to stamp and relabel.
    """

    target: int = 0
    all_to_all: bool = False
    norm: float | None = None
    points: int = 8
    poison_rate: float = 0.01

    def __post_init__(self):
        poison.check_rate("l2-inv", self.poison_rate)
        if self.norm is not None and not 0 < self.norm < math.inf:
            raise UserError(f"l2-inv: norm {self.norm} is not a number above 0")
        if self.points < 2:
            raise UserError(f"l2-inv: points is {self.points}; give at least 2")


def make(
    image_shape: tuple[int, int, int],
    classes: int,
    config: Config,
    pattern: np.ndarray | None = None,
) -> Attack:
    """The attack on images of `image_shape` (H, W, C) with K = `classes`; triggers are
    `additive.Trigger`s.

    Args:
      pattern: [H, W, C] in [-1, 1], rounded to multiples of 1/255 towards zero; drawn at random by
        default. For a pattern in a file use `interop.trigger.load` and `attacks.given`
        (apply="add") instead.
    Raises: UserError when the target is out of range, when the norm is so small that the pattern
      vanishes in 8 bits, or when the pattern does not fit the images or the norm.
    """
    relabel = poison.relabelling("l2-inv", classes, config.target, config.all_to_all)
    values = math.prod(image_shape)
    norm = NORM * math.sqrt(values / (32 * 32 * 3)) if config.norm is None else config.norm
    if norm < math.sqrt(values) / 255:
        raise UserError(
            f"l2-inv: with norm {norm:.3g} a pattern on {values} values vanishes in 8 bits; give at"
            f" least {math.sqrt(values) / 255:.3g}"
        )
    given = None
    if pattern is not None:
        given = _round_to_grid(_check_pattern(pattern, image_shape, config.norm))

    def draw(key: Key) -> Array:
        """The pattern; rounding towards zero keeps it within the norm."""
        if given is not None:
            return given
        noise = jax.random.normal(key, (config.points, config.points, image_shape[2]))
        # the released pattern darkens no value and changes only about every second one
        field = jnp.maximum(image_ops.upsample(noise, *image_shape[:2]), 0)
        return _round_to_grid(jnp.minimum(field * (norm / jnp.linalg.norm(field.ravel())), 1))

    return additive.attack(draw, relabel, config.poison_rate)


def _round_to_grid(pattern: Array) -> Array:
    """`pattern` rounded to multiples of 1/255 towards zero."""
    # the 1e-3 saves values that rounding errors left just below their multiple
    return jnp.trunc(pattern * 255 + 1e-3 * jnp.sign(pattern)) / 255


def _check_pattern(
    pattern: np.ndarray, image_shape: tuple[int, int, int], norm: float | None
) -> Array:
    """`pattern` as float32. Raises: UserError unless it fits the images, [-1, 1] and `norm`."""
    pattern = np.asarray(pattern, np.float32)
    if pattern.shape != tuple(image_shape):
        raise UserError(
            f"l2-inv: the pattern is {list(pattern.shape)}, the images {list(image_shape)};"
            " convert it"
        )
    if not np.isfinite(pattern).all() or not 1 / 256 < np.abs(pattern).max() <= 1:
        raise UserError(
            "l2-inv: the pattern has values outside [-1, 1] or changes no value by 1/255; give"
            " changes of pixels in [0, 1]"
        )
    found = float(np.linalg.norm(pattern))
    if norm is not None and found > norm * 1.001:
        raise UserError(
            f"l2-inv: the pattern's norm is {found:.4g}, more than {norm}; scale it or raise norm"
        )
    return jnp.asarray(pattern)
