"""Images from DHBE's generators, and a net's predictions for them: pictures of an erasure, and a
warning sign before it starts.

The erasure itself is `pipelines.repair.repair` with method "dhbe". Prints nothing, opens no file,
and needs no data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import methods
from jaxbd.base import Key, RepairData, Suspect, UserError
from jaxbd.images import to_float
from jaxbd.models.synthesis import SampleGenerator, TriggerGenerator, to_pixels
from jaxbd.pipelines import repair
from jaxbd.repairs import dhbe
from jaxbd.training.loop import Chunk

UNTRAINED = 8
"""Number of untrained generators used by `ask_untrained`."""
CELLS = (2, 4, 8, 16, 32)
"""Cells per side of the images of noise in `ask_noise`."""


def adapt(config: dhbe.Config, suspect: Suspect) -> dhbe.Config:
    """`config` adapted to `suspect` as in its repair, see `dhbe.adapt`."""
    return dhbe.adapt(config, suspect, RepairData(), config.batch_size)


def start(key: Key, suspect: Suspect, config: dhbe.Config) -> dhbe.State:
    """The initial state of `pipelines.repair.repair` with the same `key`."""
    made = repair.make(methods.find("repair", "dhbe"), suspect.problem(), adapt(config, suspect))
    return repair.start(made, jax.random.fold_in(key, 0), suspect.variables, RepairData())


def samples(
    key: Key, state: dhbe.State, image_shape: tuple[int, int, int], config: dhbe.Config, count: int
) -> np.ndarray:
    """Images uint8 [count, H, W, C] that the sample generator makes from noise drawn with `key`.

    As in training, batch normalisation uses the moments of a batch (of `config.batch_size` or
    `count` images, whichever is more), not the running moments. Values outside [0, 1] are clipped.
    `config` must come from `adapt`.

    Raises: UserError when count is less than 1.
    """
    module = SampleGenerator(image_shape, config.width)
    made = _generate(module, key, state.generator, config, count)
    return _as_bytes(to_pixels(made, config.mean, config.std))


def triggers(
    key: Key, state: dhbe.State, image_shape: tuple[int, int, int], config: dhbe.Config, count: int
) -> np.ndarray:
    """Triggers uint8 [count, side, side, C] that the trigger generator makes; with batch moments,
    as in `samples`.

    Triggers are added to images: mid-grey stands for 0, black for -`config.trigger_scale` and white
    for +`config.trigger_scale`.

    Raises: UserError when count is less than 1.
    """
    module = TriggerGenerator(config.trigger_size, image_shape[-1], config.width)
    return _as_bytes(0.5 + 0.5 * _generate(module, key, state.trigger, config, count))


def ask_untrained(key: Key, suspect: Suspect, config: dhbe.Config, count: int = 64) -> np.ndarray:
    """Classes int [UNTRAINED * count] that the suspect predicts for images of untrained generators.

    If nearly all are the same, generated images reveal next to nothing about the net, and erasing
    without data fails on it (docs/results.md). Several generators are used because the images of a
    single one may look alike to the net by chance. `config` must come from `adapt`.

    Raises: UserError when count is less than 1.
    """

    def ask(own: Key) -> np.ndarray:
        state = start(jax.random.fold_in(own, 0), suspect, config)
        made = samples(jax.random.fold_in(own, 1), state, suspect.image_shape, config, count)
        logits, _ = suspect.net.apply(suspect.variables, to_float(jnp.asarray(made)), train=False)
        return np.asarray(logits.argmax(-1))

    return np.concatenate([ask(own) for own in jax.random.split(key, UNTRAINED)])


def ask_noise(key: Key, suspect: Suspect, count: int = 64) -> np.ndarray:
    """Classes int [len(CELLS) * count] that the suspect predicts for images of uniform noise in
    [0, 1], in coarse to fine cells.

    A net that works gives several classes, even one that gives a single class to the images of
    untrained generators. A net that an erasure has ruined gives the same class throughout. This
    check is ours; neither the paper nor its code has one.

    Raises: UserError when count is less than 1.
    """
    if count < 1:
        raise UserError(f"count must be at least 1 image, got {count}")
    channels = suspect.image_shape[-1]

    def ask(own: Key, cells: int) -> np.ndarray:
        noise = jax.random.uniform(own, (count, cells, cells, channels))
        images = jax.image.resize(noise, (count, *suspect.image_shape), "nearest")
        logits, _ = suspect.net.apply(suspect.variables, images, train=False)
        return np.asarray(logits.argmax(-1))

    keys = jax.random.split(key, len(CELLS))
    return np.concatenate([ask(own, cells) for own, cells in zip(keys, CELLS, strict=True)])


def most_frequent(labels: np.ndarray) -> tuple[int, float]:
    """The most frequent class in `labels` int [N], and its share."""
    counts = np.bincount(labels)
    return int(counts.argmax()), float(counts.max() / len(labels))


def _generate(
    module: nn.Module, key: Key, learner: dhbe.Learner, config: dhbe.Config, count: int
) -> jax.Array:
    """The first `count` outputs of the module for a batch of noise; leaves its running moments
    unchanged."""
    if count < 1:
        raise UserError(f"count must be at least 1 image, got {count}")
    noise = jax.random.normal(key, (max(count, config.batch_size), config.noise_dim))
    made, _ = module.apply(learner.variables, noise, train=True, mutable=["batch_stats"])
    return made[:count]


def _as_bytes(images: jax.Array) -> np.ndarray:
    """Pixels in [0, 1] as uint8."""
    return np.asarray(jnp.round(255 * jnp.clip(images, 0, 1)).astype(jnp.uint8))


class Picture(NamedTuple):
    """Output of the generators after `step` iterations: samples uint8 [n, H, W, C], triggers uint8
    [n, h, w, C]."""

    step: int
    samples: np.ndarray
    triggers: np.ndarray


class Album:
    """Takes pictures at a few moments of an erasure, always from the same noise.

    Add `observe` to the run's observers, and `add` the state of `start` for a picture of the
    untrained generators. Pictures are taken at the end of a chunk: the first that ends at or after
    the moment. A resumed run has pictures only from the step at which it was resumed.

    Attributes:
      pictures: in chronological order.
    """

    def __init__(
        self,
        key: Key,
        suspect: Suspect,
        config: dhbe.Config,
        *,
        shares: Sequence[float] = (0.0, 0.1, 0.3, 1.0),
        count: int = 12,
    ):
        """Sets the moments.

        Args:
          config: settings from `adapt`.
          shares: moments, as shares of all iterations in [0, 1].
          count: images per picture.
        """
        self.pictures: list[Picture] = []
        self._key, self._image_shape = key, suspect.image_shape
        self._config, self._count = config, count
        self._moments = sorted({share * config.num_steps for share in shares})

    def observe(self, name: str, chunk: Chunk, first: int) -> None:
        """Observer for `training.run.Run`: adds a picture if one is due."""
        del name
        done = first + chunk.done
        # getting the state costs a copy, so get it only if a picture is due
        if isinstance(chunk.infos, dhbe.Info) and self._is_due(done):
            self.add(done, chunk.get_state())

    def add(self, done: int, state: dhbe.State) -> None:
        """Adds a picture of `state` if one is due."""
        if not self._is_due(done):
            return
        self._moments = [moment for moment in self._moments if moment > done]
        known = (state, self._image_shape, self._config, self._count)
        one, other = jax.random.split(self._key)
        self.pictures.append(Picture(done, samples(one, *known), triggers(other, *known)))

    def _is_due(self, done: int) -> bool:
        return bool(self._moments) and self._moments[0] <= done
