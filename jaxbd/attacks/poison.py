"""Shared by all attacks: chooses the rows that carry the trigger and sets their labels.

Rows are chosen again for every batch (dynamic) or once for the whole run (static).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Attack, Batch, Decoy, Key, UserError
from jaxbd.caching import cached
from jaxbd.images import to_float

AT_ONCE = 4096
"""Number of images that static poisoning stamps at a time."""


def check_rate(method: str, rate: float, decoys: float = 0.0) -> None:
    """Raises UserError unless `rate` is in [0, 1], also after adding `decoys` times as many
    rows."""
    if not 0 <= rate <= 1:
        raise UserError(f"{method}: poison_rate {rate} is not in [0, 1]")
    if not (decoys >= 0 and rate * (1 + decoys) <= 1):
        raise UserError(
            f"{method}: poison_rate {rate} plus {decoys} times as many decoys exceeds the batch"
        )


def relabelling(
    method: str, classes: int, target: int, all_to_all: bool
) -> Callable[[Array], Array]:
    """The function from labels [B] to the attacker's labels: always `target`, or c + 1 mod K for
    class c (all-to-all).

    Raises: UserError when the target is not one of the K = `classes`.
    """
    if not 0 <= target < classes:
        raise UserError(
            f"{method}: target {target} is out of range; the model has classes 0..{classes - 1}"
        )

    def relabel(labels: Array) -> Array:
        return (labels + 1) % classes if all_to_all else jnp.full_like(labels, target)

    return relabel


def attack(
    init: Callable[[Key], Any],
    stamp: Callable[[Key, Any, Array], Array],
    relabel: Callable[[Array], Array],
    rate: float,
    decoy: Decoy | None = None,
) -> Attack:
    """The attack that stamps and relabels each row of a batch independently with probability
    `rate`.

    With a `decoy`, it also disturbs other rows, `decoy.ratio` times as many in expectation, which
    keep their labels.
    """

    def poison(key: Key, trigger: Any, batch: Batch) -> Batch:
        """Qiao et al. 2019, eq. (1): stamps and relabels each row independently with probability
        r."""
        choose_key, stamp_key = jax.random.split(key)
        # one draw per row decides both, so that no row is poisoned and a decoy at once
        drawn = jax.random.uniform(choose_key, batch.labels.shape)
        chosen = drawn < rate
        images = _where(chosen, stamp(stamp_key, trigger, batch.images), batch.images)
        if decoy is not None:
            disturbed = decoy.stamp(jax.random.fold_in(stamp_key, 1), trigger, batch.images)
            images = _where(~chosen & (drawn < rate * (1 + decoy.ratio)), disturbed, images)
        return Batch(images, jnp.where(chosen, relabel(batch.labels), batch.labels))

    return Attack(init, stamp, poison, relabel, decoy)


def _where(rows: Array, images: Array, others: Array) -> Array:
    """`images` [B, H, W, C] where `rows` [B] is true, `others` elsewhere."""
    return jnp.where(rows[:, None, None, None], images, others)


@cached(32)
def dynamic(attack: Attack, draw: Callable[..., Batch]) -> Callable[..., Batch]:
    """A draw function over data = (Batch, trigger) that poisons every batch it draws (Qiao et al.
    2019, released code)."""

    def draw_poisoned(key: Key, data: tuple[Batch, Any]) -> Batch:
        batch_key, poison_key = jax.random.split(key)
        clean, trigger = data
        return attack.poison(poison_key, trigger, draw(batch_key, clean))

    return draw_poisoned


def static(
    key: Key,
    attack: Attack,
    trigger: Any,
    data: Batch,
    count: int | float,
    *,
    per_class: bool = False,
) -> Batch:
    """A copy of `data` with `count` rows stamped and relabelled, chosen among the rows that change
    label.

    With `per_class`, `count` rows of each source class. A `count` below 1 is a share of the
    eligible rows. An attack's decoys come from all other rows, of any class. Returns uint8 images.

    Raises: UserError when there are too few eligible rows.
    """
    choose_key, stamp_key = jax.random.split(key)
    labels = np.asarray(data.labels)
    wanted = np.asarray(attack.relabel(jnp.asarray(labels)))
    order = np.asarray(jax.random.permutation(choose_key, len(labels)))
    sources = order[labels[order] != wanted[order]]
    groups = (
        [sources[labels[sources] == k] for k in np.unique(labels[sources])]
        if per_class
        else [sources]
    )
    rows = np.concatenate([group[: number_of(count, len(group))] for group in groups or [sources]])
    images, new_labels = to_uint8(np.array(data.images)), labels.copy()
    decoys, decoy_key = _decoys(attack, order, rows), jax.random.fold_in(stamp_key, 1)
    if attack.decoy is not None and len(decoys):
        images[decoys] = stamp_uint8(attack.decoy.stamp, decoy_key, trigger, images[decoys])
    images[rows] = stamp_uint8(attack.stamp, stamp_key, trigger, images[rows])
    new_labels[rows] = wanted[rows]
    return Batch(images, new_labels)


def number_of(count: int | float, most: int) -> int:
    """Converts `count`, a number or a share of `most` rows, to a number. Raises: UserError when it
    exceeds `most`."""
    number = max(1, round(count * most)) if 0 < count < 1 else int(count)
    if number > most:
        raise UserError(f"asked to poison {number} images, only {most} can be; ask for fewer")
    return number


def _decoys(attack: Attack, order: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first `decoy.ratio` * len(`rows`) rows of `order` that are not in `rows`. Raises:
    UserError if there are too few."""
    number = 0 if attack.decoy is None else round(attack.decoy.ratio * len(rows))
    others = order[~np.isin(order, rows)]
    if number > len(others):
        raise UserError(
            f"{len(rows)} poisoned images need {number} decoys, only {len(others)} other images"
            " exist; poison fewer"
        )
    return others[:number]


def stamp_uint8(
    stamp: Callable[..., Array], key: Key, trigger: Any, images: np.ndarray
) -> np.ndarray:
    """Applies `stamp` to uint8 images [B, H, W, C] and returns uint8.

    Works on `AT_ONCE` images at a time, because a whole data set would take four times its memory
    as floats.
    """
    done = []
    for start in range(0, len(images), AT_ONCE):
        part = to_float(jnp.asarray(images[start : start + AT_ONCE]))
        done.append(
            to_uint8(
                np.asarray(stamp(jax.random.fold_in(key, start) if start else key, trigger, part))
            )
        )
    return np.concatenate(done) if done else images


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] (clipped) as uint8; uint8 images pass unchanged."""
    return (
        images
        if images.dtype == np.uint8
        else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    )
