"""DHBE: erases backdoors without any data, by distillation between two adversarial generators (Yan et al. 2023)."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbd import images as image_ops
from jaxbd import losses
from jaxbd.base import Array, ArrayTree, Batch, Key, Net, Repair, UserError, Variables, check_choices
from jaxbd.models.synthesis import SAMPLE_SIDES, TRIGGER_SIDES, SampleGenerator, TriggerGenerator, layout, to_pixels

PAPER = "https://arxiv.org/abs/2306.08009"
ROUNDING = 1e-3
"""A share of whole iterations may come out a rounding error above them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DHBE. Defaults follow the released code; `paper()` gives the paper's wording.

    Attributes:
      regularisation: lambda in eq. (8), weight of the student's change under generated triggers.
      inner_steps: k, student updates per iteration.
      batch_size: fake images, and as many triggers, per update.
      num_steps: iterations the schedule is laid out for.
      milestones: shares of them, increasing, at which all three rates drop x0.1.
      trigger_size: side of the generated triggers in pixels; 3..9 or a doubling of one of these.
      trigger_scale: factor on the triggers, which bounds their L1 norm by scale * side^2 * C in pixel units.
      place: where triggers are added. "batch": one random place per mini-batch (released); "image": one per image;
        "edges": one per image, in corners and along edges oftener than a uniform draw, see `images.edge_places`.
      prior_weight: of the total variation of fake images in the sample generator's loss; 0 in the paper.
      learning_rate: of the student's SGD.
      momentum: of SGD.
      weight_decay: of SGD, added to the gradient.
      generator_rate: of the sample generator's Adam.
      trigger_rate: of the trigger generator's Adam.
      noise_dim: noise values per image and per trigger, N(0, 1).
      width: of both generators, see `models.synthesis`.
      average: share of the iterations, the last ones, whose students are averaged, weights and running moments alike,
        into the repaired net; 0 takes the last student (released). The average loses less than a student does to the
        noise of a high learning rate.
      mean: per channel, of the generated images in [0, 1] units; one number stands for all channels. The generator
        makes what a net sees behind its input normalisation, so where a net has one these are its constants.
      std: likewise. The defaults are about those of photographs, for nets without a normalisation of their own.
      pure: plain adversarial distillation: no trigger is made and no triggered image passes the student. Weight 0 is
        not the same, since triggered images then still enter the student's running moments (Yan et al. 2023, 5.4.1).
      inner: the k student updates "unrolled" in the program or as a "scan"; the result is the same. Unrolled is for
        XLA:CPU, where a convolution's weight gradient inside a compiled loop is more than twenty times slower.
    """

    regularisation: float = 0.1
    inner_steps: int = 5
    batch_size: int = 256
    num_steps: int = 15_000
    milestones: tuple[float, ...] = (0.6, 0.8)
    trigger_size: int = 5
    trigger_scale: float = 1.0
    place: Literal["batch", "image", "edges"] = "batch"
    prior_weight: float = 1e-4
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    generator_rate: float = 1e-3
    trigger_rate: float = 1e-3
    noise_dim: int = 256
    width: int = 64
    average: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    pure: bool = False
    inner: Literal["unrolled", "scan"] = "unrolled"

    def __post_init__(self):
        check_choices("dhbe", self)
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if min(self.inner_steps, self.num_steps, self.noise_dim, self.width) < 1 or self.batch_size < 2:
            raise UserError("dhbe: inner_steps, num_steps, noise_dim and width must be at least 1, batch_size 2")
        if not (self.regularisation >= 0 and self.prior_weight >= 0 and self.trigger_scale > 0):
            raise UserError("dhbe: regularisation and prior_weight must be >= 0 and trigger_scale > 0")
        if not (self.learning_rate > 0 and self.generator_rate > 0 and self.trigger_rate > 0):
            raise UserError("dhbe: learning_rate, generator_rate and trigger_rate must be > 0")
        if not all(one < other for one, other in itertools.pairwise((0.0, *self.milestones, 1.0))):
            raise UserError("dhbe: milestones must increase and lie between 0 and 1")
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise UserError("dhbe: momentum must be in [0, 1) and weight_decay >= 0")
        if not 0 <= self.average <= 1:
            raise UserError("dhbe: average is a share of the iterations, from 0 to 1")
        if not (self.mean and self.std and all(value > 0 for value in self.std)):
            raise UserError("dhbe: mean and std need one number, or one per channel, and std must be > 0")
        layout(self.trigger_size, TRIGGER_SIDES)


def released(**changes) -> Config:
    """The settings of the released code."""
    return Config(**changes)


def paper(**changes) -> Config:
    """The settings the paper's text states; everything it does not state stays as released.

    Its text leaves out the constant that scales the triggers: `trigger_scale` is the released 1 unless given.
    """
    return Config(**{**dict(inner_steps=3, batch_size=128, prior_weight=0.0), **changes})


def quick(**changes) -> Config:
    """Sixty iterations instead of 15,000, for a CPU: a departure from paper and released code.

    The student learns at a fifth of the rate and decays less, or a short run with small batches would wreck what it
    knows; the rate stays, and the last students are averaged. It has twice the updates for each of the generators', or
    it falls behind them and loses accuracy. Triggers are small and strong, for large ones hide the image; they learn
    ten times as fast and lie at a place of their own on every image, often in a corner or at an edge. The sample
    generator is slower and smoother, or it learns to draw the trigger, and the student is taught it again.
    """
    settings = dict(
        num_steps=60, milestones=(), inner_steps=10, batch_size=32, width=16, learning_rate=0.02, weight_decay=1e-4,
        generator_rate=2e-4, prior_weight=1e-2, trigger_rate=1e-2, trigger_size=3, trigger_scale=2.5, place="edges",
        average=0.25,
    )  # fmt: skip
    return Config(**{**settings, **changes})


class Strength(NamedTuple):
    """The numbers of a Config that are traced: runs that differ in nothing else share one compiled step.

    All [] float32 but num_steps, [] int32; named as in `Config`.
    """

    regularisation: Array
    learning_rate: Array
    generator_rate: Array
    trigger_rate: Array
    num_steps: Array


class Learner(NamedTuple):
    """variables of one of the three nets in training, and its optimiser's state."""

    variables: Variables
    opt: optax.OptState


class State(NamedTuple):
    """What DHBE needs to go on.

    Attributes:
      step: [] int32, iterations done.
      teacher: the victim's variables, which never change.
      student, generator, trigger: the repaired net, the sample generator and the trigger generator.
      averaged: the average student so far, before its share of the iterations the student's own variables; {} where
        `Config.average` is 0.
      strength: `init` takes it from the Config; a driver may replace it, for a sweep over lambda or the rates.
    """

    step: Array
    teacher: Variables
    student: Learner
    generator: Learner
    trigger: Learner
    averaged: Variables
    strength: Strength


class Info(NamedTuple):
    """What one looks at. All [] float32: discrepancy and regulariser (eqs. 2 and 7) averaged over the student's
    updates, the two generators' losses, and the student's learning rate."""

    discrepancy: Array
    regulariser: Array
    generator_loss: Array
    trigger_loss: Array
    learning_rate: Array


def strength(config: Config) -> Strength:
    """The traced numbers of `config`."""
    names = ("regularisation", "learning_rate", "generator_rate", "trigger_rate")
    return Strength(*(jnp.float32(getattr(config, name)) for name in names), jnp.int32(config.num_steps))


def decay(step: Array, num_steps: Array, milestones: tuple[float, ...] = (0.6, 0.8)) -> Array:
    """Factor [] on all three rates at iteration `step` [] of `num_steps` []: x0.1 from each milestone's share on."""
    drops = sum((step >= jnp.ceil(share * num_steps - ROUNDING) for share in milestones), start=jnp.int32(0))
    return jnp.array([0.1**passed for passed in range(len(milestones) + 1)], jnp.float32)[drops]


def make(net: Net, image_shape: tuple[int, int, int], config: Config) -> Repair:
    """DHBE for nets of architecture `net` on images of `image_shape` (H, W, C); one step is one iteration.

    `init(key, variables, evidence=())` copies the victim into teacher and student; no evidence is taken and no batch.

    Raises: UserError when the images are not square, have no generator, or are smaller than the trigger.
    """
    height, width, channels = image_shape
    side = config.trigger_size
    if height != width:
        raise UserError(f"dhbe: the sample generator makes square images only, not {height}x{width}")
    layout(height, SAMPLE_SIDES)
    if side > height:
        raise UserError(f"dhbe: a {side}x{side} trigger does not fit {height}x{width} images; lower the trigger size")
    if not {len(config.mean), len(config.std)} <= {1, channels}:
        raise UserError(f"dhbe: mean and std need 1 or {channels} numbers for images of {channels} channels")
    samples = SampleGenerator(tuple(image_shape), config.width)
    triggers = TriggerGenerator(side, channels, config.width)
    sgd = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))
    adam = optax.scale_by_adam()

    def init(key: Key, variables: Variables, evidence: tuple = ()) -> State:
        if jax.tree.leaves(evidence):
            raise UserError("dhbe: takes no evidence; it erases triggers without knowing any")
        noise = jnp.zeros((2, config.noise_dim))
        learners = []
        for module, module_key in zip((samples, triggers), jax.random.split(key), strict=True):
            made = module.init(module_key, noise, train=True)
            made = {name: made[name] for name in ("params", "batch_stats")}
            learners.append(Learner(made, adam.init(made["params"])))
        teacher, student = (jax.tree.map(jnp.copy, {"batch_stats": {}, **variables}) for _ in range(2))
        averaged = jax.tree.map(jnp.copy, student) if config.average else {}
        student = Learner(student, sgd.init(student["params"]))
        return State(jnp.zeros((), jnp.int32), teacher, student, *learners, averaged, strength(config))

    def generate(module, params: ArrayTree, learner: Learner, key: Key) -> tuple[Array, Learner]:
        """What the module makes of fresh noise, on batch moments, and `learner` with its running moments updated."""
        noise = image_ops.divided(jax.random.normal(key, (config.batch_size, config.noise_dim)))
        variables = {**learner.variables, "params": params}
        made, updates = module.apply(variables, noise, train=True, mutable=["batch_stats"])
        return made, learner._replace(variables={**learner.variables, **updates})

    def fake(key: Key, params: ArrayTree, state: State) -> tuple[Array, State]:
        """Images [B, H, W, C] from the sample generator with `params`, still normalised."""
        made, generator = generate(samples, params, state.generator, key)
        return made, state._replace(generator=generator)

    def stamp(key: Key, params: ArrayTree, state: State, images: Array) -> tuple[Array, State]:
        """`images` plus triggers from the trigger generator with `params`; nothing is clipped."""
        noise_key, place_key = jax.random.split(key)
        patches, trigger = generate(triggers, params, state.trigger, noise_key)
        count = 1 if config.place == "batch" else config.batch_size
        draw = image_ops.edge_places if config.place == "edges" else image_ops.random_places
        places = draw(place_key, count, image_shape, (side, side))
        places = jnp.broadcast_to(places, (config.batch_size, 2))
        canvas = jax.vmap(image_ops.paste)(jnp.zeros_like(images), config.trigger_scale * patches, places)
        return images + canvas, state._replace(trigger=trigger)

    def answer(params: ArrayTree, state: State, images: Array) -> tuple[Array, State]:
        """The student's logits [B, K] on batch moments, and the state with its running moments updated."""
        learner = state.student
        logits, stats = net.apply({**learner.variables, "params": params}, images, train=True)
        return logits, state._replace(student=learner._replace(variables={**learner.variables, "batch_stats": stats}))

    def teach(state: State, images: Array) -> Array:
        return net.apply(state.teacher, images, train=False)[0]

    def pixels(made: Array) -> Array:
        return to_pixels(made, config.mean, config.std)

    def descend(rule, learner: Learner, gradient: ArrayTree, rate: Array, state: State) -> Learner:
        """One update of `learner`; `rate` [] before its decay."""
        params = learner.variables["params"]
        updates, opt = rule.update(gradient, learner.opt, params)
        rate = rate * decay(state.step, state.strength.num_steps, config.milestones)
        params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
        return Learner({**learner.variables, "params": params}, opt)

    def student_step(key: Key, state: State) -> tuple[State, tuple[Array, Array]]:
        fake_key, trigger_key = jax.random.split(key)
        made, state = fake(fake_key, state.generator.variables["params"], state)
        images = stamped = pixels(made)
        if not config.pure:
            stamped, state = stamp(trigger_key, state.trigger.variables["params"], state, images)
        wanted = teach(state, images)

        def loss(params):
            logits, after = answer(params, state, images)
            discrepancy = losses.mean_absolute_difference(logits, wanted)
            if config.pure:
                return discrepancy, (after, discrepancy, jnp.zeros_like(discrepancy))
            # two passes, not one over both: images and triggered images are each normalised by their own moments
            triggered, after = answer(params, after, stamped)
            regulariser = losses.mean_absolute_difference(triggered, jax.lax.stop_gradient(logits))
            # eq. (8)
            return discrepancy + state.strength.regularisation * regulariser, (after, discrepancy, regulariser)

        gradient, (after, *seen) = jax.grad(loss, has_aux=True)(state.student.variables["params"])
        student = descend(sgd, after.student, gradient, state.strength.learning_rate, state)
        return after._replace(student=student), tuple(seen)

    def generator_step(key: Key, state: State) -> tuple[State, Array]:
        def loss(params):
            made, after = fake(key, params, state)
            images = pixels(made)
            logits, after = answer(state.student.variables["params"], after, images)
            discrepancy = losses.mean_absolute_difference(logits, teach(state, images))
            return config.prior_weight * losses.image_roughness(made) - discrepancy, after

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, after), gradient = grad(state.generator.variables["params"])
        generator = descend(adam, after.generator, gradient, state.strength.generator_rate, state)
        return after._replace(generator=generator), value

    def trigger_step(key: Key, state: State) -> tuple[State, Array]:
        fake_key, trigger_key = jax.random.split(key)
        made, state = fake(fake_key, state.generator.variables["params"], state)
        images, student_params = pixels(made), state.student.variables["params"]
        logits, state = answer(student_params, state, images)

        def loss(params):
            stamped, after = stamp(trigger_key, params, state, images)
            triggered, after = answer(student_params, after, stamped)
            return -losses.mean_absolute_difference(logits, triggered), after

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, after), gradient = grad(state.trigger.variables["params"])
        trigger = descend(adam, after.trigger, gradient, state.strength.trigger_rate, state)
        return after._replace(trigger=trigger), value

    def step(key: Key, state: State, batch: Batch | None = None) -> tuple[State, Info]:
        if batch is not None:
            raise UserError("dhbe: takes no data; call the step without a batch")
        keys, rate = jax.random.split(key, config.inner_steps + 2), state.strength.learning_rate
        state, seen = _repeat(student_step, keys[:-2], state, config.inner)
        state, generator_loss = generator_step(keys[-2], state)
        trigger_loss = jnp.zeros_like(generator_loss)
        if not config.pure:
            state, trigger_loss = trigger_step(keys[-1], state)
        rate = rate * decay(state.step, state.strength.num_steps, config.milestones)
        info = Info(*(leaf.mean() for leaf in seen), generator_loss, trigger_loss, rate)
        return averaging(state)._replace(step=state.step + 1), info

    def averaging(state: State) -> State:
        if not config.average:
            return state
        before = jnp.ceil((1 - config.average) * state.strength.num_steps - ROUNDING)
        share = 1 / jnp.maximum(state.step + 1 - before, 1)
        mix = lambda kept, now: ((1 - share) * kept + share * now).astype(kept.dtype)
        return state._replace(averaged=jax.tree.map(mix, state.averaged, state.student.variables))

    def extract(state: State) -> Variables:
        return state.averaged if config.average else state.student.variables

    return Repair(init, step, extract)


def _repeat(update, keys: Key, state: State, inner: str) -> tuple[State, tuple[Array, Array]]:
    """`update(key, state)` once per key of `keys` [k]; what it shows comes stacked [k]."""
    if inner == "scan":
        return jax.lax.scan(lambda carry, key: update(key, carry), state, keys)
    seen = []
    for key in keys:
        state, shown = update(key, state)
        seen.append(shown)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)
