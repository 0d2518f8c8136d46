"""Projected gradient ascent on the loss of a net within a small ball around an image (Madry et al.
2018)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key, Net, UserError, Variables, check_choices
from jaxbd.images import image_shape_of

L2 = 300.0
"""Radius of the L2 ball on 32x32x3 images in steps of 1/255 (the images released with Turner et al.
2019)."""
LINF = 16.0
"""Radius of the L-infinity ball in steps of 1/255 (the clean-label attacks of ANP and
TrojanZoo)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the ascent.

    Attributes:
      norm: of the ball: "linf", the largest change of a value, or "l2", the Euclidean length of all
        changes.
      epsilon: radius in steps of 1/255. Default: 16 for "linf"; for "l2" 300 on 32x32x3 images, and
        in proportion to the root of the number of values on others.
      steps: of the ascent.
      step_size: length of a step in steps of 1/255. Default: 2.5 epsilon / steps, so that the
        ball's edge is reached from anywhere in it.
      random_start: from a uniformly random place in the ball, instead of the image itself.
    """

    norm: Literal["linf", "l2"] = "linf"
    epsilon: float | None = None
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self):
        check_choices("pgd", self)
        for name in ("epsilon", "step_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(
                    f"pgd: {name} {value} is not a number above 0; it is in steps of 1/255"
                )
        if self.steps < 1:
            raise UserError(f"pgd: steps is {self.steps}; give at least 1")


def radius(config: Config, image_shape: tuple[int, int, int]) -> float:
    """The ball's radius for images of `image_shape` (H, W, C), of pixels in [0, 1]."""
    by_default = (
        LINF if config.norm == "linf" else L2 * math.sqrt(math.prod(image_shape) / (32 * 32 * 3))
    )
    return (by_default if config.epsilon is None else config.epsilon) / 255


def perturb(
    key: Key, net: Net, variables: Variables, images: Array, labels: Array, config: Config
) -> Array:
    """Images [B, H, W, C] that the net in evaluation takes for anything but their `labels` [B].

    d <- P(d + a g(dL/dd)) for the cross-entropy L of x + d, with g the sign or the unit vector and
    P the projection to the ball and to pixels in [0, 1] (Madry et al. 2018, section 2.1). Every
    image is on its own.
    """
    epsilon = radius(config, image_shape_of(images))
    length = 2.5 * epsilon / config.steps if config.step_size is None else config.step_size / 255

    def loss(change: Array) -> Array:
        logits, _ = net.apply(variables, images + change)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
        return -chosen.sum()

    def climb(_: int, change: Array) -> Array:
        gradient = jax.grad(loss)(change)
        step = (
            jnp.sign(gradient)
            if config.norm == "linf"
            else gradient / jnp.maximum(lengths(gradient), 1e-12)
        )
        return project(change + length * step, images, epsilon, config.norm)

    first = jnp.zeros_like(images)
    if config.random_start:
        first = project(_inside(key, images, epsilon, config.norm), images, epsilon, config.norm)
    return images + jax.lax.fori_loop(0, config.steps, climb, first)


def project(change: Array, images: Array, epsilon: float, norm: Literal["linf", "l2"]) -> Array:
    """The `change` [B, H, W, C] brought into the ball of radius `epsilon`, and `images` + it into
    [0, 1]."""
    if norm == "linf":
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        change = change * jnp.minimum(1, epsilon / jnp.maximum(lengths(change), 1e-12))
    return jnp.clip(images + change, 0, 1) - images


def lengths(change: Array) -> Array:
    """L2 norm of each of [B, H, W, C], as [B, 1, 1, 1]."""
    return jnp.sqrt(jnp.square(change).sum((1, 2, 3), keepdims=True))


def _inside(key: Key, images: Array, epsilon: float, norm: Literal["linf", "l2"]) -> Array:
    """A uniformly random change [B, H, W, C] in the ball, for each image its own."""
    direction_key, radius_key = jax.random.split(key)
    if norm == "linf":
        return jax.random.uniform(direction_key, images.shape, images.dtype, -epsilon, epsilon)
    direction = jax.random.normal(direction_key, images.shape, images.dtype)
    share = jax.random.uniform(radius_key, (images.shape[0], 1, 1, 1), images.dtype)
    # the volume within r of the centre grows as r^n
    return direction / lengths(direction) * epsilon * share ** (1 / math.prod(images.shape[1:]))
