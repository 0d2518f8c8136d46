"""Shared by all sources: which rows to read, and checked packing into a `Dataset`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, labels
from jaxbd.limits import clean_text


def chosen_rows(total: int, limit: int | None, seed: int) -> np.ndarray:
    """Draws rows [min(limit, total)] int64 without replacement from 0..total-1, ascending; all rows
    without a limit.

    With the same seed, a smaller limit chooses a subset of a larger limit's rows.

    Raises: UserError when the limit is below 1 or `total` exceeds `LIMITS.images`.
    """
    if total > bounded.LIMITS.images:
        raise UserError(
            f"data has {total:,} images, the limit is {bounded.LIMITS.images:,}; give fewer"
        )
    if limit is None:
        return np.arange(total)
    if limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    # a prefix of one permutation, so that a smaller limit gives a subset
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit])


def dataset(
    images: np.ndarray,
    given: Any,
    class_names: Sequence[str] | None,
    name: str,
    classes: labels.Classes = labels.Classes(),
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Packs uint8 `images` [N, H, W, C] and their labels `given`, in any form of `labels.number`.

    Args:
      class_names: class names of the source; None if it gives none.
      notes: what the user should know about how the source was read.
    Raises: UserError when there are no images, or the labels do not fit them or the model.
    """
    if len(images) == 0:
        raise UserError(f"data {name} holds no images; give at least one")
    numbers, names = labels.number(given, class_names, classes, f"data {name}")
    if len(numbers) != len(images):
        raise UserError(
            f"data {name}: {len(images)} images but {len(numbers)} labels; give one label per image"
        )
    names = tuple(clean_text(name, 100) for name in names)
    return Dataset(images, numbers, names, name, tuple(map(clean_text, notes)))
