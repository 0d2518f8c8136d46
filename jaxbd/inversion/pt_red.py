"""PT-RED: searches for a small perturbation that sends images of one class to another (Xiang et al.
2020)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd import losses
from jaxbd.base import Array, Batch, Cell, Inversion, Key, Net, UserError, Variables, check_choices

PAPER = "https://arxiv.org/abs/1908.10498"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PT-RED.

    Attributes:
      rule: "normalised": every step has L2 length `step_size`; "sgd": every step is the gradient
        times `step_size`.
      step_size: see `rule`.
      step_noise: standard deviation s of the factor 1 + N(0, s) on `step_size`, drawn at every
        step.
      first_scale: standard deviation of the first perturbation's values.
      success_rate: pi, the share of a batch that must reach the target for the perturbation to
        succeed.
      patience: batches in a row that must reach `success_rate`. A single small batch may succeed by
        luck: most triggers that stopped at the first such batch fell short of the rate on all
        images of their source, and their norms were a tenth too small. 1 is enough if a batch holds
        all these images.
    """

    rule: Literal["normalised", "sgd"] = "normalised"
    step_size: float = 0.03
    step_noise: float = 0.0
    first_scale: float = 1e-3
    success_rate: float = 0.9
    # Differs from paper: judges batches instead of all images of the source class
    patience: int = 3

    def __post_init__(self):
        check_choices("pt-red", self)
        if not 0 < self.success_rate <= 1:
            raise UserError(f"pt-red: success_rate {self.success_rate} is not in (0, 1]")
        if (
            not (self.step_size > 0 and self.first_scale > 0 and 0 <= self.step_noise < 1)
            or self.patience < 1
        ):
            raise UserError(
                "pt-red: need step_size, first_scale > 0, 0 <= step_noise < 1, patience >= 1"
            )


def released(**over: Any) -> Config:
    """Plain gradient steps of size 1e-2 (1 + N(0, 0.1)), as in the authors' later code, which makes
    up to 1,000."""
    return Config(**{"rule": "sgd", "step_size": 1e-2, "step_noise": 0.1, **over})


class State(NamedTuple):
    """State of the search.

    Attributes:
      step: [] int32.
      perturbation: v [H, W, C].
      reached: [] int32, batches in a row that reached the success rate, each with the v of its
        step.
    """

    step: Array
    perturbation: Array
    reached: Array


class Info(NamedTuple):
    """Share of the batch sent to the target, L2 norm of the perturbation that did it,
    cross-entropy; all []."""

    attack_success_rate: Array
    norm: Array
    loss: Array


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """PT-RED for victims of architecture `net` on images of `image_shape` (H, W, C); levels are
    ignored."""

    def init(key: Key) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(zero, config.first_scale * jax.random.normal(key, image_shape), zero)

    def embed(images: Array, perturbation: Array) -> Array:
        return jnp.clip(images + perturbation[None], 0, 1)

    def loss(perturbation: Array, batch: Batch, cell: Cell, victim: Variables):
        logits, _ = net.apply(victim, embed(batch.images, perturbation), train=False)
        return losses.cross_entropy(logits, losses.aims(batch.labels, cell.target)), logits

    def length(key: Key, gradient: Array) -> Array:
        """The factor [] on the gradient."""
        size = config.step_size * (
            1 + config.step_noise * jax.random.normal(key, dtype=gradient.dtype)
        )
        if config.rule == "sgd":
            return size
        # Differs from released code: normalised, because where the victim is confident the gradient
        # vanishes, and so would a plain step
        return size / jnp.maximum(jnp.linalg.norm(gradient), jnp.finfo(gradient.dtype).tiny)

    def step(
        key: Key, state: State, batch: Batch, cell: Cell, victim: Variables
    ) -> tuple[State, Info]:
        grad = jax.value_and_grad(loss, has_aux=True)
        (entropy, logits), gradient = grad(state.perturbation, batch, cell, victim)
        success = (logits.argmax(-1) == losses.aims(batch.labels, cell.target)).mean()
        reached = jnp.where(success >= config.success_rate, state.reached + 1, 0)
        # once found, the perturbation must stay as judged: no further step
        size = jnp.where(reached >= config.patience, 0, length(key, gradient))
        info = Info(success, jnp.linalg.norm(state.perturbation), entropy)
        return State(state.step + 1, state.perturbation - size * gradient, reached), info

    def sample(key: Key, state: State, count: int) -> Array:
        """1/2 + v / (2 max |v|): the perturbation as a picture on mid-grey, `count` times:
        [count, H, W, C]."""
        del key
        peak = jnp.maximum(
            jnp.abs(state.perturbation).max(), jnp.finfo(state.perturbation.dtype).tiny
        )
        return jnp.broadcast_to(0.5 + state.perturbation / (2 * peak), (count, *image_shape))

    def stamp(key: Key, state: State, images: Array) -> Array:
        """clip(image + v, 0, 1) for each of `images` [B, H, W, C]; deterministic."""
        del key
        return embed(images, state.perturbation)

    def converged(state: State) -> Array:
        """Whether the last `patience` batches reached the success rate."""
        return state.reached >= config.patience

    def size(state: State) -> Array:
        """L2 norm of the perturbation."""
        return jnp.linalg.norm(state.perturbation)

    def works(state: State) -> Array:
        """Whether the last `patience` batches reached the success rate."""
        return converged(state)

    return Inversion(init, step, stamp, sample, converged, size, works)
