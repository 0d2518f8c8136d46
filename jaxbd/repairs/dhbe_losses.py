"""The three losses of DHBE and their parts, see `dhbe` (Yan et al. 2023).

Every function that runs a net on batch moments also returns the state with the net's updated
running moments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import images as image_ops
from jaxbd import losses
from jaxbd.base import Array, ArrayTree, Key, Net, Variables
from jaxbd.caching import cached
from jaxbd.models.synthesis import SampleGenerator, TriggerGenerator, to_pixels
from jaxbd.repairs.dhbe_config import Config

ROUNDING = 1e-3
"""Subtracted before rounding up, because a share of the iterations may exceed a whole number by a
rounding error."""


class Strength(NamedTuple):
    """The settings of a Config that are traced: runs that differ only in these share one compiled
    step.

    All are [] float32, except num_steps [] int32; names are as in `Config`.
    """

    regularisation: Array
    learning_rate: Array
    generator_rate: Array
    trigger_rate: Array
    num_steps: Array


class Learner(NamedTuple):
    """Variables of one of the three trained nets, and its optimiser's state."""

    variables: Variables
    opt: optax.OptState


class State(NamedTuple):
    """State of the repair.

    Attributes:
      step: [] int32, iterations done.
      teacher: the victim's variables, which never change.
      student, generator, trigger: the repaired net, the sample generator and the trigger generator.
      averaged: the average student so far; the student's own variables before averaging begins; {}
        if `Config.average` is 0.
      strength: `init` takes it from the Config; a driver may replace it to sweep over lambda or the
        rates.
    """

    step: Array
    teacher: Variables
    student: Learner
    generator: Learner
    trigger: Learner
    averaged: Variables
    strength: Strength


class Players(NamedTuple):
    """The static parts of an iteration: the classifier's architecture, the two generators, the
    update rules, and the settings. Hashable."""

    net: Net
    samples: SampleGenerator
    triggers: TriggerGenerator
    sgd: optax.GradientTransformation
    adam: optax.GradientTransformation
    config: Config


@cached(32)
def _rules(
    weight_decay: float, momentum: float
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Update rules of the student and of the generators; cached, so that equal settings give the
    same objects and `Players` stays comparable."""
    decayed = optax.add_decayed_weights(weight_decay)
    return optax.chain(decayed, optax.trace(momentum)), optax.scale_by_adam()


def make_players(net: Net, image_shape: tuple[int, int, int], config: Config) -> Players:
    """The players for images of `image_shape`."""
    samples = SampleGenerator(image_shape, config.width)
    triggers = TriggerGenerator(config.trigger_size, image_shape[-1], config.width)
    sgd, adam = _rules(config.weight_decay, config.momentum)
    return Players(net, samples, triggers, sgd, adam, config)


def decay(step: Array, num_steps: Array, milestones: tuple[float, ...] = (0.6, 0.8)) -> Array:
    """Factor [] on all three rates at iteration `step` [] of `num_steps` []: drops x0.1 at each
    milestone."""
    drops = sum(
        (step >= jnp.ceil(share * num_steps - ROUNDING) for share in milestones), start=jnp.int32(0)
    )
    return jnp.array([0.1**passed for passed in range(len(milestones) + 1)], jnp.float32)[drops]


def student_loss(
    players: Players, params: ArrayTree, state: State, images: Array, stamped: Array
) -> tuple[Array, tuple[State, Array, Array]]:
    """Returns (loss [] of eq. (8), (state with the student's new running moments, discrepancy [] of
    eq. (2), regulariser [] of eq. (7))).

    Args:
      images, stamped: generated images [B, H, W, C] without and with triggers.
    """
    logits, after = answer(players, params, state, images)
    wanted = players.net.apply(state.teacher, images, train=False)[0]
    discrepancy = losses.mean_absolute_difference(logits, wanted)
    if players.config.pure:
        return discrepancy, (after, discrepancy, jnp.zeros_like(discrepancy))
    # two passes, so that clean and triggered images are each normalised by their own moments
    triggered, after = answer(players, params, after, stamped)
    # only the triggered answers are trained towards the clean ones, not the reverse
    regulariser = losses.mean_absolute_difference(triggered, jax.lax.stop_gradient(logits))
    total = discrepancy + state.strength.regularisation * regulariser
    return total, (after, discrepancy, regulariser)


def generator_loss(
    players: Players, params: ArrayTree, key: Key, state: State
) -> tuple[Array, State]:
    """Returns (loss [], state with new running moments). The loss is the image prior minus the
    discrepancy on the sample generator's images."""
    made, after = make_images(players, key, params, state)
    images = pixels(players, made)
    logits, after = answer(players, state.student.variables["params"], after, images)
    wanted = players.net.apply(state.teacher, images, train=False)[0]
    discrepancy = losses.mean_absolute_difference(logits, wanted)
    return players.config.prior_weight * losses.image_roughness(made) - discrepancy, after


def trigger_loss(
    players: Players, params: ArrayTree, key: Key, state: State, images: Array, logits: Array
) -> tuple[Array, State]:
    """Returns (loss [], state with new running moments). The loss is minus the triggers' effect on
    the student's `logits` [B, K] on `images`."""
    stamped, after = stamp(players, key, params, state, images)
    triggered, after = answer(players, state.student.variables["params"], after, stamped)
    return -losses.mean_absolute_difference(logits, triggered), after


def make_images(players: Players, key: Key, params: ArrayTree, state: State) -> tuple[Array, State]:
    """Images [B, H, W, C] from the sample generator with `params`, still normalised, and the state
    with its new running moments."""
    made, generator = _generate(players.samples, players.config, params, state.generator, key)
    return made, state._replace(generator=generator)


def stamp(
    players: Players, key: Key, params: ArrayTree, state: State, images: Array
) -> tuple[Array, State]:
    """Adds triggers from the trigger generator with `params` to `images`, without clipping; also
    returns the state with its new running moments."""
    config, shape = players.config, players.samples.image_shape
    noise_key, place_key = jax.random.split(key)
    patches, trigger = _generate(players.triggers, config, params, state.trigger, noise_key)
    count = 1 if config.place == "batch" else config.batch_size
    draw = image_ops.edge_places if config.place == "edges" else image_ops.random_places
    places = draw(place_key, count, shape, (config.trigger_size, config.trigger_size))
    places = jnp.broadcast_to(places, (config.batch_size, 2))
    canvas = jax.vmap(image_ops.paste)(
        jnp.zeros_like(images), config.trigger_scale * patches, places
    )
    return images + canvas, state._replace(trigger=trigger)


def _generate(
    module: SampleGenerator | TriggerGenerator,
    config: Config,
    params: ArrayTree,
    learner: Learner,
    key: Key,
) -> tuple[Array, Learner]:
    """The module's output for fresh noise, on batch moments, and `learner` with its new running
    moments."""
    noise = image_ops.spread_rows(jax.random.normal(key, (config.batch_size, config.noise_dim)))
    variables = {**learner.variables, "params": params}
    made, updates = module.apply(variables, noise, train=True, mutable=["batch_stats"])
    return made, learner._replace(variables={**learner.variables, **updates})


def pixels(players: Players, made: Array) -> Array:
    return to_pixels(made, players.config.mean, players.config.std)


def answer(players: Players, params: ArrayTree, state: State, images: Array) -> tuple[Array, State]:
    """The student's logits [B, K] on batch moments, and the state with its new running moments."""
    learner = state.student
    variables = {**learner.variables, "params": params}
    logits, stats = players.net.apply(variables, images, train=True)
    student = learner._replace(variables={**learner.variables, "batch_stats": stats})
    return logits, state._replace(student=student)
