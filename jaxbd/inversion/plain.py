"""Plain patch: searches for the colours of a solid box around a mask that Neural Cleanse found.

The smallest mask that works is speckled and barely works. An attacker's patch fills its box and
works by a wide margin. Nets distinguish the two in their first layers, so a correction learnt on
one may not carry over to the other.
"""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbd import losses
from jaxbd.base import Array, Batch, Cell, Inversion, Key, Net, UserError, Variables
from jaxbd.images import blend

PAPER = "https://arxiv.org/abs/2308.09850"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the plain patch.

    Attributes:
      grid: the box interpolates `grid` x `grid` colours bilinearly; 1 for a single colour.
      learning_rate: Adam's, on the colours before squashing to (0, 1).
    """

    grid: int = 1
    learning_rate: float = 0.2

    def __post_init__(self):
        if self.grid < 1 or not self.learning_rate > 0:
            raise UserError("plain: grid must be at least 1 and learning_rate > 0")


class State(NamedTuple):
    """State of the search.

    Attributes:
      step: [] int32.
      box: [4] int32: first row, first column, and the row and column after the last ones; initially
        the whole image.
      colours: [grid, grid, C] before squashing to (0, 1).
      opt: Adam's state.
    """

    step: Array
    box: Array
    colours: Array
    opt: optax.OptState


class Info(NamedTuple):
    """Batch ASR, and mean margin of the target's logit over the largest other logit; both []."""

    attack_success_rate: Array
    margin: Array


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """Plain patches for victims of architecture `net` on images of `image_shape` (H, W, C); levels
    are ignored.

    The caller must replace `box` in the state from `init`, see `box_of`.
    """
    height, width, channels = image_shape
    optimiser = optax.adam(config.learning_rate)

    def init(key: Key) -> State:
        del key
        colours = jnp.zeros((config.grid, config.grid, channels))
        box = jnp.array([0, 0, height, width], jnp.int32)
        return State(jnp.zeros((), jnp.int32), box, colours, optimiser.init(colours))

    def paint(box: Array, colours: Array) -> tuple[Array, Array]:
        """Pattern [H, W, C] and mask [H, W, 1]."""
        down, across = (
            _shares(side, box[i], box[i + 2], config.grid) for i, side in enumerate((height, width))
        )
        pattern = jnp.einsum("hg,wk,gkc->hwc", down, across, jax.nn.sigmoid(colours))
        inside = [
            (jnp.arange(side) >= box[i]) & (jnp.arange(side) < box[i + 2])
            for i, side in enumerate((height, width))
        ]
        mask = (inside[0][:, None] & inside[1][None, :])[..., None].astype(pattern.dtype)
        return pattern, mask

    def put_patch(images: Array, box: Array, colours: Array) -> Array:
        pattern, mask = paint(box, colours)
        return blend(images, pattern[None], mask[None])

    def loss(colours: Array, state: State, batch: Batch, cell: Cell, victim: Variables):
        logits, _ = net.apply(victim, put_patch(batch.images, state.box, colours), train=False)
        aims = losses.aims(batch.labels, cell.target)
        # maximises the margin, so that the patch works by far and not just barely
        wanted = jax.nn.one_hot(aims, logits.shape[-1], dtype=bool)
        others = jnp.where(wanted, -jnp.inf, logits).max(-1)
        margin = (jnp.where(wanted, logits, 0).sum(-1) - others).mean()
        return -margin, (logits.argmax(-1) == aims).mean()

    def step(
        key: Key, state: State, batch: Batch, cell: Cell, victim: Variables
    ) -> tuple[State, Info]:
        del key
        (value, success), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.colours, state, batch, cell, victim
        )
        updates, opt = optimiser.update(gradient, state.opt)
        colours = cast(Array, optax.apply_updates(state.colours, updates))
        return State(state.step + 1, state.box, colours, opt), Info(success, -value)

    def sample(key: Key, state: State, count: int) -> Array:
        """The patch on black, `count` times: [count, H, W, C]."""
        del key
        pattern, mask = paint(state.box, state.colours)
        return jnp.broadcast_to(mask * pattern, (count, *image_shape))

    def stamp(key: Key, state: State, images: Array) -> Array:
        """Puts the patch on each of `images` [B, H, W, C]; pixels outside it do not change."""
        del key
        return put_patch(images, state.box, state.colours)

    return Inversion(init, step, stamp, sample)


def _shares(side: int, first: Array, end: Array, grid: int) -> Array:
    """Bilinear weights [side, grid] of the grid's colours in each row (or column) of the image."""
    # centre of each pixel, in cells of the grid
    place = (jnp.arange(side) - first + 0.5) / (end - first) * grid - 0.5
    place = jnp.clip(place, 0, grid - 1)
    return jnp.clip(1 - jnp.abs(place[:, None] - jnp.arange(grid)[None]), 0, 1)


def box_of(mask: np.ndarray, least: float = 0.25) -> np.ndarray | None:
    """The smallest box [4] int32 around the values of `mask` [H, W, 1] above `least`; None if there
    are none."""
    rows, columns = (
        np.flatnonzero((np.asarray(mask)[..., 0] > least).any(axis)) for axis in (1, 0)
    )
    if not len(rows):
        return None
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.int32)
