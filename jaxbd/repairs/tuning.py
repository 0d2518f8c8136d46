"""Shared by repairs that continue training: SGD, learning-rate schedules, augmentation, lengths in
passes over the images, and checks of these settings."""

import dataclasses
import itertools
from typing import Any

import optax

from jaxbd.base import Batch, Key, RepairData, UserError, check_choices
from jaxbd.images import augment

EPOCHS = {"epochs": "num_steps", "teacher_epochs": "teacher_steps"}
"""Setting in passes over the clean images -> the corresponding setting in steps."""


def sgd(
    rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD in PyTorch's convention: weight decay is added to every parameter's gradient before
    momentum."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(rate, momentum=momentum, nesterov=nesterov))


def step_down(rate: float, num_steps: int, milestones: tuple[float, ...]) -> optax.Schedule:
    """`rate`, dropped x0.1 at each of the `milestones`, which are shares of `num_steps`."""
    drops = {round(num_steps * share): 0.1 for share in milestones}
    return optax.piecewise_constant_schedule(rate, drops)


def vary(key: Key, batch: Batch, config: Any) -> Batch:
    """Crops and flips `batch` at random according to `config.crop_padding` and `config.flip`."""
    images = augment(key, batch.images, crop_padding=config.crop_padding, flip=config.flip)
    return Batch(images, batch.labels)


def count_steps(config: Any, data: RepairData, batch_size: int) -> Any:
    """`config` with its `EPOCHS` settings, if set, converted to steps for `data`'s clean
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
    """Raises UserError if a training setting in `config` is out of range; `method` begins the
    message. Checks only the fields that `config` has."""
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
