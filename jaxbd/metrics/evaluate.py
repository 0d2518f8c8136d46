"""Clean accuracy, attack success rate, source inference accuracy, and the rates of test-time
detectors."""

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
    """Rates of a net on clean and on triggered images; the keys of `evaluate.json`.

    Attributes:
      clean_accuracy: share of clean images that get their true label.
      attack_success_rate: share of triggered images that get the attacker's label, over images
        whose true label is a different one; None, like the next two, if no trigger was given or no
        image counts.
      source_inference_accuracy: share of the same triggered images that get their true label (SIA,
        Li et al. 2022).
      attack_success_rate_correct_only: attack success rate over images that this net classifies
        correctly without the trigger (the denominator of the released code of Yan et al. 2023;
        their eq. 9 asks the backdoored net).
      n_clean: denominator of `clean_accuracy`.
      n_triggered: denominator of `attack_success_rate`.
    """

    clean_accuracy: float
    attack_success_rate: float | None
    source_inference_accuracy: float | None
    attack_success_rate_correct_only: float | None
    n_clean: int
    n_triggered: int


@dataclasses.dataclass(frozen=True)
class Detection:
    """Rates of a test-time detector of triggered images (Li et al. 2023, section 5.3).

    Attributes:
      true_positive_rate: share of triggered images that are flagged, over images whose true label
        is not the attacker's; None if there are none.
      false_positive_rate: share of clean images of the attacker's target classes that are flagged
        (for an all-to-all attack, of all classes); None if there are none.
      false_positive_rate_all: the same over all clean images.
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
    """(key, variables, images) -> logits [B, K]; cached, so that it is traced once per net."""
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
    """[K] share of other classes' images that the net assigns to each class without any trigger; 0
    if there are no such images.

    Args:
      predicted, labels: [N], predicted and true classes.
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
    """Logits [N, K] on `data` after stamping every image with `stamp(key, trigger, images)`."""
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
    """Measures all rates of a net on `data`, including those under the attack's trigger if given.

    Uses only `attack.stamp` and `attack.relabel`, so any pair of such functions will do.
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
    """Share of hits [N] bool among the rows `among` [N] bool; None if `among` is empty."""
    return float(hits[among].mean()) if among.any() else None


@cached(64)
def _stamping(measure: Measure, stamp: Callable[..., Any] | None) -> Measure:
    """`measure` with images converted to float and stamped if there is a `stamp`; takes (known,
    trigger)."""

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
    """Applies a pure `measure(key, known, images [B, H, W, C] in [0, 1]) -> pytree of [B, …]` to
    each image; NumPy [N, …].

    Args:
      known: other inputs of `measure`, for example a net's variables.
      stamp, trigger: if given, every image is first stamped with `stamp(key, trigger, images)`.
      numbers: indices of the batches to measure; None for all. N counts only their images.
      progress: called as progress(images done, all images) after each batch, on an accelerator
        after up to 32 batches.
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
    """Measures the detector `flag(key, known, images) -> [B] bool` on `data`, both clean and with
    the attack's trigger.

    Uses only `attack.stamp` and `attack.relabel`.
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
