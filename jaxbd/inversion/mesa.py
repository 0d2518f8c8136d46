"""MESA: models the whole distribution of valid triggers, one sub-model per staircase level (Qiao et al. 2019).

Stopping rule (not in the paper; off unless `Config.stop_after` is set). A search keeps two exponential means, a fast
and a slow one, of its batches' margin, which is the confidence on images of other classes minus the level, and of
their entropy bound. From step `stop_after` on it is settled when

(a) it has reached its level and stays there: the fast mean of the margin is at least -`REACHED` and at most `CALM`
    above the slow one, and the two means of the entropy bound differ by less than `STILL` nats; or
(b) it is hopeless: both means of the margin are below -`FAR`, and the fast one is at most `RISING` above the slow one.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import images as image_ops
from jaxbd import losses
from jaxbd.base import Array, ArrayTree, Batch, Cell, Inversion, Key, Net, UserError, Variables, check_choices
from jaxbd.models.critic import StatisticsNetwork
from jaxbd.models.generators import ConvGenerator, PaperGenerator, ReleasedGenerator

PAPER = "https://arxiv.org/abs/1910.04749"
RATES = (0.1, 0.03)
"""Rates of the fast and the slow mean of the stopping rule; until 1/rate steps are made they are plain means."""
REACHED, CALM, FAR, RISING, STILL = 0.05, 0.03, 0.3, 0.01, 0.2
"""Limits of the stopping rule: of confidence, and of the entropy bound in nats."""
TRAVEL = 0.04
"""Steps times learning rate from which the stopping rule applies where nothing else is asked for."""
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
      learning_rate: Adam of both networks.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean squared gradient.
      trigger_noise: std of Gaussian noise added to the trigger on the victim's branch only; 0 turns it off (paper).
      place: where the trigger is pasted. "batch": one random place per batch (released); "image": one per image;
        "fixed": at (`row`, `column`); "searched": a distribution over places is learnt beside the triggers.
      row: of the top-left corner of a fixed place.
      column: of the top-left corner of a fixed place.
      place_rate: rate of the moving average of each place's value when the place is searched.
      place_temperature: weight of the place distribution's entropy when the place is searched; small values commit to
        one place.
      leaky_output: LeakyReLU on the statistics network's scalar (released).
      debias_rate: rate of the moving average in the bias-corrected gradient (released: 0.001).
      stop_after: steps after which the stopping rule applies, see the module; 0 for never.
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
            raise UserError(f"mesa: noise_dim {self.noise_dim} must be a multiple of 4 for the released generator")
        if self.generator == "conv" and (self.patch < 4 or self.patch % 2 ** (self.patch.bit_length() - 2)):
            raise UserError(
                f"mesa: the conv generator needs a patch of 2^k or 3*2^k pixels, at least 4, not {self.patch}"
            )
        if not (self.entropy_weight >= 0 and self.trigger_noise >= 0 and self.learning_rate > 0):
            raise UserError("mesa: entropy_weight and trigger_noise must be >= 0 and learning_rate > 0")
        if not (0 < self.debias_rate <= 1 and 0 < self.place_rate <= 1 and self.place_temperature > 0):
            raise UserError("mesa: debias_rate and place_rate must be in (0, 1] and place_temperature > 0")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError(f"mesa: Adam's b1 and b2 must be in [0, 1), not {self.b1} and {self.b2}")
        if self.stop_after < 0:
            raise UserError(f"mesa: stop_after is {self.stop_after}; give a number of steps, or 0 for never")


def paper(**changes) -> Config:
    """The settings the paper's text states; everything it does not state stays as released."""
    wording = dict(noise="normal", generator="paper", trigger_noise=0.0, place="image", leaky_output=False)
    return Config(**{**wording, **changes})


class State(NamedTuple):
    """What MESA needs to go on with one sub-model.

    Attributes:
      step: [] int32.
      generator: variables of G (params, batch_stats).
      critic: parameters of T.
      generator_opt, critic_opt: Adam states.
      log_mean_exp: [] moving average of E[exp T] over marginal pairs, as a logarithm.
      place: [2] int32 (row, column) of the top-left corner, used when `place="fixed"`; `init` takes it from the
        Config, and a driver may replace it to give every cell of a sweep a place of its own.
      place_logits: [P] unnormalised log-probabilities of the P places (P = 1 unless `place="searched"`).
      margin, spread: [2] fast and slow means of the stopping rule: of the margin, and of the entropy bound in nats.
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
    """What one looks at. All [] float32: batch ASR over images that are not of the target class (0 where the batch
    has none), mean target confidence F, entropy bound in nats, losses of G and T."""

    attack_success_rate: Array
    confidence: Array
    entropy: Array
    generator_loss: Array
    critic_loss: Array


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Inversion:
    """MESA for victims of architecture `net` on images of `image_shape` (H, W, C).

    Raises: UserError when the trigger does not fit the image.
    """
    height, width, channels = image_shape
    side = config.patch
    rows, columns = height - side + 1, width - side + 1
    if rows < 1 or columns < 1:
        raise UserError(f"mesa: a {side}x{side} trigger does not fit {height}x{width} images; lower the patch")
    if config.place == "fixed" and not (0 <= config.row < rows and 0 <= config.column < columns):
        raise UserError(f"mesa: place ({config.row}, {config.column}) puts a {side}x{side} trigger outside the image")
    searched = config.place == "searched"
    generator = GENERATORS[config.generator](trigger_shape=(side, side, channels), hidden=config.hidden)
    critic = StatisticsNetwork(hidden=config.hidden, leaky_output=config.leaky_output)
    optimiser = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)
    draw_noise = jax.random.uniform if config.noise == "uniform" else jax.random.normal

    def init(key: Key) -> State:
        generator_key, critic_key = jax.random.split(key)
        noise, trigger = jnp.zeros((2, config.noise_dim)), jnp.zeros((2, side, side, channels))
        variables = generator.init(generator_key, noise, train=True)
        variables = {name: variables[name] for name in ("params", "batch_stats")}
        params = critic.init(critic_key, noise, trigger)["params"]
        place = jnp.array([config.row, config.column], jnp.int32)
        logits = jnp.zeros((rows * columns if searched else 1,))
        opts = optimiser.init(variables["params"]), optimiser.init(params)
        zero, means = jnp.zeros(()), jnp.zeros((2,))
        return State(jnp.zeros((), jnp.int32), variables, params, *opts, zero, place, logits, means, means)

    def draw_places(key: Key, state: State, count: int) -> tuple[Array, Array]:
        """Places [count, 2] and, when searched, the index of each in `place_logits` [count]."""
        if searched:
            index = jax.random.categorical(key, state.place_logits, shape=(count,))
            return jnp.stack([index // columns, index % columns], -1), index
        if config.place == "fixed":
            places = jnp.broadcast_to(state.place, (count, 2))
        elif config.place == "batch":
            places = jnp.broadcast_to(image_ops.random_places(key, 1, image_shape, (side, side)), (count, 2))
        else:
            places = image_ops.random_places(key, count, image_shape, (side, side))
        return places, jnp.zeros((count,), jnp.int32)

    def generate(params: ArrayTree, stats: ArrayTree, noise: Array) -> tuple[Array, ArrayTree]:
        variables = {"params": params, "batch_stats": stats}
        triggers, updates = generator.apply(variables, noise, train=True, mutable=["batch_stats"])
        return triggers, updates["batch_stats"]

    def statistics(params: ArrayTree, noise: Array, other: Array, triggers: Array) -> tuple[Array, Array]:
        """T on joint pairs (z, G(z)) and on marginal pairs (z', G(z)), [N] each."""
        apply = lambda z: critic.apply({"params": params}, z, triggers)
        return apply(noise), apply(other)

    def generator_loss(params, state, keys, batch, cell, victim):
        count = batch.images.shape[0]
        noise, other = (draw_noise(k, (count, config.noise_dim)) for k in (keys[0], keys[1]))
        triggers, stats = generate(params, state.generator["batch_stats"], noise)
        places, index = draw_places(keys[2], state, count)
        jitter = config.trigger_noise * jax.random.normal(keys[3], triggers.shape)
        stamped = jax.vmap(image_ops.paste)(batch.images, triggers + jitter, places)
        logits, _ = net.apply(victim, stamped, train=False)
        confidence = losses.target_confidence(logits, cell.target)
        entropy = losses.donsker_varadhan(*statistics(state.critic, noise, other, triggers))
        # eq. (4): L = max(0, beta - F(G(z))) - alpha I_T(G(z); z')
        loss = losses.level_hinge(confidence, cell.level) - config.entropy_weight * entropy
        hit = logits.argmax(-1) == cell.target
        return loss, (stats, hit, confidence, entropy, index)

    def step(key: Key, state: State, batch: Batch, cell: Cell, victim: Variables) -> tuple[State, Info]:
        keys = jax.random.split(key, 6)
        count = batch.images.shape[0]
        grad = jax.value_and_grad(generator_loss, has_aux=True)
        (loss, aux), gradient = grad(state.generator["params"], state, keys, batch, cell, victim)
        stats, hit, confidence, entropy, index = aux
        updates, generator_opt = optimiser.update(gradient, state.generator_opt)
        params = optax.apply_updates(state.generator["params"], updates)

        noise, other = (draw_noise(k, (count, config.noise_dim)) for k in (keys[4], keys[5]))
        triggers, stats = generate(params, stats, noise)
        triggers = jax.lax.stop_gradient(triggers)
        _, marginal = statistics(state.critic, noise, other, triggers)
        batch_mean = jax.nn.logsumexp(marginal) - jnp.log(count)
        # moving average of E[e^T] in logarithms: the first batch sets it, later ones pull at `debias_rate`
        rate = config.debias_rate
        average = jnp.logaddexp(jnp.log1p(-rate) + state.log_mean_exp, jnp.log(rate) + batch_mean)
        average = jnp.where(state.step == 0, batch_mean, average)

        def bound(critic_params):
            joint, marginal = statistics(critic_params, noise, other, triggers)
            return -losses.donsker_varadhan_debiased(joint, marginal, average)

        critic_value, gradient = jax.value_and_grad(bound)(state.critic)
        updates, critic_opt = optimiser.update(gradient, state.critic_opt)
        critic_params = optax.apply_updates(state.critic, updates)

        place_logits = state.place_logits
        if searched:
            place_logits = _follow_places(place_logits, index, jnp.minimum(confidence, cell.level), config)
        counted = (batch.labels != cell.target).astype(jnp.float32)
        success = (hit * counted).sum() / jnp.maximum(counted.sum(), 1)
        variables = {"params": params, "batch_stats": stats}
        # images of the target class are no evidence: they are sent there without a trigger
        sent = (confidence * counted).sum() / jnp.maximum(counted.sum(), 1)
        margin = _follow(state.margin, sent - cell.level, state.step)
        spread = _follow(state.spread, entropy, state.step)
        state = State(
            state.step + 1, variables, critic_params, generator_opt, critic_opt, average, state.place, place_logits,
            margin, spread,
        )  # fmt: skip
        return state, Info(success, confidence.mean(), entropy, loss, critic_value)

    def sample(key: Key, state: State, count: int) -> Array:
        """Triggers [count, h, w, C] in [0, 1] from the generator with its running statistics."""
        return generator.apply(state.generator, draw_noise(key, (count, config.noise_dim)), train=False)

    def stamp(key: Key, state: State, images: Array) -> Array:
        """Pastes a trigger of its own on every image of `images` [B, H, W, C]; places as configured."""
        sample_key, place_key = jax.random.split(key)
        places, _ = draw_places(place_key, state, images.shape[0])
        return jax.vmap(image_ops.paste)(images, sample(sample_key, state, images.shape[0]), places)

    def settled(state: State) -> Array:
        """The stopping rule of this module."""
        return (state.step >= config.stop_after) & (_reached(state) | _hopeless(state))

    return Inversion(init, step, stamp, sample, settled if config.stop_after else None)


def stop_after(learning_rate: float) -> int:
    """Steps after which the stopping rule may be trusted.

    Adam moves a weight by about its rate in each. And before 1/rate steps the slow mean is hardly slower than the fast.
    """
    return max(round(TRAVEL / learning_rate), math.ceil(1 / RATES[1]))


def _follow(means: Array, value: Array, step: Array) -> Array:
    """The fast and the slow mean [2] after `value` [] of step number `step` []."""
    rates = jnp.maximum(jnp.asarray(RATES, means.dtype), 1 / (step + 1).astype(means.dtype))
    return means + rates * (value - means)


def _reached(state: State) -> Array:
    """Rule (a), [] bool."""
    (fast, slow), still = state.margin, jnp.abs(state.spread[0] - state.spread[1]) < STILL
    return (fast >= -REACHED) & (fast - slow <= CALM) & still


def _hopeless(state: State) -> Array:
    """Rule (b), [] bool."""
    fast, slow = state.margin
    return (jnp.maximum(fast, slow) < -FAR) & (fast - slow <= RISING)


def _follow_places(logits: Array, index: Array, reward: Array, config: Config) -> Array:
    """Place distribution after a batch pasted at places `index` [B] earned `reward` [B]; logits [P].

    The q that maximises E_q[V] + temperature * H(q) is softmax(V / temperature), with V the mean min(F, beta) of each
    place: the level and the entropy do for places what eq. (4) does for triggers, so no place is given up early. V is
    a moving average; places without an image in the batch keep theirs.
    """
    count = jnp.zeros_like(logits).at[index].add(1)
    value = jnp.zeros_like(logits).at[index].add(reward) / jnp.maximum(count, 1)
    moved = logits + config.place_rate * (value / config.place_temperature - logits)
    return jnp.where(count > 0, moved, logits)
