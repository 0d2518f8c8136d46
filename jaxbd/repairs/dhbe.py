"""DHBE: erases backdoors without any data, by distillation between two adversarial generators (Yan
et al. 2023).

The student starts as a copy of the suspect. The suspect, as the teacher, trains it on images from
one generator, while a second generator searches for small triggers that change the student's
answers. The three losses are in `dhbe_losses`; `make` combines the steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd.base import (
    Array,
    ArrayTree,
    Batch,
    Key,
    Need,
    Phase,
    Problem,
    Repair,
    RepairData,
    Suspect,
    UserError,
    Variables,
)
from jaxbd.caching import cached
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.models.synthesis import (
    SAMPLE_SIDES,
    SampleGenerator,
    TriggerGenerator,
    layout,
)
from jaxbd.repairs.dhbe_config import Config, paper, quick, released
from jaxbd.repairs.dhbe_losses import (
    ROUNDING,
    Learner,
    Players,
    State,
    Strength,
    answer,
    decay,
    generator_loss,
    make_images,
    make_players,
    pixels,
    stamp,
    student_loss,
    trigger_loss,
)

__all__ = ["Config", "Info", "State", "adapt", "make", "paper", "quick", "released"]
PAPER = "https://arxiv.org/abs/2306.08009"
NEEDS: frozenset[Need] = frozenset()


class Info(NamedTuple):
    """Metrics of an iteration, all [] float32: discrepancy and regulariser (eqs. 2 and 7) averaged
    over the student's updates, the two generators' losses, and the student's learning rate."""

    discrepancy: Array
    regulariser: Array
    generator_loss: Array
    trigger_loss: Array
    learning_rate: Array


def strength(config: Config) -> Strength:
    """The settings in `config` that are traced."""
    names = ("regularisation", "learning_rate", "generator_rate", "trigger_rate")
    numbers = (jnp.float32(getattr(config, name)) for name in names)
    return Strength(*numbers, num_steps=jnp.int32(config.num_steps))


def adapt(config: Config, suspect: Suspect, data: RepairData, batch_size: int) -> Config:
    """Adapts `config` to the suspect's input normalisation and the device.

    For a net that normalises its input, generated images get its constants as moments, so that the
    net sees zero mean and unit variance, as released; for other nets `config.mean` and `config.std`
    stay. The student's updates are unrolled on CPUs and a scan elsewhere.
    """
    del data, batch_size
    moments = tuple(suspect.mean), tuple(suspect.std)
    if moments != NORMALISATIONS["none"]:
        config = dataclasses.replace(config, mean=moments[0], std=moments[1])
    inner = "unrolled" if jax.default_backend() == "cpu" else "scan"
    return dataclasses.replace(config, inner=inner)


def make(problem: Problem, config: Config) -> Repair:
    """DHBE for nets of architecture `problem.net`; one step is one iteration. Pass a `config` from
    `adapt`.

    `init` copies the suspect to teacher and student. The repair takes no data and no trigger.

    Raises: UserError when the images are not square, have no generator, or are smaller than the
      trigger; also from `init` and the step when given data.
    """
    _check_fit(problem.image_shape, config)
    players = make_players(problem.net, problem.image_shape, config)

    def init(key: Key, variables: Variables, data: RepairData) -> State:
        if jax.tree.leaves(data):
            raise UserError("dhbe: takes no data and no trigger; it erases triggers unknown to it")
        return _init(key, players, variables)._replace(strength=strength(config))

    def extract(state: State, dial: None = None) -> Variables:
        del dial
        return state.averaged if config.average else state.student.variables

    # the step reads these numbers from the state, so that all their values share one program
    traced = {name: getattr(Config(), name) for name in Strength._fields}
    step = _step(players._replace(config=dataclasses.replace(config, **traced)))
    # a step of many unrolled updates takes minutes for large nets on a CPU
    chunk = 1 if config.inner == "unrolled" else 20
    phase = Phase(
        "dhbe", step, config.num_steps, Info, draws=None, rows=config.batch_size, chunk=chunk
    )
    return Repair(init, (phase,), extract, needs=NEEDS)


def _check_fit(image_shape: tuple[int, int, int], config: Config) -> None:
    """Raises UserError unless there is a generator for these images and the trigger fits."""
    height, width, channels = image_shape
    side = config.trigger_size
    if height != width:
        raise UserError(
            f"dhbe: the sample generator makes square images only, not {height}x{width}"
        )
    layout(height, SAMPLE_SIDES)
    if side > height:
        raise UserError(
            f"dhbe: a {side}x{side} trigger does not fit {height}x{width} images; lower the trigger"
            " size"
        )
    if not {len(config.mean), len(config.std)} <= {1, channels}:
        raise UserError(
            f"dhbe: mean and std need 1 or {channels} numbers for images of {channels} channels"
        )


def _init(key: Key, players: Players, variables: Variables) -> State:
    """The first state: untrained generators; teacher and student are copies of the suspect."""
    noise = jnp.zeros((2, players.config.noise_dim))

    def learn(module: SampleGenerator | TriggerGenerator, module_key: Key) -> Learner:
        made = module.init(module_key, noise, train=True)
        made = {name: made[name] for name in ("params", "batch_stats")}
        return Learner(made, players.adam.init(made["params"]))

    samples_key, triggers_key = jax.random.split(key)
    samples = learn(players.samples, samples_key)
    triggers = learn(players.triggers, triggers_key)
    teacher, student = (jax.tree.map(jnp.copy, {"batch_stats": {}, **variables}) for _ in range(2))
    averaged = jax.tree.map(jnp.copy, student) if players.config.average else {}
    learner = Learner(student, players.sgd.init(student["params"]))
    step = jnp.zeros((), jnp.int32)
    numbers = strength(players.config)
    return State(step, teacher, learner, samples, triggers, averaged, numbers)


@cached(32)
def _step(players: Players) -> Callable[..., tuple[State, Info]]:
    """The function of one iteration; cached, so that the same players share one program."""
    config = players.config

    def step(key: Key, state: State, batch: Batch | None = None) -> tuple[State, Info]:
        if batch is not None:
            raise UserError("dhbe: takes no data; call the step without a batch")
        keys, rate = jax.random.split(key, config.inner_steps + 2), state.strength.learning_rate
        update = functools.partial(student_step, players)
        state, figures = _repeat(update, keys[:-2], state, config.inner)
        state, of_generator = generator_step(players, keys[-2], state)
        of_trigger = jnp.zeros_like(of_generator)
        if not config.pure:
            state, of_trigger = trigger_step(players, keys[-1], state)
        rate = rate * decay(state.step, state.strength.num_steps, config.milestones)
        discrepancy, regulariser = (leaf.mean() for leaf in figures)
        info = Info(discrepancy, regulariser, of_generator, of_trigger, rate)
        return _average(state, config.average)._replace(step=state.step + 1), info

    return step


def student_step(players: Players, key: Key, state: State) -> tuple[State, tuple[Array, Array]]:
    """One update of the student: (state, (discrepancy [], regulariser []))."""
    fake_key, trigger_key = jax.random.split(key)
    made, state = make_images(players, fake_key, state.generator.variables["params"], state)
    images = stamped = pixels(players, made)
    if not players.config.pure:
        params = state.trigger.variables["params"]
        stamped, state = stamp(players, trigger_key, params, state, images)
    grad = jax.grad(student_loss, argnums=1, has_aux=True)
    params = state.student.variables["params"]
    gradient, (after, discrepancy, regulariser) = grad(players, params, state, images, stamped)
    rate = state.strength.learning_rate
    student = descend(players.sgd, after.student, gradient, _decay(players, rate, state))
    return after._replace(student=student), (discrepancy, regulariser)


def generator_step(players: Players, key: Key, state: State) -> tuple[State, Array]:
    """One update of the sample generator: (state, its loss [])."""
    grad = jax.value_and_grad(generator_loss, argnums=1, has_aux=True)
    params = state.generator.variables["params"]
    (value, after), gradient = grad(players, params, key, state)
    rate = _decay(players, state.strength.generator_rate, state)
    generator = descend(players.adam, after.generator, gradient, rate)
    return after._replace(generator=generator), value


def trigger_step(players: Players, key: Key, state: State) -> tuple[State, Array]:
    """One update of the trigger generator: (state, its loss [])."""
    fake_key, trigger_key = jax.random.split(key)
    made, state = make_images(players, fake_key, state.generator.variables["params"], state)
    images = pixels(players, made)
    logits, state = answer(players, state.student.variables["params"], state, images)
    grad = jax.value_and_grad(trigger_loss, argnums=1, has_aux=True)
    params = state.trigger.variables["params"]
    (value, after), gradient = grad(players, params, trigger_key, state, images, logits)
    rate = _decay(players, state.strength.trigger_rate, state)
    trigger = descend(players.adam, after.trigger, gradient, rate)
    return after._replace(trigger=trigger), value


def _decay(players: Players, rate: Array, state: State) -> Array:
    return rate * decay(state.step, state.strength.num_steps, players.config.milestones)


def descend(
    rule: optax.GradientTransformation, learner: Learner, gradient: ArrayTree, rate: Array
) -> Learner:
    """Updates `learner` once at the learning rate `rate` []."""
    params = learner.variables["params"]
    # the rules have no learning rate, so that the rate can be traced
    updates, opt = rule.update(gradient, learner.opt, params)
    params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
    return Learner({**learner.variables, "params": params}, opt)


def _average(state: State, share: float) -> State:
    """Updates the average of the students over the last `share` of the iterations; does nothing if
    `share` is 0."""
    if not share:
        return state
    before = jnp.ceil((1 - share) * state.strength.num_steps - ROUNDING)
    # a running mean; before the last share the weight is 1, which copies the student
    weight = 1 / jnp.maximum(state.step + 1 - before, 1)
    mix = lambda mean, now: ((1 - weight) * mean + weight * now).astype(mean.dtype)
    return state._replace(averaged=jax.tree.map(mix, state.averaged, state.student.variables))


def _repeat(
    update: Callable[[Key, State], tuple[State, tuple[Array, Array]]],
    keys: Key,
    state: State,
    inner: str,
) -> tuple[State, tuple[Array, Array]]:
    """Calls `update(key, state)` once per key of `keys` [k]; returns its figures stacked [k]."""
    if inner == "scan":
        return jax.lax.scan(lambda carry, key: update(key, carry), state, keys)
    every = []
    for key in keys:
        state, figures = update(key, state)
        every.append(figures)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
