"""Neural Cleanse: searches for a pattern and the smallest transparency mask that still works (Wang
et al. 2019)."""

import dataclasses
import functools
from typing import Any, NamedTuple

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
      learning_rate: Adam's, on pattern and mask.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      attack_threshold: a mask works when the batch ASR reaches this.
      first_cost: first weight of the mask's L1 norm; the weight is 0 until `patience` steps in a
        row have worked.
      cost_multiplier: factor by which the weight grows after `patience` working steps in a row;
        after as many failing steps it shrinks by this factor to the power 1.5.
      patience: steps in a row after which the weight changes.
      first_mask: upper end of the uniform distribution from which the first mask is drawn.
      memory: weight of earlier batches in a running mean of the ASR. Both this mean and the batch
        ASR must reach the threshold. At 0 only the batch counts. Raise it for small batches, some
        of which reach any threshold by luck.
      stop_patience: steps without a smaller mask after which the search has converged, once the
        weight has gone both up and down; 0 turns early stopping off (released: 25).
      stop_ratio: a mask counts as smaller if its norm is below this factor times the norm at the
        last such improvement (released: 1).
    """

    learning_rate: float = 0.1
    b1: float = 0.5
    b2: float = 0.9
    # Differs from released code: one step is one mini-batch, not 31 of them, so the threshold is
    # 0.97, not 0.99.
    attack_threshold: float = 0.97
    first_cost: float = 1e-3
    cost_multiplier: float = 2.0
    patience: int = 5
    first_mask: float = 1.0
    memory: float = 0.0
    stop_patience: int = 0
    stop_ratio: float = 1.0

    def __post_init__(self):
        if not 0 < self.attack_threshold <= 1:
            raise UserError(
                f"neural-cleanse: attack_threshold {self.attack_threshold} is not in (0, 1]"
            )
        if (
            self.learning_rate <= 0
            or self.patience < 1
            or self.cost_multiplier <= 1
            or self.first_cost <= 0
        ):
            raise UserError(
                "neural-cleanse: need learning_rate, first_cost > 0, patience >= 1,"
                " cost_multiplier > 1"
            )
        if not (0 < self.first_mask <= 1 and 0 <= self.memory < 1):
            raise UserError("neural-cleanse: need 0 < first_mask <= 1 and 0 <= memory < 1")
        if self.stop_patience < 0 or not 0 < self.stop_ratio <= 1:
            raise UserError("neural-cleanse: need stop_patience >= 0 and 0 < stop_ratio <= 1")


def for_pairs(**over: Any) -> Config:
    """Settings for searches with one source class, hence small batches: the threshold of Xiang et
    al. 2020 and the released stopping rule."""
    settings = dict(
        attack_threshold=0.9, memory=0.8, first_mask=0.2, first_cost=1e-2, stop_patience=25
    )
    return Config(**{**settings, **over})


class Parameters(NamedTuple):
    """mask [H, W, 1] and pattern [H, W, C] before the squashing (tanh + 1) / 2."""

    mask: Array
    pattern: Array


class State(NamedTuple):
    """State of the search.

    Attributes:
      step: [] int32.
      parameters, opt: the current mask and pattern and their Adam state.
      cost: [] weight of the mask norm.
      worked, failed: [] int32, consecutive steps at or above, and below, the threshold.
      best_mask, best_pattern: [H, W, 1] and [H, W, C] in [0, 1], the smallest mask that worked and
        its pattern; the current ones until one works.
      best_norm: [] L1 norm of that mask, inf until one works.
      rate: [] running mean of the batches' ASR.
      raised, lowered: [] bool, whether a positive cost has ever gone up, and down.
      stalled: [] int32, steps since the best norm last fell below `stop_ratio` times `stop_norm`.
      stop_norm: [] best norm at that step.
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
    rate: Array
    raised: Array
    lowered: Array
    stalled: Array
    stop_norm: Array


class Info(NamedTuple):
    """Batch ASR, L1 norm of the current mask, cross-entropy, cost; all []."""

    attack_success_rate: Array
    mask_norm: Array
    loss: Array
    cost: Array


def squash(value: Array) -> Array:
    """(tanh(value) + 1) / 2, in [0, 1]."""
    return (jnp.tanh(value) + 1) / 2


class Parts(NamedTuple):
    """Constants that the functions below share: victim architecture, Adam, settings."""

    net: Net
    image_shape: tuple[int, int, int]
    optimiser: optax.GradientTransformation
    config: Config


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """Neural Cleanse for victims of architecture `net` on images of `image_shape` (H, W, C); levels
    are ignored."""
    optimiser = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)
    height, width, channels = image_shape
    parts = Parts(net, (height, width, channels), optimiser, config)
    rule = functools.partial(_has_converged, config.stop_patience)
    return Inversion(
        functools.partial(_init, parts),
        functools.partial(_step, parts),
        _stamp,
        functools.partial(_sample, parts),
        rule if config.stop_patience else None,
        _size,
        _works,
    )


def _init(parts: Parts, key: Key) -> State:
    """Draws the pattern uniformly from [0, 1] and the mask from [0, `first_mask`]; the released
    code draws both from [0, 1]."""
    height, width, _ = parts.image_shape
    mask_key, pattern_key = jax.random.split(key)
    mask = parts.config.first_mask * jax.random.uniform(mask_key, (height, width, 1))
    pattern = jax.random.uniform(pattern_key, parts.image_shape)
    fields = first_fields(mask, pattern)
    zero, never = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    infinite = jnp.zeros(()) + jnp.inf
    return State(
        step=zero,
        opt=parts.optimiser.init(fields["parameters"]),
        cost=jnp.zeros(()),
        worked=zero,
        failed=zero,
        best_norm=infinite,
        rate=jnp.zeros(()),
        raised=never,
        lowered=never,
        stalled=zero,
        stop_norm=infinite,
        **fields,
    )


def first_fields(mask: Array, pattern: Array) -> dict[str, Any]:
    """Fields of a first state that starts from `mask` [..., H, W, 1] and `pattern` [..., H, W, C],
    both in [0, 1]."""
    # scaled to just inside the range of tanh, so that arctanh stays finite
    inverse = lambda value: jnp.arctanh((2 * value - 1) * (1 - 1e-3))
    parameters = Parameters(inverse(mask), inverse(pattern))
    return dict(parameters=parameters, best_mask=mask, best_pattern=pattern)


class Seen(NamedTuple):
    """By-products of the loss: cross-entropy [], logits [B, K], mask [H, W, 1] and pattern
    [H, W, C]."""

    entropy: Array
    logits: Array
    mask: Array
    pattern: Array


def cleanse_loss(
    parameters: Parameters, net: Net, cost: Array, batch: Batch, cell: Cell, variables: Variables
) -> tuple[Array, Seen]:
    """Wang et al. 2019, eq. (3): cross-entropy to the target + lambda |m|_1; `variables` are the
    victim's."""
    mask, pattern = squash(parameters.mask), squash(parameters.pattern)
    stamped = blend(batch.images, pattern[None], mask[None])
    logits, _ = net.apply(variables, stamped, train=False)
    entropy = losses.cross_entropy(logits, losses.aims(batch.labels, cell.target))
    return entropy + cost * mask.sum(), Seen(entropy, logits, mask, pattern)


def update_cost(state: State, works: Array, config: Config) -> dict[str, Array]:
    """The next cost, run lengths and flags. The cost goes up after `patience` working steps in a
    row, and down after as many failing ones."""
    worked = jnp.where(works, state.worked + 1, 0)
    failed = jnp.where(works, 0, state.failed + 1)
    up, down = worked >= config.patience, failed >= config.patience
    # a weight of 0 cannot grow by a factor: the first rise sets it
    raised = jnp.where(state.cost == 0, config.first_cost, state.cost * config.cost_multiplier)
    lowered = state.cost / config.cost_multiplier**COST_DOWN
    return dict(
        cost=jnp.where(up, raised, jnp.where(down, lowered, state.cost)),
        worked=jnp.where(up, 0, worked),
        failed=jnp.where(down, 0, failed),
        raised=state.raised | (up & (state.cost > 0)),
        lowered=state.lowered | (down & (state.cost > 0)),
    )


def _step(
    parts: Parts, key: Key, state: State, batch: Batch, cell: Cell, variables: Variables
) -> tuple[State, Info]:
    del key
    config = parts.config
    grad = jax.value_and_grad(cleanse_loss, has_aux=True)
    (_, seen), gradient = grad(state.parameters, parts.net, state.cost, batch, cell, variables)
    success = (seen.logits.argmax(-1) == losses.aims(batch.labels, cell.target)).mean()
    # a plain mean in the first steps, so that the initial 0 has no weight
    old = jnp.minimum(config.memory, state.step / (state.step + 1)).astype(success.dtype)
    rate = old * state.rate + (1 - old) * success
    # the running mean and the batch itself must both reach the threshold
    works = jnp.minimum(rate, success) >= config.attack_threshold
    norm = seen.mask.sum()
    better = works & (norm < state.best_norm)
    smaller = better & (norm < config.stop_ratio * state.stop_norm)
    # until a mask works, the current one stands in for the best
    keep = better | jnp.isinf(state.best_norm)
    updates, opt = parts.optimiser.update(gradient, state.opt)
    new = state._replace(
        step=state.step + 1,
        parameters=optax.apply_updates(state.parameters, updates),
        opt=opt,
        **update_cost(state, works, config),
        best_mask=jnp.where(keep, seen.mask, state.best_mask),
        best_pattern=jnp.where(keep, seen.pattern, state.best_pattern),
        best_norm=jnp.where(better, norm, state.best_norm),
        rate=rate,
        stalled=jnp.where(smaller, 0, state.stalled + 1),
        stop_norm=jnp.where(smaller, norm, state.stop_norm),
    )
    return new, Info(success, norm, seen.entropy, new.cost)


def _sample(parts: Parts, key: Key, state: State, count: int) -> Array:
    """mask * pattern of the best trigger, `count` times: [count, H, W, C]."""
    del key
    return jnp.broadcast_to(state.best_mask * state.best_pattern, (count, *parts.image_shape))


def _stamp(key: Key, state: State, images: Array) -> Array:
    """(1 - mask) * image + mask * pattern for each of `images` [B, H, W, C]; deterministic."""
    del key
    return blend(images, state.best_pattern[None], state.best_mask[None])


def _has_converged(stop_patience: int, state: State) -> Array:
    """Whether the weight has gone up and down and the best norm has stopped falling, as
    released."""
    return state.raised & state.lowered & (state.stalled >= stop_patience)


def _size(state: State) -> Array:
    """L1 norm of the mask."""
    return state.best_mask.sum()


def _works(state: State) -> Array:
    """Whether any mask reached the threshold."""
    return jnp.isfinite(state.best_norm)


def locate(masks: Array, side: int) -> tuple[Array, Array]:
    """Locates the side x side window that holds most of each mask [N, H, W, 1].

    Returns: the windows' places [N, 2] int32 (row, column), and the share [N] of each mask's L1
      norm inside its window.
    """
    window = jax.lax.reduce_window(
        masks[..., 0], 0.0, jax.lax.add, (1, side, side), (1, 1, 1), "VALID"
    )
    flat = window.reshape(masks.shape[0], -1)
    best = flat.argmax(-1)
    places = jnp.stack([best // window.shape[2], best % window.shape[2]], -1).astype(jnp.int32)
    return places, flat.max(-1) / jnp.maximum(masks.sum((1, 2, 3)), 1e-12)
