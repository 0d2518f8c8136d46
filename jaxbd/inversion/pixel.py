"""The pixel baseline: reverses one trigger by gradient descent on its pixels (Qiao et al. 2019,
section 4.1)."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import images as image_ops
from jaxbd import losses
from jaxbd.base import Array, Batch, Cell, Inversion, Key, Net, UserError, Variables, check_choices

PAPER = "https://arxiv.org/abs/1910.04749"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the baseline; defaults follow the released notebook.

    Attributes:
      patch: side of the square trigger.
      learning_rate: SGD's, on the pixels.
      momentum: SGD's.
      clip_every: steps between two clips of the pixels to [0, 1] (released: once per epoch of 11
        steps).
      place: "batch": one random place per batch (released), "image": one per image, "fixed": at
        (`row`, `column`).
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
    """

    patch: int = 3
    # Differs from released code: descends on pixels in [0, 1], not on normalised ones, so the same
    # learning rate moves a pixel 1 / std^2 as far.
    learning_rate: float = 0.1
    momentum: float = 0.9
    clip_every: int = 11
    place: Literal["batch", "image", "fixed"] = "batch"
    row: int = 0
    column: int = 0

    def __post_init__(self):
        check_choices("pixel", self)
        if self.patch < 1 or self.clip_every < 1 or not self.learning_rate > 0:
            raise UserError("pixel: patch and clip_every must be at least 1 and learning_rate > 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"pixel: momentum {self.momentum} is not in [0, 1)")


class State(NamedTuple):
    """Step [] int32; pattern [h, w, C], possibly outside [0, 1] between clips; velocity
    [h, w, C]."""

    step: Array
    pattern: Array
    velocity: Array


class Info(NamedTuple):
    """Batch ASR over images not of the target class, mean target confidence and cross-entropy; all
    []."""

    attack_success_rate: Array
    confidence: Array
    loss: Array


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """The baseline for victims of architecture `net` on images of `image_shape` (H, W, C).

    Raises: UserError when the trigger does not fit the image.
    """
    height, width, channels = image_shape
    side = config.patch
    if side > min(height, width):
        raise UserError(
            f"pixel: a {side}x{side} trigger does not fit {height}x{width} images; lower the patch"
        )
    if config.place == "fixed" and not (
        0 <= config.row <= height - side and 0 <= config.column <= width - side
    ):
        raise UserError(
            f"pixel: place ({config.row}, {config.column}) puts a {side}x{side} trigger outside the"
            " image"
        )

    def init(key: Key) -> State:
        shape = (side, side, channels)
        return State(jnp.zeros((), jnp.int32), jax.random.uniform(key, shape), jnp.zeros(shape))

    def places(key: Key, count: int) -> Array:
        if config.place == "fixed":
            return jnp.broadcast_to(jnp.array([config.row, config.column]), (count, 2))
        drawn = 1 if config.place == "batch" else count
        return jnp.broadcast_to(
            image_ops.random_places(key, drawn, image_shape, (side, side)), (count, 2)
        )

    def loss(pattern: Array, key: Key, batch: Batch, cell: Cell, victim: Variables):
        where = places(key, batch.images.shape[0])
        stamped = jax.vmap(image_ops.paste, (0, None, 0))(batch.images, pattern, where)
        logits, _ = net.apply(victim, stamped, train=False)
        return losses.cross_entropy(logits, jnp.full_like(batch.labels, cell.target)), logits

    def step(
        key: Key, state: State, batch: Batch, cell: Cell, victim: Variables
    ) -> tuple[State, Info]:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, logits), gradient = grad(state.pattern, key, batch, cell, victim)
        velocity = config.momentum * state.velocity + gradient
        pattern = state.pattern - config.learning_rate * velocity
        due = (state.step + 1) % config.clip_every == 0
        pattern = jnp.where(due, jnp.clip(pattern, 0, 1), pattern)
        counted = batch.labels != cell.target
        success = (counted & (logits.argmax(-1) == cell.target)).sum() / jnp.maximum(
            counted.sum(), 1
        )
        confidence = losses.target_confidence(logits, cell.target).mean()
        return State(state.step + 1, pattern, velocity), Info(success, confidence, value)

    def sample(key: Key, state: State, count: int) -> Array:
        """The trigger, clipped to [0, 1], `count` times: [count, h, w, C]."""
        del key
        return jnp.broadcast_to(jnp.clip(state.pattern, 0, 1), (count, side, side, channels))

    def stamp(key: Key, state: State, images: Array) -> Array:
        """Pastes the trigger on each of `images` [B, H, W, C]; places as configured."""
        pattern = jnp.clip(state.pattern, 0, 1)
        return jax.vmap(image_ops.paste, (0, None, 0))(
            images, pattern, places(key, images.shape[0])
        )

    return Inversion(init, step, stamp, sample)
