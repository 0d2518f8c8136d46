"""Clean accuracy, attack success rate and source inference accuracy. One of the three places that call `jax.jit`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxbd.base import Attack, Batch, Key, Net, Variables
from jaxbd.images import to_float
from jaxbd.loop import Program
from jaxbd.sweep import batches


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a net does on clean and on triggered images; the keys of `evaluate.json`.

    Attributes:
      clean_accuracy: share of clean images given their own label.
      attack_success_rate: share of triggered images given the attacker's label, over images whose true label is not
        already that label; None when no trigger was given.
      source_inference_accuracy: share of those same triggered images given their own label (SIA, Li et al. 2022).
      attack_success_rate_correct_only: the same over images that the net gets right without the trigger (the
        denominator of DHBE's ASR, Yan et al. 2023, eq. 9).
      n_clean: images behind `clean_accuracy`.
      n_triggered: the denominator of `attack_success_rate`.
    """

    clean_accuracy: float
    attack_success_rate: float | None
    source_inference_accuracy: float | None
    attack_success_rate_correct_only: float | None
    n_clean: int
    n_triggered: int


@functools.lru_cache(maxsize=64)
def _predictor(net_apply: Callable[..., Any]) -> Program:
    return Program(lambda variables, images: net_apply(variables, to_float(images), train=False)[0])


@functools.lru_cache(maxsize=64)
def _stamped_predictor(net_apply: Callable[..., Any], stamp: Callable[..., Any]) -> Program:
    def predict(key, variables, trigger, images):
        return net_apply(variables, stamp(key, trigger, to_float(images)), train=False)[0]

    return Program(predict)


def logits(net: Net, variables: Variables, data: Batch, *, batch_size: int = 256) -> np.ndarray:
    """Logits [N, K] of the net on `data` (images uint8 or float in [0, 1])."""
    program = _predictor(net.apply)
    parts = [np.asarray(program(variables, images))[real] for images, _, real in batches(data, batch_size)]
    return np.concatenate(parts)


def triggered_logits(
    key: Key,
    net: Net,
    variables: Variables,
    stamp: Callable[..., Any],
    trigger: Any,
    data: Batch,
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """Logits [N, K] on `data` with every image stamped by `stamp(key, trigger, images)`."""
    program = _stamped_predictor(net.apply, stamp)
    parts = []
    for number, (images, _, real) in enumerate(batches(data, batch_size)):
        parts.append(np.asarray(program(jax.random.fold_in(key, number), variables, trigger, images))[real])
    return np.concatenate(parts)


def rates(
    key: Key, net: Net, variables: Variables, data: Batch, attack: Attack | None = None, trigger: Any = None
) -> Rates:
    """All rates of a net on `data`, with the attack's trigger where one is given.

    Only `attack.stamp` and `attack.relabel` are used, so any stamping function with a wish for labels will do.
    """
    labels = np.asarray(data.labels)
    predicted = logits(net, variables, data).argmax(-1)
    accuracy = float((predicted == labels).mean())
    if attack is None:
        return Rates(accuracy, None, None, None, len(labels), 0)
    wanted = np.asarray(attack.relabel(labels))
    stamped = triggered_logits(key, net, variables, attack.stamp, trigger, data).argmax(-1)
    counted = wanted != labels
    correct = counted & (predicted == labels)
    share = lambda hits, among: float(hits[among].mean()) if among.any() else 0.0
    return Rates(
        accuracy,
        share(stamped == wanted, counted),
        share(stamped == labels, counted),
        share(stamped == wanted, correct),
        len(labels),
        int(counted.sum()),
    )
