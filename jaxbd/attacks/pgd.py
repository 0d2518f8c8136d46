"""Projected gradient ascent on a net's loss within a small ball around an image (Madry et al.
2018)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key, Net, UserError, Variables, check_choices
from jaxbd.images import image_shape_of

L2 = 300.0
"""Default radius of the L2 ball on 32x32x3 images in steps of 1/255 (the images released with
Turner et al. 2019)."""
LINF = 16.0
"""Default radius of the L-infinity ball in steps of 1/255 (the clean-label attacks of ANP and
TrojanZoo)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the ascent.

    Attributes:
      norm: of the ball: "linf", the largest change of a value, or "l2", the Euclidean length of all
        changes.
      epsilon: radius in steps of 1/255. Default: 16 for "linf"; for "l2" 300 on 32x32x3 images,
        scaled with the square root of the number of values on others.
      steps: number of ascent steps.
      step_size: length of a step, in units of 1/255. Default: 2.5 epsilon / steps, enough to reach
        the ball's edge from any point in it.
      random_start: whether to start at a uniformly random point in the ball instead of the image
        itself.
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
    """The ball's radius for images of `image_shape` (H, W, C), with pixels in [0, 1]."""
    by_default = (
        LINF if config.norm == "linf" else L2 * math.sqrt(math.prod(image_shape) / (32 * 32 * 3))
    )
    return (by_default if config.epsilon is None else config.epsilon) / 255


def perturb(
    key: Key, net: Net, variables: Variables, images: Array, labels: Array, config: Config
) -> Array:
    """Perturbs `images` [B, H, W, C] so that the net, in evaluation, no longer predicts `labels`
    [B].

    d <- P(d + a g(dL/dd)) for the cross-entropy L of x + d, with g the sign or the unit vector and
    P the projection to the ball and to pixels in [0, 1] (Madry et al. 2018, section 2.1). Images do
    not influence each other.
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
    """Projects `change` [B, H, W, C] to the ball of radius `epsilon`, then clips it so that
    `images` + change is in [0, 1]."""
    if norm == "linf":
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        change = change * jnp.minimum(1, epsilon / jnp.maximum(lengths(change), 1e-12))
    return jnp.clip(images + change, 0, 1) - images


def lengths(change: Array) -> Array:
    """L2 norm [B, 1, 1, 1] of each change in [B, H, W, C]."""
    return jnp.sqrt(jnp.square(change).sum((1, 2, 3), keepdims=True))


def _inside(key: Key, images: Array, epsilon: float, norm: Literal["linf", "l2"]) -> Array:
    """Draws a uniformly random change in the ball for each image: [B, H, W, C]."""
    direction_key, radius_key = jax.random.split(key)
    if norm == "linf":
        return jax.random.uniform(direction_key, images.shape, images.dtype, -epsilon, epsilon)
    direction = jax.random.normal(direction_key, images.shape, images.dtype)
    share = jax.random.uniform(radius_key, (images.shape[0], 1, 1, 1), images.dtype)
    # the n-th root makes the draw uniform: the volume within radius r grows as r^n
    return direction / lengths(direction) * epsilon * share ** (1 / math.prod(images.shape[1:]))
