"""Which rows carry the trigger: fresh ones in every batch (dynamic), or the same ones for the whole run (static)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Attack, Batch, Key, UserError
from jaxbd.images import to_float


@functools.lru_cache(maxsize=32)
def dynamic(attack: Attack, draw: Callable[..., Batch]) -> Callable[..., Batch]:
    """A draw over data = (Batch, trigger) that poisons each drawn batch anew (Qiao et al. 2019, released code)."""

    def poisoned(key: Key, data: tuple[Batch, Any]) -> Batch:
        batch_key, poison_key = jax.random.split(key)
        clean, trigger = data
        return attack.poison(poison_key, trigger, draw(batch_key, clean))

    return poisoned


def static(key: Key, attack: Attack, trigger: Any, data: Batch, count: int, *, per_class: bool = False) -> Batch:
    """A copy of `data` in which `count` rows are stamped and relabelled once, chosen among rows that change label.

    With `per_class`, `count` rows of every source class. Images come back as uint8.

    Raises: UserError when there are fewer such rows than asked for.
    """
    choose_key, stamp_key = jax.random.split(key)
    labels = np.asarray(data.labels)
    wanted = np.asarray(attack.relabel(jnp.asarray(labels)))
    order = np.asarray(jax.random.permutation(choose_key, len(labels)))
    order = order[labels[order] != wanted[order]]
    groups = [order[labels[order] == k] for k in np.unique(labels[order])] if per_class else [order]
    if min(map(len, groups), default=0) < count:
        most = min(map(len, groups), default=0)
        raise UserError(f"asked to poison {count} images, only {most} can be; ask for fewer")
    rows = np.concatenate([group[:count] for group in groups])
    images, new_labels = _to_uint8(np.array(data.images)), labels.copy()
    stamped = attack.stamp(stamp_key, trigger, to_float(jnp.asarray(images[rows])))
    images[rows] = _to_uint8(np.asarray(stamped))
    new_labels[rows] = wanted[rows]
    return Batch(images, new_labels)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] (clipped) as uint8; uint8 images pass unchanged."""
    return images if images.dtype == np.uint8 else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
