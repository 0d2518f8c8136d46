"""Erases a net's backdoors without any data (DHBE): the driver of `repair.dhbe`.

Composition like `workflow`: nothing is printed, no file is opened, and nothing here takes an image.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import loop
from jaxbd.base import Key, Net, UserError, Variables
from jaxbd.images import to_float
from jaxbd.models.norm import NORMALISATIONS
from jaxbd.models.synthesis import SampleGenerator, TriggerGenerator, to_pixels
from jaxbd.remembered import remembered
from jaxbd.repair import dhbe
from jaxbd.workflow import Progress, Repaired

UNTRAINED = 8
"""Untrained generators whose images a net is asked about."""


@remembered(32)
def _method(net: Net, image_shape: tuple[int, int, int], config: dhbe.Config):
    """The method, and its step keyed by the state's own step number; kept, so that nothing is traced twice."""
    method = dhbe.make(net, image_shape, config)

    def advance(state, key):
        return method.step(jax.random.fold_in(key, state.step), state)

    return method, advance


def settled(
    config: dhbe.Config,
    mean: tuple[float, ...] = NORMALISATIONS["none"][0],
    std: tuple[float, ...] = NORMALISATIONS["none"][1],
    over_time: loop.Time = "auto",
) -> dhbe.Config:
    """`config` for a net with input normalisation `mean`, `std`, and for the way over time.

    The images generated for a net that normalises have its constants for moments, so that it sees zero mean and unit
    variance, as released; for a net that does not, `config.mean` and `config.std` stay. The student's updates are a
    loop of the program where the iterations are.
    """
    over_time = loop.default_time() if over_time == "auto" else over_time
    if (tuple(mean), tuple(std)) != NORMALISATIONS["none"]:
        config = dataclasses.replace(config, mean=tuple(mean), std=tuple(std))
    return dataclasses.replace(config, inner="scan" if over_time == "scan" else "unrolled")


def start(key: Key, net: Net, image_shape: tuple[int, int, int], variables: Variables, config: dhbe.Config):
    """The state that `run` begins with; `config` as `settled` gives it."""
    method, _ = _prepared(net, image_shape, config)
    state = method.init(jax.random.fold_in(key, 0), variables)
    return state._replace(strength=dhbe.strength(config))


def _prepared(net: Net, image_shape: tuple[int, int, int], config: dhbe.Config):
    """The method for `config` with its traced numbers left at their defaults: all their values share one program."""
    plain = {name: getattr(dhbe.Config(), name) for name in dhbe.Strength._fields}
    return _method(net, tuple(image_shape), dataclasses.replace(config, **plain))


def run(
    key: Key,
    net: Net,
    image_shape: tuple[int, int, int],
    variables: Variables,
    config: dhbe.Config,
    *,
    mean: tuple[float, ...] = NORMALISATIONS["none"][0],
    std: tuple[float, ...] = NORMALISATIONS["none"][1],
    state: dhbe.State | None = None,
    over_time: loop.Time = "auto",
    chunk: int = 10,
    progress: Progress | None = None,
    on_chunk: Callable[[int, dhbe.State, Any], None] | None = None,
    label: str = "erase",
) -> Repaired:
    """Erases whatever backdoors the net with weights `variables` has; no data is needed.

    Args:
      mean, std: the net's own input normalisation, see `settled`.
      state: goes on from a saved state (it is used up), bit for bit as if the run had never stopped.
      on_chunk: (iterations done, state, infos of the chunk) after every `chunk` iterations; the state is only valid
        during the call.

    Returns: variables of the repaired net, infos [iterations run], seconds.
    Raises: UserError when the net's images or the trigger size do not fit; loop.NotFinite on divergence.
    """
    config = settled(config, mean, std, over_time)
    method, advance = _prepared(net, image_shape, config)
    state = start(key, net, image_shape, variables, config) if state is None else state
    before, report = int(state.step), progress or (lambda *_: None)
    report(label, before, config.num_steps)

    def after_chunk(done: int, now: dhbe.State, infos: Any) -> None:
        report(label, before + done, config.num_steps)
        if on_chunk is not None:
            on_chunk(before + done, now, infos)

    state, infos, seconds = loop.run(
        advance,
        state,
        jax.random.fold_in(key, 1),
        num_steps=config.num_steps - before,
        over_time=over_time,
        chunk=chunk,
        on_chunk=after_chunk,
        rows=config.batch_size,
    )
    return Repaired(method.extract(state), infos, seconds)


def samples(
    key: Key, state: dhbe.State, image_shape: tuple[int, int, int], config: dhbe.Config, count: int
) -> np.ndarray:
    """Images uint8 [count, H, W, C] that the sample generator makes of noise drawn with `key`.

    As in training they are normalised by the moments of a batch, of `config.batch_size` or of `count` if that is more;
    running moments are not used. `config` as `settled` gives it; values outside [0, 1] are cut off.

    Raises: UserError when count is less than 1.
    """
    module = SampleGenerator(tuple(image_shape), config.width)
    made = _generated(module, key, state.generator, config, count)
    return _stored(to_pixels(made, config.mean, config.std))


def answers(
    key: Key, net: Net, image_shape: tuple[int, int, int], variables: Variables, config: dhbe.Config, count: int = 64
) -> np.ndarray:
    """Classes int [UNTRAINED * count] that the net answers to images of untrained generators.

    `config` as `settled` gives it. Where nearly all are the same, generated images tell next to nothing about the net,
    and erasing without data fails on it (docs/results.md). One generator's images may by chance look more alike to the
    net than another's, hence several.

    Raises: UserError when count is less than 1.
    """

    def answered(own: Key) -> np.ndarray:
        state = start(jax.random.fold_in(own, 0), net, image_shape, variables, config)
        made = samples(jax.random.fold_in(own, 1), state, image_shape, config, count)
        logits, _ = net.apply(variables, to_float(made), train=False)
        return np.asarray(logits.argmax(-1))

    return np.concatenate([answered(own) for own in jax.random.split(key, UNTRAINED)])


def oftenest(answered: np.ndarray) -> tuple[int, float]:
    """The most frequent of classes int [N], and its share of them."""
    counts = np.bincount(answered)
    return int(counts.argmax()), float(counts.max() / len(answered))


def triggers(
    key: Key, state: dhbe.State, image_shape: tuple[int, int, int], config: dhbe.Config, count: int
) -> np.ndarray:
    """Triggers uint8 [count, side, side, C] that the trigger generator makes, on batch moments as `samples`.

    Triggers are added to images, so mid-grey stands for 0, black and white for -1 and +1 times `config.trigger_scale`.

    Raises: UserError when count is less than 1.
    """
    module = TriggerGenerator(config.trigger_size, image_shape[-1], config.width)
    return _stored(0.5 + 0.5 * _generated(module, key, state.trigger, config, count))


def _generated(module: nn.Module, key: Key, learner: dhbe.Learner, config: dhbe.Config, count: int) -> jax.Array:
    """The first `count` that the module makes of a batch of noise; its own running moments stay as they are."""
    if count < 1:
        raise UserError(f"{count} images were asked for; give at least 1")
    noise = jax.random.normal(key, (max(count, config.batch_size), config.noise_dim))
    return module.apply(learner.variables, noise, train=True, mutable=["batch_stats"])[0][:count]


def _stored(images: jax.Array) -> np.ndarray:
    """Pixels in [0, 1] as uint8."""
    return np.asarray(jnp.round(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8))


class Picture(NamedTuple):
    """What the generators made after `step` iterations: samples uint8 [n, H, W, C], triggers uint8 [n, h, w, C]."""

    step: int
    samples: np.ndarray
    triggers: np.ndarray


class Album:
    """Pictures of a few moments of a run, always of the same noise; give `on_chunk` to `run`.

    A moment is the end of the first chunk after it. A run that goes on from a saved state has pictures from there on.

    Attributes:
      pictures: in order of time.
    """

    def __init__(
        self,
        key: Key,
        image_shape: tuple[int, int, int],
        config: dhbe.Config,
        *,
        shares: Sequence[float] = (0.0, 0.1, 0.3, 1.0),
        count: int = 12,
    ):
        """`shares` of the run's iterations in [0, 1] are the moments; `count` images each; `config` as `settled`."""
        self.pictures: list[Picture] = []
        self._key, self._image_shape, self._config, self._count = key, tuple(image_shape), config, count
        self._left = sorted({share * config.num_steps for share in shares})

    def on_chunk(self, done: int, state: dhbe.State, infos: Any = None) -> None:
        """Adds a picture when a moment has come; `infos` is not looked at."""
        due = [moment for moment in self._left if moment <= done]
        if due:
            self._left = self._left[len(due) :]
            shown = (state, self._image_shape, self._config, self._count)
            one, other = jax.random.split(self._key)
            self.pictures.append(Picture(done, samples(one, *shown), triggers(other, *shown)))
