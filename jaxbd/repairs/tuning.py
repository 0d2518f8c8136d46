"""What repairs that go on training share: the rule of SGD, its rate over time, augmentation,
lengths in passes over the images, and the checks of such settings."""

import dataclasses
import itertools
from typing import Any

import optax

from jaxbd.base import Batch, Key, RepairData, UserError, check_choices
from jaxbd.images import augment

EPOCHS = {"epochs": "num_steps", "teacher_epochs": "teacher_steps"}
"""Setting that counts passes over the clean images -> the one that counts steps."""


def sgd(
    rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD in PyTorch's convention: weight decay is added to the gradient, before momentum, of every
    parameter."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=momentum, nesterov=nesterov))


def step_down(rate: float, num_steps: int, milestones: tuple[float, ...]) -> optax.Schedule:
    """`rate`, x0.1 from each of the `milestones` on, which are shares of `num_steps`."""
    drops = {round(num_steps * share): 0.1 for share in milestones}
    return optax.piecewise_constant_schedule(rate, drops)


def vary(key: Key, batch: Batch, config: Any) -> Batch:
    """`batch` randomly cropped and flipped as `config.crop_padding` and `config.flip` say."""
    images = augment(key, batch.images, crop_padding=config.crop_padding, flip=config.flip)
    return Batch(images, batch.labels)


def count_steps(config: Any, data: RepairData, batch_size: int) -> Any:
    """`config` with its `EPOCHS`, where they are set, as numbers of steps for `data`'s clean
    images."""
    if data.clean is None:
        return config
    in_one = -(-len(data.clean.labels) // batch_size)
    changes = {}
    for epochs, steps in EPOCHS.items():
        passes = getattr(config, epochs, None)
        if passes is not None:
            changes |= {steps: passes * in_one, epochs: None}
    return dataclasses.replace(config, **changes)


def check(method: str, config: Any) -> None:
    """Raises UserError in the name of `method` unless the settings of training in `config` make
    sense. Checks those fields of `config` that have the names used here."""
    check_choices(method, config)
    get = lambda name, usual: getattr(config, name, usual)
    if not 0 < config.learning_rate < float("inf"):
        raise UserError(f"{method}: learning_rate must be > 0, got {config.learning_rate}")
    if not (0 <= config.momentum < 1 and 0 <= config.weight_decay < float("inf")):
        raise UserError(f"{method}: momentum must be in [0, 1) and weight_decay >= 0")
    for name in itertools.chain(*EPOCHS.items()):
        length = get(name, None)
        if length is not None and length < 1:
            raise UserError(f"{method}: {name} must be at least 1, got {length}")
    for name in ("milestones", "teacher_milestones"):
        shares = tuple(get(name, ()))
        if not all(a < b for a, b in itertools.pairwise((0.0, *shares, 1.0))):
            raise UserError(f"{method}: {name} must increase between 0 and 1, got {shares}")
    if get("crop_padding", 0) < 0:
        raise UserError(f"{method}: crop_padding must be at least 0, got {config.crop_padding}")
