"""Clean accuracy, attack success rate, source inference accuracy, and how often a test-time
detector is right."""

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Attack, Batch, Key, Net, Variables
from jaxbd.caching import cached
from jaxbd.images import to_float
from jaxbd.metrics.batches import Measure, measure_batches


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a net does on clean and on triggered images; the keys of `evaluate.json`.

    Attributes:
      clean_accuracy: share of clean images given their own label.
      attack_success_rate: share of triggered images given the attacker's label, over images whose
        true label is not already that label; None, like the next two, when no trigger was given or
        no image counts.
      source_inference_accuracy: share of those same triggered images given their own label (SIA, Li
        et al. 2022).
      attack_success_rate_correct_only: the same over images that the net gets right without the
        trigger (the denominator of DHBE's ASR, Yan et al. 2023, eq. 9).
      n_clean: images behind `clean_accuracy`.
      n_triggered: the denominator of `attack_success_rate`.
    """

    clean_accuracy: float
    attack_success_rate: float | None
    source_inference_accuracy: float | None
    attack_success_rate_correct_only: float | None
    n_clean: int
    n_triggered: int


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well a test-time detector tells triggered images from clean ones (Li et al. 2023, section
    5.3).

    Attributes:
      true_positive_rate: share of triggered images that are flagged, over images whose true label
        is not already the attacker's; None where there is none.
      false_positive_rate: share of clean images of the attacker's target classes that are flagged
        (with an all-to-all attack, of all classes); None where there is none.
      false_positive_rate_all: the same over all clean images, whatever their class.
      n_triggered, n_clean_target, n_clean: the three denominators.
    """

    true_positive_rate: float | None
    false_positive_rate: float | None
    false_positive_rate_all: float | None
    n_triggered: int
    n_clean_target: int
    n_clean: int


@cached(64)
def predictor(net_apply: Callable[..., Any]) -> Measure:
    """(key, variables, images) -> logits [B, K]; the same function for the same net."""
    return lambda key, variables, images: net_apply(variables, to_float(images), train=False)[0]


@cached(64)
def stamped_predictor(net_apply: Callable[..., Any], stamp: Callable[..., Any]) -> Measure:
    """(key, (variables, trigger), images) -> logits [B, K] of stamped images."""

    def predict(key: Key, known: tuple[Variables, Any], images: Array) -> Array:
        variables, trigger = known
        return net_apply(variables, stamp(key, trigger, to_float(images)), train=False)[0]

    return predict


def logits(net: Net, variables: Variables, data: Batch, *, batch_size: int = 256) -> np.ndarray:
    """Logits [N, K] of the net on `data` (images uint8 or float in [0, 1])."""
    measure = predictor(net.apply)
    return measure_batches(measure, jax.random.key(0), variables, data, batch_size=batch_size)


def baseline(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """[K] share of the images of other classes that are given to each class without any trigger; 0
    where there are no others.

    Args:
      predicted, labels: [N], the net's classes and the true ones.
      classes: K.
    """
    others = [labels != k for k in range(classes)]
    return np.array(
        [(predicted[rows] == k).sum() / max(rows.sum(), 1) for k, rows in enumerate(others)]
    )


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
    measure = stamped_predictor(net.apply, stamp)
    return measure_batches(measure, key, (variables, trigger), data, batch_size=batch_size)


def rates(
    key: Key,
    net: Net,
    variables: Variables,
    data: Batch,
    attack: Attack | None = None,
    trigger: Any = None,
) -> Rates:
    """All rates of a net on `data`, with the attack's trigger where one is given.

    Only `attack.stamp` and `attack.relabel` are used, so any stamping function with a wish for
    labels will do.
    """
    labels = np.asarray(data.labels)
    predicted = logits(net, variables, data).argmax(-1)
    accuracy = float((predicted == labels).mean())
    if attack is None:
        return Rates(accuracy, None, None, None, len(labels), 0)
    wanted = np.asarray(attack.relabel(jnp.asarray(labels)))
    stamped = triggered_logits(key, net, variables, attack.stamp, trigger, data).argmax(-1)
    counted = wanted != labels
    correct = counted & (predicted == labels)
    return Rates(
        accuracy,
        _share(stamped == wanted, counted),
        _share(stamped == labels, counted),
        _share(stamped == wanted, correct),
        len(labels),
        int(counted.sum()),
    )


def _share(hits: np.ndarray, among: np.ndarray) -> float | None:
    """Share of hits [N] bool among the rows `among` [N] bool; None where there is none to count."""
    return float(hits[among].mean()) if among.any() else None


@cached(64)
def _stamping(measure: Measure, stamp: Callable[..., Any] | None) -> Measure:
    """`measure` of stamped images, or of float ones; takes (known, trigger)."""

    def measured(key: Key, known: tuple[Any, Any], images: Array) -> Any:
        stamp_key, key = jax.random.split(key)
        images, (known, trigger) = to_float(images), known
        return measure(key, known, images if stamp is None else stamp(stamp_key, trigger, images))

    return measured


def per_image(
    key: Key,
    measure: Measure,
    known: Any,
    data: Batch,
    stamp: Callable[..., Any] | None = None,
    trigger: Any = (),
    *,
    batch_size: int = 256,
    numbers: Container[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """What a pure `measure(key, known, images [B, H, W, C] in [0, 1]) -> pytree of [B, …]` says of
    each image, as NumPy [N, …].

    Args:
      known: whatever `measure` needs besides the images, such as a net's variables.
      stamp, trigger: where given, every image is first stamped by `stamp(key, trigger, images)`.
      numbers: batches to measure, counted from 0, where not all of them; N is of their images.
      progress: called as progress(images done, of all images) after each batch, on an accelerator
        after up to 32 of them.
    """
    return measure_batches(
        _stamping(measure, stamp),
        key,
        (known, trigger),
        data,
        batch_size=batch_size,
        numbers=numbers,
        progress=progress,
    )


def detection(
    key: Key,
    flag: Callable[[Key, Any, Any], Any],
    known: Any,
    data: Batch,
    attack: Attack,
    trigger: Any,
    *,
    batch_size: int = 256,
) -> Detection:
    """How often `flag(key, known, images) -> [B] bool` is right on `data`, clean and stamped with
    the attack's trigger.

    Only `attack.stamp` and `attack.relabel` are used.
    """
    clean_key, stamped_key = jax.random.split(key)
    labels = np.asarray(data.labels)
    wanted = np.asarray(attack.relabel(jnp.asarray(labels)))
    counted = wanted != labels
    of_target = np.isin(labels, wanted[counted])
    clean = per_image(clean_key, flag, known, data, batch_size=batch_size)
    stamped = per_image(
        stamped_key, flag, known, data, attack.stamp, trigger, batch_size=batch_size
    )
    everything = np.ones(len(labels), bool)
    shares = _share(stamped, counted), _share(clean, of_target), _share(clean, everything)
    return Detection(*shares, int(counted.sum()), int(of_target.sum()), len(labels))
