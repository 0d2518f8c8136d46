"""MM-BD: maximises each class's margin over all images; a backdoor's target stands out. Needs no
data (Wang et al. 2024)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxbd.base import (
    ANY_SOURCE,
    Array,
    Cell,
    Inversion,
    Key,
    Net,
    UserError,
    Variables,
    check_targets,
)

PAPER = "https://arxiv.org/abs/2205.06900"
LEAST_CLASSES = 3
"""With two classes each margin is the negative of the other, so no class is left to fit the null
distribution to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the search.

    Attributes:
      learning_rate: step along the margin's plain gradient, pixels in [0, 1].
      stop_change: the search has converged when a step changes the margin by less than this
        fraction; 0 turns early stopping off.
    """

    learning_rate: float = 1e-2
    stop_change: float = 1e-5

    def __post_init__(self):
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"margin: learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.stop_change < 1:
            raise UserError(f"margin: stop_change must be in [0, 1), got {self.stop_change}")


class State(NamedTuple):
    """State of the search.

    Attributes:
      step: [] int32.
      image: [H, W, C] in [0, 1], the current image.
      best: [H, W, C] in [0, 1], the image with the largest margin so far; initially the first
        image.
      best_margin: [] in logits, -inf before the first step.
      margin: [] in logits, of the last step; 0 before the first.
      change: [] relative change of the margin in the last step; inf before the second step.
    """

    step: Array
    image: Array
    best: Array
    best_margin: Array
    margin: Array
    change: Array


class Info(NamedTuple):
    """Margin of the current image and L2 norm of its gradient; both [], in logits."""

    margin: Array
    gradient_norm: Array


def margin(logits: Array, target: Array) -> Array:
    """z_t - max over k != t of z_k, [B] for `logits` [B, K] and `target` t []; Wang et al. 2024,
    eq. (2)."""
    wanted = jnp.arange(logits.shape[-1])[None] == target
    others = jnp.where(wanted, -jnp.inf, logits).max(-1)
    return jnp.where(wanted, logits, 0).sum(-1) - others


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """The search for victims of architecture `net` on images of `image_shape` (H, W, C).

    A cell is one start for one class, see `cells`. Its source and level are ignored, and so is the
    batch, which may be None. The search uses only logits, of any scale, so the net may have any
    layers. It recovers no trigger: `stamp` returns images unchanged, and `sample` returns the image
    with the largest margin.
    """

    def init(key: Key) -> State:
        image = jax.random.uniform(key, image_shape)
        # scalars of the same type as the image, also in float64
        zero = jnp.zeros_like(image[0, 0, 0])
        return State(jnp.zeros((), jnp.int32), image, image, zero - jnp.inf, zero, zero + jnp.inf)

    def of_image(image: Array, cell: Cell, victim: Variables) -> Array:
        logits, _ = net.apply(victim, image[None], train=False)
        return margin(logits, cell.target)[0]

    def step(
        key: Key, state: State, batch: object, cell: Cell, victim: Variables
    ) -> tuple[State, Info]:
        """One projected gradient step; `batch` is ignored.

        # Differs from released code: this clips the image itself, the released code only the net's
        # input.
        """
        del key, batch
        value, gradient = jax.value_and_grad(of_image)(state.image, cell, victim)
        value = value.astype(state.margin.dtype)
        image = jnp.clip(state.image + config.learning_rate * gradient, 0, 1)
        # `value` belongs to the image before this step
        better = value > state.best_margin
        size = jnp.maximum(jnp.abs(state.margin), jnp.finfo(value.dtype).tiny)
        change = jnp.where(state.step == 0, jnp.inf, jnp.abs(value - state.margin) / size)
        state = State(
            step=state.step + 1,
            image=image,
            best=jnp.where(better, state.image, state.best),
            best_margin=jnp.maximum(value, state.best_margin),
            margin=value,
            change=change,
        )
        return state, Info(value, jnp.sqrt(jnp.square(gradient).sum()))

    def sample(key: Key, state: State, count: int) -> Array:
        """The image of the largest margin, `count` times: [count, H, W, C]."""
        del key
        return jnp.broadcast_to(state.best, (count, *image_shape))

    def stamp(key: Key, state: State, images: Array) -> Array:
        """`images` [B, H, W, C] unchanged: the search recovers no trigger."""
        del key, state
        return images

    def converged(state: State) -> Array:
        """Whether the last step changed the margin by less than `stop_change`, as released."""
        return state.change < config.stop_change

    return Inversion(init, step, stamp, sample, converged if config.stop_change else None)


def no_batch(key: Key, data: None, source: Array | int = ANY_SOURCE) -> Any:
    """A draw function for drivers that returns None: this search uses no data."""
    del key, data, source
    return None


def cells(classes: int, starts: int, targets: Sequence[int] | None = None) -> Cell:
    """`starts` cells [N] for each class of a model with K = `classes`, or for each of `targets`;
    the starts of one class are adjacent.

    Raises: UserError for fewer than three classes, `starts` below 1, no targets, or a target out of
      range.
    """
    check_classes(classes)
    if starts < 1:
        raise UserError(f"margin: starts must be at least 1, got {starts}")
    targets = range(classes) if targets is None else targets
    if not len(targets):
        raise UserError("margin: no target; give at least one class")
    check_targets(targets, classes)
    target = jnp.repeat(jnp.asarray(list(targets), jnp.int32), starts)
    return Cell(target, jnp.full_like(target, ANY_SOURCE), jnp.zeros(target.shape, jnp.float32))


def check_classes(classes: int) -> None:
    """Raises UserError if the model has too few classes for this statistic."""
    if classes < LEAST_CLASSES:
        raise UserError(
            f"margin needs at least {LEAST_CLASSES} classes, the model has {classes}: the margins"
            " of two classes mirror each other, so neither can stand out; search for triggers"
            " instead"
        )


def statistics(margins: ArrayLike, targets: ArrayLike, classes: int) -> np.ndarray:
    """r_t [K]: each class's largest margin over its starts; nan for a class without a finite one.

    Args:
      margins: [N], `best_margin` of every cell, in logits.
      targets: [N], the cells' classes.
    """
    values = np.asarray(margins, float)
    # a margin that is not finite counts as -inf, so that it never wins
    found = np.full(classes, -np.inf)
    np.maximum.at(found, np.asarray(targets), np.where(np.isfinite(values), values, -np.inf))
    return np.where(np.isfinite(found), found, np.nan)
