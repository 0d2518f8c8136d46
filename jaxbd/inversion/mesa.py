"""MESA: models the whole distribution of valid triggers, one sub-model per staircase level (Qiao et
al. 2019).

A search can stop early by the rule in `inversion.stopping`.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxbd import images as image_ops
from jaxbd import losses
from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Cell,
    Inversion,
    Key,
    Net,
    UserError,
    Variables,
    check_choices,
)
from jaxbd.inversion import stopping
from jaxbd.models.critic import StatisticsNetwork
from jaxbd.models.generators import ConvGenerator, PaperGenerator, ReleasedGenerator
from jaxbd.models.linen import apply_module, apply_mutable

PAPER = "https://arxiv.org/abs/1910.04749"
GENERATORS = {"released": ReleasedGenerator, "paper": PaperGenerator, "conv": ConvGenerator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MESA. Defaults follow the released code; `paper()` gives the paper's wording.

    Attributes:
      patch: side of the square trigger that is modelled, in pixels (the paper's 3x3).
      entropy_weight: alpha, weight of the entropy bound in eq. (4).
      noise_dim: n, size of the noise Z.
      noise: "uniform" U[0, 1) (released) or "normal" N(0, I) (paper).
      generator: "released", "paper", or "conv" (large triggers).
      hidden: width H of generator and statistics network.
      learning_rate: Adam's, for both networks.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      trigger_noise: std of Gaussian noise added to the trigger on the victim's branch only; 0 turns
        it off (paper).
      place: where the trigger is pasted. "batch": one random place per batch (released); "image":
        one per image; "fixed": at (`row`, `column`); "searched": a distribution over places is
        learnt together with the triggers.
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
      place_rate: rate of the moving average of each place's value, when the place is searched.
      place_temperature: weight of the place distribution's entropy when the place is searched;
        small values commit to one place.
      leaky_output: LeakyReLU on the statistics network's scalar (released).
      debias_rate: rate of the moving average in the bias-corrected gradient (released: 0.001).
      stop_after: first step at which the rule of `inversion.stopping` applies; 0 turns it off.
    """

    patch: int = 3
    entropy_weight: float = 0.1
    noise_dim: int = 64
    noise: Literal["uniform", "normal"] = "uniform"
    generator: Literal["released", "paper", "conv"] = "released"
    hidden: int = 512
    learning_rate: float = 2e-4
    b1: float = 0.5
    b2: float = 0.999
    trigger_noise: float = 0.1
    place: Literal["batch", "image", "fixed", "searched"] = "batch"
    row: int = 0
    column: int = 0
    place_rate: float = 0.5
    place_temperature: float = 0.1
    leaky_output: bool = True
    debias_rate: float = 0.001
    stop_after: int = 0

    def __post_init__(self):
        check_choices("mesa", self)
        if self.patch < 1:
            raise UserError(f"mesa: patch is {self.patch}; give a side of at least 1 pixel")
        if self.noise_dim < 1 or self.hidden < 1:
            raise UserError("mesa: noise_dim and hidden must be at least 1")
        if self.generator == "released" and self.noise_dim % 4:
            raise UserError(
                f"mesa: noise_dim {self.noise_dim} must be a multiple of 4 for the released"
                " generator"
            )
        if self.generator == "conv" and (
            self.patch < 4 or self.patch % 2 ** (self.patch.bit_length() - 2)
        ):
            raise UserError(
                "mesa: the conv generator needs a patch of 2^k or 3*2^k pixels, at least 4, not"
                f" {self.patch}"
            )
        if not (self.entropy_weight >= 0 and self.trigger_noise >= 0 and self.learning_rate > 0):
            raise UserError(
                "mesa: entropy_weight and trigger_noise must be >= 0 and learning_rate > 0"
            )
        if not (
            0 < self.debias_rate <= 1 and 0 < self.place_rate <= 1 and self.place_temperature > 0
        ):
            raise UserError(
                "mesa: debias_rate and place_rate must be in (0, 1] and place_temperature > 0"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError(
                f"mesa: Adam's b1 and b2 must be in [0, 1), not {self.b1} and {self.b2}"
            )
        if self.stop_after < 0:
            raise UserError(
                f"mesa: stop_after is {self.stop_after}; give a number of steps, or 0 for never"
            )


def paper(**changes) -> Config:
    """The settings in the paper's text; settings that it omits stay as released, but for the
    generator's initial weights, which are Flax's."""
    wording = dict(
        noise="normal", generator="paper", trigger_noise=0.0, place="image", leaky_output=False
    )
    return Config(**{**wording, **changes})


class State(NamedTuple):
    """State of one sub-model.

    Attributes:
      step: [] int32.
      generator: variables of G (params, batch_stats).
      critic: parameters of T.
      generator_opt, critic_opt: Adam states.
      log_mean_exp: [] moving average of E[exp T] over marginal pairs, as a logarithm.
      place: [2] int32 (row, column) of the top-left corner, used when `place="fixed"`. `init` takes
        it from the Config; a driver may replace it to give each cell of a sweep its own place.
      place_logits: [P] unnormalised log-probabilities of the P places (P = 1 unless
        `place="searched"`).
      margin, spread: [2] fast and slow means of the margin, and of the entropy bound in nats, for
        the stopping rule.
    """

    step: Array
    generator: Variables
    critic: ArrayTree
    generator_opt: optax.OptState
    critic_opt: optax.OptState
    log_mean_exp: Array
    place: Array
    place_logits: Array
    margin: Array
    spread: Array


class Info(NamedTuple):
    """Metrics of a step, all [] float32: batch ASR over images that are not of the target class (0
    if the batch has none), mean target confidence F, entropy bound in nats, losses of G and T."""

    attack_success_rate: Array
    confidence: Array
    entropy: Array
    generator_loss: Array
    critic_loss: Array


class Parts(NamedTuple):
    """Constants that the losses close over: victim architecture, both networks, Adam, settings."""

    net: Net
    image_shape: tuple[int, int, int]
    generator: nn.Module
    critic: StatisticsNetwork
    optimiser: optax.GradientTransformation
    config: Config

    def count_places(self) -> tuple[int, int]:
        """Rows and columns where the trigger's top-left corner may lie."""
        height, width, _ = self.image_shape
        return height - self.config.patch + 1, width - self.config.patch + 1


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """MESA for victims of architecture `net` on images of `image_shape` (H, W, C).

    Raises: UserError when the trigger does not fit the image.
    """
    parts = _make_parts(net, image_shape, config)
    rule = functools.partial(_has_converged, config.stop_after) if config.stop_after else None
    return Inversion(
        functools.partial(_init, parts),
        functools.partial(_step, parts),
        functools.partial(_stamp, parts),
        functools.partial(_sample, parts),
        rule,
    )


def _make_parts(net: Net, image_shape: tuple[int, int, int], config: Config) -> Parts:
    height, width, channels = image_shape
    side = config.patch
    generator = GENERATORS[config.generator](
        trigger_shape=(side, side, channels), hidden=config.hidden
    )
    critic = StatisticsNetwork(hidden=config.hidden, leaky_output=config.leaky_output)
    optimiser = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)
    parts = Parts(net, (height, width, channels), generator, critic, optimiser, config)
    rows, columns = parts.count_places()
    if rows < 1 or columns < 1:
        raise UserError(
            f"mesa: a {side}x{side} trigger does not fit {height}x{width} images; lower the patch"
        )
    if config.place == "fixed" and not (0 <= config.row < rows and 0 <= config.column < columns):
        raise UserError(
            f"mesa: place ({config.row}, {config.column}) puts a {side}x{side} trigger outside the"
            " image"
        )
    return parts


def _init(parts: Parts, key: Key) -> State:
    config, channels = parts.config, parts.image_shape[-1]
    generator_key, critic_key = jax.random.split(key)
    noise = jnp.zeros((2, config.noise_dim))
    trigger = jnp.zeros((2, config.patch, config.patch, channels))
    variables = parts.generator.init(generator_key, noise, train=True)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    critic = parts.critic.init(critic_key, noise, trigger)["params"]
    rows, columns = parts.count_places()
    return State(
        step=jnp.zeros((), jnp.int32),
        generator=variables,
        critic=critic,
        generator_opt=parts.optimiser.init(variables["params"]),
        critic_opt=parts.optimiser.init(critic),
        log_mean_exp=jnp.zeros(()),
        place=jnp.array([config.row, config.column], jnp.int32),
        place_logits=jnp.zeros((rows * columns if config.place == "searched" else 1,)),
        margin=jnp.zeros((2,)),
        spread=jnp.zeros((2,)),
    )


def draw_noise(key: Key, config: Config, count: int) -> Array:
    """Z [count, n]."""
    draw = jax.random.uniform if config.noise == "uniform" else jax.random.normal
    return draw(key, (count, config.noise_dim))


def draw_places(key: Key, parts: Parts, state: State, count: int) -> tuple[Array, Array]:
    """Places [count, 2], and the index [count] of each in `place_logits`; zeros unless searched."""
    config, side = parts.config, parts.config.patch
    _, columns = parts.count_places()
    if config.place == "searched":
        index = jax.random.categorical(key, state.place_logits, shape=(count,))
        return jnp.stack([index // columns, index % columns], -1), index
    if config.place == "fixed":
        # from the state, so that each cell of a sweep can have its own
        places = state.place
    else:
        drawn = 1 if config.place == "batch" else count
        places = image_ops.random_places(key, drawn, parts.image_shape, (side, side))
    return jnp.broadcast_to(places, (count, 2)), jnp.zeros((count,), jnp.int32)


def generate(
    parts: Parts, params: ArrayTree, stats: ArrayTree, noise: Array
) -> tuple[Array, ArrayTree]:
    """Triggers G(z) [N, h, w, C] for `noise` [N, n], with BatchNorm on batch moments, and the new
    running moments."""
    variables = {"params": params, "batch_stats": stats}
    triggers, updates = apply_mutable(parts.generator, variables, "batch_stats", noise, train=True)
    return triggers, updates["batch_stats"]


def score_pairs(
    parts: Parts, params: ArrayTree, noise: Array, other: Array, triggers: Array
) -> tuple[Array, Array]:
    """T on joint pairs (z, G(z)) and on marginal pairs (z', G(z)), [N] each."""
    score = lambda z: apply_module(parts.critic, {"params": params}, z, triggers)
    return score(noise), score(other)


class Seen(NamedTuple):
    """By-products of the generator's loss: new BatchNorm statistics, hits [B], confidence [B],
    entropy [], and the index [B] of each searched place."""

    stats: ArrayTree
    hit: Array
    confidence: Array
    entropy: Array
    index: Array


def generator_loss(
    params: ArrayTree,
    parts: Parts,
    state: State,
    keys: Array,
    batch: Batch,
    cell: Cell,
    variables: Variables,
) -> tuple[Array, Seen]:
    """Eq. (4) on one batch of clean images; uses the first four `keys`. `variables` are the
    victim's."""
    config, count = parts.config, batch.images.shape[0]
    noise, other = draw_noise(keys[0], config, count), draw_noise(keys[1], config, count)
    triggers, stats = generate(parts, params, state.generator["batch_stats"], noise)
    places, index = draw_places(keys[2], parts, state, count)
    # only the victim sees the noise; the entropy bound uses the clean triggers
    jitter = config.trigger_noise * jax.random.normal(keys[3], triggers.shape)
    stamped = jax.vmap(image_ops.paste)(batch.images, triggers + jitter, places)
    logits, _ = parts.net.apply(variables, stamped, train=False)
    confidence = losses.target_confidence(logits, cell.target)
    entropy = losses.donsker_varadhan(*score_pairs(parts, state.critic, noise, other, triggers))
    # eq. (4): L = max(0, beta - F(G(z))) - alpha I_T(G(z); z')
    loss = losses.level_hinge(confidence, cell.level) - config.entropy_weight * entropy
    return loss, Seen(stats, logits.argmax(-1) == cell.target, confidence, entropy, index)


def average_marginal(log_mean_exp: Array, marginal: Array, step: Array, rate: float) -> Array:
    """Moving average of E[e^T], as a logarithm. The first batch [N] sets it; later ones enter with
    weight `rate`."""
    # computed in logarithms throughout, because e^T can overflow
    batch_mean = jax.nn.logsumexp(marginal) - jnp.log(marginal.shape[0])
    average = jnp.logaddexp(jnp.log1p(-rate) + log_mean_exp, jnp.log(rate) + batch_mean)
    return jnp.where(step == 0, batch_mean, average)


def critic_loss(
    params: ArrayTree, parts: Parts, noise: Array, other: Array, triggers: Array, average: Array
) -> Array:
    """The negative bound on the triggers' entropy, with a bias-corrected gradient."""
    joint, marginal = score_pairs(parts, params, noise, other, triggers)
    return -losses.donsker_varadhan_debiased(joint, marginal, average)


def _step(
    parts: Parts, key: Key, state: State, batch: Batch, cell: Cell, variables: Variables
) -> tuple[State, Info]:
    config, keys = parts.config, jax.random.split(key, 6)
    count = batch.images.shape[0]
    grad = jax.value_and_grad(generator_loss, has_aux=True)
    (loss, seen), gradient = grad(
        state.generator["params"], parts, state, keys, batch, cell, variables
    )
    updates, generator_opt = parts.optimiser.update(gradient, state.generator_opt)
    params = optax.apply_updates(state.generator["params"], updates)

    noise, other = draw_noise(keys[4], config, count), draw_noise(keys[5], config, count)
    # the critic trains on triggers of the updated generator
    triggers, stats = generate(parts, params, seen.stats, noise)
    # Differs from released code: no gradient into the generator; there it is computed and discarded
    triggers = jax.lax.stop_gradient(triggers)
    _, marginal = score_pairs(parts, state.critic, noise, other, triggers)
    # the moving average includes this batch, as scored before the update
    average = average_marginal(state.log_mean_exp, marginal, state.step, config.debias_rate)
    grad = jax.value_and_grad(critic_loss)
    critic_value, gradient = grad(state.critic, parts, noise, other, triggers, average)
    updates, critic_opt = parts.optimiser.update(gradient, state.critic_opt)

    counted = (batch.labels != cell.target).astype(jnp.float32)
    mean = lambda values: (values * counted).sum() / jnp.maximum(counted.sum(), 1)
    # leave out images of the target class: they reach it without a trigger
    margin = mean(seen.confidence) - cell.level
    new = state._replace(
        step=state.step + 1,
        generator={"params": params, "batch_stats": stats},
        critic=optax.apply_updates(state.critic, updates),
        generator_opt=generator_opt,
        critic_opt=critic_opt,
        log_mean_exp=average,
        margin=stopping.update_means(state.margin, margin, state.step),
        spread=stopping.update_means(state.spread, seen.entropy, state.step),
    )
    if config.place == "searched":
        reward = jnp.minimum(seen.confidence, cell.level)
        new = new._replace(
            place_logits=update_places(state.place_logits, seen.index, reward, config)
        )
    return new, Info(mean(seen.hit), seen.confidence.mean(), seen.entropy, loss, critic_value)


def _sample(parts: Parts, key: Key, state: State, count: int) -> Array:
    """Triggers [count, h, w, C] in [0, 1] from the generator with its running statistics."""
    noise = draw_noise(key, parts.config, count)
    return apply_module(parts.generator, state.generator, noise, train=False)


def _stamp(parts: Parts, key: Key, state: State, images: Array) -> Array:
    """Pastes a different trigger on each of `images` [B, H, W, C]; places as configured."""
    sample_key, place_key = jax.random.split(key)
    count = images.shape[0]
    places, _ = draw_places(place_key, parts, state, count)
    return jax.vmap(image_ops.paste)(images, _sample(parts, sample_key, state, count), places)


def _has_converged(stop_after: int, state: State) -> Array:
    """The rule of `inversion.stopping`."""
    done = stopping.has_reached(state.margin, state.spread) | stopping.is_hopeless(state.margin)
    return (state.step >= stop_after) & done


def update_places(logits: Array, index: Array, reward: Array, config: Config) -> Array:
    """Updates the place logits [P] after a batch pasted at places `index` [B] earned `reward` [B].

    The q that maximises E_q[V] + temperature * H(q) is softmax(V / temperature), with V the mean
    min(F, beta) of each place. The level and the entropy act on places as they act on triggers in
    eq. (4), so no place is ruled out early. V is a moving average; it does not change for places
    without an image in the batch.
    """
    count = jnp.zeros_like(logits).at[index].add(1)
    value = jnp.zeros_like(logits).at[index].add(reward) / jnp.maximum(count, 1)
    moved = logits + config.place_rate * (value / config.place_temperature - logits)
    return jnp.where(count > 0, moved, logits)
