"""Neural Cleanse: a pattern and a transparency mask, as small as still works (Wang et al. 2019)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import losses
from jaxbd.base import Array, Batch, Cell, Inversion, Key, Net, UserError, Variables
from jaxbd.images import blend

PAPER = "https://ieeexplore.ieee.org/document/8835365"
COST_DOWN = 1.5
"""The cost is divided by `cost_multiplier ** COST_DOWN` (released code)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of Neural Cleanse; defaults follow the released code's example script.

    Attributes:
      learning_rate: Adam on pattern and mask.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      attack_threshold: batch ASR at which the mask counts as working.
      first_cost: weight of the mask's L1 norm once the mask works; 0 before.
      cost_multiplier: the weight grows by it after `patience` working steps in a row, and shrinks by its power 1.5
        after as many that do not work.
      patience: steps in a row after which the weight changes.
    """

    learning_rate: float = 0.1
    b1: float = 0.5
    b2: float = 0.9
    # Differs from released code: one step is one mini-batch, not 31 of them, so the threshold is 0.97, not 0.99.
    attack_threshold: float = 0.97
    first_cost: float = 1e-3
    cost_multiplier: float = 2.0
    patience: int = 5

    def __post_init__(self):
        if not 0 < self.attack_threshold <= 1:
            raise UserError(f"neural-cleanse: attack_threshold {self.attack_threshold} is not in (0, 1]")
        if self.learning_rate <= 0 or self.patience < 1 or self.cost_multiplier <= 1 or self.first_cost <= 0:
            raise UserError("neural-cleanse: need learning_rate, first_cost > 0, patience >= 1, cost_multiplier > 1")


class Parameters(NamedTuple):
    """mask [H, W, 1] and pattern [H, W, C] before the squashing (tanh + 1) / 2."""

    mask: Array
    pattern: Array


class State(NamedTuple):
    """What the search needs to go on.

    Attributes:
      step: [] int32.
      parameters, opt: the current mask and pattern and their Adam state.
      cost: [] weight of the mask norm.
      worked, failed: [] int32, consecutive steps at or above, and below, the threshold.
      best_mask [H, W, 1], best_pattern [H, W, C]: in [0, 1], of the smallest mask that worked; the current ones as
        long as none has.
      best_norm: [] its L1 norm, inf as long as none has worked.
    """

    step: Array
    parameters: Parameters
    opt: optax.OptState
    cost: Array
    worked: Array
    failed: Array
    best_mask: Array
    best_pattern: Array
    best_norm: Array


class Info(NamedTuple):
    """Batch ASR, L1 norm of the current mask, cross-entropy, cost; all []."""

    attack_success_rate: Array
    mask_norm: Array
    loss: Array
    cost: Array


def squash(value: Array) -> Array:
    """(tanh(value) + 1) / 2, in [0, 1]."""
    return (jnp.tanh(value) + 1) / 2


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """Neural Cleanse for victims of architecture `net` on images of `image_shape` (H, W, C); levels are ignored."""
    height, width, _ = image_shape
    optimiser = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)

    def init(key: Key) -> State:
        """Mask and pattern uniform in [0, 1], as released."""
        mask_key, pattern_key = jax.random.split(key)
        limit = 1 - 1e-3
        mask = jax.random.uniform(mask_key, (height, width, 1))
        pattern = jax.random.uniform(pattern_key, image_shape)
        parameters = Parameters(*(jnp.arctanh((2 * value - 1) * limit) for value in (mask, pattern)))
        zero = jnp.zeros((), jnp.int32)
        cost = jnp.zeros(())
        norm = jnp.full_like(cost, jnp.inf)
        return State(zero, parameters, optimiser.init(parameters), cost, zero, zero, mask, pattern, norm)

    def loss(parameters: Parameters, cost: Array, batch: Batch, cell: Cell, victim: Variables):
        mask, pattern = squash(parameters.mask), squash(parameters.pattern)
        logits, _ = net.apply(victim, blend(batch.images, pattern[None], mask[None]), train=False)
        entropy = losses.cross_entropy(logits, jnp.full_like(batch.labels, cell.target))
        # Wang et al. 2019, eq. (3): cross-entropy to the target + lambda |m|_1
        return entropy + cost * mask.sum(), (entropy, logits, mask, pattern)

    def schedule(state: State, success: Array) -> tuple[Array, Array, Array]:
        """The next cost and run lengths: up after `patience` working steps, down after as many failing ones."""
        works = success >= config.attack_threshold
        worked = jnp.where(works, state.worked + 1, 0)
        failed = jnp.where(works, 0, state.failed + 1)
        up, down = worked >= config.patience, failed >= config.patience
        raised = jnp.where(state.cost == 0, config.first_cost, state.cost * config.cost_multiplier)
        lowered = state.cost / config.cost_multiplier**COST_DOWN
        cost = jnp.where(up, raised, jnp.where(down, lowered, state.cost))
        return cost, jnp.where(up, 0, worked), jnp.where(down, 0, failed)

    def step(key: Key, state: State, batch: Batch, cell: Cell, victim: Variables) -> tuple[State, Info]:
        del key
        grad = jax.value_and_grad(loss, has_aux=True)
        (_, aux), gradient = grad(state.parameters, state.cost, batch, cell, victim)
        entropy, logits, mask, pattern = aux
        success = (logits.argmax(-1) == cell.target).mean()
        norm = mask.sum()
        better = (success >= config.attack_threshold) & (norm < state.best_norm)
        keep = better | jnp.isinf(state.best_norm)
        updates, opt = optimiser.update(gradient, state.opt)
        state = State(
            state.step + 1,
            optax.apply_updates(state.parameters, updates),
            opt,
            *schedule(state, success),
            jnp.where(keep, mask, state.best_mask),
            jnp.where(keep, pattern, state.best_pattern),
            jnp.where(better, norm, state.best_norm),
        )
        return state, Info(success, norm, entropy, state.cost)

    def sample(key: Key, state: State, count: int) -> Array:
        """mask * pattern of the best trigger, `count` times: [count, H, W, C]."""
        del key
        return jnp.broadcast_to(state.best_mask * state.best_pattern, (count, *image_shape))

    def stamp(key: Key, state: State, images: Array) -> Array:
        """(1 - mask) * image + mask * pattern on every image of [B, H, W, C]; nothing is random."""
        del key
        return blend(images, state.best_pattern[None], state.best_mask[None])

    return Inversion(init, step, stamp, sample)


def locate(masks: Array, side: int) -> tuple[Array, Array]:
    """Where masks [N, H, W, 1] put their weight.

    Returns: the places [N, 2] int32 (row, column) of the side x side window that holds most of each mask, and the share
    [N] of the mask's L1 norm inside it.
    """
    window = jax.lax.reduce_window(masks[..., 0], 0.0, jax.lax.add, (1, side, side), (1, 1, 1), "VALID")
    flat = window.reshape(masks.shape[0], -1)
    best = flat.argmax(-1)
    places = jnp.stack([best // window.shape[2], best % window.shape[2]], -1).astype(jnp.int32)
    return places, flat.max(-1) / jnp.maximum(masks.sum((1, 2, 3)), 1e-12)
